//! Lloyd's iterations.

use crate::error::Result;
use crate::kernel::{Rows, vector};
use crate::points::Points;
use crate::pool::Workers;

use super::Fit;
use super::assign::Assignment;
use super::paired::Paired;

/// Rows whose inertia is summed together: part of the bits.
const CHUNK: usize = 1024;
/// Coordinates a task of the update; no sum depends on it.
const SLICE: usize = 256;
/// Updates by difference between two from scratch: part of the bits.
const FRESH: usize = 16;

/// How the rows find their centres; the labels are the same.
pub(super) enum Nearest<'a, 'x> {
    Screened(Assignment<'a, 'x>),
    Paired(Paired<'a, 'x>),
}

impl Nearest<'_, '_> {
    fn labels(&self) -> &[i32] {
        match self {
            Nearest::Screened(rows) => &rows.labels,
            Nearest::Paired(rows) => &rows.labels,
        }
    }

    fn reassign(&mut self, centers: &[f32], drift: Vec<f64>, workers: &Workers) -> Result<()> {
        match self {
            Nearest::Screened(rows) => rows.reassign(centers, drift, workers),
            Nearest::Paired(rows) => rows.reassign(centers, workers),
        }
    }
}

/// Runs from `centers` (`[k, d]`, coordinates of the points), to which `rows` are assigned, until the labels repeat, the centres
/// shift by at most `tol` in all (squared), or `max_iter` iterations are done.
pub(super) fn lloyd(
    points: &Points,
    mut rows: Nearest,
    mut centers: Vec<f32>,
    max_iter: usize,
    tol: f64,
    workers: &Workers,
) -> Result<Fit> {
    let d = points.dim();
    let k = centers.len() / d;
    let mut sums = Sums::new(points, k);
    let mut n_iter = 0;
    loop {
        n_iter += 1;
        let settled = !sums.follow(rows.labels(), workers)?;
        if settled {
            sums.refresh(workers)?;
        }
        let moved = sums.means(&centers, workers)?;
        let squares: Vec<f64> = moved
            .chunks_exact(d)
            .zip(centers.chunks_exact(d))
            .map(|(to, from)| vector::square_distance(to, from))
            .collect();
        centers = moved;
        if settled {
            break;
        }
        // 1e-6: the rounding of the differences.
        let drift = squares.iter().map(|s| s.sqrt() * (1.0 + 1e-6)).collect();
        rows.reassign(&centers, drift, workers)?;
        if n_iter == max_iter || squares.iter().sum::<f64>() <= tol {
            break;
        }
    }
    let labels = rows.labels().to_vec();
    let inertia = inertia(points, &centers, &labels, workers)?;
    let mut used = vec![false; k];
    labels.iter().for_each(|&l| used[l as usize] = true);
    Ok(Fit {
        centers: points.export(&centers),
        labels,
        inertia,
        n_iter,
        n_used: used.into_iter().filter(|&u| u).count(),
    })
}

/// A row and the factor with which it enters a sum.
type Entry = (u32, f64);
/// What enters some coordinates of a sum, from which coordinate on, and the sum.
type Slice<'s> = (&'s [Entry], usize, &'s mut [f64]);

/// The sums of the rows of each cluster, which follow the labels.
struct Sums<'a, 'x> {
    points: &'a Points<'x>,
    k: usize,
    labels: Vec<i32>,
    counts: Vec<usize>,
    sums: Vec<f64>,
    /// Updates by difference since the last one from scratch.
    age: usize,
}

impl<'a, 'x> Sums<'a, 'x> {
    fn new(points: &'a Points<'x>, k: usize) -> Self {
        Sums {
            points,
            k,
            labels: vec![-1; points.rows()],
            counts: vec![0; k],
            sums: vec![0.0; k * points.dim()],
            age: FRESH,
        }
    }

    /// Takes new labels; false if they are the old ones.
    fn follow(&mut self, labels: &[i32], workers: &Workers) -> Result<bool> {
        let moves = self
            .labels
            .iter()
            .zip(labels)
            .filter(|(a, b)| a != b)
            .count();
        if moves == 0 {
            return Ok(false);
        }
        // A move costs two additions of a row, in scattered order.
        if self.age >= FRESH || 4 * moves > labels.len() {
            self.labels.copy_from_slice(labels);
            self.count();
            self.age = 1;
            return self.refresh(workers).map(|()| true);
        }
        self.age += 1;
        // What each cluster loses and gains, in index order.
        let mut changes: Vec<Vec<Entry>> = vec![Vec::new(); self.k];
        for (i, (old, &new)) in self.labels.iter_mut().zip(labels).enumerate() {
            if *old != new {
                changes[*old as usize].push((i as u32, -1.0));
                changes[new as usize].push((i as u32, 1.0));
                *old = new;
            }
        }
        self.count();
        self.add(&changes, workers)?;
        Ok(true)
    }

    fn count(&mut self) {
        self.counts.fill(0);
        self.labels
            .iter()
            .for_each(|&l| self.counts[l as usize] += 1);
    }

