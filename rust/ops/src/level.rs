//! The same loop compiled for several vector widths.
//!
//! A loop is a struct (its arguments) with an inlined method (its body), so that the compiler's vectoriser meets the
//! body once with 128, once with 256 and once with 512 bits. There is no second source that could differ.
use nibblas_core::isa::Isa;

/// A loop: its arguments are the fields. Implementations mark `run` as `#[inline(always)]`, or it runs as scalar code.
pub trait Loop {
    /// What the loop returns.
    type Out;
    /// Runs the loop.
    fn run(self) -> Self::Out;
}

/// Runs a loop with the instructions of a level, or of the highest below it that this CPU has.
#[inline]
pub fn at<L: Loop>(isa: Isa, body: L) -> L::Out {
    #[cfg(target_arch = "x86_64")]
    {
        if isa >= Isa::Avx512 && Isa::Avx512.is_available() {
            // SAFETY: the level was just found to be available.
            return unsafe { avx512(body) };
        }
        if isa >= Isa::Avx2 && Isa::Avx2.is_available() {
            // SAFETY: the level was just found to be available.
            return unsafe { avx2(body) };
        }
    }
    let _ = isa;
    body.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<L: Loop>(body: L) -> L::Out {
    body.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<L: Loop>(body: L) -> L::Out {
    body.run()
}
