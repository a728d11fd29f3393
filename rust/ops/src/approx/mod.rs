#![doc = include_str!("README.md")]

pub mod lmul;
pub mod shift_add;
