//! Products: stacks of matrices in NumPy's memory against packed weights.
use crate::array::{empty, plain_matrix, Kind, Nd};
use crate::convert::{detached, to_py};
use crate::tensor::Parts;
use nibblas_core::gemm::{self, Compute, Options};
use nibblas_core::isa::{self, Isa};
use nibblas_core::pack::PanelZeros;
use nibblas_core::pair::{self, RawOut};
use nibblas_core::quantize::ScalesMut;
use nibblas_core::{pack, reference as judge, Error, Format, MatMut, MatRef, Scalar, ScaleType};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// A weight rearranged for the kernels. Immutable.
#[pyclass(frozen, module = "nibblas._core")]
pub struct Packed {
    inner: pack::Packed,
}

#[pymethods]
impl Packed {
    #[getter]
    fn rows(&self) -> usize {
        self.inner.rows()
    }

    #[getter]
    fn cols(&self) -> usize {
        self.inner.cols()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.nbytes()
    }

    /// Restores the portable codes, scales, zero points or mask into an array of their shape and type.
    #[pyo3(signature = (part, out, threads, /))]
    fn restore(&self, py: Python<'_>, part: &str, out: &Bound<'_, PyAny>, threads: usize) -> PyResult<()> {
        let mut out = Nd::new(out)?;
        let w = &self.inner;
        match (part, w.format.scale) {
            ("codes", _) => {
                let out = out.u8s_mut()?;
                py.detach(|| w.restore_codes(out, threads))
            }
            ("mask", _) => w.restore_mask(out.u8s_mut()?),
            ("scales", ScaleType::F32) => w.restore_scales(ScalesMut::F32(out.f32s_mut()?)),
            ("scales", ScaleType::F16) => w.restore_scales(ScalesMut::F16(out.bits16_mut()?)),
            ("scales", ScaleType::BF16) => w.restore_scales(ScalesMut::BF16(out.bits16_mut()?)),
            ("scales", ScaleType::E4M3) => w.restore_scales(ScalesMut::E4M3(out.u8s_mut()?)),
            ("scales", ScaleType::I8) => w.restore_scales(ScalesMut::I8(out.u8s_mut()?)),
            ("scales", ScaleType::E8M0) => w.restore_scales(ScalesMut::E8M0(out.u8s_mut()?)),
            _ if matches!(w.zeros, PanelZeros::Float(_)) => w.restore_float_zeros(out.f32s_mut()?),
            _ => w.restore_zeros(out.u8s_mut()?),
        }
        .map_err(to_py)
    }

    #[getter]
    #[allow(clippy::unused_self)]
    fn isa(&self) -> String {
        isa::active().to_string()
    }
}

/// What `explain` says: prints as text, `fields()` as a dict.
#[pyclass(frozen, module = "nibblas._core")]
pub struct Plan {
    text: String,
    fields: Vec<(String, String)>,
}

#[pymethods]
impl Plan {
    fn __str__(&self) -> &str {
        &self.text
    }

    fn __repr__(&self) -> &str {
        &self.text
    }

    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let d = PyDict::new(py);
        for (name, value) in &self.fields {
            d.set_item(name, value)?;
        }
        Ok(d)
    }
}

#[pyfunction(name = "pack")]
#[pyo3(signature = (parts, threads, /))]
fn pack_parts(py: Python<'_>, parts: Parts<'_>, threads: usize) -> PyResult<Packed> {
    let memory = parts.memory()?;
    let view = memory.view()?;
    let inner = py.detach(|| pack::pack(&view, threads)).map_err(to_py)?;
    Ok(Packed { inner })
}

pub fn compute_of(name: &str) -> PyResult<Compute> {
    name.parse().map_err(to_py)
}

/// The level of that name, or the active one.
///
/// # Errors
/// ValueError for levels above the active one.
pub fn isa_of(name: Option<&str>) -> PyResult<Isa> {
    let Some(name) = name else { return Ok(isa::active()) };
    let want: Isa = name.parse().map_err(PyValueError::new_err)?;
    if want > isa::active() || !want.is_available() {
        return Err(PyValueError::new_err(format!("ISA level {want} is above the active one or not available")));
    }
    Ok(want)
}

