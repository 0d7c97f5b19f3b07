//! Row-major matrices in f32, f16 or bf16, borrowed from the caller.

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::kernel::{self, vector};
use crate::pool::Workers;

/// The element type of a matrix, a store or a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
}

impl Dtype {
    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// Its name in a safetensors header: `F32`, `F16` or `BF16`.
    pub fn tag(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
        }
    }

    /// The type of that name, in either case.
    pub fn from_tag(tag: &str) -> Option<Self> {
        match tag {
            "F32" | "f32" => Some(Dtype::F32),
            "F16" | "f16" => Some(Dtype::F16),
            "BF16" | "bf16" => Some(Dtype::Bf16),
            _ => None,
        }
    }
}

/// Borrowed elements of one of the three types.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> Values<'a> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(v) => v.len(),
            Values::F16(v) => v.len(),
            Values::Bf16(v) => v.len(),
        }
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Values::F32(_) => Dtype::F32,
            Values::F16(_) => Dtype::F16,
            Values::Bf16(_) => Dtype::Bf16,
        }
    }

    /// Converts `out.len()` elements from `start` on; exact.
    pub(crate) fn read(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Values::F32(v) => out.copy_from_slice(&v[range]),
            Values::F16(v) => vector::widen_f16(&v[range], out),
            Values::Bf16(v) => vector::widen_bf16(&v[range], out),
        }
    }

    /// Their bytes as they lie in memory.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        match self {
            Values::F32(v) => bytemuck::cast_slice(v),
            Values::F16(v) => bytemuck::cast_slice(v),
            Values::Bf16(v) => bytemuck::cast_slice(v),
        }
    }

    fn slice(&self, range: std::ops::Range<usize>) -> Values<'a> {
        match self {
            Values::F32(v) => Values::F32(&v[range]),
            Values::F16(v) => Values::F16(&v[range]),
            Values::Bf16(v) => Values::Bf16(&v[range]),
        }
    }

    /// The largest magnitude, or infinity if any element is not finite.
    pub(crate) fn max_abs(&self) -> f32 {
        let widest = match self {
            Values::F32(v) => f32::from_bits(vector::max_abs_bits(v)),
            Values::F16(v) => {
                f16::from_bits(vector::max_abs_half_bits(bytemuck::cast_slice(v))).to_f32()
            }
            Values::Bf16(v) => {
                bf16::from_bits(vector::max_abs_half_bits(bytemuck::cast_slice(v))).to_f32()
            }
        };
        if widest.is_finite() {
            widest
        } else {
            f32::INFINITY
        }
    }
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(v: &'a [f32]) -> Self {
        Values::F32(v)
    }
}

impl<'a> From<&'a Vec<f32>> for Values<'a> {
    fn from(v: &'a Vec<f32>) -> Self {
        Values::F32(v)
    }
}

impl<'a> From<&'a [f16]> for Values<'a> {
    fn from(v: &'a [f16]) -> Self {
        Values::F16(v)
    }
}

impl<'a> From<&'a [bf16]> for Values<'a> {
    fn from(v: &'a [bf16]) -> Self {
        Values::Bf16(v)
    }
}

/// A borrowed row-major matrix `[rows, cols]`.
///
/// ```
/// use nest_rs::Matrix;
/// let x = Matrix::new(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0][..], 3, 2)?;
/// assert_eq!((x.rows(), x.cols()), (3, 2));
/// # Ok::<(), nest_rs::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    values: Values<'a>,
    rows: usize,
    cols: usize,
}

impl<'a> Matrix<'a> {
    /// Views `values` as `[rows, cols]`.
    ///
    /// # Errors
    /// The number of elements is not `rows * cols`, or either is 0.
    pub fn new(values: impl Into<Values<'a>>, rows: usize, cols: usize) -> Result<Self> {
        let values = values.into();
        if rows == 0 || cols == 0 {
            return Err(Error::shape(
                "X",
                (rows, cols),
                "at least one row and one column",
            ));
        }
        if rows.checked_mul(cols) != Some(values.len()) {
            return Err(Error::shape(
                "X",
                values.len(),
                format!("{rows} x {cols} elements"),
            ));
        }
        Ok(Matrix { values, rows, cols })
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The elements, row after row.
    pub fn values(&self) -> Values<'a> {
        self.values
    }

    /// Reads part of a row, from column `start` on, as f32.
    pub(crate) fn read(&self, row: usize, start: usize, out: &mut [f32]) {
        self.values.read(row * self.cols + start, out);
    }

    /// Asks for what [`Matrix::read`] will read.
    pub(crate) fn prefetch(&self, row: usize, start: usize, len: usize) {
        let from = row * self.cols + start;
        match self.values {
            Values::F32(v) => kernel::prefetch(&v[from..from + len]),
            Values::F16(v) => kernel::prefetch(&v[from..from + len]),
            Values::Bf16(v) => kernel::prefetch(&v[from..from + len]),
        }
    }

