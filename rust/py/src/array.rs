//! NumPy arrays as raw memory: any strides, any alignment, checked element types.
//!
//! bfloat16 has no fixed type number in NumPy; the Python side passes such arrays as their `uint16` bits.
use nibblas_core::{MatMut, MatRef, Scalar};
use numpy::npyffi::flags::NPY_ARRAY_CARRAY;
use numpy::npyffi::flags::{NPY_ARRAY_ALIGNED, NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_WRITEABLE};
use numpy::npyffi::{PyArrayObject, PyArray_CheckExact, NPY_TYPES, PY_ARRAY_API};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::ffi::c_int;

/// Element types that cross the border.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A floating type or int8.
    Float(Scalar),
    /// uint8.
    U8,
    /// int16.
    I16,
    /// int32.
    I32,
    /// int64.
    I64,
}

/// A description of an array's memory, copied out of the array object.
#[derive(Debug)]
pub struct Nd {
    /// Address of the first element.
    pub ptr: *mut u8,
    /// Element type.
    pub kind: Kind,
    /// Lengths.
    pub shape: Vec<usize>,
    /// Byte strides.
    pub strides: Vec<isize>,
    flags: c_int,
}

fn require(ok: bool, what: &str) -> PyResult<()> {
    if ok {
        Ok(())
    } else {
        Err(PyValueError::new_err(format!("array must be {what}")))
    }
}

// SAFETY: a description only; whoever dereferences the pointer keeps the array object alive meanwhile.
unsafe impl Send for Nd {}
// SAFETY: as above.
unsafe impl Sync for Nd {}

fn kind_of(a: &Bound<'_, PyUntypedArray>) -> Option<Kind> {
    let d = a.dtype();
    let n = d.num();
    let is = |t: NPY_TYPES| n == t as c_int;
    let kind = if is(NPY_TYPES::NPY_FLOAT) {
        Kind::Float(Scalar::F32)
    } else if is(NPY_TYPES::NPY_DOUBLE) {
        Kind::Float(Scalar::F64)
    } else if is(NPY_TYPES::NPY_HALF) {
        Kind::Float(Scalar::F16)
    } else if is(NPY_TYPES::NPY_USHORT) {
        Kind::Float(Scalar::BF16)
    } else if is(NPY_TYPES::NPY_BYTE) {
        Kind::Float(Scalar::I8)
    } else if is(NPY_TYPES::NPY_UBYTE) {
        Kind::U8
    } else if is(NPY_TYPES::NPY_SHORT) {
        Kind::I16
    } else if is(NPY_TYPES::NPY_INT) {
        Kind::I32
    } else if is(NPY_TYPES::NPY_LONG) || is(NPY_TYPES::NPY_LONGLONG) {
        // `long` is four bytes on some platforms.
        match d.itemsize() {
            8 => Kind::I64,
            4 => Kind::I32,
            _ => return None,
        }
    } else {
        return None;
    };
    (d.is_native_byteorder() != Some(false)).then_some(kind)
}

impl Nd {
    /// Describes an array.
    ///
    /// # Errors
    /// TypeError if `obj` is not an array of a supported, native element type.
    pub fn new(obj: &Bound<'_, PyAny>) -> PyResult<Self> {
        let a = obj.cast::<PyUntypedArray>().map_err(|_| PyTypeError::new_err("expected a NumPy array"))?;
        let kind = kind_of(a).ok_or_else(|| PyTypeError::new_err("unsupported array dtype"))?;
        let raw = a.as_array_ptr();
        // SAFETY: `raw` points to a live array object for as long as `a` is borrowed.
        let (ptr, flags) = unsafe { ((*raw).data.cast::<u8>(), (*raw).flags) };
        Ok(Self { ptr, kind, shape: a.shape().to_vec(), strides: a.strides().to_vec(), flags })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The floating element type.
    ///
    /// # Errors
    /// TypeError for integers other than int8.
    pub fn scalar(&self) -> PyResult<Scalar> {
        match self.kind {
            Kind::Float(s) => Ok(s),
            _ => Err(PyTypeError::new_err("unsupported array dtype")),
        }
    }

    /// Whether the array may be written to.
    ///
    /// # Errors
    /// ValueError otherwise.
    pub fn require_writeable(&self) -> PyResult<()> {
        require(self.flags & NPY_ARRAY_WRITEABLE != 0, "writeable")
    }

    /// A read-only matrix view of a two-dimensional array.
    ///
    /// # Errors
    /// ValueError unless the array has two dimensions, TypeError for other element types.
    pub fn mat(&self) -> PyResult<MatRef<'_>> {
        require(self.shape.len() == 2, "two-dimensional")?;
        let s = self.scalar()?;
        // SAFETY: NumPy guarantees that every element of an array lies in memory that the array keeps alive; the
        // caller holds a reference to it for the life of `self`.
        Ok(unsafe { MatRef::from_raw(self.ptr, s, self.shape[0], self.shape[1], self.strides[0], self.strides[1]) })
    }

