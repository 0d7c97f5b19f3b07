//! The probe: L2-regularised logistic regression, solved to its optimum.
//!
//! The objective is scikit-learn's `LogisticRegression(C)`: `C * sum log(1 + exp(-y (w.x + b))) +
//! |w|^2 / 2`, the intercept not penalised. It is strongly convex in w with modulus 1, so a gradient
//! of norm g is within g of the one optimum; we stop at `g <= 1e-9 |w|`.
//!
//! Newton's method; each system solved by conjugate gradients with a diagonal preconditioner, each
//! product with the Hessian in one pass over the data, in f64 throughout. Columns are centred inside,
//! which the free intercept absorbs: the objective and its optimum stay those of the raw matrix, and
//! the condition number loses the square of the mean.
//!
//! Scratch memory: at most 32 vectors of d doubles, and a row for each thread.

use crate::activations::ActivationStore;
use crate::error::{Error, Result};
use crate::kernel::vector::{self, GROUP};
use crate::matrix::{Matrix, fixed_step};
use crate::pool::Workers;

/// Relative gradient at which the optimum counts as reached.
const TOLERANCE: f64 = 1e-9;
/// Newton steps; 10 to 20 are usual.
const MAX_NEWTON: usize = 200;

/// Settings of a probe.
///
/// ```
/// use nest_rs::{Matrix, Probe};
/// let x = [-2.0f32, -1.0, 1.0, 2.0];
/// let fit = Probe::new().fit(&Matrix::new(&x[..], 4, 1)?, &[0, 0, 1, 1])?;
/// assert!(fit.coef[0] > 0.0 && fit.intercept.abs() < 1e-6);
/// # Ok::<(), nest_rs::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    c: f64,
    n_threads: Option<usize>,
}

/// A fitted probe: `p = sigmoid(coef . x + intercept)`.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeFit {
    /// One weight a column.
    pub coef: Vec<f64>,
    /// The bias.
    pub intercept: f64,
    /// Newton steps.
    pub n_iter: usize,
    /// False if rounding stopped the descent before the gradient was small enough.
    pub converged: bool,
}

impl Default for Probe {
    fn default() -> Self {
        Self::new()
    }
}

impl Probe {
    /// C = 1, all threads.
    pub fn new() -> Self {
        Probe {
            c: 1.0,
            n_threads: None,
        }
    }

    /// Sets the inverse strength of the penalty.
    pub fn c(mut self, c: f64) -> Self {
        self.c = c;
        self
    }

    /// Sets the number of threads; `None` for all.
    pub fn n_threads(mut self, n_threads: Option<usize>) -> Self {
        self.n_threads = n_threads;
        self
    }

    /// Fits the rows of `x`, whose classes `y` are 0 or 1.
    ///
    /// # Errors
    /// A non-finite element, a label that is neither 0 nor 1, one class only ([`Error::OneClass`]), a
    /// wrong number of labels, or a C that is not positive.
    pub fn fit(&self, x: &Matrix, y: &[u8]) -> Result<ProbeFit> {
        self.fit_with(x, y, &Workers::new(self.n_threads)?)
    }

    /// [`Probe::fit`] on given workers, which may be cancelled.
    ///
    /// # Errors
    /// As [`Probe::fit`], or [`Error::Interrupted`].
    pub fn fit_with(&self, x: &Matrix, y: &[u8], workers: &Workers) -> Result<ProbeFit> {
        self.check(x.rows(), y)?;
        x.scan("X", workers)?;
        let (mean, _) = x.moments(workers)?;
        Problem {
            x: *x,
            y,
            mean,
            c: self.c,
            workers,
        }
        .solve()
    }

    /// Fits one probe for each of `sites` (`None` for all), straight from the mapped store.
    ///
    /// # Errors
    /// As [`Probe::fit`]; an unknown site.
    pub fn fit_store(
        &self,
        store: &ActivationStore,
        y: &[u8],
        sites: Option<&[String]>,
        workers: &Workers,
    ) -> Result<Vec<(String, ProbeFit)>> {
        self.check(store.n_rows(), y)?;
        let names: Vec<String> = match sites {
            Some(names) => names.to_vec(),
            None => store.sites().iter().map(|s| s.name.clone()).collect(),
        };
        let matrices = names
            .iter()
            .map(|name| store.site(name))
            .collect::<Result<Vec<_>>>()?;
        // Whole sites side by side where there are enough of them; the bits are the same.
        let fit = |x: &Matrix, inner: &Workers| self.fit_with(x, y, inner);
        let fits: Vec<Result<ProbeFit>> = if names.len() >= workers.n_threads() {
            workers.map(names.len(), |s| fit(&matrices[s], &workers.serial()))?
        } else {
            matrices.iter().map(|x| fit(x, workers)).collect()
        };
        names
            .into_iter()
            .zip(fits)
            .map(|(name, fit)| match fit {
                Ok(fit) => Ok((name, fit)),
                Err(Error::NonFinite {
                    row, col, value, ..
                }) => Err(Error::NonFinite {
                    what: format!("site `{name}`"),
                    row,
                    col,
                    value,
                }),
                Err(other) => Err(other),
            })
            .collect()
    }

