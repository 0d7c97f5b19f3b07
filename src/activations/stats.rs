//! Masked max-pooling over tokens, and class means and variances that grow row by row.

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::kernel::vector::{self, TOKENS};
use crate::matrix::{Dtype, Matrix, Values};
use crate::pool::Workers;

/// Columns a pooling task: memory likes long runs better than it minds running maxima in the second-level cache.
const RUN: usize = 16384;
/// Columns a task of the statistics.
const SLICE: usize = 1024;

/// A pooled batch `[batch, d]`, in the type it came in.
#[derive(Clone, Debug, PartialEq)]
pub enum Pooled {
    /// Single precision.
    F32(Vec<f32>),
    /// Half precision.
    F16(Vec<f16>),
    /// bfloat16.
    Bf16(Vec<bf16>),
}

impl Pooled {
    /// The elements, row after row.
    pub fn values(&self) -> Values<'_> {
        match self {
            Pooled::F32(v) => Values::F32(v),
            Pooled::F16(v) => Values::F16(v),
            Pooled::Bf16(v) => Values::Bf16(v),
        }
    }
}

/// The maximum over the tokens that `mask` (`[batch, tokens]`, 0 or not) keeps, of `x` viewed as
/// `[batch * tokens, d]`. Exact: a maximum is one of its arguments. Masked elements are not read.
///
/// ```
/// use nest_rs::{Matrix, Workers, activations::{Pooled, masked_max}};
/// let x = [1.0f32, -2.0, 3.0, -4.0, 9.0, 9.0]; // one prompt, three tokens, two neurons
/// let pooled = masked_max(&Matrix::new(&x[..], 3, 2)?, &[1, 1, 0], 3, &Workers::new(None)?)?;
/// assert_eq!(pooled, Pooled::F32(vec![3.0, -2.0]));
/// # Ok::<(), nest_rs::Error>(())
/// ```
///
/// # Errors
/// A mask of the wrong length, a batch row without a token ([`Error::AllMasked`]), or a non-finite
/// element that is not masked (named by batch row and column).
pub fn masked_max(x: &Matrix, mask: &[u8], tokens: usize, workers: &Workers) -> Result<Pooled> {
    let (rows, d) = (x.rows(), x.cols());
    if mask.len() != rows || tokens == 0 || !rows.is_multiple_of(tokens) {
        return Err(Error::shape(
            "mask",
            (mask.len() / tokens.max(1), tokens),
            format!("one flag for each of {rows} tokens"),
        ));
    }
    if let Some(row) = mask.chunks(tokens).position(|m| m.iter().all(|&m| m == 0)) {
        return Err(Error::AllMasked(row));
    }
    let kept = |b: usize| (b * tokens..(b + 1) * tokens).filter(|&t| mask[t] != 0);

    let (pooled, widest) = match x.values() {
        Values::F32(v) => {
            let bits: &[u32] = bytemuck::cast_slice(v);
            let mut keys = vec![i32::MIN; rows / tokens * d];
            let widest = slices(&mut keys, d, workers, |b, from, key| {
                let mut widest = 0;
                for at in by_turns(kept(b)) {
                    let tokens = at.map(|t| &bits[t * d + from..(t + 1) * d]);
                    widest = vector::max_single(key, tokens, widest);
                }
                widest >= f32::INFINITY.to_bits()
            })?;
            let value = |k: i32| f32::from_bits((k ^ ((k >> 31) & 0x7fff_ffff)) as u32);
            (Pooled::F32(keys.into_iter().map(value).collect()), widest)
        }
        Values::F16(_) | Values::Bf16(_) => {
            let (bits, infinity): (&[u16], u16) = match x.values() {
                Values::F16(v) => (bytemuck::cast_slice(v), f16::INFINITY.to_bits()),
                Values::Bf16(v) => (bytemuck::cast_slice(v), bf16::INFINITY.to_bits()),
                Values::F32(_) => (&[], 0),
            };
            let mut keys = vec![i16::MIN; rows / tokens * d];
            let widest = slices(&mut keys, d, workers, |b, from, key| {
                let mut widest = 0;
                for at in by_turns(kept(b)) {
                    let tokens = at.map(|t| &bits[t * d + from..(t + 1) * d]);
                    widest = vector::max_half(key, tokens, widest);
                }
                widest >= infinity
            })?;
            let value = |k: i16| (k ^ ((k >> 15) & 0x7fff)) as u16;
            let pooled = if x.values().dtype() == Dtype::F16 {
                Pooled::F16(keys.into_iter().map(|k| f16::from_bits(value(k))).collect())
            } else {
                Pooled::Bf16(
                    keys.into_iter()
                        .map(|k| bf16::from_bits(value(k)))
                        .collect(),
                )
            };
            (pooled, widest)
        }
    };
    if let Some(b) = widest {
        let mut row = vec![0.0; d];
        for t in kept(b) {
            x.read(t, 0, &mut row);
            if let Some(col) = row.iter().position(|v| !v.is_finite()) {
                return Err(Error::NonFinite {
                    what: format!("X (token `{}`)", t % tokens),
                    row: b,
                    col,
                    value: row[col],
                });
            }
        }
    }
    Ok(pooled)
}

