//! AVX2 and AVX-VNNI: a register is a pair of ymm.
use crate::kernel::simd::{ops, Simd};
use std::arch::x86_64::*;

/// AVX2, FMA, F16C.
#[derive(Debug)]
pub struct Avx2;
/// AVX2 with the VEX form of `VPDPBUSD`.
#[derive(Debug)]
pub struct AvxVnni;

type I = [__m256i; 2];
type F = [__m256; 2];

#[inline(always)]
unsafe fn shr16(a: __m256i, n: usize) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe {
        match n {
            0 => a,
            1 => _mm256_srli_epi16::<1>(a),
            2 => _mm256_srli_epi16::<2>(a),
            3 => _mm256_srli_epi16::<3>(a),
            4 => _mm256_srli_epi16::<4>(a),
            5 => _mm256_srli_epi16::<5>(a),
            6 => _mm256_srli_epi16::<6>(a),
            _ => _mm256_srli_epi16::<7>(a),
        }
    }
}

#[inline(always)]
unsafe fn shl16(a: __m256i, n: usize) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe {
        match n {
            0 => a,
            1 => _mm256_slli_epi16::<1>(a),
            2 => _mm256_slli_epi16::<2>(a),
            3 => _mm256_slli_epi16::<3>(a),
            4 => _mm256_slli_epi16::<4>(a),
            5 => _mm256_slli_epi16::<5>(a),
            6 => _mm256_slli_epi16::<6>(a),
            _ => _mm256_slli_epi16::<7>(a),
        }
    }
}

#[inline(always)]
unsafe fn magic(a: __m256i, j: usize) -> __m256 {
    // SAFETY: the caller has AVX2.
    unsafe {
        let x = match j {
            0 => a,
            1 => _mm256_srli_epi32::<8>(a),
            2 => _mm256_srli_epi32::<16>(a),
            _ => _mm256_srli_epi32::<24>(a),
        };
        let x = _mm256_and_si256(x, _mm256_set1_epi32(0xff));
        _mm256_castsi256_ps(_mm256_or_si256(x, _mm256_set1_epi32(0x4B00_0000)))
    }
}

/// Two look-ups of eight entries; bit 3 of the index, moved to the sign, picks between them.
#[inline(always)]
unsafe fn lut(table: F, lane: __m256i) -> __m256 {
    // SAFETY: the caller has AVX2.
    unsafe {
        let pick = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(lane));
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(table[0], lane), _mm256_permutevar8x32_ps(table[1], lane), pick)
    }
}

/// Four entries of two numbers in one register, then even and odd numbers of eight apart.
#[inline(always)]
unsafe fn pairs(table: *const f32, at: *const u16) -> [__m256; 2] {
    // SAFETY: the caller has AVX2, and two floats from every place on.
    unsafe {
        let at = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
        let low = _mm256_castpd_ps(_mm256_i32gather_pd::<4>(table.cast(), _mm256_castsi256_si128(at)));
        let high = _mm256_castpd_ps(_mm256_i32gather_pd::<4>(table.cast(), _mm256_extracti128_si256::<1>(at)));
        let even = _mm256_castps_pd(_mm256_shuffle_ps::<0x88>(low, high));
        let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0xDD>(low, high));
        [_mm256_castpd_ps(_mm256_permute4x64_pd::<0xD8>(even)), _mm256_castpd_ps(_mm256_permute4x64_pd::<0xD8>(odd))]
    }
}

