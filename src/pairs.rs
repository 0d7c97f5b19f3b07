//! The squared distances or products between all rows, where there are few enough to keep them.

use crate::error::Result;
use crate::kernel::{BLOCK, Form, Packed, Rows, Scratch, Screen, tile, vector};
use crate::pool::Workers;

/// Columns packed at once; no bit depends on it.
const WIDTH: usize = 2 * BLOCK;

/// All squared distances, in f32, computed as [`tile`] does: `4 n^2` bytes.
pub(crate) struct Pairs {
    squares: Vec<f32>,
    n: usize,
}

impl Pairs {
    /// The most rows for which distances are kept.
    pub const MOST: usize = 5120;

    /// Every pair is computed once: a distance has the same bits from either end.
    pub fn new(rows: &impl Rows, workers: &Workers) -> Result<Self> {
        let n = rows.rows();
        let mut squares = vec![0.0f32; n * n];
        below_diagonal(
            Form::SquaredDistance,
            rows,
            &mut squares,
            |i| i * n,
            workers,
        )?;
        mirror(&mut squares, n);
        Ok(Pairs { squares, n })
    }

    /// The distances of a row to all.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.squares[i * self.n..(i + 1) * self.n]
    }

    /// The same distances in 16 bits, for rows of the given dimension.
    pub fn coarse(&self, dim: usize, workers: &Workers) -> Result<Coarse> {
        let n = self.n;
        let widest = workers.map(n, |i| vector::max_abs_bits(self.row(i)))?;
        let widest = f64::from(f32::from_bits(widest.into_iter().max().unwrap_or(0)));
        let step = (widest / f64::from(u16::MAX - 1)).max(f64::from(f32::MIN_POSITIVE));
        let mut steps = vec![0u16; n * n];
        workers.each(steps.chunks_mut(n).enumerate(), |(i, out)| {
            vector::quantise(self.row(i), (1.0 / step) as f32, out);
        })?;
        Ok(Coarse {
            steps,
            n,
            step,
            widest,
            // Half a step and the roundings of the quotient in f32; and those of the distance itself, a sum of
            // positive terms.
            error: 0.52 * step + Screen::rounding(dim) * widest,
        })
    }

    /// Distances for squared distances.
    pub fn into_roots(mut self, workers: &Workers) -> Result<Roots> {
        let n = self.n;
        workers.each(self.squares.chunks_mut(n), vector::roots)?;
        Ok(Roots {
            roots: self.squares,
            n,
        })
    }
}

/// Squared distances in whole steps: sums of them are exact, in any order.
pub(crate) struct Coarse {
    steps: Vec<u16>,
    pub n: usize,
    pub step: f64,
    /// The largest squared distance.
    pub widest: f64,
    /// How far `step * steps` may be from the true squared distance.
    pub error: f64,
}

impl Coarse {
    pub fn row(&self, i: usize) -> &[u16] {
        &self.steps[i * self.n..(i + 1) * self.n]
    }
}

/// The distances between all rows.
pub(crate) struct Roots {
    roots: Vec<f32>,
    n: usize,
}

impl Roots {
    pub fn row(&self, i: usize) -> &[f32] {
        &self.roots[i * self.n..(i + 1) * self.n]
    }
}

/// Fills a triangular matrix: row i of `out` begins at `place(i)` and takes its columns up to the diagonal,
/// and those beyond that its block holds and it has room for. The bits are those of [`tile`].
pub(crate) fn below_diagonal(
    form: Form,
    rows: &impl Rows,
    out: &mut [f32],
    place: impl Fn(usize) -> usize + Sync,
    workers: &Workers,
) -> Result<()> {
    let n = rows.rows();
    // High enough that packing the columns costs little, low enough that there is work for all.
    let height = (n / 16).next_multiple_of(BLOCK).clamp(BLOCK, 4 * BLOCK);
    let mut bands = Vec::new();
    let mut rest = out;
    for from in (0..n).step_by(height) {
        let own = from..(from + height).min(n);
        let (band, after) = rest.split_at_mut(place(own.end) - place(from));
        bands.push((own, band));
        rest = after;
    }
    // The longest first.
    let scratch = || (Scratch::default(), Packed::default());
    workers.each_with(
        bands.into_iter().rev(),
        scratch,
        |(scratch, columns), (own, band)| {
            for from in (0..own.end).step_by(WIDTH) {
                if workers.check().is_err() {
                    return; // as the caller will find
                }
                let across = from..(from + WIDTH).min(own.end);
                columns.refill(rows, across.clone());
                for start in own.clone().step_by(BLOCK) {
                    let block = start..(start + BLOCK).min(own.end);
                    if block.end <= from {
                        continue;
                    }
                    let values = tile(form, rows, block.clone(), columns, scratch);
                    for (i, row) in block.zip(values.chunks_exact(columns.padded())) {
                        let end = across.end.min(place(i + 1) - place(i));
                        if let Some(row) = row.get(..end.saturating_sub(from)) {
                            let at = place(i) - place(own.start) + from;
                            band[at..at + row.len()].copy_from_slice(row);
                        }
                    }
                }
            }
        },
    )
}

/// Copies what is left of the diagonal to the right, in blocks that stay in cache.
fn mirror(x: &mut [f32], n: usize) {
    const SIDE: usize = 32;
    for top in (0..n).step_by(SIDE) {
        for left in (0..=top).step_by(SIDE) {
            for i in top..(top + SIDE).min(n) {
                for j in left..(left + SIDE).min(i) {
                    x[j * n + i] = x[i * n + j];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_the_distances_from_both_ends() {
        let (n, d) = (450, 3);
        let x: Vec<f32> = (0..n * d).map(|i| ((i * 37) % 101) as f32).collect();
        let workers = Workers::new(Some(2)).unwrap();
        let pairs = Pairs::new(&(&x[..], d), &workers).unwrap();
        for i in 0..n {
            for j in 0..n {
                let (a, b) = (&x[i * d..][..d], &x[j * d..][..d]);
                let want: f32 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
                assert_eq!(pairs.row(i)[j], want);
            }
        }
    }
}