    /// A writable matrix view of a two-dimensional array whose elements are distinct.
    ///
    /// # Errors
    /// ValueError unless the array is writeable and has two dimensions.
    pub fn mat_mut(&mut self) -> PyResult<MatMut<'_>> {
        require(self.shape.len() == 2, "two-dimensional")?;
        self.require_writeable()?;
        let s = self.scalar()?;
        // SAFETY: as in `mat`; the Python side passes only arrays without internal overlap that alias no input.
        Ok(unsafe { MatMut::from_raw(self.ptr, s, self.shape[0], self.shape[1], self.strides[0], self.strides[1]) })
    }

    fn slice_checks<T>(&self) -> PyResult<()> {
        require(self.flags & NPY_ARRAY_C_CONTIGUOUS != 0, "C-contiguous")?;
        let aligned = self.flags & NPY_ARRAY_ALIGNED != 0 && self.ptr.align_offset(align_of::<T>()) == 0;
        require(aligned || self.len() == 0, "aligned")
    }
}

macro_rules! slices {
    ($get:ident, $t:ty, $kind:pat) => {
        impl Nd {
            /// The elements of a C-contiguous, aligned array.
            ///
            /// # Errors
            /// TypeError or ValueError where the array is something else.
            pub fn $get(&self) -> PyResult<&[$t]> {
                if !matches!(self.kind, $kind) {
                    return Err(PyTypeError::new_err(concat!("expected elements of type ", stringify!($t))));
                }
                self.slice_checks::<$t>()?;
                if self.len() == 0 {
                    return Ok(&[]);
                }
                // SAFETY: contiguous, aligned, of this type, and kept alive by the caller's reference. The arrays of a
                // QTensor are read-only; an array that another thread writes meanwhile is the caller's data race.
                Ok(unsafe { std::slice::from_raw_parts(self.ptr.cast_const().cast(), self.len()) })
            }
        }
    };
}

macro_rules! slices_mut {
    ($get:ident, $t:ty, $kind:pat) => {
        impl Nd {
            /// The elements of a C-contiguous, aligned, writeable array.
            ///
            /// # Errors
            /// TypeError or ValueError where the array is something else.
            pub fn $get(&mut self) -> PyResult<&mut [$t]> {
                if !matches!(self.kind, $kind) {
                    return Err(PyTypeError::new_err(concat!("expected elements of type ", stringify!($t))));
                }
                self.slice_checks::<$t>()?;
                self.require_writeable()?;
                if self.len() == 0 {
                    return Ok(&mut []);
                }
                // SAFETY: contiguous, aligned, of this type, and kept alive by the caller's reference; the Python side
                // passes an array of its own that nothing else refers to.
                Ok(unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), self.len()) })
            }
        }
    };
}

slices!(u8s, u8, Kind::U8);
slices!(f32s, f32, Kind::Float(Scalar::F32));
slices!(bits16, u16, Kind::Float(Scalar::F16 | Scalar::BF16));
slices!(i8s, i8, Kind::Float(Scalar::I8));
slices!(i16s, i16, Kind::I16);
slices!(i32s, i32, Kind::I32);
slices!(i64s, i64, Kind::I64);
slices_mut!(u8s_mut, u8, Kind::U8);
slices_mut!(f32s_mut, f32, Kind::Float(Scalar::F32));
slices_mut!(bits16_mut, u16, Kind::Float(Scalar::F16 | Scalar::BF16));
slices_mut!(i8s_mut, i8, Kind::Float(Scalar::I8));
slices_mut!(i16s_mut, i16, Kind::I16);
slices_mut!(i32s_mut, i32, Kind::I32);
slices_mut!(i64s_mut, i64, Kind::I64);

