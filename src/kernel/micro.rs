//! Register-blocked f32 micro-kernels.
//!
//! A micro-kernel reads `MR` rows of a block of points (row-major, a fixed stride) and one panel of
//! packed columns (`depth` groups of `vectors * LANES` values), and adds to an `MR x (vectors *
//! LANES)` tile either the dot products or the squared distances over that depth. It starts from
//! zero, so each output is one chain of fused multiply-adds over the block, added to the tile once.

use super::isa::Isa;
use super::tile::STRIDE;

/// `(points, panel, depth, tile, tile stride, overwrite)`.
///
/// # Safety
/// `points` holds `MR` rows of at least `depth` values, `STRIDE` apart; `panel` holds `depth *
/// vectors * LANES` values; `tile` holds `MR` rows of `vectors * LANES` values, the stride apart; and
/// the processor has the instruction set.
pub(super) type Micro = unsafe fn(*const f32, *const f32, usize, *mut f32, usize, bool);

/// The kernels of one instruction set.
pub(super) struct Kernels {
    /// Rows of a register block.
    pub rows: usize,
    /// Values of a vector.
    pub lanes: usize,
    /// Dot products, with one and with two vectors a panel.
    pub dot: [Micro; 2],
    /// Squared differences, likewise.
    pub square: [Micro; 2],
}

pub(super) fn kernels(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx | Isa::Avx512Bf16 | Isa::Avx512 => &avx512::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &avx2::KERNELS,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => &neon::KERNELS,
        _ => &portable::KERNELS,
    }
}

/// One body for every instruction set, in terms of the vector operations in scope.
macro_rules! micro_kernels {
    ($(#[$feature:meta])* rows: $rows:literal, lanes: $lanes:literal) => {
        $(#[$feature])*
        unsafe fn micro<const SQUARE: bool, const VECTORS: usize>(
            points: *const f32,
            panel: *const f32,
            depth: usize,
            tile: *mut f32,
            stride: usize,
            overwrite: bool,
        ) {
            // SAFETY: within the bounds that `Micro` requires of its caller.
            unsafe {
                let mut sums = [[zero(); VECTORS]; $rows];
                for p in 0..depth {
                    let mut column = [zero(); VECTORS];
                    for v in 0..VECTORS {
                        column[v] = load(panel.add((p * VECTORS + v) * $lanes));
                    }
                    for i in 0..$rows {
                        let point = splat(*points.add(i * STRIDE + p));
                        for v in 0..VECTORS {
                            sums[i][v] = if SQUARE {
                                let difference = sub(point, column[v]);
                                fma(difference, difference, sums[i][v])
                            } else {
                                fma(point, column[v], sums[i][v])
                            };
                        }
                    }
                }
                for i in 0..$rows {
                    for v in 0..VECTORS {
                        let out = tile.add(i * stride + v * $lanes);
                        let sum = if overwrite { sums[i][v] } else { add(load(out), sums[i][v]) };
                        store(out, sum);
                    }
                }
            }
        }

        pub(super) static KERNELS: Kernels = Kernels {
            rows: $rows,
            lanes: $lanes,
            dot: [micro::<false, 1>, micro::<false, 2>],
            square: [micro::<true, 1>, micro::<true, 2>],
        };
    };
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
mod avx512 {
    use super::{Kernels, STRIDE};
    use core::arch::x86_64::{
        __m512, _mm512_add_ps as add, _mm512_fmadd_ps as fma, _mm512_loadu_ps as load,
        _mm512_set1_ps as splat, _mm512_setzero_ps as zero, _mm512_storeu_ps as store,
        _mm512_sub_ps as sub,
    };

    const _: () = assert!(size_of::<__m512>() == 64);

    micro_kernels! { #[target_feature(enable = "avx512f")] rows: 12, lanes: 16 }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
mod avx2 {
    use super::{Kernels, STRIDE};
    use core::arch::x86_64::{
        _mm256_add_ps as add, _mm256_fmadd_ps as fma, _mm256_loadu_ps as load,
        _mm256_set1_ps as splat, _mm256_setzero_ps as zero, _mm256_storeu_ps as store,
        _mm256_sub_ps as sub,
    };

    micro_kernels! { #[target_feature(enable = "avx2,fma")] rows: 6, lanes: 8 }
}

#[cfg(target_arch = "aarch64")]
#[allow(clippy::needless_range_loop)]
mod neon {
    use super::{Kernels, STRIDE};
    use core::arch::aarch64::{
        float32x4_t, vaddq_f32 as add, vdupq_n_f32 as splat, vfmaq_f32, vld1q_f32 as load,
        vst1q_f32 as store, vsubq_f32 as sub,
    };

    #[inline]
    #[target_feature(enable = "neon")]
    fn zero() -> float32x4_t {
        splat(0.0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn fma(x: float32x4_t, y: float32x4_t, sum: float32x4_t) -> float32x4_t {
        vfmaq_f32(sum, x, y)
    }

    micro_kernels! { #[target_feature(enable = "neon")] rows: 12, lanes: 4 }
}

/// The same chains with scalar fused multiply-adds: the same bits, slowly.
#[allow(clippy::needless_range_loop)]
mod portable {
    use super::{Kernels, STRIDE};

    type Vector = [f32; 4];

    fn zero() -> Vector {
        [0.0; 4]
    }

    fn splat(x: f32) -> Vector {
        [x; 4]
    }

    fn add(x: Vector, y: Vector) -> Vector {
        std::array::from_fn(|l| x[l] + y[l])
    }

    fn sub(x: Vector, y: Vector) -> Vector {
        std::array::from_fn(|l| x[l] - y[l])
    }

    fn fma(x: Vector, y: Vector, sum: Vector) -> Vector {
        std::array::from_fn(|l| x[l].mul_add(y[l], sum[l]))
    }

    unsafe fn load(from: *const f32) -> Vector {
        // SAFETY: the caller's bounds; f32 arrays have the alignment of f32.
        unsafe { from.cast::<Vector>().read() }
    }

    unsafe fn store(to: *mut f32, x: Vector) {
        // SAFETY: as in `load`.
        unsafe { to.cast::<Vector>().write(x) }
    }

    micro_kernels! { rows: 4, lanes: 4 }
}
