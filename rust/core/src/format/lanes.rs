//! The inner loops of the formats, compiled once per vector level.
//!
//! Each loop is written once over 16 lanes and instantiated with the instructions of each level. Every lane does the
//! same IEEE operations in the same order at every level, so the results are identical bit for bit.

use std::ops::AddAssign;

/// Lanes of every loop, whatever the register width.
pub const LANES: usize = 16;

/// Adding and subtracting 1.5 * 2^23 rounds a float below 2^22 to an integer, ties to even; before the subtraction the
/// integer stands in the low bits.
const MAGIC: f32 = 12_582_912.0;

/// Instructions the loops may use. Results do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the target has everywhere.
    Base,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
}

impl Level {
    /// The level in use: the best of this machine, or what [`crate::isa::active`] leaves of it.
    pub fn detect() -> Self {
        use crate::isa::{active, Isa};
        match active() {
            Isa::Scalar => Self::Base,
            Isa::Avx2 | Isa::AvxVnni => Self::Avx2.min(Self::best()),
            Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => Self::best(),
        }
    }

    /// The best level of this machine.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma");
            if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Base
    }

    /// Every level this machine can run, lowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        [Self::Base, Self::Avx2, Self::Avx512].into_iter().filter(|&l| l <= Self::best())
    }
}

/// Defines `$name(level, args)` from the portable `$body(args)`.
macro_rules! per_level {
    ($(#[$doc:meta])* $name:ident = $body:ident($($arg:ident: $ty:ty),*) -> $ret:ty) => {
        $(#[$doc])*
        pub fn $name(level: Level, $($arg: $ty),*) -> $ret {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
                fn avx512($($arg: $ty),*) -> $ret {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) -> $ret {
                    $body($($arg),*)
                }
                debug_assert!(level <= Level::best());
                match level {
                    // SAFETY: the level is handed out by `detect` and `available` only, after the features were seen.
                    Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Level::Avx2 => return unsafe { avx2($($arg),*) },
                    Level::Base => {}
                }
            }
            let _ = level;
            $body($($arg),*)
        }
    };
}

pub(crate) use per_level;

#[inline(always)]
fn min(a: f32, b: f32) -> f32 {
    if a < b {
        a
    } else {
        b
    }
}

#[inline(always)]
fn max(a: f32, b: f32) -> f32 {
    if a > b {
        a
    } else {
        b
    }
}

/// Calls `f` with each 16 values of `x`; the last ones are filled up with zeros.
#[inline(always)]
fn by_chunk(x: &[f32], mut f: impl FnMut(&[f32; LANES])) {
    let mut chunks = x.chunks_exact(LANES);
    for c in &mut chunks {
        if let Ok(c) = c.try_into() {
            f(c);
        }
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        f(&padded(rest));
    }
}

/// Fewer than 16 values, filled up with zeros.
#[inline(always)]
fn padded(rest: &[f32]) -> [f32; LANES] {
    let mut c = [0.0; LANES];
    if let Ok(eight) = <&[f32; 8]>::try_from(rest) {
        c[..8].copy_from_slice(eight);
    } else {
        c[..rest.len()].copy_from_slice(rest);
    }
    c
}

/// Bits of the largest magnitude: `0x7f80_0000` or more says that some value is not finite.
#[inline(always)]
fn absmax_bits_body(x: &[f32]) -> u32 {
    x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff))
}
per_level! {
    /// Bits of the largest magnitude of `x`; `0x7f80_0000` or more when some value is not finite.
    absmax_bits = absmax_bits_body(x: &[f32]) -> u32
}

#[inline(always)]
fn range_body(x: &[f32]) -> (f32, f32) {
    // As integers, floats without a sign are in order and those with one are below 0: integer maxima need no order.
    let (mut lo, mut hi) = (0i32, 0i32);
    for v in x {
        let bits = v.to_bits();
        hi = hi.max(bits as i32);
        lo = lo.max((bits ^ 0x8000_0000) as i32);
    }
    (-f32::from_bits(lo as u32), f32::from_bits(hi as u32))
}
per_level! {
    /// Smallest and largest of the values and 0.
    range = range_body(x: &[f32]) -> (f32, f32)
}