/// A plain ndarray of native f32, f16 or f64 with one or two dimensions, as a matrix; `None` for anything else.
///
/// The view is valid while the array object is referenced.
pub fn plain_matrix<'a>(obj: &'a Bound<'_, PyAny>) -> Option<(MatRef<'a>, c_int, usize)> {
    let py = obj.py();
    // SAFETY: a type check on a live object.
    if unsafe { PyArray_CheckExact(py, obj.as_ptr()) } == 0 {
        return None;
    }
    let raw = obj.as_ptr().cast::<PyArrayObject>();
    // SAFETY: just checked to be an array; the interpreter lock is held, so nobody reshapes it meanwhile.
    let (nd, data, dims, strides) = unsafe { ((*raw).nd, (*raw).data, (*raw).dimensions, (*raw).strides) };
    if nd != 1 && nd != 2 {
        return None;
    }
    let a = obj.cast::<PyUntypedArray>().ok()?;
    let d = a.dtype();
    let num = d.num();
    let scalar = if num == NPY_TYPES::NPY_FLOAT as c_int {
        Scalar::F32
    } else if num == NPY_TYPES::NPY_HALF as c_int {
        Scalar::F16
    } else if num == NPY_TYPES::NPY_DOUBLE as c_int {
        Scalar::F64
    } else {
        return None;
    };
    if d.is_native_byteorder() == Some(false) {
        return None;
    }
    let last = nd as usize - 1;
    // SAFETY: `dims` and `strides` have `nd` entries.
    let (cols, col_stride) = unsafe { (*dims.add(last) as usize, *strides.add(last)) };
    // SAFETY: as above.
    let (rows, row_stride) = if nd == 2 { unsafe { (*dims as usize, *strides) } } else { (1, 0) };
    // SAFETY: NumPy guarantees the elements; the caller holds a reference for `'a`.
    let m = unsafe { MatRef::from_raw(data.cast::<u8>().cast_const(), scalar, rows, cols, row_stride, col_stride) };
    Some((m, num, nd as usize))
}

/// Bytes from which an array is large.
pub const LARGE: usize = 1 << 20;

/// Bytes of a line of the cache.
const LINE: usize = 64;

/// A new, uninitialised C-contiguous array of elements of `size` bytes. A large one begins with a line of the cache: NumPy's begin 16
/// bytes into one, so that every 64 bytes of a result are stored to two.
///
/// # Errors
/// Whatever NumPy raises: MemoryError, or ValueError for sizes that overflow.
pub fn empty<'py>(
    py: Python<'py>,
    dims: &mut [isize],
    type_num: c_int,
    size: usize,
) -> PyResult<(Bound<'py, PyAny>, *mut u8)> {
    let bytes = dims.iter().try_fold(size, |n, &d| n.checked_mul(d as usize)).unwrap_or(0);
    let memory = (bytes >= LARGE)
        .then(|| bytes.checked_add(LINE))
        .flatten()
        .and_then(|n| new(py, &mut [isize::try_from(n).ok()?], NPY_TYPES::NPY_UBYTE as c_int, None).ok());
    // Where there is no room, NumPy says so of the shape.
    new(py, dims, type_num, memory.map(|(memory, start)| (memory, start.wrapping_add(start.align_offset(LINE)))))
}

/// A new C-contiguous array, in memory of its own or in some that an object keeps.
fn new<'py>(
    py: Python<'py>,
    dims: &mut [isize],
    type_num: c_int,
    memory: Option<(Bound<'py, PyAny>, *mut u8)>,
) -> PyResult<(Bound<'py, PyAny>, *mut u8)> {
    let (keeper, at) = memory.map_or((None, std::ptr::null_mut()), |(keeper, at)| (Some(keeper), at));
    // SAFETY: the arguments are those the C API asks for; a null result carries a Python exception, and a failure one too. Memory that
    // is given has room for the array, and lives as long as it.
    unsafe {
        let ty = numpy::npyffi::get_type_object(py, numpy::npyffi::NpyTypes::PyArray_Type);
        let p = PY_ARRAY_API.PyArray_New(
            py,
            ty,
            dims.len() as c_int,
            dims.as_mut_ptr(),
            type_num,
            std::ptr::null_mut(),
            at.cast(),
            0,
            if at.is_null() { 0 } else { NPY_ARRAY_CARRAY },
            std::ptr::null_mut(),
        );
        let obj = Bound::from_owned_ptr_or_err(py, p)?;
        if let Some(keeper) = keeper {
            if PY_ARRAY_API.PyArray_SetBaseObject(py, p.cast(), keeper.into_ptr()) < 0 {
                return Err(PyErr::fetch(py));
            }
        }
        let data = (*p.cast::<PyArrayObject>()).data.cast::<u8>();
        Ok((obj, data))
    }
}
