//! Fixed-point functions in 64-bit lanes whose low halves carry the numbers.
//!
//! A product of two 32-bit numbers is one instruction on every vector unit where both stand in the low halves of 64-bit
//! lanes. So values keep to such lanes, upper halves are don't-cares until [`low`], and shifts are logical: AVX2 has no
//! other. Polynomials beat tables here: a gather costs more than a dozen of these products.
use super::scale::Reach;

/// The fraction bits of polynomials.
pub(crate) const Q: u32 = 30;
/// One, in Q30.
pub(crate) const ONE: i64 = 1 << Q;
/// Fraction bits of exponents of two.
pub(crate) const EXPONENT: u32 = 26;

/// The number in the low half of a lane.
#[inline(always)]
pub(crate) fn low(v: i64) -> i64 {
    i64::from(v as i32)
}

/// Product of two Q30 numbers whose product lies in `[-2, 2)`.
#[inline(always)]
pub(crate) fn mul(a: i64, b: i64) -> i64 {
    ((low(a) * low(b)) as u64 >> Q) as i64
}

/// Horner's rule in Q30, coefficients in ascending order.
#[inline(always)]
fn polynomial<const N: usize>(c: &[i64; N], x: i64) -> i64 {
    let mut y = c[N - 1];
    for i in (0..N - 1).rev() {
        y = c[i] + mul(y, x);
    }
    low(y)
}

/// `2^-f` for f in `[0, 1)`: 1 and 1/2 at the ends, so that pieces meet; wrong by at most 2.4e-6.
const HALVING: [i64; 5] = [ONE, -744_180_573, 257_158_263, -57_204_807, 7_356_205];

/// `1 / (1 + e)` for e in `[0, 1]`: 1 at 0; wrong by at most 1.3e-6.
const RECIPROCAL: [i64; 8] =
    [ONE, -1_073_624_705, 1_070_418_559, -1_041_194_899, 916_285_514, -633_021_006, 282_103_845, -57_839_524];

/// Where [`gelu_short`] ends.
pub(crate) const GELU_END: u32 = 5;

/// `2^-t` in Q30 for t with [`EXPONENT`] fraction bits.
#[inline(always)]
fn halve(t: u32) -> i64 {
    let whole = t >> EXPONENT;
    let fraction = i64::from((t & ((1 << EXPONENT) - 1)) << (Q - EXPONENT));
    polynomial(&HALVING, fraction) >> whole.min(31)
}

/// `e^-(d * scale)` in Q30, for the reach of `scale * log2(e)`.
#[inline(always)]
pub(crate) fn decay(d: u32, reach: Reach) -> i64 {
    let t = (u64::from(d) * u64::from(reach.m)) >> reach.shift;
    let e = halve(t as u32);
    if d > reach.limit {
        0
    } else {
        e
    }
}

/// `1 / (1 + e)` in Q30, for e in `[0, 1]` in Q30.
#[inline(always)]
pub(crate) fn reciprocal(e: i64) -> i64 {
    polynomial(&RECIPROCAL, e)
}

/// Fraction bits of the arguments of [`gelu_short`].
pub(crate) const SHORT: u32 = 15;

/// `u * Phi(-u)` for `u = 2.5 (1 + w)`, w in `[-1, 1]`, in Q16; wrong by at most 1.7e-4.
const GELU_SHORT: [i32; 9] = [1009, -6093, 15713, -18079, -4976, 33968, -21092, -9794, 9348];

/// `u * Phi(-u)` in Q16, for `v = u / 5` in `[0, 1]` in Q15: all in 32-bit lanes, wrong by at most 3e-4.
#[inline(always)]
pub(crate) fn gelu_short(v: i32) -> i32 {
    let w = 2 * v - (1 << SHORT);
    let mut y = GELU_SHORT[8];
    for i in (0..8).rev() {
        y = GELU_SHORT[i] + ((y * w + (1 << (SHORT - 1))) >> SHORT);
    }
    y.max(0)
}
