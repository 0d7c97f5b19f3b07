//! Exact k-means: greedy k-means++ seeding, Lloyd's iterations, restarts, several k in one call.
//!
//! The arithmetic follows scikit-learn's `KMeans(algorithm="lloyd")`: the same centring, the same
//! stopping rule, the same repair of empty clusters; from the same starting centres it ends at the
//! same labels. What differs is that nothing here depends on the number of threads.
//!
//! Labels are defined by f32 arithmetic, in one order on every processor. Most of it is never done: see
//! the bounds of `assign` and the screens of `kernel::screen`, which prove that the outcome is the same.
//!
//! Scratch memory beside the input: `O(n + k d)` (20 bytes a row), at most 64 MB of distances while seeding
//! (but 4 bytes for each row and candidate of one step, of which there are `2 + ln k`), and for each
//! thread under 1 MB. Where several fits of at most 5,120 rows can share them, the
//! distances between all rows are kept: `6 n^2` bytes, 157 MB at most.

mod assign;
mod lloyd;
mod paired;
mod seed;

use crate::error::{Error, Result};
use crate::kernel::{BLOCK, Kept, Rows};
use crate::matrix::Matrix;
use crate::pairs::Pairs;
use crate::points::Points;
use crate::pool::Workers;
use crate::silhouette::{self, Distance};

use assign::Assignment;
use lloyd::Nearest;
use paired::Paired;

/// What k-means minimises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Metric {
    /// Squared Euclidean distance to the mean.
    #[default]
    Euclidean,
    /// `1 - cos`, to the normalised mean of the normalised rows (spherical k-means). A zero row has
    /// distance 1 to every centre, as in scikit-learn.
    Cosine,
}

/// Where Lloyd's iterations start.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Init {
    /// Greedy k-means++ (the best of `2 + ln k` candidates a step).
    #[default]
    PlusPlus,
    /// Given centres, row-major `[k, d]`; one restart.
    Centers(Vec<f32>),
}

/// Settings of a clustering; the defaults are scikit-learn's, with one restart.
///
/// ```
/// use nest_rs::{KMeans, Matrix};
/// let x = [0.0f32, 0.1, 0.2, 9.0, 9.1, 9.2];
/// let fit = KMeans::new(2).seed(7).fit(&Matrix::new(&x[..], 6, 1)?)?;
/// assert_eq!(fit.labels[0], fit.labels[2]);
/// assert_ne!(fit.labels[0], fit.labels[3]);
/// assert!((fit.inertia - 0.04).abs() < 1e-6);
/// # Ok::<(), nest_rs::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct KMeans {
    n_clusters: usize,
    metric: Metric,
    init: Init,
    n_init: usize,
    max_iter: usize,
    tol: f64,
    seed: u64,
    n_threads: Option<usize>,
}

/// A finished clustering.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// The cluster of each row.
    pub labels: Vec<i32>,
    /// Row-major `[k, d]`; unit rows under [`Metric::Cosine`].
    pub centers: Vec<f32>,
    /// Sum over the rows of the squared distance to, or of `1 - cos` with, their centre.
    pub inertia: f64,
    /// Iterations of the best restart.
    pub n_iter: usize,
    /// Clusters that hold a row: fewer than `k` only if there are fewer distinct rows.
    pub n_used: usize,
}

/// One k of a [`KMeans::sweep`].
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// The number of clusters asked for.
    pub k: usize,
    /// The best of the restarts.
    pub fit: Fit,
    /// Mean silhouette; `None` where it is not defined (fewer than 2 used clusters, or n of them).
    pub silhouette: Option<f64>,
}

impl KMeans {
    /// `n_clusters` clusters, Euclidean, k-means++, one restart, 300 iterations, tolerance 1e-4, seed 0.
    pub fn new(n_clusters: usize) -> Self {
        KMeans {
            n_clusters,
            metric: Metric::Euclidean,
            init: Init::PlusPlus,
            n_init: 1,
            max_iter: 300,
            tol: 1e-4,
            seed: 0,
            n_threads: None,
        }
    }

