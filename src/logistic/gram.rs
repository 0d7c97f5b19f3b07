//! Newton's steps in the span of the rows, for fewer rows than columns.
//!
//! The optimum lies there: `w = X' a`, X shifted by the column means. With K = X X' (the Gram matrix), r the
//! first and D the second derivatives of the losses, and q = a + r, the gradient is `X' q`, and a Newton
//! step `X' t` with bias change beta solves `t + D (K t + beta) + q = 0`. We substitute `t = -q - D^1/2 u`: then
//! `(I + D^1/2 K D^1/2) u = D^1/2 (beta - K q)`, whose matrix is symmetric and has no eigenvalue below 1, and the
//! equation of the bias becomes the constraint `D^1/2 . u = -sum r`. Conjugate gradients in the
//! subspace of that constraint need one product with K an iteration: `n^2` numbers instead of `n d`.
//!
//! K is in f32, so a step is exact to about 1e-6 of its length; the gradients that decide when the
//! optimum is reached are not made here.

use crate::error::Result;
use crate::kernel::vector::{self, GROUP};
use crate::kernel::{Form, Rows};
use crate::pairs::below_diagonal;
use crate::points::Points;
use crate::pool::Workers;

use super::blend;

/// Tasks of a product. Part of the bits.
const TASKS: usize = 32;
/// Iterations of conjugate gradients.
const MOST: usize = 500;

/// The products of all rows: on and below the diagonal, in groups of rows of equal length.
pub(super) struct Gram<'a> {
    products: Vec<f32>,
    n: usize,
    /// What a product must be multiplied by to be one of the matrix.
    unit: f64,
    workers: &'a Workers<'a>,
}

/// A step in the span of the rows.
pub(super) struct Step {
    /// Coefficients of the rows.
    pub dual: Vec<f64>,
    pub bias: f64,
    /// How it changes the margins.
    pub moves: Vec<f64>,
}

/// Where row i of the triangle begins.
fn place(i: usize, n: usize) -> usize {
    let group = i / GROUP;
    let length = (GROUP * (group + 1)).min(n);
    GROUP * GROUP * group * (group + 1) / 2 + i % GROUP * length
}

impl<'a> Gram<'a> {
    /// The most rows: 105 MB.
    const MOST: usize = 7168;

    /// True if products with the Gram matrix of such a matrix are worth making it.
    pub fn pays(rows: usize, cols: usize) -> bool {
        rows <= cols && rows <= Self::MOST
    }

    pub fn new(points: &Points, workers: &'a Workers<'a>) -> Result<Self> {
        let n = points.rows();
        let mut products = vec![0.0f32; place(n, n)];
        below_diagonal(Form::Dot, points, &mut products, |i| place(i, n), workers)?;
        Ok(Gram {
            products,
            n,
            unit: points.square_unit(),
            workers,
        })
    }

    /// `K v`.
    pub fn times(&self, v: &[f64]) -> Result<Vec<f64>> {
        // Of length 1, so that f32 neither overflows nor vanishes.
        let length = vector::dot_f64(v, v).sqrt();
        if length == 0.0 {
            return Ok(vec![0.0; self.n]);
        }
        let single: Vec<f32> = v.iter().map(|v| (v / length) as f32).collect();
        let groups = self.n.div_ceil(GROUP);
        // Equal areas of the triangle.
        let from = |t: usize| (groups as f64 * (t as f64 / TASKS as f64).sqrt()) as usize;
        let serial = self.workers.serial();
        let workers = if self.n < 1024 { &serial } else { self.workers };
        let parts = workers.map(TASKS, |t| {
            let end = if t + 1 == TASKS { groups } else { from(t + 1) };
            let mut out = vec![0.0f32; self.n.min(end * GROUP)];
            for group in from(t)..end {
                self.add_group(group, &single, &mut out);
            }
            out
        })?;
        let mut out = vec![0.0; self.n];
        for part in &parts {
            vector::add(&mut out[..part.len()], part);
        }
        out.iter_mut().for_each(|o| *o *= length * self.unit);
        Ok(out)
    }

