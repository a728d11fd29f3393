//! Kept groups of 32 values of four bits, for one row of activations (AVX-512 VNNI).
//!
//! Each row keeps other groups, so activations are fetched 32 at a time for each row by itself, from a table. A register holds
//! two rows; the eight sums of 32 bits that a row has are added up for 16 rows at once.
//!
//! Where groups have a scale each, that is done for every slot; an entry of the table holds the 32 activations of a group and
//! what its sums begin with: codes are unsigned, and the share of their zero goes off first. Where rows have one scale it is
//! done once a panel; the entries are unsigned activations, `x + 128`, and the codes signed, in the upper halves of bytes:
//! `sum (x + 128) * 16q`, of which 128 times the sum of a row's codes, known beforehand, goes off at last.
use crate::sparse::rows::{Slots, ENTRY, PLACE, RUN};
use std::arch::x86_64::*;

// No closures here: they would be compiled without the features.

/// What a slot needs of one row of activations, [`ENTRY`] bytes for each group of 32: its codes, then eight sums of four of
/// them each, times the negative zero.
///
/// # Safety
/// `x` has `groups` groups, `table` room for as many entries; the CPU has AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn entries(x: *const i8, groups: usize, zero: u8, table: *mut u8) {
    // SAFETY: as the contract says.
    unsafe {
        let (none, zero) = (_mm256_setzero_si256(), _mm256_set1_epi8(zero as i8));
        for j in 0..groups {
            let codes = _mm256_loadu_si256(x.add(32 * j).cast());
            let share = _mm256_dpbusd_epi32(none, zero, codes);
            let to = table.add(ENTRY * j).cast::<__m256i>();
            _mm256_storeu_si256(to, codes);
            _mm256_storeu_si256(to.add(1), _mm256_sub_epi32(none, share));
        }
    }
}

/// Activations as [`raw`] takes them, 32 bytes for each group: `x + 128`.
///
/// # Safety
/// `x` has `groups` groups, `table` room for as many; the CPU has AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn unsigned(x: *const i8, groups: usize, table: *mut u8) {
    // SAFETY: as the contract says.
    unsafe {
        let top = _mm256_set1_epi8(-128);
        for j in 0..groups {
            let codes = _mm256_loadu_si256(x.add(32 * j).cast());
            _mm256_storeu_si256(table.add(32 * j).cast(), _mm256_xor_si256(codes, top));
        }
    }
}

/// Half an entry of two rows.
macro_rules! two {
    ($a:expr, $b:expr, $half:literal) => {{
        let a = _mm512_castsi256_si512(_mm256_loadu_si256($a.add($half).cast()));
        _mm512_inserti64x4::<1>(a, _mm256_loadu_si256($b.add($half).cast()))
    }};
}

/// Lanes of `a` and `b` in turns, the lower two of each 16 bytes plus the upper two.
macro_rules! pair {
    ($a:expr, $b:expr) => {
        _mm512_add_epi32(_mm512_unpacklo_epi32($a, $b), _mm512_unpackhi_epi32($a, $b))
    };
}

/// Pairs of `ab` and `cd` in turns, the lower one of each 16 bytes plus the upper one.
macro_rules! four {
    ($ab:expr, $cd:expr) => {{
        let (ab, cd) = ($ab, $cd);
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
    }};
}

/// Where the table's entries of `size` bytes are for rows `r`, `r + 4`, `r + 1` and `r + 5` of a slot, whose codes share
/// bytes.
macro_rules! places {
    ($index:expr, $table:expr, $size:expr, $r:literal) => {
        // Volatile, lest they be fetched as a vector and taken apart, which costs twice what it saves.
        [
            $table.add(usize::from($index.add($r).read_volatile()) * ($size / PLACE)),
            $table.add(usize::from($index.add($r + 4).read_volatile()) * ($size / PLACE)),
            $table.add(usize::from($index.add($r + 1).read_volatile()) * ($size / PLACE)),
            $table.add(usize::from($index.add($r + 5).read_volatile()) * ($size / PLACE)),
        ]
    };
}

/// The sums of rows `r` and `r + 4` of a slot, and of `r + 1` and `r + 5`.
macro_rules! rows {
    ($codes:expr, $index:expr, $table:expr, $low:expr, $r:literal) => {{
        let at = places!($index, $table, ENTRY, $r);
        let u = _mm512_loadu_si512($codes.cast());
        let (u0, u1) = (_mm512_and_si512(u, $low), _mm512_and_si512(_mm512_srli_epi16::<4>(u), $low));
        (
            _mm512_dpbusd_epi32(two!(at[0], at[1], 32), u0, two!(at[0], at[1], 0)),
            _mm512_dpbusd_epi32(two!(at[2], at[3], 32), u1, two!(at[2], at[3], 0)),
        )
    }};
}

/// The sums of rows that eight registers hold two by two: lane `i` is row `i`.
macro_rules! tree {
    ($s:expr) => {{
        let s = $s;
        let first = four!(pair!(s[0].0, s[0].1), pair!(s[1].0, s[1].1));
        let second = four!(pair!(s[2].0, s[2].1), pair!(s[3].0, s[3].1));
        // 16 bytes of sums of four rows, twice for rows 0 to 3, then twice for rows 4 to 7.
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(first, second), _mm512_shuffle_i32x4::<0xdd>(first, second));
        _mm512_add_epi32(even, odd)
    }};
}

