//! Silhouettes: how much nearer a row is to its own cluster than to the next.
//!
//! For row i with mean distance a to the other rows of its cluster and b to the rows of the nearest
//! other cluster, the silhouette is `(b - a) / max(a, b)`; 0 in a cluster of one. For squared
//! Euclidean and cosine distances the sums have a closed form in `O(n k d)`. Euclidean distances are
//! computed once, tile by tile, for all labelings, and never stored.
//!
//! Scratch memory for Euclidean distances: 8 bytes a row and cluster, over all labelings at once up
//! to 64 MB (more labelings are done in several passes); and on processors with AMX 3 bytes a coordinate of more
//! than 5,120 rows, if that is at most 250 MB.

use std::ops::Range;
use std::sync::Mutex;

use crate::error::{Error, Result};
use crate::kernel::split::{self, Split};
use crate::kernel::{BLOCK, Form, Packed, Rows, Scratch, tile, vector};
use crate::matrix::Matrix;
use crate::pairs::{Pairs, Roots};
use crate::points::{Points, inverse_norm};
use crate::pool::Workers;

/// The distance between rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Distance {
    /// Euclidean.
    #[default]
    Euclidean,
    /// Squared Euclidean.
    SqEuclidean,
    /// `1 - cos`; a zero row has distance 1 to every other.
    Cosine,
}

/// Silhouettes of one labeling.
#[derive(Clone, Debug, PartialEq)]
pub struct Silhouette {
    /// Their mean.
    pub mean: f64,
    /// One a row.
    pub samples: Vec<f64>,
}

/// The silhouettes of the rows of `x` under `labels`.
///
/// ```
/// use nest_rs::{Matrix, silhouette, silhouette::Distance};
/// let x = [0.0f32, 1.0, 10.0, 11.0];
/// let scores = silhouette(&Matrix::new(&x[..], 4, 1)?, &[0, 0, 1, 1], Distance::Euclidean)?;
/// assert!((scores.mean - (1.0 - 0.5 * (1.0 / 10.5 + 1.0 / 9.5))).abs() < 1e-6);
/// # Ok::<(), nest_rs::Error>(())
/// ```
///
/// # Errors
/// A non-finite element, one label a row missing, or a number of distinct labels outside `2..n`.
pub fn silhouette(x: &Matrix, labels: &[i32], distance: Distance) -> Result<Silhouette> {
    let mut all = silhouettes_with(x, &[labels], distance, &Workers::new(None)?)?;
    all.pop()
        .ok_or_else(|| Error::argument("labels", 0, "no labeling"))
}

/// [`silhouette`] of several labelings of the same rows, on given workers.
///
/// # Errors
/// As [`silhouette`], for any of the labelings, or [`Error::Interrupted`].
pub fn silhouettes_with(
    x: &Matrix,
    labelings: &[&[i32]],
    distance: Distance,
    workers: &Workers,
) -> Result<Vec<Silhouette>> {
    let clusterings = labelings
        .iter()
        .map(|labels| Clustering::new(labels, x.rows()))
        .collect::<Result<Vec<_>>>()?;
    if clusterings.is_empty() {
        return Ok(Vec::new());
    }
    if distance == Distance::Euclidean {
        let points = Squares::new(Points::centred(*x, workers)?, workers)?;
        let mut out = Vec::new();
        for pass in passes(&clusterings, x.rows()) {
            out.extend(euclidean(&points, pass, workers)?);
        }
        return Ok(out);
    }
    let points = Doubles::new(x, distance, workers)?;
    clusterings
        .iter()
        .map(|clustering| closed_form(&points, clustering, workers))
        .collect()
}

