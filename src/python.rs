//! The Python module `nest_rs._core`: a thin, typed surface over the crate.
//!
//! Arrays come in without a copy, f16 and bf16 as `uint16` views with a dtype tag (NumPy has no
//! bfloat16). Long calls release the GIL; the calling thread only watches for signals, so that
//! Ctrl-C is seen at once.

mod patch;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use half::slice::HalfBitsSliceExt;
use half::vec::HalfFloatVecExt;
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArrayDyn,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::activations::{ClassStats, Pooled, StoreWriter, masked_max};
use crate::error::Error;
use crate::fold::{self, Edit};
use crate::kmeans::{self, Fit, Init, KMeans, Metric};
use crate::silhouette::{self, Distance};
use crate::{ActivationStore, Dtype, Matrix, Probe, Values, Workers, active_isa, select_rows};

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match &error {
            Error::Io { path, source } => {
                let text = source.to_string();
                let (code, path) = (source.raw_os_error(), path.display().to_string());
                // With an error number, Python picks FileNotFoundError, PermissionError, ...
                match code {
                    Some(code) => PyOSError::new_err((code, strip_code(&text), path)),
                    None => PyOSError::new_err(error.to_string()),
                }
            }
            Error::Interrupted => PyKeyboardInterrupt::new_err(()),
            _ => PyValueError::new_err(error.to_string()),
        }
    }
}

/// The system's text without Rust's ` (os error 2)`, which Python writes its own way.
fn strip_code(text: &str) -> String {
    text.split(" (os error").next().unwrap_or(text).to_string()
}

/// An array of one of the three types.
#[derive(FromPyObject)]
enum Array<'py> {
    Single(PyReadonlyArrayDyn<'py, f32>),
    Half(PyReadonlyArrayDyn<'py, u16>),
}

impl Array<'_> {
    fn shape(&self) -> &[usize] {
        match self {
            Array::Single(a) => a.shape(),
            Array::Half(a) => a.shape(),
        }
    }

    fn values(&self, dtype: &str) -> PyResult<Values<'_>> {
        let contiguous = |_| PyValueError::new_err("the array is not C-contiguous: copy it first");
        match (self, Dtype::from_tag(dtype)) {
            (Array::Single(a), Some(Dtype::F32)) => {
                Ok(Values::F32(a.as_slice().map_err(contiguous)?))
            }
            (Array::Half(a), Some(Dtype::F16)) => {
                let bits = a.as_slice().map_err(contiguous)?;
                Ok(Values::F16(bits.reinterpret_cast()))
            }
            (Array::Half(a), Some(Dtype::Bf16)) => {
                let bits = a.as_slice().map_err(contiguous)?;
                Ok(Values::Bf16(bits.reinterpret_cast()))
            }
            _ => Err(PyValueError::new_err(format!(
                "dtype `{dtype}` does not fit the array: f32 for float32, f16 or bf16 for uint16"
            ))),
        }
    }

    fn matrix(&self, dtype: &str) -> PyResult<Matrix<'_>> {
        let values = self.values(dtype)?;
        match *self.shape() {
            [rows, cols] => Ok(Matrix::new(values, rows, cols)?),
            _ => Err(PyValueError::new_err(format!(
                "X has shape `{:?}`, expected a matrix",
                self.shape()
            ))),
        }
    }
}

/// Runs `work` on a thread of its own without the GIL, while this thread watches for signals.
fn run<T: Send>(
    py: Python<'_>,
    n_threads: Option<usize>,
    work: impl FnOnce(&Workers) -> crate::Result<T> + Send,
) -> PyResult<T> {
    let workers = Workers::new(n_threads)?;
    let cancel = AtomicBool::new(false);
    let mut signal: PyResult<()> = Ok(());
    let result = py.detach(|| {
        std::thread::scope(|scope| {
            let (done, finished) = channel();
            let cancel = &cancel;
            let thread = std::thread::Builder::new()
                .name("nest-rs-call".to_string())
                .spawn_scoped(scope, move || {
                    let result = work(&workers.with_cancel(cancel));
                    // The receiver outlives this thread.
                    let _ = done.send(());
                    result
                });
            let Ok(thread) = thread else {
                return Err(PyRuntimeError::new_err("the system gave no thread"));
            };
            while finished.recv_timeout(Duration::from_millis(50)) == Err(RecvTimeoutError::Timeout)
            {
                if signal.is_ok() {
                    signal = Python::attach(|py| py.check_signals());
                    if signal.is_err() {
                        cancel.store(true, Ordering::Relaxed);
                    }
                }
            }
            match thread.join() {
                Ok(result) => Ok(result),
                Err(_) => Err(PyRuntimeError::new_err(
                    "internal error: a worker stopped; please report it",
                )),
            }
        })
    })?;
    signal?;
    Ok(result?)
}

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

