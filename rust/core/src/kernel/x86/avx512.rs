//! AVX-512: one zmm per register. With and without VNNI they differ only in the dot product; what CPUs with tiles have
//! besides serves the decoding of their operands.
use crate::kernel::simd::{ops, Simd};
#[cfg(not(feature = "emulated-tiles"))]
use std::arch::asm;
use std::arch::x86_64::*;

/// AVX-512 F, BW, DQ, VL.
#[derive(Debug)]
pub struct Avx512;
/// AVX-512 with VNNI.
#[derive(Debug)]
pub struct Avx512Vnni;

/// That of CPUs with tiles: VNNI, BF16, FP16, VBMI, VBMI2.
#[derive(Debug)]
pub struct Avx512Tiles;

type I = __m512i;
type F = __m512;

#[inline(always)]
unsafe fn shr16(a: I, n: usize) -> I {
    // SAFETY: the caller has AVX-512BW.
    unsafe {
        match n {
            0 => a,
            1 => _mm512_srli_epi16::<1>(a),
            2 => _mm512_srli_epi16::<2>(a),
            3 => _mm512_srli_epi16::<3>(a),
            4 => _mm512_srli_epi16::<4>(a),
            5 => _mm512_srli_epi16::<5>(a),
            6 => _mm512_srli_epi16::<6>(a),
            _ => _mm512_srli_epi16::<7>(a),
        }
    }
}

#[inline(always)]
unsafe fn shl16(a: I, n: usize) -> I {
    // SAFETY: the caller has AVX-512BW.
    unsafe {
        match n {
            0 => a,
            1 => _mm512_slli_epi16::<1>(a),
            2 => _mm512_slli_epi16::<2>(a),
            3 => _mm512_slli_epi16::<3>(a),
            4 => _mm512_slli_epi16::<4>(a),
            5 => _mm512_slli_epi16::<5>(a),
            6 => _mm512_slli_epi16::<6>(a),
            _ => _mm512_slli_epi16::<7>(a),
        }
    }
}

/// Byte `j` of each lane under the exponent of 2^23; `(x & 0xff) | 2^23` is one ternary logic operation.
#[inline(always)]
unsafe fn magic(a: I, j: usize) -> F {
    // SAFETY: the caller has AVX-512F.
    unsafe {
        let base = _mm512_set1_epi32(0x4B00_0000);
        let x = match j {
            0 => a,
            1 => _mm512_srli_epi32::<8>(a),
            2 => _mm512_srli_epi32::<16>(a),
            _ => return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32::<24>(a), base)),
        };
        _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xF8>(base, x, _mm512_set1_epi32(0xff)))
    }
}

/// Four transpositions of 4 by 4: of rows `i`, `i + 4`, `i + 8`, `i + 12` of a matrix of 16 by 4 in register `i`.
#[inline(always)]
unsafe fn transposed([a, b, c, d]: [F; 4]) -> [F; 4] {
    // SAFETY: the caller has AVX-512F.
    unsafe {
        let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
        let (ef, gh) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let (ef, gh) = (_mm512_castps_pd(ef), _mm512_castps_pd(gh));
        [
            _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
            _mm512_castpd_ps(_mm512_unpacklo_pd(ef, gh)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(ef, gh)),
        ]
    }
}

/// Four numbers of 16 rows from their places in the table on; `SUMS`: with those from second places on.
#[inline(always)]
unsafe fn quads<const SUMS: bool>(table: *const f32, at: *const u16, more: *const u16) -> [F; 4] {
    // SAFETY: the caller has AVX-512F, and four floats from every place on.
    unsafe {
        macro_rules! row {
            ($i:literal) => {{
                let v = _mm_loadu_ps(table.add(usize::from(*at.add($i))));
                if SUMS {
                    _mm_add_ps(v, _mm_loadu_ps(table.add(usize::from(*more.add($i)))))
                } else {
                    v
                }
            }};
        }
        macro_rules! rows {
            ($a:literal, $b:literal, $c:literal, $d:literal) => {{
                let v = _mm512_insertf32x4::<1>(_mm512_castps128_ps512(row!($a)), row!($b));
                _mm512_insertf32x4::<3>(_mm512_insertf32x4::<2>(v, row!($c)), row!($d))
            }};
        }
        transposed([rows!(0, 4, 8, 12), rows!(1, 5, 9, 13), rows!(2, 6, 10, 14), rows!(3, 7, 11, 15)])
    }
}

