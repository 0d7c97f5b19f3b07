//! Products of f32 vectors from their digits, on tiles of bytes ([`super::amx`]): six exact products at thirty-two
//! times the rate of f32.
//!
//! A row x is rounded to `s q`, the q whole numbers of 24 bits and s one power of two for the whole row:
//! `|x_p - s q_p| <= 2^-23 max |x|`. Each q has three signed digits to the base of 256, and the product of two rows is
//! `s s' 2^32 (L0 + L1 / 2^8 + L2 / 2^16)` with L0 the sum of the products of the high digits, L1 and L2 those of digits that
//! together stand one and two places lower. These sums are whole numbers, without rounding. What stands lower
//! still is left out: at most `2^-21 max |x| max |x'|` for each coordinate, of either sign. Only adding the three levels, and the blocks of
//! coordinates, rounds as f32 does. So the products are about as good as those of a chain in f32, but not the same bits:
//! nothing that promises those is computed from them.

use core::arch::x86_64::{
    _mm_storeu_si128, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512, _mm512_cvtepi32_epi8,
    _mm512_cvtepi32_ps, _mm512_cvtps_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_srai_epi32, _mm512_storeu_ps,
    _mm512_sub_epi32,
};
use std::ops::Range;

use super::amx::{self, LANES, ROWS, TILE};
use super::isa::{Isa, active_isa};
use super::lines::Lines;
use super::tile::{BLOCK, Rows, Scratch};
use super::transpose::transpose;
use super::vector;
use crate::error::Result;
use crate::pool::Workers;

/// Coordinates that a tile takes at once.
const STEP: usize = 4 * LANES;
const DIGITS: usize = 3;
/// Words of a tile.
const SQUARE: usize = TILE * LANES;
/// Steps a block: so many that the rows of a block stay in the first cache, and that no sum overflows.
const DEPTH: usize = 4;
/// A power of two that three signed digits can all but reach.
const BITS: i32 = 23;

const _: () = assert!(BLOCK.is_multiple_of(ROWS));

/// Rows as digits: in groups of [`TILE`], of each group step by step the tiles of the three digits. So tiles are read in
/// one long run.
pub(crate) struct Split {
    words: Lines<u32>,
    /// `2^16 s` of each row.
    scales: Vec<f32>,
    steps: usize,
}

impl Split {
    /// Memory that split rows may take.
    const MOST: usize = 250_000_000;

    /// Splits the rows, if this processor has tiles and there are few enough to keep them so.
    pub fn new(rows: &impl Rows, workers: &Workers) -> Result<Option<Self>> {
        let (n, dim) = (rows.rows(), rows.dim());
        let steps = dim.div_ceil(STEP);
        let group = steps * DIGITS * SQUARE;
        // Blocks begin at any group, and are read to their end.
        let groups = n.div_ceil(TILE) + 1;
        if active_isa() != Isa::Amx || 4 * groups * group > Self::MOST {
            return Ok(None);
        }
        let mut words = Lines::zeros(groups * group);
        let mut scales = vec![0.0f32; groups * TILE];
        let parts = words
            .chunks_exact_mut(group)
            .zip(scales.chunks_exact_mut(TILE));
        workers.each_with(
            parts.enumerate(),
            || vec![0.0f32; steps * STEP],
            |row, (g, (words, scales))| {
                for (line, i) in (g * TILE..n.min((g + 1) * TILE)).enumerate() {
                    rows.read(i, 0, &mut row[..dim]);
                    let widest = f32::from_bits(vector::max_abs_bits(row));
                    let Some(exponent) = exponent_above(widest) else {
                        continue; // zeros
                    };
                    let scale = (f64::from(exponent - BITS)).exp2() as f32;
                    scales[line] = 65_536.0 * scale;
                    // SAFETY: `Isa::Amx` has these instructions; `row` has whole steps, of three tiles each.
                    unsafe { digits(row, 1.0 / scale, words, line) };
                }
            },
        )?;
        Ok(Some(Split {
            words,
            scales,
            steps,
        }))
    }