fn array2<'py, T: numpy::Element>(
    py: Python<'py>,
    values: Vec<T>,
    rows: usize,
    cols: usize,
) -> PyResult<Bound<'py, PyArray2<T>>> {
    values.into_pyarray(py).reshape([rows, cols])
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

/// coef, intercept, n_iter, converged
type PyProbe<'py> = (Bound<'py, PyArray1<f64>>, f64, usize, bool);

fn probe_out(py: Python<'_>, fit: crate::ProbeFit) -> PyProbe<'_> {
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

/// The pooled batch: float32, or the bits of f16 or bf16.
#[derive(IntoPyObject)]
enum PyPooled<'py> {
    Single(Bound<'py, PyArray2<f32>>),
    Half(Bound<'py, PyArray2<u16>>),
}

#[pyfunction(name = "masked_max")]
#[pyo3(signature = (x, dtype, mask, *, n_threads))]
fn py_masked_max<'py>(
    py: Python<'py>,
    x: Array<'py>,
    dtype: &str,
    mask: PyReadonlyArrayDyn<'py, u8>,
    n_threads: Option<usize>,
) -> PyResult<PyPooled<'py>> {
    let &[batch, tokens, d] = x.shape() else {
        return Err(PyValueError::new_err(format!(
            "X has shape `{:?}`, expected (batch, tokens, d)",
            x.shape()
        )));
    };
    if mask.shape() != [batch, tokens] {
        return Err(PyValueError::new_err(format!(
            "mask has shape `{:?}`, expected {:?}",
            mask.shape(),
            [batch, tokens]
        )));
    }
    let matrix = Matrix::new(x.values(dtype)?, batch * tokens, d)?;
    let mask: Vec<u8> = mask.as_array().iter().copied().collect();
    let pooled = run(py, n_threads, |workers| {
        masked_max(&matrix, &mask, tokens, workers)
    })?;
    Ok(match pooled {
        Pooled::F32(v) => PyPooled::Single(array2(py, v, batch, d)?),
        Pooled::F16(v) => PyPooled::Half(array2(py, v.reinterpret_into(), batch, d)?),
        Pooled::Bf16(v) => PyPooled::Half(array2(py, v.reinterpret_into(), batch, d)?),
    })
}

/// Streaming class statistics.
#[pyclass(name = "ClassStats", module = "nest_rs._core")]
struct PyClassStats(ClassStats);

#[pymethods]
impl PyClassStats {
    #[new]
    fn new(n_classes: usize, d: usize) -> PyResult<Self> {
        if n_classes.checked_mul(d).is_none_or(|n| n > 1 << 40) {
            return Err(PyValueError::new_err(format!(
                "`{n_classes}` classes of `{d}` columns are too many"
            )));
        }
        Ok(PyClassStats(ClassStats::new(n_classes, d)))
    }

    #[pyo3(signature = (x, dtype, y, *, n_threads))]
    fn update<'py>(
        &mut self,
        py: Python<'py>,
        x: Array<'py>,
        dtype: &str,
        y: PyReadonlyArray1<'py, u8>,
        n_threads: Option<usize>,
    ) -> PyResult<()> {
        let matrix = x.matrix(dtype)?;
        let y = y.as_array().to_vec();
        // On a copy, so that an interrupted update leaves no trace.
        let mut next = self.0.clone();
        self.0 = run(py, n_threads, |workers| {
            next.update(&matrix, &y, workers)?;
            Ok(next)
        })?;
        Ok(())
    }

    fn merge(&mut self, other: PyRef<'_, PyClassStats>) -> PyResult<()> {
        Ok(self.0.merge(&other.0)?)
    }

    fn copy(&self) -> Self {
        PyClassStats(self.0.clone())
    }

    #[getter]
    fn count<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        let counts: Vec<i64> = self.0.counts().iter().map(|&c| c as i64).collect();
        counts.into_pyarray(py)
    }

    #[getter]
    fn mean<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        self.by_class(py, |class| self.0.mean(class).to_vec())
    }

    #[getter]
    fn var<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        self.by_class(py, |class| self.0.variance(class))
    }

    #[getter]
    fn m2<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        self.by_class(py, |class| self.0.m2(class).to_vec())
    }

    /// Rebuilds statistics from `count`, `mean` and `m2`: to move them between processes.
    #[staticmethod]
    fn from_parts(
        count: PyReadonlyArray1<'_, i64>,
        mean: PyReadonlyArrayDyn<'_, f64>,
        m2: PyReadonlyArrayDyn<'_, f64>,
    ) -> PyResult<Self> {
        let counts: Vec<u64> = count
            .as_array()
            .iter()
            .map(|&c| u64::try_from(c))
            .collect::<Result<_, _>>()
            .map_err(|_| PyValueError::new_err("a count is negative"))?;
        let d = mean.shape().last().copied().unwrap_or(0);
        Ok(PyClassStats(ClassStats::from_parts(
            counts,
            mean.as_array().iter().copied().collect(),
            m2.as_array().iter().copied().collect(),
            d,
        )?))
    }
}

