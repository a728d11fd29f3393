//! Products of entries (AVX-512 with VNNI and VBMI): steps are added up to places, at which `VPERMB` looks activations up.
use crate::isa::Isa;
use crate::kernel::generic::round_bf16;
use crate::kernel::simd::Simd;
use crate::kernel::x86::Avx512;
use crate::pack::{BLOCK, PANEL};
use crate::sparse::gaps::MOST_BLOCKS;
use crate::sparse::kernel::generic::{FAR, NEAR};
use crate::sparse::kernel::{GapFloat, GapFloatFn, GapRaw, GapRawFn, Pairs};
use std::arch::x86_64::*;
use std::ops::Range;

/// Whether this CPU has what the kernels need, and the level allows it.
fn serves(isa: Isa) -> bool {
    matches!(isa, Isa::Avx512Vnni | Isa::Amx)
        && std::is_x86_feature_detected!("avx512vbmi")
        && std::is_x86_feature_detected!("bmi2")
}

/// Spreads entries to bytes: see [`spread`].
pub(crate) type Spread = unsafe fn(&Pairs, Range<usize>, &[i16; PANEL], u8, *mut Bytes);

/// The kernel that spreads entries.
pub(crate) fn spreads(isa: Isa) -> Option<Spread> {
    serves(isa).then_some(spread as Spread)
}

/// The kernel of `mr` rows.
pub(crate) fn kernel(isa: Isa, mr: usize) -> Option<GapRawFn> {
    if !serves(isa) {
        return None;
    }
    match mr {
        1 => Some(raw::<1>),
        2 => Some(raw::<2>),
        4 => Some(raw::<4>),
        8 => Some(raw::<8>),
        _ => None,
    }
}

/// The float kernels of 1, 2 and 4 rows; `bf16`: weights are rounded.
pub(crate) fn float(isa: Isa, bf16: bool) -> Option<[GapFloatFn; 3]> {
    let kernels: [GapFloatFn; 3] = if bf16 {
        [floats::<true, 1>, floats::<true, 2>, floats::<true, 4>]
    } else {
        [floats::<false, 1>, floats::<false, 2>, floats::<false, 4>]
    };
    serves(isa).then_some(kernels)
}

/// Asks for pairs ahead on two levels of the cache, and for where they begin. A Zen 4, which fetches longer streams better by
/// itself, takes 1.3 times as long without (measured).
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch(src: *const u8, bases: *const u32) {
    for line in [0, 64, 128] {
        _mm_prefetch::<_MM_HINT_T0>(src.wrapping_add(line + NEAR).cast());
        _mm_prefetch::<_MM_HINT_T1>(src.wrapping_add(line + FAR).cast());
    }
    _mm_prefetch::<_MM_HINT_T0>(bases.wrapping_add(128).cast());
}

/// The steps of the first four of a pair, or of the second.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn steps(both: __m512i, four: usize) -> __m512i {
    let steps = if four == 0 { both } else { _mm512_srli_epi16::<4>(both) };
    _mm512_and_si512(steps, _mm512_set1_epi8(15))
}

/// The places that steps lead to, given where rows are, in bytes; and where they are then.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn walk(steps: __m512i, at: __m512i) -> (__m512i, __m512i) {
    let fourth = _mm512_set4_epi32(0x0f0f_0f0f, 0x0b0b_0b0b, 0x0707_0707, 0x0303_0303);
    let two = _mm512_add_epi8(steps, _mm512_slli_epi32::<8>(steps));
    let places = _mm512_add_epi8(_mm512_add_epi8(two, _mm512_slli_epi32::<16>(two)), at);
    (places, _mm512_shuffle_epi8(places, fourth))
}

