//! The probe: L2-regularised logistic regression, solved to its optimum.
//!
//! The objective is scikit-learn's `LogisticRegression(C)`: `C * sum log(1 + exp(-y (w.x + b))) +
//! |w|^2 / 2`, the intercept not penalised. It is strongly convex in w with modulus 1, so a gradient
//! of norm g is within g of the one optimum; we stop at `g <= 1e-9 |w|`.
//!
//! Newton's method; each system solved by conjugate gradients with a diagonal preconditioner. The
//! gradient, its margins and the objective come from one pass over the data in f64: they say when the optimum
//! is reached. The products with the Hessian only choose the direction, so they are made in f32, one pass
//! each, and in f64 if that does not get on. Columns are shifted by their means inside, which the free
//! intercept absorbs: the objective and its optimum stay those of the raw matrix, and the condition
//! number loses the square of the mean.
//!
//! Scratch memory: at most 32 vectors of d doubles, and four rows for each thread.

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
        let (mean, variance) = x.column_moments(workers)?;
        Problem {
            x: *x,
            y,
            // Any shift will do; one that f32 holds is the same in both precisions.
            shift: mean.iter().map(|&m| m as f32).collect(),
            mean: mean.iter().map(|&m| f64::from(m as f32)).collect(),
            variance,
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
    shift: Vec<f32>,
    /// The shift in f64.
    mean: Vec<f64>,
    variance: Vec<f64>,
    c: f64,
    workers: &'a Workers<'a>,
}

/// The objective and its derivatives at a point.
struct Local {
    value: f64,
    margins: Vec<f64>,
    gradient: Vector,
    /// Second derivative of each row's loss.
    curvature: Vec<f64>,
}

/// A product with the Hessian, and with the rows.
struct Image {
    product: Vector,
    margins: Vec<f64>,
}

