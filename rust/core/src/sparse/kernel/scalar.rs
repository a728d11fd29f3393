//! Spreading in a loop: the definition the others are held to, on any registers.
use super::generic::{add_columns, spread, Expand, Number};
use super::instantiate;
use crate::kernel::simd::Simd;
use std::marker::PhantomData;

/// A loop over the bits, through memory.
#[derive(Debug)]
pub struct Loop<S>(PhantomData<S>);

// SAFETY: plain Rust over the operations of `S`.
unsafe impl<S: Simd> Expand for Loop<S> {
    type S = S;

    #[inline(always)]
    unsafe fn bytes(fill: S::I, mask: u64, p: *const u8) -> S::I {
        let mut out = [0u8; 64];
        // SAFETY: the caller's features; entries come before the 64 readable bytes end.
        unsafe {
            S::store(out.as_mut_ptr(), fill);
            spread(&mut out, mask, |i| *p.add(i));
            S::load(out.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn nibbles(fill: S::I, mask: u64, p: *const u8) -> S::I {
        let mut out = [0u8; 64];
        // SAFETY: as above.
        unsafe {
            S::store(out.as_mut_ptr(), fill);
            spread(&mut out, mask, |i| (*p.add(i / 2) >> (4 * (i % 2))) & 15);
            S::load(out.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn lanes<T: Number>(mask: u16, p: *const u8) -> S::F {
        let (mut from, mut to) = ([0f32; 16], [0f32; 16]);
        // SAFETY: the caller's features.
        unsafe {
            S::storef(from.as_mut_ptr(), T::load::<S>(p));
            let mut at = 0;
            for (i, t) in to.iter_mut().enumerate() {
                if mask >> i & 1 == 1 {
                    *t = from[at];
                    at += 1;
                }
            }
            S::loadf(to.as_ptr())
        }
    }
}

instantiate!(SCALAR, Loop<crate::kernel::scalar::Scalar>, rows [1, 1], gemv [1, 1, 1], slots 60, lanes [4, 4 x 1] from 3, columns add_columns);