#[inline(always)]
fn abs_sum_body(x: &[f32]) -> f64 {
    let mut sum = [0.0f64; LANES];
    by_chunk(x, |c| {
        for j in 0..LANES {
            sum[j] += f64::from(c[j].abs());
        }
    });
    tree(sum)
}
per_level! {
    /// Sum of magnitudes: lane `j` adds the values `16 i + j` in order, then lanes `j` and `j + 8` are added, then
    /// `j` and `j + 4`, `j + 2`, `j + 1`.
    abs_sum = abs_sum_body(x: &[f32]) -> f64
}

/// The sum of lanes: halves are added lane by lane until one is left.
#[inline(always)]
pub fn tree<T: Copy + AddAssign>(mut s: [T; LANES]) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for j in 0..half {
            s[j] += s[j + half];
        }
        half /= 2;
    }
    s[0]
}

/// How values become codes: `u = clip(round(w / s) + zero, lo, hi)` in units of the code.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// The rounded scale, as stored; not 0.
    pub scale: f32,
    /// Code of the value 0: `2^(b-1)` for int, the zero point for uint, 1 for ternary.
    pub zero: i32,
    /// Lowest code.
    pub lo: i32,
    /// Highest code.
    pub hi: i32,
}

/// Rounds to the nearest integer, ties to even; |t| < 2^22.
#[inline(always)]
fn rint(t: f32) -> f32 {
    (t + MAGIC) - MAGIC
}

