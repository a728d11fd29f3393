//! Views of other people's matrices: any element type, any strides, any alignment.
use std::marker::PhantomData;

/// Element type of a matrix that belongs to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scalar {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE binary64.
    F64,
    /// Signed bytes.
    I8,
}

impl Scalar {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::I8 => 1,
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// A read-only matrix view. Strides are in bytes, of any sign, zero included.
/// Elements may be misaligned; readers use unaligned loads.
#[derive(Debug, Clone, Copy)]
pub struct MatRef<'a> {
    /// Address of element (0, 0).
    pub ptr: *const u8,
    /// Element type.
    pub scalar: Scalar,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Bytes from one row to the next.
    pub row_stride: isize,
    /// Bytes from one column to the next.
    pub col_stride: isize,
    life: PhantomData<&'a u8>,
}

// SAFETY: a view is a shared borrow of plain numbers; threads only read through it.
unsafe impl Send for MatRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for MatRef<'_> {}

impl<'a> MatRef<'a> {
    /// A view of memory described by a pointer and strides.
    ///
    /// # Safety
    /// Every element `ptr + i*row_stride + j*col_stride` with `i < rows`, `j < cols` must be readable
    /// for `'a`.
    pub unsafe fn from_raw(
        ptr: *const u8,
        scalar: Scalar,
        rows: usize,
        cols: usize,
        row_stride: isize,
        col_stride: isize,
    ) -> Self {
        Self { ptr, scalar, rows, cols, row_stride, col_stride, life: PhantomData }
    }

    /// A row-major f32 matrix.
    ///
    /// # Panics
    /// If `data` is shorter than `rows * cols`.
    pub fn from_f32(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols);
        Self {
            ptr: data.as_ptr().cast(),
            scalar: Scalar::F32,
            rows,
            cols,
            row_stride: (cols * 4) as isize,
            col_stride: 4,
            life: PhantomData,
        }
    }

    /// The address of row `i`.
    ///
    /// # Panics
    /// In debug builds, if `i` is out of range.
    pub fn row_ptr(&self, i: usize) -> *const u8 {
        debug_assert!(i < self.rows);
        self.ptr.wrapping_offset(i as isize * self.row_stride)
    }

    /// Row `i` as a slice, when it is contiguous, aligned f32.
    pub fn row_f32(&self, i: usize) -> Option<&'a [f32]> {
        let p = self.row_ptr(i);
        if self.scalar != Scalar::F32 || (self.col_stride != 4 && self.cols > 1) || p.align_offset(4) != 0 {
            return None;
        }
        // SAFETY: the constructor's contract covers these `cols` elements; they are contiguous and aligned.
        Some(unsafe { std::slice::from_raw_parts(p.cast(), self.cols) })
    }

    /// Whether no element, converted to f32, is NaN or larger in magnitude than `limit`.
    pub fn is_within(&self, limit: f32) -> bool {
        // Without a branch for each.
        let within = |part: &[f32]| part.iter().fold(true, |all, v| all & (v.abs() <= limit));
        (0..self.rows).all(|i| {
            if let Some(row) = self.row_f32(i) {
                return row.chunks(64).all(within);
            }
            (0..self.cols).step_by(64).all(|j| {
                let mut part = [0.0; 64];
                let part = &mut part[..64.min(self.cols - j)];
                self.read_row(i, j, part);
                within(part)
            })
        })
    }

    /// Copies `out.len()` elements of row `i`, from column `j0`, converted to f32 (f64 rounds to nearest even).
    ///
    /// # Panics
    /// If the range leaves the matrix.
    pub fn read_row(&self, i: usize, j0: usize, out: &mut [f32]) {
        assert!(i < self.rows && j0 + out.len() <= self.cols);
        if let Some(row) = self.row_f32(i) {
            return out.copy_from_slice(&row[j0..j0 + out.len()]);
        }
        let base = self.row_ptr(i).wrapping_offset(j0 as isize * self.col_stride);
        let cs = self.col_stride;
        // SAFETY (all arms): `base + t*cs` for t < out.len() lies in the view, whose constructor promises
        // readable elements; loads are unaligned.
        macro_rules! copy {
            ($t:ty, $f:expr) => {
                for (t, o) in out.iter_mut().enumerate() {
                    // SAFETY: as stated above the macro.
                    let v = unsafe { base.wrapping_offset(t as isize * cs).cast::<$t>().read_unaligned() };
                    *o = $f(v);
                }
            };
        }
        match self.scalar {
            Scalar::F32 => copy!(f32, |v| v),
            Scalar::F64 => copy!(f64, |v| v as f32),
            Scalar::I8 => copy!(i8, f32::from),
            Scalar::F16 => copy!(u16, |v| half::f16::from_bits(v).to_f32()),
            Scalar::BF16 => copy!(u16, |v: u16| f32::from_bits(u32::from(v) << 16)),
        }
    }
}

/// A writable matrix view, laid out as [`MatRef`].
#[derive(Debug)]
pub struct MatMut<'a> {
    /// Address of element (0, 0).
    pub ptr: *mut u8,
    /// Element type; `I8` is not a valid output.
    pub scalar: Scalar,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Bytes from one row to the next.
    pub row_stride: isize,
    /// Bytes from one column to the next.
    pub col_stride: isize,
    life: PhantomData<&'a mut u8>,
}

// SAFETY: the view is an exclusive borrow; the loop nest hands disjoint parts to its threads.
unsafe impl Send for MatMut<'_> {}
// SAFETY: writes through a shared view go to disjoint elements only.
unsafe impl Sync for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// A view of memory described by a pointer and strides.
    ///
    /// # Safety
    /// As [`MatRef::from_raw`], writable, elements distinct, and not read or written by others during `'a`.
    pub unsafe fn from_raw(
        ptr: *mut u8,
        scalar: Scalar,
        rows: usize,
        cols: usize,
        row_stride: isize,
        col_stride: isize,
    ) -> Self {
        Self { ptr, scalar, rows, cols, row_stride, col_stride, life: PhantomData }
    }

    /// A row-major f32 matrix.
    ///
    /// # Panics
    /// If `data` is shorter than `rows * cols`.
    pub fn from_f32(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols);
        Self {
            ptr: data.as_mut_ptr().cast(),
            scalar: Scalar::F32,
            rows,
            cols,
            row_stride: (cols * 4) as isize,
            col_stride: 4,
            life: PhantomData,
        }
    }
}
