//! Blocks that share a power of two: block floating point and the OCP microscaling formats.
//!
//! Scales are one byte, E8M0: `2^(e - 127)` for `e` from 0 to 254; 255 is NaN.
//!
//! * `bfp<b>`: integers of b bits, without the lowest, times `2^(E - (b - 2))` with `E = floor(log2(absmax))` in the scale.
//!   A value that rounds to `2^(b-1)` becomes the largest integer.
//! * `dfp<b>`: the same with one `E` for the whole tensor, repeated for each row.
//! * `mxfp4`, `mxfp6_e3m2`, `mxfp6_e2m3`, `mxfp8_e4m3`, `mxfp8_e5m2`: small floats times the scale.
//! * `mxint8`: integers of 8 bits times `2^-6` and the scale. The code -128 is legal and never made.
//!
//! * `nvfp4`: `e2m1` times a scale of type E4M3 times a float32 `g` of the whole tensor. rtn: `g = absmax(tensor)/2688`, so
//!   that the largest scale is 448; the scale of a group is `absmax/6/g`, rounded, at least `2^-9`. The scale that values
//!   meet is `fl(scale * g)`; integer products apply `g` last.
//!
//! Groups are 16 (bfp, nvfp4) or 32 (MX) values unless the name says otherwise. With `emax` the exponent of the largest
//! value of the element and `max` that value, the scale is, by the mode in the name of an MX format,
//!
//! ```text
//! floor (left out)  2^(floor(log2 absmax) - emax)
//! rceil             the least power of two 2^k with max * 2^k >= absmax
//! ceil              2^(ceil(log2 absmax) - emax)
//! even              as floor, absmax first rounded half up to the mantissa of the element
//! ```
//!
//! within the range of E8M0. Values are divided by it and rounded to the nearest, ties to even, the largest where
//! they are beyond. A group of zeros has the scale 1. In MX formats a group with a value that is not finite has the scale
//! NaN, and all of its numbers are NaN.
use super::float::{Float, E2M1, E2M3, E3M2, E4M3, E5M2};
use super::lanes::{self, Grid};
use super::{Codec, Element, Fit, Level, ScaleType, Zero, FLOAT, INTEGER};

/// How the power of two of a group is picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleMode {
    /// The exponent of the largest magnitude, less that of the element: the largest may be cut off.
    Floor,
    /// The least power of two that cuts nothing off.
    Rceil,
    /// As floor with the exponent rounded up.
    Ceil,
    /// As floor after rounding the largest magnitude to the element's mantissa.
    Even,
}

impl ScaleMode {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Floor, Self::Rceil, Self::Ceil, Self::Even];

    /// Name in the grammar; `floor` is left out when printing.
    pub fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Rceil => "rceil",
            Self::Ceil => "ceil",
            Self::Even => "even",
        }
    }

    /// The scale of a group whose largest magnitude is `absmax`, positive; `top` is the largest value of an element with
    /// `mantissa` bits.
    pub(crate) fn scale(self, absmax: f32, top: f32, mantissa: u32) -> f32 {
        let (a, t) = (floor_log2(absmax), floor_log2(top));
        let exponent = match self {
            Self::Floor => a,
            Self::Ceil => a + i32::from(power_f64(a) < f64::from(absmax)),
            Self::Rceil => a + i32::from(f64::from(top) * power_f64(a - t) < f64::from(absmax)),
            Self::Even => {
                // Half a step of the mantissa may carry into the exponent.
                let step = power_f64(a - mantissa as i32);
                let rounded = f64::from(absmax) + step / 2.0;
                a + i32::from(rounded >= power_f64(a + 1))
            }
        };
        power(exponent - t)
    }
}

/// `floor(log2 v)` of a positive, finite number.
pub(super) fn floor_log2(v: f32) -> i32 {
    let bits = v.to_bits();
    match bits >> 23 {
        0 => -118 - bits.leading_zeros() as i32,
        e => e as i32 - 127,
    }
}

/// `2^e`, `e` first brought into the range of E8M0.
pub(super) fn power(e: i32) -> f32 {
    e8m0((e.clamp(-127, 127) + 127) as u8)
}