/// Euclidean silhouettes from the distances themselves.
pub(crate) fn of_distances(
    roots: &Roots,
    labelings: &[&[i32]],
    workers: &Workers,
) -> Result<Vec<Silhouette>> {
    /// Rows whose sums stay in cache together; no bit depends on it.
    const BAND: usize = 512;
    let Some(n) = labelings.first().map(|labels| labels.len()) else {
        return Ok(Vec::new());
    };
    let clusterings = labelings
        .iter()
        .map(|labels| Clustering::new(labels, n))
        .collect::<Result<Vec<_>>>()?;
    let jobs = n.div_ceil(BAND);
    // Band by band, so that its distances stay in cache for all labelings.
    let bands = workers.map(jobs, |band| {
        let from = band * BAND;
        let len = BAND.min(n - from);
        let mut sums = Vec::new();
        clusterings
            .iter()
            .map(|of| {
                sums.clear();
                sums.resize(of.sizes.len() * len, 0.0f64);
                for (j, &c) in of.labels.iter().enumerate() {
                    let sum = &mut sums[c as usize * len..][..len];
                    vector::add(sum, &roots.row(j)[from..from + len]);
                }
                (0..len)
                    .map(|i| of.score(from + i, |c| sums[c * len + i]))
                    .collect::<Vec<f64>>()
            })
            .collect::<Vec<_>>()
    })?;
    Ok((0..clusterings.len())
        .map(|c| finish(bands.iter().flat_map(|band| &band[c]).copied().collect()))
        .collect())
}

/// Labels renumbered to `0..k`, with the sizes of the clusters.
struct Clustering {
    labels: Vec<u32>,
    sizes: Vec<usize>,
}

impl Clustering {
    fn new(labels: &[i32], n: usize) -> Result<Self> {
        if labels.len() != n {
            return Err(Error::shape("labels", labels.len(), format!("{n} labels")));
        }
        let mut names = labels.to_vec();
        names.sort_unstable();
        names.dedup();
        let k = names.len();
        if k < 2 || k >= n {
            return Err(Error::argument(
                "the number of distinct labels",
                k,
                format!("a silhouette needs 2 to n - 1 = {}", n.saturating_sub(1)),
            ));
        }
        let mut sizes = vec![0; k];
        let labels = labels
            .iter()
            .map(|l| {
                let c = names.partition_point(|name| name < l);
                sizes[c] += 1;
                c as u32
            })
            .collect();
        Ok(Clustering { labels, sizes })
    }

    /// The silhouette of row i from its summed distances to each cluster, itself left out.
    fn score(&self, i: usize, sum: impl Fn(usize) -> f64) -> f64 {
        let own = self.labels[i] as usize;
        if self.sizes[own] == 1 {
            return 0.0;
        }
        let a = sum(own) / (self.sizes[own] - 1) as f64;
        let b = (0..self.sizes.len())
            .filter(|&c| c != own)
            .map(|c| sum(c) / self.sizes[c] as f64)
            .fold(f64::INFINITY, f64::min);
        let widest = a.max(b);
        if widest > 0.0 { (b - a) / widest } else { 0.0 }
    }
}

fn finish(samples: Vec<f64>) -> Silhouette {
    // Index order.
    let mean = samples.iter().sum::<f64>() / samples.len() as f64;
    Silhouette { mean, samples }
}

/// Consecutive labelings whose sums fit into 64 MB together; at least one.
fn passes(clusterings: &[Clustering], n: usize) -> Vec<&[Clustering]> {
    let budget = (64 << 20) / 8 / n;
    let mut out = Vec::new();
    let (mut from, mut used) = (0, 0);
    for (i, clustering) in clusterings.iter().enumerate() {
        let k = clustering.sizes.len();
        if i > from && used + k > budget {
            out.push(&clusterings[from..i]);
            (from, used) = (i, 0);
        }
        used += k;
    }
    out.push(&clusterings[from..]);
    out
}

/// For a block of rows: `sums[c * width + i]`, the summed distance of its row i to cluster c, the
/// clusters of all labelings in a row.
struct Sums {
    sums: Vec<f64>,
    width: usize,
}

/// Squared distances, from `|x|^2 + |y|^2 - 2 x.y` where that is precise: half the work of differences.
struct Squares<'a> {
    centred: Points<'a>,
    /// The points whose differences lose nothing.
    raw: Points<'a>,
    /// `|x|^2` of the centred points.
    norms: Vec<f32>,
    /// The centred points once more, where their products are faster so.
    split: Option<Split>,
}

