//! Trellis codes in kernels: the states of 16 rows at a time are hashed in registers (see `crate::trellis`).
//!
//! A group is decoded from its start and from its middle at once: a lane of 32 bits is a row, its low half belongs to the
//! first half of the group and its high half to the second, so that one multiplication of 16-bit lanes serves two weights.
//! A panel holds, for each group, the bits of both halves as *chunks* of 16, first bits on top, and in front the 16 bits that
//! come before on the circle: `[group][1 + chunks][16 rows]`. The state of weight `j` of a half is the 16 bits from bit
//! `(j + 1)*b` of its chunks on. States of `hyb` are worth two weights; they count in the place of weights here, and their bits.
use super::generic::scales;
use super::simd::Simd;
use super::wide::store_two;
use super::ScalePtr;
use crate::trellis::{hyb, Code};

/// Some groups of one panel.
#[derive(Debug, Clone, Copy)]
pub struct Trellis {
    /// Chunks of the first group.
    pub chunks: *const u32,
    /// Chunks of a group and row, the one in front included.
    pub stride: usize,
    /// Bits that a state has more than the one before.
    pub bits: usize,
    /// Groups, and values of a group and of the last of these.
    pub groups: usize,
    /// Values of a group.
    pub len: usize,
    /// Values of the last of the groups.
    pub last: usize,
    /// Scales `[group][16]`.
    pub scales: ScalePtr,
}

impl Trellis {
    /// The values of group `g`, its states, and those of them in its first half.
    #[inline(always)]
    fn lens(&self, g: usize, each: usize) -> (usize, usize, usize) {
        let len = if g + 1 == self.groups { self.last } else { self.len };
        let states = len.div_ceil(each);
        (len, states, states.div_ceil(2))
    }
}

/// Activations of some rows, in the order of the weights.
#[derive(Debug, Clone, Copy)]
pub struct Pairs {
    /// `[group][place in a half][dwords of a place][rows]`: the codes `a` of the first and `b` of the second half as the bytes
    /// `a a b b`, or as the dwords `a a a a` and `b b b b` (see [`dwords`]).
    pub codes: *const i32,
    /// 510 times the sums of the groups, `[group][rows]`.
    pub sums: *const i32,
    /// Rows that sums lie apart.
    pub rows: usize,
}

/// Hashes of [`Code`] as constants.
pub const MUL1: u8 = 0;
/// See [`MUL1`].
pub const MAD1: u8 = 1;
/// See [`MUL1`].
pub const INST3: u8 = 2;
/// See [`MUL1`].
pub const HYB: u8 = 3;

/// The constant of a hash.
pub const fn hash(code: Code) -> u8 {
    match code {
        Code::Mul1 => MUL1,
        Code::Mad1 => MAD1,
        Code::Inst3 => INST3,
        Code::Hyb => HYB,
    }
}

/// Weights that a state is worth.
const fn weights(hash: u8) -> usize {
    if hash == HYB {
        2
    } else {
        1
    }
}

/// Dwords of activations that two weights meet.
pub const fn dwords(hash: u8) -> usize {
    if hash == MUL1 {
        1
    } else {
        2
    }
}

/// The 16 bits from bit `at` of the chunks on, for both halves.
#[inline(always)]
unsafe fn window<S: Simd>(chunks: *const u32, at: usize) -> S::I {
    // SAFETY: the caller's chunks reach that far.
    unsafe {
        let (chunk, over) = (chunks.add(at / 16 * 16), at % 16);
        let now = S::load(chunk.cast());
        if over == 0 {
            return now;
        }
        S::funnel16(now, S::load(chunk.add(16).cast()), over)
    }
}

/// The hashes of two states in each lane. `mul1`, without an addend, in lanes of 16 bits: the low halves of both products,
/// then the high ones; else the product of the low state, then that of the high one.
#[inline(always)]
unsafe fn hashes<S: Simd, const HASH: u8>(states: S::I) -> [S::I; 2] {
    // SAFETY: the caller's features.
    unsafe {
        let (mul, add) = match HASH {
            MUL1 => (0x83DC_D12D_u32, 0),
            MAD1 => (34_038_481, 76_625_530),
            _ => (89_226_354, 64_248_484),
        };
        if HASH == MUL1 {
            let (low, high) = (S::splat(((mul & 0xffff) * 0x1_0001) as i32), S::splat(((mul >> 16) * 0x1_0001) as i32));
            return [S::mul16(states, low), S::add16(S::mulhi16(states, low), S::mul16(states, high))];
        }
        let (mul, add) = (S::splat(mul as i32), S::splat(add));
        let (low, high) = (S::and(states, S::splat(0xffff)), S::shr32_16(states));
        [S::add(S::mul(low, mul), add), S::add(S::mul(high, mul), add)]
    }
}

