//! Exact k-means: greedy k-means++ seeding, Lloyd's iterations, restarts, several k in one call.
//!
//! The arithmetic follows scikit-learn's `KMeans(algorithm="lloyd")`: the same centring, the same
//! stopping rule, the same repair of empty clusters; from the same starting centres it ends at the
//! same labels. What differs is that nothing here depends on the number of threads.
//!
//! Scratch memory beside the input: `O(n + k d)`, 104 KB and one tile of `96 k` floats a thread, and
//! while seeding `n (2 + ln k)` floats.

mod assign;
mod lloyd;
mod seed;

use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::points::Points;
use crate::pool::Workers;
use crate::silhouette::{self, Distance};

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
        let mut fits = self.run(&points, &[self.n_clusters], restarts, workers)?;
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
        let fits = settings.run(&points, ks, n_init, workers)?;

        let defined = |fit: &Fit| fit.n_used >= 2 && fit.n_used < x.rows();
        let labelings: Vec<&[i32]> = fits
            .iter()
            .filter(|fit| defined(fit))
            .map(|fit| fit.labels.as_slice())
            .collect();
        let distance = match self.metric {
            Metric::Euclidean => Distance::Euclidean,
            Metric::Cosine => Distance::Cosine,
        };
        let mut scores =
            silhouette::silhouettes_with(x, &labelings, distance, workers)?.into_iter();
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

    /// The best restart for each k.
    fn run(
        &self,
        points: &Points,
        ks: &[usize],
        restarts: usize,
        workers: &Workers,
    ) -> Result<Vec<Fit>> {
        // Small problems run whole, one a thread; large ones one after the other on all threads.
        // The results are the same.
        let jobs = ks.len() * restarts;
        let work = |job: usize, inner: &Workers| {
            let (k, restart) = (ks[job / restarts], job % restarts);
            self.one(points, k, restart, inner)
        };
        let small = crate::kernel::Rows::rows(points) < 8 * crate::kernel::BLOCK;
        let fits: Vec<Result<Fit>> = if small && jobs > 1 {
            workers.map(jobs, |job| work(job, &workers.serial()))?
        } else {
            (0..jobs).map(|job| work(job, workers)).collect()
        };
        let mut best: Vec<Option<Fit>> = vec![None; ks.len()];
        for (job, fit) in fits.into_iter().enumerate() {
            let (fit, slot) = (fit?, &mut best[job / restarts]);
            if slot.as_ref().is_none_or(|b| fit.inertia < b.inertia) {
                *slot = Some(fit);
            }
        }
        Ok(best.into_iter().flatten().collect())
    }

    fn one(&self, points: &Points, k: usize, restart: usize, workers: &Workers) -> Result<Fit> {
        let start = match &self.init {
            Init::PlusPlus => seed::plus_plus(points, k, self.seed, restart as u64, workers)?,
            Init::Centers(centers) => points.import(centers),
        };
        let tol = self.tol * points.mean_variance;
        lloyd::lloyd(points, start, self.max_iter, tol, workers)
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
    let mut rows = assign::Assignment::new(&points);
    rows.assign(&points.import(centers), workers)?;
    Ok(rows.labels)
}