/// As [`quads`] with eight numbers, which lie in one register of 256 bits until they are transposed.
#[inline(always)]
unsafe fn octets<const SUMS: bool>(table: *const f32, at: *const u16, more: *const u16) -> [F; 8] {
    // SAFETY: the caller has AVX-512F, and eight floats from every place on.
    unsafe {
        macro_rules! row {
            ($i:expr) => {{
                let v = _mm256_loadu_ps(table.add(usize::from(*at.add($i))));
                let v = if SUMS { _mm256_add_ps(v, _mm256_loadu_ps(table.add(usize::from(*more.add($i))))) } else { v };
                _mm256_castps_pd(v)
            }};
        }
        // The low halves of the rows of a register of `transposed`, and the high ones.
        let low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
        let high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
        let (mut a, mut b) = ([_mm512_setzero_ps(); 4], [_mm512_setzero_ps(); 4]);
        for i in 0..4 {
            let p = _mm512_insertf64x4::<1>(_mm512_castpd256_pd512(row!(i)), row!(i + 8));
            let q = _mm512_insertf64x4::<1>(_mm512_castpd256_pd512(row!(i + 4)), row!(i + 12));
            a[i] = _mm512_castpd_ps(_mm512_permutex2var_pd(p, low, q));
            b[i] = _mm512_castpd_ps(_mm512_permutex2var_pd(p, high, q));
        }
        let (a, b) = (transposed(a), transposed(b));
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
    }
}

/// Sums of binary16 numbers, on CPUs without the instruction: sums in binary32 round alike.
#[cfg(feature = "emulated-tiles")]
#[target_feature(enable = "avx512f")]
#[inline]
#[allow(unused_unsafe)]
unsafe fn add_halves(a: I, b: I) -> I {
    // SAFETY: the caller has AVX-512 F.
    unsafe {
        let part = |v: I, i: usize| {
            let half = if i == 0 { _mm512_castsi512_si256(v) } else { _mm512_extracti64x4_epi64::<1>(v) };
            _mm512_cvtph_ps(half)
        };
        let sum = |i| _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm512_add_ps(part(a, i), part(b, i)));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(sum(0)), sum(1))
    }
}

