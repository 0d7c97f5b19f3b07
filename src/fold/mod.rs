//! Adding tied deltas to rows of matrices in a safetensors file, and nothing else.
//!
//! For each edited tensor, `W'[i, :] = round(f32(W[i, :]) + delta[cluster[i], :])` for the selected
//! rows i; the sum in f32, rounded to the tensor's type to nearest even. Every other byte of the
//! file, the header included, stays as it is. Everything is checked before anything is written, the
//! copy is written to a temporary file beside the target, flushed, and renamed: a failure leaves no
//! trace. Scratch memory: the selected rows, and a megabyte.

pub mod journal;
mod rows;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use half::{bf16, f16};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::header;
pub use crate::header::{Header, TensorInfo};
use crate::matrix::Dtype;
pub use rows::Rows;

const CHUNK: usize = 1 << 20;

/// What to add to one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit {
    /// The rows to change, each once.
    pub rows: Vec<i32>,
    /// The cluster of each of them.
    pub cluster: Vec<i32>,
    /// One row a cluster, row-major `[k, d_in]`.
    pub delta: Vec<f32>,
    /// The number of clusters.
    pub k: usize,
}

/// What a fold did to one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folded {
    /// SHA-256 of its bytes before, in hexadecimal.
    pub sha256_before: String,
    /// SHA-256 of its bytes after.
    pub sha256_after: String,
    /// Rows it was given.
    pub rows: usize,
    /// Elements whose bits changed.
    pub changed: u64,
}

/// Reads and checks the header of a safetensors file.
///
/// # Errors
/// [`Error::Format`] for a header that is truncated, not JSON, or lies about the bytes behind it.
pub fn read_header(path: &Path) -> Result<Header> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    header::read(path, &mut file)
}

/// SHA-256, in hexadecimal, of the bytes of tensors of a file; of all of them if `names` is `None`.
///
/// # Errors
/// As [`read_header`]; an unknown name.
pub fn tensor_sha256(path: &Path, names: Option<&[String]>) -> Result<BTreeMap<String, String>> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let header = header::read(path, &mut file)?;
    let names: Vec<String> = match names {
        Some(names) => names.to_vec(),
        None => header.tensors.iter().map(|t| t.name.clone()).collect(),
    };
    let mut out = BTreeMap::new();
    for name in names {
        let tensor = header
            .get(&name)
            .ok_or_else(|| Error::tensor(&name, format!("not in `{}`", path.display())))?;
        let mut hash = Sha256::new();
        let (begin, end) = tensor.span;
        copy(path, &mut file, begin, end, |bytes| {
            hash.update(bytes);
            Ok(())
        })?;
        out.insert(name, hex(hash));
    }
    Ok(out)
}

/// Copies `src` to `dst` with the rows of `edits` changed. `dst` may be `src`.
///
/// # Errors
/// Before anything is written: a file that is not what it says, an unknown tensor, one that is not a
/// matrix of F32, F16 or BF16, rows that are repeated or out of range, clusters out of range, shapes
/// that do not fit, a delta or a result that is not finite. Then the disk's own; the temporary file is
/// removed.
pub fn fold_file(
    src: &Path,
    dst: &Path,
    edits: &BTreeMap<String, Edit>,
) -> Result<BTreeMap<String, Folded>> {
    let mut source = File::open(src).map_err(Error::io(src))?;
    let header = header::read(src, &mut source)?;
    let mut plans = Vec::with_capacity(edits.len());
    for (name, edit) in edits {
        let tensor = header
            .get(name)
            .ok_or_else(|| Error::tensor(name, format!("not in `{}`", src.display())))?;
        plans.push(plan(src, &mut source, tensor, edit)?);
    }
    plans.sort_by_key(|plan| plan.span);

    let folder = match dst.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut temporary = tempfile::Builder::new()
        .prefix(".nest-rs-")
        .suffix(".partial")
        .tempfile_in(folder)
        .map_err(Error::io(folder))?;
    let mut report = BTreeMap::new();
    let mut at = 0;
    for plan in &plans {
        let target = temporary.as_file_mut();
        copy(src, &mut source, at, plan.span.0, |bytes| {
            target.write_all(bytes).map_err(Error::io(dst))
        })?;
        report.insert(
            plan.name.clone(),
            patch(src, dst, &mut source, target, plan)?,
        );
        at = plan.span.1;
    }
    let end = source.metadata().map_err(Error::io(src))?.len();
    let target = temporary.as_file_mut();
    copy(src, &mut source, at, end, |bytes| {
        target.write_all(bytes).map_err(Error::io(dst))
    })?;

    // A temporary file is private to its owner; the copy is as readable as the original.
    let permissions = source.metadata().map_err(Error::io(src))?.permissions();
    target
        .set_permissions(permissions)
        .map_err(Error::io(dst))?;
    target.sync_all().map_err(Error::io(dst))?;
    temporary.persist(dst).map_err(|e| Error::Io {
        path: dst.to_path_buf(),
        source: e.error,
    })?;
    // The rename itself; not every system can flush a folder.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(report)
}

/// The new bytes of the selected rows of one tensor, by offset in the file.
struct Plan {
    name: String,
    span: (u64, u64),
    rows: BTreeMap<u64, Vec<u8>>,
    changed: u64,
}

