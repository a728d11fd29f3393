//! A matrix in a format, in the portable layout.
//!
//! Codes are stored unsigned (`u`), bit-packed little-endian along K, element 0 in the lowest bits of byte 0; each row
//! starts at a byte. Scales are `[N][groups]`, zeros likewise.
use crate::format::Format;

/// Owned scales; 16-bit types are kept as their bits.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// binary32
    F32(Vec<f32>),
    /// binary16 bits
    F16(Vec<u16>),
    /// bfloat16 bits
    BF16(Vec<u16>),
}

/// Borrowed scales.
#[derive(Debug, Clone, Copy)]
pub enum ScalesRef<'a> {
    /// binary32
    F32(&'a [f32]),
    /// binary16 bits
    F16(&'a [u16]),
    /// bfloat16 bits
    BF16(&'a [u16]),
}

/// Owned zero points.
#[derive(Debug, Clone, PartialEq)]
pub enum Zeros {
    /// The format has none.
    None,
    /// Integers, subtracted from the codes in integer arithmetic.
    Int(Vec<u8>),
    /// Floats: `w = fma(u, s, -fl(s*z))`.
    Float(Vec<f32>),
}

/// Borrowed zero points.
#[derive(Debug, Clone, Copy)]
pub enum ZerosRef<'a> {
    /// The format has none.
    None,
    /// Integers.
    Int(&'a [u8]),
    /// Floats.
    Float(&'a [f32]),
}

/// A matrix in the portable layout, borrowed (the bytes may belong to NumPy).
#[derive(Debug, Clone, Copy)]
pub struct QView<'a> {
    /// The format.
    pub format: Format,
    /// N, the rows.
    pub rows: usize,
    /// K, the columns.
    pub cols: usize,
    /// `rows * row_bytes` bytes.
    pub codes: &'a [u8],
    /// `[rows][groups]`.
    pub scales: ScalesRef<'a>,
    /// `[rows][groups]`, or none.
    pub zeros: ZerosRef<'a>,
}

/// A matrix in the portable layout, owned.
#[derive(Debug, Clone)]
pub struct QTensor {
    /// The format.
    pub format: Format,
    /// N, the rows.
    pub rows: usize,
    /// K, the columns.
    pub cols: usize,
    /// Packed codes.
    pub codes: Vec<u8>,
    /// Scales.
    pub scales: Scales,
    /// Zero points.
    pub zeros: Zeros,
}