/// Sums of binary16 numbers.
#[cfg(not(feature = "emulated-tiles"))]
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn add_halves(a: I, b: I) -> I {
    let sum: I;
    // SAFETY: the caller has AVX-512 FP16, whose intrinsics the oldest supported compiler lacks.
    unsafe {
        asm!(
            "vaddph {sum}, {a}, {b}",
            sum = lateout(zmm_reg) sum, a = in(zmm_reg) a, b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// See [`Simd::three_inst`]: products in 16 bits, sums in binary16.
#[inline(always)]
unsafe fn three_inst(states: I) -> [F; 2] {
    const MUL: u32 = 89_226_354;
    const ADD: u32 = 64_248_484;
    // SAFETY: the caller has AVX-512 BW and FP16.
    unsafe {
        let low = _mm512_mullo_epi16(states, _mm512_set1_epi16(MUL as i16));
        let low = _mm512_add_epi16(low, _mm512_set1_epi16(ADD as i16));
        let carry = _mm512_cmplt_epu16_mask(low, _mm512_set1_epi16(ADD as i16));
        let high = _mm512_mullo_epi16(states, _mm512_set1_epi16((MUL >> 16) as i16));
        let high = _mm512_add_epi16(high, _mm512_mulhi_epu16(states, _mm512_set1_epi16(MUL as i16)));
        let high = _mm512_add_epi16(high, _mm512_set1_epi16((ADD >> 16) as i16));
        let high = _mm512_mask_add_epi16(high, carry, high, _mm512_set1_epi16(1));
        let (own, flips) = (_mm512_set1_epi16(0x8FFF_u16 as i16), _mm512_set1_epi16(0x3B60));
        // (x & own) ^ flips
        let low = _mm512_ternarylogic_epi32::<0x78>(flips, low, own);
        let high = _mm512_ternarylogic_epi32::<0x78>(flips, high, own);
        let sum = add_halves(low, high);
        let apart: [u16; 32] = std::array::from_fn(|i| (i % 16 * 2 + i / 16) as u16);
        let sum = _mm512_permutexvar_epi16(_mm512_loadu_si512(apart.as_ptr().cast()), sum);
        [_mm512_cvtph_ps(_mm512_castsi512_si256(sum)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(sum))]
    }
}

#[inline(always)]
unsafe fn funnel16(now: I, next: I, n: usize) -> I {
    // SAFETY: the caller has AVX-512 VBMI2.
    unsafe {
        macro_rules! by {
            ($($n:literal),*) => {
                match n {
                    $( $n => _mm512_shldi_epi16::<$n>(now, next), )*
                    _ => _mm512_shldv_epi16(now, next, _mm512_set1_epi16(n as i16)),
                }
            };
        }
        by!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    }
}

/// `table[lane & 31]` of 64 floats, of the upper 32 where `upper` is set.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn of_halves(table: *const f32, lane: __m512i, upper: __mmask16) -> __m512 {
    // SAFETY: the caller's 64 floats.
    unsafe {
        let a = _mm512_permutex2var_ps(_mm512_loadu_ps(table), lane, _mm512_loadu_ps(table.add(16)));
        let b = _mm512_permutex2var_ps(_mm512_loadu_ps(table.add(32)), lane, _mm512_loadu_ps(table.add(48)));
        _mm512_mask_blend_ps(upper, a, b)
    }
}

macro_rules! common {
    () => {
        type I = I;
        type F = F;
        ops! {
            load(p: *const u8) -> I = _mm512_loadu_si512(p.cast());
            store(p: *mut u8, v: I) -> () = _mm512_storeu_si512(p.cast(), v);
            splat8(v: u8) -> I = _mm512_set1_epi8(v as i8);
            splat(v: i32) -> I = _mm512_set1_epi32(v);
            and(a: I, b: I) -> I = _mm512_and_si512(a, b);
            or(a: I, b: I) -> I = _mm512_or_si512(a, b);
            shr(a: I, n: usize) -> I = shr16(a, n);
            shl(a: I, n: usize) -> I = shl16(a, n);
            add8(a: I, b: I) -> I = _mm512_add_epi8(a, b);
            sub8(a: I, b: I) -> I = _mm512_sub_epi8(a, b);
            add(a: I, b: I) -> I = _mm512_add_epi32(a, b);
            sub(a: I, b: I) -> I = _mm512_sub_epi32(a, b);
            mul(a: I, b: I) -> I = _mm512_mullo_epi32(a, b);
            mul16(a: I, b: I) -> I = _mm512_mullo_epi16(a, b);
            mulhi16(a: I, b: I) -> I = _mm512_mulhi_epu16(a, b);
            add16(a: I, b: I) -> I = _mm512_add_epi16(a, b);
            shl16(a: I, n: usize) -> I = _mm512_sll_epi16(a, _mm_cvtsi32_si128(n as i32));
            shr16(a: I, n: usize) -> I = _mm512_srl_epi16(a, _mm_cvtsi32_si128(n as i32));
            xor(a: I, b: I) -> I = _mm512_xor_si512(a, b);
            maxu(a: I, b: I) -> I = _mm512_max_epu32(a, b);
            top(a: I) -> u32 = _mm512_reduce_max_epu32(a);
            load_u8(p: *const u8) -> I = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            store_i8(p: *mut i8, v: I) -> () = _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(v));
            store_i8x4(p: *mut i8, v: [I; 4]) -> () = {
                // Fours of each register in turns, within 16 bytes.
                let all = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
                let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                _mm512_storeu_si512(p.cast(), _mm512_permutexvar_epi32(order, all));
            };
            cvt(a: I) -> F = _mm512_cvtepi32_ps(a);
            rint(a: F) -> I = _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            magic(a: I, j: usize) -> F = magic(a, j);
            bits(a: F) -> I = _mm512_castps_si512(a);
            from_bits(a: I) -> F = _mm512_castsi512_ps(a);
            loadf(p: *const f32) -> F = _mm512_loadu_ps(p);
            storef(p: *mut f32, v: F) -> () = _mm512_storeu_ps(p, v);
            splatf(v: f32) -> F = _mm512_set1_ps(v);
            load_f16(p: *const u16) -> F = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
            load_bf16(p: *const u16) -> F =
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))));
            addf(a: F, b: F) -> F = _mm512_add_ps(a, b);
            subf(a: F, b: F) -> F = _mm512_sub_ps(a, b);
            mulf(a: F, b: F) -> F = _mm512_mul_ps(a, b);
            divf(a: F, b: F) -> F = _mm512_div_ps(a, b);
            minf(a: F, b: F) -> F = _mm512_min_ps(a, b);
            maxf(a: F, b: F) -> F = _mm512_max_ps(a, b);
            // The greater magnitude, without its sign.
            max_abs(a: F, b: F) -> F = _mm512_range_ps::<0b1011>(a, b);
            fma(a: F, b: F, c: F) -> F = _mm512_fmadd_ps(a, b, c);
            shr32_16(a: I) -> I = _mm512_srli_epi32::<16>(a);
            shr32(a: I, n: usize) -> I = _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32));
            shl32(a: I, n: usize) -> I = _mm512_sll_epi32(a, _mm_cvtsi32_si128(n as i32));
            sar(a: I, n: usize) -> I = _mm512_sra_epi32(a, _mm_cvtsi32_si128(n as i32));
            lut16(table: F, lane: I) -> F = _mm512_permutexvar_ps(lane, table);
            lut64(table: *const f32, lane: I) -> F =
                of_halves(table, lane, _mm512_test_epi32_mask(lane, _mm512_set1_epi32(32)));
            look_up(table: *const f32, p: *const u8) -> F = {
                let lane = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()));
                of_halves(table, lane, _mm512_movepi32_mask(lane))
            };
            gather(table: *const f32, lane: I) -> F = _mm512_i32gather_ps::<4>(lane, table);
            pairs(table: *const f32, at: *const u16) -> [F; 2] = {
                let at = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                let low = _mm512_i32gather_pd::<4>(_mm512_castsi512_si256(at), table.cast());
                let high = _mm512_i32gather_pd::<4>(_mm512_extracti64x4_epi64::<1>(at), table.cast());
                let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
                let (low, high) = (_mm512_castpd_ps(low), _mm512_castpd_ps(high));
                [_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)]
            };
            quads(table: *const f32, at: *const u16) -> [F; 4] = quads::<false>(table, at, at);
            quad_sums(table: *const f32, at: *const u16, more: *const u16) -> [F; 4] = quads::<true>(table, at, more);
            repeat16(p: *const u8) -> I = _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()));
            shuffle(table: I, u: I) -> I = _mm512_shuffle_epi8(table, u);
            pick(u: I, bit: u8, a: I, b: I) -> I =
                _mm512_mask_blend_epi8(_mm512_test_epi8_mask(u, _mm512_set1_epi8(bit as i8)), a, b);
            xor_sign(a: I) -> I = _mm512_xor_si512(a, _mm512_set1_epi32(i32::MIN));
            any_gt(a: F, b: F) -> bool = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0;
            prefetch(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_T0>(p.cast());
            prefetch_l2(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_T1>(p.cast());
            prefetch_write(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_ET0>(p.cast());
        }
        #[inline(always)]
        unsafe fn octets<const SUMS: bool>(table: *const f32, at: *const u16, more: *const u16) -> [F; 8] {
            // SAFETY: the trait's contract.
            unsafe { octets::<SUMS>(table, at, more) }
        }
    };
}

