//! Counts of equal bits, for one-bit codes on both sides.
use std::arch::x86_64::*;

/// Rows of the wide kernels.
pub const MR: usize = 8;
/// Panels of the wide kernels.
pub const NP: usize = 2;

/// Bytes that a single row prefetches ahead; it waits for memory and for nothing else.
const AHEAD: usize = 2048;

/// Arguments of a count.
#[derive(Debug, Clone, Copy)]
pub struct Equal {
    /// First panel of one-bit codes.
    pub codes: *const u8,
    /// Bytes between panels.
    pub panel_stride: usize,
    /// Blocks of K, the last of them masked.
    pub blocks: usize,
    /// Bits that count in the last block.
    pub mask: [u32; 2],
    /// Bits of the left rows in lane order, two words a block: row m at `m*x_stride`.
    pub x: *const u32,
    /// Words between rows of `x`.
    pub x_stride: usize,
    /// Counts `[m][ldc]`, written.
    pub c: *mut i32,
    /// Row stride of `c`.
    pub ldc: usize,
}

/// Whether the CPU counts bits in vectors.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512vpopcntdq") && is_x86_feature_detected!("avx512bw")
}

#[target_feature(enable = "avx512f,avx512bw,avx512vpopcntdq")]
unsafe fn count<const PANELS: usize, const ROWS: usize>(a: &Equal) {
    // SAFETY: the caller's arguments hold whole blocks of each panel and row.
    unsafe {
        let mut acc = [[_mm512_setzero_si512(); ROWS]; PANELS];
        let all = _mm512_set1_epi32(-1);
        for b in 0..a.blocks - 1 {
            block(&mut acc, a, b, [all; 2]);
        }
        block(&mut acc, a, a.blocks - 1, a.mask.map(|m| _mm512_set1_epi32(m as i32)));
        for p in 0..PANELS {
            for m in 0..ROWS {
                _mm512_storeu_si512(a.c.add(m * a.ldc + p * 16).cast(), acc[p][m]);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vpopcntdq")]
unsafe fn block<const PANELS: usize, const ROWS: usize>(
    acc: &mut [[__m512i; ROWS]; PANELS],
    a: &Equal,
    b: usize,
    mask: [__m512i; 2],
) {
    // SAFETY: as `count`.
    unsafe {
        for i in 0..2 {
            for p in 0..PANELS {
                let line = a.codes.wrapping_add(p * a.panel_stride + b * 128 + 64 * i);
                let w = _mm512_loadu_si512(line.cast());
                if ROWS == 1 {
                    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(AHEAD).cast());
                }
                for m in 0..ROWS {
                    let x = _mm512_set1_epi32(*a.x.add(m * a.x_stride + 2 * b + i) as i32);
                    // !(w ^ x) & mask
                    let d = _mm512_ternarylogic_epi32::<0x82>(w, x, mask[i]);
                    acc[p][m] = _mm512_add_epi32(acc[p][m], _mm512_popcnt_epi32(d));
                }
            }
        }
    }
}

/// The kernel for [`NP`] panels or one, [`MR`] rows or one.
pub fn equal(wide: bool, many: bool) -> unsafe fn(&Equal) {
    match (wide, many) {
        (true, true) => count::<NP, MR>,
        (true, false) => count::<NP, 1>,
        (false, true) => count::<1, MR>,
        (false, false) => count::<1, 1>,
    }
}
