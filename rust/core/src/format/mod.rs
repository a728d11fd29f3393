//! What a code means. A [`Format`] is plain data; the scalar functions of its [`Element`] are the specification.
//!
//! A family of elements is one file: a `static` array of rows and a [`Codec`] that fits, encodes and decodes a group.
//! The row is listed in [`FAMILIES`]; names, tests and tables follow.
use std::fmt;
use std::sync::LazyLock;

use crate::error::Result;
use crate::sparse::Structure;
use crate::trellis::{Code, TILE};

mod bipolar;
mod block;
mod book;
mod codebook;
mod float;
mod grammar;
mod int;
pub mod lanes;
mod log;
pub(crate) mod lut;
mod parts;
mod plain;
mod ternary;
mod trellis;
pub(crate) mod vq;

pub use block::{e4m3, e4m3_byte, e8m0, e8m0_byte, ScaleMode};
pub use book::{Book, Tie, HALF};
pub use lanes::Level;
pub use parts::{Along, Part, PART_NAMES};

/// The families of the table, in the order of listing.
static FAMILIES: &[&[Element]] = &[
    &int::INT,
    &int::UINT,
    &bipolar::ROWS,
    &ternary::ROWS,
    &float::ROWS,
    &float::POW2,
    &log::ROWS,
    &codebook::ROWS,
    &lut::ROWS,
    &lut::BY_ROW,
    &block::BFP,
    &block::DFP,
    &block::MX,
    &block::NVFP4,
    &trellis::ROWS,
    &vq::ROWS,
];

/// Elements that are not quantised: they are named and stored as the others, and no row of the table.
pub fn plain_elements() -> impl Iterator<Item = &'static Element> {
    plain::ROWS.iter()
}

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
    /// A power of two as one byte `e`: `2^(e - 127)`; 255 is NaN.
    E8M0,
    /// The positive numbers of the small float `e4m3`, as one byte.
    E4M3,
    /// Integers from 1 up, as one byte: the inner level of two-level formats, see [`Element::inner_top`].
    I8,
}

impl ScaleType {
    /// The types that any element may have unless it says otherwise.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];
    /// The types of elements that have two-level formats too.
    pub const TWO_LEVEL: [Self; 4] = [Self::F32, Self::F16, Self::BF16, Self::I8];

    /// Those of codebooks: small scales under a scale of the tensor too, which is nested quantisation.
    pub const NESTED: [Self; 4] = [Self::F32, Self::F16, Self::BF16, Self::E4M3];

    /// Those that names of formats spell.
    pub const NAMED: [Self; 5] = [Self::F32, Self::F16, Self::BF16, Self::I8, Self::E4M3];

    /// Name in the grammar; powers of two are never written there.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::E8M0 => "e8m0",
            Self::E4M3 => "e4m3",
            Self::I8 => "i8",
        }
    }

    /// Bytes of one scale.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::E8M0 | Self::E4M3 | Self::I8 => 1,
        }
    }

    /// The nearest value of the type, ties to even; infinite on overflow. Of E8M0 the next lower one, within its range.
    pub fn round(self, s: f32) -> f32 {
        match self {
            Self::F32 => s,
            Self::F16 => half::f16::from_f32(s).to_f32(),
            Self::BF16 => half::bf16::from_f32(s).to_f32(),
            Self::E8M0 => block::power(block::floor_log2(s)),
            Self::E4M3 => block::e4m3_round(s),
            Self::I8 => s.round_ties_even().max(1.0),
        }
    }

    /// The smallest positive value.
    pub fn smallest(self) -> f32 {
        match self {
            Self::F32 => f32::from_bits(1),
            Self::F16 => half::f16::from_bits(1).to_f32(),
            Self::BF16 => f32::from_bits(1 << 16),
            Self::E8M0 => block::power(-127),
            Self::E4M3 => block::e4m3(1),
            Self::I8 => 1.0,
        }
    }

    /// The largest finite value, of types that a scale of the tensor goes with.
    pub(crate) fn largest(self) -> f32 {
        match self {
            Self::E4M3 => 448.0,
            _ => f32::MAX,
        }
    }

    /// The next lower value of a positive, finite value of the type.
    pub fn next_down(self, s: f32) -> f32 {
        match self {
            Self::F32 => s.next_down(),
            Self::F16 => half::f16::from_bits(half::f16::from_f32(s).to_bits() - 1).to_f32(),
            Self::BF16 => f32::from_bits(s.to_bits() - (1 << 16)),
            Self::E8M0 => s / 2.0,
            Self::E4M3 => block::e4m3(block::e4m3_byte(s) - 1),
            Self::I8 => (s - 1.0).max(1.0),
        }
    }
}

