//! The probe: L2-regularised logistic regression, solved to its optimum.
//!
//! The objective is scikit-learn's `LogisticRegression(C)`: `C * sum log(1 + exp(-y (w.x + b))) +
//! |w|^2 / 2`, the intercept not penalised. It is strongly convex in w with modulus 1, so a gradient
//! of norm g is within g of the one optimum; we stop at `g <= 1e-9 |w|`.
//!
//! Newton's method; each system solved by conjugate gradients. The gradient, its margins and the objective
//! come from one pass over the data in f64: they say when the optimum is reached. What only chooses the
//! direction is made in f32:
//!
//! - With fewer rows than columns, the Gram matrix of the rows is computed once ([`gram`]). Newton's method
//!   first runs in it alone, and then takes the few steps that the exact gradient still asks for.
//! - With more, each product with the Hessian is one pass over the data, with a diagonal preconditioner.
//! - If f32 does not get on, the products are made in f64.
//!
//! Columns are shifted by their means inside, which the free intercept absorbs: the objective and its
//! optimum stay those of the raw matrix, and the condition number loses the square of the mean.
//!
//! Scratch memory: at most 32 vectors of d doubles, four rows for each thread, and the Gram matrix: `2 n^2`
//! bytes, at most 105 MB.

mod gram;

use crate::activations::ActivationStore;
use crate::error::{Error, Result};
use crate::kernel::vector::{self, GROUP};
use crate::matrix::{Matrix, fixed_step};
use crate::points::Points;
use crate::pool::Workers;

use gram::Gram;

/// Relative gradient at which the optimum counts as reached.
const TOLERANCE: f64 = 1e-9;
/// Newton steps; about 3 with a Gram matrix, 10 to 20 without.
const MAX_NEWTON: usize = 200;
/// The same in the Gram matrix alone, which is in f32.
const ROUGH: f64 = 1e-5;

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
    /// Newton steps on the exact gradient.
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
    /// The coefficients of the (shifted) rows in w, if it is known as their combination.
    dual: Vec<f64>,
}

impl Vector {
    fn zero(d: usize) -> Self {
        Vector {
            w: vec![0.0; d],
            b: 0.0,
            dual: Vec::new(),
        }
    }

    fn dot(&self, other: &Vector) -> f64 {
        vector::dot_f64(&self.w, &other.w) + self.b * other.b
    }

    /// `self = scale * self + factor * other`.
    fn blend(&mut self, scale: f64, factor: f64, other: &Vector) {
        blend(&mut self.w, scale, factor, &other.w);
        blend(&mut self.dual, scale, factor, &other.dual);
        self.b = scale * self.b + factor * other.b;
    }

    fn divided(&self, by: &Vector) -> Vector {
        Vector {
            w: self.w.iter().zip(&by.w).map(|(v, d)| v / d).collect(),
            b: self.b / by.b,
            dual: Vec::new(),
        }
    }
}

/// `to = scale * to + factor * x`.
fn blend(to: &mut [f64], scale: f64, factor: f64, x: &[f64]) {
    for (t, x) in to.iter_mut().zip(x) {
        *t = scale * *t + factor * x;
    }
}

/// About where a convex function of a length is lowest, from its slope; `None` if it does not fall at 0. Newton's
/// length of 1 if that is near it: while classes come apart, the best is several times as long.
fn lowest(slope: impl Fn(f64) -> f64) -> Option<f64> {
    let steepest = slope(0.0);
    if steepest.is_nan() || steepest >= 0.0 {
        return None;
    }
    let (mut low, mut high, mut length) = (0.0, f64::INFINITY, 1.0);
    for _ in 0..30 {
        let here = slope(length);
        if here.abs() <= -0.1 * steepest {
            break;
        }
        if here < 0.0 {
            low = length;
        } else {
            high = length;
        }
        length = if high.is_finite() {
            0.5 * (low + high)
        } else {
            2.0 * length
        };
    }
    Some(length)
}