/// The integer value of a rounded float.
#[inline(always)]
fn int(r: f32) -> i32 {
    (r + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

/// Nearest grid value of `t = w/s` in steps: rint.
#[inline(always)]
fn near(t: f32, lo: f32, hi: f32) -> f32 {
    rint(min(max(t, lo), hi))
}

/// Nearest odd integer of `t`, ties upward (0 gives +1): `floor(t) | 1`, clipped to the odd `lo..=hi`.
#[inline(always)]
fn near_odd(t: f32, lo: f32, hi: f32) -> f32 {
    let t = min(max(t, lo), hi);
    let r = rint(t);
    let floor = if r > t { r - 1.0 } else { r };
    let half = rint(floor * 0.5 - 0.25);
    2.0 * half + 1.0
}

#[inline(always)]
fn encode_generic<const ODD: bool>(x: &[f32], g: Grid, out: &mut [u8]) -> f32 {
    let s = g.scale;
    let step = if ODD { 2 } else { 1 };
    // Value of code u is step*u - sub; for odd values `zero` is not used.
    let sub = if ODD { g.lo + g.hi } else { g.zero };
    let (lo, hi) = ((step * g.lo - sub) as f32, (step * g.hi - sub) as f32);
    // The largest of numbers without a sign is the largest of their bits, a sum the compiler may reorder.
    let mut worst = 0;
    for (o, &x) in out.iter_mut().zip(x) {
        let v = if ODD { near_odd(x / s, lo, hi) } else { near(x / s, lo, hi) };
        worst = worst.max((x - v * s).abs().to_bits());
        *o = if ODD { (int(v) + sub) >> 1 } else { int(v) + sub } as u8;
    }
    f32::from_bits(worst)
}

#[inline(always)]
fn encode_near_body(x: &[f32], g: Grid, out: &mut [u8]) -> f32 {
    encode_generic::<false>(x, g, out)
}
per_level! {
    /// Codes of `x` on the grid, ties to even; returns the largest `fl(|w - decoded|)`.
    encode_near = encode_near_body(x: &[f32], g: Grid, out: &mut [u8]) -> f32
}

#[inline(always)]
fn encode_odd_body(x: &[f32], g: Grid, out: &mut [u8]) -> f32 {
    encode_generic::<true>(x, g, out)
}
per_level! {
    /// As [`encode_near`] for odd values, ties upward.
    encode_odd = encode_odd_body(x: &[f32], g: Grid, out: &mut [u8]) -> f32
}

#[inline(always)]
fn encode_long_body(x: &[f32], g: Grid, out: &mut [u8]) -> f32 {
    let (lo, hi) = ((g.lo - g.zero) as f32, (g.hi - g.zero) as f32);
    let mut worst = 0;
    for (o, &x) in out.chunks_exact_mut(2).zip(x) {
        let v = near(x / g.scale, lo, hi);
        worst = worst.max((x - v * g.scale).abs().to_bits());
        o.copy_from_slice(&((int(v) + g.zero) as u16).to_le_bytes());
    }
    f32::from_bits(worst)
}
per_level! {
    /// As [`encode_near`] for codes of two bytes.
    encode_long = encode_long_body(x: &[f32], g: Grid, out: &mut [u8]) -> f32
}

/// Sum of squared errors of `x` on the grid in squares of the scale, for ranking: it uses the reciprocal of the scale.
/// Lane `j` adds the values `16 i + j`; the lanes are added as in [`abs_sum`].
///
/// Written with intrinsics, because a float sum by lanes is not vectorised from loops.
pub fn cost(level: Level, odd: bool, x: &[f32], g: Grid) -> f32 {
    let (step, sub) = if odd { (2, g.lo + g.hi) } else { (1, g.zero) };
    let c = Cost { odd, inv: 1.0 / g.scale, lo: (step * g.lo - sub) as f32, hi: (step * g.hi - sub) as f32 };
    debug_assert!(level <= Level::best());
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level is handed out by `detect` and `available` only, after the features were seen.
        Level::Avx512 => unsafe { cost_avx512(x, c) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { cost_avx2(x, c) },
        _ => cost_base(x, c),
    }
}

#[derive(Clone, Copy)]
struct Cost {
    odd: bool,
    inv: f32,
    lo: f32,
    hi: f32,
}

fn cost_base(x: &[f32], c: Cost) -> f32 {
    let mut sum = [0.0f32; LANES];
    for x in x.chunks(LANES) {
        for (sum, x) in sum.iter_mut().zip(x) {
            let t = x * c.inv;
            let v = if c.odd { near_odd(t, c.lo, c.hi) } else { near(t, c.lo, c.hi) };
            *sum += (t - v) * (t - v);
        }
    }
    tree(sum)
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Adds the upper half of four lanes to the lower, then the second lane to the first.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn add_four(s: __m128) -> f32 {
    let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn cost_avx512(x: &[f32], c: Cost) -> f32 {
    let (inv, lo, hi) = (_mm512_set1_ps(c.inv), _mm512_set1_ps(c.lo), _mm512_set1_ps(c.hi));
    let (magic, one) = (_mm512_set1_ps(MAGIC), _mm512_set1_ps(1.0));
    let (half, quarter) = (_mm512_set1_ps(0.5), _mm512_set1_ps(0.25));
    let mut sum = _mm512_setzero_ps();
    for x in x.chunks(LANES) {
        let mask = (0xffffu32 >> (LANES - x.len())) as __mmask16;
        // SAFETY: the mask keeps the load within the chunk.
        let t = _mm512_mul_ps(unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) }, inv);
        let clip = _mm512_min_ps(_mm512_max_ps(t, lo), hi);
        let mut v = _mm512_sub_ps(_mm512_add_ps(clip, magic), magic);
        if c.odd {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(v, clip);
            let floor = _mm512_mask_sub_ps(v, above, v, one);
            let h = _mm512_sub_ps(_mm512_mul_ps(floor, half), quarter);
            let h = _mm512_sub_ps(_mm512_add_ps(h, magic), magic);
            v = _mm512_add_ps(_mm512_add_ps(h, h), one);
        }
        let e = _mm512_sub_ps(t, v);
        sum = _mm512_mask_add_ps(sum, mask, sum, _mm512_mul_ps(e, e));
    }
    let s = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps::<1>(sum));
    add_four(_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s)))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn cost_avx2(x: &[f32], c: Cost) -> f32 {
    let (inv, lo, hi) = (_mm256_set1_ps(c.inv), _mm256_set1_ps(c.lo), _mm256_set1_ps(c.hi));
    let (magic, one) = (_mm256_set1_ps(MAGIC), _mm256_set1_ps(1.0));
    let (half, quarter) = (_mm256_set1_ps(0.5), _mm256_set1_ps(0.25));
    let mut sum = [_mm256_setzero_ps(); 2];
    for x in x.chunks(LANES) {
        let full = if let Ok(x) = <&[f32; LANES]>::try_from(x) { *x } else { padded(x) };
        for j in 0..2 {
            // SAFETY: both halves lie within the sixteen values.
            let t = _mm256_mul_ps(unsafe { _mm256_loadu_ps(full.as_ptr().add(8 * j)) }, inv);
            let clip = _mm256_min_ps(_mm256_max_ps(t, lo), hi);
            let mut v = _mm256_sub_ps(_mm256_add_ps(clip, magic), magic);
            if c.odd {
                let above = _mm256_cmp_ps::<_CMP_GT_OQ>(v, clip);
                let floor = _mm256_sub_ps(v, _mm256_and_ps(above, one));
                let h = _mm256_sub_ps(_mm256_mul_ps(floor, half), quarter);
                let h = _mm256_sub_ps(_mm256_add_ps(h, magic), magic);
                v = _mm256_add_ps(_mm256_add_ps(h, h), one);
            }
            let e = _mm256_sub_ps(t, v);
            let mut square = _mm256_mul_ps(e, e);
            if x.len() < LANES {
                let lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(8 * j as i32));
                let used = _mm256_cmpgt_epi32(_mm256_set1_epi32(x.len() as i32), lane);
                square = _mm256_and_ps(square, _mm256_castsi256_ps(used));
            }
            sum[j] = _mm256_add_ps(sum[j], square);
        }
    }
    let s = _mm256_add_ps(sum[0], sum[1]);
    add_four(_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s)))
}

