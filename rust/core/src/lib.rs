//! nibblas-core: products of matrices whose entries are smaller than a byte.
//!
//! One idea runs through the crate: *decode a tile, multiply it densely, finish it*.
//!
//! * [`format`] says what a code means and where its bits are.
//! * [`qtensor`] holds a matrix in a format, in the portable layout.
//! * [`pack`] rearranges it into panels for the kernels.
//! * [`kernel`] multiplies tiles of one compute class on one ISA.
//! * [`plan`] picks kernel and blocking for a shape; [`gemm`] is the loop nest, [`pair`] the products of two
//!   quantised matrices.
//! * [`sparse`] stores the kept entries of a matrix alone, and skips the others where that pays.
#![allow(unsafe_code)]

pub mod activation;
pub mod bits;
pub mod buf;
mod dense;
pub mod error;
pub mod fixed;
pub mod format;
pub mod gemm;
#[cfg(target_arch = "x86_64")]
mod halves;
pub mod isa;
pub mod kernel;
pub mod matrix;
pub mod pack;
pub mod pair;
pub mod plan;
pub mod pool;
pub mod qtensor;
pub mod quantize;
pub mod reference;
pub mod sparse;
pub mod trellis;

pub use error::{Error, Result};
pub use format::{Element, Format, ScaleType, ValueMap, ZeroKind};
pub use matrix::{MatMut, MatRef, Scalar};
pub use qtensor::{QTensor, QView, Scales, ScalesRef, Zeros, ZerosRef};