    /// Sets the metric.
    pub fn metric(mut self, metric: Metric) -> Self {
        self.metric = metric;
        self
    }

    /// Sets the start.
    pub fn init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }

    /// Sets the number of restarts; the lowest inertia wins, ties to the earlier.
    pub fn n_init(mut self, n_init: usize) -> Self {
        self.n_init = n_init;
        self
    }

    /// Sets the most iterations of a restart.
    pub fn max_iter(mut self, max_iter: usize) -> Self {
        self.max_iter = max_iter;
        self
    }

    /// Stops when the squared shift of all centres is at most `tol` times the mean variance.
    pub fn tol(mut self, tol: f64) -> Self {
        self.tol = tol;
        self
    }

    /// Sets the seed; restart r draws from the stream (seed, r).
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the number of threads; `None` for all.
    pub fn n_threads(mut self, n_threads: Option<usize>) -> Self {
        self.n_threads = n_threads;
        self
    }

    /// Clusters the rows of `x`.
    ///
    /// # Errors
    /// A non-finite element ([`Error::NonFinite`]), `n_clusters` outside `1..=n`, centres of the
    /// wrong shape, or a setting out of range.
    pub fn fit(&self, x: &Matrix) -> Result<Fit> {
        self.fit_with(x, &Workers::new(self.n_threads)?)
    }

    /// [`KMeans::fit`] on given workers, which may be cancelled.
    ///
    /// # Errors
    /// As [`KMeans::fit`], or [`Error::Interrupted`].
    pub fn fit_with(&self, x: &Matrix, workers: &Workers) -> Result<Fit> {
        self.check(x, self.n_clusters)?;
        let points = self.points(x, workers)?;
        let restarts = match self.init {
            Init::PlusPlus => self.n_init,
            Init::Centers(_) => 1,
        };
        let ks = [self.n_clusters];
        // The work on the pairs, and what it saves of seeding and iterations.
        let saved = 16 * self.n_clusters * restarts;
        let pairs = if self.init == Init::PlusPlus
            && self.metric == Metric::Euclidean
            && x.rows() <= Pairs::MOST.min(saved)
        {
            Some(Pairs::new(&points.unshifted(), workers)?)
        } else {
            None
        };
        let mut fits = self.run(&points, pairs.as_ref(), &ks, restarts, workers)?;
        fits.pop()
            .ok_or_else(|| Error::argument("n_init", 0, "must be at least 1"))
    }

    /// Clusters into each of `ks` and scores each by its mean Euclidean (or cosine) silhouette; the
    /// distances between the rows are computed once for all of them.
    ///
    /// ```
    /// use nest_rs::{KMeans, Matrix};
    /// let x = [0.0f32, 0.1, 5.0, 5.1, 9.0, 9.1];
    /// let swept = KMeans::new(2).sweep(&Matrix::new(&x[..], 6, 1)?, &[2, 3, 4], 5)?;
    /// let best = swept.iter().max_by(|a, b| a.silhouette.partial_cmp(&b.silhouette).unwrap());
    /// assert_eq!(best.unwrap().k, 3);
    /// # Ok::<(), nest_rs::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`KMeans::fit`], for any of `ks`; and given centres, which have one k.
    pub fn sweep(&self, x: &Matrix, ks: &[usize], n_init: usize) -> Result<Vec<Candidate>> {
        self.sweep_with(x, ks, n_init, &Workers::new(self.n_threads)?)
    }

    /// [`KMeans::sweep`] on given workers, which may be cancelled.
    ///
    /// # Errors
    /// As [`KMeans::sweep`], or [`Error::Interrupted`].
    pub fn sweep_with(
        &self,
        x: &Matrix,
        ks: &[usize],
        n_init: usize,
        workers: &Workers,
    ) -> Result<Vec<Candidate>> {
        if self.init != Init::PlusPlus {
            return Err(Error::argument(
                "init",
                "array",
                "a sweep seeds itself: use k-means++",
            ));
        }
        let settings = self.clone().n_init(n_init);
        for &k in ks {
            settings.check(x, k)?;
        }
        let points = settings.points(x, workers)?;
        let pairs = match self.metric {
            Metric::Euclidean if x.rows() <= Pairs::MOST => {
                Some(Pairs::new(&points.unshifted(), workers)?)
            }
            _ => None,
        };
        let fits = settings.run(&points, pairs.as_ref(), ks, n_init, workers)?;

        let defined = |fit: &Fit| fit.n_used >= 2 && fit.n_used < x.rows();
        let labelings: Vec<&[i32]> = fits
            .iter()
            .filter(|fit| defined(fit))
            .map(|fit| fit.labels.as_slice())
            .collect();
        let scores = match (pairs, self.metric) {
            (Some(pairs), _) => {
                silhouette::of_distances(&pairs.into_roots(workers)?, &labelings, workers)?
            }
            (None, metric) => {
                let distance = match metric {
                    Metric::Euclidean => Distance::Euclidean,
                    Metric::Cosine => Distance::Cosine,
                };
                silhouette::silhouettes_with(x, &labelings, distance, workers)?
            }
        };
        let mut scores = scores.into_iter();
        Ok(ks
            .iter()
            .zip(fits)
            .map(|(&k, fit)| {
                let silhouette = if defined(&fit) { scores.next() } else { None };
                Candidate {
                    k,
                    fit,
                    silhouette: silhouette.map(|s| s.mean),
                }
            })
            .collect())
    }

    fn points<'a>(&self, x: &Matrix<'a>, workers: &Workers) -> Result<Points<'a>> {
        match self.metric {
            Metric::Euclidean => Points::centred(*x, workers),
            Metric::Cosine => Points::unit(*x, workers),
        }
    }

    fn check(&self, x: &Matrix, k: usize) -> Result<()> {
        if k == 0 || k > x.rows() {
            let reason = format!("must be between 1 and the number of rows, {}", x.rows());
            return Err(Error::argument("n_clusters", k, reason));
        }
        if x.rows() > i32::MAX as usize {
            return Err(Error::shape("X", x.rows(), "fewer than 2^31 rows"));
        }
        if self.n_init == 0 {
            return Err(Error::argument("n_init", 0, "must be at least 1"));
        }
        if self.max_iter == 0 {
            return Err(Error::argument("max_iter", 0, "must be at least 1"));
        }
        if !(self.tol.is_finite() && self.tol >= 0.0) {
            return Err(Error::argument(
                "tol",
                self.tol,
                "must be finite and not negative",
            ));
        }
        if let Init::Centers(centers) = &self.init {
            check_centers(centers, k, x.cols())?;
        }
        Ok(())
    }

    /// The best restart for each k. `pairs` are the distances between the unshifted points, where they
    /// are known (Euclidean only): the results are the same.
    fn run(
        &self,
        points: &Points,
        pairs: Option<&Pairs>,
        ks: &[usize],
        restarts: usize,
        workers: &Workers,
    ) -> Result<Vec<Fit>> {
        let jobs: Vec<(usize, usize)> = ks
            .iter()
            .flat_map(|&k| (0..restarts).map(move |restart| (k, restart)))
            .collect();
        let seeds = match &self.init {
            Init::PlusPlus => {
                let unshifted = points.unshifted();
                seed::plus_plus(&unshifted, pairs, &jobs, self.seed, workers)?
            }
            Init::Centers(_) => Vec::new(),
        };
        let coarse = match pairs {
            Some(pairs) => Some((
                pairs.coarse(points.dim(), workers)?,
                points.widest_norm(workers)?,
            )),
            None => None,
        };
        let kept = match coarse {
            None => Kept::new(points, workers)?,
            Some(_) => Kept::default(),
        };
        let tol = self.tol * points.mean_variance;
        let work = |job: usize, inner: &Workers| {
            let centers = match &self.init {
                Init::PlusPlus => points.gather(&seeds[job]),
                Init::Centers(centers) => points.import(centers),
            };
            let rows = match &coarse {
                Some((coarse, widest)) => Nearest::Paired(Paired::new(
                    points,
                    coarse,
                    *widest,
                    &seeds[job],
                    &centers,
                    inner,
                )?),
                None => {
                    let mut rows = Assignment::new(points, &kept);
                    rows.assign(&centers, inner)?;
                    Nearest::Screened(rows)
                }
            };
            lloyd::lloyd(points, rows, centers, self.max_iter, tol, inner)
        };
        // Small problems run whole, one a thread; large ones one after the other on all threads.
        // The results are the same.
        let small = coarse.is_some() || points.rows() < 8 * BLOCK;
        let mut best: Vec<Option<Fit>> = vec![None; ks.len()];
        let mut keep = |job: usize, fit: Fit| {
            let slot = &mut best[job / restarts];
            if slot.as_ref().is_none_or(|b| fit.inertia < b.inertia) {
                *slot = Some(fit);
            }
        };
        if small && jobs.len() > 1 {
            // A k at a time: only its restarts are kept.
            for first in (0..jobs.len()).step_by(restarts) {
                let fits = workers.map(restarts, |r| work(first + r, &workers.serial()))?;
                for (r, fit) in fits.into_iter().enumerate() {
                    keep(first + r, fit?);
                }
            }
        } else {
            for job in 0..jobs.len() {
                keep(job, work(job, workers)?);
            }
        }
        Ok(best.into_iter().flatten().collect())
    }
}

