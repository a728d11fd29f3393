//! The inner loops of the formats, compiled once per vector level.
//!
//! Each loop is written once over 16 lanes and instantiated with the instructions of each level. Every lane does the
//! same IEEE operations in the same order at every level, so the results are identical bit for bit.

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
    /// The best level of this machine.
    pub fn detect() -> Self {
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
        [Self::Base, Self::Avx2, Self::Avx512].into_iter().filter(|&l| l <= Self::detect())
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
                debug_assert!(level <= Level::detect());
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
        let mut c = [0.0; LANES];
        c[..rest.len()].copy_from_slice(rest);
        f(&c);
    }
}

/// Bits of the largest magnitude: `0x7f80_0000` or more says that some value is not finite.
#[inline(always)]
fn absmax_bits_body(x: &[f32]) -> u32 {
    let mut m = [0u32; LANES];
    by_chunk(x, |c| {
        for j in 0..LANES {
            m[j] = m[j].max(c[j].to_bits() & 0x7fff_ffff);
        }
    });
    m.into_iter().fold(0, u32::max)
}
per_level! {
    /// Bits of the largest magnitude of `x`; `0x7f80_0000` or more when some value is not finite.
    absmax_bits = absmax_bits_body(x: &[f32]) -> u32
}

#[inline(always)]
fn range_body(x: &[f32]) -> (f32, f32) {
    let (mut lo, mut hi) = ([0.0f32; LANES], [0.0f32; LANES]);
    by_chunk(x, |c| {
        for j in 0..LANES {
            lo[j] = min(c[j], lo[j]);
            hi[j] = max(c[j], hi[j]);
        }
    });
    (lo.into_iter().fold(0.0, min), hi.into_iter().fold(0.0, max))
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

#[inline(always)]
fn tree(mut s: [f64; LANES]) -> f64 {
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
    let one = |x: f32| {
        let v = if ODD { near_odd(x / s, lo, hi) } else { near(x / s, lo, hi) };
        let u = if ODD { (int(v) + sub) >> 1 } else { int(v) + sub };
        (u as u8, (x - v * s).abs())
    };
    let mut worst = [0.0f32; LANES];
    let mut codes = out.chunks_exact_mut(LANES);
    let mut values = x.chunks_exact(LANES);
    for (c, o) in (&mut values).zip(&mut codes) {
        for j in 0..LANES {
            let (u, e) = one(c[j]);
            o[j] = u;
            worst[j] = max(e, worst[j]);
        }
    }
    for (c, o) in values.remainder().iter().zip(codes.into_remainder()) {
        let (u, e) = one(*c);
        *o = u;
        worst[0] = max(e, worst[0]);
    }
    worst.into_iter().fold(0.0, max)
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

/// Sum of squared errors, in squares of the scale. Uses the reciprocal: enough to rank candidates.
#[inline(always)]
fn cost_generic<const ODD: bool>(x: &[f32], g: Grid) -> f32 {
    let inv = 1.0 / g.scale;
    let step = if ODD { 2 } else { 1 };
    let sub = if ODD { g.lo + g.hi } else { g.zero };
    let (lo, hi) = ((step * g.lo - sub) as f32, (step * g.hi - sub) as f32);
    let one = |x: f32| {
        let t = x * inv;
        let v = if ODD { min(max(2.0 * rint(min(max(t, lo), hi) * 0.5 - 0.5) + 1.0, lo), hi) } else { near(t, lo, hi) };
        (t - v) * (t - v)
    };
    let mut sum = [0.0f32; LANES];
    let mut values = x.chunks_exact(LANES);
    for c in &mut values {
        for j in 0..LANES {
            sum[j] += one(c[j]);
        }
    }
    for (j, c) in values.remainder().iter().enumerate() {
        sum[j] += one(*c);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for j in 0..half {
            sum[j] += sum[j + half];
        }
        half /= 2;
    }
    sum[0]
}

#[inline(always)]
fn cost_near_body(x: &[f32], g: Grid) -> f32 {
    cost_generic::<false>(x, g)
}
per_level! {
    /// Squared error of `x` on the grid, for ranking.
    cost_near = cost_near_body(x: &[f32], g: Grid) -> f32
}

#[inline(always)]
fn cost_odd_body(x: &[f32], g: Grid) -> f32 {
    cost_generic::<true>(x, g)
}
per_level! {
    /// As [`cost_near`] for odd values.
    cost_odd = cost_odd_body(x: &[f32], g: Grid) -> f32
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
fn affine_float_body(u: &[u8], s: f32, t: f32, out: &mut [f32]) {
    for (o, &u) in out.iter_mut().zip(u) {
        *o = f32::from(u).mul_add(s, t);
    }
}
per_level! {
    /// `out = fma(f32(u), s, t)`.
    affine_float = affine_float_body(u: &[u8], s: f32, t: f32, out: &mut [f32]) -> ()
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
