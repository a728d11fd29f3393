//! Formats, and the portable layout in NumPy's memory.
use crate::array::Nd;
use crate::convert::{detached, to_py};
use crate::product::computes;
use nibblas_core::format::{table, PART_NAMES};
use nibblas_core::qtensor::pack_values;
use nibblas_core::quantize::{quantize_polled, Dest, Method, ScalesMut};
use nibblas_core::sparse::Mask;
use nibblas_core::{Element, Format, QView, ScaleType, ScalesRef, ZeroKind, ZerosRef};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// Arrays of the portable layout by name, see `Format::parts`.
type Arrays<'py> = Bound<'py, PyDict>;

/// `(format, rows, cols, arrays)`: a matrix as Python holds it.
#[derive(FromPyObject)]
pub struct Parts<'py>(String, usize, usize, Arrays<'py>);

/// The memory of [`Parts`]; the arrays must outlive it.
pub struct Memory {
    format: Format,
    rows: usize,
    cols: usize,
    codes: Nd,
    scales: Nd,
    zeros: Option<Nd>,
    outer: Option<Nd>,
    mask: Option<Mask>,
    table: Option<Nd>,
}

fn optional(arrays: &Arrays<'_>, name: &str) -> PyResult<Option<Nd>> {
    arrays.get_item(name)?.as_ref().map(Nd::new).transpose()
}

/// The scales of rows or of the tensor.
fn outer(format: &Format, arrays: &Arrays<'_>) -> PyResult<Option<Nd>> {
    format.outer_name().map(|name| array(arrays, name)).transpose()
}

fn array(arrays: &Arrays<'_>, name: &str) -> PyResult<Nd> {
    optional(arrays, name)?.ok_or_else(|| PyValueError::new_err(format!("the matrix lacks its {name}")))
}

impl Parts<'_> {
    /// Describes the arrays.
    pub fn memory(&self) -> PyResult<Memory> {
        let format = Format::parse(&self.0).map_err(to_py)?;
        let arrays = &self.3;
        let mask = match (optional(arrays, "mask")?, format.structure) {
            (Some(a), Some(s)) => {
                Some(Mask::new(s, self.1, self.2, format.element.bits.into(), a.u8s()?).map_err(to_py)?)
            }
            (None, None) => None,
            _ => return Err(PyValueError::new_err(format!("{format} needs the mask of its structure, and no other"))),
        };
        Ok(Memory {
            format,
            rows: self.1,
            cols: self.2,
            codes: array(arrays, "codes")?,
            scales: array(arrays, "scales")?,
            zeros: optional(arrays, "zeros")?,
            outer: outer(&format, arrays)?,
            mask,
            table: optional(arrays, "table")?,
        })
    }
}

impl Memory {
    /// The checked view.
    pub fn view(&self) -> PyResult<QView<'_>> {
        let scales = match self.format.scale {
            ScaleType::F32 => ScalesRef::F32(self.scales.f32s()?),
            ScaleType::F16 => ScalesRef::F16(self.scales.bits16()?),
            ScaleType::BF16 => ScalesRef::BF16(self.scales.bits16()?),
            ScaleType::E8M0 => ScalesRef::E8M0(self.scales.u8s()?),
            ScaleType::E4M3 => ScalesRef::E4M3(self.scales.u8s()?),
            ScaleType::I8 => ScalesRef::I8(self.scales.u8s()?),
        };
        let zeros = match &self.zeros {
            None => ZerosRef::None,
            Some(z) => match z.u8s() {
                Ok(ints) => ZerosRef::Int(ints),
                Err(_) => ZerosRef::Float(z.f32s()?),
            },
        };
        let outer = self.outer.as_ref().map_or(Ok(&[][..]), Nd::f32s)?;
        let table = self.table.as_ref().map_or(Ok(&[][..]), Nd::f32s)?;
        QView::with_mask(self.format, self.rows, self.cols, self.codes.u8s()?, scales, zeros, self.mask.as_ref())
            .and_then(|v| v.with_outer(outer))
            .and_then(|v| v.with_table(table))
            .map_err(to_py)
    }
}