    fn check(&self, rows: usize, y: &[u8]) -> Result<()> {
        if !(self.c.is_finite() && self.c > 0.0) {
            return Err(Error::argument("C", self.c, "must be positive and finite"));
        }
        if y.len() != rows {
            return Err(Error::shape("y", y.len(), format!("{rows} labels")));
        }
        if let Some(label) = y.iter().find(|&&label| label > 1) {
            return Err(Error::argument("a label of y", label, "must be 0 or 1"));
        }
        if y.iter().all(|&label| label == y[0]) {
            return Err(Error::OneClass(y[0]));
        }
        Ok(())
    }
}

/// Weights and bias, or a direction or gradient in them.
#[derive(Clone)]
struct Vector {
    w: Vec<f64>,
    b: f64,
}

impl Vector {
    fn zero(d: usize) -> Self {
        Vector {
            w: vec![0.0; d],
            b: 0.0,
        }
    }

    fn dot(&self, other: &Vector) -> f64 {
        vector::dot_f64(&self.w, &other.w) + self.b * other.b
    }

    /// `self = scale * self + factor * other`.
    fn blend(&mut self, scale: f64, factor: f64, other: &Vector) {
        for (v, o) in self.w.iter_mut().zip(&other.w) {
            *v = scale * *v + factor * o;
        }
        self.b = scale * self.b + factor * other.b;
    }

    fn divided(&self, by: &Vector) -> Vector {
        Vector {
            w: self.w.iter().zip(&by.w).map(|(v, d)| v / d).collect(),
            b: self.b / by.b,
        }
    }
}

struct Problem<'a> {
    x: Matrix<'a>,
    y: &'a [u8],
    mean: Vec<f64>,
    c: f64,
    workers: &'a Workers<'a>,
}

