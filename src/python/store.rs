//! Activation stores.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;

use numpy::{PyArray2, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::array::{Array, array2};
use super::probe::{PyProbe, probe_out};
use super::run;
use crate::activations::StoreWriter;
use crate::{ActivationStore, Dtype, Probe};

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

/// Adds these to the module.
pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyStoreWriter>()?;
    module.add_class::<PyStore>()
}
