//! Spreading with `VPEXPANDB` and `VPEXPANDPS` (AVX-512), or `PDEP` (BMI2) where they lack.
pub(crate) mod amx;
pub(crate) mod bsr;
pub(crate) mod gaps;

use crate::isa::Isa;
use crate::kernel::simd::Simd;
use crate::kernel::x86::{Avx2, Avx512, Avx512Vnni, AvxVnni};
use crate::sparse::kernel::generic::{add_columns, Expand, Number};
use crate::sparse::kernel::scalar::Loop;
use crate::sparse::kernel::{instantiate, SparseKernels};
use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// Ones in the bytes whose bit is set.
#[inline(always)]
unsafe fn byte_mask(mask: u64, i: usize) -> (u64, usize) {
    let m = (mask >> (8 * i)) & 255;
    // SAFETY: the caller has BMI2. A product with 255 fills each byte that holds a 1.
    unsafe { (_pdep_u64(m, 0x0101_0101_0101_0101).wrapping_mul(255), m.count_ones() as usize) }
}

/// The bytes at `p` where bits are set, 0 elsewhere.
#[inline(always)]
unsafe fn deposit(fill: &mut [u64; 8], mask: u64, p: *const u8) {
    let mut p = p;
    for (i, w) in fill.iter_mut().enumerate() {
        // SAFETY: the caller has BMI2; at most 56 entries come before, so 8 bytes are readable.
        unsafe {
            let (select, count) = byte_mask(mask, i);
            *w = (*w & !select) | _pdep_u64(p.cast::<u64>().read_unaligned(), select);
            p = p.add(count);
        }
    }
}

/// The same of codes of four bits.
#[inline(always)]
unsafe fn deposit_nibbles(fill: &mut [u64; 8], mask: u64, p: *const u8) {
    let mut at = 0;
    for (i, w) in fill.iter_mut().enumerate() {
        // SAFETY: as above; a shift by half a byte leaves the eight codes that are needed at most.
        unsafe {
            let (select, count) = byte_mask(mask, i);
            let codes = p.add(at / 2).cast::<u64>().read_unaligned() >> (4 * (at % 2));
            *w = (*w & !select) | _pdep_u64(codes, select & 0x0f0f_0f0f_0f0f_0f0f);
            at += count;
        }
    }
}

/// [`deposit`] or [`deposit_nibbles`] on a register, through memory.
macro_rules! deposited {
    ($f:ident, $s:ty, $fill:ident, $mask:ident, $p:ident) => {{
        let mut out = [0u64; 8];
        <$s>::store(out.as_mut_ptr().cast(), $fill);
        $f(&mut out, $mask, $p);
        <$s>::load(out.as_ptr().cast())
    }};
}

/// AVX2 with BMI2.
#[derive(Debug)]
pub struct Deposit<S>(PhantomData<S>);

/// For a mask of eight lanes, which number goes where; negative where none does.
static FROM: [[i8; 8]; 256] = {
    let mut from = [[-1; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut at) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                from[mask][lane] = at;
                at += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    from
};

/// The first numbers of `v` in the lanes whose bit is set, +0 in the others.
#[inline(always)]
unsafe fn lanes8(mask: u8, v: __m256) -> __m256 {
    // SAFETY: the caller has AVX2.
    unsafe {
        let from = _mm256_cvtepi8_epi32(_mm_loadl_epi64(FROM[usize::from(mask)].as_ptr().cast()));
        let dropped = _mm256_castsi256_ps(_mm256_srai_epi32::<31>(from));
        _mm256_andnot_ps(dropped, _mm256_permutevar8x32_ps(v, from))
    }
}

// SAFETY: intrinsics of AVX2 and BMI2.
unsafe impl<S: Simd<I = [__m256i; 2], F = [__m256; 2]>> Expand for Deposit<S> {
    type S = S;

    #[inline(always)]
    unsafe fn bytes(fill: S::I, mask: u64, p: *const u8) -> S::I {
        // SAFETY: the caller's features and pointer.
        unsafe { deposited!(deposit, S, fill, mask, p) }
    }

    #[inline(always)]
    unsafe fn nibbles(fill: S::I, mask: u64, p: *const u8) -> S::I {
        // SAFETY: as above.
        unsafe { deposited!(deposit_nibbles, S, fill, mask, p) }
    }

    #[inline(always)]
    unsafe fn lanes<T: Number>(mask: u16, p: *const u8) -> S::F {
        // SAFETY: as above.
        unsafe {
            let [low, high] = mask.to_le_bytes();
            // The upper lanes begin where the lower ones end.
            let upper = p.add(T::SIZE * low.count_ones() as usize);
            [lanes8(low, T::load::<S>(p)[0]), lanes8(high, T::load::<S>(upper)[0])]
        }
    }
}

/// The same register, so that what was loaded there is not expanded straight from memory: that takes a Zen 4 1.5 to 1.9 times as
/// long (measured), of floats alone.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn loaded(v: __m512) -> __m512 {
    let mut v = v;
    // SAFETY: no instruction.
    unsafe { asm!("/* {0} */", inout(zmm_reg) v, options(pure, nomem, nostack, preserves_flags)) };
    v
}

