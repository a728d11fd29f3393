//! Two's-complement-like integers without and with a zero point.
//!
//! * `int b`: value `u - 2^(b-1)`. rtn: `s = absmax / (2^(b-1)-1)`, `u = clip(rint(w/s), +-(2^(b-1)-1)) + 2^(b-1)`. The
//!   lowest code, value `-2^(b-1)`, is legal in tensors from elsewhere; the quantiser does not emit it.
//! * `uint b`: value `u - z`. rtn: the range is extended to contain 0, `s = (max-min) / (2^b-1)`,
//!   `z = clip(rint(-min/s), 0, 2^b-1)`, `u = clip(rint(w/s) + z, 0, 2^b-1)`.
//!
//! # Two levels
//! With integer scales (`_si8`) a weight is `(u - z)*t*r`: `t` the integer of its group, from 1, and `r` the float32 of its
//! row, with `(u - z)*t` always within a byte, so that products sum int8 by int8 over all of K (arXiv 2405.04532,
//! section 4). rtn, with `s` the scale that a group asks for by the rules above: `int b`: `r = max(s)/T` with
//! `T = floor(128/2^(b-1))`; `uint b`: `r = absmax(row)/R` with `R = floor(127*(2^b-1)/2^b)`; then
//! `t = clip(rint(s/r), 1, T)`, codes and zero points as above at the scale `fl(t*r)`. The protective range: `z*t <= 128` and
//! `(2^b-1-z)*t <= 127` hold for the codes that rtn makes, and `u*t <= 255`; tensors from elsewhere are checked.
use super::lanes::{self, Grid, Level};
use super::{Codec, Element, Fit, ScaleType, Zero, ZeroKind};

#[derive(Debug)]
struct Int;

const fn int(name: &'static str, bits: u8) -> Element {
    Element { scales: scales(bits), ..Element::affine(name, bits, 1, 1 << (bits - 1), 1 << bits, 1, &Int) }
}

/// More bits leave too few integers between 1 and the largest inner scale.
const fn scales(bits: u8) -> &'static [ScaleType] {
    if bits <= 4 {
        &ScaleType::TWO_LEVEL
    } else {
        &ScaleType::ALL
    }
}

const fn uint(name: &'static str, bits: u8) -> Element {
    Element { zero: ZeroKind::PerGroup, scales: scales(bits), ..Element::affine(name, bits, 1, 0, 1 << bits, 0, &Int) }
}

/// `int2` to `int8`.
pub static INT: [Element; 7] =
    [int("int2", 2), int("int3", 3), int("int4", 4), int("int5", 5), int("int6", 6), int("int7", 7), int("int8", 8)];

/// `uint2` to `uint8`.
pub static UINT: [Element; 7] = [
    uint("uint2", 2),
    uint("uint3", 3),
    uint("uint4", 4),
    uint("uint5", 5),
    uint("uint6", 6),
    uint("uint7", 7),
    uint("uint8", 8),
];

impl Codec for Int {
    fn fit(&self, e: &Element, level: Level, x: &[f32], absmax: f32) -> Fit {
        if e.zero == ZeroKind::None {
            return Fit { scale: absmax / (e.levels / 2 - 1) as f32, low: 0.0 };
        }
        let (low, high) = lanes::range(level, x);
        Fit { scale: (high - low) / (e.levels - 1) as f32, low }
    }

    fn zero(&self, e: &Element, low: f32, scale: f32) -> Zero {
        match e.zero {
            ZeroKind::None => Zero::None,
            ZeroKind::PerGroup => {
                let z = (-low / scale).round_ties_even().clamp(0.0, (e.levels - 1) as f32);
                Zero::Int(z as u8)
            }
        }
    }

    fn encode(&self, e: &Element, level: Level, x: &[f32], s: f32, z: Zero, lowest: u8, out: &mut [u8]) -> f32 {
        if let Zero::Float(z) = z {
            return encode_float_zero(e, x, s, z, out);
        }
        lanes::encode_near(level, x, grid(e, s, z, lowest), out)
    }

    fn cost(&self, e: &Element, level: Level, x: &[f32], s: f32, z: Zero) -> f32 {
        lanes::cost(level, false, x, grid(e, s, z, e.lowest))
    }

    fn shrinks(&self, e: &Element) -> &'static [f32] {
        match e.bits {
            2 => &[0.30, 0.36, 0.42, 0.48, 0.54, 0.61, 0.69, 0.78, 0.88],
            3 => &[0.46, 0.52, 0.58, 0.64, 0.70, 0.76, 0.82, 0.88, 0.94],
            4 => &[0.60, 0.66, 0.71, 0.76, 0.80, 0.84, 0.88, 0.92, 0.96],
            5 => &[0.70, 0.75, 0.80, 0.84, 0.88, 0.91, 0.94, 0.97],
            _ => &[0.84, 0.88, 0.91, 0.94, 0.96, 0.98, 0.99],
        }
    }
}

fn grid(e: &Element, scale: f32, z: Zero, lowest: u8) -> Grid {
    let zero = match z {
        Zero::Int(z) => i32::from(z),
        Zero::None | Zero::Float(_) => e.sub(),
    };
    Grid { scale, zero, lo: i32::from(lowest), hi: e.levels as i32 - 1 }
}

/// Nearest code of `fma(u, s, -fl(s*z))`; imported tensors only, so it is plain.
fn encode_float_zero(e: &Element, x: &[f32], s: f32, z: f32, out: &mut [u8]) -> f32 {
    let shift = -(s * z);
    let top = (e.levels - 1) as f32;
    let mut worst = 0.0f32;
    for (o, &w) in out.iter_mut().zip(x) {
        let u = ((w - shift) / s).round_ties_even().clamp(0.0, top);
        *o = u as u8;
        worst = worst.max((w - u.mul_add(s, shift)).abs());
    }
    worst
}
