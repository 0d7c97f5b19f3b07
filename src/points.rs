//! A matrix seen as points: converted, centred or scaled row by row, never copied whole.

use crate::error::Result;
use crate::kernel::{Rows, vector};
use crate::matrix::Matrix;
use crate::pool::Workers;

/// How stored elements become coordinates.
pub(crate) enum Transform {
    /// `x * scale - mean`. The scale is a power of two, 1 unless the magnitudes would overflow or
    /// vanish when squared, so that products and squares stay in the range of f32.
    Shift { scale: f32, mean: Vec<f32> },
    /// `x * scale`: differences between rows lose nothing to rounding.
    Scale { scale: f32 },
    /// `x / |x|`; a zero row stays zero. In f64, so that any finite row has a direction.
    Unit { inverse_norm: Vec<f64> },
}

/// The points of a matrix, checked to be finite.
pub(crate) struct Points<'a> {
    x: Matrix<'a>,
    transform: Transform,
    /// Mean over the columns of the variance of the transformed points.
    pub mean_variance: f64,
}

impl<'a> Points<'a> {
    /// Centred on the column means: dot products keep their precision.
    pub fn centred(x: Matrix<'a>, workers: &Workers) -> Result<Self> {
        let scale = safe_scale(x.scan("X", workers)?);
        let (mean, variance) = x.moments(workers)?;
        let factor = f64::from(scale);
        let mean = mean.iter().map(|m| (m * factor) as f32).collect();
        Ok(Points {
            x,
            transform: Transform::Shift { scale, mean },
            mean_variance: variance * factor * factor,
        })
    }

    /// Shifted by a given point.
    pub fn shifted(x: Matrix<'a>, by: &[f64], workers: &Workers) -> Result<Self> {
        let widest = by.iter().fold(0.0f64, |m, v| m.max(v.abs())) as f32;
        let scale = safe_scale(x.scan("X", workers)?.max(widest));
        let mean = by.iter().map(|m| (m * f64::from(scale)) as f32).collect();
        Ok(Points {
            x,
            transform: Transform::Shift { scale, mean },
            mean_variance: 0.0,
        })
    }

    /// On the unit sphere.
    pub fn unit(x: Matrix<'a>, workers: &Workers) -> Result<Self> {
        x.scan("X", workers)?;
        let step = crate::matrix::rows_a_task(x.cols());
        let n = x.rows();
        let chunks = workers.map(n.div_ceil(step), |t| {
            let mut row = vec![0.0; x.cols()];
            (t * step..((t + 1) * step).min(n))
                .map(|i| {
                    x.read(i, 0, &mut row);
                    inverse_norm(&row)
                })
                .collect::<Vec<_>>()
        })?;
        let mut points = Points {
            x,
            transform: Transform::Unit {
                inverse_norm: chunks.concat(),
            },
            mean_variance: 0.0,
        };
        points.mean_variance = points.unit_variance(workers)?;
        Ok(points)
    }