impl<'a> Squares<'a> {
    fn new(centred: Points<'a>, workers: &Workers) -> Result<Self> {
        let norms = centred.square_norms(workers)?;
        // Where there are few rows f32 takes little time, and its bits are the same on every processor.
        let split = if norms.len() > Pairs::MOST {
            Split::new(&centred, workers)?
        } else {
            None
        };
        Ok(Squares {
            raw: centred.unshifted(),
            split,
            centred,
            norms: norms.into_iter().map(|norm| norm as f32).collect(),
        })
    }

    /// Those between some rows and the rows `beside`, which are packed as `columns`, as [`tile`] gives them.
    fn tile<'s>(
        &self,
        rows: Range<usize>,
        beside: Range<usize>,
        columns: &mut Columns,
        scratch: &'s mut Scratch,
    ) -> &'s mut [f32] {
        /// One pair in so many may be computed by itself before it is cheaper to compute all anew.
        const FEW: usize = 32;
        let norms = &self.norms[beside.clone()];
        if columns.packed != Some(beside.clone()) {
            match &self.split {
                Some(split) => columns.split.refill(split, beside.clone()),
                None => columns.centred.refill(&self.centred, beside.clone()),
            }
            columns.packed = Some(beside.clone());
            columns.raw = None;
        }
        let (products, stride) = match &self.split {
            Some(split) => (
                split.tile(rows.clone(), &columns.split, scratch),
                columns.split.padded(),
            ),
            None => (
                tile(
                    Form::Dot,
                    &self.centred,
                    rows.clone(),
                    &columns.centred,
                    scratch,
                ),
                columns.centred.padded(),
            ),
        };
        let mut close = Vec::new();
        for (i, products) in rows.clone().zip(products.chunks_exact_mut(stride)) {
            let products = &mut products[..norms.len()];
            if vector::squares(products, self.norms[i], norms) {
                let is_close = |j: usize| {
                    let sum = self.norms[i] + norms[j];
                    !vector::is_precise(products[j], sum)
                };
                close.extend((0..norms.len()).filter(|&j| is_close(j)).map(|j| (i, j)));
            }
        }
        if close.len() * FEW > rows.len() * norms.len() {
            let raw = columns
                .raw
                .get_or_insert_with(|| Packed::new(&self.raw, beside));
            return tile(Form::SquaredDistance, &self.raw, rows, raw, scratch);
        }
        let (mut x, mut y) = (vec![0.0; self.raw.dim()], vec![0.0; self.raw.dim()]);
        let mut read = None;
        let squares = scratch.tile();
        for (i, j) in close {
            if read != Some(i) {
                self.raw.read(i, 0, &mut x);
                read = Some(i);
            }
            self.raw.read(beside.start + j, 0, &mut y);
            squares[(i - rows.start) * stride + j] = vector::square_distance(&x, &y) as f32;
        }
        &mut squares[..rows.len() * stride]
    }
}

/// Rows packed as columns, as far as they were wanted.
#[derive(Default)]
struct Columns {
    packed: Option<Range<usize>>,
    centred: Packed,
    split: split::Columns,
    raw: Option<Packed>,
}

fn euclidean(
    points: &Squares,
    clusterings: &[Clustering],
    workers: &Workers,
) -> Result<Vec<Silhouette>> {
    let n = points.norms.len();
    // The width fixes the order of the sums; it may depend on the shape alone.
    let width = (n / 16).next_multiple_of(16).clamp(32, 4 * BLOCK);
    let n_blocks = n.div_ceil(width);
    let range = |b: usize| b * width..((b + 1) * width).min(n);
    let clusters: usize = clusterings.iter().map(|c| c.sizes.len()).sum();
    let blocks: Vec<Mutex<Sums>> = (0..n_blocks)
        .map(|b| {
            let width = range(b).len();
            let sums = vec![0.0; width * clusters];
            Mutex::new(Sums { sums, width })
        })
        .collect();

    // Each pair of blocks once. A round holds pairs without a block in common, so that each block's
    // sums are filled in the order of the rounds, whoever computes them.
    for round in rounds(n_blocks) {
        let scratch = || (Scratch::default(), Columns::default(), Vec::new());
        workers.each_with(
            round.into_iter(),
            scratch,
            |(scratch, columns, flipped), (a, b)| {
                let mut below = lock(&blocks[b]);
                let mut beside = (a != b).then(|| lock(&blocks[a]));
                for start in range(a).step_by(BLOCK) {
                    let rows = start..(start + BLOCK).min(range(a).end);
                    let squares = points.tile(rows.clone(), range(b), columns, scratch);
                    let stride = squares.len() / rows.len();
                    vector::roots(squares);
                    below.add(clusterings, rows.clone(), 0, squares, stride);
                    if let Some(beside) = &mut beside {
                        transpose(squares, stride, rows.len(), range(b).len(), flipped);
                        let at = start - range(a).start;
                        beside.add(clusterings, range(b), at, flipped, rows.len());
                    }
                }
            },
        )?;
    }

    let blocks: Vec<Sums> = blocks
        .into_iter()
        .map(|m| m.into_inner().unwrap_or_else(|e| e.into_inner()))
        .collect();
    let mut first = 0;
    Ok(clusterings
        .iter()
        .map(|clustering| {
            let samples = (0..n)
                .map(|i| {
                    let block = &blocks[i / width];
                    clustering.score(i, |c| block.sums[(first + c) * block.width + i % width])
                })
                .collect();
            first += clustering.sizes.len();
            finish(samples)
        })
        .collect())
}

