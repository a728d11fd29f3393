//! Kernels for x86-64, one file per instruction set.
pub mod amx;
mod avx2;
mod avx512;
#[cfg(feature = "emulated-tiles")]
pub(crate) mod emulate;
pub mod halves;
pub mod popcount;
pub mod tiles;
pub mod viterbi;
pub mod words;

pub use avx2::{Avx2, AvxVnni};
pub use avx512::{Avx512, Avx512Tiles, Avx512Vnni};

use super::instantiate;

instantiate!(
    #[target_feature(enable = "avx2,fma,f16c")]
    AVX2, Isa::Avx2, crate::kernel::x86::avx2::Avx2,
    fused [(4, U4, 2, [2, 1, 1], short [1, 1, 1]), (8, U8, 1, [2, 1, 1])], lut [(4, T4, 2, [2, 1, 1], short [1, 1, 1])], inner [], bytes [Bytes4, Bytes7], rows [2, 4, 4], gemv [2, 1], gemm 1 [1, 2, 3, 4, 5, 6]
);
instantiate!(
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    AVXVNNI, Isa::AvxVnni, crate::kernel::x86::avx2::AvxVnni,
    fused [(4, U4, 2, [2, 1, 1], short [1, 1, 1]), (8, U8, 1, [2, 1, 1])], lut [(4, T4, 2, [2, 1, 1], short [1, 1, 1])], inner [], bytes [U8, U8], rows [2, 4, 4], gemv [2, 1], gemm 1 [1, 2, 3, 4, 5, 6]
);
instantiate!(
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    AVX512, Isa::Avx512, crate::kernel::x86::avx512::Avx512,
    fused [(4, U4, 2, [4, 2, 2], short [4, 2, 1])], lut [(4, T4, 2, [4, 2, 2], short [4, 2, 1])], inner [], bytes [Bytes4, Bytes7], rows [2, 4, 8], gemv [4, 2], gemm 2 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
);
instantiate!(
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    AVX512VNNI, Isa::Avx512Vnni, crate::kernel::x86::avx512::Avx512Vnni,
    fused [
        (1, U1, 8, [2, 1, 1]), (2, U2, 4, [4, 2, 1]), (3, U3, 2, [4, 2, 1]), (4, U4, 2, [4, 4, 2], eight 1, short [4, 2, 1]),
        (5, U5, 2, [4, 2, 1]), (6, U6, 2, [4, 2, 1]), (7, U7, 2, [4, 2, 1]), (8, U8, 1, [4, 4, 2])
    ],
    lut [(4, T4, 2, [4, 4, 2], short [4, 2, 1]), (6, T6, 2, [4, 2, 1]), (12, H6, 4, [2, 1, 1])], inner [(2, U2, 4), (4, U4, 2)], bytes [U8, U8], rows [2, 4, 8], gemv [4, 2], gemm 2 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
);

/// Asks for the cache lines of `bytes` bytes, to be written soon.
pub fn fetch_to_write(p: *const u8, bytes: usize) {
    use std::arch::x86_64::{_mm_prefetch, _MM_HINT_ET0};
    for line in (0..bytes).step_by(64) {
        // SAFETY: a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(p.wrapping_add(line).cast()) };
    }
}