/// What the directions are computed with.
enum Means<'a> {
    Gram(Gram<'a>),
    Single,
    Double,
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
    /// First derivative of each row's loss.
    pulls: Vec<f64>,
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
        let mut means = Means::Single;
        let mut first = 0.0;
        if Gram::pays(n, d) {
            let gram = Gram::new(
                &Points::shifted(self.x, &self.mean, self.workers)?,
                self.workers,
            )?;
            first = self.in_the_span(&gram, &mut at)?;
            means = Means::Gram(gram);
        }
        let mut here = self.local(&at)?;
        if first == 0.0 {
            first = here.gradient.dot(&here.gradient).sqrt();
        }
        let mut last = f64::INFINITY;
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
                means = Means::Double;
            }
            last = norm;
            let (step, moves) = self.newton(&at, &here, norm / first, &means)?;
            let Some((next, reached)) = self.search(&at, &here, &step, &moves)? else {
                if !matches!(means, Means::Double) {
                    means = Means::Double;
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

    /// Newton's method in the Gram matrix alone, from `w = 0` to about the precision of f32; returns the norm of the
    /// first gradient.
    fn in_the_span(&self, gram: &Gram, at: &mut Vector) -> Result<f64> {
        let n = self.x.rows();
        at.dual = vec![0.0; n];
        // K a
        let mut image = vec![0.0; n];
        let mut margins = vec![at.b; n];
        let (mut first, mut last) = (0.0, f64::INFINITY);
        for _ in 0..MAX_NEWTON {
            let (pulls, curvature): (Vec<f64>, Vec<f64>) = self.all_derivatives(&margins);
            let pull = pulls.iter().sum::<f64>();
            let mut q = at.dual.clone();
            blend(&mut q, 1.0, 1.0, &pulls);
            let mut gradient = gram.times(&pulls)?;
            blend(&mut gradient, 1.0, 1.0, &image);
            let norm = (vector::dot_f64(&q, &gradient).max(0.0) + pull * pull).sqrt();
            let size = vector::dot_f64(&at.dual, &image).max(0.0).sqrt();
            if first == 0.0 {
                first = norm;
            }
            if norm <= ROUGH * size || (norm > 0.5 * last && norm < 1e-2 * first) {
                break;
            }
            last = norm;
            let step = gram.newton(&q, pull, &curvature, 0.03 * norm)?;
            // K t
            let moves: Vec<f64> = step.moves.iter().map(|m| m - step.bias).collect();
            let penalty = [
                vector::dot_f64(&at.dual, &moves),
                vector::dot_f64(&step.dual, &moves),
            ];
            let slope = |length: f64| {
                let rows = margins.iter().zip(&step.moves).enumerate();
                let pull = rows.map(|(i, (z, m))| m * self.derivatives(i, z + length * m).0);
                pull.sum::<f64>() + penalty[0] + length * penalty[1]
            };
            let Some(length) = lowest(slope) else { break };
            blend(&mut margins, 1.0, length, &step.moves);
            blend(&mut at.dual, 1.0, length, &step.dual);
            blend(&mut image, 1.0, length, &moves);
            at.b += length * step.bias;
        }
        at.w = self.combine(&at.dual)?;
        Ok(first)
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
            let seems = self.loss(&margins) + 0.5 * vector::dot_f64(&next.w, &next.w);
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

    /// The objective without the penalty.
    fn loss(&self, margins: &[f64]) -> f64 {
        let loss: f64 = margins
            .iter()
            .zip(self.y)
            .map(|(&z, &y)| {
                let z = if y == 1 { z } else { -z };
                // log(1 + exp(-z)) without overflow
                (-z).max(0.0) + (-z.abs()).exp().ln_1p()
            })
            .sum();
        self.c * loss
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

    /// Of all rows.
    fn all_derivatives(&self, margins: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let both = margins.iter().enumerate();
        both.map(|(i, &z)| self.derivatives(i, z)).unzip()
    }

    /// The combination of the shifted rows: one pass in f64.
    fn combine(&self, dual: &[f64]) -> Result<Vec<f64>> {
        let d = self.x.cols();
        let parts = self.chunks(None, |sum: &mut Vec<f64>, group| {
            sum.resize(d, 0.0);
            let mut factors = [0.0; GROUP];
            factors[..group.count].copy_from_slice(&dual[group.range()]);
            vector::group_add_scaled(sum, factors, group.rows);
        })?;
        let total = dual.iter().sum::<f64>();
        let mut w: Vec<f64> = self.mean.iter().map(|m| -m * total).collect();
        for part in &parts {
            blend(&mut w, 1.0, 1.0, part);
        }
        Ok(w)
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
        let mut gradient = Vector {
            dual: Vec::new(),
            ..at.clone()
        };
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
        let (pulls, curvature) = self.all_derivatives(&margins);
        Ok(Local {
            value: self.loss(&margins) + 0.5 * vector::dot_f64(&at.w, &at.w),
            margins,
            gradient,
            pulls,
            curvature,
        })
    }

    /// A Newton step, and how it changes the margins. `progress`: the norm of the gradient over that of the first.
    fn newton(
        &self,
        at: &Vector,
        here: &Local,
        progress: f64,
        means: &Means,
    ) -> Result<(Vector, Vec<f64>)> {
        let norm = here.gradient.dot(&here.gradient).sqrt();
        match means {
            Means::Gram(gram) => {
                let mut q = at.dual.clone();
                blend(&mut q, 1.0, 1.0, &here.pulls);
                let enough = progress.clamp(1e-3, 0.1) * norm;
                let step = gram.newton(&q, here.gradient.b, &here.curvature, enough)?;
                let s = Vector {
                    w: self.combine(&step.dual)?,
                    b: step.bias,
                    dual: step.dual,
                };
                Ok((s, step.moves))
            }
            Means::Single => self.by_passes(here, progress.sqrt().clamp(1e-4, 0.1) * norm, true),
            Means::Double => self.by_passes(here, progress.sqrt().min(0.1) * norm, false),
        }
    }

    /// Solves `H s = -g` by preconditioned conjugate gradients, to a residual of norm `enough`; the step,
    /// and how it changes the margins.
    fn by_passes(&self, here: &Local, enough: f64, single: bool) -> Result<(Vector, Vec<f64>)> {
        let (n, d) = (self.x.rows(), self.x.cols());
        // The diagonal of the Hessian, if curvature and square were independent.
        let total = here.curvature.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let diagonal = Vector {
            w: self.variance.iter().map(|v| 1.0 + total * v).collect(),
            b: total,
            dual: Vec::new(),
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

    /// The gradient on the raw matrix.
    fn gradient(x: &[f32], y: &[u8], c: f64, fit: &ProbeFit) -> (Vec<f64>, f64) {
        let mut gradient = fit.coef.clone();
        let mut bias = 0.0;
        for (row, &y) in x.chunks(fit.coef.len()).zip(y) {
            let products = row.iter().zip(&fit.coef).map(|(&v, w)| f64::from(v) * w);
            let z = products.sum::<f64>() + fit.intercept;
            let r = c * (1.0 / (1.0 + (-z).exp()) - f64::from(y));
            gradient
                .iter_mut()
                .zip(row)
                .for_each(|(g, &v)| *g += r * f64::from(v));
            bias += r;
        }
        (gradient, bias)
    }

    #[test]
    fn the_raw_gradient_vanishes() {
        // More rows than columns, fewer, and many of them equal.
        for (n, d, copies, c) in [
            (200, 7, 0, 3.0),
            (61, 200, 0, 3.0),
            (61, 200, 30, 3.0),
            (40, 90, 0, 1e4),
        ] {
            let (mut x, y) = data(n, d);
            for i in 0..copies {
                x.copy_within(0..d, (2 * i + 1) * d);
            }
            let fit = Probe::new()
                .c(c)
                .fit(&Matrix::new(&x, n, d).unwrap(), &y)
                .unwrap();
            assert!(fit.converged, "{n} {d} {copies} {c}");
            let (gradient, bias) = gradient(&x, &y, c, &fit);
            assert!(gradient.iter().all(|g| g.abs() < 1e-7), "{gradient:?}");
            assert!(bias.abs() < 1e-8, "{bias}");
        }
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