/// Asks for the codes and the indices of a later slot: what the hardware fetches by itself comes too late.
macro_rules! fetch {
    ($s:expr, $slot:expr, $level:ident) => {
        for line in (0..256).step_by(64) {
            _mm_prefetch::<$level>($s.codes.wrapping_add(256 * $slot + line).cast());
        }
        _mm_prefetch::<$level>($s.index.wrapping_add(16 * $slot).cast());
    };
}

/// How many slots ahead of the one in use memory is asked for.
const NEAR: usize = 8;
/// And as far as the second-level cache, where a panel's slots are read one after the other: without it, and the first level asked
/// 32 ahead, groups take 1.1 times as long on a Xeon and 1.2 times on a Zen 4 (measured).
const FAR: usize = 64;

/// Groups with a scale each: `c = fma(f32(sum), scale, c)` for the kept groups of each row in order.
///
/// # Safety
/// `s` describes whole slots, `table` has the entries of every group, `c` 16 floats; the CPU has AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn grouped(s: &Slots, table: *const u8, c: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let low = _mm512_set1_epi8(15);
        let mut f = _mm512_setzero_ps();
        for i in 0..s.count {
            fetch!(s, i + NEAR, _MM_HINT_T0);
            _mm_prefetch::<_MM_HINT_T0>(s.scales.wrapping_add(16 * (i + NEAR)).cast());
            fetch!(s, i + FAR, _MM_HINT_T1);
            _mm_prefetch::<_MM_HINT_T1>(s.scales.wrapping_add(16 * (i + FAR)).cast());
            let (codes, index) = (s.codes.add(256 * i), s.index.add(16 * i));
            let d = tree!([
                rows!(codes, index, table, low, 0),
                rows!(codes.add(64), index, table, low, 2),
                rows!(codes.add(128), index, table, low, 8),
                rows!(codes.add(192), index, table, low, 10),
            ]);
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(s.scales.add(16 * i).cast()));
            f = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), scale, f);
        }
        _mm512_storeu_ps(c, f);
    }
}

/// Rows with one scale: `c += sum`, where `128 * sums` of a row are in it once too often. `STREAMS`: from how many places at once
/// slots are read, since sums of integers have no order. Four are 1.2 times as fast as one from the memory of a Xeon, and two
/// little more than half as fast on a Zen 4 (both measured).
///
/// # Safety
/// `s` describes whole slots of a row of at most 65536 places, `table` has the [`unsigned`] activations of every group, `sums`
/// and `c` 16 numbers; the CPU has AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn raw<const STREAMS: usize>(s: &Slots, table: *const u8, sums: *const i32, c: *mut i32) {
    // SAFETY: as the contract says.
    unsafe {
        let (top, upper) = (_mm512_set1_epi8(-128), _mm512_set1_epi8(-16));
        let mut acc = [(_mm512_setzero_si512(), _mm512_setzero_si512()); 4];
        macro_rules! slot {
            ($i:expr) => {
                let (codes, index) = (s.codes.add(256 * $i), s.index.add(16 * $i));
                slot!(codes, index, 0, 0);
                slot!(codes, index, 1, 2);
                slot!(codes, index, 2, 8);
                slot!(codes, index, 3, 10);
            };
            ($codes:ident, $index:ident, $t:literal, $r:literal) => {
                let at = places!($index, table, RUN, $r);
                let u = _mm512_loadu_si512($codes.add(64 * $t).cast());
                // (u ^ top) & upper: the code as a signed number, times 16.
                let low = _mm512_ternarylogic_epi32::<0x28>(_mm512_slli_epi16::<4>(u), top, upper);
                let high = _mm512_ternarylogic_epi32::<0x28>(u, top, upper);
                acc[$t].0 = _mm512_dpbusd_epi32(acc[$t].0, two!(at[0], at[1], 0), low);
                acc[$t].1 = _mm512_dpbusd_epi32(acc[$t].1, two!(at[2], at[3], 0), high);
            };
        }
        let part = s.count / STREAMS;
        for i in 0..part {
            // At its end a stream goes on in the next panel, past the parts of the others.
            let next = i + NEAR + if i + NEAR < part { 0 } else { (STREAMS - 1) * part };
            if STREAMS == 1 {
                fetch!(s, i + FAR, _MM_HINT_T1);
            }
            for stream in 0..STREAMS {
                fetch!(s, next + stream * part, _MM_HINT_T0);
                slot!(i + stream * part);
            }
        }
        for i in STREAMS * part..s.count {
            slot!(i);
        }
        let share = _mm512_slli_epi32::<7>(_mm512_loadu_si512(sums.cast()));
        let d = _mm512_sub_epi32(_mm512_srai_epi32::<4>(tree!(acc)), share);
        _mm512_storeu_si512(c.cast(), _mm512_add_epi32(_mm512_loadu_si512(c.cast()), d));
    }
}
