//! Max-pooling over tokens and class statistics.

use half::vec::HalfFloatVecExt;
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArrayDyn, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::array::{Array, array2};
use super::run;
use crate::Matrix;
use crate::activations::{ClassStats, Pooled, masked_max};

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

/// Adds these to the module.
pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(py_masked_max, module)?)?;
    module.add_class::<PyClassStats>()
}
