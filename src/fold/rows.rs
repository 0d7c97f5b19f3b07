//! The arithmetic on moved rows: add a delta, and take it off again to the bit.
//!
//! `new = round(f32(old) + delta)` loses what rounding drops, so subtracting does not give `old` back.
//! The residual is what is missing: for each element the distance from `round(f32(new) - delta)` to
//! `old`, counted in steps between neighbouring numbers of the type. Nearly all of these are 0 or a
//! step or two, so DEFLATE brings them to a bit or two each.
//!
//! The residual's bytes: one distance an element in row-major order, zigzag (0, -1, 1, -2, ... become
//! 0, 1, 2, 3, ...), LEB128, the whole compressed as one raw DEFLATE stream (RFC 1951).

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::matrix::Dtype;

/// Rows of one matrix with the deltas that move them.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The element type.
    pub dtype: Dtype,
    /// Elements a row.
    pub width: usize,
    /// The cluster of each row.
    pub cluster: &'a [i32],
    /// One row a cluster, row-major `[k, width]`.
    pub delta: &'a [f32],
}

impl Rows<'_> {
    /// `round(f32(old) + delta)` for `old`, the little-endian bytes of the rows.
    ///
    /// # Errors
    /// Lengths or clusters that do not fit; a sum that is not finite.
    pub fn fold(&self, old: &[u8]) -> Result<Vec<u8>> {
        self.check(old)?;
        let mut out = Vec::with_capacity(old.len());
        self.each(old, |row, col, v, u| {
            let sum = round(self.dtype, v + u);
            if !value(self.dtype, sum).is_finite() {
                return Err(self.not_finite(row, col));
            }
            push(&mut out, self.dtype, sum);
            Ok(())
        })?;
        Ok(out)
    }

    /// What [`Rows::unfold`] needs to give back `old` from `new`.
    ///
    /// # Errors
    /// Lengths or clusters that do not fit.
    pub fn residual(&self, old: &[u8], new: &[u8]) -> Result<Vec<u8>> {
        self.check(old)?;
        let size = self.dtype.size();
        let mut originals = old.chunks_exact(size);
        let mut out = DeflateEncoder::new(Vec::new(), Compression::best());
        let mut varint = Vec::with_capacity(5);
        self.each(new, |_, _, v, u| {
            let old = bits(originals.next().unwrap_or_default());
            let step = key(self.dtype, old) - key(self.dtype, round(self.dtype, v - u));
            let mut zigzag = ((step << 1) ^ (step >> 63)) as u64;
            varint.clear();
            while zigzag >= 0x80 {
                varint.push(zigzag as u8 | 0x80);
                zigzag >>= 7;
            }
            varint.push(zigzag as u8);
            out.write_all(&varint).map_err(|_| damaged())
        })?;
        out.finish().map_err(|_| damaged())
    }

    /// The rows before the fold, from those after it.
    ///
    /// # Errors
    /// Lengths or clusters that do not fit; a residual that is damaged, too short or too long.
    pub fn unfold(&self, new: &[u8], residual: &[u8]) -> Result<Vec<u8>> {
        self.check(new)?;
        // Five bytes at most an element: a stream that inflates to more is hostile.
        let limit = (self.cluster.len() * self.width) as u64 * 5 + 1;
        let mut steps = Vec::new();
        DeflateDecoder::new(residual)
            .take(limit)
            .read_to_end(&mut steps)
            .map_err(|_| damaged())?;
        let mut steps = steps.into_iter();
        let mut out = Vec::with_capacity(new.len());
        self.each(new, |_, _, v, u| {
            let mut zigzag = 0u64;
            for shift in (0..).step_by(7) {
                let byte = steps.next().filter(|_| shift < 35).ok_or_else(damaged)?;
                zigzag |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    break;
                }
            }
            let step = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
            let old = unkey(self.dtype, key(self.dtype, round(self.dtype, v - u)) + step)
                .ok_or_else(damaged)?;
            push(&mut out, self.dtype, old);
            Ok(())
        })?;
        match steps.next() {
            None => Ok(out),
            Some(_) => Err(damaged()),
        }
    }

    fn check(&self, bytes: &[u8]) -> Result<()> {
        let row = self.width.checked_mul(self.dtype.size());
        if row.and_then(|row| row.checked_mul(self.cluster.len())) != Some(bytes.len()) {
            let want = format!("{} x {} elements", self.cluster.len(), self.width);
            return Err(Error::shape("rows", bytes.len(), want));
        }
        let k = self.delta.len().checked_div(self.width).unwrap_or(0);
        if k * self.width != self.delta.len() {
            return Err(Error::shape(
                "delta",
                self.delta.len(),
                format!("whole rows of {}", self.width),
            ));
        }
        match self.cluster.iter().find(|&&c| c < 0 || c as usize >= k) {
            None => Ok(()),
            Some(c) => Err(Error::argument("cluster", c, format!("k is {k}"))),
        }
    }

    /// Calls `work` with row, column, value and delta of every element.
    fn each(
        &self,
        bytes: &[u8],
        mut work: impl FnMut(usize, usize, f32, f32) -> Result<()>,
    ) -> Result<()> {
        let size = self.dtype.size();
        for (row, (bytes, &cluster)) in bytes
            .chunks_exact((self.width * size).max(1))
            .zip(self.cluster)
            .enumerate()
        {
            let delta = &self.delta[cluster as usize * self.width..][..self.width];
            for (col, (element, &u)) in bytes.chunks_exact(size).zip(delta).enumerate() {
                work(row, col, value(self.dtype, bits(element)), u)?;
            }
        }
        Ok(())
    }

    fn not_finite(&self, row: usize, col: usize) -> Error {
        Error::argument(
            "delta",
            self.delta[self.cluster[row] as usize * self.width + col],
            format!("the sum in row {row}, column {col} would not be finite"),
        )
    }
}

