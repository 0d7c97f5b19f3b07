//! Approximate products with a proven bound on their error: what f32 arithmetic would decide, decided
//! mostly without it.
//!
//! # What is approximated
//! Let x be a row, c a column, both vectors of f32, and let `score = bias - chain(x, c)` be computed
//! in f32 as [`super::tile`] does. A [`Screen`] gives for each pair a number `low` with
//!
//! `low <= score` and `low <= bias - x.c`, and both are at most `low + width(c)`,
//!
//! from products q that may be rounded to bfloat16. So a column whose `low` is above another's
//! `low + width` cannot have the smaller score, and a column that beats all others so is the one that
//! the f32 path would choose, to the bit. What stays undecided goes through [`super::chains`].
//!
//! # The bound
//! Write u = 2^-24, |.| for the Euclidean norm, d for the dimension.
//!
//! *The f32 path.* A chain of m fused multiply-adds has error at most `gamma(m) sum |x_p c_p|`, with
//! gamma(m) = m u / (1 - m u) (Higham, Accuracy and Stability, section 3.1); B blocks of at most 256
//! coordinates add B roundings. With Cauchy-Schwarz, `|chain - x.c| <= gamma(256 + B) |x| |c|`. The
//! bias is |c|^2 / 2 rounded once (or 0), and the subtraction rounds once, by at most
//! `u (|c|^2 / 2 + |x| |c|)` and terms of order u^2. Together `|score - (bias - x.c)| <=
//! g (|x| |c| + |c|^2)` with g = (256 + B + 8) u; the 8 also pays for the roundings of the screen's own
//! f32 subtraction.
//!
//! *bfloat16.* Let h(x) be x rounded, x = h(x) + r(x) exactly. Then
//! `x.c - h(x).h(c) = r(x).c + h(x).r(c)`, at most `|r(x)| |c| + (|x| + |r(x)|) |r(c)|`. Products of two
//! bfloat16 are exact in f32. They are added in chains of at most 512 and B blocks; however the
//! processor orders or truncates these additions, each errs by at most 2u times the sum of the
//! magnitudes: `a |h(x)| |h(c)|` with a = (512 + B + 8) 2u. With t the largest |r(c)| / |c| of the columns,
//! `|q - x.c| <= |c| (|r(x)| + (|x| + |r(x)|) (t + a (1 + t)))`. The norms are those of the very rows,
//! not their worst case: on ordinary data less than half of it.
//!
//! *Underflow.* vdpbf16ps and tdpbf16ps take subnormal inputs as zero (the conversion does so first, and its loss
//! counts in r) and flushes results: at most 2^-126 for each of 2d operations; f32 chains lose less.
//! `d 1e-37` covers both. Overflow cannot happen: [`crate::points`] scales.
//!
//! The norms are sums of squares in f32 lanes with f64 totals, or in f64; `1 + 1e-5` covers their
//! relative error, as it does the terms of order u^2. A square below the normal range may be lost: 2^-126
//! for each coordinate goes on top.

#[cfg(target_arch = "x86_64")]
use super::brain;
use super::isa::{Isa, active_isa};
use super::lines::Lines;
use super::tile::{self, BLOCK, DEPTH, Form, Rows};
use super::vector;
use crate::error::Result;
use crate::pool::Workers;

/// Relative error of the norms.
const NORM: f64 = 1e-5;
const UNIT: f64 = 1.0 / (1u64 << 24) as f64;

/// An upper bound of a norm from its square, as summed in f32.
#[cfg(target_arch = "x86_64")]
fn norm_above(square: f64, dim: usize) -> f64 {
    (square + dim as f64 * f64::from(f32::MIN_POSITIVE)).sqrt() * (1.0 + NORM)
}

/// Columns to be screened.
pub(crate) struct Screen {
    columns: Columns,
    dim: usize,
    bias: Vec<f32>,
    /// Upper bounds of the norms of the columns.
    norms: Vec<f64>,
    /// The largest relative loss of a column, t.
    lost: f64,
}

enum Columns {
    Single(tile::Packed),
    #[cfg(target_arch = "x86_64")]
    Brain(brain::Packed),
}

/// Rows kept as a screen multiplies them: passes after the first read half the memory and convert nothing.
/// No result depends on it.
#[derive(Default)]
pub(crate) struct Kept {
    #[cfg(target_arch = "x86_64")]
    rounded: Option<brain::Rounded>,
}