// SAFETY: intrinsics of the features that `Isa::Avx512` stands for.
unsafe impl Simd for Avx512 {
    const SHORT: bool = true;
    common!();
    ops! {
        // VPMADDUBSW saturates at i16: u is split into its low seven bits and its top bit, each exact.
        dot(acc: I, u: I, s: I) -> I = {
            let ones = _mm512_set1_epi16(1);
            let lo = _mm512_maddubs_epi16(_mm512_and_si512(u, _mm512_set1_epi8(0x7f)), s);
            let hi = _mm512_maddubs_epi16(_mm512_and_si512(u, _mm512_set1_epi8(-128)), s);
            _mm512_add_epi32(acc, _mm512_add_epi32(_mm512_madd_epi16(lo, ones), _mm512_madd_epi16(hi, ones)))
        };
        dot7(acc: I, u: I, s: I) -> I =
            _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(u, s), _mm512_set1_epi16(1)));
        dot4(acc: I, u: I, s: I) -> I = _mm512_add_epi16(acc, _mm512_maddubs_epi16(u, s));
        widen(acc: I, sums: I) -> I = _mm512_add_epi32(acc, _mm512_madd_epi16(sums, _mm512_set1_epi16(1)));
    }
}

// SAFETY: intrinsics of the features that `Isa::Avx512Vnni` stands for.
unsafe impl Simd for Avx512Vnni {
    const WIDE_DOT: bool = true;
    common!();
    ops! {
        dot(acc: I, u: I, s: I) -> I = _mm512_dpbusd_epi32(acc, u, s);
        dot7(acc: I, u: I, s: I) -> I = _mm512_dpbusd_epi32(acc, u, s);
    }
}

