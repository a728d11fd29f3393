//! Bits worth +-1: the value of code `u` is the odd integer `2u - (2^b - 1)`.
//!
//! rtn: `s = absmax / (2^b-1)` (`mean|w|` for one bit), and the nearest odd integer of `t = w/s`, ties upward:
//! `clip(floor(t) | 1)`, so 0 becomes +1. There is no code for 0: a group of zeros gets the smallest positive scale.
use super::lanes::{self, Grid, Level};
use super::{Codec, Element, Fit, Zero};

#[derive(Debug)]
struct Bipolar;

const fn row(name: &'static str, bits: u8) -> Element {
    Element::affine(name, bits, 2, (1 << bits) - 1, 1 << bits, 0, &Bipolar)
}

/// `bipolar1` to `bipolar8`.
pub static ROWS: [Element; 8] = [
    row("bipolar1", 1),
    row("bipolar2", 2),
    row("bipolar3", 3),
    row("bipolar4", 4),
    row("bipolar5", 5),
    row("bipolar6", 6),
    row("bipolar7", 7),
    row("bipolar8", 8),
];

fn grid(e: &Element, scale: f32, lowest: u8) -> Grid {
    Grid { scale, zero: 0, lo: i32::from(lowest), hi: e.levels as i32 - 1 }
}

impl Codec for Bipolar {
    fn fit(&self, e: &Element, level: Level, x: &[f32], absmax: f32) -> Fit {
        let scale = if e.bits == 1 { super::mean_abs(level, x) } else { absmax / (e.levels - 1) as f32 };
        Fit { scale, low: 0.0 }
    }

    fn has_zero(&self) -> bool {
        false
    }

    fn encode(&self, e: &Element, level: Level, x: &[f32], s: f32, _: Zero, lowest: u8, out: &mut [u8]) -> f32 {
        lanes::encode_odd(level, x, grid(e, s, lowest), out)
    }

    fn cost(&self, e: &Element, level: Level, x: &[f32], s: f32, _: Zero) -> f32 {
        lanes::cost(level, true, x, grid(e, s, e.lowest))
    }

    fn shrinks(&self, e: &Element) -> &'static [f32] {
        match e.bits {
            // mean|w| is the minimum for one bit.
            1 => &[],
            2 => &[0.36, 0.42, 0.48, 0.54, 0.60, 0.67, 0.75, 0.83, 0.91],
            3 => &[0.50, 0.56, 0.62, 0.68, 0.74, 0.80, 0.86, 0.91, 0.96],
            4 => &[0.60, 0.66, 0.71, 0.76, 0.80, 0.84, 0.88, 0.92, 0.96],
            5 => &[0.70, 0.75, 0.80, 0.84, 0.88, 0.91, 0.94, 0.97],
            _ => &[0.84, 0.88, 0.91, 0.94, 0.96, 0.98, 0.99],
        }
    }
}
