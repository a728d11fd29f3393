//! Vector kernels of CPUs with tiles, and weights that are decoded to bf16 tiles without floats in between: trellis codes, codes of
//! more than a byte, tables of rows, vectors.
use super::avx512::Avx512Tiles as V;
use super::AVX512VNNI;
use crate::kernel::generic::{self, Unpack, H6, T6};
use crate::kernel::simd::Simd;
use crate::kernel::trellis::{self, Pairs, Trellis, HYB, INST3, MAD1, MUL1};
use crate::kernel::wide::{self, Wide, ALONE, MANY, SIXTEEN};
use crate::kernel::{GroupedFn, Grp, Kernels, Raw, RawFn, TrellisFloatsFn, TrellisFn, WideFn};
use std::arch::x86_64::*;

/// Instantiates generic kernels with the features of these CPUs.
macro_rules! entries {
    ($($(#[$doc:meta])* $name:ident[$($generic:tt)*]($($a:ident: $ty:ty),*) = $e:expr;)*) => { $(
        $(#[$doc])*
        ///
        /// # Safety
        /// As the generic kernel; the CPU has tiles.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,f16c")]
        pub unsafe fn $name<$($generic)*>($($a: $ty),*) {
            // SAFETY: as the contract says.
            unsafe { $e }
        }
    )* };
}
entries! {
    /// See [`generic::look_up_all`].
    look_up[](bytes: *mut u8, n: usize, table: *const u8, sub: u8, small: bool) = generic::look_up_all::<V>(bytes, n, table, sub, small);
    /// See [`generic::look_up_halves`].
    look_up_halves[](codes: *const u8, out: *mut u8, n: usize, table: *const u8, sub: u8) =
        generic::look_up_halves::<V>(codes, out, n, table, sub);
    /// See [`generic::grouped`].
    grouped[U: Unpack, const SEG: usize, const NP: usize, const MR: usize, const PARTS: usize](a: &Grp) =
        generic::grouped::<V, U, false, false, SEG, NP, MR, PARTS>(a);
    /// See [`generic::raw`].
    raw[U: Unpack, const NP: usize, const MR: usize, const PARTS: usize](a: &Raw) = generic::raw::<V, U, NP, MR, PARTS>(a);
    /// See [`trellis::product`].
    product[const B: usize, const HASH: u8, const MR: usize](a: &Trellis, x: &Pairs, c: *mut f32, ldc: usize) =
        trellis::product::<V, B, HASH, MR>(a, x, c, ldc);
    /// See [`trellis::expand`].
    values[const B: usize, const HASH: u8, const TILES: bool](a: &Trellis, out: *mut f32) =
        trellis::expand::<V, B, HASH, TILES>(a, out);
    /// See [`wide::codes`].
    codes[](a: &Wide, out: *mut f32) = wide::codes::<V, true>(a, out);
    /// See [`wide::vectors`].
    vector_values[const LEN: usize, const SECOND: u8](a: &Wide, out: *mut f32) =
        wide::vectors::<V, LEN, SECOND, true>(a, out);
}

/// The kernels of AVX-512 with VNNI, some of them with what these CPUs have besides: a table of 64 bytes in one register, and
/// windows of two registers.
pub const KERNELS: Kernels = Kernels {
    look_up,
    look_up_halves,
    grouped_table,
    raw_table,
    trellis: trellis_product,
    trellis_expand: trellis_values::<false>,
    ..AVX512VNNI
};

fn grouped_table(bits: usize, seg: usize, mr: usize) -> Option<(GroupedFn, usize)> {
    Some(match (bits, seg, mr) {
        (6, 16, 1) => (grouped::<T6, 16, 4, 1, 2>, 4),
        (6, 16, 2) => (grouped::<T6, 16, 2, 2, 2>, 2),
        (6, 16, 4) => (grouped::<T6, 16, 1, 4, 2>, 1),
        (6, 8, 1) => (grouped::<T6, 8, 4, 1, 2>, 4),
        (6, 8, 2) => (grouped::<T6, 8, 2, 2, 2>, 2),
        (6, 8, 4) => (grouped::<T6, 8, 1, 4, 2>, 1),
        (12, 16, 1) => (grouped::<H6, 16, 2, 1, 4>, 2),
        (12, 16, 2) => (grouped::<H6, 16, 1, 2, 4>, 1),
        (12, 16, 4) => (grouped::<H6, 16, 1, 4, 4>, 1),
        (12, 8, 1) => (grouped::<H6, 8, 2, 1, 4>, 2),
        (12, 8, 2) => (grouped::<H6, 8, 1, 2, 4>, 1),
        (12, 8, 4) => (grouped::<H6, 8, 1, 4, 4>, 1),
        _ => return (AVX512VNNI.grouped_table)(bits, seg, mr),
    })
}

fn raw_table(bits: usize, mr: usize) -> Option<(RawFn, usize)> {
    Some(match (bits, mr) {
        (6, 1) => (raw::<T6, 4, 1, 2>, 4),
        (6, 2) => (raw::<T6, 2, 2, 2>, 2),
        (6, 4) => (raw::<T6, 1, 4, 2>, 1),
        (12, 1) => (raw::<H6, 2, 1, 4>, 2),
        (12, 2) => (raw::<H6, 1, 2, 4>, 1),
        (12, 4) => (raw::<H6, 1, 4, 4>, 1),
        _ => return (AVX512VNNI.raw_table)(bits, mr),
    })
}

fn trellis_product(bits: usize, hash: u8, rows: usize) -> (TrellisFn, usize) {
    macro_rules! rows {
        ($b:literal, $hash:ident) => {
            if rows == 1 {
                (product::<$b, $hash, 1> as TrellisFn, 1)
            } else {
                (product::<$b, $hash, 4>, 4)
            }
        };
    }
    match (hash, bits) {
        (MUL1, 1) => rows!(1, MUL1),
        (MUL1, 2) => rows!(2, MUL1),
        (MUL1, 3) => rows!(3, MUL1),
        (MUL1, 4) => rows!(4, MUL1),
        (MAD1, 2) => rows!(2, MAD1),
        _ => (AVX512VNNI.trellis)(bits, hash, rows),
    }
}

/// The values of trellis codes, of whole groups, `TILES` of multiples of four, by (bits, hash).
pub fn trellis_values<const TILES: bool>(bits: usize, hash: u8) -> TrellisFloatsFn {
    match (hash, bits) {
        (MUL1, 1) => values::<1, MUL1, TILES>,
        (MUL1, 2) => values::<2, MUL1, TILES>,
        (MUL1, 3) => values::<3, MUL1, TILES>,
        (MUL1, 4) => values::<4, MUL1, TILES>,
        (MUL1, _) => values::<0, MUL1, TILES>,
        (MAD1, _) => values::<2, MAD1, TILES>,
        (INST3, _) => values::<2, INST3, TILES>,
        (HYB, 4) => values::<4, HYB, TILES>,
        (HYB, 6) => values::<6, HYB, TILES>,
        _ => values::<8, HYB, TILES>,
    }
}

/// The values of vectors by (length, entries of the second codebook).
pub fn vectors(len: usize, second: usize) -> WideFn {
    match (len, second) {
        (2, _) => vector_values::<2, ALONE>,
        (4, 0) => vector_values::<4, ALONE>,
        (4, 16) => vector_values::<4, SIXTEEN>,
        (4, _) => vector_values::<4, MANY>,
        (6, _) => vector_values::<6, ALONE>,
        (_, 0) => vector_values::<8, ALONE>,
        _ => vector_values::<8, MANY>,
    }
}

/// Values of tables of rows. The tables of a panel times the scales, rounded, are `R` registers of 32 words; codes of two values
/// of K are looked up at once.
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,f16c"
)]
unsafe fn tables<const R: usize>(a: &Wide, out: *mut u8) {
    // SAFETY: the pointers hold what `Wide` says; tables have `2*R` values for each row.
    unsafe {
        let (scales, places) = (_mm512_loadu_ps(a.scales), std::array::from_fn::<i32, 16, _>(|i| i as i32));
        let places = _mm512_loadu_si512(places.as_ptr().cast());
        let len = _mm_cvtsi32_si128(R.trailing_zeros() as i32 + 1);
        let mut table = [_mm512_setzero_si512(); R];
        for (r, t) in table.iter_mut().enumerate() {
            let mut half = [scales; 2];
            for (h, v) in half.iter_mut().enumerate() {
                let at = 32 * r + 16 * h;
                let row = _mm512_srl_epi32(_mm512_add_epi32(places, _mm512_set1_epi32(at as i32)), len);
                *v = _mm512_mul_ps(_mm512_loadu_ps(a.table.add(at)), _mm512_permutexvar_ps(row, scales));
            }
            *t = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(half[1], half[0]));
        }
        let order: [u32; 16] = std::array::from_fn(|n| n as u32 | (n as u32 + 16) << 16);
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        for k in (0..a.n).step_by(2) {
            let words = a.words.add(16 * k);
            V::prefetch(words.wrapping_add(a.next).cast());
            let u = _mm512_loadu_si512(words.cast());
            macro_rules! pair {
                ($i:expr) => {
                    _mm512_permutex2var_epi16(table[$i % R], u, table[($i + 1) % R])
                };
            }
            macro_rules! half {
                ($i:literal) => {
                    _mm512_mask_blend_epi16(_mm512_test_epi16_mask(u, _mm512_set1_epi16(64)), pair!($i), pair!($i + 2))
                };
            }
            let v = match R {
                2 => pair!(0),
                4 => half!(0),
                _ => _mm512_mask_blend_epi16(_mm512_test_epi16_mask(u, _mm512_set1_epi16(128)), half!(0), half!(4)),
            };
            _mm512_storeu_si512(out.add(32 * k).cast(), _mm512_permutexvar_epi16(order, v));
        }
    }
}

/// The decoder of tables of rows of so many values, for an even number of values of K.
pub fn row_tables(len: usize) -> unsafe fn(&Wide, *mut u8) {
    match len {
        4 => tables::<2>,
        8 => tables::<4>,
        _ => tables::<8>,
    }
}
