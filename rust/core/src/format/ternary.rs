//! Ternary: two bits, value `u - 1`; code 3 is illegal.
//!
//! rtn: `s = mean|w|` of the group, `u = clip(rint(w/s), -1, 1) + 1`.
use super::lanes::{self, Grid, Level};
use super::{Codec, Element, Fit, ScaleType, Zero};

#[derive(Debug)]
struct Ternary;

/// `ternary`.
pub static ROWS: [Element; 1] =
    [Element { scales: &ScaleType::TWO_LEVEL, ..Element::affine("ternary", 2, 1, 1, 3, 0, &Ternary) }];

fn grid(scale: f32, lowest: u8) -> Grid {
    Grid { scale, zero: 1, lo: i32::from(lowest), hi: 2 }
}

impl Codec for Ternary {
    fn fit(&self, _: &Element, level: Level, x: &[f32], _: f32) -> Fit {
        Fit { scale: super::mean_abs(level, x), low: 0.0 }
    }

    fn encode(&self, _: &Element, level: Level, x: &[f32], s: f32, _: Zero, lowest: u8, out: &mut [u8]) -> f32 {
        lanes::encode_near(level, x, grid(s, lowest), out)
    }

    fn cost(&self, e: &Element, level: Level, x: &[f32], s: f32, _: Zero) -> f32 {
        lanes::cost(level, false, x, grid(s, e.lowest))
    }

    fn shrinks(&self, _: &Element) -> &'static [f32] {
        &[0.7, 0.85, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.75, 2.0]
    }
}
