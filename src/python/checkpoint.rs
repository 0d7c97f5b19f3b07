//! Rows of safetensors files.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use numpy::{PyReadonlyArray1, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::error::Error;
use crate::fold::{self, Edit};

/// rows, cluster, delta
type PyEdit<'py> = (
    PyReadonlyArray1<'py, i32>,
    PyReadonlyArray1<'py, i32>,
    PyReadonlyArrayDyn<'py, f32>,
);

/// sha256 before, sha256 after, rows, changed elements
type PyFolded = (String, String, usize, u64);

#[pyfunction]
fn fold_file(
    py: Python<'_>,
    src: PathBuf,
    dst: PathBuf,
    edits: HashMap<String, PyEdit<'_>>,
) -> PyResult<BTreeMap<String, PyFolded>> {
    let mut owned = BTreeMap::new();
    for (name, (rows, cluster, delta)) in edits {
        let &[k, _] = delta.shape() else {
            return Err(Error::tensor(
                &name,
                format!(
                    "the delta has shape `{:?}`, expected (k, d_in)",
                    delta.shape()
                ),
            )
            .into());
        };
        let edit = Edit {
            rows: rows.as_array().to_vec(),
            cluster: cluster.as_array().to_vec(),
            delta: delta.as_array().iter().copied().collect(),
            k,
        };
        owned.insert(name, edit);
    }
    let report = py.detach(|| fold::fold_file(&src, &dst, &owned))?;
    Ok(report
        .into_iter()
        .map(|(name, f)| (name, (f.sha256_before, f.sha256_after, f.rows, f.changed)))
        .collect())
}

#[pyfunction]
#[pyo3(signature = (path, names=None))]
fn tensor_sha256(
    py: Python<'_>,
    path: PathBuf,
    names: Option<Vec<String>>,
) -> PyResult<BTreeMap<String, String>> {
    Ok(py.detach(|| fold::tensor_sha256(&path, names.as_deref()))?)
}

/// tensors (name, dtype, shape, begin, end), metadata
type PyHeader = (
    Vec<(String, String, Vec<usize>, u64, u64)>,
    BTreeMap<String, String>,
);

#[pyfunction]
fn read_header(py: Python<'_>, path: PathBuf) -> PyResult<PyHeader> {
    let header = py.detach(|| fold::read_header(&path))?;
    let tensors = header
        .tensors
        .into_iter()
        .map(|t| (t.name, t.dtype, t.shape, t.span.0, t.span.1))
        .collect();
    Ok((tensors, header.metadata))
}

/// Adds these to the module.
pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(fold_file, module)?)?;
    module.add_function(wrap_pyfunction!(tensor_sha256, module)?)?;
    module.add_function(wrap_pyfunction!(read_header, module)?)
}