/// How a stored code `u` becomes the number that the scale multiplies.
#[derive(Debug, Clone, Copy)]
pub enum ValueMap {
    /// `mul*u - sub`: plain integers. With a zero point `z` per group the value is `mul*u - z` (then `sub` is 0).
    Affine {
        /// Distance between neighbouring values.
        mul: i32,
        /// What code 0 is worth, negated.
        sub: i32,
    },
    /// `table[u]`: codebooks and small floats.
    Table(&'static LazyLock<Book>),
    /// A table that each matrix brings.
    Learned,
    /// A table that each row of a matrix brings.
    RowLearned,
    /// A hash of the last 16 bits of the codes of a tile.
    Trellis(Code),
    /// Codes of several weights together are an entry of the codebook that each matrix brings, or a sum of two.
    Vectors(vq::Shape),
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

    /// Codes of `x`, not below `lowest`, at a scale and zero point, unpacked (see [`crate::bits`]); returns the largest
    /// `fl(|w - decoded|)`. Elements with a table take the nearest value.
    fn encode(&self, e: &Element, level: Level, x: &[f32], s: f32, _z: Zero, _lowest: u8, out: &mut [u8]) -> f32 {
        e.book().map_or(0.0, |b| b.encode(level, x, s, out))
    }

    /// Squared error of `x` at a scale, in squares of the scale, about: it ranks candidates.
    fn cost(&self, e: &Element, level: Level, x: &[f32], s: f32, _z: Zero) -> f32 {
        e.book().map_or(0.0, |b| b.cost(level, x, s))
    }

    /// Multiples of the `rtn` scale that the `mse` search tries.
    fn shrinks(&self, e: &Element) -> &'static [f32];

    /// Numbers of the codes `u`.
    fn decode(&self, e: &Element, level: Level, u: &[u8], s: f32, z: Zero, out: &mut [f32]) {
        match (e.map, z) {
            (ValueMap::Table(book), _) => lanes::book_decode(level, u, book.of_bytes(), s, out),
            (ValueMap::Affine { sub, .. }, _) if e.bits > 8 => lanes::affine_long(level, u, sub, s, out),
            (ValueMap::Affine { mul, sub }, Zero::None) => lanes::affine(level, u, mul, sub, s, out),
            (ValueMap::Affine { mul, .. }, Zero::Int(z)) => lanes::affine(level, u, mul, i32::from(z), s, out),
            (ValueMap::Affine { .. }, Zero::Float(z)) => lanes::affine_float(level, u, s, -(s * z), out),
            (ValueMap::Learned | ValueMap::RowLearned | ValueMap::Trellis(_) | ValueMap::Vectors(_), _) => {}
        }
    }
}

/// One row of the format table.
#[derive(Debug)]
pub struct Element {
    /// Name without group or scale suffix, such as `int4`.
    pub name: &'static str,
    /// Bits of one stored code, 1 to 16.
    pub bits: u8,
    /// Meaning of a code.
    pub map: ValueMap,
    /// Zero points.
    pub zero: ZeroKind,
    /// Number of legal codes (codes are `0..levels`).
    pub levels: u32,
    /// Lowest code that a quantiser emits.
    pub lowest: u8,
    /// Arithmetic of the inner product that products with this element may use.
    pub computes: &'static [&'static str],
    /// Group length that is left out of names; `None` is one group per row.
    pub group: Option<u32>,
    /// Types that scales may have.
    pub scales: &'static [ScaleType],
    /// A power of two that multiplies every stored scale.
    pub unit: f32,
    /// Whether a group may be NaN, and has to be where a weight is not finite.
    pub nan: bool,
    /// Whether all groups of the tensor have one scale.
    pub shared: bool,
    /// Mantissa bits of elements whose formats name how they pick the power of two (see [`ScaleMode`]).
    pub mantissa: Option<u32>,
    /// The type of numbers that are stored as they are.
    pub plain: Option<ScaleType>,
    /// Fits, encodes and decodes.
    pub codec: &'static dyn Codec,
}