/// Some tokens at a time; the last ones may come twice, which no maximum minds.
fn by_turns(mut tokens: impl Iterator<Item = usize>) -> impl Iterator<Item = [usize; TOKENS]> {
    std::iter::from_fn(move || {
        let mut last = tokens.next()?;
        Some(std::array::from_fn(|i| {
            if i > 0 {
                last = tokens.next().unwrap_or(last);
            }
            last
        }))
    })
}

/// Runs `work(batch row, first column, slice)` on slices of every row; returns the first row for
/// which it found something non-finite.
fn slices<T: Send>(
    keys: &mut [T],
    d: usize,
    workers: &Workers,
    work: impl Fn(usize, usize, &mut [T]) -> bool + Sync,
) -> Result<Option<usize>> {
    let jobs: Vec<(usize, usize, &mut [T])> = keys
        .chunks_mut(d)
        .enumerate()
        .flat_map(|(b, row)| {
            row.chunks_mut(RUN)
                .enumerate()
                .map(move |(s, slice)| (b, s * RUN, slice))
        })
        .collect();
    let bad = std::sync::atomic::AtomicUsize::new(usize::MAX);
    workers.each(jobs.into_iter(), |(b, from, slice)| {
        if work(b, from, slice) {
            bad.fetch_min(b, std::sync::atomic::Ordering::Relaxed);
        }
    })?;
    let bad = bad.into_inner();
    Ok((bad != usize::MAX).then_some(bad))
}

/// Count, mean and variance of each class, column by column, in f64.
///
/// Rows enter in index order (Welford), so a stream gives the same bits however it is cut into
/// batches; parts computed apart are combined by Chan's formula, in the order of the calls.
///
/// ```
/// use nest_rs::{Matrix, Workers, activations::ClassStats};
/// let mut stats = ClassStats::new(2, 1);
/// let workers = Workers::new(None)?;
/// stats.update(&Matrix::new(&[1.0f32, 5.0, 3.0][..], 3, 1)?, &[0, 1, 0], &workers)?;
/// assert_eq!(stats.mean(0), [2.0]);
/// assert_eq!(stats.variance(0), [1.0]);
/// # Ok::<(), nest_rs::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ClassStats {
    d: usize,
    counts: Vec<u64>,
    means: Vec<f64>,
    m2: Vec<f64>,
}

impl ClassStats {
    /// Nothing seen yet, for `n_classes` classes and `d` columns.
    pub fn new(n_classes: usize, d: usize) -> Self {
        ClassStats {
            d,
            counts: vec![0; n_classes],
            means: vec![0.0; n_classes * d],
            m2: vec![0.0; n_classes * d],
        }
    }

    /// From counts `[n_classes]`, means and sums of squared deviations `[n_classes, d]`.
    ///
    /// # Errors
    /// Lengths that do not fit.
    pub fn from_parts(counts: Vec<u64>, means: Vec<f64>, m2: Vec<f64>, d: usize) -> Result<Self> {
        let want = counts.len() * d;
        if means.len() != want || m2.len() != want {
            return Err(Error::shape(
                "the statistics",
                (means.len(), m2.len()),
                format!("{want} means and sums of squares"),
            ));
        }
        Ok(ClassStats {
            d,
            counts,
            means,
            m2,
        })
    }

    /// Adds the rows of `x`, whose classes are `y`.
    ///
    /// # Errors
    /// Shapes that do not fit, a class out of range, or a non-finite element. Nothing is added then.
    pub fn update(&mut self, x: &Matrix, y: &[u8], workers: &Workers) -> Result<()> {
        let d = self.d;
        if x.cols() != d || y.len() != x.rows() {
            return Err(Error::shape(
                "X and y",
                ((x.rows(), x.cols()), y.len()),
                format!("{d} columns and one class a row"),
            ));
        }
        if let Some(class) = y.iter().find(|&&c| usize::from(c) >= self.counts.len()) {
            let reason = format!("must be below {}", self.counts.len());
            return Err(Error::argument("a label of y", class, reason));
        }
        x.scan("X", workers)?;
        // Each task owns some columns and sees every row in order.
        let classes = self.counts.len();
        let mut slices: Vec<Vec<(&mut [f64], &mut [f64])>> = Vec::new();
        for (mean, m2) in self.means.chunks_mut(d).zip(self.m2.chunks_mut(d)) {
            for (s, pair) in mean.chunks_mut(SLICE).zip(m2.chunks_mut(SLICE)).enumerate() {
                if slices.len() == s {
                    slices.push(Vec::with_capacity(classes));
                }
                slices[s].push(pair);
            }
        }
        let before = &self.counts;
        workers.each(slices.into_iter().enumerate(), |(s, mut by_class)| {
            let mut counts = before.clone();
            let mut row = vec![0.0f32; by_class.first().map_or(0, |(mean, _)| mean.len())];
            for (i, &class) in y.iter().enumerate() {
                let class = usize::from(class);
                counts[class] += 1;
                x.read(i, s * SLICE, &mut row);
                let (mean, m2) = &mut by_class[class];
                vector::welford(mean, m2, &row, 1.0 / counts[class] as f64);
            }
        })?;
        y.iter()
            .for_each(|&class| self.counts[usize::from(class)] += 1);
        Ok(())
    }