impl Problem<'_> {
    fn solve(&self) -> Result<ProbeFit> {
        let (n, d) = (self.x.rows(), self.x.cols());
        // The best constant probe.
        let ones = self.y.iter().filter(|&&y| y == 1).count() as f64;
        let mut at = Vector::zero(d);
        at.b = (ones / (n as f64 - ones)).ln();
        let mut here = self.local(&at)?;
        let first = here.gradient.dot(&here.gradient).sqrt();
        let mut last = f64::INFINITY;
        let mut single = true;
        let mut converged = false;
        let mut n_iter = 0;
        while n_iter < MAX_NEWTON {
            let norm = here.gradient.dot(&here.gradient).sqrt();
            let size = vector::dot_f64(&at.w, &at.w).sqrt();
            let floor = 1e-14 * self.c; // all columns constant: w = 0 is the optimum
            if norm <= TOLERANCE * size + floor {
                converged = true;
                break;
            }
            n_iter += 1;
            // A slow step near the optimum: f32 cannot see the way.
            if norm > 0.25 * last && norm < 1e-2 * first {
                single = false;
            }
            last = norm;
            let least = if single { 1e-4 } else { 0.0 };
            let forcing = (norm / first).sqrt().clamp(least, 0.1);
            let (step, moves) = self.newton(&here, forcing * norm, single)?;
            let Some((next, reached)) = self.search(&at, &here, &step, &moves)? else {
                if single {
                    single = false;
                    continue;
                }
                break;
            };
            (at, here) = (next, reached);
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

    /// Goes along a step as far as the objective falls.
    fn search(
        &self,
        at: &Vector,
        here: &Local,
        step: &Vector,
        moves: &[f64],
    ) -> Result<Option<(Vector, Local)>> {
        let slope = here.gradient.dot(step);
        if slope.is_nan() || slope >= 0.0 {
            return Ok(None);
        }
        // The last term: near the optimum a true decrease drowns in rounding.
        let enough = |length: f64| here.value + 1e-4 * length * slope + 1e-13 * here.value.abs();
        let mut length = 1.0;
        while length >= 1e-10 {
            let mut next = at.clone();
            next.blend(1.0, length, step);
            // Along the step only the margins matter: no pass over the data for one that is too long.
            let margins: Vec<f64> = here
                .margins
                .iter()
                .zip(moves)
                .map(|(z, m)| z + length * m)
                .collect();
            let seems = self.value(&margins, &next);
            if seems <= enough(length) + 1e-6 * here.value.abs() {
                let reached = self.local(&next)?;
                if reached.value <= enough(length) {
                    return Ok(Some((next, reached)));
                }
            }
            length *= 0.5;
        }
        Ok(None)
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

    /// First and second derivative of the loss of row i.
    fn derivatives(&self, i: usize, margin: f64) -> (f64, f64) {
        // p and 1 - p, each to full relative precision
        let e = (-margin.abs()).exp();
        let (big, small) = (1.0 / (1.0 + e), e / (1.0 + e));
        let (p, q) = if margin >= 0.0 {
            (big, small)
        } else {
            (small, big)
        };
        let residual = if self.y[i] == 1 { -q } else { p };
        (self.c * residual, self.c * p * q)
    }

    /// One pass in f64.
    fn local(&self, at: &Vector) -> Result<Local> {
        #[derive(Default)]
        struct Part {
            sum: Vec<f64>,
            residuals: f64,
            margins: Vec<f64>,
        }
        let d = self.x.cols();
        let offset = at.b - vector::dot_f64(&self.mean, &at.w);
        let parts = self.chunks(None, |part: &mut Part, group| {
            part.sum.resize(d, 0.0);
            let mut pulls = [0.0; GROUP];
            let products = vector::group_dot(group.rows, &at.w);
            for ((i, product), pull) in group.range().zip(products).zip(&mut pulls) {
                part.margins.push(product + offset);
                *pull = self.derivatives(i, product + offset).0;
                part.residuals += *pull;
            }
            vector::group_add_scaled(&mut part.sum, pulls, group.rows);
        })?;
        let mut gradient = at.clone();
        gradient.b = parts.iter().map(|part| part.residuals).sum();
        for part in &parts {
            gradient
                .w
                .iter_mut()
                .zip(&part.sum)
                .for_each(|(g, s)| *g += s);
        }
        for (g, m) in gradient.w.iter_mut().zip(&self.mean) {
            *g -= m * gradient.b;
        }
        let margins: Vec<f64> = parts.into_iter().flat_map(|part| part.margins).collect();
        let curvature = margins
            .iter()
            .enumerate()
            .map(|(i, &z)| self.derivatives(i, z).1)
            .collect();
        Ok(Local {
            value: self.value(&margins, at),
            margins,
            gradient,
            curvature,
        })
    }

    /// Solves `H s = -g` by preconditioned conjugate gradients, to a residual of norm `enough`; the step,
    /// and how it changes the margins.
    fn newton(&self, here: &Local, enough: f64, single: bool) -> Result<(Vector, Vec<f64>)> {
        let (n, d) = (self.x.rows(), self.x.cols());
        // The diagonal of the Hessian, if curvature and square were independent.
        let total = here.curvature.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let diagonal = Vector {
            w: self.variance.iter().map(|v| 1.0 + total * v).collect(),
            b: total,
        };
        let mut step = Vector::zero(d);
        let mut moves = vec![0.0; n];
        let mut residual = Vector::zero(d);
        residual.blend(0.0, -1.0, &here.gradient);
        let mut scaled = residual.divided(&diagonal);
        let mut direction = scaled.clone();
        let mut energy = residual.dot(&scaled);
        let most = if single { 200 } else { 2 * d.min(n) + 50 };
        for _ in 0..most {
            let image = if single {
                self.hessian_single(&direction, &here.curvature)?
            } else {
                self.hessian(&direction, &here.curvature)?
            };
            let bend = direction.dot(&image.product);
            if bend.is_nan() || bend <= 0.0 {
                break; // rounding: the step so far is still a descent
            }
            let length = energy / bend;
            step.blend(1.0, length, &direction);
            moves
                .iter_mut()
                .zip(&image.margins)
                .for_each(|(m, i)| *m += length * i);
            residual.blend(1.0, -length, &image.product);
            if residual.dot(&residual).sqrt() <= enough {
                break;
            }
            scaled = residual.divided(&diagonal);
            let next = residual.dot(&scaled);
            direction.blend(next / energy, 1.0, &scaled);
            energy = next;
        }
        Ok((step, moves))
    }

    /// The Hessian times a vector: one pass over the data.
    fn hessian(&self, v: &Vector, curvature: &[f64]) -> Result<Image> {
        #[derive(Default)]
        struct Part {
            sum: Vec<f64>,
            pull: f64,
            margins: Vec<f64>,
        }
        let d = self.x.cols();
        let offset = v.b - vector::dot_f64(&self.mean, &v.w);
        let parts = self.chunks(None, |part: &mut Part, group| {
            part.sum.resize(d, 0.0);
            let mut pulls = [0.0; GROUP];
            let products = vector::group_dot(group.rows, &v.w);
            for ((i, product), pull) in group.range().zip(products).zip(&mut pulls) {
                part.margins.push(product + offset);
                *pull = curvature[i] * (product + offset);
                part.pull += *pull;
            }
            vector::group_add_scaled(&mut part.sum, pulls, group.rows);
        })?;
        let mut product = v.clone();
        product.b = parts.iter().map(|part| part.pull).sum();
        for part in &parts {
            product
                .w
                .iter_mut()
                .zip(&part.sum)
                .for_each(|(o, s)| *o += s);
        }
        for (o, m) in product.w.iter_mut().zip(&self.mean) {
            *o -= m * product.b;
        }
        let margins = parts.into_iter().flat_map(|part| part.margins).collect();
        Ok(Image { product, margins })
    }

    /// The same in f32: at the speed of memory.
    fn hessian_single(&self, v: &Vector, curvature: &[f64]) -> Result<Image> {
        #[derive(Default)]
        struct Part {
            sum: Vec<f32>,
            pull: f64,
            margins: Vec<f64>,
        }
        let d = self.x.cols();
        // Of length 1, so that f32 neither overflows nor vanishes.
        let length = v.dot(v).sqrt().max(f64::MIN_POSITIVE);
        let unit: Vec<f32> = v.w.iter().map(|w| (w / length) as f32).collect();
        let offset = v.b / length;
        let parts = self.chunks(Some(&self.shift), |part: &mut Part, group| {
            part.sum.resize(d, 0.0);
            let mut pulls = [0.0f32; GROUP];
            let products = vector::group_dot_single(group.rows, &unit);
            for ((i, product), pull) in group.range().zip(products).zip(&mut pulls) {
                let margin = f64::from(product) + offset;
                part.margins.push(margin * length);
                *pull = (curvature[i] * margin) as f32;
                part.pull += curvature[i] * margin;
            }
            vector::group_add_scaled_single(&mut part.sum, pulls, group.rows);
        })?;
        let mut product = v.clone();
        product.b = length * parts.iter().map(|part| part.pull).sum::<f64>();
        for part in &parts {
            for (o, &s) in product.w.iter_mut().zip(&part.sum) {
                *o += length * f64::from(s);
            }
        }
        let margins = parts.into_iter().flat_map(|part| part.margins).collect();
        Ok(Image { product, margins })
    }

    /// Folds every row, shifted if asked to, into one value for each fixed chunk of rows, in index order.
    fn chunks<S: Default + Send>(
        &self,
        shift: Option<&[f32]>,
        fold: impl Fn(&mut S, Group) + Sync,
    ) -> Result<Vec<S>> {
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
                    if let Some(shift) = shift {
                        for row in buffer[..count * d].chunks_exact_mut(d) {
                            vector::shift(row, 1.0, shift);
                        }
                    }
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
