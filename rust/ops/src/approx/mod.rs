#![doc = include_str!("README.md")]

pub mod lmul;
pub mod shift;
pub mod shift_add;
mod strips;