impl Kept {
    /// Memory that kept rows may take; and from how many coordinates on they are kept.
    #[cfg(target_arch = "x86_64")]
    const MOST: (usize, usize) = (250_000_000, 256);

    /// Keeps the rows, if they are long enough to gain from it and few enough to fit.
    pub fn new(rows: &impl Rows, workers: &Workers) -> Result<Self> {
        #[cfg(target_arch = "x86_64")]
        if active_isa().has_bfloat16()
            && rows.dim() >= Self::MOST.1
            && brain::Rounded::size(rows.rows(), rows.dim()) <= Self::MOST.0
        {
            let rounded = Some(brain::Rounded::new(rows, workers)?);
            return Ok(Kept { rounded });
        }
        let _ = (rows, workers);
        Ok(Kept::default())
    }
}

/// What is known of a screened row.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Row {
    /// Upper bound of its norm.
    pub norm: f64,
    /// Lower bound of its squared norm.
    pub square: f64,
    /// Bound of its product with a column of norm 1.
    error: f64,
}

/// Memory of one worker.
#[derive(Default)]
pub(crate) struct Scratch {
    single: tile::Scratch,
    #[cfg(target_arch = "x86_64")]
    brain: brain::Scratch,
    #[cfg(target_arch = "x86_64")]
    squares: Vec<brain::Squares>,
    row: Vec<f32>,
    tile: Lines<f32>,
    rows: Vec<Row>,
    low: Vec<f32>,
}

/// A screened block of rows.
pub(crate) struct Screened<'s> {
    /// Of each row, in order.
    pub rows: &'s [Row],
    /// `low = bias[c] - products[row * stride + c]`, the same bias for all rows.
    pub bias: &'s [f32],
    pub products: &'s [f32],
    pub stride: usize,
    /// Half the width of a column of norm v is `slope * v + square * v^2 + constant`.
    slope: f64,
    square: f64,
    constant: f64,
    norms: &'s [f64],
}

impl Screened<'_> {
    /// The products of a row.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.products[i * self.stride..][..self.bias.len()]
    }

    /// What to add to the `low` of a column for an upper bound.
    pub fn width(&self, column: usize) -> f64 {
        let v = self.norms[column];
        2.0 * (self.slope * v + self.square * v * v + self.constant)
    }
}

impl Screen {
    /// Packs some rows of `columns` (row-major, `[k, dim]`), whose scores have the given biases.
    pub fn new(columns: &[f32], dim: usize, bias: &[f32], which: &[u32]) -> Self {
        let rows = (columns, dim);
        let index = || which.iter().map(|&c| c as usize);
        let norms: Vec<f64> = index()
            .map(|c| {
                let square = vector::square_norm(&columns[c * dim..(c + 1) * dim]);
                square.sqrt() * (1.0 + NORM)
            })
            .collect();
        let bias = index().map(|c| bias[c]).collect();
        #[cfg(target_arch = "x86_64")]
        if active_isa().has_bfloat16() {
            let mut packed = brain::Packed::default();
            packed.refill(&rows, index());
            let mut lost = 0.0f64;
            for (squares, norm) in packed.squares.iter().zip(&norms) {
                if *norm > 0.0 {
                    // The norm is an upper bound; the last factor brings it back below. No coordinate loses
                    // more than itself, and what `norm_above` adds is much for a subnormal column.
                    let loss = norm_above(squares.lost, dim);
                    lost = lost.max((loss / norm * (1.0 + 3.0 * NORM)).min(1.0));
                }
            }
            return Screen {
                columns: Columns::Brain(packed),
                dim,
                bias,
                norms,
                lost,
            };
        }
        Screen {
            columns: Columns::Single(tile::Packed::new(&rows, index())),
            dim,
            bias,
            norms,
            lost: 0.0,
        }
    }

    /// g of the module's documentation.
    pub fn rounding(dim: usize) -> f64 {
        (dim.min(DEPTH) + dim.div_ceil(DEPTH) + 8) as f64 * UNIT
    }