/// The computes of a format: those of its element, less activation groups that do not nest with its own.
pub fn computes(format: &Format) -> impl Iterator<Item = &'static str> + '_ {
    format.computes().iter().copied().filter(|name| match (name.parse(), format.group) {
        (Ok(Compute::Int8 { group: Some(a) }), Some(w)) => a % w == 0 || w % a == 0,
        _ => true,
    })
}

/// ValueError naming the computes of a format, where it lacks this one.
#[pyfunction]
#[pyo3(signature = (compute, format, /))]
fn check_compute(compute: &str, format: &str) -> PyResult<()> {
    let format = Format::parse(format).map_err(to_py)?;
    if computes(&format).any(|c| c == compute) {
        return Ok(());
    }
    let known = computes(&format).collect::<Vec<_>>().join(", ");
    Err(PyValueError::new_err(format!("{format} has no compute={compute:?}: expected one of {known}")))
}

/// One axis of a stack: length, byte stride of x, byte stride of y.
type Axis = (usize, isize, isize);

/// Whether walking `outer` and then `inner` is one walk with the strides of `inner`.
fn chains(outer: Axis, inner: Axis) -> bool {
    let step = |stride: isize| stride.checked_mul(inner.0 as isize);
    step(inner.1) == Some(outer.1) && step(inner.2) == Some(outer.2)
}

/// The rows of a stack of matrices, as few long walks as the strides allow: `(rows, outer axes)`.
fn merge(axes: impl DoubleEndedIterator<Item = Axis>) -> (Axis, Vec<Axis>) {
    let mut merged: Vec<Axis> = Vec::new();
    for axis in axes.rev().filter(|a| a.0 != 1) {
        match merged.last_mut() {
            Some(inner) if chains(axis, *inner) => inner.0 *= axis.0,
            _ => merged.push(axis),
        }
    }
    if merged.is_empty() {
        return ((1, 0, 0), merged);
    }
    let rows = merged.remove(0);
    (rows, merged)
}

/// Calls `f(x offset, y offset)` for every combination of the outer axes.
fn walk(axes: &[Axis], f: &mut impl FnMut(isize, isize) -> nibblas_core::Result<()>) -> nibblas_core::Result<()> {
    fn level(
        axes: &[Axis],
        x: isize,
        y: isize,
        f: &mut impl FnMut(isize, isize) -> nibblas_core::Result<()>,
    ) -> nibblas_core::Result<()> {
        match axes.split_last() {
            None => f(x, y),
            Some((&(n, sx, sy), rest)) => (0..n as isize).try_for_each(|i| level(rest, x + i * sx, y + i * sy, f)),
        }
    }
    level(axes, 0, 0, f)
}

/// `y[..., M, N] = x[..., M, K] W^T`, for arrays of any strides; stacks have equal shapes.
#[pyfunction]
#[pyo3(signature = (x, packed, y, compute, bias, threads, isa, /))]
fn matmul(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    packed: &Packed,
    y: &Bound<'_, PyAny>,
    compute: &str,
    bias: Option<&Bound<'_, PyAny>>,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let w = &packed.inner;
    let (x, y) = (Nd::new(x)?, Nd::new(y)?);
    let bias = bias.map(Nd::new).transpose()?;
    let options_bias = bias.as_ref().map(Nd::f32s).transpose()?;
    let (compute, isa) = (compute_of(compute)?, isa_of(isa)?);
    y.require_writeable()?;
    let d = x.shape.len();
    let fits = d >= 2
        && y.shape.len() == d
        && x.shape[..d - 1] == y.shape[..d - 1]
        && x.shape[d - 1] == w.cols()
        && y.shape[d - 1] == w.rows()
        && options_bias.is_none_or(|b| b.len() == w.rows());
    if !fits {
        return Err(PyValueError::new_err(format!(
            "shapes do not fit: x {:?}, weight ({}, {}), y {:?}",
            x.shape,
            w.rows(),
            w.cols(),
            y.shape
        )));
    }
    let (xs, ys) = (x.scalar()?, y.scalar()?);
    if y.len() == 0 {
        return Ok(());
    }
    let axes = (0..d - 1).map(|i| (x.shape[i], x.strides[i], y.strides[i]));
    let (rows, outer) = merge(axes);
    let (x, y) = (&x, &y);
    detached(py, |poll| {
        let options = Options { compute, bias: options_bias, threads, isa, poll: Some(poll) };
        walk(&outer, &mut |ox, oy| {
            // SAFETY: NumPy guarantees the elements of both arrays, whose objects the caller holds; the offsets walk
            // over their axes. The Python side passes a `y` without internal overlap that shares no memory with `x`.
            let (mx, mut my) = unsafe {
                (
                    MatRef::from_raw(x.ptr.wrapping_offset(ox), xs, rows.0, w.cols(), rows.1, x.strides[d - 1]),
                    MatMut::from_raw(y.ptr.wrapping_offset(oy), ys, rows.0, w.rows(), rows.2, y.strides[d - 1]),
                )
            };
            gemm::matmul(&mx, w, &mut my, &options)
        })
    })
}