/// The bytes of hashes that belong to the low and to the high state, as factors 1.
#[inline(always)]
unsafe fn own<S: Simd, const HASH: u8>() -> [S::I; 2] {
    // SAFETY: the caller's features.
    unsafe {
        if HASH == MUL1 {
            [S::splat(0x0101), S::splat(0x0101_0000)]
        } else {
            [S::splat8(1); 2]
        }
    }
}

/// The number of `3inst`: of both halves of its hash sign, mantissa and two bits of the exponent are kept, some of them
/// flipped, and make numbers of binary16 from 1/8 to 2, which are added and rounded in binary16.
#[inline(always)]
unsafe fn inst3<S: Simd>(hash: S::I) -> S::F {
    // SAFETY: the caller's features.
    unsafe {
        // The flips of 0x3B60 where binary32 has these bits, under the upper bits of an exponent from -3 to 0.
        let (own, flips) = (S::splat(0x81ff_e000_u32 as i32), S::splat((0x3B60 & 0x0fff) << 13 | (127 - 3) << 23));
        let (high, low) = (S::sar(hash, 3), S::sar(S::shl32(hash, 16), 3));
        let (high, low) = (S::xor(S::and(high, own), flips), S::xor(S::and(low, own), flips));
        // Both are multiples of 2^-13 below 2: their sum is exact, and 0 or a normal number of binary16.
        let sum = S::bits(S::addf(S::from_bits(high), S::from_bits(low)));
        let odd = S::and(S::shr32(sum, 13), S::splat(1));
        let even = S::add(sum, S::add(odd, S::splat(0xfff)));
        S::from_bits(S::and(even, S::splat(!0x1fff)))
    }
}

/// Both weights of `hyb` for the states in the low and in the high halves of lanes: an entry of the table, and a bit that flips
/// the sign of the first.
#[inline(always)]
unsafe fn hybrid<S: Simd>(states: S::I) -> [[S::F; 2]; 2] {
    // SAFETY: the caller's features; places are below 512.
    unsafe {
        let hash = S::mul16(states, S::add16(states, S::splat(0x1_0001)));
        let (sign, upper) = (S::splat(i32::MIN), S::splat(-0x1_0000));
        macro_rules! entry {
            ($hash:expr, $shift:literal) => {{
                let word =
                    S::bits(S::gather(hyb::TABLE.as_ptr().cast(), S::and(S::shr32(hash, $shift), S::splat(511))));
                let first = S::xor(S::shl32(word, 16), S::and($hash, sign));
                [S::from_bits(first), S::from_bits(S::and(word, upper))]
            }};
        }
        [entry!(S::shl32(hash, 16), 6), entry!(hash, 22)]
    }
}

