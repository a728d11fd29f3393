//! The loops of the search for trellis codes in AVX-512: the same operations on each number as in `crate::trellis`, 16 at a
//! time, with the shuffles that compilers do not find.
use crate::trellis::STATES;
use std::arch::is_x86_feature_detected as has;
use std::arch::x86_64::*;

/// The least of the costs of the states that share their low bits, and which it was.
///
/// # Panics
/// If a slice has another length than the states ask for, or the CPU has no AVX-512.
pub fn reduce(bits: u32, cost: &[f32], best: &mut [f32], back: &mut [u8]) {
    let groups = STATES >> bits;
    assert!(cost.len() == STATES && best.len() == groups && back.len() == groups && groups.is_multiple_of(64));
    assert!(has!("avx512f"));
    // SAFETY: the feature was seen, and the lengths are those of the loops.
    unsafe { reduce_avx512(bits, cost, best, back) }
}

/// The cost of every state at the number `x`.
///
/// # Panics
/// As [`reduce`].
pub fn extend(bits: u32, x: f32, numbers: &[f32; STATES], best: &[f32], next: &mut [f32]) {
    assert!(best.len() == STATES >> bits && next.len() == STATES && best.len().is_multiple_of(16));
    assert!(has!("avx512f"));
    // SAFETY: as above.
    unsafe { extend_avx512(bits, x, numbers, best, next) }
}

#[target_feature(enable = "avx512f")]
fn reduce_avx512(bits: u32, cost: &[f32], best: &mut [f32], back: &mut [u8]) {
    let mask = _mm512_set1_epi32((1 << bits) - 1);
    for m in (0..best.len()).step_by(64) {
        let mut low = [_mm512_set1_epi32(-1); 4];
        for j in 0..1usize << bits {
            let number = _mm512_set1_epi32(j as i32);
            for (v, low) in low.iter_mut().enumerate() {
                // SAFETY: there are `2^bits` times as many costs as groups, and 64 groups from `m` on.
                let c = unsafe { _mm512_loadu_si512(cost.as_ptr().add(j * best.len() + m + 16 * v).cast()) };
                // (c & !mask) | number
                *low = _mm512_min_epu32(*low, _mm512_ternarylogic_epi32::<0xBA>(c, mask, number));
            }
        }
        for (v, low) in low.iter().enumerate() {
            // SAFETY: both have 64 entries from `m` on.
            unsafe {
                let cost = _mm512_castsi512_ps(_mm512_andnot_si512(mask, *low));
                _mm512_storeu_ps(best.as_mut_ptr().add(m + 16 * v), cost);
                let which = _mm512_cvtepi32_epi8(_mm512_and_si512(*low, mask));
                _mm_storeu_si128(back.as_mut_ptr().add(m + 16 * v).cast(), which);
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn extend_avx512(bits: u32, x: f32, numbers: &[f32; STATES], best: &[f32], next: &mut [f32]) {
    let (x, lanes) = (_mm512_set1_ps(x), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    let shift = _mm_cvtsi32_si128(bits as i32);
    for m in (0..best.len()).step_by(16) {
        // SAFETY: `best` has a multiple of 16 entries.
        let before = unsafe { _mm512_loadu_ps(best.as_ptr().add(m)) };
        for part in 0..1 << bits {
            let place = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * part));
            let before = _mm512_permutexvar_ps(_mm512_srl_epi32(place, shift), before);
            let at = (m << bits) + 16 * part as usize;
            // SAFETY: 16 states from `at` on are those that come after these.
            unsafe {
                let d = _mm512_sub_ps(_mm512_loadu_ps(numbers.as_ptr().add(at)), x);
                _mm512_storeu_ps(next.as_mut_ptr().add(at), _mm512_add_ps(before, _mm512_mul_ps(d, d)));
            }
        }
    }
}