/// AVX-512; `VBMI2`: bytes are expanded too.
#[derive(Debug)]
pub struct Wide<S, const VBMI2: bool>(PhantomData<S>);

// SAFETY: intrinsics of AVX-512F and BW, BMI2, and VBMI2 where said.
unsafe impl<S: Simd<I = __m512i, F = __m512>, const VBMI2: bool> Expand for Wide<S, VBMI2> {
    type S = S;

    #[inline(always)]
    unsafe fn bytes(fill: __m512i, mask: u64, p: *const u8) -> __m512i {
        // SAFETY: the caller's features and pointer.
        unsafe {
            if VBMI2 {
                return _mm512_mask_expand_epi8(fill, mask, _mm512_loadu_si512(p.cast()));
            }
            deposited!(deposit, S, fill, mask, p)
        }
    }

    #[inline(always)]
    unsafe fn nibbles(fill: __m512i, mask: u64, p: *const u8) -> __m512i {
        // SAFETY: as above.
        unsafe {
            if VBMI2 {
                let pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(p.cast()));
                let codes = _mm512_or_si512(pairs, _mm512_slli_epi16::<4>(pairs));
                let codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
                return _mm512_mask_expand_epi8(fill, mask, codes);
            }
            deposited!(deposit_nibbles, S, fill, mask, p)
        }
    }

    #[inline(always)]
    unsafe fn lanes<T: Number>(mask: u16, p: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_maskz_expand_ps(mask, loaded(T::load::<S>(p))) }
    }
}

/// Sums that stay in the first-level cache while the columns pass.
const STRETCH: usize = 2048;

/// Eight columns at a time, four as the four bytes of each lane of a dot product.
///
/// # Safety
/// As [`add_columns`]; `len` is a multiple of 64, the CPU has AVX-512 with VNNI.
#[inline(always)]
unsafe fn add_columns_vnni(w: *const u8, stride: usize, whole: usize, list: &[(u32, i8)], acc: *mut i32) {
    let mut sums = [0i32; STRETCH];
    for at in (0..whole).step_by(STRETCH) {
        let len = STRETCH.min(whole - at);
        sums[..len].fill(0);
        for (i, eight) in list.chunks(8).enumerate() {
            // Columns that are missing stand for the first one, times 0.
            let mut d = [0u8; 8];
            let mut from = [w.wrapping_add(eight[0].0 as usize * stride + at); 8];
            let mut next = from;
            for (j, &(k, v)) in eight.iter().enumerate() {
                d[j] = v as u8;
                from[j] = w.wrapping_add(k as usize * stride + at);
                next[j] = list.get(8 * i + 8 + j).map_or(from[j], |&(k, _)| w.wrapping_add(k as usize * stride + at));
            }
            let four = |d: &[u8]| i32::from_le_bytes([d[0], d[1], d[2], d[3]]);
            // SAFETY: whole columns of the caller's, `len` bytes of each, and as many sums.
            unsafe {
                let d = [_mm512_set1_epi32(four(&d[..4])), _mm512_set1_epi32(four(&d[4..]))];
                for n in (0..len).step_by(64) {
                    let to = sums.as_mut_ptr().add(n).cast::<__m512i>();
                    let mut s = [
                        to.read_unaligned(),
                        to.add(1).read_unaligned(),
                        to.add(2).read_unaligned(),
                        to.add(3).read_unaligned(),
                    ];
                    for h in 0..2 {
                        let p = &from[4 * h..4 * h + 4];
                        for p in &next[4 * h..4 * h + 4] {
                            _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(n).cast());
                        }
                        let (a, b) = (_mm512_loadu_si512(p[0].add(n).cast()), _mm512_loadu_si512(p[1].add(n).cast()));
                        let (c, e) = (_mm512_loadu_si512(p[2].add(n).cast()), _mm512_loadu_si512(p[3].add(n).cast()));
                        let (ab0, ab1) = (_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
                        let (ce0, ce1) = (_mm512_unpacklo_epi8(c, e), _mm512_unpackhi_epi8(c, e));
                        s[0] = _mm512_dpbusd_epi32(s[0], _mm512_unpacklo_epi16(ab0, ce0), d[h]);
                        s[1] = _mm512_dpbusd_epi32(s[1], _mm512_unpackhi_epi16(ab0, ce0), d[h]);
                        s[2] = _mm512_dpbusd_epi32(s[2], _mm512_unpacklo_epi16(ab1, ce1), d[h]);
                        s[3] = _mm512_dpbusd_epi32(s[3], _mm512_unpackhi_epi16(ab1, ce1), d[h]);
                    }
                    for (i, s) in s.into_iter().enumerate() {
                        to.add(i).write_unaligned(s);
                    }
                }
            }
        }
        for n in (0..len).step_by(64) {
            // SAFETY: 64 sums here and there.
            unsafe { add_in_order(sums.as_ptr().add(n), acc.add(at + n)) };
        }
    }
}

