//! Weights of 16-bit words as floats: codes of more than a byte, places in tables of rows, and in a codebook of vectors.
use super::simd::Simd;

/// Some values of one group of a panel.
#[derive(Debug, Clone, Copy)]
pub struct Wide {
    /// Words of the first value, `[value][16]`; of vectors those of the first vector, `[vector][1 or 2][16]`, each the place of
    /// an entry in `table`, which two add up to.
    pub words: *const u16,
    /// 16 scales.
    pub scales: *const f32,
    /// Values.
    pub n: usize,
    /// What is subtracted from a code.
    pub sub: i32,
    /// Values that words are places in; of vectors entries one after the other, and two floats more.
    pub table: *const f32,
    /// Values of the first vector that come before the first one wanted.
    pub skip: usize,
    /// Words from here to the same values of the panel that comes next.
    pub next: usize,
}

/// Lines of words, two values each, that are asked for early: panels follow each other while a window of K is decoded.
#[inline(always)]
unsafe fn fetch<S: Simd>(a: &Wide, words: *const u16) {
    // SAFETY: a prefetch may name any address.
    unsafe { S::prefetch(words.wrapping_add(a.next).cast()) };
}

/// `out[k] = fl((u - sub) * s)`, `[k][16]`.
///
/// # Safety
/// The pointers in `a` hold what [`Wide`] says, `out` has 16 floats for each value; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn codes<S: Simd>(a: &Wide, out: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let (s, sub) = (S::loadf(a.scales), S::splat(a.sub));
        for k in 0..a.n {
            let words = a.words.add(16 * k);
            if k % 2 == 0 {
                fetch::<S>(a, words);
            }
            let u = S::shr32_16(S::bits(S::load_bf16(words)));
            S::storef(out.add(16 * k), S::mulf(S::cvt(S::sub(u, sub)), s));
        }
    }
}

/// `out[k] = fl(table[u] * s)`, `[k][16]`, of one table for all rows of the panel.
///
/// # Safety
/// As [`codes`].
#[inline(always)]
pub unsafe fn row_tables<S: Simd>(a: &Wide, out: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let s = S::loadf(a.scales);
        for k in 0..a.n {
            let words = a.words.add(16 * k);
            if k % 2 == 0 {
                fetch::<S>(a, words);
            }
            let u = S::shr32_16(S::bits(S::load_bf16(words)));
            S::storef(out.add(16 * k), S::mulf(S::gather(a.table, u), s));
        }
    }
}

/// The values of one vector, `V` of them, times the scales.
#[inline(always)]
unsafe fn vector<S: Simd, const V: usize, const TWO: bool>(table: *const f32, words: *const u16, s: S::F) -> [S::F; 8] {
    // SAFETY: the caller's words and table; entries are read four numbers at a time, up to two past their end.
    unsafe {
        let mut v = [s; 8];
        if V == 2 {
            let two = S::pairs(table, words);
            (v[0], v[1]) = (S::mulf(two[0], s), S::mulf(two[1], s));
            return v;
        }
        for j in (0..V).step_by(4) {
            let four = S::quads(table.add(j), words);
            let more = if TWO { S::quads(table.add(j), words.add(16)) } else { four };
            for i in 0..4 {
                v[j + i] = S::mulf(if TWO { S::addf(four[i], more[i]) } else { four[i] }, s);
            }
        }
        v
    }
}

/// `out[k] = fl(entry[k] * s)`, `[k][16]`, of vectors of `V` values; `TWO`: of sums of two entries, rounded.
///
/// # Safety
/// As [`codes`].
#[inline(always)]
pub unsafe fn vectors<S: Simd, const V: usize, const TWO: bool>(a: &Wide, out: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let s = S::loadf(a.scales);
        let (mut words, mut skip, mut k) = (a.words, a.skip, 0);
        while k < a.n {
            fetch::<S>(a, words);
            let to = out.add(16 * k);
            if skip == 0 && a.n - k >= V {
                let v = vector::<S, V, TWO>(a.table, words, s);
                for j in 0..V {
                    S::storef(to.add(16 * j), v[j]);
                }
            } else {
                let v = vector::<S, V, TWO>(a.table, words, s);
                for (j, v) in v[skip..V].iter().take(a.n - k).enumerate() {
                    S::storef(to.add(16 * j), *v);
                }
            }
            k += V - skip;
            skip = 0;
            words = words.add(if TWO { 32 } else { 16 });
        }
    }
}