    /// Words of a group.
    fn group(&self) -> usize {
        self.steps * DIGITS * SQUARE
    }

    /// The tiles of so many rows from one on.
    fn tiles(&self, row: usize, rows: usize) -> &[u32] {
        assert!(row.is_multiple_of(TILE) && rows.is_multiple_of(TILE));
        &self.words[row / TILE * self.group()..][..rows / TILE * self.group()]
    }

    /// The products of at most [`BLOCK`] rows, beginning at a multiple of [`TILE`], with the columns: row-major, with
    /// stride `columns.padded()`.
    pub fn tile<'s>(
        &self,
        rows: Range<usize>,
        columns: &Columns,
        scratch: &'s mut Scratch,
    ) -> &'s mut [f32] {
        let stride = columns.padded();
        let used = rows.len().next_multiple_of(ROWS);
        let (words, scales) = (
            self.tiles(rows.start, used),
            &self.scales[rows.start..][..used],
        );
        assert_eq!(columns.words.len(), stride / LANES * self.group());
        let out = scratch.room(used * stride);
        let mut sums = Lines::<i32>::zeros(2 * DIGITS * SQUARE);
        let _tiles = amx::Tiles::new();
        for from in (0..self.steps).step_by(DEPTH) {
            let depth = DEPTH.min(self.steps - from);
            for i in (0..used).step_by(ROWS) {
                for j in (0..stride).step_by(LANES) {
                    let place = |row: usize| row / TILE * self.group() + from * DIGITS * SQUARE;
                    // SAFETY: from these places on there are `depth` steps, of two groups of rows and one of
                    // columns; `out` has ROWS lines of LANES values there, and the scales are as many; `Isa::Amx` and
                    // its tiles are at hand.
                    unsafe {
                        amx::digit_sums(
                            words.as_ptr().add(place(i)),
                            self.group(),
                            columns.words.as_ptr().add(place(j)),
                            depth,
                            sums.as_mut_ptr(),
                        );
                        levels(
                            &sums,
                            &scales[i..i + ROWS],
                            &columns.scales[j..j + LANES],
                            out.as_mut_ptr().add(i * stride + j),
                            stride,
                            from == 0,
                        );
                    }
                }
            }
        }
        &mut out[..rows.len() * stride]
    }
}

/// e such that numbers up to `widest`, over `2^(e - BITS)`, have three signed digits; none for zeros, and for rows so small
/// that their products would be zero.
fn exponent_above(widest: f32) -> Option<i32> {
    // Three digits reach 127 * (2^16 + 2^8 + 1), a little less than 2^23.
    let above = f64::from(widest) * 1.004;
    let exponent = (above.to_bits() >> 52) as i32 - 1022;
    (exponent > -100).then_some(exponent)
}

/// Some of the split rows as columns: their tiles, transposed.
#[derive(Default)]
pub(crate) struct Columns {
    words: Lines<u32>,
    scales: Vec<f32>,
}

impl Columns {
    /// Takes the rows, which begin at a multiple of [`TILE`].
    pub fn refill(&mut self, rows: &Split, which: Range<usize>) {
        let padded = which.len().next_multiple_of(TILE);
        let words = rows.tiles(which.start, padded);
        self.scales.clear();
        self.scales
            .extend_from_slice(&rows.scales[which.start..][..padded]);
        self.words.resize(words.len());
        let tiles = words.chunks_exact(SQUARE);
        for (from, to) in tiles.zip(self.words.chunks_exact_mut(SQUARE)) {
            transpose(from, LANES, TILE, LANES, to, LANES);
        }
    }

    /// The number of columns, rounded up to whole tiles: the stride of a tile of products.
    pub fn padded(&self) -> usize {
        self.scales.len()
    }
}

