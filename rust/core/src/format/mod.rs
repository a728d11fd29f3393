//! What a code means. A [`Format`] is plain data; the scalar functions of its [`Element`] are the specification.
//!
//! A family of elements is one file: a `static` array of rows and a [`Codec`] that fits, encodes and decodes a group.
//! The row is listed in [`FAMILIES`]; names, tests and tables follow.
use std::fmt;

use crate::error::Result;

mod bipolar;
mod grammar;
mod int;
pub mod lanes;
mod ternary;

pub use lanes::Level;

/// The families of the table, in the order of listing.
static FAMILIES: [&[Element]; 4] = [&int::INT, &int::UINT, &bipolar::ROWS, &ternary::ROWS];

/// The rows of the format table.
pub fn table() -> impl Iterator<Item = &'static Element> {
    FAMILIES.iter().flat_map(|f| f.iter())
}

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

impl ScaleType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// Name in the grammar: `f32`, `f16`, `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    /// Bytes of one scale.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The nearest value of the type, ties to even; infinite on overflow.
    pub fn round(self, s: f32) -> f32 {
        match self {
            Self::F32 => s,
            Self::F16 => half::f16::from_f32(s).to_f32(),
            Self::BF16 => half::bf16::from_f32(s).to_f32(),
        }
    }

    /// The smallest positive value.
    pub fn smallest(self) -> f32 {
        match self {
            Self::F32 => f32::from_bits(1),
            Self::F16 => half::f16::from_bits(1).to_f32(),
            Self::BF16 => f32::from_bits(1 << 16),
        }
    }

    /// The next lower value of a positive, finite value of the type.
    pub fn next_down(self, s: f32) -> f32 {
        match self {
            Self::F32 => s.next_down(),
            Self::F16 => half::f16::from_bits(half::f16::from_f32(s).to_bits() - 1).to_f32(),
            Self::BF16 => f32::from_bits(s.to_bits() - (1 << 16)),
        }
    }
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

/// The zero point of one group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Zero {
    /// The format has none.
    None,
    /// Subtracted from the code in integers.
    Int(u8),
    /// `w = fma(u, s, -fl(s*z))`.
    Float(f32),
}

/// What a quantiser learns from a group before the scale is rounded.
#[derive(Debug, Clone, Copy)]
pub struct Fit {
    /// The scale, in f32.
    pub scale: f32,
    /// The low end of the range, 0 or less; used by zero points only.
    pub low: f32,
}

/// Fits, encodes and decodes groups of the elements of one family.
pub trait Codec: fmt::Debug + Sync {
    /// The scale of the group by the `rtn` rule. All values are finite and their largest magnitude is `absmax`.
    fn fit(&self, e: &Element, level: Level, x: &[f32], absmax: f32) -> Fit;

    /// The zero point of a range that starts at `low`, for the rounded scale.
    fn zero(&self, _e: &Element, _low: f32, _scale: f32) -> Zero {
        Zero::None
    }

    /// Whether some code is worth 0, whatever the scale.
    fn has_zero(&self) -> bool {
        true
    }

    /// Codes of `x`, not below `lowest`, at a scale and zero point; returns the largest `fl(|w - decoded|)`.
    fn encode(&self, e: &Element, level: Level, x: &[f32], s: f32, z: Zero, lowest: u8, out: &mut [u8]) -> f32;

    /// Squared error of `x` at a scale, in squares of the scale, about: it ranks candidates.
    fn cost(&self, e: &Element, level: Level, x: &[f32], s: f32, z: Zero) -> f32;

    /// Multiples of the `rtn` scale that the `mse` search tries.
    fn shrinks(&self, e: &Element) -> &'static [f32];

    /// Numbers of the codes `u`.
    fn decode(&self, e: &Element, level: Level, u: &[u8], s: f32, z: Zero, out: &mut [f32]) {
        let ValueMap::Affine { mul, sub } = e.map;
        match z {
            Zero::None => lanes::affine(level, u, mul, sub, s, out),
            Zero::Int(z) => lanes::affine(level, u, mul, i32::from(z), s, out),
            Zero::Float(z) => lanes::affine_float(level, u, s, -(s * z), out),
        }
    }
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
    /// Lowest code that a quantiser emits.
    pub lowest: u8,
    /// Arithmetic of the inner product that products with this element may use.
    pub computes: &'static [&'static str],
    /// Fits, encodes and decodes.
    pub codec: &'static dyn Codec,
}

impl Element {
    const fn affine(
        name: &'static str,
        bits: u8,
        mul: i32,
        sub: i32,
        levels: u16,
        lowest: u8,
        codec: &'static dyn Codec,
    ) -> Self {
        Self {
            name,
            bits,
            map: ValueMap::Affine { mul, sub },
            zero: ZeroKind::None,
            levels,
            lowest,
            computes: &["f32", "bf16", "int8", "int8_g32", "int8_g128"],
            codec,
        }
    }

