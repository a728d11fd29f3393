//! Products without a multiplier, on arrays that the Python side made contiguous.
use crate::array::Nd;
use crate::convert::detached;
use crate::product::isa_of;
use crate::tensor::Parts;
use nibblas_core::{QView, Scalar};
use nibblas_ops::approx::lmul::{self, Model};
use nibblas_ops::approx::{shift, shift_add};
use nibblas_ops::Exec;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// `y[M, N] = a[M, K] W^T + bias` without a multiplication; `a` is int8 codes, or float32 that 16-bit floats fit. `by` is
/// `"planes"` for shifts and additions by binary digits, `"powers"` for weights that are powers of two.
#[pyfunction]
#[pyo3(signature = (by, a, parts, y, bias, threads, isa, /))]
fn ops_shift_add(
    py: Python<'_>,
    by: &str,
    a: &Bound<'_, PyAny>,
    parts: Parts<'_>,
    y: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let (bytes, floats): (Product<i8>, Product<f32>) = match by {
        "planes" => (shift_add::matmul_int8, shift_add::matmul_half),
        "powers" => (shift::matmul_int8, shift::matmul_half),
        _ => return Err(PyValueError::new_err(format!("unknown product {by:?}"))),
    };
    let memory = parts.memory()?;
    let w = memory.view()?;
    let (a, mut y, isa) = (Nd::new(a)?, Nd::new(y)?, isa_of(isa)?);
    let bias = bias.map(Nd::new).transpose()?;
    let bias = bias.as_ref().map(Nd::f32s).transpose()?;
    let y = y.f32s_mut()?;
    match a.scalar()? {
        Scalar::I8 => {
            let a = a.i8s()?;
            detached(py, |poll| bytes(&Exec { isa, threads, poll: Some(poll) }, a, &w, bias, y))
        }
        Scalar::F32 => {
            let a = a.f32s()?;
            detached(py, |poll| floats(&Exec { isa, threads, poll: Some(poll) }, a, &w, bias, y))
        }
        _ => Err(PyTypeError::new_err("expected int8 or float32")),
    }
}

/// A product of activations of a type with weights.
type Product<T> = fn(&Exec, &[T], &QView, Option<&[f32]>, &mut [f32]) -> nibblas_core::Result<()>;

fn bits(s: &[f32]) -> &[u32] {
    // SAFETY: types of the same size and alignment, for both of which all bits are values.
    unsafe { std::slice::from_raw_parts(s.as_ptr().cast(), s.len()) }
}

fn bits_mut(s: &mut [f32]) -> &mut [u32] {
    // SAFETY: as above, borrowed exclusively.
    unsafe { std::slice::from_raw_parts_mut(s.as_mut_ptr().cast(), s.len()) }
}

/// `(offset, smallest, largest, beyond)` as bits of float32.
fn model((offset, smallest, largest, beyond): (u32, u32, u32, u32)) -> Model {
    Model { offset, smallest, largest, beyond }
}

/// Products of pairs of float32.
#[pyfunction]
#[pyo3(signature = (a, b, y, numbers, threads, isa, /))]
fn ops_lmul(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    b: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    numbers: (u32, u32, u32, u32),
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let (a, b, mut y, isa) = (Nd::new(a)?, Nd::new(b)?, Nd::new(y)?, isa_of(isa)?);
    let (a, b, y) = (bits(a.f32s()?), bits(b.f32s()?), bits_mut(y.f32s_mut()?));
    detached(py, |poll| lmul::lmul(&Exec { isa, threads, poll: Some(poll) }, model(numbers), a, b, y))
}

/// `y[M, N] = a[M, K] b[K, N]`.
#[pyfunction]
#[pyo3(signature = (a, b, y, n, k, numbers, threads, isa, /))]
fn ops_lmul_matmul(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    b: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    n: usize,
    k: usize,
    numbers: (u32, u32, u32, u32),
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let (a, b, mut y, isa) = (Nd::new(a)?, Nd::new(b)?, Nd::new(y)?, isa_of(isa)?);
    let (a, b, y) = (bits(a.f32s()?), bits(b.f32s()?), y.f32s_mut()?);
    detached(py, |poll| lmul::matmul(&Exec { isa, threads, poll: Some(poll) }, model(numbers), a, b, n, k, y))
}

/// Adds this module's names to the extension module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(ops_shift_add, m)?)?;
    m.add_function(wrap_pyfunction!(ops_lmul, m)?)?;
    m.add_function(wrap_pyfunction!(ops_lmul_matmul, m)?)
}