#[inline(always)]
fn square_error_body(x: &[f32], y: &[f32]) -> f64 {
    let mut sum = [0.0f64; LANES];
    let one = |x: f32, y: f32| (f64::from(x) - f64::from(y)) * (f64::from(x) - f64::from(y));
    let (mut xs, mut ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    for (x, y) in (&mut xs).zip(&mut ys) {
        for j in 0..LANES {
            sum[j] += one(x[j], y[j]);
        }
    }
    for (j, (x, y)) in xs.remainder().iter().zip(ys.remainder()).enumerate() {
        sum[j] += one(*x, *y);
    }
    tree(sum)
}
per_level! {
    /// Sum of squared differences, in f64.
    square_error = square_error_body(x: &[f32], y: &[f32]) -> f64
}

#[inline(always)]
fn affine_body(u: &[u8], mul: i32, sub: i32, s: f32, out: &mut [f32]) {
    for (o, &u) in out.iter_mut().zip(u) {
        *o = (mul * i32::from(u) - sub) as f32 * s;
    }
}
per_level! {
    /// `out = fl(f32(mul*u - sub) * s)`.
    affine = affine_body(u: &[u8], mul: i32, sub: i32, s: f32, out: &mut [f32]) -> ()
}

#[inline(always)]
fn affine_long_body(u: &[u8], sub: i32, s: f32, out: &mut [f32]) {
    for (o, u) in out.iter_mut().zip(u.chunks_exact(2)) {
        *o = (i32::from(u16::from_le_bytes([u[0], u[1]])) - sub) as f32 * s;
    }
}
per_level! {
    /// `out = fl(f32(u - sub) * s)` for codes of two bytes.
    affine_long = affine_long_body(u: &[u8], sub: i32, s: f32, out: &mut [f32]) -> ()
}

#[inline(always)]
fn affine_float_body(u: &[u8], s: f32, t: f32, out: &mut [f32]) {
    for (o, &u) in out.iter_mut().zip(u) {
        *o = f32::from(u).mul_add(s, t);
    }
}
per_level! {
    /// `out = fma(f32(u), s, t)`.
    affine_float = affine_float_body(u: &[u8], s: f32, t: f32, out: &mut [f32]) -> ()
}

/// Codes of 16 numbers in steps of the scale: places among the sorted values of a table.
#[inline(always)]
fn places(t: &[f32; LANES], cuts: &[i32]) -> [i32; LANES] {
    let mut keys = [0i32; LANES];
    for j in 0..LANES {
        keys[j] = super::book::key(t[j]);
    }
    super::book::place(&keys, cuts)
}

#[inline(always)]
fn book_encode_body(x: &[f32], s: f32, cuts: &[i32], order: &[u8], sorted: &[f32], out: &mut [u8]) -> f32 {
    let mut worst = 0;
    for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
        let full = if let Ok(x) = <&[f32; LANES]>::try_from(x) { *x } else { padded(x) };
        let mut t = full;
        for t in &mut t {
            *t /= s;
        }
        let at = places(&t, cuts);
        for (j, (o, &x)) in out.iter_mut().zip(x).enumerate() {
            let i = at[j] as usize;
            *o = order[i];
            worst = worst.max((x - sorted[i] * s).abs().to_bits());
        }
    }
    f32::from_bits(worst)
}
per_level! {
    /// Codes of the nearest values of a table; returns the largest `fl(|w - decoded|)`.
    book_encode =
        book_encode_body(x: &[f32], s: f32, cuts: &[i32], order: &[u8], sorted: &[f32], out: &mut [u8]) -> f32
}