    /// Sums the rows from scratch, in index order; nothing to do if they were.
    fn refresh(&mut self, workers: &Workers) -> Result<()> {
        if self.age == 0 {
            return Ok(());
        }
        self.age = 0;
        self.sums.fill(0.0);
        let mut members: Vec<Vec<Entry>> =
            self.counts.iter().map(|&n| Vec::with_capacity(n)).collect();
        for (i, &l) in self.labels.iter().enumerate() {
            members[l as usize].push((i as u32, 1.0));
        }
        self.add(&members, workers)
    }

    /// Adds rows, with their factors, to the clusters.
    fn add(&mut self, rows: &[Vec<Entry>], workers: &Workers) -> Result<()> {
        let points = self.points;
        let slices: Vec<Slice> = self
            .sums
            .chunks_mut(points.dim())
            .zip(rows)
            .filter(|(_, rows)| !rows.is_empty())
            .flat_map(|(sum, rows)| {
                sum.chunks_mut(SLICE)
                    .enumerate()
                    .map(move |(s, slice)| (rows.as_slice(), s * SLICE, slice))
            })
            .collect();
        workers.each_with(
            slices.into_iter(),
            || vec![0.0f32; SLICE],
            |row, (rows, start, sum)| {
                let row = &mut row[..sum.len()];
                for &(i, factor) in rows {
                    points.read(i as usize, start, row);
                    if factor == 1.0 {
                        vector::add(sum, row);
                    } else {
                        vector::add_scaled(sum, factor, row);
                    }
                }
            },
        )
    }

    /// The means of the clusters; an empty one takes over the row farthest from its centre.
    fn means(&self, centers: &[f32], workers: &Workers) -> Result<Vec<f32>> {
        if !self.counts.contains(&0) {
            return Ok(self.divide(centers, &self.sums, &self.counts));
        }
        let (mut sums, mut counts) = (self.sums.clone(), self.counts.clone());
        refill_empty(
            self.points,
            centers,
            &self.labels,
            &mut sums,
            &mut counts,
            workers,
        )?;
        Ok(self.divide(centers, &sums, &counts))
    }

    fn divide(&self, centers: &[f32], sums: &[f64], counts: &[usize]) -> Vec<f32> {
        let d = self.points.dim();
        let mut moved = centers.to_vec();
        for ((center, sum), &count) in moved
            .chunks_exact_mut(d)
            .zip(sums.chunks_exact(d))
            .zip(counts)
        {
            if count == 0 {
                continue; // fewer distinct rows than clusters: it stays where it is
            }
            let length = if self.points.is_unit() {
                vector::dot_f64(sum, sum).sqrt()
            } else {
                count as f64
            };
            if length > 0.0 {
                center
                    .iter_mut()
                    .zip(sum)
                    .for_each(|(v, s)| *v = (s / length) as f32);
            }
        }
        moved
    }
}

/// Gives each empty cluster, in order, the row farthest from its own centre among those not yet
/// given, as scikit-learn does.
fn refill_empty(
    points: &Points,
    centers: &[f32],
    labels: &[i32],
    sums: &mut [f64],
    counts: &mut [usize],
    workers: &Workers,
) -> Result<()> {
    let d = points.dim();
    let squares = own_distances(points, centers, labels, workers)?;
    let mut far: Vec<u32> = (0..labels.len() as u32).collect();
    // Farthest first, the lower index of equals.
    far.sort_by(|&a, &b| {
        squares[b as usize]
            .total_cmp(&squares[a as usize])
            .then(a.cmp(&b))
    });
    let empty: Vec<usize> = (0..counts.len()).filter(|&c| counts[c] == 0).collect();
    let mut row = vec![0.0f32; d];
    for (c, &i) in empty.into_iter().zip(&far) {
        if squares[i as usize] == 0.0 {
            break; // every row sits on its centre
        }
        let old = labels[i as usize] as usize;
        points.read(i as usize, 0, &mut row);
        vector::add_scaled(&mut sums[old * d..(old + 1) * d], -1.0, &row);
        vector::add(&mut sums[c * d..(c + 1) * d], &row);
        counts[old] -= 1;
        counts[c] = 1;
    }
    Ok(())
}

/// Squared distance of each row to its centre.
fn own_distances(
    points: &Points,
    centers: &[f32],
    labels: &[i32],
    workers: &Workers,
) -> Result<Vec<f64>> {
    let (n, d) = (points.rows(), points.dim());
    let mut squares = vec![0.0f64; n];
    workers.each_with(
        squares.chunks_mut(CHUNK).enumerate(),
        || vec![0.0f32; d],
        |row, (chunk, squares)| {
            for (i, square) in (chunk * CHUNK..).zip(squares) {
                points.read(i, 0, row);
                let c = labels[i] as usize;
                *square = vector::square_distance(row, &centers[c * d..(c + 1) * d]);
            }
        },
    )?;
    Ok(squares)
}

fn inertia(points: &Points, centers: &[f32], labels: &[i32], workers: &Workers) -> Result<f64> {
    let squares = own_distances(points, centers, labels, workers)?;
    let total: f64 = squares
        .chunks(CHUNK)
        .map(|chunk| chunk.iter().sum::<f64>())
        .sum();
    // Of unit vectors, |x - c|^2 = 2 (1 - cos).
    Ok(if points.is_unit() {
        0.5 * total
    } else {
        total * points.square_unit()
    })
}