/// The computes of elements whose values are integers, exactly or about.
const INTEGER: &[&str] = &["f32", "bf16", "int8", "int8_g32", "int8_g128"];
/// The computes of the others.
const FLOAT: &[&str] = &["f32", "bf16"];

impl Element {
    const fn affine(
        name: &'static str,
        bits: u8,
        mul: i32,
        sub: i32,
        levels: u32,
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
            computes: INTEGER,
            group: None,
            scales: &ScaleType::ALL,
            unit: 1.0,
            nan: false,
            shared: false,
            mantissa: None,
            plain: None,
            codec,
        }
    }

    const fn table(
        name: &'static str,
        bits: u8,
        book: &'static LazyLock<Book>,
        computes: &'static [&'static str],
        codec: &'static dyn Codec,
    ) -> Self {
        Self { map: ValueMap::Table(book), computes, ..Self::affine(name, bits, 1, 0, 1 << bits, 0, codec) }
    }

    /// The row of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        table().chain(plain_elements()).find(|e| e.name == name)
    }

    /// Values of the table that each matrix, or each of its rows, brings; 0 where none does.
    pub fn learned(&self) -> usize {
        match self.map {
            ValueMap::Learned | ValueMap::RowLearned => self.levels as usize,
            ValueMap::Vectors(shape) => shape.len * shape.entries(),
            _ => 0,
        }
    }

    /// Whether each row of a matrix brings a table of its own.
    pub fn tables_of_rows(&self) -> bool {
        matches!(self.map, ValueMap::RowLearned)
    }

    /// The table of values, of elements that have one and the same.
    pub fn book(&self) -> Option<&'static Book> {
        match self.map {
            ValueMap::Table(book) => Some(book),
            _ => None,
        }
    }

    fn sub(&self) -> i32 {
        match self.map {
            ValueMap::Affine { sub, .. } => sub,
            _ => 0,
        }
    }

    /// The integer that stands for a code in products of integers and in lists of codes: before zero point and scale,
    /// what the code is worth; for elements with a table, the code itself.
    pub fn value(&self, u: impl Into<u32>) -> i32 {
        let u = u.into();
        match self.map {
            ValueMap::Affine { mul, sub } => mul * u as i32 - sub,
            _ => u as i32,
        }
    }

    /// What a code is worth before zero point and scale; NaN where that depends on the matrix, or on its neighbours.
    pub fn number(&self, u: impl Into<u32>) -> f32 {
        let u = u.into();
        match self.map {
            ValueMap::Affine { .. } => self.value(u) as f32,
            ValueMap::Table(book) => book.of_bytes()[u as usize & 255],
            _ => f32::NAN,
        }
    }

    /// The integer that stands for a code in integer products, worth [`Self::step`] each.
    pub fn integer(&self, u: impl Into<u32>) -> i32 {
        let u = u.into();
        match self.map {
            ValueMap::Table(book) => i32::from(book.integers()[u as usize % book.integers().len()]),
            _ => self.value(u),
        }
    }

    /// What the integer 1 is worth in integer products.
    pub fn step(&self) -> f32 {
        self.book().map_or(1.0, Book::unit)
    }

    /// How far an integer of integer products may be from the value it stands for; 0 where it is exact or there are none.
    pub fn rounding(&self) -> f32 {
        let far = |u: u32| (f64::from(self.number(u)) - f64::from(self.integer(u)) * f64::from(self.step())).abs();
        if matches!(self.map, ValueMap::Learned) && self.has_integers() {
            // Of a table that reaches 1.
            0.5 / 127.0
        } else if self.has_integers() {
            (0..self.levels).map(far).fold(0.0, f64::max) as f32
        } else {
            0.0
        }
    }

    /// Whether codes are the integers that the scales multiply.
    pub fn is_linear(&self) -> bool {
        matches!(self.map, ValueMap::Affine { .. })
    }

    /// Whether products meet the decoded floats only: no kernel knows the codes.
    pub fn is_dense(&self) -> bool {
        self.plain.is_none() && (self.bits > 8 || self.span() > 1 || self.tables_of_rows())
    }

    /// How many codes at most are made and read together, from the start of a group on.
    pub fn span(&self) -> usize {
        match self.map {
            ValueMap::Trellis(_) => TILE,
            ValueMap::Vectors(shape) => shape.len,
            _ => 1,
        }
    }

    /// The longest group, if there is one: trellis codes close a circle.
    fn longest_group(&self) -> Option<usize> {
        matches!(self.map, ValueMap::Trellis(_)).then_some(TILE)
    }

    /// Whether products may be computed in integers.
    pub fn has_integers(&self) -> bool {
        self.computes.contains(&"int8")
    }

    /// The largest finite magnitude of a number.
    pub fn top(&self) -> f32 {
        match self.map {
            ValueMap::Affine { .. } => self.number(self.levels - 1).abs(),
            ValueMap::Table(book) => book.top(),
            ValueMap::Learned | ValueMap::RowLearned => 1.0,
            ValueMap::Trellis(code) => code.numbers().iter().fold(0.0, |m, v| m.max(v.abs())),
            ValueMap::Vectors(_) => vq::REACH,
        }
    }

    /// The code of 0, or nearest to it; of elements whose codes are bytes.
    pub fn zero_code(&self) -> u8 {
        match self.map {
            ValueMap::Affine { sub, .. } => sub.clamp(0, 255) as u8,
            ValueMap::Table(book) => book.zero().unwrap_or(0),
            _ => 0,
        }
    }

    /// Whether a code, of those that kernels know, is worth exactly 0 under every scale and integer zero point.
    pub fn has_zero(&self) -> bool {
        match self.map {
            _ if self.is_dense() => false,
            ValueMap::Affine { mul: 1, .. } => self.zero == ZeroKind::PerGroup || self.values().0 <= 0,
            ValueMap::Table(book) => book.zero().is_some_and(|u| self.number(u) == 0.0),
            _ => false,
        }
    }

    /// The code of a value, if there is one.
    pub fn code(&self, value: i32) -> Option<u16> {
        let (mul, sub) = match self.map {
            ValueMap::Affine { mul, sub } => (mul, sub),
            _ => (1, 0),
        };
        let u = value.checked_add(sub)?;
        (u % mul == 0 && (0..self.levels as i32).contains(&(u / mul))).then_some((u / mul) as u16)
    }

    /// Bytes of an unpacked code: one, or two, the low one first.
    pub fn code_bytes(&self) -> usize {
        crate::bits::code_bytes(self.bits)
    }

    /// The magnitude that a quantiser gives the largest weight of a row in two-level formats with zero points, in steps of
    /// the row: half an inner scale beyond it is still a byte (arXiv 2405.04532, section 4: 119 for four bits).
    pub(crate) fn inner_reach(&self) -> i32 {
        let steps = self.levels as i32 - 1;
        127 * steps / self.levels as i32
    }

    /// Whether codes from `codes.0` to `codes.1`, less a zero point, stay within a byte from -128 to 127 times an inner scale,
    /// and within an unsigned byte before the zero point is subtracted: kernels multiply two codes at once.
    pub(crate) fn fits_inner(&self, inner: u8, zero: Zero, codes: (i32, i32)) -> bool {
        let (t, z) = (i32::from(inner), if let Zero::Int(z) = zero { i32::from(z) } else { self.sub() });
        (codes.0 - z) * t >= -128 && (codes.1 - z) * t <= 127 && codes.1.max(z) * t <= 255
    }

    /// The largest inner scale of two-level formats: values times it are bytes from -128 to 127; with zero points, that of a
    /// group which spans twice [`Self::inner_reach`].
    pub fn inner_top(&self) -> u8 {
        let steps = self.levels as i32 - 1;
        if self.zero == ZeroKind::PerGroup {
            return (f64::from(2 * self.inner_reach()) / f64::from(steps)).round_ties_even() as u8;
        }
        let (low, high) = self.values();
        (128 / -low).min(127 / high) as u8
    }

    /// Lowest and highest value.
    pub fn values(&self) -> (i32, i32) {
        (self.value(0u32), self.value(self.levels - 1))
    }
}

