//! Rows as columns: what packing for the kernels comes down to.

#[cfg(target_arch = "x86_64")]
use super::isa::active_isa;

/// Lanes of the fast way.
#[cfg(target_arch = "x86_64")]
const SIDE: usize = 16;

/// `to[p * width + c] = from[c * stride + p]` for p below `depth` and c below `lanes`.
pub(super) fn transpose(
    from: &[u32],
    stride: usize,
    depth: usize,
    lanes: usize,
    to: &mut [u32],
    width: usize,
) {
    assert!(depth > 0 && lanes > 0);
    assert!(from.len() >= (lanes - 1) * stride + depth && to.len() >= (depth - 1) * width + lanes);
    #[cfg(target_arch = "x86_64")]
    let done = if lanes == SIDE && active_isa().has_avx512() {
        let squares = depth / SIDE * SIDE;
        for p in (0..squares).step_by(SIDE) {
            // SAFETY: SIDE lines of SIDE words are there on either side, as asserted, and `active_isa` has AVX-512.
            unsafe {
                square(
                    from.as_ptr().add(p),
                    stride,
                    to.as_mut_ptr().add(p * width),
                    width,
                );
            }
        }
        squares
    } else {
        0
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    for p in done..depth {
        for (c, to) in to[p * width..][..lanes].iter_mut().enumerate() {
            *to = from[c * stride + p];
        }
    }
}

/// 16 lines of 16 words.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn square(from: *const u32, stride: usize, to: *mut u32, width: usize) {
    use core::arch::x86_64::{
        __m512i, _mm512_loadu_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };
    // SAFETY: the caller has these lines.
    unsafe {
        let x: [__m512i; SIDE] =
            std::array::from_fn(|i| _mm512_loadu_si512(from.add(i * stride).cast()));
        // Pairs of lines, then fours: in each quarter of a vector, four lines of one column.
        let pairs: [__m512i; SIDE] = std::array::from_fn(|i| {
            let (a, b) = (x[i & !1], x[i | 1]);
            if i % 2 == 0 {
                _mm512_unpacklo_epi32(a, b)
            } else {
                _mm512_unpackhi_epi32(a, b)
            }
        });
        let fours: [__m512i; SIDE] = std::array::from_fn(|i| {
            // Column i % 4 of the lines of group i / 4.
            let (group, column) = (i & !3, i % 4);
            let (a, b) = (pairs[group + column / 2], pairs[group + 2 + column / 2]);
            if column % 2 == 0 {
                _mm512_unpacklo_epi64(a, b)
            } else {
                _mm512_unpackhi_epi64(a, b)
            }
        });
        // The quarters that stand in even and in odd places.
        let even = |a, b| _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
        let odd = |a, b| _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
        for column in 0..4 {
            let [a, b, c, d] = std::array::from_fn(|group| fours[4 * group + column]);
            let (evens, odds) = ((even(a, b), even(c, d)), (odd(a, b), odd(c, d)));
            let quarters = [
                even(evens.0, evens.1),
                even(odds.0, odds.1),
                odd(evens.0, evens.1),
                odd(odds.0, odds.1),
            ];
            for (quarter, line) in quarters.into_iter().enumerate() {
                _mm512_storeu_si512(to.add((4 * quarter + column) * width).cast(), line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns_and_nothing_else_is_written() {
        for (lanes, depth, stride, width) in [(16, 40, 50, 32), (16, 16, 16, 16), (8, 5, 9, 16)] {
            let from: Vec<u32> = (1..=(lanes * stride) as u32).collect();
            let mut to = vec![0; depth * width];
            transpose(&from, stride, depth, lanes, &mut to, width);
            for (at, &word) in to.iter().enumerate() {
                let (p, c) = (at / width, at % width);
                let want = if c < lanes { from[c * stride + p] } else { 0 };
                assert_eq!(word, want, "{p} {c}");
            }
        }
    }
}
