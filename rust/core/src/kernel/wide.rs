//! Weights of 16-bit words as floats: codes of more than a byte, places in tables of rows, and in a codebook of vectors.
use super::simd::Simd;

/// Some values of one group of a panel.
#[derive(Debug, Clone, Copy)]
pub struct Wide {
    /// Words of the first value, `[value][16]`, codes less their zero; of vectors those of the first vector, `[vector][1 or 2][16]`, each the place of
    /// an entry in `table`, which two add up to.
    pub words: *const u16,
    /// 16 scales.
    pub scales: *const f32,
    /// Values.
    pub n: usize,
    /// Values that words are places in; of vectors entries one after the other, and two floats more.
    pub table: *const f32,
    /// Values of the first vector that come before the first one wanted.
    pub skip: usize,
    /// Where the second entries of vectors begin.
    pub second: usize,
    /// Words from here to the same values of the panel that comes next.
    pub next: usize,
}

/// Lines of words, two values each, that are asked for early: panels follow each other while a window of K is decoded.
#[inline(always)]
unsafe fn fetch<S: Simd>(a: &Wide, words: *const u16) {
    // SAFETY: a prefetch may name any address.
    unsafe { S::prefetch(words.wrapping_add(a.next).cast()) };
}

/// Stores two values of K that follow each other, `k` even: as floats, `[k][16]`, or `TILES`, as bfloat16 side by side.
#[inline(always)]
pub(super) unsafe fn store_two<S: Simd, const TILES: bool>(out: *mut f32, k: usize, v: [S::F; 2]) {
    // SAFETY: the caller's output has room for both.
    unsafe {
        if TILES {
            S::store(out.add(8 * k).cast(), S::round_pairs(v[0], v[1]));
        } else {
            S::storef(out.add(16 * k), v[0]);
            S::storef(out.add(16 * k + 16), v[1]);
        }
    }
}

/// `out[k] = f(words of k)`, two values at a time; one alone at the end is never one of `TILES`.
macro_rules! each_word {
    ($s:ident, $tiles:ident, $a:ident, $out:ident, |$words:ident| $value:expr) => {
        for k in (0..$a.n).step_by(2) {
            fetch::<$s>($a, $a.words.add(16 * k));
            let $words = $a.words.add(16 * k);
            let even = $value;
            if k + 1 == $a.n {
                $s::storef($out.add(16 * k), even);
                break;
            }
            let $words = $a.words.add(16 * k + 16);
            store_two::<$s, $tiles>($out, k, [even, $value]);
        }
    };
}

/// `out[k] = fl(code * s)`, `[k][16]`; `TILES`: rounded, as `amx::bf16_tiles` has it.
///
/// # Safety
/// The pointers in `a` hold what [`Wide`] says, `out` has 16 floats for each value, or the room of two bytes for each number
/// of `TILES`, which are even in number; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn codes<S: Simd, const TILES: bool>(a: &Wide, out: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let s = S::loadf(a.scales);
        each_word!(S, TILES, a, out, |words| { S::mulf(S::cvt(S::sar(S::bits(S::load_bf16(words)), 16)), s) });
    }
}

/// `out[k] = fl(table[u] * s)`, `[k][16]`, of tables of `len` values of each row, one after the other.
///
/// # Safety
/// As [`codes`].
#[inline(always)]
pub unsafe fn row_tables<S: Simd>(a: &Wide, len: usize, out: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let s = S::loadf(a.scales);
        if len == 4 {
            each_word!(S, FLOATS, a, out, |words| {
                S::mulf(S::lut64(a.table, S::shr32_16(S::bits(S::load_bf16(words)))), s)
            });
        } else {
            each_word!(S, FLOATS, a, out, |words| {
                S::mulf(S::gather(a.table, S::shr32_16(S::bits(S::load_bf16(words)))), s)
            });
        }
    }
}
/// Not tiles.
const FLOATS: bool = false;

/// There is no second codebook.
pub const ALONE: u8 = 0;
/// There is one, of 16 entries.
pub const SIXTEEN: u8 = 1;
/// There is one.
pub const MANY: u8 = 2;

/// `out[k] = fl(entry[k] * s)`, `[k][16]`, of vectors of `V` values; with a second codebook of sums of two entries, rounded.
///
/// # Safety
/// As [`codes`]; of `TILES`, values begin and end at even places of vectors.
#[inline(always)]
pub unsafe fn vectors<S: Simd, const V: usize, const SECOND: u8, const TILES: bool>(a: &Wide, out: *mut f32) {
    // SAFETY: as the contract says; entries are read four numbers at a time, up to two past their end.
    unsafe {
        let s = S::loadf(a.scales);
        // Sixteen entries fit registers, one for each of four values.
        let mut short = [s; 4];
        if SECOND == SIXTEEN {
            let at: [u16; 16] = std::array::from_fn(|i| (a.second + i * V) as u16);
            short = S::quads(a.table, at.as_ptr());
        }
        let (mut words, mut skip, mut k) = (a.words, a.skip, 0);
        while k < a.n {
            fetch::<S>(a, words);
            let mut v = [s; 8];
            if V == 2 {
                let two = S::pairs(a.table, words);
                (v[0], v[1]) = (two[0], two[1]);
            } else if V == 8 {
                v = if SECOND == ALONE {
                    S::octets::<false>(a.table, words, words)
                } else {
                    S::octets::<true>(a.table, words, words.add(16))
                };
            } else {
                for j in (0..V).step_by(4) {
                    let four = match SECOND {
                        MANY => S::quad_sums(a.table.add(j), words, words.add(16)),
                        _ => S::quads(a.table.add(j), words),
                    };
                    v[j..j + 4].copy_from_slice(&four);
                }
                if SECOND == SIXTEEN {
                    // Places are multiples of four.
                    let u = S::shr32(S::bits(S::load_bf16(words.add(16))), 18);
                    for j in 0..4 {
                        v[j] = S::addf(v[j], S::lut16(short[j], u));
                    }
                }
            }
            for v in &mut v[..V] {
                *v = S::mulf(*v, s);
            }
            if skip == 0 && a.n - k >= V {
                for j in (0..V).step_by(2) {
                    store_two::<S, TILES>(out, k + j, [v[j], v[j + 1]]);
                }
            } else {
                let rest = &v[skip..V.min(skip + a.n - k)];
                for (j, v) in rest.chunks(2).enumerate() {
                    match v {
                        [even, odd] => store_two::<S, TILES>(out, k + 2 * j, [*even, *odd]),
                        [one] => S::storef(out.add(16 * (k + 2 * j)), *one),
                        _ => {}
                    }
                }
            }
            k += V - skip;
            skip = 0;
            words = words.add(if SECOND == ALONE { 16 } else { 32 });
        }
    }
}
