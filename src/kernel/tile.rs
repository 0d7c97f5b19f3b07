//! Tiles of dot products or squared distances between a block of rows and packed columns.

use bytemuck::{cast_slice, cast_slice_mut};

use super::isa::active_isa;
use super::lines::Lines;
use super::micro::{Kernels, kernels};
use super::transpose::transpose;
use super::vector;

/// Coordinates a block: the length of one chain of fused multiply-adds. Part of the bits.
pub(super) const DEPTH: usize = 256;
/// Coordinates converted at once: rows are read in long runs, which memory likes. No bit depends on it.
const SLAB: usize = 4 * DEPTH;
/// Distance between the rows of a converted block; not a multiple of 4 KiB, or they would share
/// cache sets.
pub(super) const STRIDE: usize = SLAB + 16;
/// Rows a block: a multiple of every register block.
pub(crate) const BLOCK: usize = 96;
/// Chains that [`chains`] runs side by side: enough to hide the latency of a multiply-add.
pub(crate) const CHAINS: usize = 12;

/// Rows of coordinates, converted on the fly.
pub(crate) trait Rows: Sync {
    /// The number of rows.
    fn rows(&self) -> usize;
    /// The number of coordinates.
    fn dim(&self) -> usize;
    /// Reads `out.len()` coordinates of a row from `start` on.
    fn read(&self, row: usize, start: usize, out: &mut [f32]);
    /// Asks for the memory behind some coordinates.
    fn prefetch(&self, _row: usize, _start: usize, _len: usize) {}
}

/// A row-major f32 slice as rows.
impl Rows for (&[f32], usize) {
    fn rows(&self) -> usize {
        self.0.len() / self.1
    }

    fn dim(&self) -> usize {
        self.1
    }

    fn read(&self, row: usize, start: usize, out: &mut [f32]) {
        let from = row * self.1 + start;
        out.copy_from_slice(&self.0[from..from + out.len()]);
    }
}

/// What a tile holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Sum of products.
    Dot,
    /// Sum of squared differences: twice the work of a product, and exact where points are close.
    SquaredDistance,
}

/// Columns (centroids, candidates, the other rows of a tile) packed for the micro-kernel: blocks of
/// [`DEPTH`] coordinates, in each block panels of one or two vectors of columns, coordinate by
/// coordinate.
#[derive(Default)]
pub(crate) struct Packed {
    panels: Lines<f32>,
    columns: usize,
    dim: usize,
    width: usize,
    rows: Lines<f32>,
}

impl Packed {
    /// Packs some rows as columns.
    pub fn new(rows: &impl Rows, which: impl ExactSizeIterator<Item = usize> + Clone) -> Self {
        let mut packed = Packed::default();
        packed.refill(rows, which);
        packed
    }

    /// The same, reusing the memory.
    pub fn refill(
        &mut self,
        rows: &impl Rows,
        which: impl ExactSizeIterator<Item = usize> + Clone,
    ) {
        let lanes = kernels(active_isa()).lanes;
        self.columns = which.len();
        self.dim = rows.dim();
        self.width = if self.columns > lanes {
            2 * lanes
        } else {
            lanes
        };
        let (padded, width) = (self.padded(), self.width);
        self.panels.resize(padded * self.dim);
        self.rows.resize(lanes * STRIDE);
        // Long runs of a row, and few enough rows at once that they stay in cache.
        for slab in (0..self.dim).step_by(SLAB) {
            let len = SLAB.min(self.dim - slab);
            let (mut which, mut ahead) = (which.clone(), which.clone().skip(1));
            for first in (0..padded).step_by(lanes) {
                for row in self.rows.chunks_exact_mut(STRIDE) {
                    match which.next() {
                        Some(i) => {
                            if let Some(next) = ahead.next() {
                                rows.prefetch(next, slab, len);
                            }
                            rows.read(i, slab, &mut row[..len]);
                        }
                        None => row[..len].fill(0.0),
                    }
                }
                for (start, depth) in blocks(len) {
                    let at = (slab + start) * padded + first / width * depth * width;
                    transpose(
                        cast_slice(&self.rows[start..]),
                        STRIDE,
                        depth,
                        lanes,
                        cast_slice_mut(&mut self.panels[at + first % width..]),
                        width,
                    );
                }
            }
        }
    }

    /// The number of columns, rounded up to whole panels: the stride of a tile.
    pub fn padded(&self) -> usize {
        self.columns.next_multiple_of(self.width)
    }
}

pub(super) fn blocks(dim: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..dim)
        .step_by(DEPTH)
        .map(move |start| (start, DEPTH.min(dim - start)))
}

/// Memory of one worker: 400 KB and one tile.
#[derive(Default)]
pub(crate) struct Scratch {
    points: Lines<f32>,
    tile: Lines<f32>,
}

impl Scratch {
    /// A tile to be computed.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn room(&mut self, len: usize) -> &mut [f32] {
        self.tile.resize(len);
        &mut self.tile[..len]
    }

    /// The last tile that was computed.
    pub fn tile(&mut self) -> &mut [f32] {
        &mut self.tile
    }
}