    /// The most rows to screen at once: few enough that they, the next ones and the columns share the
    /// second-level cache.
    pub fn block(&self) -> usize {
        let stride = match &self.columns {
            Columns::Single(packed) => packed.padded(),
            #[cfg(target_arch = "x86_64")]
            Columns::Brain(packed) => packed.padded(),
        };
        let (rows, most) = match active_isa() {
            // The second-level cache is as large again.
            Isa::Amx => (32, BLOCK),
            _ => (12, BLOCK / 2),
        };
        (48 * 1024 / stride / rows * rows).clamp(rows, most)
    }

    /// Whether a row is screened against all columns sooner than its coordinates are fetched from memory.
    pub fn is_cheap(&self) -> bool {
        active_isa() == Isa::Amx && self.bias.len() <= 1024
    }

    /// Screens at most [`Screen::block`] rows, which may have been kept, against all columns.
    pub fn screen<'s>(
        &'s self,
        rows: &impl Rows,
        kept: &Kept,
        which: impl ExactSizeIterator<Item = usize> + Clone,
        scratch: &'s mut Scratch,
    ) -> Screened<'s> {
        #[cfg(not(target_arch = "x86_64"))]
        let _ = kept;
        let dim = self.dim;
        scratch.rows.clear();
        let (products, stride): (&[f32], usize) = match &self.columns {
            Columns::Single(packed) => {
                scratch.row.resize(dim, 0.0);
                for i in which.clone() {
                    rows.read(i, 0, &mut scratch.row);
                    let square = vector::square_norm(&scratch.row);
                    let norm = square.sqrt() * (1.0 + NORM);
                    scratch.rows.push(Row {
                        norm,
                        square: square * (1.0 - 2.0 * NORM),
                        error: Self::rounding(dim) * norm,
                    });
                }
                let tile = tile::tile(Form::Dot, rows, which, packed, &mut scratch.single);
                (tile, packed.padded())
            }
            #[cfg(target_arch = "x86_64")]
            Columns::Brain(packed) => {
                scratch.squares.clear();
                scratch
                    .squares
                    .resize(which.len(), brain::Squares::default());
                brain::tile(
                    rows,
                    kept.rounded.as_ref(),
                    which,
                    packed,
                    &mut scratch.brain,
                    &mut scratch.tile,
                    &mut scratch.squares,
                );
                let additions = (brain::DEPTH + dim.div_ceil(brain::DEPTH) + 8) as f64;
                let a = additions * 2.0 * UNIT;
                for squares in &scratch.squares {
                    let norm = norm_above(squares.whole, dim);
                    let lost = norm_above(squares.lost, dim);
                    let columns = self.lost + a * (1.0 + self.lost);
                    scratch.rows.push(Row {
                        norm,
                        square: squares.whole * (1.0 - 2.0 * NORM),
                        error: (lost + (norm + lost) * columns) * (1.0 + NORM),
                    });
                }
                (&scratch.tile, packed.padded())
            }
        };
        let (mut error, mut norm) = (0.0f64, 0.0f64);
        for row in &scratch.rows {
            (error, norm) = (error.max(row.error), norm.max(row.norm));
        }
        let square = Self::rounding(dim);
        let (slope, constant) = (error + square * norm, dim as f64 * 1e-37);
        scratch.low.clear();
        scratch
            .low
            .extend(self.bias.iter().zip(&self.norms).map(|(&bias, v)| {
                let low = f64::from(bias) - (slope * v + square * v * v + constant);
                (low as f32).next_down()
            }));
        Screened {
            rows: &scratch.rows,
            bias: &scratch.low,
            products,
            stride,
            slope,
            // The rounding of `low` itself, to f32 and down, is within another 4 u of the magnitudes.
            square: square + 4.0 * UNIT,
            constant,
            norms: &self.norms,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{CHAINS, chains};
    use proptest::prelude::*;

    /// A coordinate that bfloat16 finds hard: halfway between two of its numbers, subnormal, huge,
    /// or ordinary.
    fn coordinate() -> impl Strategy<Value = f32> {
        let halfway = (0u32..128, -20i32..20, any::<bool>(), -2i32..=2).prop_map(
            |(fraction, exponent, negative, nudge)| {
                let bits = (((127 + exponent) as u32) << 23 | fraction << 16 | 0x8000)
                    .wrapping_add_signed(nudge);
                let value = f32::from_bits(bits);
                if negative { -value } else { value }
            },
        );
        prop_oneof![
            4 => halfway,
            3 => -1f32..1.0,
            1 => Just(0.0f32),
            1 => (1u32..0x0080_0000).prop_map(f32::from_bits),
            1 => 1f32..1e12,
        ]
    }

    /// Rows and columns; sometimes all coordinates of the same kind and sign, so that errors add up.
    fn matrices() -> impl Strategy<Value = (Vec<f32>, Vec<f32>, usize)> {
        (1usize..1300, 1usize..4, 1usize..20, any::<bool>()).prop_flat_map(|(d, m, k, alike)| {
            let many = |n: usize| prop::collection::vec(coordinate(), n);
            let few = |n: usize| {
                prop::collection::vec(coordinate(), 3).prop_map(move |values| {
                    (0..n).map(|i| values[i % 3].abs()).collect::<Vec<f32>>()
                })
            };
            let of = move |n: usize| {
                if alike {
                    few(n).boxed()
                } else {
                    many(n).boxed()
                }
            };
            (of(m * d), of(k * d), Just(d))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

        #[test]
        fn scores_lie_within_the_bounds((x, c, d) in matrices(), with_bias: bool) {
            let k = c.len() / d;
            let bias: Vec<f32> = c
                .chunks(d)
                .map(|c| if with_bias { (0.5 * vector::square_norm(c)) as f32 } else { 0.0 })
                .collect();
            let which: Vec<u32> = (0..k as u32).collect();
            let screen = Screen::new(&c, d, &bias, &which);
            let rows = (&x[..], d);
            let mut scratch = Scratch::default();
            let kept = Kept::new(&rows, &Workers::new(Some(1)).unwrap()).unwrap();
            let screened = screen.screen(&rows, &kept, 0..x.len() / d, &mut scratch);
            let mut exact = tile::Scratch::default();
            for (i, row) in x.chunks(d).enumerate() {
                let norm = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
                prop_assert!(screened.rows[i].norm >= norm);
                prop_assert!(screened.rows[i].square <= norm * norm);
                let products = screened.row(i);
                let pairs: Vec<_> = (0..k).map(|c| (i, c)).collect();
                for pairs in pairs.chunks(CHAINS) {
                    let defined = chains(&rows, &c, pairs, &mut exact);
                    for (&(_, j), product) in pairs.iter().zip(defined) {
                        let low = f64::from(screened.bias[j] - products[j]);
                        let high = low + screened.width(j);
                        let score = f64::from(bias[j] - product);
                        let column = &c[j * d..(j + 1) * d];
                        let dot: f64 = row.iter().zip(column).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                        let truth = f64::from(bias[j]) - dot;
                        prop_assert!(low <= score && score <= high, "{low} {score} {high}");
                        prop_assert!(low <= truth && truth <= high, "{low} {truth} {high}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_subnormal_column_leaves_the_bounds_of_the_others_finite() {
        let c = [4.6e11f32, 1.0, 0.0, f32::MIN_POSITIVE / 8.0];
        let screen = Screen::new(&c, 1, &[0.0; 4], &[0, 1, 2, 3]);
        let mut scratch = Scratch::default();
        let screened = screen.screen(&(&[2.6e11f32][..], 1), &Kept::default(), 0..1, &mut scratch);
        for (j, &column) in c.iter().enumerate() {
            let low = f64::from(screened.bias[j] - screened.row(0)[j]);
            let score = -2.6e11 * f64::from(column);
            assert!(low.is_finite() && low <= score && score <= low + screened.width(j));
        }
    }

    #[test]
    fn the_bound_is_narrow_on_ordinary_rows() {
        // A bound that is never wrong because it is useless would decide nothing.
        let d = 1000;
        let x: Vec<f32> = (0..9 * d)
            .map(|i| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0)
            .collect();
        let which: Vec<u32> = (0..8).collect();
        let screen = Screen::new(&x[d..], d, &[0.0; 8], &which);
        let mut scratch = Scratch::default();
        let screened = screen.screen(&(&x[..], d), &Kept::default(), 0..1, &mut scratch);
        let square = screened.rows[0].norm * screened.rows[0].norm;
        assert!(
            screened.width(0) < 0.01 * square,
            "{}",
            screened.width(0) / square
        );
    }
}
