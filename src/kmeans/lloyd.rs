//! Lloyd's iterations.

use crate::error::Result;
use crate::kernel::{BLOCK, Form, Packed, Rows, Scratch, tile, vector};
use crate::points::Points;
use crate::pool::Workers;

use super::Fit;

/// Rows a task of the assignment; no sum depends on it.
const TASK: usize = 4 * BLOCK;
/// Rows whose inertia is summed together: part of the bits.
const CHUNK: usize = 1024;
/// Coordinates a task of the update; no sum depends on it.
const SLICE: usize = 256;

/// Runs from `centers` (`[k, d]`, coordinates of the points) until the labels repeat, the centres
/// shift by at most `tol` in all (squared), or `max_iter` iterations are done.
pub(super) fn lloyd(
    points: &Points,
    mut centers: Vec<f32>,
    max_iter: usize,
    tol: f64,
    workers: &Workers,
) -> Result<Fit> {
    let (n, d) = (points.rows(), points.dim());
    let k = centers.len() / d;
    let mut labels = vec![-1i32; n];
    let mut before = vec![-1i32; n];
    let mut n_iter = 0;
    let mut settled = false;
    while n_iter < max_iter {
        n_iter += 1;
        std::mem::swap(&mut labels, &mut before);
        assign(points, &centers, &mut labels, workers)?;
        let moved = update(points, &centers, &labels, workers)?;
        let shift: f64 = (0..k)
            .map(|c| vector::square_distance(&moved[c * d..][..d], &centers[c * d..][..d]))
            .sum();
        centers = moved;
        if labels == before {
            settled = true;
            break;
        }
        if shift <= tol {
            break;
        }
    }
    if !settled {
        // The centres moved after the last assignment.
        assign(points, &centers, &mut labels, workers)?;
    }
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

/// Writes the nearest centre of each row, the first of equals.
pub(super) fn assign(
    points: &Points,
    centers: &[f32],
    labels: &mut [i32],
    workers: &Workers,
) -> Result<()> {
    let d = points.dim();
    let k = centers.len() / d;
    let columns = Packed::new(&(centers, d), 0..k);
    // |x - c|^2 / 2 = |x|^2 / 2 + bias - x.c; of unit vectors only the product counts.
    let bias: Vec<f32> = centers
        .chunks_exact(d)
        .map(|c| {
            if points.is_unit() {
                0.0
            } else {
                (0.5 * vector::square_norm(c)) as f32
            }
        })
        .collect();
    workers.each_with(
        labels.chunks_mut(TASK).enumerate(),
        Scratch::default,
        |scratch, (task, labels)| {
            for (block, labels) in labels.chunks_mut(BLOCK).enumerate() {
                let from = task * TASK + block * BLOCK;
                let rows = from..from + labels.len();
                let products = tile(Form::Dot, points, rows, &columns, scratch);
                for (label, row) in labels
                    .iter_mut()
                    .zip(products.chunks_exact(columns.padded()))
                {
                    *label = vector::arg_min(&bias, row) as i32;
                }
            }
        },
    )
}

/// The rows of each cluster, in index order: `order[starts[c]..starts[c + 1]]`.
fn members(labels: &[i32], k: usize) -> (Vec<usize>, Vec<u32>) {
    let mut starts = vec![0usize; k + 1];
    labels.iter().for_each(|&l| starts[l as usize + 1] += 1);
    for c in 0..k {
        starts[c + 1] += starts[c];
    }
    let mut next = starts.clone();
    let mut order = vec![0u32; labels.len()];
    for (i, &l) in labels.iter().enumerate() {
        order[next[l as usize]] = i as u32;
        next[l as usize] += 1;
    }
    (starts, order)
}

/// The means of the clusters; an empty one takes over the row farthest from its centre.
fn update(points: &Points, centers: &[f32], labels: &[i32], workers: &Workers) -> Result<Vec<f32>> {
    let d = points.dim();
    let k = centers.len() / d;
    let (starts, order) = members(labels, k);
    let mut sums = vec![0.0f64; k * d];
    let slices: Vec<(usize, usize, &mut [f64])> = sums
        .chunks_mut(d)
        .enumerate()
        .flat_map(|(c, sum)| {
            sum.chunks_mut(SLICE)
                .enumerate()
                .map(move |(s, slice)| (c, s * SLICE, slice))
        })
        .collect();
    workers.each_with(
        slices.into_iter(),
        || vec![0.0f32; SLICE],
        |row, (c, start, sum)| {
            let row = &mut row[..sum.len()];
            for &i in &order[starts[c]..starts[c + 1]] {
                points.read(i as usize, start, row);
                vector::add(sum, row);
            }
        },
    )?;
    let mut counts: Vec<usize> = starts.windows(2).map(|w| w[1] - w[0]).collect();
    if counts.contains(&0) {
        refill_empty(points, centers, labels, &mut sums, &mut counts, workers)?;
    }

    let mut moved = centers.to_vec();
    for (c, center) in moved.chunks_exact_mut(d).enumerate() {
        if counts[c] == 0 {
            continue; // fewer distinct rows than clusters: it stays where it is
        }
        let sum = &sums[c * d..(c + 1) * d];
        let length = if points.is_unit() {
            vector::dot_f64(sum, sum).sqrt()
        } else {
            counts[c] as f64
        };
        if length > 0.0 {
            center
                .iter_mut()
                .zip(sum)
                .for_each(|(v, s)| *v = (s / length) as f32);
        }
    }
    Ok(moved)
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