/// Computes `form(rows[i], columns[j])` for at most [`BLOCK`] rows `i` out of `which`.
///
/// Returns the tile, row-major with stride `columns.padded()`; what lies beyond the packed columns
/// has no meaning.
pub(crate) fn tile<'s>(
    form: Form,
    rows: &impl Rows,
    which: impl ExactSizeIterator<Item = usize> + Clone,
    columns: &Packed,
    scratch: &'s mut Scratch,
) -> &'s mut [f32] {
    let kernels: &Kernels = kernels(active_isa());
    assert!(which.len() <= BLOCK && BLOCK.is_multiple_of(kernels.rows));
    assert!(rows.dim() == columns.dim && columns.width.is_multiple_of(kernels.lanes));
    let (stride, width, dim) = (columns.padded(), columns.width, columns.dim);
    assert_eq!(columns.panels.len(), stride * dim);
    let used = which.len().next_multiple_of(kernels.rows);
    scratch.points.resize(BLOCK * STRIDE);
    scratch.tile.resize(used * stride);
    let micro = match form {
        Form::Dot => kernels.dot,
        Form::SquaredDistance => kernels.square,
    }[width / kernels.lanes - 1];

    for (start, depth) in blocks(dim) {
        let within = start % SLAB;
        if within == 0 {
            let len = SLAB.min(dim - start);
            let mut ahead = which.clone().skip(1);
            for (i, point) in which.clone().zip(scratch.points.chunks_exact_mut(STRIDE)) {
                if let Some(next) = ahead.next() {
                    rows.prefetch(next, start, len);
                }
                rows.read(i, start, &mut point[..len]);
            }
        }
        let block = &columns.panels[start * stride..(start + depth) * stride];
        for (j, panel) in block.chunks_exact(depth * width).enumerate() {
            for i in (0..used).step_by(kernels.rows) {
                // SAFETY: `points` has BLOCK rows of STRIDE >= within + depth values and i +
                // kernels.rows <= used <= BLOCK; `panel` has depth * width values; the tile has
                // `used` rows of `stride` >= (j + 1) * width values; and `active_isa` is available.
                unsafe {
                    micro(
                        scratch.points.as_ptr().add(i * STRIDE + within),
                        panel.as_ptr(),
                        depth,
                        scratch.tile.as_mut_ptr().add(i * stride + j * width),
                        stride,
                        start == 0,
                    );
                }
            }
        }
    }
    &mut scratch.tile[..which.len() * stride]
}

/// The products of single pairs `(row, column)`, at most [`CHAINS`] of them: the same chains, and so
/// the same bits, as [`tile`] with [`Form::Dot`]. The columns are rows of `columns`, a row-major slice.
pub(crate) fn chains(
    rows: &impl Rows,
    columns: &[f32],
    pairs: &[(usize, usize)],
    scratch: &mut Scratch,
) -> [f32; CHAINS] {
    let dim = rows.dim();
    scratch.points.resize(BLOCK * STRIDE);
    let mut total = [0.0f32; CHAINS];
    for (start, depth) in blocks(dim) {
        for (i, (&(row, _), point)) in pairs
            .iter()
            .zip(scratch.points.chunks_exact_mut(STRIDE))
            .enumerate()
        {
            // Pairs come sorted by row: read each row once.
            if i == 0 || pairs[i - 1].0 != row {
                rows.read(row, start, &mut point[..depth]);
            }
        }
        let mut source = 0;
        let x: [&[f32]; CHAINS] = std::array::from_fn(|l| {
            if l < pairs.len() && (l == 0 || pairs[l - 1].0 != pairs[l].0) {
                source = l;
            }
            &scratch.points[source * STRIDE..][..depth]
        });
        let y: [&[f32]; CHAINS] = std::array::from_fn(|l| {
            let (_, column) = pairs[l.min(pairs.len() - 1)];
            &columns[column * dim + start..][..depth]
        });
        let sums = vector::chain_dots(x, y);
        for (t, s) in total.iter_mut().zip(sums) {
            *t = if start == 0 { s } else { *t + s };
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::noise;

    /// What the documentation promises of the bits.
    fn chain(form: Form, x: &[f32], y: &[f32]) -> f32 {
        let mut total: Option<f32> = None;
        for (a, b) in x.chunks(DEPTH).zip(y.chunks(DEPTH)) {
            let sum = a.iter().zip(b).fold(0.0f32, |sum, (&a, &b)| match form {
                Form::Dot => a.mul_add(b, sum),
                Form::SquaredDistance => (a - b).mul_add(a - b, sum),
            });
            total = Some(total.map_or(sum, |t| t + sum));
        }
        total.unwrap_or(0.0)
    }

    #[test]
    fn tiles_are_the_promised_chains_to_the_bit() {
        for form in [Form::Dot, Form::SquaredDistance] {
            for (m, n, d) in [
                (1, 1, 1),
                (7, 3, 5),
                (13, 40, 300),
                (96, 65, 513),
                (30, 16, 256),
            ] {
                let (x, y) = (noise(m * d, 1), noise(n * d, 2));
                let packed = Packed::new(&(&y[..], d), 0..n);
                let mut scratch = Scratch::default();
                let out = tile(form, &(&x[..], d), 0..m, &packed, &mut scratch);
                for i in 0..m {
                    for j in 0..n {
                        let want = chain(form, &x[i * d..(i + 1) * d], &y[j * d..(j + 1) * d]);
                        let got = out[i * packed.padded() + j];
                        assert_eq!(
                            got.to_bits(),
                            want.to_bits(),
                            "{form:?} {m} {n} {d} {i} {j}"
                        );
                    }
                }
                let pairs: Vec<_> = (0..m * n).map(|p| (p / n, p % n)).collect();
                for pairs in pairs.chunks(CHAINS) {
                    let got = chains(&(&x[..], d), &y, pairs, &mut scratch);
                    for (got, &(i, j)) in got.iter().zip(pairs) {
                        let want = chain(Form::Dot, &x[i * d..(i + 1) * d], &y[j * d..(j + 1) * d]);
                        assert_eq!(got.to_bits(), want.to_bits(), "{m} {n} {d} {i} {j}");
                    }
                }
            }
        }
    }
}