    /// The row of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        table().find(|e| e.name == name)
    }

    fn sub(&self) -> i32 {
        let ValueMap::Affine { sub, .. } = self.map;
        sub
    }

    /// The value of a code, before zero point and scale.
    pub fn value(&self, u: u8) -> i32 {
        let ValueMap::Affine { mul, sub } = self.map;
        mul * i32::from(u) - sub
    }

    /// The code of a value, if there is one.
    pub fn code(&self, value: i32) -> Option<u8> {
        let ValueMap::Affine { mul, sub } = self.map;
        let u = value.checked_add(sub)?;
        (u % mul == 0 && (0..i32::from(self.levels)).contains(&(u / mul))).then_some((u / mul) as u8)
    }

    /// Lowest and highest value.
    pub fn values(&self) -> (i32, i32) {
        (self.value(0), self.value((self.levels - 1) as u8))
    }
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

impl PartialEq for Format {
    fn eq(&self, other: &Self) -> bool {
        (self.element.name, self.group, self.scale) == (other.element.name, other.group, other.scale)
    }
}

impl Eq for Format {}

impl std::hash::Hash for Format {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.element.name, self.group, self.scale).hash(state);
    }
}

impl fmt::Display for Format {
    /// The name that parses back to this format; defaults are left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.element.name)?;
        if let Some(g) = self.group {
            write!(f, "_g{g}")?;
        }
        if self.scale != Self::default_scale(self.group) {
            write!(f, "_s{}", self.scale.name())?;
        }
        Ok(())
    }
}

impl std::str::FromStr for Format {
    type Err = crate::Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::parse(s)
    }
}

impl Format {
    /// The shortest group.
    pub const MIN_GROUP: u32 = 8;

    /// A format from its parts; `scale` defaults to f16 when grouped, f32 when there is one scale per row.
    ///
    /// # Errors
    /// [`crate::Error::Format`] if the group is shorter than [`Self::MIN_GROUP`].
    pub fn with(element: &'static Element, group: Option<u32>, scale: Option<ScaleType>) -> Result<Self> {
        if let Some(g) = group.filter(|&g| g < Self::MIN_GROUP) {
            return Err(crate::Error::Format(format!("group length {g} is below {}", Self::MIN_GROUP)));
        }
        Ok(Self { element, group, scale: scale.unwrap_or(Self::default_scale(group)) })
    }

    /// Parses a format name, such as `int4_g128`: `<element>[_g<length>][_s<f32|f16|bf16>]`.
    ///
    /// # Errors
    /// [`crate::Error::Format`] naming the part that does not parse.
    pub fn parse(name: &str) -> Result<Self> {
        grammar::parse(name)
    }

    fn default_scale(group: Option<u32>) -> ScaleType {
        if group.is_some() {
            ScaleType::F16
        } else {
            ScaleType::F32
        }
    }

    /// Number of groups in a row of `cols` elements.
    pub fn groups(&self, cols: usize) -> usize {
        match self.group {
            None => usize::from(cols > 0),
            Some(g) => cols.div_ceil(g as usize),
        }
    }

    /// Length of the groups of a row of `cols` elements (the last may be shorter); at least 1.
    pub fn group_len(&self, cols: usize) -> usize {
        self.group.map_or(cols, |g| (g as usize).min(cols)).max(1)
    }

    /// Bytes of the packed codes of a row of `cols` elements.
    ///
    /// # Panics
    /// If `cols` is 2^61 or more.
    pub fn row_bytes(&self, cols: usize) -> usize {
        crate::bits::row_bytes(self.element.bits, cols)
    }

    /// Stored bits per weight, scales, zero points and padding included; the bits of a code if there is no weight.
    pub fn bits_per_weight(&self, rows: usize, cols: usize) -> f64 {
        if rows == 0 || cols == 0 {
            return f64::from(self.element.bits);
        }
        let zero = usize::from(self.element.zero == ZeroKind::PerGroup);
        let row = self.row_bytes(cols) as f64 + self.groups(cols) as f64 * (self.scale.size() + zero) as f64;
        8.0 * row / cols as f64
    }

    /// Names of the computes that products with this format may use.
    pub fn computes(&self) -> &'static [&'static str] {
        self.element.computes
    }
}

/// `mean|x|`, summed in f64 and rounded once to f32.
fn mean_abs(level: Level, x: &[f32]) -> f32 {
    (lanes::abs_sum(level, x) / x.len().max(1) as f64) as f32
}