fn power_f64(e: i32) -> f64 {
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// The number of an E8M0 byte.
pub fn e8m0(e: u8) -> f32 {
    match e {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        e => f32::from_bits(u32::from(e) << 23),
    }
}

/// The byte of a number that E8M0 has, or NaN.
pub fn e8m0_byte(s: f32) -> u8 {
    if s.is_nan() {
        255
    } else {
        (floor_log2(s) + 127).clamp(0, 254) as u8
    }
}

/// The number of an E4M3 byte.
pub fn e4m3(u: u8) -> f32 {
    E4M3.of_bytes()[usize::from(u)]
}

/// The nearest number of E4M3 to one that is not negative, ties to even; infinite from 464 on, which lies half-way to
/// what would be the next.
pub(super) fn e4m3_round(s: f32) -> f32 {
    if s >= 464.0 {
        return f32::INFINITY;
    }
    let step = power(floor_log2(s.max(f32::MIN_POSITIVE)).max(-6) - 3);
    (s / step).round_ties_even() * step
}

/// The byte of a number that E4M3 has, not negative.
pub fn e4m3_byte(s: f32) -> u8 {
    let step = floor_log2(s.max(f32::MIN_POSITIVE)).max(-6) - 3;
    let whole = (s / power(step)) as i32;
    (whole + 8 * (step + 9)) as u8
}

/// Integers of b bits, one power of two for all.
#[derive(Debug)]
struct Mantissas;

impl Codec for Mantissas {
    fn fit(&self, _: &Element, _: Level, _: &[f32], absmax: f32) -> Fit {
        Fit { scale: absmax, low: 0.0 }
    }

    fn encode(&self, e: &Element, level: Level, x: &[f32], s: f32, _: Zero, lowest: u8, out: &mut [u8]) -> f32 {
        if e.bits > 8 {
            return lanes::encode_long(level, x, grid(e, s, lowest), out);
        }
        lanes::encode_near(level, x, grid(e, s, lowest), out)
    }

    fn cost(&self, e: &Element, level: Level, x: &[f32], s: f32, _: Zero) -> f32 {
        lanes::cost(level, false, x, grid(e, s, e.lowest))
    }

    fn shrinks(&self, _: &Element) -> &'static [f32] {
        &[0.5, 2.0]
    }
}

fn grid(e: &Element, scale: f32, lowest: u8) -> Grid {
    Grid { scale, zero: e.sub(), lo: i32::from(lowest), hi: e.levels as i32 - 1 }
}

const fn mantissas(name: &'static str, bits: u8, group: u32) -> Element {
    let unit = 1.0 / (1 << (bits - 2)) as f32;
    Element {
        group: Some(group),
        scales: &[ScaleType::E8M0],
        unit,
        ..Element::affine(name, bits, 1, 1 << (bits - 1), 1 << bits, 1, &Mantissas)
    }
}

/// Codes of more than a byte: products take the decoded floats, which are exact.
const fn long(name: &'static str, bits: u8) -> Element {
    Element { computes: FLOAT, ..mantissas(name, bits, 16) }
}

/// `bfp4` to `bfp16`.
pub static BFP: [Element; 13] = [
    mantissas("bfp4", 4, 16),
    mantissas("bfp5", 5, 16),
    mantissas("bfp6", 6, 16),
    mantissas("bfp7", 7, 16),
    mantissas("bfp8", 8, 16),
    long("bfp9", 9),
    long("bfp10", 10),
    long("bfp11", 11),
    long("bfp12", 12),
    long("bfp13", 13),
    long("bfp14", 14),
    long("bfp15", 15),
    long("bfp16", 16),
];

/// `dfp8` and `dfp16`.
pub static DFP: [Element; 2] = [
    Element { shared: true, group: None, ..mantissas("dfp8", 8, 16) },
    Element { shared: true, group: None, ..long("dfp16", 16) },
];

/// Small floats that share a power of two.
#[derive(Debug)]
struct Shared;

impl Codec for Shared {
    fn fit(&self, _: &Element, _: Level, _: &[f32], absmax: f32) -> Fit {
        Fit { scale: absmax, low: 0.0 }
    }

    fn shrinks(&self, _: &Element) -> &'static [f32] {
        &[0.5, 2.0]
    }
}

/// `nvfp4`.
pub static NVFP4: [Element; 1] =
    [Element { group: Some(16), scales: &[ScaleType::E4M3], ..Element::table("nvfp4", 4, &E2M1, INTEGER, &Float) }];

#[allow(clippy::needless_pass_by_value)] // a reference to a constant would have to live as long as the row
const fn mx(mantissa: u32, row: Element) -> Element {
    Element { group: Some(32), scales: &[ScaleType::E8M0], nan: true, mantissa: Some(mantissa), ..row }
}

/// `mxfp4` to `mxint8`.
pub static MX: [Element; 6] = [
    mx(1, Element::table("mxfp4", 4, &E2M1, INTEGER, &Shared)),
    mx(2, Element::table("mxfp6_e3m2", 6, &E3M2, INTEGER, &Shared)),
    mx(3, Element::table("mxfp6_e2m3", 6, &E2M3, INTEGER, &Shared)),
    mx(3, Element::table("mxfp8_e4m3", 8, &E4M3, FLOAT, &Shared)),
    mx(2, Element::table("mxfp8_e5m2", 8, &E5M2, FLOAT, &Shared)),
    mx(6, mantissas("mxint8", 8, 32)),
];
