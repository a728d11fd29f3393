//! Logarithmic levels without a sign, for numbers that are not negative, such as the outputs of softmax.
//!
//! * `log2_<b>`: 0 for code 0, else `2^(u - (2^b - 1))`: 1 is the largest, a product is a shift.
//! * `logsqrt2_<b>`: 0, else `2^((u - (2^b - 1))/2)`: two levels to an octave. A product is a shift, and the odd levels
//!   have one factor `sqrt 2` in common.
//!
//! rtn: `s = absmax`, the nearest value of `w/s`, ties to the even code; numbers below 0 become 0.
use super::{Book, Codec, Element, Fit, Level, Tie, FLOAT, INTEGER};
use std::sync::LazyLock;

#[derive(Debug)]
struct Log;

impl Codec for Log {
    fn fit(&self, _: &Element, _: Level, _: &[f32], absmax: f32) -> Fit {
        Fit { scale: absmax, low: 0.0 }
    }

    fn shrinks(&self, e: &Element) -> &'static [f32] {
        match e.bits {
            3 => &[0.46, 0.52, 0.58, 0.64, 0.70, 0.76, 0.82, 0.88, 0.94],
            _ => &[0.60, 0.66, 0.71, 0.76, 0.80, 0.84, 0.88, 0.92, 0.96],
        }
    }
}

/// Levels `steps` to an octave.
fn book(bits: u32, steps: i32) -> Book {
    let top = (1 << bits) - 1;
    let level = |u: i32| {
        let (octave, part) = ((u - top).div_euclid(steps), (u - top).rem_euclid(steps));
        2f32.powi(octave) * if part == 1 { std::f32::consts::SQRT_2 } else { 1.0 }
    };
    let values: Vec<f32> = (0..=top).map(|u| if u == 0 { 0.0 } else { level(u) }).collect();
    Book::new(&values, Tie::Even)
}

macro_rules! logs {
    ($($id:ident $name:literal: $bits:literal, $steps:literal, $computes:ident;)*) => {
        $( static $id: LazyLock<Book> = LazyLock::new(|| book($bits, $steps)); )*
        /// `log2_3` to `logsqrt2_6`.
        pub static ROWS: [Element; [$($bits),*].len()] = [$( Element::table($name, $bits, &$id, $computes, &Log) ),*];
    };
}
logs! {
    LOG2_3 "log2_3": 3, 1, INTEGER;
    LOG2_4 "log2_4": 4, 1, FLOAT;
    LOG2_5 "log2_5": 5, 1, FLOAT;
    LOG2_6 "log2_6": 6, 1, FLOAT;
    LOGSQRT2_3 "logsqrt2_3": 3, 2, FLOAT;
    LOGSQRT2_4 "logsqrt2_4": 4, 2, FLOAT;
    LOGSQRT2_5 "logsqrt2_5": 5, 2, FLOAT;
    LOGSQRT2_6 "logsqrt2_6": 6, 2, FLOAT;
}