/// A matrix format: element, group length along K, scale type, how a power of two is picked.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// The table row.
    pub element: &'static Element,
    /// Group length along K; `None` is one group per row.
    pub group: Option<u32>,
    /// Type of the stored scales.
    pub scale: ScaleType,
    /// How the power of two is picked; [`ScaleMode::Floor`] where scales are not powers of two.
    pub mode: ScaleMode,
    /// In which units entries are kept; `None` where all are.
    pub structure: Option<Structure>,
}

impl PartialEq for Format {
    fn eq(&self, other: &Self) -> bool {
        let parts = |f: &Self| (f.element.name, f.group, f.scale, f.mode, f.structure);
        parts(self) == parts(other)
    }
}

impl Eq for Format {}

impl std::hash::Hash for Format {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.element.name, self.group, self.scale, self.mode, self.structure).hash(state);
    }
}

impl fmt::Display for Format {
    /// The name that parses back to this format; defaults are left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.element.name)?;
        if let Some(g) = self.group.filter(|_| self.group != self.element.group) {
            write!(f, "_g{g}")?;
        }
        if self.scale != Self::default_scale(self.element, self.group) {
            write!(f, "_s{}", self.scale.name())?;
        }
        if self.mode != ScaleMode::Floor {
            write!(f, "_{}", self.mode.name())?;
        }
        if let Some(s) = self.structure {
            write!(f, "_{s}")?;
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

    /// A format from its parts; `group` and `scale` default to the element's own. Scales are f16 when grouped and f32
    /// when there is one per row, where the element leaves the choice.
    ///
    /// # Errors
    /// [`crate::Error::Format`] if the group is shorter than [`Self::MIN_GROUP`], or the element has no such scales.
    pub fn with(element: &'static Element, group: Option<u32>, scale: Option<ScaleType>) -> Result<Self> {
        let fail = |text| Err(crate::Error::Format(text));
        if let Some(g) = group.filter(|&g| g < Self::MIN_GROUP) {
            return fail(format!("group length {g} is below {}", Self::MIN_GROUP));
        }
        if scale == Some(ScaleType::I8) && group.is_none() {
            return fail(format!("{}_si8: integer scales belong to groups, such as {0}_g128_si8", element.name));
        }
        if element.plain.is_some() && (group.is_some() || scale.is_some()) {
            return fail(format!("{} has neither groups nor scales", element.name));
        }
        if let (Some(g), Some(most)) = (group, element.longest_group()) {
            if g as usize > most {
                return fail(format!("groups of {} are at most {most} values, not {g}", element.name));
            }
        }
        if let Some(s) = scale.filter(|s| !element.scales.contains(s)) {
            let own = element.scales.iter().map(|s| s.name()).collect::<Vec<_>>().join(", ");
            return fail(format!("{} has scales of type {own}, not {}", element.name, s.name()));
        }
        let group = group.or(element.group);
        let scale = scale.unwrap_or(Self::default_scale(element, group));
        Ok(Self { element, group, scale, mode: ScaleMode::Floor, structure: None })
    }

    /// The format of the same codes with all entries kept.
    #[must_use]
    pub fn dense(self) -> Self {
        Self { structure: None, ..self }
    }

    /// The format of the same codes with entries kept in units.
    ///
    /// # Errors
    /// [`crate::Error::Format`] where no code is worth exactly 0, which dropped entries are, and for two-level formats.
    pub fn sparse(self, structure: Structure) -> Result<Self> {
        let name = self.element.name;
        if self.is_two_level() {
            return Err(crate::Error::Format(format!("{self} has integer scales, and cannot be sparse")));
        }
        if self.element.has_zero() {
            return Ok(Self { structure: Some(structure), ..self });
        }
        Err(crate::Error::Format(format!("{name} has no code for 0, so its entries cannot be dropped")))
    }

    /// Parses a format name, such as `int4_g128`:
    /// `<element>[_g<length>][_s<f32|f16|bf16|i8>][_<mode>][_<bitmap|2of4|bsr<g>|block<r>x<c>>]`.
    ///
    /// # Errors
    /// [`crate::Error::Format`] naming the part that does not parse.
    pub fn parse(name: &str) -> Result<Self> {
        grammar::parse(name)
    }

    fn default_scale(element: &Element, group: Option<u32>) -> ScaleType {
        match (element.scales, group) {
            ([only], _) => *only,
            (_, Some(_)) => ScaleType::F16,
            (_, None) => ScaleType::F32,
        }
    }

    /// The stored scale of a group for the scale that its element asks for (the largest magnitude where scales are powers
    /// of two): rounded, not 0. The error is a scale that overflows.
    pub(crate) fn round_scale(&self, scale: f32) -> std::result::Result<f32, f32> {
        let e = self.element;
        let top = e.top() * e.unit;
        let mut s = match (self.scale, e.mantissa) {
            (ScaleType::E8M0, m) => self.mode.scale(scale, top, m.unwrap_or(0)),
            (ScaleType::I8, _) => return Ok(ScaleType::I8.round(scale).min(e.inner_top() as f32)),
            (kind, _) => kind.round(scale),
        };
        if !s.is_finite() {
            return Err(scale);
        }
        if s == 0.0 {
            return Ok(self.scale.smallest());
        }
        while !(s * top).is_finite() {
            s = self.scale.next_down(s);
        }
        Ok(s)
    }

    /// Whether integer scales of groups lie within a scale of the row, so that products sum integers over all of K.
    pub fn is_two_level(&self) -> bool {
        self.scale == ScaleType::I8
    }

    /// Number of groups in a row of `cols` elements.
    pub fn groups(&self, cols: usize) -> usize {
        match self.group {
            None => usize::from(cols > 0),
            Some(g) => cols.div_ceil(g as usize),
        }
    }

    /// Values of the tables that a matrix of so many rows brings.
    pub fn table_len(&self, rows: usize) -> usize {
        self.element.learned() * if self.element.tables_of_rows() { rows } else { 1 }
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
        self.element.plain.map_or_else(|| crate::bits::row_bytes(self.element.bits, cols), |kind| cols * kind.size())
    }

    /// Stored bits per weight, scales, zero points and padding included; the bits of a code if there is no weight.
    pub fn bits_per_weight(&self, rows: usize, cols: usize) -> f64 {
        if rows == 0 || cols == 0 {
            return f64::from(self.element.bits);
        }
        let zero = usize::from(self.element.zero == ZeroKind::PerGroup);
        let row = self.row_bytes(cols) as f64 + self.groups(cols) as f64 * (self.scale.size() + zero) as f64;
        (8.0 * row + 32.0 * self.outer_len(rows) as f64 / rows as f64) / cols as f64
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