impl Problem<'_> {
    fn solve(&self) -> Result<ProbeFit> {
        let (n, d) = (self.x.rows(), self.x.cols());
        // The best constant probe.
        let ones = self.y.iter().filter(|&&y| y == 1).count() as f64;
        let mut at = Vector::zero(d);
        at.b = (ones / (n as f64 - ones)).ln();
        let mut margins = vec![at.b; n];
        let mut value = self.value(&margins, &at);
        let mut first_norm = None;
        let mut converged = false;
        let mut n_iter = 0;
        while n_iter < MAX_NEWTON {
            let (gradient, curvature, diagonal) = self.gradient(&margins, &at)?;
            let norm = gradient.dot(&gradient).sqrt();
            let size = vector::dot_f64(&at.w, &at.w).sqrt();
            let floor = 1e-14 * self.c; // all columns constant: w = 0 is the optimum
            if norm <= TOLERANCE * size + floor {
                converged = true;
                break;
            }
            n_iter += 1;
            let first = *first_norm.get_or_insert(norm);
            let forcing = (norm / first).sqrt().min(0.1);
            let step = self.newton(&gradient, &curvature, &diagonal, forcing * norm)?;

            // Along the step only the margins matter: no pass over the data for a shorter one.
            let moves = self.margins(&step)?;
            let slope = gradient.dot(&step);
            let mut length = 1.0;
            let accepted = loop {
                let mut next = at.clone();
                next.blend(1.0, length, &step);
                let shifted: Vec<f64> = margins
                    .iter()
                    .zip(&moves)
                    .map(|(z, m)| z + length * m)
                    .collect();
                let reached = self.value(&shifted, &next);
                // The last term: near the optimum a true decrease drowns in rounding.
                if reached <= value + 1e-4 * length * slope + 1e-13 * value.abs() {
                    break Some((next, shifted, reached));
                }
                length *= 0.5;
                if length < 1e-10 {
                    break None;
                }
            };
            let Some((next, shifted, reached)) = accepted else {
                break;
            };
            (at, margins, value) = (next, shifted, reached);
        }
        // Back to the raw columns.
        let intercept = at.b - vector::dot_f64(&at.w, &self.mean);
        Ok(ProbeFit {
            coef: at.w,
            intercept,
            n_iter,
            converged,
        })
    }

    /// The objective.
    fn value(&self, margins: &[f64], at: &Vector) -> f64 {
        let loss: f64 = margins
            .iter()
            .zip(self.y)
            .map(|(&z, &y)| {
                let z = if y == 1 { z } else { -z };
                // log(1 + exp(-z)) without overflow
                (-z).max(0.0) + (-z.abs()).exp().ln_1p()
            })
            .sum();
        self.c * loss + 0.5 * vector::dot_f64(&at.w, &at.w)
    }

    /// The gradient, the curvature of each row's loss, and the diagonal of the Hessian.
    fn gradient(&self, margins: &[f64], at: &Vector) -> Result<(Vector, Vec<f64>, Vector)> {
        let (residuals, curvature): (Vec<f64>, Vec<f64>) = margins
            .iter()
            .zip(self.y)
            .map(|(&z, &y)| {
                // p and 1 - p, each to full relative precision
                let e = (-z.abs()).exp();
                let (big, small) = (1.0 / (1.0 + e), e / (1.0 + e));
                let (p, q) = if z >= 0.0 { (big, small) } else { (small, big) };
                let residual = if y == 1 { -q } else { p };
                (self.c * residual, self.c * p * q)
            })
            .unzip();
        let d = self.x.cols();
        let parts = self.chunks(|sums: &mut (Vec<f64>, Vec<f64>), group| {
            sums.0.resize(d, 0.0);
            sums.1.resize(d, 0.0);
            vector::group_add_scaled(&mut sums.0, group.pick(&residuals), group.rows);
            for (row, i) in group.rows.iter().zip(group.range()) {
                vector::add_scaled_squares(&mut sums.1, curvature[i], row, &self.mean);
            }
        })?;
        let (mut gradient, mut diagonal) = (Vector::zero(d), Vector::zero(d));
        for (sum, squares) in &parts {
            gradient.w.iter_mut().zip(sum).for_each(|(g, s)| *g += s);
            diagonal
                .w
                .iter_mut()
                .zip(squares)
                .for_each(|(g, s)| *g += s);
        }
        gradient.b = residuals.iter().sum();
        for ((g, m), w) in gradient.w.iter_mut().zip(&self.mean).zip(&at.w) {
            *g += w - m * gradient.b;
        }
        diagonal.w.iter_mut().for_each(|v| *v += 1.0);
        diagonal.b = curvature.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        Ok((gradient, curvature, diagonal))
    }

    /// Solves `H s = -g` by preconditioned conjugate gradients, to a residual of norm `enough`.
    fn newton(
        &self,
        gradient: &Vector,
        curvature: &[f64],
        diagonal: &Vector,
        enough: f64,
    ) -> Result<Vector> {
        let d = self.x.cols();
        let mut step = Vector::zero(d);
        let mut residual = Vector::zero(d);
        residual.blend(0.0, -1.0, gradient);
        let mut scaled = residual.divided(diagonal);
        let mut direction = scaled.clone();
        let mut energy = residual.dot(&scaled);
        for _ in 0..2 * d.min(self.x.rows()) + 50 {
            let image = self.hessian(&direction, curvature)?;
            let bend = direction.dot(&image);
            if bend.is_nan() || bend <= 0.0 {
                break; // rounding: the step so far is still a descent
            }
            let length = energy / bend;
            step.blend(1.0, length, &direction);
            residual.blend(1.0, -length, &image);
            if residual.dot(&residual).sqrt() <= enough {
                break;
            }
            scaled = residual.divided(diagonal);
            let next = residual.dot(&scaled);
            direction.blend(next / energy, 1.0, &scaled);
            energy = next;
        }
        Ok(step)
    }

    /// The Hessian times a vector: one pass over the data.
    fn hessian(&self, v: &Vector, curvature: &[f64]) -> Result<Vector> {
        let d = self.x.cols();
        let offset = v.b - vector::dot_f64(&self.mean, &v.w);
        let parts = self.chunks(|sums: &mut (Vec<f64>, f64), group| {
            sums.0.resize(d, 0.0);
            let mut pulls = group.pick(curvature);
            for (pull, product) in pulls.iter_mut().zip(vector::group_dot(group.rows, &v.w)) {
                *pull *= product + offset;
                sums.1 += *pull;
            }
            vector::group_add_scaled(&mut sums.0, pulls, group.rows);
        })?;
        let mut out = v.clone();
        out.b = parts.iter().map(|(_, pull)| pull).sum();
        for (sum, _) in &parts {
            out.w.iter_mut().zip(sum).for_each(|(o, s)| *o += s);
        }
        for (o, m) in out.w.iter_mut().zip(&self.mean) {
            *o -= m * out.b;
        }
        Ok(out)
    }

    /// The change of every margin along `v`.
    fn margins(&self, v: &Vector) -> Result<Vec<f64>> {
        let offset = v.b - vector::dot_f64(&self.mean, &v.w);
        let parts = self.chunks(|out: &mut Vec<f64>, group| {
            let products = vector::group_dot(group.rows, &v.w);
            out.extend(products[..group.range().len()].iter().map(|p| p + offset));
        })?;
        Ok(parts.concat())
    }

    /// Folds every row into one value for each fixed chunk of rows, in index order.
    fn chunks<S: Default + Send>(&self, fold: impl Fn(&mut S, Group) + Sync) -> Result<Vec<S>> {
        let (n, d) = (self.x.rows(), self.x.cols());
        let step = fixed_step(n);
        self.workers.map_with(
            n.div_ceil(step),
            || vec![0.0f32; GROUP * d],
            |buffer, chunk| {
                let mut state = S::default();
                let end = ((chunk + 1) * step).min(n);
                for first in (chunk * step..end).step_by(GROUP) {
                    let count = GROUP.min(end - first);
                    self.x.read(first, 0, &mut buffer[..count * d]);
                    let rows = std::array::from_fn(|g| &buffer[g * d..(g + 1) * d]);
                    fold(&mut state, Group { first, count, rows });
                }
                state
            },
        )
    }
}

