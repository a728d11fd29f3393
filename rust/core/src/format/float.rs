//! Small floats and powers of two.
//!
//! `e<E>m<M>`: a sign bit, E exponent bits with bias `2^(E-1) - 1`, M mantissa bits; exponent 0 is subnormal. Three follow
//! their standards at the top: `e4m3` (OCP) has NaN at `0x7f` and `0xff`, `e5m2` and `e3m4` give the highest exponent to
//! infinity and NaN as IEEE does; such codes decode, no quantiser makes them. The others have finite values alone.
//!
//! `pow2_<b>`: a sign bit and `b - 1` bits `v`: 0 for `v = 0`, else `2^(v - (2^(b-1) - 1))`, so that 1 is the largest.
//!
//! rtn: `s = absmax / largest`, the nearest value of `w/s`, ties to the even code. -0 is kept.
use super::book::TWO_BYTES;
use super::{Book, Codec, Element, Fit, Level, Tie, FLOAT, INTEGER};
use std::sync::LazyLock;

#[derive(Debug)]
pub(super) struct Float;

impl Codec for Float {
    fn fit(&self, e: &Element, _: Level, _: &[f32], absmax: f32) -> Fit {
        Fit { scale: absmax / e.top(), low: 0.0 }
    }

    fn shrinks(&self, e: &Element) -> &'static [f32] {
        match e.bits {
            3 => &[0.46, 0.52, 0.58, 0.64, 0.70, 0.76, 0.82, 0.88, 0.94],
            4 => &[0.60, 0.66, 0.71, 0.76, 0.80, 0.84, 0.88, 0.92, 0.96],
            _ => &[0.70, 0.75, 0.80, 0.84, 0.88, 0.91, 0.94, 0.97],
        }
    }
}

/// What the highest exponent stands for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Top {
    /// Numbers.
    Finite,
    /// Numbers, but NaN where all bits are set.
    Nan,
    /// Infinity and NaN.
    Ieee,
}

/// The value of code `u`.
fn value(exponent: u32, mantissa: u32, top: Top, u: usize) -> f32 {
    let m = u & ((1 << mantissa) - 1);
    let e = (u >> mantissa) & ((1 << exponent) - 1);
    let negative = u >> (mantissa + exponent) == 1;
    let bias = (1 << (exponent - 1)) - 1;
    let highest = e == (1 << exponent) - 1;
    let magnitude = match top {
        Top::Nan if highest && m == (1 << mantissa) - 1 => f32::NAN,
        Top::Ieee if highest && m > 0 => f32::NAN,
        Top::Ieee if highest => f32::INFINITY,
        _ => {
            let (whole, power) = if e == 0 { (m, 1 - bias) } else { (m + (1 << mantissa), e as i32 - bias) };
            whole as f32 * 2f32.powi(power - mantissa as i32)
        }
    };
    if negative {
        -magnitude
    } else {
        magnitude
    }
}

pub(super) fn book(exponent: u32, mantissa: u32, top: Top, unit: f32) -> Book {
    let values: Vec<f32> =
        (0..1 << (1 + exponent + mantissa)).map(|u| value(exponent, mantissa, top, u) * unit).collect();
    // 16 times E3M2 are integers up to 448, halves of which are bytes.
    let most = if (exponent, mantissa) == (3, 2) { TWO_BYTES } else { 127.0 };
    Book::with_integers(&values, Tie::Even, most)
}

macro_rules! floats {
    ($($id:ident $name:literal: $e:literal, $m:literal, $top:ident, $computes:ident;)*) => {
        $( pub(super) static $id: LazyLock<Book> = LazyLock::new(|| book($e, $m, Top::$top, 1.0)); )*
        /// `e2m0` to `e5m2`.
        pub static ROWS: [Element; [$($e),*].len()] =
            [$( Element::table($name, 1 + $e + $m, &$id, $computes, &Float) ),*];
    };
}
floats! {
    E2M0 "e2m0": 2, 0, Finite, INTEGER;
    E2M1 "e2m1": 2, 1, Finite, INTEGER;
    E3M0 "e3m0": 3, 0, Finite, INTEGER;
    E2M2 "e2m2": 2, 2, Finite, INTEGER;
    E3M1 "e3m1": 3, 1, Finite, FLOAT;
    E2M3 "e2m3": 2, 3, Finite, INTEGER;
    E3M2 "e3m2": 3, 2, Finite, INTEGER;
    E3M3 "e3m3": 3, 3, Finite, FLOAT;
    E3M4 "e3m4": 3, 4, Ieee, FLOAT;
    E4M3 "e4m3": 4, 3, Nan, FLOAT;
    E5M2 "e5m2": 5, 2, Ieee, FLOAT;
}

macro_rules! powers {
    ($($id:ident $name:literal: $bits:literal, $computes:ident;)*) => {
        $( static $id: LazyLock<Book> = LazyLock::new(|| {
            // The largest exponent of the float is `2^(b-1) - 1 - bias`; it becomes 0.
            book($bits - 1, 0, Top::Finite, 2f32.powi(-(1 << ($bits - 2))))
        }); )*
        /// `pow2_3` to `pow2_6`.
        pub static POW2: [Element; [$($bits),*].len()] =
            [$( Element::table($name, $bits, &$id, $computes, &Float) ),*];
    };
}
powers! {
    POW2_3 "pow2_3": 3, INTEGER;
    POW2_4 "pow2_4": 4, INTEGER;
    POW2_5 "pow2_5": 5, FLOAT;
    POW2_6 "pow2_6": 6, FLOAT;
}
