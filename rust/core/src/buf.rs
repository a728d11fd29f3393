//! Cache-line aligned buffers whose allocation may fail without aborting.
use crate::error::{Error, Result};
use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

const ALIGN: usize = 64;

/// Whether a buffer gets a mapping of its own on huge pages: a weight is read in many streams at once, and with pages of
/// 4 KiB the translations of those streams fall out of the TLB, which costs a virtual machine two walks each.
fn is_large(bytes: usize) -> bool {
    cfg!(target_os = "linux") && bytes >= HUGE
}

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Zeroed memory that starts on a huge page, or null.
#[cfg(target_os = "linux")]
fn map_large(bytes: usize) -> *mut u8 {
    let Some(size) = bytes.checked_next_multiple_of(4096).and_then(|b| b.checked_add(HUGE)) else {
        return std::ptr::null_mut();
    };
    let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping, a huge page longer than asked for; what lies outside the aligned part is returned.
    unsafe {
        let p = libc::mmap(std::ptr::null_mut(), size, rights, kind, -1, 0);
        if p == libc::MAP_FAILED {
            return std::ptr::null_mut();
        }
        let p = p.cast::<u8>();
        let head = p.align_offset(HUGE);
        if head > 0 {
            libc::munmap(p.cast(), head);
        }
        let start = p.add(head);
        let kept = size - HUGE;
        if head < HUGE {
            libc::munmap(start.add(kept).cast(), HUGE - head);
        }
        // Advice only: without huge pages the memory is as good, and slower.
        libc::madvise(start.cast(), kept, libc::MADV_HUGEPAGE);
        start
    }
}

/// Returns what [`map_large`] gave.
#[cfg(target_os = "linux")]
unsafe fn unmap_large(p: *mut u8, bytes: usize) {
    // SAFETY: the caller's mapping.
    unsafe { libc::munmap(p.cast(), bytes.next_multiple_of(4096)) };
}

#[cfg(not(target_os = "linux"))]
fn map_large(_bytes: usize) -> *mut u8 {
    std::ptr::null_mut()
}

#[cfg(not(target_os = "linux"))]
unsafe fn unmap_large(_p: *mut u8, _bytes: usize) {}

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
unsafe impl Plain for u32 {}
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
        let p = if is_large(bytes) {
            map_large(bytes)
        } else {
            // SAFETY: the layout has a non-zero size.
            unsafe { alloc_zeroed(layout) }
        };
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
        let (p, bytes) = (self.ptr.as_ptr().cast::<u8>(), self.len * size_of::<T>());
        if is_large(bytes) {
            // SAFETY: mapped in `zeroed` with this very size.
            unsafe { unmap_large(p, bytes) };
        } else if bytes > 0 {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { dealloc(p, Layout::from_size_align_unchecked(bytes, ALIGN)) };
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
/// Bytes that a thread keeps at most.
const KEEP_ALL: usize = 64 << 20;
/// Buffers that a thread keeps at most: those of one product.
const KEPT: usize = 12;

thread_local! {
    static SPARE: RefCell<Vec<Buf<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of at least `len` elements with any contents, one that this thread gave back if one is large enough.
///
/// # Errors
/// As [`Buf::zeroed`].
fn take<T: Plain>(len: usize) -> Result<Buf<T>> {
    let bytes = len.checked_mul(size_of::<T>()).ok_or(Error::OutOfMemory(usize::MAX))?;
    // What would fill a good part of a huge page gets the whole of it: it is kept, and weights and results pass through the same TLB.
    let unit = if is_large(bytes.saturating_mul(4)) { HUGE } else { ALIGN };
    let bytes = bytes.checked_next_multiple_of(unit).ok_or(Error::OutOfMemory(usize::MAX))?;
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
fn give<T: Plain>(b: Buf<T>) {
    let bytes = b.len * size_of::<T>();
    if bytes == 0 || bytes > KEEP || !bytes.is_multiple_of(ALIGN) {
        return;
    }
    let raw = ManuallyDrop::new(b);
    let raw = Buf::<u8> { ptr: raw.ptr.cast(), len: bytes };
    SPARE.with(|s| {
        if let Ok(mut s) = s.try_borrow_mut() {
            if s.len() < KEPT && s.iter().map(|b| b.len).sum::<usize>() + bytes <= KEEP_ALL {
                s.push(raw);
            }
        }
    });
}

/// A buffer from [`take`] that goes back by itself.
#[derive(Debug)]
pub(crate) struct Taken<T: Plain>(Buf<T>);

impl<T: Plain> Taken<T> {
    /// At least `len` elements with any contents.
    pub(crate) fn new(len: usize) -> Result<Self> {
        take(len).map(Self)
    }
}

impl<T: Plain> Drop for Taken<T> {
    fn drop(&mut self) {
        give(std::mem::take(&mut self.0));
    }
}

impl<T: Plain> Deref for Taken<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Plain> DerefMut for Taken<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
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
        assert!(matches!(Buf::<u8>::zeroed(isize::MAX as usize - 64), Err(Error::OutOfMemory(_))));
        for bytes in [HUGE - 1, HUGE, HUGE + 1, 5 * HUGE + 4097] {
            let mut b = Buf::<u8>::zeroed(bytes).unwrap();
            assert!(b.iter().all(|&v| v == 0));
            b.fill(7);
        }
    }

    #[test]
    fn what_is_given_back_is_taken_again() {
        for bytes in [64, HUGE / 4, HUGE / 4 + 1, HUGE + 1] {
            let first = Taken::<u8>::new(bytes).unwrap().as_ptr();
            let again = Taken::<f32>::new(bytes.div_ceil(4)).unwrap();
            assert!(again.len() >= bytes.div_ceil(4));
            assert_eq!(again.as_ptr().cast(), first);
        }
    }
}
