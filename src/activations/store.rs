//! The activation store: an ordinary safetensors file, written block by block, read through a map.
//!
//! One tensor `[n_rows, width]` a site, all of one type, and a free string map in the header. The
//! file is created at its full size as `NAME.partial`, filled in any order, and renamed when it is
//! finished: a file under its final name is complete. A writer that went away can be resumed.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::header::{self, Header};
use crate::kernel::map;
use crate::matrix::{Dtype, Matrix, Values};

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian, and so is this code");

/// One tensor of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Its name, for example `model.layers.3.mlp.up_proj`.
    pub name: String,
    /// Its number of columns (neurons).
    pub width: usize,
    span: (u64, u64),
}

/// What a header says of a store.
#[derive(Clone, Debug)]
struct Layout {
    sites: Vec<Site>,
    n_rows: usize,
    dtype: Dtype,
    metadata: BTreeMap<String, String>,
}

impl Layout {
    fn from_header(path: &Path, header: Header) -> Result<Self> {
        let mut sites = Vec::with_capacity(header.tensors.len());
        let mut common = None;
        for tensor in header.tensors {
            let (Some(dtype), &[rows, width]) =
                (Dtype::from_tag(&tensor.dtype), tensor.shape.as_slice())
            else {
                return Err(Error::format(
                    path,
                    format!(
                        "site `{}` has type `{}` and shape `{:?}`: a store holds matrices of F32, F16 or BF16",
                        tensor.name, tensor.dtype, tensor.shape
                    ),
                ));
            };
            if *common.get_or_insert((dtype, rows)) != (dtype, rows) || rows == 0 || width == 0 {
                return Err(Error::format(
                    path,
                    format!(
                        "site `{}` has type `{}` and shape `{:?}`: all sites of a store share type and rows",
                        tensor.name, tensor.dtype, tensor.shape
                    ),
                ));
            }
            if !tensor.span.0.is_multiple_of(dtype.size() as u64) {
                return Err(Error::format(
                    path,
                    format!(
                        "site `{}` begins at byte `{}`: not aligned",
                        tensor.name, tensor.span.0
                    ),
                ));
            }
            sites.push(Site {
                name: tensor.name,
                width,
                span: tensor.span,
            });
        }
        let (dtype, n_rows) = common.ok_or_else(|| Error::format(path, "it holds no site"))?;
        Ok(Layout {
            sites,
            n_rows,
            dtype,
            metadata: header.metadata,
        })
    }

    fn site(&self, name: &str) -> Result<&Site> {
        self.sites
            .iter()
            .find(|site| site.name == name)
            .ok_or_else(|| Error::tensor(name, "no such site in the store"))
    }
}

/// A finished store, mapped for reading.
///
/// ```
/// use std::collections::BTreeMap;
/// use nest_rs::{ActivationStore, Dtype, Matrix};
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("probe.safetensors");
/// let sites = [("layer.0.up".to_string(), 3)];
/// let mut writer = ActivationStore::create(&path, &sites, 2, Dtype::Bf16, BTreeMap::new())?;
/// writer.write("layer.0.up", 0, &Matrix::new(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0][..], 2, 3)?)?;
/// let store = writer.finish()?;
/// assert_eq!(store.columns("layer.0.up", &[2, 0], false)?, [3.0, 6.0, 1.0, 4.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ActivationStore {
    map: memmap2::Mmap,
    layout: Layout,
}

impl ActivationStore {
    /// Starts a store of `n_rows` rows at `path`, with one tensor for each `(name, width)`. A
    /// `.partial` file of an earlier writer is replaced.
    ///
    /// # Errors
    /// No site, a site named twice or of no width, no row, a size beyond 2^63; the disk's own.
    pub fn create(
        path: &Path,
        sites: &[(String, usize)],
        n_rows: usize,
        dtype: Dtype,
        metadata: BTreeMap<String, String>,
    ) -> Result<StoreWriter> {
        if sites.is_empty() || n_rows == 0 {
            let reason = "a store needs a site and a row";
            return Err(Error::argument("n_rows", n_rows, reason));
        }
        let mut tensors = Vec::with_capacity(sites.len());
        let mut total = 0u64;
        for (i, (name, width)) in sites.iter().enumerate() {
            if name.is_empty() || name == "__metadata__" || *width == 0 {
                return Err(Error::tensor(
                    name,
                    format!("cannot name a site of width `{width}`"),
                ));
            }
            if sites[..i].iter().any(|(other, _)| other == name) {
                return Err(Error::tensor(name, "named twice"));
            }
            let bytes = (n_rows as u64)
                .checked_mul(*width as u64)
                .and_then(|n| n.checked_mul(dtype.size() as u64))
                .filter(|b| *b < i64::MAX as u64 / 4)
                .ok_or_else(|| Error::tensor(name, "too large"))?;
            total = total
                .checked_add(bytes)
                .filter(|t| *t < i64::MAX as u64 / 2)
                .ok_or_else(|| Error::tensor(name, "the store is too large"))?;
            tensors.push((name.as_str(), dtype.tag(), vec![n_rows, *width], bytes));
        }
        let head = header::write(&tensors, &metadata);
        let partial = partial_path(path)?;
        let mut file = File::create(&partial).map_err(Error::io(&partial))?;
        file.set_len(head.len() as u64 + total)
            .map_err(Error::io(&partial))?;
        file.write_all(&head).map_err(Error::io(&partial))?;
        drop(file);
        Self::resume(path)
    }