/// The short way for a plain array of one or two dimensions: the product in a new array, or None where something
/// about the operands is out of the ordinary and the caller has to take the long way.
#[pyfunction]
#[pyo3(signature = (x, packed, threads, /))]
fn matmul_plain<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    packed: &Packed,
    threads: usize,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let w = &packed.inner;
    let Some((mx, type_num, ndim)) = plain_matrix(x) else { return Ok(None) };
    if mx.cols != w.cols() {
        return Ok(None);
    }
    let mut dims = [mx.rows as isize, w.rows() as isize];
    let (y, data) = empty(py, &mut dims[2 - ndim..], type_num, mx.scalar.size())?;
    if mx.rows == 0 || w.rows() == 0 {
        return Ok(Some(y));
    }
    let size = mx.scalar.size() as isize;
    // SAFETY: a new C-contiguous array of this shape, which nobody else has seen.
    let mut my = unsafe { MatMut::from_raw(data, mx.scalar, mx.rows, w.rows(), size * w.rows() as isize, size) };
    detached(py, |poll| {
        let options = Options { compute: Compute::F32, bias: None, threads, isa: isa::active(), poll: Some(poll) };
        gemm::matmul(&mx, w, &mut my, &options)
    })?;
    Ok(Some(y))
}

/// `y[M, N] = A W^T` of two quantised matrices, in integers; false where their formats do not allow that.
#[pyfunction]
#[pyo3(signature = (parts, packed, y, bias, threads, isa, /))]
fn matmul_q(
    py: Python<'_>,
    parts: Parts<'_>,
    packed: &Packed,
    y: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<bool> {
    let memory = parts.memory()?;
    let view = memory.view()?;
    let bias = bias.map(Nd::new).transpose()?;
    let bias = bias.as_ref().map(Nd::f32s).transpose()?;
    let isa = isa_of(isa)?;
    let mut y = Nd::new(y)?;
    if y.shape != [view.rows, packed.inner.rows()] || bias.is_some_and(|b| b.len() != packed.inner.rows()) {
        return Err(PyValueError::new_err("shapes do not fit"));
    }
    let mut y = y.mat_mut()?;
    detached(py, |poll| {
        let options = Options { compute: Compute::Int8 { group: None }, bias, threads, isa, poll: Some(poll) };
        match pair::matmul_q(&view, &packed.inner, &mut y, &options) {
            Err(Error::Unsupported(_)) => Ok(false),
            done => done.map(|()| true),
        }
    })
}

/// The sums of code values of two quantised matrices, in int32 or int64.
#[pyfunction]
#[pyo3(signature = (parts, packed, y, threads, isa, /))]
fn matmul_raw(
    py: Python<'_>,
    parts: Parts<'_>,
    packed: &Packed,
    y: &Bound<'_, PyAny>,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let memory = parts.memory()?;
    let view = memory.view()?;
    let isa = isa_of(isa)?;
    let mut y = Nd::new(y)?;
    if y.shape != [view.rows, packed.inner.rows()] {
        return Err(PyValueError::new_err("shapes do not fit"));
    }
    let mut out = if y.kind == Kind::I32 { RawOut::I32(y.i32s_mut()?) } else { RawOut::I64(y.i64s_mut()?) };
    detached(py, |poll| {
        let options = Options { compute: Compute::Int8 { group: None }, bias: None, threads, isa, poll: Some(poll) };
        pair::matmul_raw(&view, &packed.inner, &mut out, &options)
    })
}

/// The slow judge: `y[M, N] = x[M, K] W^T` by the letter of the numeric contract, for `f32` and the int8 computes.
#[pyfunction]
#[pyo3(signature = (x, parts, y, compute, bias, /))]
fn reference(
    x: &Bound<'_, PyAny>,
    parts: Parts<'_>,
    y: &Bound<'_, PyAny>,
    compute: &str,
    bias: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let memory = parts.memory()?;
    let w = memory.view()?;
    let x = Nd::new(x)?;
    let x = x.mat()?;
    let bias = bias.map(Nd::new).transpose()?;
    let bias = bias.as_ref().map(Nd::f32s).transpose()?;
    let mut y = Nd::new(y)?;
    if x.cols != w.cols || y.shape != [x.rows, w.rows] || bias.is_some_and(|b| b.len() != w.rows) {
        return Err(PyValueError::new_err("shapes do not fit"));
    }
    let result = match compute_of(compute)? {
        Compute::F32 => judge::matmul_f32_ref(&x, &w, bias),
        Compute::Int8 { group } => {
            let a = if x.scalar == Scalar::I8 && group.is_none() {
                let mut row = vec![0.0; x.cols];
                let mut codes = Vec::with_capacity(x.rows * x.cols);
                for i in 0..x.rows {
                    x.read_row(i, 0, &mut row);
                    codes.extend(row.iter().map(|&v| v as i8));
                }
                judge::Activations::from_codes(&codes, x.rows, x.cols)
            } else {
                judge::Activations::quantize(&x, group.map(|g| g as usize))
            };
            judge::matmul_int8_ref(&a, &w, bias)
        }
        Compute::Bf16 => return Err(PyValueError::new_err("bf16 has a bound, not a reference")),
    };
    y.f32s_mut()?.copy_from_slice(&result);
    Ok(())
}

#[pyfunction]
#[pyo3(signature = (m, packed, compute, threads, /))]
fn explain(m: usize, packed: &Packed, compute: &str, threads: usize) -> PyResult<Plan> {
    check_compute(compute, &packed.inner.format.to_string())?;
    let options = Options { compute: compute_of(compute)?, bias: None, threads, isa: isa::active(), poll: None };
    let plan = gemm::explain(m, &packed.inner, &options).map_err(to_py)?;
    let fields = plan.fields().into_iter().map(|(n, v)| (n.to_string(), v)).collect();
    Ok(Plan { text: plan.to_string(), fields })
}

/// `(level, None)` or `(level, why not)` for every ISA level, lowest first.
#[pyfunction]
fn isa_report(py: Python<'_>) -> PyResult<Bound<'_, PyTuple>> {
    PyTuple::new(py, Isa::ALL.iter().map(|i| (i.name(), i.missing())))
}

#[pyfunction]
fn isa_detected() -> &'static str {
    isa::detected().name()
}

#[pyfunction]
fn isa_active() -> &'static str {
    isa::active().name()
}

/// What to say where `NIBBLAS_ISA` could not be followed.
#[pyfunction]
fn isa_warning() -> Option<&'static str> {
    isa::warning()
}

/// Adds this module's names to the extension module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Packed>()?;
    m.add_class::<Plan>()?;
    m.add_function(wrap_pyfunction!(pack_parts, m)?)?;
    m.add_function(wrap_pyfunction!(check_compute, m)?)?;
    m.add_function(wrap_pyfunction!(matmul, m)?)?;
    m.add_function(wrap_pyfunction!(matmul_plain, m)?)?;
    m.add_function(wrap_pyfunction!(matmul_q, m)?)?;
    m.add_function(wrap_pyfunction!(matmul_raw, m)?)?;
    m.add_function(wrap_pyfunction!(reference, m)?)?;
    m.add_function(wrap_pyfunction!(explain, m)?)?;
    m.add_function(wrap_pyfunction!(isa_report, m)?)?;
    m.add_function(wrap_pyfunction!(isa_detected, m)?)?;
    m.add_function(wrap_pyfunction!(isa_active, m)?)?;
    m.add_function(wrap_pyfunction!(isa_warning, m)?)
}