fn check_centers(centers: &[f32], k: usize, d: usize) -> Result<()> {
    if centers.len() != k * d {
        return Err(Error::shape(
            "the centres",
            centers.len(),
            format!("{k} x {d} elements"),
        ));
    }
    match centers.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::NonFinite {
            what: "the centres".to_string(),
            row: at / d,
            col: at % d,
            value: centers[at],
        }),
    }
}

/// The nearest of `centers` (row-major `[k, d]`) for each row of `x`.
///
/// # Errors
/// Shapes that do not fit, or a non-finite element.
pub fn predict(x: &Matrix, centers: &[f32], metric: Metric, workers: &Workers) -> Result<Vec<i32>> {
    let d = x.cols();
    let k = centers.len() / d;
    if k == 0 {
        return Err(Error::shape(
            "the centres",
            centers.len(),
            "at least one row",
        ));
    }
    check_centers(centers, k, d)?;
    let points = match metric {
        Metric::Cosine => Points::unit(*x, workers)?,
        Metric::Euclidean => {
            // Only differences count: measure from the middle of the centres.
            let mut middle = vec![0.0f64; d];
            for row in centers.chunks_exact(d) {
                middle
                    .iter_mut()
                    .zip(row)
                    .for_each(|(m, &v)| *m += f64::from(v));
            }
            middle.iter_mut().for_each(|m| *m /= k as f64);
            Points::shifted(*x, &middle, workers)?
        }
    };
    let kept = Kept::default();
    let mut rows = Assignment::new(&points, &kept);
    rows.assign(&points.import(centers), workers)?;
    Ok(rows.labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_between_rows_change_no_bit() {
        let workers = Workers::new(Some(2)).unwrap();
        for (n, d, spread) in [(60, 300, 0.3), (400, 8, 0.0), (900, 40, 2.0)] {
            let mut x: Vec<f32> = (0..n * d)
                .map(|i| {
                    let noise = (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
                    noise as f32 / (1u64 << 24) as f32 + spread * ((i / d) % 5) as f32 + 3.0
                })
                .collect();
            x.copy_within(0..10 * d, 20 * d);
            let x = Matrix::new(&x, n, d).unwrap();
            let settings = KMeans::new(2).max_iter(40).tol(0.0);
            let points = settings.points(&x, &workers).unwrap();
            let pairs = Pairs::new(&points.unshifted(), &workers).unwrap();
            for k in [1, 2, 7, 19] {
                let of = |pairs| settings.run(&points, pairs, &[k], 4, &workers).unwrap();
                assert_eq!(of(None), of(Some(&pairs)), "{n} {d} {k}");
            }
        }
    }
}
