//! Operators of integers on arrays that the Python side made contiguous.
use crate::array::{Kind, Nd};
use crate::convert::{detached, to_py};
use crate::product::isa_of;
use nibblas_core::Scalar;
use nibblas_ops::intops::gelu::{self, Function};
use nibblas_ops::intops::requant::{self, Rounding};
use nibblas_ops::intops::scale::Dyadic;
use nibblas_ops::intops::{add, compat, norm, softmax, sqrt};
use nibblas_ops::{Exec, Ints, IntsMut};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// Integers to read.
pub fn ints(a: &Nd) -> PyResult<Ints<'_>> {
    Ok(match a.kind {
        Kind::Float(Scalar::I8) => Ints::I8(a.i8s()?),
        Kind::U8 => Ints::U8(a.u8s()?),
        Kind::I16 => Ints::I16(a.i16s()?),
        // What arrives under the number of uint16 is bfloat16 elsewhere.
        Kind::Float(Scalar::BF16) => Ints::U16(a.bits16()?),
        Kind::I32 => Ints::I32(a.i32s()?),
        _ => return Err(PyTypeError::new_err("expected integers of at most 32 bits")),
    })
}

/// Integers to write.
pub fn ints_mut(a: &mut Nd) -> PyResult<IntsMut<'_>> {
    Ok(match a.kind {
        Kind::Float(Scalar::I8) => IntsMut::I8(a.i8s_mut()?),
        Kind::U8 => IntsMut::U8(a.u8s_mut()?),
        Kind::I16 => IntsMut::I16(a.i16s_mut()?),
        Kind::Float(Scalar::BF16) => IntsMut::U16(a.bits16_mut()?),
        Kind::I32 => IntsMut::I32(a.i32s_mut()?),
        _ => return Err(PyTypeError::new_err("expected integers of at most 32 bits")),
    })
}

/// `(multiplier, shift)` of a positive scale.
#[pyfunction]
#[pyo3(signature = (scale, /))]
fn ops_dyadic(scale: f64) -> PyResult<(i32, i32)> {
    Dyadic::new(scale).map(|d| (d.multiplier, d.shift)).map_err(to_py)
}

#[pyfunction]
#[pyo3(signature = (x, y, multipliers, shifts, inner, zero, rounding, threads, isa, /))]
fn ops_requantize(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    multipliers: Vec<i32>,
    shifts: Vec<i32>,
    inner: usize,
    zero: i32,
    rounding: &str,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let rounding = match rounding {
        "single" => Rounding::Single,
        "gemmlowp" => Rounding::Gemmlowp,
        "float" => Rounding::Float,
        _ => {
            let message = format!("unknown rounding {rounding:?}: expected single, gemmlowp or float");
            return Err(PyValueError::new_err(message));
        }
    };
    let factors = multipliers.iter().zip(&shifts).map(|(&multiplier, &shift)| Dyadic { multiplier, shift });
    let factors: Vec<Dyadic> = factors.collect();
    let (x, mut y, isa) = (Nd::new(x)?, Nd::new(y)?, isa_of(isa)?);
    let (x, y) = (ints(&x)?, ints_mut(&mut y)?);
    detached(py, |poll| {
        let exec = Exec { isa, threads, poll: Some(poll) };
        requant::requantize(&exec, x, &factors, inner, zero, rounding, y)
    })
}

#[pyfunction]
#[pyo3(signature = (a, a_scale, b, b_scale, out_scale, each, y, threads, isa, /))]
fn ops_add(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    a_scale: f64,
    b: &Bound<'_, PyAny>,
    b_scale: f64,
    out_scale: f64,
    each: bool,
    y: &Bound<'_, PyAny>,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let (a, b, mut y, isa) = (Nd::new(a)?, Nd::new(b)?, Nd::new(y)?, isa_of(isa)?);
    let (a, b, y) = (ints(&a)?, ints(&b)?, ints_mut(&mut y)?);
    detached(py, |poll| {
        let exec = Exec { isa, threads, poll: Some(poll) };
        add::add(&exec, a, a_scale, b, b_scale, out_scale, each, y)
    })
}

#[pyfunction]
#[pyo3(signature = (function, x, scale, out_scale, y, threads, isa, /))]
fn ops_apply(
    py: Python<'_>,
    function: &str,
    x: &Bound<'_, PyAny>,
    scale: f64,
    out_scale: f64,
    y: &Bound<'_, PyAny>,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let function = match function {
        "gelu" => Function::Gelu,
        "silu" => Function::Silu,
        "sigmoid" => Function::Sigmoid,
        "exp" => Function::Exp,
        _ => return Err(PyValueError::new_err(format!("unknown function {function:?}"))),
    };
    let (x, mut y, isa) = (Nd::new(x)?, Nd::new(y)?, isa_of(isa)?);
    let (x, y) = (ints(&x)?, ints_mut(&mut y)?);
    detached(py, |poll| {
        let exec = Exec { isa, threads, poll: Some(poll) };
        gelu::apply(&exec, function, x, scale, out_scale, y)
    })
}

#[pyfunction]
#[pyo3(signature = (x, y, cols, scale, threads, isa, /))]
fn ops_softmax(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    cols: usize,
    scale: f64,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let (x, mut y, isa) = (Nd::new(x)?, Nd::new(y)?, isa_of(isa)?);
    let (x, y) = (ints(&x)?, ints_mut(&mut y)?);
    detached(py, |poll| softmax::softmax(&Exec { isa, threads, poll: Some(poll) }, x, cols, scale, y))
}