impl PyClassStats {
    fn by_class<'py>(
        &self,
        py: Python<'py>,
        of: impl Fn(usize) -> Vec<f64>,
    ) -> PyResult<Bound<'py, PyArray2<f64>>> {
        let classes = self.0.counts().len();
        let values: Vec<f64> = (0..classes).flat_map(of).collect();
        array2(py, values, classes, self.0.dim())
    }
}

/// A store being written.
#[pyclass(name = "StoreWriter", module = "nest_rs._core")]
struct PyStoreWriter(Mutex<Option<StoreWriter>>);

impl PyStoreWriter {
    fn with<R>(&self, use_it: impl FnOnce(&mut Option<StoreWriter>) -> PyResult<R>) -> PyResult<R> {
        use_it(&mut self.0.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

fn finished() -> PyErr {
    PyValueError::new_err("the store is finished or closed: it takes no more rows")
}

#[pymethods]
impl PyStoreWriter {
    #[staticmethod]
    fn create(
        path: PathBuf,
        sites: Vec<(String, usize)>,
        n_rows: usize,
        dtype: &str,
        metadata: BTreeMap<String, String>,
    ) -> PyResult<Self> {
        let Some(dtype) = Dtype::from_tag(dtype) else {
            return Err(PyValueError::new_err(format!(
                "dtype is `{dtype}`: a store holds f32, f16 or bf16"
            )));
        };
        let writer = ActivationStore::create(&path, &sites, n_rows, dtype, metadata)?;
        Ok(PyStoreWriter(Mutex::new(Some(writer))))
    }

    #[staticmethod]
    fn resume(path: PathBuf) -> PyResult<Self> {
        let writer = ActivationStore::resume(&path)?;
        Ok(PyStoreWriter(Mutex::new(Some(writer))))
    }

    fn write<'py>(
        &self,
        py: Python<'py>,
        site: &str,
        start: usize,
        block: Array<'py>,
        dtype: &str,
    ) -> PyResult<()> {
        let matrix = block.matrix(dtype)?;
        py.detach(|| {
            self.with(|writer| {
                let writer = writer.as_mut().ok_or_else(finished)?;
                Ok(writer.write(site, start, &matrix)?)
            })
        })
    }

    fn finish(&self, py: Python<'_>) -> PyResult<PyStore> {
        py.detach(|| {
            self.with(|writer| {
                let writer = writer.take().ok_or_else(finished)?;
                Ok(PyStore(writer.finish()?))
            })
        })
    }

    fn close(&self) -> PyResult<()> {
        self.with(|writer| {
            *writer = None;
            Ok(())
        })
    }

    #[getter]
    fn sites(&self) -> PyResult<Vec<(String, usize)>> {
        self.with(|writer| {
            let writer = writer.as_ref().ok_or_else(finished)?;
            Ok(writer
                .sites()
                .iter()
                .map(|s| (s.name.clone(), s.width))
                .collect())
        })
    }

    #[getter]
    fn n_rows(&self) -> PyResult<usize> {
        self.with(|writer| Ok(writer.as_ref().ok_or_else(finished)?.n_rows()))
    }

    #[getter]
    fn dtype(&self) -> PyResult<String> {
        self.with(|writer| {
            let dtype = writer.as_ref().ok_or_else(finished)?.dtype();
            Ok(dtype.tag().to_lowercase())
        })
    }

    #[getter]
    fn metadata(&self) -> PyResult<BTreeMap<String, String>> {
        self.with(|writer| Ok(writer.as_ref().ok_or_else(finished)?.metadata().clone()))
    }
}

/// A finished store, mapped.
#[pyclass(name = "Store", module = "nest_rs._core", frozen)]
struct PyStore(ActivationStore);

#[pymethods]
impl PyStore {
    #[staticmethod]
    fn open(path: PathBuf) -> PyResult<Self> {
        Ok(PyStore(ActivationStore::open(&path)?))
    }

    #[getter]
    fn sites(&self) -> Vec<(String, usize)> {
        self.0
            .sites()
            .iter()
            .map(|s| (s.name.clone(), s.width))
            .collect()
    }

    #[getter]
    fn n_rows(&self) -> usize {
        self.0.n_rows()
    }

    #[getter]
    fn dtype(&self) -> String {
        self.0.dtype().tag().to_lowercase()
    }

    #[getter]
    fn metadata(&self) -> BTreeMap<String, String> {
        self.0.metadata().clone()
    }

    fn read<'py>(&self, py: Python<'py>, site: &str) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let matrix = self.0.site(site)?;
        let mut values = vec![0.0f32; matrix.rows() * matrix.cols()];
        py.detach(|| matrix.values().read(0, &mut values));
        array2(py, values, matrix.rows(), matrix.cols())
    }

