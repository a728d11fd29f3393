//! nibblas-ops: what surrounds the products of a quantised network, in integers.
//!
//! * [`intops`] rescales, adds, normalises and bends integers: a whole transformer between two embeddings.
//!
//! Every loop is plain Rust over slices, compiled once for each vector width ([`level`]) and shared among the core's
//! threads ([`share`]). Integers make the results equal on every level and for every number of threads.
// A condition without a branch is what lets a loop become vectors.
#![allow(clippy::needless_bitwise_bool)]

pub mod approx;
pub mod intops;
pub mod ints;
#[allow(unsafe_code)]
pub mod level;
pub mod share;

pub use ints::{Ints, IntsMut};
pub use nibblas_core::{Error, Result};
pub use share::Exec;