/// Rows `i` and `i + 4` of a matrix of 8 by 4 in one register, then two transpositions of 4 by 4.
#[inline(always)]
unsafe fn quads(table: *const f32, at: *const u16) -> [__m256; 4] {
    // SAFETY: the caller has AVX2, and four floats from every place on.
    unsafe {
        macro_rules! rows {
            ($a:literal, $b:literal) => {{
                let low = _mm_loadu_ps(table.add(usize::from(*at.add($a))));
                let high = _mm_loadu_ps(table.add(usize::from(*at.add($b))));
                _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high)
            }};
        }
        let (a, b, c, d) = (rows!(0, 4), rows!(1, 5), rows!(2, 6), rows!(3, 7));
        let (ab, cd) = (_mm256_castps_pd(_mm256_unpacklo_ps(a, b)), _mm256_castps_pd(_mm256_unpacklo_ps(c, d)));
        let (ef, gh) = (_mm256_castps_pd(_mm256_unpackhi_ps(a, b)), _mm256_castps_pd(_mm256_unpackhi_ps(c, d)));
        [
            _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
            _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)),
            _mm256_castpd_ps(_mm256_unpacklo_pd(ef, gh)),
            _mm256_castpd_ps(_mm256_unpackhi_pd(ef, gh)),
        ]
    }
}

/// Sixteen lanes within i8, narrowed.
#[inline(always)]
unsafe fn narrow(v: I) -> __m128i {
    // SAFETY: the caller has AVX2.
    unsafe {
        let w = _mm256_permute4x64_epi64::<0xD8>(_mm256_packs_epi32(v[0], v[1]));
        _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256::<1>(w))
    }
}

macro_rules! both {
    ($f:ident, $a:ident) => {
        [$f($a[0]), $f($a[1])]
    };
    ($f:ident, $a:ident, $b:ident) => {
        [$f($a[0], $b[0]), $f($a[1], $b[1])]
    };
    ($f:ident, $a:ident, $b:ident, $c:ident) => {
        [$f($a[0], $b[0], $c[0]), $f($a[1], $b[1], $c[1])]
    };
}