    /// Continues a store that was not finished. Which rows are still missing is for the caller to
    /// know; rows never written read as zeros.
    ///
    /// # Errors
    /// No `.partial` file beside `path`, or one that is not a store.
    pub fn resume(path: &Path) -> Result<StoreWriter> {
        let partial = partial_path(path)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&partial)
            .map_err(Error::io(&partial))?;
        let layout = Layout::from_header(&partial, header::read(&partial, &mut file)?)?;
        Ok(StoreWriter {
            file,
            path: path.to_path_buf(),
            partial,
            layout,
            unsynced: 0,
        })
    }

    /// Maps a finished store.
    ///
    /// The file must not be truncated while it is open: a map cannot guard against that.
    ///
    /// # Errors
    /// [`Error::Format`] for a file that is truncated, has overlapping or missing bytes, or is not a
    /// store; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let layout = Layout::from_header(path, header::read(path, &mut file)?)?;
        let map = map::open(path)?;
        if layout
            .sites
            .iter()
            .any(|site| site.span.1 > map.len() as u64)
        {
            return Err(Error::format(path, "it changed while it was opened"));
        }
        Ok(ActivationStore { map, layout })
    }

    /// The sites, in the order of the file.
    pub fn sites(&self) -> &[Site] {
        &self.layout.sites
    }

    /// Rows (prompts) of every site.
    pub fn n_rows(&self) -> usize {
        self.layout.n_rows
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// The free string map.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.layout.metadata
    }

    /// A site's matrix `[n_rows, width]`, in the mapped memory.
    ///
    /// # Errors
    /// No such site.
    pub fn site(&self, name: &str) -> Result<Matrix<'_>> {
        let site = self.layout.site(name)?;
        let bytes = &self.map[site.span.0 as usize..site.span.1 as usize];
        let misaligned = |_| Error::tensor(name, "its bytes are not aligned");
        let values = match self.layout.dtype {
            Dtype::F32 => Values::F32(bytemuck::try_cast_slice(bytes).map_err(misaligned)?),
            Dtype::F16 => Values::F16(bytemuck::try_cast_slice(bytes).map_err(misaligned)?),
            Dtype::Bf16 => Values::Bf16(bytemuck::try_cast_slice(bytes).map_err(misaligned)?),
        };
        Matrix::new(values, self.layout.n_rows, site.width)
    }

    /// Columns of a site as rows: `[cols.len(), n_rows]`, row-major. These are the points of the
    /// clustering: the values of one neuron over all prompts. With `standardize`, each is brought to
    /// mean 0 and population standard deviation 1 (a constant one to zeros).
    ///
    /// # Errors
    /// No such site, a column out of range, or a non-finite element in those columns.
    pub fn columns(&self, name: &str, cols: &[usize], standardize: bool) -> Result<Vec<f32>> {
        let x = self.site(name)?;
        let n = x.rows();
        if let Some(&col) = cols.iter().find(|&&c| c >= x.cols()) {
            return Err(Error::tensor(
                name,
                format!("column `{col}` is out of range: it has {}", x.cols()),
            ));
        }
        let mut out = vec![0.0f32; cols.len() * n];
        for i in 0..n {
            for (c, &col) in cols.iter().enumerate() {
                x.read(i, col, &mut out[c * n + i..][..1]);
            }
        }
        for (row, &col) in out.chunks_exact_mut(n).zip(cols) {
            if let Some(i) = row.iter().position(|v| !v.is_finite()) {
                return Err(Error::NonFinite {
                    what: format!("site `{name}`"),
                    row: i,
                    col,
                    value: row[i],
                });
            }
            if standardize {
                standardise(row);
            }
        }
        Ok(out)
    }
}