    /// Checks every element and returns the largest magnitude.
    ///
    /// # Errors
    /// [`Error::NonFinite`] with the first row that holds a NaN or an infinity.
    pub(crate) fn scan(&self, what: &str, workers: &Workers) -> Result<f32> {
        let step = rows_a_task(self.cols);
        let widest = workers.map(self.rows.div_ceil(step), |t| {
            let (from, to) = (t * step, ((t + 1) * step).min(self.rows));
            self.values
                .slice(from * self.cols..to * self.cols)
                .max_abs()
        })?;
        if let Some(task) = widest.iter().position(|m| m.is_infinite()) {
            let mut row = vec![0.0; self.cols];
            for i in task * step..((task + 1) * step).min(self.rows) {
                self.read(i, 0, &mut row);
                if let Some(col) = row.iter().position(|v| !v.is_finite()) {
                    return Err(Error::NonFinite {
                        what: what.to_string(),
                        row: i,
                        col,
                        value: row[col],
                    });
                }
            }
        }
        Ok(widest.into_iter().fold(0.0, f32::max))
    }

    /// Column means and population variances. One pass, in f64.
    pub(crate) fn column_moments(&self, workers: &Workers) -> Result<(Vec<f64>, Vec<f64>)> {
        // As in `moments`.
        let (n, d) = (self.rows, self.cols);
        let mut first = vec![0.0; d];
        self.read(0, 0, &mut first);
        let step = fixed_step(n);
        let partial = workers.map(n.div_ceil(step), |t| {
            let (mut sum, mut squares) = (vec![0.0f64; d], vec![0.0f64; d]);
            let mut row = vec![0.0; d];
            for i in t * step..((t + 1) * step).min(n) {
                self.read(i, 0, &mut row);
                vector::add_with_squares(&mut sum, &mut squares, &row, &first);
            }
            (sum, squares)
        })?;
        let (mut mean, mut variance) = (vec![0.0f64; d], vec![0.0f64; d]);
        for (sum, squares) in &partial {
            mean.iter_mut().zip(sum).for_each(|(m, s)| *m += s);
            variance.iter_mut().zip(squares).for_each(|(v, s)| *v += s);
        }
        let inverse = 1.0 / n as f64;
        for ((m, v), &base) in mean.iter_mut().zip(&mut variance).zip(&first) {
            *m *= inverse;
            *v = (*v * inverse - *m * *m).max(0.0);
            *m += f64::from(base);
        }
        Ok((mean, variance))
    }

    /// Column means, and the mean over the columns of their population variance. One pass, in f64.
    pub(crate) fn moments(&self, workers: &Workers) -> Result<(Vec<f64>, f64)> {
        // Sums of differences to the first row: no cancellation when the mean is far from zero.
        let (n, d) = (self.rows, self.cols);
        let mut first = vec![0.0; d];
        self.read(0, 0, &mut first);
        let step = fixed_step(n);
        let partial = workers.map(n.div_ceil(step), |t| {
            let mut sum = vec![0.0f64; d];
            let mut squares = 0.0f64;
            let mut row = vec![0.0; d];
            for i in t * step..((t + 1) * step).min(n) {
                self.read(i, 0, &mut row);
                squares += vector::add_shifted(&mut sum, &row, &first);
            }
            (sum, squares)
        })?;
        let mut mean = vec![0.0f64; d];
        let mut squares = 0.0;
        for (sum, sq) in &partial {
            mean.iter_mut().zip(sum).for_each(|(m, s)| *m += s);
            squares += sq;
        }
        let inverse = 1.0 / n as f64;
        let mut spread = squares * inverse;
        for (m, &base) in mean.iter_mut().zip(&first) {
            *m *= inverse;
            spread -= *m * *m;
            *m += f64::from(base);
        }
        Ok((mean, (spread / d as f64).max(0.0)))
    }
}

/// Rows a task where the result does not depend on how rows are grouped: about a megabyte.
pub(crate) fn rows_a_task(cols: usize) -> usize {
    (256 * 1024 / cols.max(1)).clamp(1, 65_536)
}

/// Rows a task where it does (sums): a function of the shape alone, at most 32 tasks.
pub(crate) fn fixed_step(rows: usize) -> usize {
    rows.div_ceil(32).max(64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_checked() {
        assert!(Matrix::new(&[1.0f32, 2.0][..], 1, 3).is_err());
        assert!(Matrix::new(&[][..] as &[f32], 0, 3).is_err());
        assert!(Matrix::new(&[0.0f32][..], usize::MAX, 2).is_err());
    }

    #[test]
    fn the_first_bad_row_is_named() {
        let mut x = vec![1.0f32; 7 * 5];
        x[4 * 5 + 3] = f32::NAN;
        x[6 * 5] = f32::INFINITY;
        let workers = Workers::new(Some(2)).unwrap();
        let found = Matrix::new(&x, 7, 5).unwrap().scan("X", &workers);
        match found {
            Err(Error::NonFinite { row, col, .. }) => assert_eq!((row, col), (4, 3)),
            other => panic!("{other:?}"),
        }
        let half: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
        assert!(
            Matrix::new(&half[..], 7, 5)
                .unwrap()
                .scan("X", &workers)
                .is_err()
        );
    }

    #[test]
    fn moments_survive_a_large_offset() {
        let x: Vec<f32> = (0..4000).map(|i| 10_000.0 + (i % 7) as f32).collect();
        let workers = Workers::new(Some(1)).unwrap();
        let (mean, spread) = Matrix::new(&x, 2000, 2).unwrap().moments(&workers).unwrap();
        let column: Vec<f64> = x.iter().step_by(2).map(|&v| f64::from(v)).collect();
        let m = column.iter().sum::<f64>() / 2000.0;
        assert!((mean[0] - m).abs() < 1e-9);
        assert!((spread - 4.0).abs() < 1e-2, "{spread}");
    }
}
