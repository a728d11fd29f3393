//! Errors, threads and the polling of signals: what every binding needs.
use nibblas_core::Error;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyValueError};
use pyo3::prelude::*;
use std::sync::{Mutex, PoisonError};

/// The Python exception for an error of the core.
pub fn to_py(e: Error) -> PyErr {
    match e {
        Error::OutOfMemory(_) => PyMemoryError::new_err(e.to_string()),
        Error::Interrupted => PyKeyboardInterrupt::new_err(()),
        _ => PyValueError::new_err(e.to_string()),
    }
}

/// Runs `work` without the interpreter lock. `work` gets a function that looks for signals (such as Ctrl-C) and says
/// whether to stop; the exception that the signal handler raised is the one that the caller sees.
pub fn detached<R: Send>(
    py: Python<'_>,
    work: impl FnOnce(&(dyn Fn() -> bool + Sync)) -> nibblas_core::Result<R> + Send,
) -> PyResult<R> {
    let raised: Mutex<Option<PyErr>> = Mutex::new(None);
    let done = py.detach(|| {
        let poll = || {
            Python::attach(|py| match py.check_signals() {
                Ok(()) => false,
                Err(e) => {
                    *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                    true
                }
            })
        };
        work(&poll)
    });
    done.map_err(|e| raised.into_inner().unwrap_or_else(PoisonError::into_inner).unwrap_or_else(|| to_py(e)))
}