    /// The same points without the shift: differences between rows lose nothing to rounding.
    pub fn unshifted(&self) -> Points<'a> {
        let transform = match &self.transform {
            Transform::Shift { scale, .. } | Transform::Scale { scale } => {
                Transform::Scale { scale: *scale }
            }
            Transform::Unit { inverse_norm } => Transform::Unit {
                inverse_norm: inverse_norm.clone(),
            },
        };
        Points {
            x: self.x,
            transform,
            mean_variance: self.mean_variance,
        }
    }

    /// The largest norm of a point, from above.
    pub fn widest_norm(&self, workers: &Workers) -> Result<f64> {
        let widest = self.square_norms(workers)?.into_iter().fold(0.0, f64::max);
        Ok(widest.sqrt() * (1.0 + 1e-6))
    }

    /// The squared norm of each point.
    pub fn square_norms(&self, workers: &Workers) -> Result<Vec<f64>> {
        workers.map_with(
            self.rows(),
            || vec![0.0f32; self.dim()],
            |row, i| {
                self.read(i, 0, row);
                vector::square_norm(row)
            },
        )
    }

    fn unit_variance(&self, workers: &Workers) -> Result<f64> {
        let (n, d) = (self.rows(), self.dim());
        let step = crate::matrix::fixed_step(n);
        let zero = vec![0.0; d];
        let partial = workers.map(n.div_ceil(step), |t| {
            let (mut sum, mut squares) = (vec![0.0f64; d], 0.0);
            let mut row = vec![0.0; d];
            for i in t * step..((t + 1) * step).min(n) {
                self.read(i, 0, &mut row);
                squares += vector::add_shifted(&mut sum, &row, &zero);
            }
            (sum, squares)
        })?;
        let mut mean = vec![0.0f64; d];
        let mut spread = 0.0;
        for (sum, squares) in &partial {
            mean.iter_mut().zip(sum).for_each(|(m, s)| *m += s);
            spread += squares;
        }
        let centre: f64 = mean.iter().map(|m| (m / n as f64).powi(2)).sum();
        Ok(((spread / n as f64 - centre) / d as f64).max(0.0))
    }

    pub fn is_unit(&self) -> bool {
        matches!(self.transform, Transform::Unit { .. })
    }

    /// Rows given in the matrix's own coordinates, in those of the points.
    pub fn import(&self, rows: &[f32]) -> Vec<f32> {
        let mut out = rows.to_vec();
        for row in out.chunks_exact_mut(self.dim()) {
            match &self.transform {
                Transform::Shift { scale, mean } => vector::shift(row, *scale, mean),
                Transform::Scale { scale } => row.iter_mut().for_each(|v| *v *= scale),
                Transform::Unit { .. } => {
                    let inverse = inverse_norm(row);
                    vector::rescale(row, inverse);
                }
            }
        }
        out
    }

    /// The inverse of [`Points::import`], apart from the length of a unit row.
    pub fn export(&self, rows: &[f32]) -> Vec<f32> {
        let mut out = rows.to_vec();
        for row in out.chunks_exact_mut(self.dim()) {
            match &self.transform {
                Transform::Shift { scale, mean } => {
                    for (v, m) in row.iter_mut().zip(mean) {
                        *v = ((f64::from(*v) + f64::from(*m)) / f64::from(*scale)) as f32;
                    }
                }
                Transform::Scale { scale } => row.iter_mut().for_each(|v| *v /= scale),
                Transform::Unit { .. } => {}
            }
        }
        out
    }

    /// What a squared distance between points must be multiplied by to be one of the matrix.
    pub fn square_unit(&self) -> f64 {
        match &self.transform {
            Transform::Shift { scale, .. } | Transform::Scale { scale } => {
                1.0 / (f64::from(*scale) * f64::from(*scale))
            }
            Transform::Unit { .. } => 1.0,
        }
    }

    /// Copies whole rows, packed one after the other.
    pub fn gather(&self, rows: &[usize]) -> Vec<f32> {
        let d = self.dim();
        let mut out = vec![0.0; rows.len() * d];
        for (&i, row) in rows.iter().zip(out.chunks_exact_mut(d)) {
            self.read(i, 0, row);
        }
        out
    }
}

impl Rows for Points<'_> {
    fn rows(&self) -> usize {
        self.x.rows()
    }

    fn dim(&self) -> usize {
        self.x.cols()
    }

    fn prefetch(&self, row: usize, start: usize, len: usize) {
        self.x.prefetch(row, start, len);
    }

    fn read(&self, row: usize, start: usize, out: &mut [f32]) {
        self.x.read(row, start, out);
        match &self.transform {
            Transform::Shift { scale, mean } => {
                vector::shift(out, *scale, &mean[start..start + out.len()]);
            }
            Transform::Scale { scale } => {
                if *scale != 1.0 {
                    out.iter_mut().for_each(|v| *v *= scale);
                }
            }
            Transform::Unit { inverse_norm } => vector::rescale(out, inverse_norm[row]),
        }
    }
}

/// 1 over the Euclidean norm in f64, where no finite f32 row overflows or vanishes; 0 for zero.
pub(crate) fn inverse_norm(row: &[f32]) -> f64 {
    let square = vector::square_norm(row);
    if square > 0.0 {
        1.0 / square.sqrt()
    } else {
        0.0
    }
}

/// The power of two that brings `widest` near 1 if its square is in danger in f32, else 1.
fn safe_scale(widest: f32) -> f32 {
    const SAFE: std::ops::Range<f32> = 1e-8..1e12;
    if widest == 0.0 || SAFE.contains(&widest) {
        return 1.0;
    }
    let exponent = f64::from(widest).log2().floor().clamp(-126.0, 126.0);
    (-exponent).exp2() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_powers_of_two_and_only_where_needed() {
        assert_eq!(safe_scale(3.0), 1.0);
        assert_eq!(safe_scale(0.0), 1.0);
        for widest in [f32::MAX, 1e20, 1e-20, f32::MIN_POSITIVE, 1e-44] {
            let scale = safe_scale(widest);
            assert!(scale.is_normal() && scale.log2().fract() == 0.0, "{widest}");
            let brought = widest * scale;
            assert!(
                brought * brought * 1e6 < f32::MAX && brought > 1e-8,
                "{widest}"
            );
        }
    }

    #[test]
    fn unit_rows_have_length_one_whatever_their_magnitude() {
        let x = [1e-44f32, 0.0, 3e38, 3e38, 0.0, 0.0, 3.0, 4.0];
        let workers = Workers::new(Some(1)).unwrap();
        let points = Points::unit(Matrix::new(&x[..], 4, 2).unwrap(), &workers).unwrap();
        let rows = points.gather(&[0, 1, 2, 3]);
        let norm = |i: usize| rows[2 * i].hypot(rows[2 * i + 1]);
        assert!((norm(0) - 1.0).abs() < 1e-6);
        assert!((norm(1) - 1.0).abs() < 1e-6);
        assert_eq!(norm(2), 0.0);
        assert_eq!(&rows[6..], &[0.6, 0.8]);
    }
}