/// `c = sum w*x`. Weights are signed, so activations are made unsigned, `x + 128`; 128 times the sum of a row's weights, known
/// beforehand, goes off at last.
///
/// # Safety
/// The pointers in `a` hold what [`GapRaw`] says; the CPU has these features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,bmi2")]
unsafe fn raw<const MR: usize>(a: &GapRaw) {
    // SAFETY: as the contract says.
    unsafe {
        let top = _mm512_set1_epi8(-128);
        let mut acc = [[_mm512_setzero_si512(); MR]; 2];
        // Each row begins at the place before the first. Places are counted modulo 64, as tables are laid out.
        let mut at = _mm512_set1_epi8(-1);
        let (mut src, mut bases) = (a.pairs.src, a.pairs.bases);
        for _ in 0..a.pairs.count {
            if a.rows.prefetch {
                fetch(src, bases);
            }
            let both = _mm512_loadu_si512(src.cast());
            for i in 0..2 {
                let places;
                (places, at) = walk(steps(both, i), at);
                let base = *bases.add(i) as usize;
                // A table has the activations of places 0 to 63 modulo 64: of the block that begins last, those before `base`.
                let wrapped = _bzhi_u64(u64::MAX, (base % 64) as u32);
                let next = if wrapped == 0 { 0 } else { a.rows.act.block_stride };
                let w = _mm512_loadu_si512(src.add(64 + 64 * i).cast());
                for m in 0..MR {
                    let x = a.rows.act.codes.add(base / 64 * a.rows.act.block_stride + 64 * m);
                    let table = _mm512_add_epi8(_mm512_loadu_si512(x.cast()), top);
                    let table = _mm512_mask_add_epi8(table, wrapped, _mm512_loadu_si512(x.add(next).cast()), top);
                    acc[i][m] = _mm512_dpbusd_epi32(acc[i][m], _mm512_permutexvar_epi8(places, table), w);
                }
            }
            (src, bases) = (src.add(192), bases.add(2));
        }
        let share = _mm512_slli_epi32::<7>(_mm512_loadu_si512(a.rows.sums.cast()));
        for m in 0..MR {
            let sum = _mm512_sub_epi32(_mm512_add_epi32(acc[0][m], acc[1][m]), share);
            _mm512_storeu_si512(a.rows.c.add(m * a.rows.ldc).cast(), sum);
        }
    }
}

/// `c = fma(x, w, c)` for the entries in order, `w` the float value of a code: for finite activations alone, as what is dropped
/// is left out.
///
/// # Safety
/// The pointers in `a` hold what [`GapFloat`] says; the CPU has these features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2")]
unsafe fn floats<const BF16: bool, const MR: usize>(a: &GapFloat) {
    // SAFETY: as the contract says.
    unsafe {
        let scales = _mm512_loadu_ps(a.scales);
        let mut acc = [_mm512_setzero_ps(); MR];
        for m in 0..MR {
            acc[m] = _mm512_loadu_ps(a.rows.c.add(m * a.rows.ldc));
        }
        let mut at = _mm512_set1_epi8(-1);
        let (mut src, mut bases) = (a.pairs.src, a.pairs.bases);
        for _ in 0..a.pairs.count {
            fetch(src, bases);
            let both = _mm512_loadu_si512(src.cast());
            for i in 0..2 {
                let places;
                (places, at) = walk(steps(both, i), at);
                let base = *bases.add(i) as usize;
                let places = _mm512_sub_epi8(places, _mm512_set1_epi8(base as i8));
                let codes = _mm512_loadu_si512(src.add(64 + 64 * i).cast());
                macro_rules! entries { ($($j:literal)*) => { $(
                    let lane = _mm512_srli_epi32::<{ 8 * $j }>(places);
                    let code = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<{ 24 - 8 * $j }>(codes));
                    let mut w = _mm512_mul_ps(_mm512_cvtepi32_ps(code), scales);
                    if BF16 {
                        w = round_bf16::<Avx512>(w);
                    }
                    for m in 0..MR {
                        let x = a.rows.x.offset(m as isize * a.rows.x_stride).add(base);
                        acc[m] = _mm512_fmadd_ps(Avx512::lut64(x, lane), w, acc[m]);
                    }
                )* } }
                entries!(0 1 2 3);
            }
            (src, bases) = (src.add(192), bases.add(2));
        }
        for m in 0..MR {
            _mm512_storeu_ps(a.rows.c.add(m * a.rows.ldc), acc[m]);
        }
    }
}

/// The bytes of blocks in the order of registers, and where what is nothing goes.
pub(crate) type Bytes = [u8; NOTHING as usize + 1];

/// What lies in whole lines of the cache.
#[repr(align(64))]
struct Line<T>(T);

/// Where what is nothing goes.
const NOTHING: u16 = MOST_BLOCKS as u16 * 1024;

