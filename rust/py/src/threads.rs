//! The process-wide number of threads. The two C symbols are what threadpoolctl looks for.
use pyo3::prelude::*;
use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, Ordering};

static THREADS: AtomicI32 = AtomicI32::new(1);

/// The number of threads that calls use where nothing else is said.
#[no_mangle]
pub extern "C" fn nibblas_get_num_threads() -> c_int {
    THREADS.load(Ordering::Relaxed)
}

/// Sets the number of threads; anything below 1 counts as 1.
#[no_mangle]
pub extern "C" fn nibblas_set_num_threads(n: c_int) {
    THREADS.store(n.max(1), Ordering::Relaxed);
}

#[pyfunction]
fn get_num_threads() -> i32 {
    nibblas_get_num_threads()
}

#[pyfunction]
#[pyo3(signature = (n, /))]
fn set_num_threads(n: i32) {
    nibblas_set_num_threads(n);
}

/// Adds this module's names to the extension module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(get_num_threads, m)?)?;
    m.add_function(wrap_pyfunction!(set_num_threads, m)?)
}
