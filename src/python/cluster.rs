//! k-means and silhouettes.

use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArrayDyn, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::array::{Array, array2};
use super::run;
use crate::kmeans::{self, Fit, Init, KMeans, Metric};
use crate::silhouette::{self, Distance};

fn metric(name: &str) -> PyResult<Metric> {
    match name {
        "euclidean" => Ok(Metric::Euclidean),
        "cosine" => Ok(Metric::Cosine),
        _ => Err(PyValueError::new_err(format!(
            "metric is `{name}`: k-means knows euclidean and cosine"
        ))),
    }
}

fn distance(name: &str) -> PyResult<Distance> {
    match name {
        "euclidean" => Ok(Distance::Euclidean),
        "sqeuclidean" => Ok(Distance::SqEuclidean),
        "cosine" => Ok(Distance::Cosine),
        _ => Err(PyValueError::new_err(format!(
            "metric is `{name}`: a silhouette knows euclidean, sqeuclidean and cosine"
        ))),
    }
}

/// labels, centers, inertia, n_iter, n_used
type PyFit<'py> = (
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray2<f32>>,
    f64,
    usize,
    usize,
);

fn fit_out<'py>(py: Python<'py>, fit: Fit, d: usize) -> PyResult<PyFit<'py>> {
    let k = fit.centers.len() / d;
    Ok((
        fit.labels.into_pyarray(py),
        array2(py, fit.centers, k, d)?,
        fit.inertia,
        fit.n_iter,
        fit.n_used,
    ))
}

#[allow(clippy::too_many_arguments)]
#[pyfunction]
#[pyo3(signature = (x, dtype, n_clusters, *, metric, init, n_init, max_iter, tol, seed, n_threads))]
fn kmeans_fit<'py>(
    py: Python<'py>,
    x: Array<'py>,
    dtype: &str,
    n_clusters: usize,
    metric: &str,
    init: Option<PyReadonlyArrayDyn<'py, f32>>,
    n_init: usize,
    max_iter: usize,
    tol: f64,
    seed: u64,
    n_threads: Option<usize>,
) -> PyResult<PyFit<'py>> {
    let matrix = x.matrix(dtype)?;
    let init = match init {
        None => Init::PlusPlus,
        Some(centers) => {
            let want = [n_clusters, matrix.cols()];
            if centers.shape() != want {
                return Err(PyValueError::new_err(format!(
                    "init has shape `{:?}`, expected {want:?}",
                    centers.shape()
                )));
            }
            Init::Centers(centers.as_array().iter().copied().collect())
        }
    };
    let settings = KMeans::new(n_clusters)
        .metric(self::metric(metric)?)
        .init(init)
        .n_init(n_init)
        .max_iter(max_iter)
        .tol(tol)
        .seed(seed);
    let fit = run(py, n_threads, |workers| settings.fit_with(&matrix, workers))?;
    fit_out(py, fit, matrix.cols())
}

#[allow(clippy::too_many_arguments)]
#[pyfunction]
#[pyo3(signature = (x, dtype, ks, *, metric, n_init, max_iter, tol, seed, n_threads))]
fn kmeans_sweep<'py>(
    py: Python<'py>,
    x: Array<'py>,
    dtype: &str,
    ks: Vec<usize>,
    metric: &str,
    n_init: usize,
    max_iter: usize,
    tol: f64,
    seed: u64,
    n_threads: Option<usize>,
) -> PyResult<Vec<(usize, PyFit<'py>, Option<f64>)>> {
    let matrix = x.matrix(dtype)?;
    let settings = KMeans::new(1)
        .metric(self::metric(metric)?)
        .max_iter(max_iter)
        .tol(tol)
        .seed(seed);
    let swept = run(py, n_threads, |workers| {
        settings.sweep_with(&matrix, &ks, n_init, workers)
    })?;
    swept
        .into_iter()
        .map(|c| Ok((c.k, fit_out(py, c.fit, matrix.cols())?, c.silhouette)))
        .collect()
}

#[pyfunction]
#[pyo3(signature = (x, dtype, centers, *, metric, n_threads))]
fn kmeans_predict<'py>(
    py: Python<'py>,
    x: Array<'py>,
    dtype: &str,
    centers: PyReadonlyArrayDyn<'py, f32>,
    metric: &str,
    n_threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray1<i32>>> {
    let matrix = x.matrix(dtype)?;
    let metric = self::metric(metric)?;
    if centers.ndim() != 2 || centers.shape()[1] != matrix.cols() {
        return Err(PyValueError::new_err(format!(
            "X has `{}` columns and the centres have shape `{:?}`",
            matrix.cols(),
            centers.shape()
        )));
    }
    let centers: Vec<f32> = centers.as_array().iter().copied().collect();
    let labels = run(py, n_threads, |workers| {
        kmeans::predict(&matrix, &centers, metric, workers)
    })?;
    Ok(labels.into_pyarray(py))
}

#[pyfunction]
#[pyo3(signature = (x, dtype, labels, *, metric, n_threads))]
fn silhouette_samples<'py>(
    py: Python<'py>,
    x: Array<'py>,
    dtype: &str,
    labels: PyReadonlyArray1<'py, i32>,
    metric: &str,
    n_threads: Option<usize>,
) -> PyResult<(f64, Bound<'py, PyArray1<f64>>)> {
    let matrix = x.matrix(dtype)?;
    let distance = distance(metric)?;
    let labels: Vec<i32> = labels.as_array().to_vec();
    let mut scores = run(py, n_threads, |workers| {
        silhouette::silhouettes_with(&matrix, &[&labels], distance, workers)
    })?;
    match scores.pop() {
        Some(score) => Ok((score.mean, score.samples.into_pyarray(py))),
        None => Err(PyValueError::new_err("no labels")),
    }
}

/// Adds these to the module.
pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(kmeans_fit, module)?)?;
    module.add_function(wrap_pyfunction!(kmeans_sweep, module)?)?;
    module.add_function(wrap_pyfunction!(kmeans_predict, module)?)?;
    module.add_function(wrap_pyfunction!(silhouette_samples, module)?)
}
