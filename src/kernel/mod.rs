//! The innermost loops, and the only `unsafe` of the crate.
//!
//! - [`isa`]: which instruction set runs, found at run time, pinned by `NEST_RS_ISA`.
//! - [`micro`]: the register-blocked f32 micro-kernels, one for each instruction set.
//! - [`tile`]: packing, and tiles of products or squared differences between rows and columns.
//! - [`screen`]: approximate products with a proven error bound, in bfloat16 ([`brain`], [`amx`])
//!   where the processor has it; what they decide, they decide as f32 would.
//! - [`split`]: products as good as f32's from digits, where the processor multiplies those so much faster.
//! - [`vector`]: loops over one row, compiled once for each instruction set.
//! - [`transpose`]: rows as columns.
//! - [`lines`]: buffers that begin on a cache line.
//! - [`map`]: the read-only memory map.
//!
//! # What fixes the bits
//! An output of a tile is a sum over blocks of [`tile::DEPTH`] coordinates, added in order; inside a
//! block it is one chain of fused multiply-adds in coordinate order, whatever the instruction set,
//! the register block or the thread that computes it. The loops of [`vector`] use no fused
//! multiply-add unless they say so, and where they sum they use a fixed number of lanes combined in a fixed order.

#![allow(unsafe_code)]

/// Asks the processor for the memory of a slice.
#[inline]
pub(crate) fn prefetch<T>(slice: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let (from, bytes) = (slice.as_ptr().cast::<i8>(), size_of_val(slice));
        for line in (0..bytes).step_by(64) {
            // SAFETY: the address is inside the slice, and a prefetch reads nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(from.add(line)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod brain;
mod isa;
mod lines;
pub(crate) mod map;
mod micro;
pub(crate) mod screen;
#[cfg(target_arch = "x86_64")]
pub(crate) mod split;
#[cfg(not(target_arch = "x86_64"))]
#[path = "unsplit.rs"]
pub(crate) mod split;
mod tile;
mod transpose;
pub(crate) mod vector;

pub(crate) use isa::check_isa;
pub use isa::{Isa, active_isa};
pub(crate) use screen::{Kept, Screen};
pub(crate) use tile::{BLOCK, CHAINS, Form, Packed, Rows, Scratch, chains, tile};

/// Uniform in [-1, 1), the same for a seed.
#[cfg(test)]
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}