/// Runs `$body` for each place `$j` of a half of `$half` states with the two states of each row; `$odd` is whether the place is
/// odd. Of codes of `B` bits, if that is not 0, 16 at a time have constant shifts; they are `B` chunks. A macro: a closure
/// would be compiled without the features.
macro_rules! each_pair {
    ($s:ident, $b:ident, $chunks:expr, $bits:expr, $half:expr, |$j:ident, $odd:ident, $states:ident| $body:block) => {{
        let (mut chunks, mut first): (*const u32, usize) = ($chunks, 0);
        while $b > 0 && first + 16 <= $half {
            each_pair!(@ $s, $b, chunks, first, |$j, $odd, $states| $body, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            chunks = chunks.add(16 * $b);
            first += 16;
        }
        for i in 0..$half - first {
            let ($j, $odd) = (first + i, i % 2 == 1);
            let $states = window::<$s>(chunks, (i + 1) * $bits);
            $body
        }
    }};
    (@ $s:ident, $b:ident, $chunks:ident, $first:ident, |$j:ident, $odd:ident, $states:ident| $body:block, $($i:literal),*) => { $( {
        let ($j, $odd) = ($first + $i, $i % 2 == 1);
        let $states = window::<$s>($chunks, ($i + 1) * $b);
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
pub unsafe fn product<S: Simd, const B: usize, const HASH: u8, const MR: usize>(
    a: &Trellis,
    x: &Pairs,
    c: *mut f32,
    ldc: usize,
) {
    // SAFETY: as the contract says.
    unsafe {
        let each = const { dwords(HASH) };
        let mut codes = x.codes;
        for g in 0..a.groups {
            let (_, _, half) = a.lens(g, 1);
            // More chains of sums than one row needs to hide the latency of the dot product.
            let mut sum = [[S::splat(0); 4]; MR];
            each_pair!(S, B, a.chunks.add(g * a.stride * 16), a.bits, half, |j, odd, states| {
                let h = hashes::<S, HASH>(states);
                for m in 0..MR {
                    let q = codes.add(j * each * MR + m);
                    let chain = 2 * usize::from(odd);
                    sum[m][chain] = S::dot(sum[m][chain], h[0], S::splat(*q));
                    sum[m][chain + 1] = S::dot(sum[m][chain + 1], h[1], S::splat(*q.add((each - 1) * MR)));
                }
            });
            codes = codes.add(a.len.div_ceil(2) * each * MR);
            let s = scales::<S>(a.scales, g * 16);
            for m in 0..MR {
                let d = S::add(S::add(sum[m][0], sum[m][1]), S::add(sum[m][2], sum[m][3]));
                let d = S::sub(d, S::splat(*x.sums.add(g * x.rows + m)));
                let c = c.add(m * ldc);
                S::storef(c, S::fma(S::cvt(d), s, S::loadf(c)));
            }
        }
    }
}

/// The numbers of two states in each lane, of hashes of one weight.
#[inline(always)]
unsafe fn numbers<S: Simd, const HASH: u8>(states: S::I) -> [S::F; 2] {
    // SAFETY: the caller's features.
    unsafe {
        if HASH == INST3 {
            if let Some(quick) = S::three_inst(states) {
                return quick;
            }
        }
        let (own, zero, h) = (own::<S, HASH>(), S::splat(-510), hashes::<S, HASH>(states));
        match HASH {
            MUL1 => [
                S::cvt(S::dot(S::dot(zero, h[0], own[0]), h[1], own[0])),
                S::cvt(S::dot(S::dot(zero, h[0], own[1]), h[1], own[1])),
            ],
            MAD1 => [S::cvt(S::dot(zero, h[0], own[0])), S::cvt(S::dot(zero, h[1], own[1]))],
            _ => [inst3::<S>(h[0]), inst3::<S>(h[1])],
        }
    }
}

/// The weights of the groups as floats, `[k][16]`; `TILES`: rounded, as `amx::bf16_tiles` has it, where groups are multiples of
/// four.
///
/// # Safety
/// As [`product`]; `out` has 16 floats for each value, or the room of two bytes for each number of `TILES`.
#[inline(always)]
pub unsafe fn expand<S: Simd, const B: usize, const HASH: u8, const TILES: bool>(a: &Trellis, out: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let each = const { weights(HASH) };
        for g in 0..a.groups {
            let (len, count, half) = a.lens(g, each);
            let s = scales::<S>(a.scales, g * 16);
            let to = [g * a.len, g * a.len + half * each];
            let end = g * a.len + len;
            let mut kept = [s; 2];
            each_pair!(S, B, a.chunks.add(g * a.stride * 16), a.bits, half, |j, odd, states| {
                if HASH == HYB {
                    for (i, v) in hybrid::<S>(states).into_iter().enumerate() {
                        // The second half of an odd number is shorter, and so may be the last state.
                        if i == 1 && half + j == count {
                            break;
                        }
                        let (k, first, second) = (to[i] + 2 * j, S::mulf(v[0], s), S::mulf(v[1], s));
                        if TILES || k + 1 < end {
                            store_two::<S, TILES>(out, k, [first, second]);
                        } else {
                            S::storef(out.add(k * 16), first);
                        }
                    }
                } else {
                    let v = numbers::<S, HASH>(states);
                    for i in 0..2 {
                        if i == 1 && half + j == count {
                            break;
                        }
                        let v = S::mulf(v[i], s);
                        if !TILES {
                            S::storef(out.add((to[i] + j) * 16), v);
                        } else if odd {
                            store_two::<S, true>(out, to[i] + j - 1, [kept[i], v]);
                        } else {
                            kept[i] = v;
                        }
                    }
                }
            });
        }
    }
}
