//! Products in bfloat16 (`vdpbf16ps`, or on tiles: [`super::amx`]): a multiple of the rate of f32, and inexact.
//!
//! A coordinate x becomes its nearest bfloat16 h, and the remainder x - h, exact in f32, leaves its
//! squared norm behind: what [`super::screen`] needs to bound the error.

use core::arch::x86_64::{
    __m512bh, __m512i, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_reduce_add_ps, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_slli_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};

use super::amx;
use super::isa::{Isa, active_isa};
use super::lines::Lines;
use super::tile::{BLOCK, Rows};
use crate::error::Result;
use crate::pool::Workers;

/// Coordinates a block: the length of one chain of additions.
pub(super) const DEPTH: usize = 512;
/// Coordinates converted at once: rows are read in long runs, which memory likes.
const SLAB: usize = 2 * DEPTH;
/// Words of two coordinates between converted rows; not a multiple of 4 KiB.
pub(super) const STRIDE: usize = SLAB / 2 + 16;
const LANES: usize = 16;
/// Rows of a register block of `vdpbf16ps`.
const ROWS: usize = 12;

/// `(points, panel, depth, tile, tile stride, overwrite)`: as [`super::micro::Micro`], in words of two
/// coordinates.
///
/// # Safety
/// As there; `points` lie `STRIDE` apart, and `depth` is a multiple of `pairs`.
pub(super) type Micro = unsafe fn(*const u32, *const u32, usize, *mut f32, usize, bool);

/// The kernels of one instruction set.
pub(super) struct Kernels {
    /// Rows of a register block.
    pub rows: usize,
    /// Pairs of coordinates that are taken at once.
    pub pairs: usize,
    /// With one and with two vectors of columns a panel.
    pub micro: [Micro; 2],
}

static KERNELS: Kernels = Kernels {
    rows: ROWS,
    pairs: 1,
    micro: [micro::<1>, micro::<2>],
};

/// Those in use.
fn kernels() -> &'static Kernels {
    match active_isa() {
        Isa::Amx => &amx::KERNELS,
        _ => &KERNELS,
    }
}

/// Pairs that so many coordinates are padded to.
fn pairs(coordinates: usize) -> usize {
    coordinates.div_ceil(2).next_multiple_of(kernels().pairs)
}

/// Squared norms of some coordinates and of what rounding took from them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Squares {
    pub whole: f64,
    pub lost: f64,
}

/// Columns rounded to bfloat16: blocks of [`DEPTH`] coordinates, in each block panels of one or two
/// vectors of columns, pair of coordinates by pair.
#[derive(Default)]
pub(super) struct Packed {
    panels: Lines<u32>,
    columns: usize,
    dim: usize,
    width: usize,
    pub squares: Vec<Squares>,
}

fn blocks(dim: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..dim)
        .step_by(DEPTH)
        .map(move |start| (start, DEPTH.min(dim - start)))
}

impl Packed {
    pub fn refill(&mut self, rows: &impl Rows, which: impl ExactSizeIterator<Item = usize>) {
        self.columns = which.len();
        self.dim = rows.dim();
        self.width = if self.columns > LANES {
            2 * LANES
        } else {
            LANES
        };
        let padded = self.padded();
        self.panels.clear_to(padded * pairs(self.dim));
        self.squares.clear();
        let mut row = vec![0.0f32; DEPTH];
        let mut words = vec![0u32; DEPTH / 2];
        for (c, i) in which.enumerate() {
            let mut squares = Squares::default();
            let (panel, lane) = (c / self.width, c % self.width);
            for (start, depth) in blocks(self.dim) {
                rows.read(i, start, &mut row[..depth]);
                narrow(&mut row, depth, &mut words, &mut squares);
                let at = start / 2 * padded + panel * pairs(depth) * self.width + lane;
                for (slot, &word) in self.panels[at..]
                    .iter_mut()
                    .step_by(self.width)
                    .zip(&words[..depth.div_ceil(2)])
                {
                    *slot = word;
                }
            }
            self.squares.push(squares);
        }
    }

    pub fn padded(&self) -> usize {
        self.columns.next_multiple_of(self.width)
    }
}

/// Rows rounded once, for several passes over them.
pub(super) struct Rounded {
    words: Lines<u32>,
    squares: Vec<Squares>,
    /// Words a row: whole vectors.
    stride: usize,
}

