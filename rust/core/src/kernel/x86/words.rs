//! Codes of more than five bits as bf16 tiles. The bytes of a table of 256 words are eight registers, which two or four
//! permutations look up, where a gather would fetch every number by itself. Integers are floats once their bytes are in place.
use super::amx::round_pairs;
use super::avx512::Avx512Vnni as V;
use crate::kernel::generic::{group, W_TABLE256};
use crate::kernel::simd::Simd;
use crate::kernel::F32Args;
use std::arch::x86_64::*;

/// Whether the upper half of a table of 256 values is the lower one negated, or is never looked at: then its words need only
/// half a table and a sign.
pub fn is_symmetric(values: &[f32], bits: usize) -> bool {
    let (low, high) = values.split_at(values.len() / 2);
    let opposite = |(a, b): (&f32, &f32)| a.to_bits() ^ b.to_bits() == 1 << 31 || (a.is_nan() && b.is_nan());
    bits < 8 || low.iter().zip(high).all(opposite)
}

/// Decodes unpacked bytes of one panel to bf16 tiles, 2 KiB a block, as `amx::bf16_decoder` does. `SIGN`: see
/// [`is_symmetric`]. `UNIT`: values without their scales, rounded where bf16 does not have them.
///
/// # Safety
/// As the decoders there; `a.values` has 256 entries, exact in bf16 without `UNIT`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx2,fma,f16c")]
unsafe fn decode<const SIGN: bool, const UNIT: bool>(a: &F32Args, out: *mut u8) {
    // SAFETY: as the caller says.
    unsafe {
        // The low bytes of 64 words each, and the high ones.
        let (mut low, mut high) = ([_mm512_setzero_si512(); 4], [_mm512_setzero_si512(); 4]);
        for i in 0..4 {
            macro_rules! words {
                ($at:expr) => {{
                    let (low, high) = (V::loadf(a.values.add($at)), V::loadf(a.values.add($at + 16)));
                    std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
                }};
            }
            macro_rules! bytes {
                ($a:expr, $b:expr) => {
                    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm512_cvtepi16_epi8($a)), _mm512_cvtepi16_epi8($b))
                };
            }
            let (a, b) = (words!(64 * i), words!(64 * i + 32));
            low[i] = bytes!(a, b);
            high[i] = bytes!(_mm512_srli_epi16::<8>(a), _mm512_srli_epi16::<8>(b));
        }
        let (top, upper) = (_mm512_set1_epi8(i8::MIN), V::splat(-65536));
        let step = a.padded.min(64) / 4;
        for b in 0..a.blocks {
            let mut g = (a.block0 + b) * 64 / a.padded;
            for r0 in (0..16).step_by(step) {
                let (s, _) = group::<V, W_TABLE256>(a, 0, g.min(a.groups - 1));
                g += 1;
                for r in r0..r0 + step {
                    let codes = a.bytes.add(b * 1024 + 64 * r);
                    if a.prefetch > 0 {
                        V::prefetch(codes.wrapping_add(a.prefetch));
                    }
                    let u = V::load(codes);
                    macro_rules! look_up {
                        ($t:ident) => {{
                            let below = _mm512_permutex2var_epi8($t[0], u, $t[1]);
                            if SIGN {
                                below
                            } else {
                                let above = _mm512_permutex2var_epi8($t[2], u, $t[3]);
                                _mm512_mask_blend_epi8(_mm512_movepi8_mask(u), below, above)
                            }
                        }};
                    }
                    let (l, h) = (look_up!(low), look_up!(high));
                    // h ^ (u & top)
                    let h = if SIGN { _mm512_ternarylogic_epi32::<0x78>(h, u, top) } else { h };
                    // Four words of two rows in each 16 bytes, then the first or the last two of four.
                    let (first, last) = (_mm512_unpacklo_epi8(l, h), _mm512_unpackhi_epi8(l, h));
                    let rows = [V::from_bits(first), V::from_bits(last)];
                    let halves = [
                        _mm512_shuffle_ps::<0b10_00_10_00>(rows[0], rows[1]),
                        _mm512_shuffle_ps::<0b11_01_11_01>(rows[0], rows[1]),
                    ];
                    for (half, v) in halves.into_iter().enumerate() {
                        let mut v = V::bits(v);
                        if !UNIT {
                            let (even, odd) = (V::from_bits(V::shl32(v, 16)), V::from_bits(V::and(v, upper)));
                            v = round_pairs(V::mulf(even, s), V::mulf(odd, s));
                        }
                        V::store(out.add(b * 2048 + (2 * r + half) * 64), v);
                    }
                }
            }
        }
    }
}