macro_rules! common {
    () => {
        type I = I;
        type F = F;
        ops! {
            load(p: *const u8) -> I = [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())];
            store(p: *mut u8, v: I) -> () = {
                _mm256_storeu_si256(p.cast(), v[0]);
                _mm256_storeu_si256(p.add(32).cast(), v[1]);
            };
            splat8(v: u8) -> I = [_mm256_set1_epi8(v as i8); 2];
            splat(v: i32) -> I = [_mm256_set1_epi32(v); 2];
            and(a: I, b: I) -> I = both!(_mm256_and_si256, a, b);
            or(a: I, b: I) -> I = both!(_mm256_or_si256, a, b);
            shr(a: I, n: usize) -> I = [shr16(a[0], n), shr16(a[1], n)];
            shl(a: I, n: usize) -> I = [shl16(a[0], n), shl16(a[1], n)];
            add8(a: I, b: I) -> I = both!(_mm256_add_epi8, a, b);
            sub8(a: I, b: I) -> I = both!(_mm256_sub_epi8, a, b);
            add(a: I, b: I) -> I = both!(_mm256_add_epi32, a, b);
            sub(a: I, b: I) -> I = both!(_mm256_sub_epi32, a, b);
            mul(a: I, b: I) -> I = both!(_mm256_mullo_epi32, a, b);
            mul16(a: I, b: I) -> I = both!(_mm256_mullo_epi16, a, b);
            mulhi16(a: I, b: I) -> I = both!(_mm256_mulhi_epu16, a, b);
            add16(a: I, b: I) -> I = both!(_mm256_add_epi16, a, b);
            shl16(a: I, n: usize) -> I = {
                let n = _mm_cvtsi32_si128(n as i32);
                [_mm256_sll_epi16(a[0], n), _mm256_sll_epi16(a[1], n)]
            };
            shr16(a: I, n: usize) -> I = {
                let n = _mm_cvtsi32_si128(n as i32);
                [_mm256_srl_epi16(a[0], n), _mm256_srl_epi16(a[1], n)]
            };
            xor(a: I, b: I) -> I = both!(_mm256_xor_si256, a, b);
            maxu(a: I, b: I) -> I = both!(_mm256_max_epu32, a, b);
            top(a: I) -> u32 = {
                let v = _mm256_max_epu32(a[0], a[1]);
                let v = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
                let v = _mm_max_epu32(v, _mm_shuffle_epi32::<0x4E>(v));
                _mm_cvtsi128_si32(_mm_max_epu32(v, _mm_shuffle_epi32::<0xB1>(v))) as u32
            };
            load_u8(p: *const u8) -> I = {
                let b = _mm_loadu_si128(p.cast());
                [_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(b))]
            };
            store_i8(p: *mut i8, v: I) -> () = _mm_storeu_si128(p.cast(), narrow(v));
            store_i8x4(p: *mut i8, v: [I; 4]) -> () = {
                // Fours of the halves of two registers in turns, within 16 bytes.
                let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                for i in 0..2 {
                    let (a, b) = (v[2 * i], v[2 * i + 1]);
                    let all = _mm256_packs_epi16(_mm256_packs_epi32(a[0], a[1]), _mm256_packs_epi32(b[0], b[1]));
                    _mm256_storeu_si256(p.add(32 * i).cast(), _mm256_permutevar8x32_epi32(all, order));
                }
            };
            cvt(a: I) -> F = both!(_mm256_cvtepi32_ps, a);
            rint(a: F) -> I = both!(_mm256_cvtps_epi32, a);
            magic(a: I, j: usize) -> F = [magic(a[0], j), magic(a[1], j)];
            bits(a: F) -> I = both!(_mm256_castps_si256, a);
            from_bits(a: I) -> F = both!(_mm256_castsi256_ps, a);
            loadf(p: *const f32) -> F = [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))];
            storef(p: *mut f32, v: F) -> () = {
                _mm256_storeu_ps(p, v[0]);
                _mm256_storeu_ps(p.add(8), v[1]);
            };
            splatf(v: f32) -> F = [_mm256_set1_ps(v); 2];
            load_f16(p: *const u16) -> F =
                [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))];
            load_bf16(p: *const u16) -> F = {
                let wide = |q: *const u16| {
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(q.cast()))))
                };
                [wide(p), wide(p.add(8))]
            };
            addf(a: F, b: F) -> F = both!(_mm256_add_ps, a, b);
            subf(a: F, b: F) -> F = both!(_mm256_sub_ps, a, b);
            mulf(a: F, b: F) -> F = both!(_mm256_mul_ps, a, b);
            divf(a: F, b: F) -> F = both!(_mm256_div_ps, a, b);
            minf(a: F, b: F) -> F = both!(_mm256_min_ps, a, b);
            maxf(a: F, b: F) -> F = both!(_mm256_max_ps, a, b);
            fma(a: F, b: F, c: F) -> F = both!(_mm256_fmadd_ps, a, b, c);
            shr32_16(a: I) -> I = [_mm256_srli_epi32::<16>(a[0]), _mm256_srli_epi32::<16>(a[1])];
            shr32(a: I, n: usize) -> I = {
                let n = _mm_cvtsi32_si128(n as i32);
                [_mm256_srl_epi32(a[0], n), _mm256_srl_epi32(a[1], n)]
            };
            shl32(a: I, n: usize) -> I = {
                let n = _mm_cvtsi32_si128(n as i32);
                [_mm256_sll_epi32(a[0], n), _mm256_sll_epi32(a[1], n)]
            };
            sar(a: I, n: usize) -> I = {
                let n = _mm_cvtsi32_si128(n as i32);
                [_mm256_sra_epi32(a[0], n), _mm256_sra_epi32(a[1], n)]
            };
            lut16(table: F, lane: I) -> F = [lut(table, lane[0]), lut(table, lane[1])];
            lut64(table: *const f32, lane: I) -> F = {
                let mask = _mm256_set1_epi32(63);
                [
                    _mm256_i32gather_ps::<4>(table, _mm256_and_si256(lane[0], mask)),
                    _mm256_i32gather_ps::<4>(table, _mm256_and_si256(lane[1], mask)),
                ]
            };
            gather(table: *const f32, lane: I) -> F =
                [_mm256_i32gather_ps::<4>(table, lane[0]), _mm256_i32gather_ps::<4>(table, lane[1])];
            pairs(table: *const f32, at: *const u16) -> [F; 2] = {
                let (a, b) = (pairs(table, at), pairs(table, at.add(8)));
                [[a[0], b[0]], [a[1], b[1]]]
            };
            quads(table: *const f32, at: *const u16) -> [F; 4] = {
                let (a, b) = (quads(table, at), quads(table, at.add(8)));
                [[a[0], b[0]], [a[1], b[1]], [a[2], b[2]], [a[3], b[3]]]
            };
            repeat16(p: *const u8) -> I = [_mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast())); 2];
            shuffle(table: I, u: I) -> I = both!(_mm256_shuffle_epi8, table, u);
            pick(u: I, bit: u8, a: I, b: I) -> I = {
                // The bit, moved to the top of its byte.
                let m = if bit == 16 {
                    [_mm256_slli_epi16::<3>(u[0]), _mm256_slli_epi16::<3>(u[1])]
                } else {
                    [_mm256_slli_epi16::<2>(u[0]), _mm256_slli_epi16::<2>(u[1])]
                };
                both!(_mm256_blendv_epi8, a, b, m)
            };
            xor_sign(a: I) -> I = {
                let sign = _mm256_set1_epi32(i32::MIN);
                [_mm256_xor_si256(a[0], sign), _mm256_xor_si256(a[1], sign)]
            };
            any_gt(a: F, b: F) -> bool = {
                let c = _mm256_or_ps(
                    _mm256_cmp_ps::<_CMP_GT_OQ>(a[0], b[0]),
                    _mm256_cmp_ps::<_CMP_GT_OQ>(a[1], b[1]),
                );
                _mm256_movemask_ps(c) != 0
            };
            prefetch(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_T0>(p.cast());
            prefetch_l2(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_T1>(p.cast());
            prefetch_write(p: *const u8) -> () = _mm_prefetch::<_MM_HINT_ET0>(p.cast());
        }
    };
}

