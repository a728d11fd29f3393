//! What a code means. A [`Format`] is plain data; the scalar functions of its [`Element`] are the specification.
use crate::error::Result;

/// Type of the stored scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
}

/// How a stored code `u` becomes the number that the scale multiplies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ValueMap {
    /// `mul*u - sub`: plain integers. With a zero point `z` per group the value is `mul*u - z` (then `sub` is 0).
    Affine {
        /// Distance between neighbouring values.
        mul: i32,
        /// What code 0 is worth, negated.
        sub: i32,
    },
}

/// Whether groups carry a zero point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ZeroKind {
    /// No zero point.
    None,
    /// One per group: `u8` integers, or f32 for imported tensors.
    PerGroup,
}

/// One row of the format table.
#[derive(Debug)]
pub struct Element {
    /// Name without group or scale suffix, such as `int4`.
    pub name: &'static str,
    /// Bits of one stored code, 1 to 8.
    pub bits: u8,
    /// Meaning of a code.
    pub map: ValueMap,
    /// Zero points.
    pub zero: ZeroKind,
    /// Number of legal codes (codes are `0..levels`).
    pub levels: u16,
}

/// A matrix format: element, group length along K, scale type.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// The table row.
    pub element: &'static Element,
    /// Group length along K; `None` is one group per row.
    pub group: Option<u32>,
    /// Type of the stored scales.
    pub scale: ScaleType,
}

impl Format {
    /// Parses a format name, such as `int4_g128`.
    ///
    /// # Errors
    /// [`crate::Error::Format`] naming the part that does not parse.
    pub fn parse(_name: &str) -> Result<Self> {
        todo!()
    }

    /// Number of groups in a row of `cols` elements.
    pub fn groups(&self, cols: usize) -> usize {
        match self.group {
            None => usize::from(cols > 0),
            Some(g) => cols.div_ceil(g as usize),
        }
    }
}