/// Decodes unpacked codes of one panel, integers `MUL*u - z`, to bf16 tiles without their scales: all within 255, exact. A byte
/// below the exponent of 2^15 makes `2^15 + u`, and twice that less an odd number is exact too; its upper half is the number.
///
/// # Safety
/// As the decoders of `amx`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx2,fma,f16c")]
unsafe fn integers<const MUL: i32>(a: &F32Args, out: *mut u8) {
    const BASE: f32 = 32768.0;
    // SAFETY: as the caller says.
    unsafe {
        let (base, mul) = (V::bits(V::splatf(BASE)), V::splatf(MUL as f32));
        // Byte `j` of each lane to byte 1, and the upper halves of lanes to the lower ones.
        let to_second = [lanes(0x0000), lanes(0x0100), lanes(0x0200), lanes(0x0300)];
        let down = lanes(0x0302);
        let (second, lower) = (0x2222_2222_2222_2222, 0x3333_3333_3333_3333);
        let step = a.padded.min(64) / 4;
        for b in 0..a.blocks {
            let mut g = (a.block0 + b) * 64 / a.padded;
            for r0 in (0..16).step_by(step) {
                let z =
                    if a.zeros.is_null() { V::splat(a.sub) } else { V::load_u8(a.zeros.add(g.min(a.groups - 1) * 16)) };
                let z = V::addf(V::cvt(z), V::splatf(MUL as f32 * BASE));
                g += 1;
                for r in r0..r0 + step {
                    let codes = a.bytes.add(b * 1024 + 64 * r);
                    if a.prefetch > 0 {
                        V::prefetch(codes.wrapping_add(a.prefetch));
                    }
                    let u = V::load(codes);
                    macro_rules! number {
                        ($j:expr) => {{
                            let f = V::from_bits(_mm512_mask_shuffle_epi8(base, second, u, to_second[$j]));
                            V::bits(if MUL == 1 { V::subf(f, z) } else { _mm512_fmsub_ps(f, mul, z) })
                        }};
                    }
                    for half in 0..2 {
                        let (even, odd) = (number!(2 * half), number!(2 * half + 1));
                        let both = _mm512_mask_shuffle_epi8(odd, lower, even, down);
                        V::store(out.add(b * 2048 + (2 * r + half) * 64), both);
                    }
                }
            }
        }
    }
}

/// A shuffle that does to every lane of 32 bits what the bytes of `lane` say, places within the lane.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
unsafe fn lanes(lane: u32) -> __m512i {
    let four: [u32; 4] = std::array::from_fn(|d| lane + 0x0404_0404 * d as u32);
    // SAFETY: four lanes are read.
    unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(four.as_ptr().cast())) }
}

/// The decoder for integers `mul*u - z`, 1 or 2, without their scales; see [`integers`].
pub fn integer_decoder(mul: i32) -> unsafe fn(&F32Args, *mut u8) {
    if mul == 2 {
        integers::<2>
    } else {
        integers::<1>
    }
}