    fn columns<'py>(
        &self,
        py: Python<'py>,
        site: &str,
        cols: Vec<usize>,
        standardize: bool,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let values = py.detach(|| self.0.columns(site, &cols, standardize))?;
        array2(py, values, cols.len(), self.0.n_rows())
    }

    #[pyo3(signature = (y, *, c, sites, n_threads))]
    fn fit_probes<'py>(
        &self,
        py: Python<'py>,
        y: PyReadonlyArray1<'py, u8>,
        c: f64,
        sites: Option<Vec<String>>,
        n_threads: Option<usize>,
    ) -> PyResult<Vec<(String, PyProbe<'py>)>> {
        let y = y.as_array().to_vec();
        let fits = run(py, n_threads, |workers| {
            Probe::new()
                .c(c)
                .fit_store(&self.0, &y, sites.as_deref(), workers)
        })?;
        Ok(fits
            .into_iter()
            .map(|(name, fit)| (name, probe_out(py, fit)))
            .collect())
    }
}

/// rows, cluster, delta
type PyEdit<'py> = (
    PyReadonlyArray1<'py, i32>,
    PyReadonlyArray1<'py, i16>,
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

/// The instruction set in use.
#[pyfunction]
fn isa() -> PyResult<&'static str> {
    crate::kernel::check_isa()?;
    Ok(active_isa().name())
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(kmeans_fit, module)?)?;
    module.add_function(wrap_pyfunction!(kmeans_sweep, module)?)?;
    module.add_function(wrap_pyfunction!(kmeans_predict, module)?)?;
    module.add_function(wrap_pyfunction!(silhouette_samples, module)?)?;
    module.add_function(wrap_pyfunction!(probe_fit, module)?)?;
    module.add_function(wrap_pyfunction!(py_select_rows, module)?)?;
    module.add_function(wrap_pyfunction!(py_masked_max, module)?)?;
    module.add_function(wrap_pyfunction!(fold_file, module)?)?;
    module.add_function(wrap_pyfunction!(tensor_sha256, module)?)?;
    module.add_function(wrap_pyfunction!(read_header, module)?)?;
    module.add_function(wrap_pyfunction!(isa, module)?)?;
    module.add_class::<PyClassStats>()?;
    module.add_class::<PyStoreWriter>()?;
    module.add_class::<PyStore>()?;
    patch::add(module)
}