    /// Adds what another part saw.
    ///
    /// # Errors
    /// Other classes or columns.
    pub fn merge(&mut self, other: &ClassStats) -> Result<()> {
        if (self.d, self.counts.len()) != (other.d, other.counts.len()) {
            return Err(Error::shape(
                "the other statistics",
                (other.counts.len(), other.d),
                format!("{} classes of {} columns", self.counts.len(), self.d),
            ));
        }
        for class in 0..self.counts.len() {
            let (a, b) = (self.counts[class] as f64, other.counts[class] as f64);
            if b == 0.0 {
                continue;
            }
            let span = class * self.d..(class + 1) * self.d;
            for j in span {
                let gap = other.means[j] - self.means[j];
                self.means[j] += gap * (b / (a + b));
                self.m2[j] += other.m2[j] + gap * gap * (a * b / (a + b));
            }
            self.counts[class] += other.counts[class];
        }
        Ok(())
    }

    /// Rows seen of each class.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// The number of columns.
    pub fn dim(&self) -> usize {
        self.d
    }

    /// Column means of a class; zeros before its first row.
    pub fn mean(&self, class: usize) -> &[f64] {
        &self.means[class * self.d..(class + 1) * self.d]
    }

    /// Sums of squared deviations of a class.
    pub fn m2(&self, class: usize) -> &[f64] {
        &self.m2[class * self.d..(class + 1) * self.d]
    }

    /// Population variances of a class; zeros before its first row.
    pub fn variance(&self, class: usize) -> Vec<f64> {
        let count = self.counts[class].max(1) as f64;
        self.m2(class).iter().map(|s| s / count).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pooling_is_exact_in_every_type() {
        let x: Vec<f32> = (0..4 * 3 * 5)
            .map(|i| ((i * 31) % 17) as f32 - 12.0)
            .collect();
        let mask = [1u8, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0];
        let workers = Workers::new(Some(2)).unwrap();
        let mut want = vec![f32::NEG_INFINITY; 4 * 5];
        for t in (0..12).filter(|&t| mask[t] == 1) {
            for j in 0..5 {
                let slot = &mut want[t / 3 * 5 + j];
                *slot = slot.max(x[t * 5 + j]);
            }
        }
        let halves: Vec<f16> = x.iter().map(|&v| f16::from_f32(v)).collect();
        let brains: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
        for values in [Values::F32(&x), Values::F16(&halves), Values::Bf16(&brains)] {
            let pooled =
                masked_max(&Matrix::new(values, 12, 5).unwrap(), &mask, 3, &workers).unwrap();
            let mut got = vec![0.0; 20];
            pooled.values().read(0, &mut got);
            assert_eq!(got, want);
        }
    }

    #[test]
    fn only_kept_tokens_must_be_finite() {
        let workers = Workers::new(Some(1)).unwrap();
        let x = [1.0f32, f32::NAN, 2.0, 3.0];
        let x = Matrix::new(&x[..], 4, 1).unwrap();
        assert!(masked_max(&x, &[1, 0, 1, 1], 2, &workers).is_ok());
        let bad = masked_max(&x, &[1, 1, 1, 1], 2, &workers);
        assert!(matches!(bad, Err(Error::NonFinite { row: 0, .. })));
        let empty = masked_max(&x, &[1, 0, 0, 0], 2, &workers);
        assert!(matches!(empty, Err(Error::AllMasked(1))));
        assert!(masked_max(&x, &[1, 0, 0], 2, &workers).is_err());
    }

    #[test]
    fn batches_do_not_change_the_bits_and_merging_agrees() {
        let x: Vec<f32> = (0..600)
            .map(|i| 1000.0 + ((i * 53) % 97) as f32 * 0.01)
            .collect();
        let y: Vec<u8> = (0..200).map(|i| (i % 3 == 0) as u8).collect();
        let workers = Workers::new(Some(2)).unwrap();
        let of = |cuts: &[usize]| {
            let mut stats = ClassStats::new(2, 3);
            for cut in cuts.windows(2) {
                let (from, to) = (cut[0], cut[1]);
                let block = Matrix::new(&x[from * 3..to * 3], to - from, 3).unwrap();
                stats.update(&block, &y[from..to], &workers).unwrap();
            }
            stats
        };
        let whole = of(&[0, 200]);
        assert_eq!(whole, of(&[0, 1, 77, 200]));
        let mut merged = of(&[0, 60]);
        merged.merge(&of(&[60, 200])).unwrap();
        assert_eq!(merged.counts(), whole.counts());
        for class in 0..2 {
            for (a, b) in merged.variance(class).iter().zip(whole.variance(class)) {
                assert!((a - b).abs() < 1e-9 * b);
            }
        }
        assert!(merged.merge(&ClassStats::new(3, 3)).is_err());
    }
}
