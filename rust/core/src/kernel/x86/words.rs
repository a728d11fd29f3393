//! Codes of seven and eight bits as bf16 tiles: a table of 256 words of 16 bits is eight registers, which two or four
//! permutations look up, where a gather would fetch every number by itself.
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
unsafe fn decode<const SIGN: bool, const UNIT: bool>(a: &F32Args, out: *mut u8) {
    // SAFETY: as the caller says.
    unsafe {
        let mut table = [_mm512_setzero_si512(); 8];
        for (i, t) in table.iter_mut().enumerate() {
            let (low, high) = (V::loadf(a.values.add(32 * i)), V::loadf(a.values.add(32 * i + 16)));
            *t = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
        }
        // Bytes 0 and 1 of each dword to its words, and bytes 2 and 3.
        let pick = [0x8001_8000_u32 as i32, 0x8003_8002_u32 as i32].map(|base| {
            let lane: [i32; 4] = std::array::from_fn(|d| base + 0x0004_0004 * d as i32);
            _mm512_broadcast_i32x4(_mm_loadu_si128(lane.as_ptr().cast()))
        });
        let (bit6, bit7, high) = (_mm512_set1_epi16(64), _mm512_set1_epi16(128), V::splat(-65536));
        let step = a.padded.min(64) / 4;
        for b in 0..a.blocks {
            let mut g = (a.block0 + b) * 64 / a.padded;
            for r0 in (0..16).step_by(step) {
                let (s, _) = group::<V, W_TABLE256>(a, 0, g.min(a.groups - 1));
                g += 1;
                for r in r0..r0 + step {
                    let w = V::load(a.bytes.add(b * 1024 + 64 * r));
                    for (half, pick) in pick.iter().enumerate() {
                        let u = _mm512_shuffle_epi8(w, *pick);
                        let upper = _mm512_test_epi16_mask(u, bit6);
                        macro_rules! quarters {
                            ($i:literal) => {
                                _mm512_mask_blend_epi16(
                                    upper,
                                    _mm512_permutex2var_epi16(table[$i], u, table[$i + 1]),
                                    _mm512_permutex2var_epi16(table[$i + 2], u, table[$i + 3]),
                                )
                            };
                        }
                        let v = if SIGN {
                            let sign = _mm512_and_si512(_mm512_slli_epi16::<8>(u), _mm512_set1_epi16(i16::MIN));
                            _mm512_xor_si512(quarters!(0), sign)
                        } else {
                            _mm512_mask_blend_epi16(_mm512_test_epi16_mask(u, bit7), quarters!(0), quarters!(4))
                        };
                        let v = if UNIT {
                            v
                        } else {
                            let (even, odd) = (V::from_bits(V::shl32(v, 16)), V::from_bits(V::and(v, high)));
                            round_pairs(V::mulf(even, s), V::mulf(odd, s))
                        };
                        V::store(out.add(b * 2048 + (2 * r + half) * 64), v);
                    }
                }
            }
        }
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

    #[test]
    fn words_are_the_values_rounded() {
        if !Isa::Amx.is_available() {
            return;
        }
        let any: Vec<f32> = (0..256u32).map(|i| (i.wrapping_mul(0x9E37_79B1) >> 8) as f32 / 1e5 - 80.0).collect();
        let opposite: Vec<f32> = (0..256).map(|i| if i < 128 { any[i].abs() } else { -any[i - 128].abs() }).collect();
        assert!(!is_symmetric(&any, 8) && is_symmetric(&any, 7) && is_symmetric(&opposite, 8));
        // Two blocks in groups of 32.
        let bytes: Vec<u8> = (0..2048u32).map(|i| (i.wrapping_mul(0x85EB_CA6B) >> 24) as u8).collect();
        let scales: Vec<f32> = (0..64).map(|i| i as f32 - 20.0).collect();
        for (values, symmetric) in [(&any, false), (&opposite, true), (&opposite, false)] {
            let exact: Vec<f32> = values.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
            for unit in [false, true] {
                let a = F32Args {
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
                    values: if unit { values.as_ptr() } else { exact.as_ptr() },
                    tensor: 1.0,
                    prefetch: 0,
                    x: std::ptr::null(),
                    x_stride: 0,
                    c: std::ptr::null_mut(),
                    ldc: 0,
                };
                let mut out = vec![0u16; 2048];
                // SAFETY: AMX brings AVX-512 BF16; two blocks of 1024 codes.
                unsafe { decoder(symmetric, unit)(&a, out.as_mut_ptr().cast()) };
                for (i, got) in out.iter().enumerate() {
                    // Tile row `i / 32` has two values of K for each of 16 rows.
                    let (k, n) = (i / 32 * 2 + i % 2, i / 2 % 16);
                    let s = if unit { 1.0 } else { scales[k / 32 * 16 + n] };
                    let want = exact[usize::from(bytes[k / 4 * 64 + n * 4 + k % 4])] * s;
                    assert_eq!(half::bf16::from_bits(*got), half::bf16::from_f32(want), "{i} {symmetric} {unit}");
                }
            }
        }
    }
}