/// Adds 64 sums in the order that unpacking left them in: register `i` has bytes `4i..4i + 4` of each 16.
#[inline(always)]
unsafe fn add_in_order(sums: *const i32, acc: *mut i32) {
    // SAFETY: the caller's 64 sums.
    unsafe {
        let s = sums.cast::<__m512i>();
        let s = [s.read_unaligned(), s.add(1).read_unaligned(), s.add(2).read_unaligned(), s.add(3).read_unaligned()];
        // t0 = s0.0 s0.2 s1.0 s1.2 (16 bytes each), t1 = s0.1 s0.3 s1.1 s1.3, and so on.
        let (t0, t1) = (_mm512_shuffle_i32x4::<0x88>(s[0], s[1]), _mm512_shuffle_i32x4::<0xdd>(s[0], s[1]));
        let (t2, t3) = (_mm512_shuffle_i32x4::<0x88>(s[2], s[3]), _mm512_shuffle_i32x4::<0xdd>(s[2], s[3]));
        let rows = [
            _mm512_shuffle_i32x4::<0x88>(t0, t2),
            _mm512_shuffle_i32x4::<0x88>(t1, t3),
            _mm512_shuffle_i32x4::<0xdd>(t0, t2),
            _mm512_shuffle_i32x4::<0xdd>(t1, t3),
        ];
        for (i, v) in rows.into_iter().enumerate() {
            let to = acc.add(16 * i).cast::<__m512i>();
            to.write_unaligned(_mm512_add_epi32(to.read_unaligned(), v));
        }
    }
}

instantiate!(
    #[target_feature(enable = "avx2,fma,f16c,popcnt")]
    AVX2_LOOP, Loop<Avx2>, rows [2, 4], gemv [2, 1, 1], slots 38, lanes [4, 4 x 1] from 3, columns add_columns
);
instantiate!(
    #[target_feature(enable = "avx2,fma,f16c,popcnt,bmi2")]
    AVX2, Deposit<Avx2>, rows [2, 4], gemv [2, 1, 1], slots 17, lanes [4, 4 x 1] from 3, columns add_columns
);
instantiate!(
    #[target_feature(enable = "avx2,fma,f16c,popcnt,bmi2,avxvnni")]
    AVXVNNI, Deposit<AvxVnni>, rows [2, 4], gemv [2, 1, 1], slots 17, lanes [4, 4 x 1] from 3, columns add_columns
);
instantiate!(
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi2")]
    AVX512, Wide<Avx512, false>, rows [2, 4], gemv [4, 2, 2], slots 38, lanes [16, 8 x 2] from 9, columns add_columns
);
instantiate!(
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,popcnt,bmi2")]
    AVX512VNNI, Wide<Avx512Vnni, false>, rows [2, 4], gemv [4, 2, 2], slots 38, lanes [16, 8 x 2] from 9, columns add_columns_vnni
);
instantiate!(
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2,avx2,fma,f16c,popcnt,bmi2")]
    AVX512VBMI2, Wide<Avx512Vnni, true>, rows [2, 4], gemv [4, 2, 2], slots 38, lanes [16, 8 x 2] from 9, columns add_columns_vnni
);

/// The kernels of a level, `None` for the portable ones. Levels promise no BMI2 and no VBMI2: the CPU is asked.
pub(in crate::sparse::kernel) fn table(isa: Isa) -> Option<&'static SparseKernels> {
    if isa == Isa::Scalar || !std::is_x86_feature_detected!("popcnt") {
        return None;
    }
    if !std::is_x86_feature_detected!("bmi2") {
        return Some(&AVX2_LOOP);
    }
    Some(match isa {
        Isa::Scalar | Isa::Avx2 => &AVX2,
        Isa::AvxVnni => &AVXVNNI,
        Isa::Avx512 => &AVX512,
        Isa::Avx512Vnni | Isa::Amx if std::is_x86_feature_detected!("avx512vbmi2") => &AVX512VBMI2,
        Isa::Avx512Vnni | Isa::Amx => &AVX512VNNI,
    })
}