/// Writes the entries of these blocks, each `add` more, to where they belong, from the pairs that reach them on; rows are `at`
/// beyond their first place.
///
/// # Safety
/// `pairs` are a panel's to its end, the blocks [`MOST_BLOCKS`] at most; `out` may be written, and the CPU has these features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
unsafe fn spread(pairs: &Pairs, blocks: Range<usize>, at: &[i16; PANEL], add: u8, out: *mut Bytes) {
    let nothing = _mm512_set1_epi16(NOTHING as i16);
    let (end, places) = (blocks.end * BLOCK, _mm512_set1_epi16((blocks.len() * BLOCK) as i16));
    // Four bytes a row.
    let rows = _mm512_set_epi64(
        0x001c_001c_001c_001c,
        0x0018_0018_0018_0018,
        0x0014_0014_0014_0014,
        0x0010_0010_0010_0010,
        0x000c_000c_000c_000c,
        0x0008_0008_0008_0008,
        0x0004_0004_0004_0004,
        0,
    );
    let rows = [rows, _mm512_add_epi16(rows, _mm512_set1_epi16(32))];
    let fourth = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0f0e_0f0e_0f0e_0f0e, 0x0706_0706_0706_0706));
    // Of each row the place it is at, 16 bits, four times: of rows 0 to 7, and of the others.
    let mut at = [0, 8].map(|n| {
        // SAFETY: 16 places.
        let at = unsafe { _mm_loadu_si128(at.as_ptr().add(n).cast()) };
        let at = _mm512_cvtepu16_epi64(_mm_sub_epi16(at, _mm_set1_epi16(1)));
        _mm512_shuffle_epi8(at, _mm512_broadcast_i32x4(_mm_set_epi64x(0x0908_0908_0908_0908, 0x0100_0100_0100_0100)))
    });
    let add = _mm512_set1_epi8(add as i8);
    let (mut values, mut to) = (Line([0u8; 64]), Line([0u16; 64]));
    let (mut src, mut bases) = (pairs.src, pairs.bases);
    for _ in 0..pairs.count {
        // SAFETY: a pair, buffers of 64; what is written lies below `NOTHING`, or there.
        unsafe {
            if *bases as usize >= end {
                break;
            }
            fetch(src, bases);
            let both = _mm512_loadu_si512(src.cast());
            for i in 0..2 {
                let steps = steps(both, i);
                let codes = _mm512_loadu_si512(src.add(64 + 64 * i).cast());
                let some = _mm512_test_epi8_mask(codes, codes);
                _mm512_storeu_si512(values.0.as_mut_ptr().cast(), _mm512_add_epi8(codes, add));
                let halves = [_mm512_castsi512_si256(steps), _mm512_extracti64x4_epi64::<1>(steps)];
                for (h, half) in halves.into_iter().enumerate() {
                    let steps = _mm512_cvtepu8_epi16(half);
                    let two = _mm512_add_epi16(steps, _mm512_slli_epi64::<16>(steps));
                    let four = _mm512_add_epi16(two, _mm512_slli_epi64::<32>(two));
                    let k = _mm512_add_epi16(four, at[h]);
                    at[h] = _mm512_shuffle_epi8(k, fourth);
                    let inside = _mm512_mask_cmplt_epu16_mask((some >> (32 * h)) as u32, k, places);
                    // 64 bytes for each four places, four for each row.
                    let fours = _mm512_slli_epi16::<4>(_mm512_andnot_si512(_mm512_set1_epi16(3), k));
                    let within = _mm512_and_si512(k, _mm512_set1_epi16(3));
                    let place = _mm512_add_epi16(_mm512_add_epi16(fours, within), rows[h]);
                    let place = _mm512_mask_blend_epi16(inside, nothing, place);
                    _mm512_storeu_si512(to.0.as_mut_ptr().add(32 * h).cast(), place);
                }
                // Read one by one: where the compiler takes them from registers instead, each costs the port that moves bytes across
                // lanes twice.
                for i in 0..64 {
                    let (to, v) = (to.0.as_ptr().add(i).read_volatile(), values.0.as_ptr().add(i).read_volatile());
                    *out.cast::<u8>().add(usize::from(to)) = v;
                }
            }
            (src, bases) = (src.add(192), bases.add(2));
        }
    }
}
