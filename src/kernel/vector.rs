//! Loops over one row, compiled once for each instruction set.
//!
//! The same Rust body runs everywhere: rustc neither fuses nor reorders floating-point operations
//! unless told to, so wider registers change the speed and not one bit. Sums run in a fixed number of
//! lanes.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::isa::{Isa, active_isa};
use super::tile::CHAINS;

/// Lanes of a sum: part of the bits.
const LANES: usize = 32;

/// Rows that [`group_dot`] and [`group_add_scaled`] take together.
pub(crate) const GROUP: usize = 4;
/// Tokens that a maximum takes in at once.
pub(crate) const TOKENS: usize = 4;

macro_rules! multiversion {
    ($($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$doc])*
        pub(crate) fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

                match active_isa() {
                    // SAFETY: `active_isa` returns only what this processor has.
                    Isa::Amx | Isa::Avx512Bf16 | Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            body($($arg),*)
        }
    )*};
}

/// A slice of known length, so that loops over it unroll.
#[inline(always)]
fn fixed<T, const N: usize>(slice: &[T]) -> &[T; N] {
    // Callers slice to N.
    slice.first_chunk().unwrap_or_else(|| unreachable!())
}

/// Adds up the lanes pairwise.
#[inline(always)]
fn combine(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

multiversion! {
    /// Converts bfloat16; exact.
    pub fn widen_bf16(x: &[bf16], out: &mut [f32]) {
        for (o, v) in out.iter_mut().zip(x) {
            *o = f32::from_bits(u32::from(v.to_bits()) << 16);
        }
    }

    /// `sum += x - base` and `squares += (x - base)^2`.
    pub fn add_with_squares(sum: &mut [f64], squares: &mut [f64], x: &[f32], base: &[f32]) {
        for (((s, q), &v), &b) in sum.iter_mut().zip(squares).zip(x).zip(base) {
            let v = f64::from(v) - f64::from(b);
            *s += v;
            *q += v * v;
        }
    }

    /// [`group_dot`] in f32.
    pub fn group_dot_single(rows: [&[f32]; GROUP], w: &[f32]) -> [f32; GROUP] {
        // Written out row by row: as a loop over the rows it is not vectorised.
        let [a, b, c, d] = rows.map(|row| &row[..w.len()]);
        let [mut p, mut q, mut r, mut s] = [[0.0f32; LANES]; GROUP];
        let chunks = w
            .chunks_exact(LANES)
            .zip(a.chunks_exact(LANES).zip(b.chunks_exact(LANES)))
            .zip(c.chunks_exact(LANES).zip(d.chunks_exact(LANES)));
        for ((w, (a, b)), (c, d)) in chunks {
            for l in 0..LANES {
                p[l] += a[l] * w[l];
            }
            for l in 0..LANES {
                q[l] += b[l] * w[l];
            }
            for l in 0..LANES {
                r[l] += c[l] * w[l];
            }
            for l in 0..LANES {
                s[l] += d[l] * w[l];
            }
        }
        let mut out = [0.0; GROUP];
        let rest = w.len() - w.len() % LANES;
        for ((out, mut lanes), row) in out.iter_mut().zip([p, q, r, s]).zip([a, b, c, d]) {
            for (lane, (&x, &w)) in lanes.iter_mut().zip(row[rest..].iter().zip(&w[rest..])) {
                *lane += x * w;
            }
            let mut width = LANES / 2;
            while width > 0 {
                for l in 0..width {
                    lanes[l] += lanes[l + width];
                }
                width /= 2;
            }
            *out = lanes[0];
        }
        out
    }

    /// [`group_add_scaled`] in f32.
    pub fn group_add_scaled_single(sum: &mut [f32], factors: [f32; GROUP], rows: [&[f32]; GROUP]) {
        let n = sum.len();
        let [a, b, c, d] = rows.map(|row| &row[..n]);
        let [p, q, r, s] = factors;
        for i in 0..n {
            let mut v = sum[i];
            v += p * a[i];
            v += q * b[i];
            v += r * c[i];
            v += s * d[i];
            sum[i] = v;
        }
    }

    /// The largest magnitude's bits; at or above those of infinity if an element is not finite.
    pub fn max_abs_bits(x: &[f32]) -> u32 {
        x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff))
    }

    /// The same for the bits of f16 or bf16.
    pub fn max_abs_half_bits(x: &[u16]) -> u16 {
        x.iter().fold(0, |m, v| m.max(v & 0x7fff))
    }

    /// `x = x * scale - mean`.
    pub fn shift(x: &mut [f32], scale: f32, mean: &[f32]) {
        for (v, m) in x.iter_mut().zip(mean) {
            *v = *v * scale - m;
        }
    }

    /// `x = x * factor`, in f64.
    pub fn rescale(x: &mut [f32], factor: f64) {
        for v in x {
            *v = (f64::from(*v) * factor) as f32;
        }
    }

    /// `sum += x`.
    pub fn add(sum: &mut [f64], x: &[f32]) {
        for (s, &v) in sum.iter_mut().zip(x) {
            *s += f64::from(v);
        }
    }

    /// `sum += factor * x`.
    pub fn add_scaled(sum: &mut [f64], factor: f64, x: &[f32]) {
        for (s, &v) in sum.iter_mut().zip(x) {
            *s += factor * f64::from(v);
        }
    }

    /// `sum += x - base`; returns the squared norm of the difference.
    pub fn add_shifted(sum: &mut [f64], x: &[f32], base: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let chunks = sum.chunks_mut(LANES).zip(x.chunks(LANES)).zip(base.chunks(LANES));
        for ((sum, x), base) in chunks {
            for (((lane, s), &v), &b) in lanes.iter_mut().zip(sum).zip(x).zip(base) {
                let v = f64::from(v) - f64::from(b);
                *s += v;
                *lane += v * v;
            }
        }
        combine(lanes)
    }

    /// `x . w` for each row of a group, reading `w` once.
    pub fn group_dot(rows: [&[f32]; GROUP], w: &[f64]) -> [f64; GROUP] {
        // Half the lanes at a time, so that all sums stay in registers.
        const HALF: usize = LANES / 2;
        let mut lanes = [[0.0f64; LANES]; GROUP];
        let n = w.len();
        let rows = rows.map(|row| &row[..n]);
        let whole = n - n % LANES;
        for half in [0, HALF] {
            let mut sums = [[0.0f64; HALF]; GROUP];
            for start in (half..whole).step_by(LANES) {
                let w: &[f64; HALF] = fixed(&w[start..start + HALF]);
                for (sum, row) in sums.iter_mut().zip(rows) {
                    let x: &[f32; HALF] = fixed(&row[start..start + HALF]);
                    for l in 0..HALF {
                        sum[l] += f64::from(x[l]) * w[l];
                    }
                }
            }
            for (lanes, sum) in lanes.iter_mut().zip(&sums) {
                lanes[half..half + HALF].copy_from_slice(sum);
            }
        }
        for (lanes, row) in lanes.iter_mut().zip(rows) {
            for (l, (&a, &b)) in row[whole..].iter().zip(&w[whole..]).enumerate() {
                lanes[l] += f64::from(a) * b;
            }
        }
        lanes.map(combine)
    }

    /// `sum += factor * x` for each row of a group, in order: the same bits as [`add_scaled`] row
    /// by row, reading and writing `sum` once.
    pub fn group_add_scaled(sum: &mut [f64], factors: [f64; GROUP], rows: [&[f32]; GROUP]) {
        let n = sum.len();
        let [a, b, c, d] = rows.map(|row| &row[..n]);
        let [p, q, r, s] = factors;
        for i in 0..n {
            let mut v = sum[i];
            v += p * f64::from(a[i]);
            v += q * f64::from(b[i]);
            v += r * f64::from(c[i]);
            v += s * f64::from(d[i]);
            sum[i] = v;
        }
    }

    /// `x . w` in f64.
    pub fn dot_f64(x: &[f64], w: &[f64]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (mut xs, mut ws) = (x.chunks_exact(LANES), w.chunks_exact(LANES));
        for (a, b) in (&mut xs).zip(&mut ws) {
            for l in 0..LANES {
                lanes[l] += a[l] * b[l];
            }
        }
        for (l, (&a, &b)) in xs.remainder().iter().zip(ws.remainder()).enumerate() {
            lanes[l] += a * b;
        }
        combine(lanes)
    }

    /// `x . x`.
    pub fn square_norm(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let mut xs = x.chunks_exact(LANES);
        for a in &mut xs {
            for l in 0..LANES {
                lanes[l] += f64::from(a[l]) * f64::from(a[l]);
            }
        }
        for (l, &a) in xs.remainder().iter().enumerate() {
            lanes[l] += f64::from(a) * f64::from(a);
        }
        combine(lanes)
    }

    /// `|x - y|^2`, the difference rounded to f32, the rest in f64.
    pub fn square_distance(x: &[f32], y: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (mut xs, mut ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
        for (a, b) in (&mut xs).zip(&mut ys) {
            for l in 0..LANES {
                let v = f64::from(a[l] - b[l]);
                lanes[l] += v * v;
            }
        }
        for (l, (&a, &b)) in xs.remainder().iter().zip(ys.remainder()).enumerate() {
            let v = f64::from(a - b);
            lanes[l] += v * v;
        }
        combine(lanes)
    }

    /// For each pair, one chain of fused multiply-adds in coordinate order, from zero.
    pub fn chain_dots(x: [&[f32]; CHAINS], y: [&[f32]; CHAINS]) -> [f32; CHAINS] {
        let depth = x[0].len();
        let (x, y) = (x.map(|x| &x[..depth]), y.map(|y| &y[..depth]));
        let mut sums = [0.0f32; CHAINS];
        for p in 0..depth {
            for l in 0..CHAINS {
                sums[l] = x[l][p].mul_add(y[l][p], sums[l]);
            }
        }
        sums
    }

    /// `x * factor` to the nearest whole number, for x from 0 on.
    pub fn quantise(x: &[f32], factor: f32, out: &mut [u16]) {
        for (o, v) in out.iter_mut().zip(x) {
            *o = (v * factor + 0.5) as i32 as u16;
        }
    }

    /// Turns products of centred points into squared distances; whether some are not precise.
    pub fn squares(products: &mut [f32], norm: f32, norms: &[f32]) -> bool {
        let mut close = false;
        for (v, &other) in products.iter_mut().zip(norms) {
            let sum = norm + other;
            *v = sum - 2.0 * *v;
            close |= !is_precise(*v, sum);
        }
        close
    }

    /// The square root of each.
    pub fn roots(x: &mut [f32]) {
        for v in x {
            *v = v.sqrt();
        }
    }

    /// `sum += x`, wrapping.
    pub fn add_steps(sum: &mut [u32], x: &[u16]) {
        for (s, &v) in sum.iter_mut().zip(x) {
            *s = s.wrapping_add(u32::from(v));
        }
    }

    /// `to += x` and `from -= x`, wrapping.
    pub fn move_steps(from: &mut [u32], to: &mut [u32], x: &[u16]) {
        for ((f, t), &v) in from.iter_mut().zip(to).zip(x) {
            *f = f.wrapping_sub(u32::from(v));
            *t = t.wrapping_add(u32::from(v));
        }
    }

    /// Enters column c, of values `sums * factor - offset`, into the smallest, the second smallest and
    /// the place of the smallest of each row.
    pub fn enter_column(
        first: &mut [f32], second: &mut [f32], place: &mut [u32],
        sums: &[u32], factor: f32, offset: f32, c: u32,
    ) {
        let n = first.len();
        let (second, place, sums) = (&mut second[..n], &mut place[..n], &sums[..n]);
        for i in 0..n {
            let value = sums[i] as f32 * factor - offset;
            let wins = value < first[i];
            let loser = if wins { first[i] } else { value };
            second[i] = if loser < second[i] { loser } else { second[i] };
            place[i] = if wins { c } else { place[i] };
            first[i] = if wins { value } else { first[i] };
        }
    }

    /// The sum of `min(x, y)`.
    pub fn sum_of_smaller(x: &[f32], y: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let y = &y[..x.len()];
        let (mut xs, mut ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
        for (a, b) in (&mut xs).zip(&mut ys) {
            for l in 0..LANES {
                lanes[l] += f64::from(if b[l] < a[l] { b[l] } else { a[l] });
            }
        }
        for (l, (&a, &b)) in xs.remainder().iter().zip(ys.remainder()).enumerate() {
            lanes[l] += f64::from(if b < a { b } else { a });
        }
        combine(lanes)
    }

    /// `x = min(x, y)`; returns the sum, the bits of [`sum_of_smaller`].
    pub fn take_smaller(x: &mut [f32], y: &[f32]) -> f64 {
        let y = &y[..x.len()];
        for (a, &b) in x.iter_mut().zip(y) {
            *a = if b < *a { b } else { *a };
        }
        let mut lanes = [0.0f64; LANES];
        for chunk in x.chunks(LANES) {
            for (lane, &a) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(a);
            }
        }
        combine(lanes)
    }

    /// The smallest and the second smallest of `bias - product`.
    pub fn two_smallest(bias: &[f32], products: &[f32]) -> (f32, f32) {
        const WIDTH: usize = 32;
        let mut first = [f32::INFINITY; WIDTH];
        let mut second = [f32::INFINITY; WIDTH];
        let products = &products[..bias.len()];
        let (mut biases, mut all) = (bias.chunks_exact(WIDTH), products.chunks_exact(WIDTH));
        for (b, q) in (&mut biases).zip(&mut all) {
            for l in 0..WIDTH {
                let score = b[l] - q[l];
                let loser = if score > first[l] { score } else { first[l] };
                second[l] = if loser < second[l] { loser } else { second[l] };
                first[l] = if score < first[l] { score } else { first[l] };
            }
        }
        for (l, (b, q)) in biases.remainder().iter().zip(all.remainder()).enumerate() {
            let score = b - q;
            second[l] = second[l].min(first[l].max(score));
            first[l] = first[l].min(score);
        }
        let mut width = WIDTH / 2;
        while width > 0 {
            for l in 0..width {
                let loser = first[l].max(first[l + width]);
                second[l] = second[l].min(second[l + width]).min(loser);
                first[l] = first[l].min(first[l + width]);
            }
            width /= 2;
        }
        (first[0], second[0])
    }

    /// The first column where `bias - product` is `value`.
    pub fn find(bias: &[f32], products: &[f32], value: f32) -> Option<usize> {
        const WIDTH: usize = 32;
        let n = bias.len();
        let products = &products[..n];
        let mut start = 0;
        while start < n {
            let end = (start + WIDTH).min(n);
            let mut hit = false;
            for c in start..end {
                hit |= bias[c] - products[c] == value;
            }
            if hit {
                return (start..end).find(|&c| bias[c] - products[c] == value);
            }
            start = end;
        }
        None
    }

    /// The column with the smallest `bias - product`, the first of equals.
    pub fn arg_min(bias: &[f32], products: &[f32]) -> u32 {
        const WIDTH: usize = 16;
        let mut best = [f32::INFINITY; WIDTH];
        let mut at = [u32::MAX; WIDTH];
        let n = bias.len();
        let products = &products[..n];
        let mut start = 0;
        while start + WIDTH <= n {
            for l in 0..WIDTH {
                let score = bias[start + l] - products[start + l];
                let better = score < best[l];
                best[l] = if better { score } else { best[l] };
                at[l] = if better { (start + l) as u32 } else { at[l] };
            }
            start += WIDTH;
        }
        for l in 0..n - start {
            let score = bias[start + l] - products[start + l];
            if score < best[l] {
                best[l] = score;
                at[l] = (start + l) as u32;
            }
        }
        let mut winner = 0;
        for l in 1..WIDTH {
            if best[l] < best[winner] || (best[l] == best[winner] && at[l] < at[winner]) {
                winner = l;
            }
        }
        // A score that overflowed to infinity or NaN never wins; column 0 stands in.
        if at[winner] == u32::MAX { 0 } else { at[winner] }
    }

    /// One step of Welford's update of means and sums of squared deviations.
    pub fn welford(mean: &mut [f64], m2: &mut [f64], x: &[f32], inverse_count: f64) {
        for ((m, s), &v) in mean.iter_mut().zip(m2).zip(x) {
            let v = f64::from(v);
            let before = v - *m;
            *m += before * inverse_count;
            *s += before * (v - *m);
        }
    }

    /// `key = max(key, order(x))` and `widest = max(widest, |x|)` on the bits of f16 or bf16 of several tokens,
    /// where `order` maps them to integers of the same order.
    pub fn max_half(key: &mut [i16], tokens: [&[u16]; TOKENS], widest: u16) -> u16 {
        let tokens = tokens.map(|token| &token[..key.len()]);
        let mut widest = widest;
        for (j, key) in key.iter_mut().enumerate() {
            for token in tokens {
                widest = widest.max(token[j] & 0x7fff);
                let v = token[j] as i16;
                *key = (*key).max(v ^ ((v >> 15) & 0x7fff));
            }
        }
        widest
    }

    /// The same for the bits of f32.
    pub fn max_single(key: &mut [i32], tokens: [&[u32]; TOKENS], widest: u32) -> u32 {
        let tokens = tokens.map(|token| &token[..key.len()]);
        let mut widest = widest;
        for (j, key) in key.iter_mut().enumerate() {
            for token in tokens {
                widest = widest.max(token[j] & 0x7fff_ffff);
                let v = token[j] as i32;
                *key = (*key).max(v ^ ((v >> 31) & 0x7fff_ffff));
            }
        }
        widest
    }
}

