#![doc = include_str!("README.md")]
#![deny(clippy::float_arithmetic)]

pub mod add;
pub mod compat;
pub mod fixed;
pub mod gelu;
pub mod norm;
#[allow(unsafe_code)]
mod pieces;
pub mod requant;
pub mod scale;
pub mod softmax;
pub mod sqrt;

use crate::{Error, Result};

/// The rows of a matrix of `len` values with rows of `cols`.
pub(crate) fn rows_of(len: usize, cols: usize, out: usize) -> Result<usize> {
    if len != out || !len.is_multiple_of(cols) {
        return Err(Error::Shape(format!("{len} values in rows of {cols} do not fit {out} results")));
    }
    Ok(len.checked_div(cols).unwrap_or(0))
}