/// Neighbouring rows that share a pass over the weights. Beyond `count`, a row is of an earlier
/// group, and what it is multiplied by is zero.
struct Group<'b> {
    first: usize,
    count: usize,
    rows: [&'b [f32]; GROUP],
}

impl Group<'_> {
    fn range(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }

    /// The values of these rows.
    fn pick(&self, values: &[f64]) -> [f64; GROUP] {
        std::array::from_fn(|g| {
            if g < self.count {
                values[self.first + g]
            } else {
                0.0
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(n: usize, d: usize) -> (Vec<f32>, Vec<u8>) {
        let y: Vec<u8> = (0..n).map(|i| (i % 3 == 0) as u8).collect();
        let x = (0..n * d)
            .map(|i| {
                let noise = ((i * 7919) % 1009) as f32 / 1009.0;
                5.0 + noise
                    + if i % d == 1 {
                        f32::from(y[i / d]) * 0.4
                    } else {
                        0.0
                    }
            })
            .collect();
        (x, y)
    }

    #[test]
    fn the_raw_gradient_vanishes() {
        let (n, d, c) = (200, 7, 3.0);
        let (x, y) = data(n, d);
        let fit = Probe::new()
            .c(c)
            .fit(&Matrix::new(&x, n, d).unwrap(), &y)
            .unwrap();
        assert!(fit.converged);
        let mut gradient = fit.coef.clone();
        let mut bias = 0.0;
        for (row, &y) in x.chunks(d).zip(&y) {
            let z = row
                .iter()
                .zip(&fit.coef)
                .map(|(&v, w)| f64::from(v) * w)
                .sum::<f64>()
                + fit.intercept;
            let r = c * (1.0 / (1.0 + (-z).exp()) - f64::from(y));
            gradient
                .iter_mut()
                .zip(row)
                .for_each(|(g, &v)| *g += r * f64::from(v));
            bias += r;
        }
        assert!(gradient.iter().all(|g| g.abs() < 1e-7), "{gradient:?}");
        assert!(bias.abs() < 1e-8, "{bias}");
    }

    #[test]
    fn constant_columns_leave_the_constant_probe() {
        let x = [3.0f32; 8];
        let fit = Probe::new()
            .fit(&Matrix::new(&x[..], 4, 2).unwrap(), &[1, 0, 1, 1])
            .unwrap();
        assert!(fit.converged);
        assert_eq!(fit.coef, [0.0, 0.0]);
        assert!((fit.intercept - 3f64.ln()).abs() < 1e-9);
    }

    #[test]
    fn labels_are_checked() {
        let x = [1.0f32, 2.0];
        let x = Matrix::new(&x[..], 2, 1).unwrap();
        assert!(matches!(
            Probe::new().fit(&x, &[1, 1]),
            Err(Error::OneClass(1))
        ));
        assert!(Probe::new().fit(&x, &[0, 2]).is_err());
        assert!(Probe::new().fit(&x, &[0]).is_err());
        assert!(Probe::new().c(0.0).fit(&x, &[0, 1]).is_err());
    }
}
