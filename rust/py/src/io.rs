//! Bindings of the tensor-file reader and writer. Data cross as flat arrays of bytes.
use nibblas_io::{Dtype, Error, Reader, Spec, Writer};
use numpy::{PyArray1, PyArrayMethods};
use pyo3::exceptions::{PyIsADirectoryError, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `EISDIR` on every system Python has.
const EISDIR: i32 = 21;

/// The exception Python users expect: `OSError` and its kin for the system's refusals, `ValueError` for the file's faults.
fn raise(py: Python<'_>, path: &Path, e: &Error) -> PyErr {
    match e {
        Error::Io(io) => match io.raw_os_error() {
            Some(code) => {
                let text = py
                    .import("os")
                    .and_then(|os| os.call_method1("strerror", (code,)))
                    .and_then(|s| s.extract::<String>())
                    .unwrap_or_else(|_| io.to_string());
                PyOSError::new_err((code, text, path.as_os_str().to_os_string()))
            }
            None if io.kind() == std::io::ErrorKind::InvalidInput => PyValueError::new_err(io.to_string()),
            None => PyOSError::new_err(format!("{}: {io}", path.display())),
        },
        Error::NotAFile(_) if path.is_dir() => {
            PyIsADirectoryError::new_err((EISDIR, "Is a directory", path.as_os_str().to_os_string()))
        }
        Error::NotAFile(_) => PyOSError::new_err(e.to_string()),
        _ => PyValueError::new_err(format!("{}: {e}", path.display())),
    }
}

/// Name, type, shape and bytes of a tensor.
type Row<'a, 'py> = (&'a str, &'static str, Bound<'py, PyTuple>, u64);

/// An open safetensors file: the header is checked, tensors are read on demand.
#[pyclass(module = "nibblas._core", frozen)]
struct SafetensorsReader {
    path: PathBuf,
    reader: Reader,
}

#[pymethods]
impl SafetensorsReader {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let reader = py.detach(|| Reader::open(&path)).map_err(|e| raise(py, &path, &e))?;
        Ok(Self { path, reader })
    }

    /// Per tensor: name, type, shape and bytes, in the order of the data.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Vec<Row<'_, 'py>>> {
        let tensors = self.reader.header().tensors().iter();
        tensors
            .map(|t| {
                let shape = PyTuple::new(py, &t.spec.shape)?;
                Ok((t.spec.name.as_str(), t.spec.dtype.name(), shape, t.nbytes()))
            })
            .collect()
    }

    /// The metadata entries, ordered by key.
    fn metadata(&self) -> Vec<(&str, &str)> {
        self.reader.header().metadata().iter().map(|(k, v)| (k.as_str(), v.as_str())).collect()
    }

    /// Fills `out` with the bytes of a tensor from byte `offset` of it.
    #[pyo3(signature = (name, offset, out, /))]
    fn read_into(&self, py: Python<'_>, name: &str, offset: u64, out: &Bound<'_, PyArray1<u8>>) -> PyResult<()> {
        let mut out = out.try_readwrite()?;
        let bytes = out.as_slice_mut().map_err(|e| PyValueError::new_err(e.to_string()))?;
        py.detach(|| self.reader.read_into(name, offset, bytes)).map_err(|e| raise(py, &self.path, &e))
    }
}

/// A safetensors file in the making: the target appears whole at `finish`, or not at all.
#[pyclass(module = "nibblas._core", frozen)]
struct SafetensorsWriter {
    path: PathBuf,
    writer: Mutex<Option<Writer>>,
}

impl SafetensorsWriter {
    fn lock(&self) -> MutexGuard<'_, Option<Writer>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> PyErr {
    PyValueError::new_err("the writer is closed")
}

#[pymethods]
impl SafetensorsWriter {
    #[new]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        specs: Vec<(String, String, Vec<u64>)>,
        metadata: Vec<(String, String)>,
    ) -> PyResult<Self> {
        let specs = specs
            .into_iter()
            .map(|(name, dtype, shape)| match Dtype::parse(&dtype) {
                Some(dtype) => Ok(Spec { name, dtype, shape }),
                None => Err(raise(py, &path, &Error::UnknownDtype { name, dtype })),
            })
            .collect::<PyResult<Vec<_>>>()?;
        let writer = py.detach(|| Writer::create(&path, specs, metadata)).map_err(|e| raise(py, &path, &e))?;
        Ok(Self { path, writer: Mutex::new(Some(writer)) })
    }

    /// Adds bytes to a tensor, after those it has.
    #[pyo3(signature = (name, data, /))]
    fn append(&self, py: Python<'_>, name: &str, data: &Bound<'_, PyArray1<u8>>) -> PyResult<()> {
        let data = data.try_readonly()?;
        let bytes = data.as_slice().map_err(|e| PyValueError::new_err(e.to_string()))?;
        py.detach(|| self.lock().as_mut().map(|w| w.append(name, bytes)))
            .ok_or_else(closed)?
            .map_err(|e| raise(py, &self.path, &e))
    }

    /// Flushes the file to the disk and gives it its name; on an error the target is untouched.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.lock().take().map(Writer::finish)).ok_or_else(closed)?.map_err(|e| raise(py, &self.path, &e))
    }

    /// Removes what was written; nothing happens after `finish`.
    fn abort(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().take()));
    }
}

/// Adds this module's classes to the extension module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<SafetensorsReader>()?;
    m.add_class::<SafetensorsWriter>()
}