/// The decoder for a table; see [`decode`].
pub fn decoder(symmetric: bool, unit: bool) -> unsafe fn(&F32Args, *mut u8) {
    match (symmetric, unit) {
        (false, false) => decode::<false, false>,
        (false, true) => decode::<false, true>,
        (true, false) => decode::<true, false>,
        (true, true) => decode::<true, true>,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::kernel::ScalePtr;

    fn args(bytes: &[u8], scales: &[f32]) -> F32Args {
        // Two blocks in groups of 32.
        F32Args {
            bytes: bytes.as_ptr(),
            byte_stride: 0,
            blocks: 2,
            padded: 32,
            block0: 0,
            groups: 4,
            scales: ScalePtr::F32(scales.as_ptr()),
            scale_stride: 0,
            zeros: std::ptr::null(),
            fzeros: std::ptr::null(),
            sub: 0,
            values: std::ptr::null(),
            tensor: 1.0,
            prefetch: 0,
            x: std::ptr::null(),
            x_stride: 0,
            c: std::ptr::null_mut(),
            ldc: 0,
        }
    }

    /// The value of K and the row of number `i` of tiles: a row of them has two values of K for each of 16 rows.
    fn place(i: usize) -> (usize, usize) {
        (i / 32 * 2 + i % 2, i / 2 % 16)
    }

    #[test]
    fn integers_are_exact() {
        if !Isa::Amx.is_available() {
            return;
        }
        // Every byte in every place of a lane.
        let bytes: Vec<u8> = (0..2048u32).map(|i| (i % 4 * 67 + i / 4) as u8).collect();
        let zeros: Vec<u8> = (0..64).map(|i| (i * 37) as u8).collect();
        for (mul, sub, stored) in [(1, 128, false), (1, 0, true), (2, 255, false)] {
            let a = F32Args { sub, zeros: if stored { zeros.as_ptr() } else { std::ptr::null() }, ..args(&bytes, &[]) };
            let mut out = vec![0u16; 2048];
            // SAFETY: AMX brings AVX-512 BF16; two blocks of 1024 codes.
            unsafe { integer_decoder(mul)(&a, out.as_mut_ptr().cast()) };
            for (i, got) in out.iter().enumerate() {
                let (k, n) = place(i);
                let z = if stored { i32::from(zeros[k / 32 * 16 + n]) } else { sub };
                let want = mul * i32::from(bytes[k / 4 * 64 + n * 4 + k % 4]) - z;
                assert_eq!(half::bf16::from_bits(*got).to_f32(), want as f32, "{i} {mul} {sub}");
            }
        }
    }

    #[test]
    fn words_are_the_values_rounded() {
        if !Isa::Amx.is_available() {
            return;
        }
        let any: Vec<f32> = (0..256u32).map(|i| (i.wrapping_mul(0x9E37_79B1) >> 8) as f32 / 1e5 - 80.0).collect();
        let opposite: Vec<f32> = (0..256).map(|i| if i < 128 { any[i].abs() } else { -any[i - 128].abs() }).collect();
        assert!(!is_symmetric(&any, 8) && is_symmetric(&any, 7) && is_symmetric(&opposite, 8));
        let bytes: Vec<u8> = (0..2048u32).map(|i| (i.wrapping_mul(0x85EB_CA6B) >> 24) as u8).collect();
        let scales: Vec<f32> = (0..64).map(|i| i as f32 - 20.0).collect();
        for (values, symmetric) in [(&any, false), (&opposite, true), (&opposite, false)] {
            let exact: Vec<f32> = values.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
            for unit in [false, true] {
                let values = if unit { values.as_ptr() } else { exact.as_ptr() };
                let a = F32Args { values, ..args(&bytes, &scales) };
                let mut out = vec![0u16; 2048];
                // SAFETY: AMX brings AVX-512 BF16; two blocks of 1024 codes.
                unsafe { decoder(symmetric, unit)(&a, out.as_mut_ptr().cast()) };
                for (i, got) in out.iter().enumerate() {
                    let (k, n) = place(i);
                    let s = if unit { 1.0 } else { scales[k / 32 * 16 + n] };
                    let want = exact[usize::from(bytes[k / 4 * 64 + n * 4 + k % 4])] * s;
                    assert_eq!(half::bf16::from_bits(*got), half::bf16::from_f32(want), "{i} {symmetric} {unit}");
                }
            }
        }
    }
}
