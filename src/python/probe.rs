//! Probes and the selection of rows.

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use super::array::Array;
use super::run;
use crate::{Probe, select_rows};

/// coef, intercept, n_iter, converged
pub(super) type PyProbe<'py> = (Bound<'py, PyArray1<f64>>, f64, usize, bool);

pub(super) fn probe_out(py: Python<'_>, fit: crate::ProbeFit) -> PyProbe<'_> {
    (
        fit.coef.into_pyarray(py),
        fit.intercept,
        fit.n_iter,
        fit.converged,
    )
}

#[pyfunction]
#[pyo3(signature = (x, dtype, y, *, c, n_threads))]
fn probe_fit<'py>(
    py: Python<'py>,
    x: Array<'py>,
    dtype: &str,
    y: PyReadonlyArray1<'py, u8>,
    c: f64,
    n_threads: Option<usize>,
) -> PyResult<PyProbe<'py>> {
    let matrix = x.matrix(dtype)?;
    let y = y.as_array().to_vec();
    let fit = run(py, n_threads, |workers| {
        Probe::new().c(c).fit_with(&matrix, &y, workers)
    })?;
    Ok(probe_out(py, fit))
}

#[pyfunction(name = "select_rows")]
#[pyo3(signature = (coef, z, positive))]
fn py_select_rows<'py>(
    py: Python<'py>,
    coef: PyReadonlyArray1<'py, f64>,
    z: f64,
    positive: bool,
) -> PyResult<Bound<'py, PyArray1<i32>>> {
    let coef = coef.as_array().to_vec();
    Ok(select_rows(&coef, z, positive)?.into_pyarray(py))
}

/// Adds these to the module.
pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(probe_fit, module)?)?;
    module.add_function(wrap_pyfunction!(py_select_rows, module)?)
}
