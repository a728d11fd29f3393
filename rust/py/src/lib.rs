//! The Python extension module `nibblas._core`.
use pyo3::prelude::*;

/// The compiled core of nibblas.
#[pymodule]
fn _core(_m: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