fn standardise(row: &mut [f32]) {
    let n = row.len() as f64;
    let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = row
        .iter()
        .map(|&v| (f64::from(v) - mean).powi(2))
        .sum::<f64>()
        / n;
    let constant = row.iter().all(|v| *v == row[0]);
    let factor = if constant { 0.0 } else { 1.0 / variance.sqrt() };
    for v in row {
        *v = ((f64::from(*v) - mean) * factor) as f32;
    }
}

fn partial_path(path: &Path) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::argument("path", path.display(), "names no file"));
    };
    let mut name = name.to_os_string();
    name.push(".partial");
    Ok(path.with_file_name(name))
}

/// How much may be written before the disk is waited for.
const SYNC_BYTES: usize = 64 << 20;

/// A store being written. Dropped unfinished, it leaves its `.partial` file to be resumed.
#[derive(Debug)]
pub struct StoreWriter {
    file: File,
    path: PathBuf,
    partial: PathBuf,
    layout: Layout,
    /// Bytes written since the disk was last waited for.
    unsynced: usize,
}

impl StoreWriter {
    /// The sites, in the order of the file.
    pub fn sites(&self) -> &[Site] {
        &self.layout.sites
    }

    /// Rows (prompts) of every site.
    pub fn n_rows(&self) -> usize {
        self.layout.n_rows
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// The free string map.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.layout.metadata
    }

    /// Writes rows `start..start + block.rows()` of a site, converted to the store's type (round to
    /// nearest even).
    ///
    /// # Errors
    /// No such site, rows or columns that do not fit, an element that is not finite in the store's
    /// type; the disk's own.
    pub fn write(&mut self, site: &str, start: usize, block: &Matrix) -> Result<()> {
        let Site { width, span, .. } = *self.layout.site(site)?;
        let rows = block.rows();
        if block.cols() != width {
            return Err(Error::tensor(
                site,
                format!(
                    "a block of `{}` columns: the site has {width}",
                    block.cols()
                ),
            ));
        }
        if start
            .checked_add(rows)
            .is_none_or(|end| end > self.layout.n_rows)
        {
            return Err(Error::tensor(
                site,
                format!(
                    "rows `{start}..{}` are out of range: the store has {}",
                    start.saturating_add(rows),
                    self.layout.n_rows
                ),
            ));
        }
        let dtype = self.layout.dtype;
        let mut at = span.0 + (start * width * dtype.size()) as u64;
        if block.values().dtype() == dtype && block.values().max_abs().is_finite() {
            return self.put(at, block.values().bytes());
        }
        let mut single = vec![0.0f32; width];
        let step = (1 << 20) / (width * dtype.size()) + 1;
        let mut bytes = Vec::with_capacity(step.min(rows) * width * dtype.size());
        for from in (0..rows).step_by(step) {
            bytes.clear();
            for i in from..(from + step).min(rows) {
                block.read(i, 0, &mut single);
                let finite = encode(&single, dtype, &mut bytes);
                if let Err(col) = finite {
                    return Err(Error::NonFinite {
                        what: format!("the block for site `{site}`"),
                        row: start + i,
                        col,
                        value: single[col],
                    });
                }
            }
            self.put(at, &bytes)?;
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// Writes bytes at a place of the file. The disk is given its part now and then, while others compute, not all of
    /// it at the end.
    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.unsynced += bytes.len();
        self.file
            .seek(SeekFrom::Start(at))
            .and_then(|_| self.file.write_all(bytes))
            .and_then(|()| {
                if self.unsynced < SYNC_BYTES {
                    return Ok(());
                }
                self.unsynced = 0;
                self.file.sync_data()
            })
            .map_err(Error::io(&self.partial))
    }

    /// Flushes to the disk, renames to the final name, and opens the store.
    ///
    /// # Errors
    /// The disk's own.
    pub fn finish(self) -> Result<ActivationStore> {
        self.file.sync_all().map_err(Error::io(&self.partial))?;
        drop(self.file);
        std::fs::rename(&self.partial, &self.path).map_err(Error::io(&self.path))?;
        ActivationStore::open(&self.path)
    }
}

/// Appends a row in the given type, or returns the first column that is not finite in it.
fn encode(row: &[f32], dtype: Dtype, out: &mut Vec<u8>) -> std::result::Result<(), usize> {
    for (col, &v) in row.iter().enumerate() {
        let finite = match dtype {
            Dtype::F32 => {
                out.extend(v.to_le_bytes());
                v.is_finite()
            }
            Dtype::F16 => {
                let v = f16::from_f32(v);
                out.extend(v.to_le_bytes());
                v.is_finite()
            }
            Dtype::Bf16 => {
                let v = bf16::from_f32(v);
                out.extend(v.to_le_bytes());
                v.is_finite()
            }
        };
        if !finite {
            return Err(col);
        }
    }
    Ok(())
}
