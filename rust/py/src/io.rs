//! Bindings of the tensor-file reader and writer.
use pyo3::prelude::*;

/// Adds this module's names to the extension module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("SAFETENSORS_SUFFIX", ".safetensors")
}
