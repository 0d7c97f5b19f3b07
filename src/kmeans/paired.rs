//! The nearest centre of each row from the distances between the rows alone.
//!
//! With mu the mean of a cluster of m rows y, `|x - mu|^2 = sum |x - y|^2 / m - sum sum |y - y'|^2 / (2 m^2)`.
//! Where all distances between rows are known, the sums over each cluster can follow the labels: a row that
//! changes its cluster costs one addition for each other row, whatever the dimension. The distances are
//! whole steps ([`Coarse`]), so the sums are exact integers, and their distance from the truth is bounded:
//! by one error of a distance for the first term and half of one for the second.
//!
//! As a screen ([`crate::kernel::screen`]) does, this decides what it can prove, and leaves close calls to
//! the scores as f32 arithmetic defines them; so it gives the labels of [`super::assign`], to the bit.

use crate::error::Result;
use crate::kernel::{CHAINS, Kept, Rows, Scratch, Screen, chains, vector};
use crate::pairs::Coarse;
use crate::points::Points;
use crate::pool::Workers;

use super::assign::{Assignment, biases};

const UNIT: f64 = 1.0 / (1u64 << 24) as f64;
/// Rows evaluated together: their state stays in the first-level cache.
const BAND: usize = 1024;

/// Labels by sums of distances, for Euclidean k-means that starts from rows.
pub(super) struct Paired<'a, 'x> {
    points: &'a Points<'x>,
    coarse: &'a Coarse,
    k: usize,
    pub labels: Vec<i32>,
    /// The labels that the sums follow; none while the centres are single rows.
    followed: Vec<i32>,
    counts: Vec<usize>,
    /// For each cluster, the summed steps from every row to its members.
    sums: Vec<u32>,
    /// Squared distances nearer than this are a close call.
    doubt: f64,
    scratch: Scratch,
}

impl<'a, 'x> Paired<'a, 'x> {
    /// Assigns to the given rows. `widest` is the largest norm of a point.
    pub fn new(
        points: &'a Points<'x>,
        coarse: &'a Coarse,
        widest: f64,
        seeds: &[usize],
        centers: &[f32],
        workers: &Workers,
    ) -> Result<Self> {
        let (n, k) = (points.rows(), seeds.len());
        let square = widest * widest * 1.001;
        // How far a value below may be from the squared distance to the centre: the distances; those are of
        // the unshifted rows, and shifting rounds each coordinate once, as does the division
        // that makes the centre (16 u for both); and the value is computed in f32.
        let value = 1.5 * coarse.error + 16.0 * UNIT * square + 8.0 * UNIT * coarse.widest;
        // Twice the score is the squared distance up to a constant, its own rounding and that of the bias.
        let score = 2.0 * (Screen::rounding(points.dim()) * 2.0 * square + UNIT * square);
        let mut this = Paired {
            points,
            coarse,
            k,
            labels: vec![-1; n],
            followed: Vec::new(),
            counts: vec![1; k],
            sums: vec![0; n * k],
            doubt: 2.0 * (value + score),
            scratch: Scratch::default(),
        };
        for (sums, &seed) in this.sums.chunks_exact_mut(n).zip(seeds) {
            vector::add_steps(sums, coarse.row(seed));
        }
        this.evaluate(centers, workers)?;
        Ok(this)
    }

    /// Assigns to the means of the present clusters, which are `centers`.
    pub fn reassign(&mut self, centers: &[f32], workers: &Workers) -> Result<()> {
        workers.check()?;
        self.follow();
        if self.counts.contains(&0) {
            // An empty cluster's centre is not a mean.
            return self.as_defined(centers, workers);
        }
        self.evaluate(centers, workers)
    }

    fn as_defined(&mut self, centers: &[f32], workers: &Workers) -> Result<()> {
        let kept = Kept::default();
        let mut rows = Assignment::new(self.points, &kept);
        rows.assign(centers, workers)?;
        self.labels = rows.labels;
        Ok(())
    }

    /// Brings the sums to the labels.
    fn follow(&mut self) {
        let n = self.labels.len();
        let moves = self
            .followed
            .iter()
            .zip(&self.labels)
            .filter(|(a, b)| a != b);
        if self.followed.is_empty() || 2 * moves.count() > n {
            self.sums.fill(0);
            self.counts.fill(0);
            for (m, &label) in self.labels.iter().enumerate() {
                let c = label as usize;
                vector::add_steps(&mut self.sums[c * n..(c + 1) * n], self.coarse.row(m));
                self.counts[c] += 1;
            }
            self.followed = self.labels.clone();
            return;
        }
        for (m, (old, &new)) in self.followed.iter_mut().zip(&self.labels).enumerate() {
            if *old != new {
                let (from, to) = (*old as usize, new as usize);
                let (low, high) = self.sums.split_at_mut(from.max(to) * n);
                let (low, high) = (&mut low[from.min(to) * n..][..n], &mut high[..n]);
                let (from_sums, to_sums) = if from < to { (low, high) } else { (high, low) };
                vector::move_steps(from_sums, to_sums, self.coarse.row(m));
                self.counts[from] -= 1;
                self.counts[to] += 1;
                *old = new;
            }
        }
    }

    fn evaluate(&mut self, centers: &[f32], workers: &Workers) -> Result<()> {
        let (n, step) = (self.labels.len(), self.coarse.step);
        let mut inner = vec![0u64; self.k];
        for (m, &label) in self.followed.iter().enumerate() {
            inner[label as usize] += u64::from(self.sums[label as usize * n + m]);
        }
        let shapes: Vec<(f32, f32)> = inner
            .iter()
            .zip(&self.counts)
            .map(|(&inner, &count)| {
                let m = count as f64;
                (
                    (step / m) as f32,
                    (step * inner as f64 / (2.0 * m * m)) as f32,
                )
            })
            .collect();
        let mut close = Vec::new();
        for from in (0..n).step_by(BAND) {
            let len = BAND.min(n - from);
            let mut first = [f32::INFINITY; BAND];
            let mut second = [f32::INFINITY; BAND];
            let mut place = [0u32; BAND];
            for (c, &(factor, offset)) in shapes.iter().enumerate() {
                vector::enter_column(
                    &mut first[..len],
                    &mut second,
                    &mut place,
                    &self.sums[c * n + from..][..len],
                    factor,
                    offset,
                    c as u32,
                );
            }
            for i in 0..len {
                self.labels[from + i] = place[i] as i32;
                let limit = f64::from(first[i]) + self.doubt;
                if f64::from(second[i]) <= limit {
                    for (c, &(factor, offset)) in shapes.iter().enumerate() {
                        let value = self.sums[c * n + from + i] as f32 * factor - offset;
                        if f64::from(value) <= limit {
                            close.push((from + i, c));
                        }
                    }
                }
            }
        }
        if close.len() > n * self.k / 8 {
            return self.as_defined(centers, workers);
        }
        self.close_calls(centers, &close);
        Ok(())
    }

    /// The first smallest score as defined, among the columns that may have it.
    fn close_calls(&mut self, centers: &[f32], close: &[(usize, usize)]) {
        if close.is_empty() {
            return;
        }
        let bias = biases(self.points, centers);
        let mut best = (usize::MAX, f32::INFINITY);
        for pairs in close.chunks(CHAINS) {
            let products = chains(self.points, centers, pairs, &mut self.scratch);
            for (&(row, c), product) in pairs.iter().zip(products) {
                let score = bias[c] - product;
                if best.0 != row || score < best.1 {
                    best = (row, score);
                    self.labels[row] = c as i32;
                }
            }
        }
    }
}