fn damaged() -> Error {
    Error::argument("residual", "...", "it is damaged or of another patch")
}

fn bits(element: &[u8]) -> u32 {
    match *element {
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
        [a, b] => u16::from_le_bytes([a, b]).into(),
        _ => 0,
    }
}

fn push(out: &mut Vec<u8>, dtype: Dtype, bits: u32) {
    out.extend_from_slice(&bits.to_le_bytes()[..dtype.size()]);
}

fn value(dtype: Dtype, bits: u32) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_bits(bits),
        Dtype::F16 => f16::from_bits(bits as u16).to_f32(),
        Dtype::Bf16 => bf16::from_bits(bits as u16).to_f32(),
    }
}

fn round(dtype: Dtype, value: f32) -> u32 {
    match dtype {
        Dtype::F32 => value.to_bits(),
        Dtype::F16 => f16::from_f32(value).to_bits().into(),
        Dtype::Bf16 => bf16::from_f32(value).to_bits().into(),
    }
}

/// Numbers in ascending order are neighbouring integers; -0 comes just below 0.
fn key(dtype: Dtype, bits: u32) -> i64 {
    let sign = 1u32 << (dtype.size() * 8 - 1);
    let magnitude = i64::from(bits & (sign - 1));
    if bits & sign == 0 {
        magnitude
    } else {
        -magnitude - 1
    }
}

fn unkey(dtype: Dtype, key: i64) -> Option<u32> {
    let sign = 1u32 << (dtype.size() * 8 - 1);
    let (magnitude, flag) = if key >= 0 {
        (key, 0)
    } else {
        (-(key + 1), sign)
    };
    let magnitude = u32::try_from(magnitude).ok().filter(|&m| m < sign)?;
    Some(magnitude | flag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(dtype: Dtype, elements: &[(u32, f32)]) {
        let mask = if dtype == Dtype::F32 {
            u32::MAX
        } else {
            0xffff
        };
        let (mut old, mut delta) = (Vec::new(), Vec::new());
        for &(bits, u) in elements {
            let v = value(dtype, bits & mask);
            if v.is_finite() && value(dtype, round(dtype, v + u)).is_finite() {
                push(&mut old, dtype, bits & mask);
                delta.push(u);
            }
        }
        let rows = Rows {
            dtype,
            width: delta.len().max(1),
            cluster: if delta.is_empty() { &[] } else { &[0] },
            delta: &delta,
        };
        let new = rows.fold(&old).unwrap();
        let residual = rows.residual(&old, &new).unwrap();
        assert_eq!(rows.unfold(&new, &residual).unwrap(), old);
    }

    proptest! {
        #[test]
        fn what_was_folded_comes_off_bit_for_bit(
            elements in prop::collection::vec((any::<u32>(), prop::num::f32::NORMAL | prop::num::f32::ZERO), 0..40),
            small in prop::collection::vec((any::<u32>(), -1f32..1.0), 0..40),
        ) {
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                check(dtype, &elements);
                check(dtype, &small);
            }
        }

        #[test]
        fn a_damaged_residual_is_an_error_or_some_rows_never_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..64), raw in any::<bool>(),
        ) {
            let residual = if raw {
                bytes
            } else {
                let mut out = DeflateEncoder::new(Vec::new(), Compression::fast());
                out.write_all(&bytes).unwrap();
                out.finish().unwrap()
            };
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                let delta = [0.5f32; 8];
                let rows = Rows { dtype, width: 8, cluster: &[0, 0], delta: &delta };
                if let Ok(old) = rows.unfold(&vec![0x11; 16 * dtype.size()], &residual) {
                    prop_assert_eq!(old.len(), 16 * dtype.size());
                }
            }
        }
    }

    #[test]
    fn lengths_and_clusters_are_checked() {
        let delta = [0.0f32; 4];
        let rows = |cluster| Rows {
            dtype: Dtype::F16,
            width: 2,
            cluster,
            delta: &delta,
        };
        assert!(rows(&[0, 1]).fold(&[0; 8]).is_ok());
        assert!(rows(&[0, 1]).fold(&[0; 6]).is_err());
        assert!(rows(&[0, 2]).fold(&[0; 8]).is_err());
        assert!(rows(&[0, -1]).fold(&[0; 8]).is_err());
        assert!(rows(&[0]).unfold(&[0; 4], &[]).is_err());
    }
}