/// Name, bits, lowest and highest code, levels, zero points, computes; group length, scale types, whether codes are
/// integers, whether a group may be NaN, the rounding of integer products, whether all groups share one scale, how many codes
/// are read together.
fn row_tuple<'py>(py: Python<'py>, e: &'static Element) -> PyResult<Bound<'py, PyTuple>> {
    let (low, high) = e.values();
    let computes = PyTuple::new(py, e.computes)?;
    let scales = PyTuple::new(py, e.scales.iter().map(|s| s.name()))?;
    let zeros = e.zero == ZeroKind::PerGroup;
    let first = (e.name, e.bits, low, high, e.levels, zeros, computes, e.group, scales).into_pyobject(py)?;
    let second = (e.is_linear(), e.nan, e.rounding(), e.shared, e.span()).into_pyobject(py)?;
    PyTuple::new(py, first.iter().chain(second.iter()).collect::<Vec<_>>())
}

/// What each stored code is worth before zero point and stored scale.
#[pyfunction]
#[pyo3(signature = (name, /))]
fn code_values(name: &str) -> PyResult<Vec<f32>> {
    let e = Format::parse(name).map_err(to_py)?.element;
    Ok((0..e.levels).map(|u| e.number(u) * e.unit).collect())
}

#[pyfunction]
#[pyo3(signature = (name, /))]
fn parse_format<'py>(
    py: Python<'py>,
    name: &str,
) -> PyResult<(String, Bound<'py, PyTuple>, Option<u32>, &'static str, Bound<'py, PyTuple>, Option<String>)> {
    let f = Format::parse(name).map_err(to_py)?;
    let computes = PyTuple::new(py, computes(&f).collect::<Vec<_>>())?;
    let structure = f.structure.map(|s| s.to_string());
    Ok((f.to_string(), row_tuple(py, f.element)?, f.group, f.scale.name(), computes, structure))
}

/// Name, types, shape and kind of each array of a matrix.
#[pyfunction]
#[pyo3(signature = (name, rows, cols, /))]
fn format_parts<'py>(py: Python<'py>, name: &str, rows: usize, cols: usize) -> PyResult<Vec<Bound<'py, PyTuple>>> {
    let format = Format::parse(name).map_err(to_py)?;
    let parts = format.parts(rows, cols).map_err(to_py)?;
    parts
        .into_iter()
        .map(|p| (p.name, PyTuple::new(py, p.types)?, PyTuple::new(py, p.shape)?, p.along.name()).into_pyobject(py))
        .collect()
}

/// Every name that some part of a matrix has.
#[pyfunction]
fn part_names() -> [&'static str; PART_NAMES.len()] {
    PART_NAMES
}

