//! Kept groups of 32 values of four bits, for one row of activations (AVX-512 VNNI).
//!
//! A register holds the codes of four rows' groups, 16 bytes each: the low halves are values 0 to 15 of each group, the
//! high halves 16 to 31. Activations are fetched 16 at a time for each row by itself, since each row keeps other groups;
//! the four sums of 32 bits that a group has are added up for 16 rows at once. Codes are unsigned: the share of their
//! zero is that of a product of the activations with the zero code.
use crate::sparse::rows::Slots;
use std::arch::x86_64::*;

// No closures here: they would be compiled without the features.

/// Four runs of 16 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn gather(p: &[*const u8; 4], at: usize) -> __m512i {
    // SAFETY: the caller's 16 bytes each.
    unsafe {
        let (a, b) = (_mm_loadu_si128(p[0].add(at).cast()), _mm_loadu_si128(p[1].add(at).cast()));
        let (c, d) = (_mm_loadu_si128(p[2].add(at).cast()), _mm_loadu_si128(p[3].add(at).cast()));
        let low = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b);
        let all = _mm512_inserti32x4::<2>(_mm512_castsi256_si512(low), c);
        _mm512_inserti32x4::<3>(all, d)
    }
}

/// Lanes of `a` and `b` in turns, the lower two of each 16 bytes plus the upper two.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn pair(a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
}

/// The sums of 16 rows' groups of a slot, each less its zero's share: lane `i` is row `i`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn slot(codes: *const u8, index: *const u16, x: *const u8, zero: __m512i) -> __m512i {
    // SAFETY: the caller's slot, and activations of every group.
    unsafe {
        let low = _mm512_set1_epi8(15);
        let mut parts = [_mm512_setzero_si512(); 4];
        for q in 0..4 {
            let i = index.add(4 * q);
            let at = [
                x.add(usize::from(*i) * 32),
                x.add(usize::from(*i.add(1)) * 32),
                x.add(usize::from(*i.add(2)) * 32),
                x.add(usize::from(*i.add(3)) * 32),
            ];
            let (x0, x1) = (gather(&at, 0), gather(&at, 16));
            let u = _mm512_loadu_si512(codes.add(64 * q).cast());
            let u0 = _mm512_and_si512(u, low);
            let u1 = _mm512_and_si512(_mm512_srli_epi16::<4>(u), low);
            let sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), u0, x0), u1, x1);
            let less = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), zero, x0), zero, x1);
            parts[q] = _mm512_sub_epi32(sum, less);
        }
        // parts[q] holds rows 4q..4q+4, four sums each: a transposition of 4 x 4 within each 16 bytes adds them up, and
        // leaves row 4q + i in place 4i + q.
        let (ab, cd) = (pair(parts[0], parts[1]), pair(parts[2], parts[3]));
        let mixed = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_permutexvar_epi32(order, mixed)
    }
}

/// Asks for the memory of a later slot: what the hardware fetches by itself comes too late.
#[inline(always)]
unsafe fn fetch(s: &Slots, i: usize) {
    // SAFETY: a prefetch may name any address.
    unsafe {
        for line in (0..256).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(s.codes.wrapping_add(256 * i + AHEAD + line).cast());
        }
        _mm_prefetch::<_MM_HINT_T0>(s.index.wrapping_add(16 * i + AHEAD / 16).cast());
        _mm_prefetch::<_MM_HINT_T0>(s.scales.wrapping_add(16 * i + AHEAD / 16).cast());
    }
}

/// How far ahead of the codes in use memory is asked for.
const AHEAD: usize = 8192;

/// Groups with a scale each: `c = fma(f32(sum), scale, c)` for the kept groups of each row in order.
///
/// # Safety
/// `s` describes whole slots, `x` has the activations of every group, `c` 16 floats; the CPU has AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn grouped(s: &Slots, x: *const i8, zero: u8, c: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let zero = _mm512_set1_epi8(zero as i8);
        let mut f = _mm512_loadu_ps(c);
        for i in 0..s.count {
            let codes = s.codes.add(256 * i);
            fetch(s, i);
            let d = slot(codes, s.index.add(16 * i), x.cast(), zero);
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(s.scales.add(16 * i).cast()));
            f = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), scale, f);
        }
        _mm512_storeu_ps(c, f);
    }
}

/// Rows with one scale: `c += sum`.
///
/// # Safety
/// As [`grouped`], `c` has 16 sums.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn raw(s: &Slots, x: *const i8, zero: u8, c: *mut i32) {
    // SAFETY: as the contract says.
    unsafe {
        let zero = _mm512_set1_epi8(zero as i8);
        let mut d = _mm512_loadu_si512(c.cast());
        for i in 0..s.count {
            let codes = s.codes.add(256 * i);
            fetch(s, i);
            d = _mm512_add_epi32(d, slot(codes, s.index.add(16 * i), x.cast(), zero));
        }
        _mm512_storeu_si512(c.cast(), d);
    }
}
