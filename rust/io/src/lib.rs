//! Bounded readers and atomic writers of tensor files.
#![forbid(unsafe_code)]
