//! The Python extension module `nibblas._core`.
use pyo3::prelude::*;

mod io;

/// The compiled core of nibblas.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    io::register(m)?;
    Ok(())
}
