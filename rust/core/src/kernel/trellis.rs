//! Trellis codes in kernels: the states of 16 rows at a time are hashed in registers (see `crate::trellis`).
//!
//! A panel holds, for each group, the circles of bits of its 16 rows as words of 32 bits, first bits first, and in front the
//! word that comes before on the circle: `[group][1 + words][16]`.
use super::generic::scales;
use super::simd::Simd;
use super::{ActRows, ScalePtr};

/// Some groups of one panel.
#[derive(Debug, Clone, Copy)]
pub struct Trellis {
    /// Words of the first group.
    pub words: *const u32,
    /// Words of a group and row, the one in front included.
    pub stride: usize,
    /// Bits of a code.
    pub bits: usize,
    /// Factor and addend of the hash.
    pub hash: (i32, i32),
    /// Groups, and values of a group and of the last of these.
    pub groups: usize,
    /// Values of a group.
    pub len: usize,
    /// Values of the last of the groups.
    pub last: usize,
    /// Places of a group in the activations.
    pub padded: usize,
    /// Scales `[group][16]`.
    pub scales: ScalePtr,
}

/// The window that ends `over` bits before the end of word `now`; `across` has the lower half of the word before on top.
#[inline(always)]
unsafe fn window<S: Simd>(now: S::I, across: S::I, over: usize) -> S::I {
    // SAFETY: the caller's features.
    unsafe {
        let v = if over <= 16 { S::shr32(now, over) } else { S::shr32(across, over - 16) };
        S::and(v, S::splat(0xffff))
    }
}

/// Runs `$body` for the hashes `$h` of one group, four bytes a row, at places `$first + $j`, after `$start` at each new
/// `$first`. `B` of 2 stands for `mul1` at 2 bits, 16 places at a time whose shifts are constants; 0 for any other code.
/// A macro: a closure would be compiled without the features.
macro_rules! each_hash {
    ($s:ident, $b:ident, $a:ident, $words:expr, $len:ident, |$first:ident, $j:ident, $h:ident| $start:block $body:block) => {{
        let words: *const u32 = $words;
        let (mul, add) = ($s::splat($a.hash.0), $s::splat($a.hash.1));
        let high = $s::splat(1 << 16);
        let mut before = $s::load(words.cast());
        let mut $first = 0;
        for i in 1..$a.stride {
            let now = $s::load(words.add(16 * i).cast());
            let across = $s::or($s::mul(before, high), $s::shr32_16(now));
            before = now;
            if $b == 2 && $first + 16 <= $len {
                $start
                each_hash!(@ now, across, mul, $s, |$j, $h| $body, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                $first += 16;
                continue;
            }
            while $first < $len && ($first + 1) * $a.bits <= 32 * i {
                $start
                {
                    const $j: usize = 0;
                    let $h = $s::add($s::mul(window::<$s>(now, across, 32 * i - ($first + 1) * $a.bits), mul), add);
                    $body
                }
                $first += 1;
            }
        }
    }};
    (@ $now:ident, $across:ident, $mul:ident, $s:ident, |$j:ident, $h:ident| $body:block, $($i:literal),*) => { $( {
        const $j: usize = $i;
        let $h = $s::mul(window::<$s>($now, $across, 30 - 2 * $i), $mul);
        $body
    } )* };
}

/// Grouped product of the row sums `(bytes - 510) * a`: for each group in increasing k, `c = fma(sum, s, c)` with the exact
/// sum; the sums of the activations come multiplied by 510.
///
/// # Safety
/// The pointers hold what their structures say, from the first of the groups on; `c` has `MR` rows of 16 floats; the CPU has
/// the features of `S`.
#[inline(always)]
pub unsafe fn product<S: Simd, const B: usize, const MR: usize>(a: &Trellis, x: &ActRows, c: *mut f32, ldc: usize) {
    // SAFETY: as the contract says.
    unsafe {
        for g in 0..a.groups {
            let len = if g + 1 == a.groups { a.last } else { a.len };
            let mut sum = [[S::splat(0); 2]; MR];
            let mut q;
            each_hash!(S, B, a, a.words.add(g * a.stride * 16), len, |first, J, h| {
                // Groups of 16 places or more do not cross a block of 64 within 16.
                let k = g * a.padded + first;
                q = x.codes.add(k / 64 * x.block_stride + k % 64);
            } {
                for m in 0..MR {
                    let q = S::splat8(*q.add(64 * m + J) as u8);
                    sum[m][J & 1] = S::dot(sum[m][J & 1], h, q);
                }
            });
            let s = scales::<S>(a.scales, g * 16);
            for m in 0..MR {
                let d = S::sub(S::add(sum[m][0], sum[m][1]), S::splat(*x.sums.add(g * x.rows + m)));
                let c = c.add(m * ldc);
                S::storef(c, S::fma(S::cvt(d), s, S::loadf(c)));
            }
        }
    }
}

/// The weights of the groups as floats, `[k][16]`.
///
/// # Safety
/// As [`product`]; `out` has 16 floats for each value.
#[inline(always)]
pub unsafe fn expand<S: Simd, const B: usize>(a: &Trellis, out: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let (ones, zero) = (S::splat8(1), S::splat(-510));
        for g in 0..a.groups {
            let len = if g + 1 == a.groups { a.last } else { a.len };
            let s = scales::<S>(a.scales, g * 16);
            let out = out.add(g * a.len * 16);
            let mut to;
            each_hash!(S, B, a, a.words.add(g * a.stride * 16), len, |first, J, h| {
                to = out.add(first * 16);
            } {
                S::storef(to.add(J * 16), S::mulf(S::cvt(S::dot(zero, h, ones)), s));
            });
        }
    }
}
