//! The safetensors container.
//!
//! # Layout
//! ```text
//! byte 0      8                8+H                        8+H+D
//!      | H u64 | header (JSON) | tensor data, no gaps ... |
//! ```
//! `H` is little-endian. The header is one JSON object: per tensor `{"dtype", "shape", "data_offsets": [begin, end]}`
//! with offsets in bytes from the start of the data, and an optional `__metadata__` object of strings. Spaces may
//! follow the object; the writer uses them to begin the data at a multiple of 8.
//!
//! # Limits
//! [`MAX_HEADER`], [`MAX_TENSORS`], [`MAX_METADATA`], [`MAX_DIMS`], [`MAX_NAME`],
//! [`MAX_TEXT`].
//!
//! # Source
//! The format section of the safetensors project's README.
mod dtype;
mod header;
mod reader;
mod writer;

pub use dtype::Dtype;
pub use header::{Header, Spec, Tensor};
pub use reader::Reader;
pub use writer::Writer;

/// Most bytes of a header.
pub const MAX_HEADER: u64 = 100_000_000;
/// Most tensors in a file.
pub const MAX_TENSORS: usize = 65_536;
/// Most entries of `__metadata__`: two for each quantised matrix (of at least two tensors), and some of other people's.
pub const MAX_METADATA: usize = MAX_TENSORS + 1024;
/// Most dimensions of a tensor.
pub const MAX_DIMS: usize = 8;
/// Most bytes of a tensor's name.
pub const MAX_NAME: usize = 65_536;

/// Most bytes of a metadata value.
pub const MAX_TEXT: usize = 4 << 20;

/// The key of the metadata object.
const METADATA: &str = "__metadata__";
