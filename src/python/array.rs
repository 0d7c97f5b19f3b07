//! Arrays that come in and go out.

use half::slice::HalfBitsSliceExt;
use numpy::{IntoPyArray, PyArray2, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::{Dtype, Matrix, Values};

/// An array of one of the three types.
#[derive(FromPyObject)]
pub(super) enum Array<'py> {
    Single(PyReadonlyArrayDyn<'py, f32>),
    Half(PyReadonlyArrayDyn<'py, u16>),
}

impl Array<'_> {
    pub(super) fn shape(&self) -> &[usize] {
        match self {
            Array::Single(a) => a.shape(),
            Array::Half(a) => a.shape(),
        }
    }

    pub(super) fn values(&self, dtype: &str) -> PyResult<Values<'_>> {
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

    pub(super) fn matrix(&self, dtype: &str) -> PyResult<Matrix<'_>> {
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

pub(super) fn array2<'py, T: numpy::Element>(
    py: Python<'py>,
    values: Vec<T>,
    rows: usize,
    cols: usize,
) -> PyResult<Bound<'py, PyArray2<T>>> {
    values.into_pyarray(py).reshape([rows, cols])
}