fn lock(block: &Mutex<Sums>) -> std::sync::MutexGuard<'_, Sums> {
    block.lock().unwrap_or_else(|e| e.into_inner())
}

impl Sums {
    /// Adds distances (a row for each of `others`) to the sums from column `at` on.
    fn add(
        &mut self,
        clusterings: &[Clustering],
        others: Range<usize>,
        at: usize,
        distances: &[f32],
        stride: usize,
    ) {
        let mut first = 0;
        for clustering in clusterings {
            for (j, row) in others.clone().zip(distances.chunks_exact(stride)) {
                let c = first + clustering.labels[j] as usize;
                let len = stride.min(self.width - at);
                let sums = &mut self.sums[c * self.width + at..][..len];
                vector::add(sums, &row[..len]);
            }
            first += clustering.sizes.len();
        }
    }
}

fn transpose(x: &[f32], stride: usize, rows: usize, cols: usize, out: &mut Vec<f32>) {
    /// Columns whose lines stay in cache while they are written.
    const SIDE: usize = 16;
    out.resize(rows * cols, 0.0);
    for left in (0..cols).step_by(SIDE) {
        for j in left..(left + SIDE).min(cols) {
            let column = x[j..].iter().step_by(stride);
            let out = &mut out[j * rows..(j + 1) * rows];
            out.iter_mut().zip(column).for_each(|(o, &v)| *o = v);
        }
    }
}

/// A round-robin tournament of the blocks: first each with itself, then every pair once.
fn rounds(n: usize) -> Vec<Vec<(usize, usize)>> {
    let mut out = vec![(0..n).map(|b| (b, b)).collect::<Vec<_>>()];
    let even = n.next_multiple_of(2);
    for r in 0..even.saturating_sub(1) {
        let ring = even - 1;
        let mut round = vec![(r, ring)];
        round.extend((1..even / 2).map(|i| ((r + i) % ring, (r + ring - i) % ring)));
        round.retain(|&(a, b)| a.max(b) < n);
        if !round.is_empty() {
            out.push(round);
        }
    }
    out
}

/// Rows in f64, centred on the mean (squared distances) or on the unit sphere (cosine).
struct Doubles<'a> {
    x: Matrix<'a>,
    mean: Option<Vec<f64>>,
}

impl<'a> Doubles<'a> {
    fn new(x: &Matrix<'a>, distance: Distance, workers: &Workers) -> Result<Self> {
        x.scan("X", workers)?;
        let mean = match distance {
            Distance::Cosine => None,
            _ => Some(x.moments(workers)?.0),
        };
        Ok(Doubles { x: *x, mean })
    }

    fn read(&self, i: usize, single: &mut [f32], out: &mut [f64]) {
        self.x.read(i, 0, single);
        match &self.mean {
            Some(mean) => {
                for ((o, &v), m) in out.iter_mut().zip(&*single).zip(mean) {
                    *o = f64::from(v) - m;
                }
            }
            None => {
                let inverse = inverse_norm(single);
                for (o, &v) in out.iter_mut().zip(&*single) {
                    *o = f64::from(v) * inverse;
                }
            }
        }
    }
}