impl Rounded {
    /// Bytes for such rows.
    pub fn size(rows: usize, dim: usize) -> usize {
        4 * rows * (dim.next_multiple_of(2 * LANES) / 2)
    }

    pub fn new(rows: &impl Rows, workers: &Workers) -> Result<Self> {
        let (n, dim) = (rows.rows(), rows.dim());
        let stride = dim.next_multiple_of(2 * LANES) / 2;
        let mut words = Lines::zeros(n * stride);
        let mut squares = vec![Squares::default(); n];
        let parts = words
            .chunks_mut(BLOCK * stride)
            .zip(squares.chunks_mut(BLOCK));
        workers.each_with(
            parts.enumerate(),
            || vec![0.0f32; SLAB],
            |row, (part, (words, squares))| {
                let words = words.chunks_exact_mut(stride);
                for ((i, words), squares) in (part * BLOCK..).zip(words).zip(squares) {
                    for start in (0..dim).step_by(SLAB) {
                        round(rows, i, start, row, &mut words[start / 2..], squares);
                    }
                }
            },
        )?;
        Ok(Rounded {
            words,
            squares,
            stride,
        })
    }

    /// The words of some coordinates; `start` and `len` as in a slab.
    fn words(&self, row: usize, start: usize, len: usize) -> &[u32] {
        &self.words[row * self.stride + start / 2..][..len.next_multiple_of(2 * LANES) / 2]
    }
}

/// Rounds a slab of a row.
fn round(
    rows: &impl Rows,
    i: usize,
    start: usize,
    row: &mut [f32],
    words: &mut [u32],
    squares: &mut Squares,
) {
    let len = SLAB.min(rows.dim() - start);
    rows.read(i, start, &mut row[..len]);
    // A block at a time: the sums of squares stay short.
    for (at, depth) in blocks(len) {
        narrow(&mut row[at..], depth, &mut words[at / 2..], squares);
    }
}

/// Memory of one worker.
#[derive(Default)]
pub(super) struct Scratch {
    words: Lines<u32>,
    row: Vec<f32>,
}

/// Products of at most [`BLOCK`] rows with the columns, into `tile` (row-major, stride
/// `columns.padded()`); adds the rows' norms to `squares`.
///
/// `rounded`: the same rows, if they have been rounded before.
pub(super) fn tile(
    rows: &impl Rows,
    rounded: Option<&Rounded>,
    which: impl ExactSizeIterator<Item = usize> + Clone,
    columns: &Packed,
    scratch: &mut Scratch,
    tile: &mut Lines<f32>,
    squares: &mut [Squares],
) {
    assert!(which.len() <= BLOCK && which.len() == squares.len());
    assert!(rows.dim() == columns.dim && columns.width.is_multiple_of(LANES));
    let (stride, width) = (columns.padded(), columns.width);
    assert_eq!(columns.panels.len(), stride * pairs(columns.dim));
    let kernels = kernels();
    assert!(BLOCK.is_multiple_of(kernels.rows));
    let used = which.len().next_multiple_of(kernels.rows);
    scratch.words.resize(BLOCK * STRIDE);
    scratch.row.resize(SLAB, 0.0);
    tile.resize(used * stride);
    let micro = kernels.micro[width / LANES - 1];
    let _tiles = (active_isa() == Isa::Amx).then(amx::Tiles::new);

    let dim = columns.dim;
    // Rows mostly come one after the other: while these are multiplied, those behind them are fetched, a piece
    // at a time.
    const PIECE: usize = 256;
    let behind = which.clone().last().map_or(0, |last| last + 1);
    let pieces = dim.div_ceil(PIECE);
    let wanted = which.len().min(rows.rows() - behind) * pieces;
    let calls = blocks(dim).count() * (stride / width) * (used / kernels.rows);
    let mut call = 0;
    for (start, depth) in blocks(dim) {
        let within = start % SLAB;
        if within == 0 {
            for ((i, words), squares) in which
                .clone()
                .zip(scratch.words.chunks_exact_mut(STRIDE))
                .zip(&mut *squares)
            {
                match rounded {
                    Some(rounded) => {
                        let from = rounded.words(i, start, SLAB.min(dim - start));
                        words[..from.len()].copy_from_slice(from);
                        *squares = rounded.squares[i];
                    }
                    None => round(rows, i, start, &mut scratch.row, words, squares),
                }
            }
        }
        let depth = pairs(depth);
        let block = &columns.panels[start / 2 * stride..(start / 2 + depth) * stride];
        for (j, panel) in block.chunks_exact(depth * width).enumerate() {
            for i in (0..used).step_by(kernels.rows) {
                for piece in wanted * call / calls..wanted * (call + 1) / calls {
                    let at = piece % pieces * PIECE;
                    let (row, len) = (behind + piece / pieces, PIECE.min(dim - at));
                    match rounded {
                        Some(rounded) => super::prefetch(rounded.words(row, at, len)),
                        None => rows.prefetch(row, at, len),
                    }
                }
                call += 1;
                // SAFETY: `words` has BLOCK rows of STRIDE >= within / 2 + depth words and i +
                // kernels.rows <= used <= BLOCK; `panel` has depth * width words; the tile has `used`
                // rows of `stride` >= (j + 1) * width values; the kernels are those of `active_isa`.
                unsafe {
                    micro(
                        scratch.words.as_ptr().add(i * STRIDE + within / 2),
                        panel.as_ptr(),
                        depth,
                        tile.as_mut_ptr().add(i * stride + j * width),
                        stride,
                        start == 0,
                    );
                }
            }
        }
    }
}