// SAFETY: intrinsics and instructions of the features that `Isa::Amx` stands for.
unsafe impl Simd for Avx512Tiles {
    const WIDE_DOT: bool = true;
    common!();
    ops! {
        dot(acc: I, u: I, s: I) -> I = _mm512_dpbusd_epi32(acc, u, s);
        dot7(acc: I, u: I, s: I) -> I = _mm512_dpbusd_epi32(acc, u, s);
        funnel16(now: I, next: I, n: usize) -> I = funnel16(now, next, n);
        three_inst(states: I) -> Option<[F; 2]> = Some(three_inst(states));
        round_pairs(even: F, odd: F) -> I = super::amx::round_pairs(even, odd);
        table64(p: *const u8) -> [I; 4] = [_mm512_loadu_si512(p.cast()); 4];
        look64(table: &[I; 4], u: I) -> I = _mm512_permutexvar_epi8(u, table[0]);
        table_of_halves(p: *const u8) -> [I; 4] = {
            let all: [u8; 64] = std::array::from_fn(|u| u as u8);
            let half = Avx512Vnni::look_halves(&Avx512Vnni::table_of_halves(p), _mm512_loadu_si512(all.as_ptr().cast()));
            [half[0], half[1], half[0], half[1]]
        };
        look_halves(table: &[I; 4], u: I) -> [I; 2] =
            [_mm512_permutexvar_epi8(u, table[0]), _mm512_permutexvar_epi8(u, table[1])];
    }
}
