//! The Python extension module `nibblas._core`: checks, the release of the interpreter lock, error mapping.
// PyO3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]
use pyo3::prelude::*;

mod approx;
mod array;
mod convert;
mod intops;
mod io;
mod product;
mod sparse;
mod tensor;
mod threads;

/// The compiled core of nibblas.
#[pymodule(gil_used = false)]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add("LARGE", array::LARGE)?;
    threads::register(m)?;
    tensor::register(m)?;
    product::register(m)?;
    sparse::register(m)?;
    intops::register(m)?;
    approx::register(m)?;
    io::register(m)
}