/// Rounds `row[..depth]` into words of two, and adds its squares. `row` and `words` have room for whole
/// vectors.
fn narrow(row: &mut [f32], depth: usize, words: &mut [u32], squares: &mut Squares) {
    let padded = depth.next_multiple_of(2 * LANES);
    row[depth..padded].fill(0.0);
    // SAFETY: as for `micro`; the slices are cut to `padded` values and `padded / 2` words.
    unsafe { narrow_vectors(&row[..padded], &mut words[..padded / 2], squares) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn narrow_vectors(row: &[f32], words: &mut [u32], squares: &mut Squares) {
    let mut whole = _mm512_setzero_ps();
    let mut lost = _mm512_setzero_ps();
    for (values, words) in row
        .chunks_exact(LANES)
        .zip(words.chunks_exact_mut(LANES / 2))
    {
        // SAFETY: the chunks hold one vector of values and half a vector of words.
        unsafe {
            let x = _mm512_loadu_ps(values.as_ptr());
            // To nearest even; what is below the normal range becomes zero, and so is lost.
            let rounded = _mm512_cvtneps_pbh(x);
            let bits: core::arch::x86_64::__m256i = core::mem::transmute(rounded);
            core::arch::x86_64::_mm256_storeu_si256(words.as_mut_ptr().cast(), bits);
            let back = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)));
            let rest = _mm512_sub_ps(x, back);
            whole = _mm512_fmadd_ps(x, x, whole);
            lost = _mm512_fmadd_ps(rest, rest, lost);
        }
    }
    squares.whole += f64::from(_mm512_reduce_add_ps(whole));
    squares.lost += f64::from(_mm512_reduce_add_ps(lost));
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn micro<const VECTORS: usize>(
    points: *const u32,
    panel: *const u32,
    depth: usize,
    tile: *mut f32,
    stride: usize,
    overwrite: bool,
) {
    let pair = |words: __m512i| -> __m512bh {
        // SAFETY: both are 512 bits.
        unsafe { core::mem::transmute(words) }
    };
    // SAFETY: within the bounds that the caller keeps.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        for p in 0..depth {
            let mut column = [_mm512_setzero_si512(); VECTORS];
            for (v, column) in column.iter_mut().enumerate() {
                *column = _mm512_loadu_si512(panel.add((p * VECTORS + v) * LANES).cast());
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let point = _mm512_set1_epi32(*points.add(i * STRIDE + p).cast::<i32>());
                for (sum, column) in sums.iter_mut().zip(column) {
                    *sum = _mm512_dpbf16_ps(*sum, pair(point), pair(column));
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let out = tile.add(i * stride + v * LANES);
                let sum = if overwrite {
                    sum
                } else {
                    _mm512_add_ps(_mm512_loadu_ps(out), sum)
                };
                _mm512_storeu_ps(out, sum);
            }
        }
    }
}