#[inline(always)]
unsafe fn dot7_256(acc: __m256i, u: __m256i, s: __m256i) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe { _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1))) }
}

#[inline(always)]
unsafe fn dot4_256(acc: __m256i, u: __m256i, s: __m256i) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe { _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, s)) }
}

#[inline(always)]
unsafe fn widen_256(acc: __m256i, sums: __m256i) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe { _mm256_add_epi32(acc, _mm256_madd_epi16(sums, _mm256_set1_epi16(1))) }
}

/// `VPMADDUBSW` saturates at i16: u is split into its low seven bits and its top bit, each exact.
#[inline(always)]
unsafe fn dot8_256(acc: __m256i, u: __m256i, s: __m256i) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe {
        let lo = dot7_256(acc, _mm256_and_si256(u, _mm256_set1_epi8(0x7f)), s);
        dot7_256(lo, _mm256_and_si256(u, _mm256_set1_epi8(-128)), s)
    }
}

// SAFETY: intrinsics of the features that `Isa::Avx2` stands for.
unsafe impl Simd for Avx2 {
    const SHORT: bool = true;
    common!();
    ops! {
        dot(acc: I, u: I, s: I) -> I = both!(dot8_256, acc, u, s);
        dot7(acc: I, u: I, s: I) -> I = both!(dot7_256, acc, u, s);
        dot4(acc: I, u: I, s: I) -> I = both!(dot4_256, acc, u, s);
        widen(acc: I, sums: I) -> I = both!(widen_256, acc, sums);
    }
}

// SAFETY: intrinsics of the features that `Isa::AvxVnni` stands for.
unsafe impl Simd for AvxVnni {
    const WIDE_DOT: bool = true;
    common!();
    ops! {
        dot(acc: I, u: I, s: I) -> I = both!(_mm256_dpbusd_avx_epi32, acc, u, s);
        dot7(acc: I, u: I, s: I) -> I = both!(_mm256_dpbusd_avx_epi32, acc, u, s);
    }
}