fn plan(path: &Path, file: &mut File, tensor: &TensorInfo, edit: &Edit) -> Result<Plan> {
    let fail = |reason: String| Err(Error::tensor(&tensor.name, reason));
    let &[n_rows, d] = tensor.shape.as_slice() else {
        return fail(format!(
            "its shape `{:?}` is not that of a matrix",
            tensor.shape
        ));
    };
    let Some(dtype) = Dtype::from_tag(&tensor.dtype) else {
        return fail(format!(
            "its type `{}` is not F32, F16 or BF16",
            tensor.dtype
        ));
    };
    if edit.rows.len() != edit.cluster.len() {
        let (r, c) = (edit.rows.len(), edit.cluster.len());
        return fail(format!("`{r}` rows and `{c}` clusters"));
    }
    if edit.k.checked_mul(d) != Some(edit.delta.len()) {
        let got = edit.delta.len();
        return fail(format!(
            "the delta has `{got}` elements, expected {} x {d}",
            edit.k
        ));
    }
    if let Some(i) = edit.delta.iter().position(|v| !v.is_finite()) {
        let value = edit.delta[i];
        return fail(format!(
            "the delta of cluster `{}` holds `{value}`",
            i / d.max(1)
        ));
    }

    let row_bytes = (d * dtype.size()) as u64;
    let mut bytes = vec![0u8; row_bytes as usize];
    let mut rows = BTreeMap::new();
    let mut changed = 0;
    for (&row, &cluster) in edit.rows.iter().zip(&edit.cluster) {
        let Some(index) = usize::try_from(row).ok().filter(|&r| r < n_rows) else {
            return fail(format!("row `{row}` is out of range: it has {n_rows}"));
        };
        let Some(cluster) = usize::try_from(cluster).ok().filter(|&c| c < edit.k) else {
            return fail(format!(
                "cluster `{cluster}` of row `{row}` is out of range: k is {}",
                edit.k
            ));
        };
        let at = tensor.span.0 + index as u64 * row_bytes;
        file.seek(SeekFrom::Start(at))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(Error::io(path))?;
        let delta = &edit.delta[cluster * d..(cluster + 1) * d];
        let moved = match add(dtype, &bytes, delta) {
            Ok(moved) => moved,
            Err(col) => {
                return fail(format!("row `{row}`, column `{col}` would not be finite"));
            }
        };
        changed += moved
            .chunks_exact(dtype.size())
            .zip(bytes.chunks_exact(dtype.size()))
            .filter(|(a, b)| a != b)
            .count() as u64;
        if rows.insert(at, moved).is_some() {
            return fail(format!("row `{row}` is given twice"));
        }
    }
    Ok(Plan {
        name: tensor.name.clone(),
        span: tensor.span,
        rows,
        changed,
    })
}

/// `round(row + delta)`, or the first column where that is not finite.
fn add(dtype: Dtype, row: &[u8], delta: &[f32]) -> std::result::Result<Vec<u8>, usize> {
    let mut out = Vec::with_capacity(row.len());
    for (col, (v, u)) in row.chunks_exact(dtype.size()).zip(delta).enumerate() {
        let finite = match (dtype, v) {
            (Dtype::F32, &[a, b, c, d]) => {
                let sum = f32::from_le_bytes([a, b, c, d]) + u;
                out.extend(sum.to_le_bytes());
                sum.is_finite()
            }
            (Dtype::F16, &[a, b]) => {
                let sum = f16::from_f32(f16::from_le_bytes([a, b]).to_f32() + u);
                out.extend(sum.to_le_bytes());
                sum.is_finite()
            }
            (Dtype::Bf16, &[a, b]) => {
                let sum = bf16::from_f32(bf16::from_le_bytes([a, b]).to_f32() + u);
                out.extend(sum.to_le_bytes());
                sum.is_finite()
            }
            _ => false,
        };
        if !finite {
            return Err(col);
        }
    }
    Ok(out)
}

/// Writes one edited tensor, hashing it before and after.
fn patch(
    src: &Path,
    dst: &Path,
    source: &mut File,
    target: &mut File,
    plan: &Plan,
) -> Result<Folded> {
    let (mut before, mut after) = (Sha256::new(), Sha256::new());
    let mut at = plan.span.0;
    for (&offset, moved) in &plan.rows {
        copy(src, source, at, offset, |bytes| {
            before.update(bytes);
            after.update(bytes);
            target.write_all(bytes).map_err(Error::io(dst))
        })?;
        at = offset + moved.len() as u64;
        copy(src, source, offset, at, |bytes| {
            before.update(bytes);
            Ok(())
        })?;
        after.update(moved);
        target.write_all(moved).map_err(Error::io(dst))?;
    }
    copy(src, source, at, plan.span.1, |bytes| {
        before.update(bytes);
        after.update(bytes);
        target.write_all(bytes).map_err(Error::io(dst))
    })?;
    Ok(Folded {
        sha256_before: hex(before),
        sha256_after: hex(after),
        rows: plan.rows.len(),
        changed: plan.changed,
    })
}

/// Reads bytes `from..to` of a file in chunks.
fn copy(
    path: &Path,
    file: &mut File,
    from: u64,
    to: u64,
    mut sink: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut left = to - from;
    let mut buffer = vec![0u8; left.min(CHUNK as u64) as usize];
    file.seek(SeekFrom::Start(from)).map_err(Error::io(path))?;
    while left > 0 {
        let part = &mut buffer[..left.min(CHUNK as u64) as usize];
        file.read_exact(part).map_err(Error::io(path))?;
        sink(part)?;
        left -= part.len() as u64;
    }
    Ok(())
}

fn hex(hash: Sha256) -> String {
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
