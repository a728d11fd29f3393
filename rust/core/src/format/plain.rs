//! Numbers that are not quantised: `f32`, `f16`, `bf16`, stored as their bits, the low byte first.
//!
//! They are here so that sparse weights may have them as values, and dense ones to be compared with. The scale of a row is
//! there as in every format, and is 1.
use super::{Codec, Element, Fit, Level, ScaleType};

#[derive(Debug)]
struct Plain;

impl Codec for Plain {
    fn fit(&self, _: &Element, _: Level, _: &[f32], _: f32) -> Fit {
        Fit { scale: 1.0, low: 0.0 }
    }

    fn shrinks(&self, _: &Element) -> &'static [f32] {
        &[]
    }
}

const fn row(name: &'static str, kind: ScaleType, bits: u8) -> Element {
    Element {
        computes: &["f32"],
        scales: &[ScaleType::F32],
        plain: Some(kind),
        shared: true,
        ..Element::affine(name, bits, 1, 0, 1, 0, &Plain)
    }
}

/// `f32`, `f16`, `bf16`.
pub static ROWS: [Element; 3] =
    [row("f32", ScaleType::F32, 32), row("f16", ScaleType::F16, 16), row("bf16", ScaleType::BF16, 16)];

impl ScaleType {
    /// Writes the bits of a number of the type, the low byte first.
    pub(crate) fn write(self, v: f32, out: &mut [u8]) {
        match self {
            Self::F16 => out.copy_from_slice(&half::f16::from_f32(v).to_bits().to_le_bytes()),
            Self::BF16 => out.copy_from_slice(&half::bf16::from_f32(v).to_bits().to_le_bytes()),
            _ => out.copy_from_slice(&v.to_le_bytes()),
        }
    }

    /// The number whose bits these are.
    pub(crate) fn read(self, b: &[u8]) -> f32 {
        match (self, b) {
            (Self::F16, &[a, b]) => half::f16::from_bits(u16::from_le_bytes([a, b])).to_f32(),
            (Self::BF16, &[a, b]) => f32::from_bits(u32::from(u16::from_le_bytes([a, b])) << 16),
            (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            _ => 0.0,
        }
    }
}