#[inline(always)]
fn book_cost_body(x: &[f32], inv: f32, cuts: &[i32], sorted: &[f32]) -> f32 {
    let mut sum = [0.0f32; LANES];
    for x in x.chunks(LANES) {
        let full = if let Ok(x) = <&[f32; LANES]>::try_from(x) { *x } else { padded(x) };
        let mut t = full;
        for t in &mut t {
            *t *= inv;
        }
        let at = places(&t, cuts);
        for j in 0..x.len() {
            let d = t[j] - sorted[at[j] as usize];
            sum[j] += d * d;
        }
    }
    tree(sum)
}
per_level! {
    /// As [`cost`] for the values of a table.
    book_cost = book_cost_body(x: &[f32], inv: f32, cuts: &[i32], sorted: &[f32]) -> f32
}

#[inline(always)]
fn book_decode_body(u: &[u8], values: &[f32; 256], s: f32, out: &mut [f32]) {
    for (o, &u) in out.iter_mut().zip(u) {
        *o = values[usize::from(u)] * s;
    }
}
per_level! {
    /// `out = fl(values[u] * s)`.
    book_decode = book_decode_body(u: &[u8], values: &[f32; 256], s: f32, out: &mut [f32]) -> ()
}

#[inline(always)]
fn pack_body(bits: u8, codes: &[u8], out: &mut [u8]) {
    crate::bits::pack_inline(bits, codes, out);
}
per_level! {
    /// [`crate::bits::pack`].
    pack = pack_body(bits: u8, codes: &[u8], out: &mut [u8]) -> ()
}

#[inline(always)]
fn unpack_body(bits: u8, bytes: &[u8], out: &mut [u8]) {
    crate::bits::unpack_inline(bits, bytes, out);
}
per_level! {
    /// [`crate::bits::unpack`].
    unpack = unpack_body(bits: u8, bytes: &[u8], out: &mut [u8]) -> ()
}
