//! Sparse weights: packing kept entries, products by columns, and the state of delta inference.
use crate::array::Nd;
use crate::convert::{detached, to_py};
use crate::product::{compute_of, isa_of};
use crate::tensor::Parts;
use nibblas_core::gemm::Options;
use nibblas_core::sparse::columns;
use nibblas_core::{isa, sparse, Format};
use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};

/// `(codes of the kept entries, mask)` of a dense matrix in the sparse format of that name.
#[pyfunction]
#[pyo3(signature = (parts, format, /))]
fn sparse_pack<'py>(
    py: Python<'py>,
    parts: Parts<'_>,
    format: &str,
) -> PyResult<(Bound<'py, PyArray1<u8>>, Bound<'py, PyArray1<u8>>)> {
    let format = Format::parse(format).map_err(to_py)?;
    let memory = parts.memory()?;
    let view = memory.view()?;
    let Some(structure) = format.structure.filter(|_| format.dense() == view.format) else {
        return Err(PyValueError::new_err(format!("{} is not {format} with all entries kept", view.format)));
    };
    let q = py.detach(|| sparse::pack(&view, structure)).map_err(to_py)?;
    let mask = q.mask.map_or_else(Vec::new, |m| m.bytes().to_vec());
    Ok((q.codes.into_pyarray(py), mask.into_pyarray(py)))
}

/// The packed codes of a sparse matrix with all entries kept.
#[pyfunction]
#[pyo3(signature = (parts, /))]
fn sparse_unpack<'py>(py: Python<'py>, parts: Parts<'_>) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let memory = parts.memory()?;
    let view = memory.view()?;
    let q = py.detach(|| sparse::unpack(&view)).map_err(to_py)?;
    Ok(q.codes.into_pyarray(py))
}

/// A weight by columns. Immutable.
#[pyclass(frozen, module = "nibblas._core")]
pub struct Columns {
    inner: Arc<columns::Columns>,
}

#[pymethods]
impl Columns {
    #[new]
    #[pyo3(signature = (parts, threads, /))]
    fn new(py: Python<'_>, parts: Parts<'_>, threads: usize) -> PyResult<Self> {
        let memory = parts.memory()?;
        let view = memory.view()?;
        let inner = py.detach(|| columns::Columns::new(&view, threads)).map_err(to_py)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.nbytes()
    }

    /// `y = x W^T` over the activations that are not 0; false, and nothing done, where that does not pay.
    #[pyo3(signature = (x, y, compute, bias, threads, isa, /))]
    fn matmul(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        y: &Bound<'_, PyAny>,
        compute: &str,
        bias: Option<&Bound<'_, PyAny>>,
        threads: usize,
        isa: Option<&str>,
    ) -> PyResult<bool> {
        let (x, mut y) = (Nd::new(x)?, Nd::new(y)?);
        let bias = bias.map(Nd::new).transpose()?;
        let bias = bias.as_ref().map(Nd::f32s).transpose()?;
        let (compute, isa) = (compute_of(compute)?, isa_of(isa)?);
        let x = x.mat()?;
        let mut y = y.mat_mut()?;
        let options = Options { compute, bias, threads, isa, poll: None };
        py.detach(|| self.inner.matmul(&x, &mut y, &options)).map_err(to_py)
    }
}

/// The codes and sums of the last input of a linear layer.
#[pyclass(frozen, module = "nibblas._core")]
pub struct Delta {
    weight: Arc<columns::Columns>,
    state: Mutex<columns::Delta>,
}

#[pymethods]
impl Delta {
    #[new]
    #[pyo3(signature = (weight, rows, /))]
    fn new(weight: &Columns, rows: usize) -> PyResult<Self> {
        let weight = Arc::clone(&weight.inner);
        let state = Mutex::new(columns::Delta::new(&weight, rows).map_err(to_py)?);
        Ok(Self { weight, state })
    }

    /// Writes the product with a new input; returns how many columns it took.
    #[pyo3(signature = (x, y, scale, threshold, bias, threads, /))]
    fn step(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        y: &Bound<'_, PyAny>,
        scale: Option<f32>,
        threshold: f32,
        bias: Option<&Bound<'_, PyAny>>,
        threads: usize,
    ) -> PyResult<usize> {
        let (x, mut y) = (Nd::new(x)?, Nd::new(y)?);
        let bias = bias.map(Nd::new).transpose()?;
        let bias = bias.as_ref().map(Nd::f32s).transpose()?;
        let x = x.mat()?;
        let mut y = y.mat_mut()?;
        detached(py, |_| {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.step(&self.weight, &x, scale, threshold, bias, isa::active(), threads, &mut y)?;
            Ok(state.added)
        })
    }
}

/// Adds this module's names to the extension module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Columns>()?;
    m.add_class::<Delta>()?;
    m.add_function(wrap_pyfunction!(sparse_pack, m)?)?;
    m.add_function(wrap_pyfunction!(sparse_unpack, m)?)
}