#[pyfunction]
fn format_table(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyTuple>>> {
    table().map(|e| row_tuple(py, e)).collect()
}

fn method_of(name: &str) -> PyResult<Method> {
    match name {
        "rtn" => Ok(Method::Rtn),
        "mse" => Ok(Method::Mse),
        _ => Err(PyValueError::new_err(format!("unknown method {name:?}: expected rtn or mse"))),
    }
}

#[pyfunction]
#[pyo3(signature = (x, format, method, importance, arrays, bounds, threads, /))]
fn quantize(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    format: &str,
    method: &str,
    importance: Option<&Bound<'_, PyAny>>,
    arrays: &Arrays<'_>,
    bounds: &Bound<'_, PyAny>,
    threads: usize,
) -> PyResult<()> {
    let format = Format::parse(format).map_err(to_py)?;
    let method = method_of(method)?;
    let importance = importance.map(Nd::new).transpose()?;
    let importance = importance.as_ref().map(Nd::f32s).transpose()?;
    let x = Nd::new(x)?;
    let (mut codes, mut scales, mut bounds) = (array(arrays, "codes")?, array(arrays, "scales")?, Nd::new(bounds)?);
    let (mut zeros, mut outer) = (optional(arrays, "zeros")?, outer(&format, arrays)?);
    let mut table = optional(arrays, "table")?;
    let x = x.mat()?;
    let dest = Dest {
        codes: codes.u8s_mut()?,
        scales: match format.scale {
            ScaleType::F32 => ScalesMut::F32(scales.f32s_mut()?),
            ScaleType::F16 => ScalesMut::F16(scales.bits16_mut()?),
            ScaleType::BF16 => ScalesMut::BF16(scales.bits16_mut()?),
            ScaleType::E8M0 => ScalesMut::E8M0(scales.u8s_mut()?),
            ScaleType::E4M3 => ScalesMut::E4M3(scales.u8s_mut()?),
            ScaleType::I8 => ScalesMut::I8(scales.u8s_mut()?),
        },
        zeros: match &mut zeros {
            None => &mut [],
            Some(z) => z.u8s_mut()?,
        },
        bounds: bounds.f32s_mut()?,
        outer: match &mut outer {
            None => &mut [],
            Some(s) => s.f32s_mut()?,
        },
        table: match &mut table {
            None => &mut [],
            Some(t) => t.f32s_mut()?,
        },
    };
    detached(py, |poll| quantize_polled(&x, &format, method, importance, threads, poll, dest))
}

#[pyfunction]
#[pyo3(signature = (parts, out, threads, /))]
fn dequantize(py: Python<'_>, parts: Parts<'_>, out: &Bound<'_, PyAny>, threads: usize) -> PyResult<()> {
    let memory = parts.memory()?;
    let view = memory.view()?;
    let mut out = Nd::new(out)?;
    let out = out.f32s_mut()?;
    py.detach(|| view.dequantize_into(out, threads)).map_err(to_py)
}

#[pyfunction]
#[pyo3(signature = (parts, out, threads, /))]
fn decode_codes(py: Python<'_>, parts: Parts<'_>, out: &Bound<'_, PyAny>, threads: usize) -> PyResult<()> {
    let memory = parts.memory()?;
    let view = memory.view()?;
    let mut out = Nd::new(out)?;
    let out = out.i16s_mut()?;
    py.detach(|| view.codes_into(out, threads)).map_err(to_py)
}

#[pyfunction]
#[pyo3(signature = (format, values, out, /))]
fn encode(py: Python<'_>, format: &str, values: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
    let format = Format::parse(format).map_err(to_py)?;
    let values = Nd::new(values)?;
    let mut out = Nd::new(out)?;
    let &[rows, cols] = values.shape.as_slice() else {
        return Err(PyTypeError::new_err("values must be two-dimensional"));
    };
    let values = values.i16s()?;
    let out = out.u8s_mut()?;
    py.detach(|| pack_values(format, rows, cols, values, out)).map_err(to_py)
}

#[pyfunction]
#[pyo3(signature = (parts, /))]
fn check(parts: Parts<'_>) -> PyResult<()> {
    parts.memory()?.view().map(|_| ())
}

/// Adds this module's names to the extension module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(parse_format, m)?)?;
    m.add_function(wrap_pyfunction!(format_parts, m)?)?;
    m.add_function(wrap_pyfunction!(format_table, m)?)?;
    m.add_function(wrap_pyfunction!(part_names, m)?)?;
    m.add_function(wrap_pyfunction!(code_values, m)?)?;
    m.add_function(wrap_pyfunction!(quantize, m)?)?;
    m.add_function(wrap_pyfunction!(dequantize, m)?)?;
    m.add_function(wrap_pyfunction!(decode_codes, m)?)?;
    m.add_function(wrap_pyfunction!(encode, m)?)?;
    m.add_function(wrap_pyfunction!(check, m)?)
}