/// Whether a squared distance, as the difference of the sum of two squared norms and twice a product, has lost
/// less than two bits.
#[inline(always)]
pub(crate) fn is_precise(square: f32, sum: f32) -> bool {
    square >= 0.25 * sum
}

/// Converts half precision; exact.
pub(crate) fn widen_f16(x: &[f16], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if active_isa().has_avx512() {
        // SAFETY: `active_isa` returns only what this processor has.
        return unsafe { widen_f16_avx512(x, out) };
    }
    x.convert_to_f32_slice(out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn widen_f16_avx512(x: &[f16], out: &mut [f32]) {
    use core::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps, _mm512_storeu_ps};
    const WIDTH: usize = 16;
    assert_eq!(x.len(), out.len());
    let (mut from, mut to) = (x.chunks_exact(WIDTH), out.chunks_exact_mut(WIDTH));
    for (from, to) in (&mut from).zip(&mut to) {
        // SAFETY: both chunks hold one vector.
        unsafe {
            let half = _mm256_loadu_si256(from.as_ptr().cast());
            _mm512_storeu_ps(to.as_mut_ptr(), _mm512_cvtph_ps(half));
        }
    }
    for (v, o) in from.remainder().iter().zip(to.into_remainder()) {
        *o = v.to_f32();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_use_every_element() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let w: Vec<f64> = (0..n).map(|i| 2.0 * i as f64).collect();
            let squares = (0..n).map(|i| (i * i) as f64).sum::<f64>();
            assert_eq!(square_norm(&x), squares);
            assert_eq!(group_dot([&x; GROUP], &w), [2.0 * squares; GROUP]);
            assert_eq!(dot_f64(&w, &w), 4.0 * squares);
            assert_eq!(square_distance(&x, &vec![0.0; n]), squares);
            let mut sum = vec![0.0; n];
            assert_eq!(add_shifted(&mut sum, &x, &vec![0.0; n]), squares);
            assert!(sum.iter().zip(&x).all(|(s, &v)| *s == f64::from(v)));
        }
    }

    #[test]
    fn groups_give_the_bits_of_their_rows() {
        for n in [1, 31, 64, 77, 1000] {
            let x: Vec<f32> = (0..4 * n)
                .map(|i| ((i * 37) % 101) as f32 / 7.0 - 5.0)
                .collect();
            let w: Vec<f64> = (0..n).map(|i| ((i * 53) % 89) as f64 / 3.0 - 9.0).collect();
            let rows: [&[f32]; GROUP] = std::array::from_fn(|g| &x[g * n..(g + 1) * n]);
            let dots = group_dot(rows, &w);
            for (row, dot) in rows.into_iter().zip(dots) {
                let wide: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
                assert_eq!(dot, dot_f64(&wide, &w));
            }
            let (mut together, mut alone) = (w.clone(), w.clone());
            group_add_scaled(&mut together, dots, rows);
            for (row, factor) in rows.into_iter().zip(dots) {
                add_scaled(&mut alone, factor, row);
            }
            assert_eq!(together, alone);
        }
    }

    #[test]
    fn the_first_of_equal_columns_wins() {
        for n in [1, 5, 16, 17, 50] {
            for winner in 0..n {
                let mut products = vec![0.0; n];
                products[winner] = 1.0;
                products[n - 1] = 1.0;
                assert_eq!(arg_min(&vec![0.5; n], &products), winner as u32);
            }
        }
    }

    #[test]
    fn order_keys_sort_like_floats() {
        let mut key = [i16::MIN];
        let mut best = f32::NEG_INFINITY;
        for v in [-3.0f32, -5.0, -0.5, 0.25, -1.0, 7.0, 2.0] {
            max_half(&mut key, [&[bf16::from_f32(v).to_bits()]; TOKENS], 0);
            best = best.max(v);
            let k = key[0];
            let bits = (k ^ ((k >> 15) & 0x7fff)) as u16;
            assert_eq!(bf16::from_bits(bits).to_f32(), best);
        }
    }
}