/// Sums over a cluster of m rows y: of `|x - y|^2`, `m |x|^2 + sum |y|^2 - 2 x . sum y`; of
/// `1 - x.y`, `m - x . sum y`.
fn closed_form(points: &Doubles, of: &Clustering, workers: &Workers) -> Result<Silhouette> {
    let (n, d, k) = (points.x.rows(), points.x.cols(), of.sizes.len());
    let squared = points.mean.is_some();
    // Sums within rounding of zero are zero: rows that coincide have no distance.
    let rounding = (d as f64 / 16.0 + 16.0) * f64::EPSILON;
    let clean = |sum: f64, scale: f64| if sum > rounding * scale { sum } else { 0.0 };
    // Each cluster summed by one worker, in index order.
    let totals = workers.map(k, |c| {
        let (mut sum, mut squares) = (vec![0.0f64; d], 0.0);
        let (mut single, mut row) = (vec![0.0f32; d], vec![0.0f64; d]);
        for i in (0..n).filter(|&i| of.labels[i] as usize == c) {
            points.read(i, &mut single, &mut row);
            sum.iter_mut().zip(&row).for_each(|(s, v)| *s += v);
            squares += vector::dot_f64(&row, &row);
        }
        (sum, squares)
    })?;
    let mut samples = vec![0.0f64; n];
    const TASK: usize = 64;
    workers.each_with(
        samples.chunks_mut(TASK).enumerate(),
        || (vec![0.0f32; d], vec![0.0f64; d]),
        |(single, row), (task, samples)| {
            for (i, sample) in (task * TASK..).zip(samples) {
                points.read(i, single, row);
                let norm = vector::dot_f64(row, row);
                let own = of.labels[i] as usize;
                *sample = of.score(i, |c| {
                    let (sum, squares) = &totals[c];
                    let m = of.sizes[c] as f64;
                    let product = vector::dot_f64(row, sum);
                    if squared {
                        clean(m * norm + squares - 2.0 * product, m * norm + squares)
                    } else {
                        // The row's distance to itself, 1 - x.x, is not exactly 0.
                        let itself = if c == own { 1.0 - norm } else { 0.0 };
                        clean(m - product - itself, m)
                    }
                });
            }
        },
    )?;
    Ok(finish(samples))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tournament_meets_every_pair_once_and_no_block_twice_a_round() {
        for n in 1..12 {
            let mut met = std::collections::HashSet::new();
            for (r, round) in rounds(n).into_iter().enumerate() {
                let mut busy = std::collections::HashSet::new();
                for (a, b) in round {
                    assert!(met.insert((a.min(b), a.max(b))));
                    assert!(busy.insert(a) && (r == 0 || busy.insert(b)));
                }
            }
            assert_eq!(met.len(), n * (n + 1) / 2);
        }
    }

    #[test]
    fn too_few_or_too_many_labels_are_refused() {
        let x = [1.0f32, 2.0, 3.0];
        let x = Matrix::new(&x[..], 3, 1).unwrap();
        for labels in [[0, 0, 0], [0, 1, 2]] {
            assert!(silhouette(&x, &labels, Distance::Euclidean).is_err());
        }
        assert!(silhouette(&x, &[0, 1], Distance::Euclidean).is_err());
    }

    #[test]
    fn many_labelings_give_what_each_gives_alone() {
        let x: Vec<f32> = (0..900).map(|i| ((i * 37) % 101) as f32).collect();
        let x = Matrix::new(&x, 300, 3).unwrap();
        let two: Vec<i32> = (0..300).map(|i| i % 2).collect();
        let five: Vec<i32> = (0..300).map(|i| (i * i) % 5).collect();
        let workers = Workers::new(Some(2)).unwrap();
        for distance in [Distance::Euclidean, Distance::SqEuclidean, Distance::Cosine] {
            let both = silhouettes_with(&x, &[&two, &five], distance, &workers).unwrap();
            assert_eq!(both[0], silhouette(&x, &two, distance).unwrap());
            assert_eq!(both[1], silhouette(&x, &five, distance).unwrap());
        }
    }
}