    /// What the rows of a group, and their mirror image, add to `K v`.
    fn add_group(&self, group: usize, v: &[f32], out: &mut [f32]) {
        let first = group * GROUP;
        let count = GROUP.min(self.n - first);
        let length = first + count;
        let rows: [&[f32]; GROUP] = std::array::from_fn(|g| {
            let at = place(first + g.min(count - 1), self.n);
            &self.products[at..at + length]
        });
        let sums = vector::group_dot_single(rows, &v[..length]);
        let mut factors = [0.0; GROUP];
        factors[..count].copy_from_slice(&v[first..length]);
        vector::group_add_scaled_single(&mut out[..first], factors, rows);
        for (o, s) in out[first..length].iter_mut().zip(sums) {
            *o += s;
        }
    }

    /// The Newton step at dual coefficients with `q = a + r`, to a gradient of norm `enough`; `pull` is the sum of r.
    pub fn newton(&self, q: &[f64], pull: f64, curvature: &[f64], enough: f64) -> Result<Step> {
        let root: Vec<f64> = curvature.iter().map(|d| d.sqrt()).collect();
        let total = vector::dot_f64(&root, &root).max(f64::MIN_POSITIVE);
        let project = |v: &mut [f64]| {
            let along = vector::dot_f64(v, &root) / total;
            v.iter_mut().zip(&root).for_each(|(v, r)| *v -= along * r);
        };
        let weighted =
            |v: &[f64]| -> Vec<f64> { v.iter().zip(&root).map(|(v, r)| v * r).collect() };

        // The start meets the constraint, all later directions keep it.
        let mut u: Vec<f64> = root.iter().map(|r| -pull / total * r).collect();
        let start: Vec<f64> = q.iter().zip(weighted(&u)).map(|(q, v)| q + v).collect();
        // K (q + D^1/2 u) throughout.
        let mut image = self.times(&start)?;
        let mut residual: Vec<f64> = weighted(&image)
            .iter()
            .zip(&u)
            .map(|(v, u)| -v - u)
            .collect();
        project(&mut residual);
        let mut direction = residual.clone();
        let mut energy = vector::dot_f64(&residual, &residual);
        let mut before = vec![0.0; self.n];
        let mut ratio = 0.0;
        for _ in 0..MOST {
            let weights = weighted(&direction);
            let product = self.times(&weights)?;
            let bend =
                vector::dot_f64(&direction, &direction) + vector::dot_f64(&weights, &product);
            if bend.is_nan() || bend <= 0.0 {
                break;
            }
            // K D^1/2 residual, and so the norm of the gradient that is left.
            let left: f64 = residual
                .iter()
                .zip(&root)
                .zip(product.iter().zip(&before))
                .map(|((r, d), (k, b))| r * d * (k - ratio * b))
                .sum();
            if left <= enough * enough {
                break;
            }
            let length = energy / bend;
            let mut change = weighted(&product);
            for (c, p) in change.iter_mut().zip(&direction) {
                *c += p;
            }
            project(&mut change);
            blend(&mut u, 1.0, length, &direction);
            blend(&mut image, 1.0, length, &product);
            blend(&mut residual, 1.0, -length, &change);
            let next = vector::dot_f64(&residual, &residual);
            ratio = next / energy;
            blend(&mut direction, ratio, 1.0, &residual);
            (energy, before) = (next, product);
        }
        let bias = (vector::dot_f64(&image, curvature) - pull) / total;
        Ok(Step {
            dual: weighted(&u).iter().zip(q).map(|(v, q)| -q - v).collect(),
            bias,
            moves: image.iter().map(|k| bias - k).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::noise;
    use crate::matrix::Matrix;

    #[test]
    fn products_are_those_of_the_whole_matrix() {
        let workers = Workers::new(Some(2)).unwrap();
        for (n, d) in [(1, 3), (3, 5), (37, 300), (130, 12), (1190, 20)] {
            let x = noise(n * d, 1);
            let points = Points::shifted(Matrix::new(&x, n, d).unwrap(), &vec![0.0; d], &workers);
            let gram = Gram::new(&points.unwrap(), &workers).unwrap();
            let v: Vec<f64> = noise(n, 2).into_iter().map(f64::from).collect();
            let mut sum = vec![0.0f64; d];
            for (row, v) in x.chunks(d).zip(&v) {
                vector::add_scaled(&mut sum, *v, row);
            }
            for (row, got) in x.chunks(d).zip(gram.times(&v).unwrap()) {
                let want: f64 = row.iter().zip(&sum).map(|(&a, b)| f64::from(a) * b).sum();
                assert!((got - want).abs() < 1e-4 * n as f64, "{n} {d} {got} {want}");
            }
        }
    }
}
