//! Cache-line aligned buffers whose allocation may fail without aborting.
use crate::error::{Error, Result};
use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

const ALIGN: usize = 64;

/// A fixed-length, zero-initialised slice of plain numbers, aligned to 64 bytes.
#[derive(Debug)]
pub struct Buf<T: Plain> {
    ptr: NonNull<T>,
    len: usize,
}

/// Number types for which all-zero bytes are a value.
///
/// # Safety
/// Implementors must be valid when zeroed and free of destructors.
pub unsafe trait Plain: Copy + 'static {}
// SAFETY: plain numbers.
unsafe impl Plain for u8 {}
// SAFETY: plain numbers.
unsafe impl Plain for i8 {}
// SAFETY: plain numbers.
unsafe impl Plain for u16 {}
// SAFETY: plain numbers.
unsafe impl Plain for i32 {}
// SAFETY: plain numbers.
unsafe impl Plain for i64 {}
// SAFETY: plain numbers.
unsafe impl Plain for f32 {}

// SAFETY: the buffer owns its memory and holds plain numbers.
unsafe impl<T: Plain> Send for Buf<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Plain> Sync for Buf<T> {}

impl<T: Plain> Buf<T> {
    /// A zeroed buffer of `len` elements.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the allocator refuses or the size overflows.
    pub fn zeroed(len: usize) -> Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or(Error::OutOfMemory(usize::MAX))?;
        if bytes == 0 {
            return Ok(Self { ptr: NonNull::dangling(), len: 0 });
        }
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| Error::OutOfMemory(bytes))?;
        // SAFETY: the layout has a non-zero size.
        let p = unsafe { alloc_zeroed(layout) };
        NonNull::new(p.cast()).map(|ptr| Self { ptr, len }).ok_or(Error::OutOfMemory(bytes))
    }

    /// Makes the buffer at least `len` long, dropping its contents when it must grow.
    ///
    /// # Errors
    /// As [`Buf::zeroed`].
    pub fn reserve(&mut self, len: usize) -> Result<()> {
        if self.len < len {
            *self = Self::zeroed(0)?;
            *self = Self::zeroed(len)?;
        }
        Ok(())
    }
}

impl<T: Plain> Drop for Buf<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe {
                dealloc(self.ptr.as_ptr().cast(), Layout::from_size_align_unchecked(self.len * size_of::<T>(), ALIGN));
            }
        }
    }
}

impl<T: Plain> Deref for Buf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements (dangling only when len is 0).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Plain> Default for Buf<T> {
    fn default() -> Self {
        Self { ptr: NonNull::dangling(), len: 0 }
    }
}

/// Larger buffers go back to the system instead of being kept.
const KEEP: usize = 32 << 20;
/// Buffers that a thread keeps.
const KEPT: usize = 6;

thread_local! {
    static SPARE: RefCell<Vec<Buf<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of at least `len` elements with any contents, one that this thread gave back if one is large enough.
///
/// # Errors
/// As [`Buf::zeroed`].
pub(crate) fn take<T: Plain>(len: usize) -> Result<Buf<T>> {
    let bytes = len.checked_mul(size_of::<T>()).ok_or(Error::OutOfMemory(usize::MAX))?.next_multiple_of(ALIGN);
    let spare = SPARE.with(|s| {
        let mut s = s.try_borrow_mut().ok()?;
        let fit = (0..s.len()).filter(|&i| s[i].len >= bytes).min_by_key(|&i| s[i].len)?;
        Some(s.swap_remove(fit))
    });
    let raw = ManuallyDrop::new(match spare {
        Some(b) => b,
        None => Buf::<u8>::zeroed(bytes.max(ALIGN))?,
    });
    // Whole cache lines, so the length stays a whole number of elements and round trips to the allocated bytes.
    Ok(Buf { ptr: raw.ptr.cast(), len: raw.len / size_of::<T>() })
}

/// Keeps a buffer for the next [`take`] of this thread.
pub(crate) fn give<T: Plain>(b: Buf<T>) {
    let bytes = b.len * size_of::<T>();
    if bytes == 0 || bytes > KEEP || !bytes.is_multiple_of(ALIGN) {
        return;
    }
    let raw = ManuallyDrop::new(b);
    let raw = Buf::<u8> { ptr: raw.ptr.cast(), len: bytes };
    SPARE.with(|s| {
        if let Ok(mut s) = s.try_borrow_mut() {
            if s.len() < KEPT {
                s.push(raw);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_zeroed_and_fallible() {
        let b = Buf::<f32>::zeroed(33).unwrap();
        assert_eq!(b.as_ptr().align_offset(64), 0);
        assert!(b.iter().all(|&v| v == 0.0));
        assert!(Buf::<i32>::zeroed(0).unwrap().is_empty());
        assert!(matches!(Buf::<f32>::zeroed(usize::MAX / 2), Err(Error::OutOfMemory(_))));
    }
}