/// Rounds whole steps of coordinates, times `scale`, and puts their digits on a line of each step's tiles.
#[target_feature(enable = "avx512f")]
unsafe fn digits(row: &[f32], scale: f32, tiles: &mut [u32], line: usize) {
    let (scale, half, low) = (
        _mm512_set1_ps(scale),
        _mm512_set1_epi32(128),
        _mm512_set1_epi32(255),
    );
    let steps = row.chunks_exact(STEP);
    for (values, tiles) in steps.zip(tiles.chunks_exact_mut(DIGITS * SQUARE)) {
        for (part, values) in values.chunks_exact(LANES).enumerate() {
            // SAFETY: a part is one vector of values; its digits are 16 bytes of the line of each tile.
            unsafe {
                let mut rest =
                    _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), scale));
                for tile in tiles.chunks_exact_mut(SQUARE).rev() {
                    // The digit that leaves a multiple of 256.
                    let raised = _mm512_add_epi32(rest, half);
                    let digit = _mm512_sub_epi32(_mm512_and_si512(raised, low), half);
                    rest = _mm512_srai_epi32::<8>(_mm512_sub_epi32(rest, digit));
                    let bytes = &mut tile[line * LANES + part * LANES / 4..][..LANES / 4];
                    _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(digit));
                }
            }
        }
    }
}

/// Adds up the levels of [`ROWS`] x [`LANES`] products, scales them, and writes them or adds them to what is there.
#[target_feature(enable = "avx512f")]
unsafe fn levels(
    sums: &[i32],
    rows: &[f32],
    columns: &[f32],
    out: *mut f32,
    stride: usize,
    overwrite: bool,
) {
    let down = _mm512_set1_ps(1.0 / 256.0);
    // SAFETY: `sums` are three tiles for each of two groups of rows; the caller has ROWS lines of `out`.
    unsafe {
        let columns = _mm512_loadu_ps(columns.as_ptr());
        for (i, &row) in rows.iter().enumerate() {
            let line = i / TILE * DIGITS * SQUARE + i % TILE * LANES;
            let [high, middle, low] = std::array::from_fn(|level| {
                let sums = &sums[line + level * SQUARE..][..LANES];
                _mm512_cvtepi32_ps(_mm512_loadu_si512(sums.as_ptr().cast()))
            });
            let sum = _mm512_fmadd_ps(_mm512_fmadd_ps(low, down, middle), down, high);
            let mut product = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(row)), columns);
            let out = out.add(i * stride);
            if !overwrite {
                product = _mm512_add_ps(_mm512_loadu_ps(out), product);
            }
            _mm512_storeu_ps(out, product);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::noise;

    #[test]
    fn products_are_as_good_as_those_of_f32() {
        let workers = Workers::new(Some(2)).unwrap();
        for (n, d) in [(1, 1), (40, 31), (100, 65), (130, 600), (50, 5000)] {
            let mut x = noise(n * d, d as u64);
            x[d - 1] = 1e-30;
            x[0] = -1.0; // the largest of its row
            let rows = (&x[..], d);
            let Some(split) = Split::new(&rows, &workers).unwrap() else {
                return; // no tiles here
            };
            let mut columns = Columns::default();
            let mut scratch = Scratch::default();
            let beside = (n - 1) / 64 * 64..n;
            columns.refill(&split, beside.clone());
            let dot = |i: usize, j: usize| -> f64 {
                let pairs = x[i * d..][..d].iter().zip(&x[j * d..][..d]);
                pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
            };
            for from in (0..n).step_by(TILE) {
                let rows = from..(from + BLOCK).min(n);
                let tile = split.tile(rows.clone(), &columns, &mut scratch);
                for (i, line) in rows.zip(tile.chunks_exact(columns.padded())) {
                    for (j, &product) in beside.clone().zip(line) {
                        let size = (dot(i, i) * dot(j, j)).sqrt();
                        let error = (f64::from(product) - dot(i, j)).abs();
                        assert!(error <= 4e-7 * size, "{i} {j}: {}", error / size);
                    }
                }
            }
        }
    }
}
