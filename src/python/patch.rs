//! Patches: the arithmetic on rows, and changes under a journal.

use std::path::PathBuf;

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use crate::fold::Rows;
use crate::fold::journal::{self, Action, Block, Change, Place};
use crate::{Dtype, Error, gguf};

type Bytes<'py> = PyReadonlyArray1<'py, u8>;

/// file, item, stride, count, offsets
type PyPlace = (String, u64, u64, u64, Vec<u64>);

/// place, old, new
type PyBlock<'py> = (PyPlace, Bound<'py, PyArray1<u8>>, Bound<'py, PyArray1<u8>>);

fn place((file, item, stride, count, offsets): PyPlace) -> Place {
    Place {
        file,
        item,
        stride,
        count,
        offsets,
    }
}

/// The deltas of one matrix, in the type its rows are stored in.
#[pyclass(name = "RowEdit", frozen, module = "nest_rs._core")]
struct RowEdit {
    dtype: Dtype,
    width: usize,
    cluster: Vec<i32>,
    delta: Vec<f32>,
}

impl RowEdit {
    /// Works on bytes of rows without the GIL.
    fn run<'py>(
        &self,
        py: Python<'py>,
        work: impl FnOnce(&Rows<'_>) -> crate::Result<Vec<u8>> + Send,
    ) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let rows = Rows {
            dtype: self.dtype,
            width: self.width,
            cluster: &self.cluster,
            delta: &self.delta,
        };
        Ok(py.detach(|| work(&rows))?.into_pyarray(py))
    }
}

#[pymethods]
impl RowEdit {
    #[new]
    fn new(
        dtype: &str,
        cluster: PyReadonlyArray1<'_, i32>,
        delta: PyReadonlyArray2<'_, f32>,
    ) -> PyResult<Self> {
        Ok(RowEdit {
            dtype: Dtype::from_tag(dtype)
                .ok_or_else(|| Error::argument("dtype", dtype, "use F32, F16 or BF16"))?,
            width: delta.as_array().ncols(),
            cluster: cluster.as_slice()?.to_vec(),
            delta: delta.as_slice()?.to_vec(),
        })
    }

    fn fold<'py>(&self, py: Python<'py>, old: Bytes<'py>) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let old = old.as_slice()?;
        self.run(py, |rows| rows.fold(old))
    }

    fn residual<'py>(
        &self,
        py: Python<'py>,
        old: Bytes<'py>,
        new: Bytes<'py>,
    ) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let (old, new) = (old.as_slice()?, new.as_slice()?);
        self.run(py, |rows| rows.residual(old, new))
    }

    fn unfold<'py>(
        &self,
        py: Python<'py>,
        new: Bytes<'py>,
        residual: Bytes<'py>,
    ) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let (new, residual) = (new.as_slice()?, residual.as_slice()?);
        self.run(py, |rows| rows.unfold(new, residual))
    }
}

#[pyfunction]
fn read_rows(py: Python<'_>, root: PathBuf, rows: PyPlace) -> PyResult<Bound<'_, PyArray1<u8>>> {
    let place = place(rows);
    Ok(py
        .detach(|| journal::read_rows(&root, &place))?
        .into_pyarray(py))
}

/// A change to files: places with their old and new bytes.
#[pyclass(name = "Change", frozen, module = "nest_rs._core")]
struct PyChange(Change);

#[pymethods]
impl PyChange {
    #[new]
    fn new(
        remove: bool,
        patch: String,
        info: String,
        blocks: Vec<(PyPlace, Bytes<'_>, Bytes<'_>)>,
    ) -> PyResult<Self> {
        let blocks = blocks
            .into_iter()
            .map(|(rows, old, new)| {
                Ok(Block {
                    place: place(rows),
                    old: old.as_slice()?.to_vec(),
                    new: new.as_slice()?.to_vec(),
                })
            })
            .collect::<PyResult<_>>()?;
        let action = if remove {
            Action::Remove
        } else {
            Action::Apply
        };
        Ok(PyChange(Change {
            action,
            patch,
            info,
            blocks,
        }))
    }

    #[staticmethod]
    fn read(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(PyChange(py.detach(|| journal::read_change(&path))?))
    }

    fn commit(&self, py: Python<'_>, root: PathBuf, state: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| self.0.commit(&root, &state))?)
    }

    fn copy(&self, py: Python<'_>, src: PathBuf, dst: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| self.0.copy(&src, &dst))?)
    }

    fn note(&self, py: Python<'_>, state: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| self.0.note(&state))?)
    }

    #[getter]
    fn patch(&self) -> &str {
        &self.0.patch
    }

    #[getter]
    fn info(&self) -> &str {
        &self.0.info
    }

    fn blocks<'py>(&self, py: Python<'py>) -> Vec<PyBlock<'py>> {
        self.0
            .blocks
            .iter()
            .map(|block| {
                let p = &block.place;
                (
                    (p.file.clone(), p.item, p.stride, p.count, p.offsets.clone()),
                    block.old.clone().into_pyarray(py),
                    block.new.clone().into_pyarray(py),
                )
            })
            .collect()
    }
}

#[pyfunction]
fn recover(py: Python<'_>, root: PathBuf, state: PathBuf) -> PyResult<Option<(bool, String)>> {
    let done = py.detach(|| journal::recover(&root, &state))?;
    Ok(done.map(|(action, patch)| (action == Action::Remove, patch)))
}

/// tensors (name, type, shape with the row width first, begin, end), strings, whole numbers
type PyGguf = (
    Vec<(String, u32, Vec<u64>, u64, u64)>,
    std::collections::BTreeMap<String, String>,
    std::collections::BTreeMap<String, u64>,
);

#[pyfunction]
fn read_gguf(py: Python<'_>, path: PathBuf) -> PyResult<PyGguf> {
    let header = py.detach(|| gguf::read(&path))?;
    let tensors = header
        .tensors
        .into_iter()
        .map(|t| (t.name, t.kind, t.shape, t.span.0, t.span.1))
        .collect();
    Ok((tensors, header.strings, header.numbers))
}

pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(read_rows, module)?)?;
    module.add_function(wrap_pyfunction!(recover, module)?)?;
    module.add_function(wrap_pyfunction!(read_gguf, module)?)?;
    module.add_class::<RowEdit>()?;
    module.add_class::<PyChange>()
}