/// Layer norm, or RMS norm where `centre` is false.
#[pyfunction]
#[pyo3(signature = (x, y, centre, scale, weight, bias, eps, out_scale, threads, isa, /))]
fn ops_norm(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    centre: bool,
    scale: f64,
    weight: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    eps: f64,
    out_scale: f64,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let (x, mut y, weight, isa) = (Nd::new(x)?, Nd::new(y)?, Nd::new(weight)?, isa_of(isa)?);
    let bias = bias.map(Nd::new).transpose()?;
    let (weight, bias) = (weight.f32s()?, bias.as_ref().map(Nd::f32s).transpose()?);
    let (x, y) = (ints(&x)?, ints_mut(&mut y)?);
    detached(py, |poll| {
        let exec = Exec { isa, threads, poll: Some(poll) };
        if centre {
            norm::layer_norm(&exec, x, scale, weight, bias, eps, out_scale, y)
        } else {
            norm::rms_norm(&exec, x, scale, weight, eps, out_scale, y)
        }
    })
}

/// RMS norm coded as int8; `scales` has two int32 for each row.
#[pyfunction]
#[pyo3(signature = (x, y, scales, scale, weight, eps, threads, isa, /))]
fn ops_norm_codes(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    scale: f64,
    weight: &Bound<'_, PyAny>,
    eps: f64,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let (x, mut y, weight, isa) = (Nd::new(x)?, Nd::new(y)?, Nd::new(weight)?, isa_of(isa)?);
    let mut scales = Nd::new(scales)?;
    let (x, y, weight) = (ints(&x)?, y.i8s_mut()?, weight.f32s()?);
    let (pairs, rest) = scales.i32s_mut()?.as_chunks_mut::<2>();
    if !rest.is_empty() {
        return Err(PyValueError::new_err("scales come in pairs"));
    }
    detached(py, |poll| norm::rms_norm_codes(&Exec { isa, threads, poll: Some(poll) }, x, scale, weight, eps, y, pairs))
}

/// Floors of square roots of the bits of int32 or int64 arrays, taken as unsigned.
#[pyfunction]
#[pyo3(signature = (x, y, ivit, threads, isa, /))]
fn ops_sqrt(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    ivit: bool,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let (x, mut y, isa) = (Nd::new(x)?, Nd::new(y)?, isa_of(isa)?);
    if x.kind == Kind::I32 {
        let (x, y) = (unsigned32(x.i32s()?), unsigned32_mut(y.i32s_mut()?));
        return detached(py, |poll| sqrt::sqrt32(&Exec { isa, threads, poll: Some(poll) }, x, y));
    }
    let (x, y) = (unsigned64(x.i64s()?), unsigned64_mut(y.i64s_mut()?));
    if ivit {
        return detached(py, |_| compat::ivit_sqrt(x, y));
    }
    detached(py, |poll| sqrt::sqrt64(&Exec { isa, threads, poll: Some(poll) }, x, y))
}

macro_rules! unsigned {
    ($read:ident, $write:ident, $from:ty, $to:ty) => {
        fn $read(s: &[$from]) -> &[$to] {
            // SAFETY: types of the same size and alignment, for both of which all bits are values.
            unsafe { std::slice::from_raw_parts(s.as_ptr().cast(), s.len()) }
        }

        fn $write(s: &mut [$from]) -> &mut [$to] {
            // SAFETY: as above, borrowed exclusively.
            unsafe { std::slice::from_raw_parts_mut(s.as_mut_ptr().cast(), s.len()) }
        }
    };
}

unsigned!(unsigned32, unsigned32_mut, i32, u32);
unsigned!(unsigned64, unsigned64_mut, i64, u64);

/// The published operators: results in int64.
#[pyfunction]
#[pyo3(signature = (function, family, x, cols, scale, bias, y, threads, /))]
fn ops_compat(
    py: Python<'_>,
    function: &str,
    family: &str,
    x: &Bound<'_, PyAny>,
    cols: usize,
    scale: f64,
    bias: Option<&Bound<'_, PyAny>>,
    y: &Bound<'_, PyAny>,
    threads: usize,
) -> PyResult<()> {
    let family = match family {
        "ibert" => compat::Family::Ibert,
        "ivit" => compat::Family::Ivit,
        _ => return Err(PyValueError::new_err(format!("unknown compat {family:?}: expected ibert or ivit"))),
    };
    let (x, mut y) = (Nd::new(x)?, Nd::new(y)?);
    let bias = bias.map(Nd::new).transpose()?;
    let bias = bias.as_ref().map(Nd::i64s).transpose()?;
    let (x, y) = (ints(&x)?, y.i64s_mut()?);
    detached(py, |poll| {
        let exec = Exec { threads, poll: Some(poll), ..Exec::default() };
        match function {
            "exp" => compat::exp(&exec, family, x, scale, y),
            "softmax" => compat::softmax(&exec, family, x, cols, scale, y),
            "gelu" => compat::gelu(&exec, family, x, cols, scale, y),
            _ => compat::layer_norm(&exec, family, x, bias.unwrap_or(&[]), y),
        }
    })
}

/// Adds this module's names to the extension module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(ops_dyadic, m)?)?;
    m.add_function(wrap_pyfunction!(ops_requantize, m)?)?;
    m.add_function(wrap_pyfunction!(ops_add, m)?)?;
    m.add_function(wrap_pyfunction!(ops_apply, m)?)?;
    m.add_function(wrap_pyfunction!(ops_softmax, m)?)?;
    m.add_function(wrap_pyfunction!(ops_norm, m)?)?;
    m.add_function(wrap_pyfunction!(ops_norm_codes, m)?)?;
    m.add_function(wrap_pyfunction!(ops_sqrt, m)?)?;
    m.add_function(wrap_pyfunction!(ops_compat, m)?)
}
