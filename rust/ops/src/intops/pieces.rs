//! What GELU lacks to the positive part, `u Phi(-u)`, in 32 cubic pieces and 32-bit lanes.
//!
//! A piece is a power of two of input codes wide, so the top bits of a code choose the piece and the rest is the place in it,
//! `t` in `[-1/2, 1/2)` with 16 bits: nothing is multiplied to get there. Coefficients of a piece change little over it, so
//! 16 bits of them are enough, and `c1 t + c2 t^2` is one instruction that multiplies pairs of 16-bit numbers and adds. They
//! are worth steps of the output already: what is left is a shift. Three tables of 32 fit pairs of vector registers, where
//! AVX-512 permutes them; the other levels load.
use super::scale::Bump;
use crate::level::{at, Loop};
use nibblas_core::isa::Isa;

/// Pieces of one function.
const PIECES: usize = 32;
/// Input codes of 31 bits, less those that choose the piece.
const MOST: u32 = 26;

/// The pieces for a scale of the input and one of the output.
#[derive(Debug, Clone)]
pub(crate) struct Pieces {
    /// `c0`, in steps of `2^-fraction` of the output's.
    base: [i32; PIECES],
    /// `c1` in the low half, `c2` in the high one, in 2^8 of those steps.
    slope: [i32; PIECES],
    /// `c3`, the high half 0.
    bend: [i32; PIECES],
    /// A magnitude of `m` lies in piece `m >> coarse`, and `m << up` leaves its place in the piece.
    coarse: u32,
    up: u32,
    /// Larger magnitudes count as this one.
    last: u32,
    /// Fraction bits of the result, negative where its last bits are missing.
    pub fraction: i32,
}

impl Pieces {
    pub fn new(scale: f64, out: f64) -> Self {
        // The last piece is 0: whatever is larger ends there.
        let coarse = (0..MOST).find(|&c| Bump::ends_before(scale, 31 << c)).unwrap_or(MOST);
        let fraction = Bump::fraction(out);
        let mut p = Self {
            base: [0; PIECES],
            slope: [0; PIECES],
            bend: [0; PIECES],
            coarse,
            // A single code has no place in its piece, and no slopes either.
            up: 32 - coarse.max(1),
            last: (32 << coarse) - 1,
            fraction,
        };
        for i in 0..PIECES {
            let c = Bump::piece(scale, out, (i as u32) << coarse, coarse, fraction);
            p.base[i] = c[0];
            p.slope[i] = (c[1] & 0xffff) | (c[2] << 16);
            p.bend[i] = c[3] & 0xffff;
        }
        p
    }

    /// The function of the magnitudes of `x`, with [`Self::fraction`] fraction bits.
    pub fn apply(&self, isa: Isa, x: &[i32], y: &mut [i32]) {
        #[cfg(target_arch = "x86_64")]
        if isa >= Isa::Avx512 && Isa::Avx512.is_available() {
            // SAFETY: the level was just found to be available.
            return unsafe { avx512(self, x, y) };
        }
        at(isa, Each { p: self, x, y });
    }

    /// One value: what every level computes.
    #[inline(always)]
    fn value(&self, x: i32) -> i32 {
        let m = x.unsigned_abs().min(self.last);
        let i = (m >> self.coarse) as usize & (PIECES - 1);
        let t = i32::from(((m << self.up) >> 16) as u16 as i16 ^ i16::MIN);
        let square = t * t;
        let (c1, c2, c3) = (self.slope[i] as i16, self.slope[i] >> 16, self.bend[i] as i16);
        let pair = i32::from(c1) * t + c2 * (square >> 16);
        let sum = pair + i32::from(c3) * ((t * (square >> 16)) >> 16);
        (self.base[i] + (sum >> 8)).max(0)
    }
}

struct Each<'a> {
    p: &'a Pieces,
    x: &'a [i32],
    y: &'a mut [i32],
}

impl Loop for Each<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (o, &x) in self.y.iter_mut().zip(self.x) {
            *o = self.p.value(x);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn avx512(p: &Pieces, x: &[i32], y: &mut [i32]) {
    use std::arch::x86_64::*;

    const LANES: usize = 16;
    macro_rules! halves {
        ($table:expr) => {{
            let (low, high) = $table.split_at(LANES);
            // SAFETY: both halves have 16 values.
            unsafe { (_mm512_loadu_epi32(low.as_ptr()), _mm512_loadu_epi32(high.as_ptr())) }
        }};
    }
    let (base, slope, bend) = (halves!(p.base), halves!(p.slope), halves!(p.bend));
    let count = |n: u32| _mm_cvtsi32_si128(n as i32);
    let (coarse, up, last) = (count(p.coarse), count(p.up), _mm512_set1_epi32(p.last as i32));
    let (middle, high) = (_mm512_set1_epi32(0x8000), _mm512_set1_epi32(-0x1_0000));
    let (blocks, rest) = x.as_chunks::<LANES>();
    let (to, tail) = y.split_at_mut(blocks.len() * LANES);
    for (to, from) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(blocks) {
        // SAFETY: 16 values.
        let x = unsafe { _mm512_loadu_epi32(from.as_ptr()) };
        let m = _mm512_min_epu32(_mm512_abs_epi32(x), last);
        let i = _mm512_srl_epi32(m, coarse);
        let t = _mm512_xor_si512(_mm512_srli_epi32::<16>(_mm512_sll_epi32(m, up)), middle);
        let square = _mm512_madd_epi16(t, t);
        // t in the low half, its square in the high one: t | (square & high).
        let pair = _mm512_ternarylogic_epi32::<0xf8>(t, square, high);
        let cube = _mm512_srai_epi32::<16>(_mm512_madd_epi16(t, _mm512_srli_epi32::<16>(square)));
        let sum = _mm512_add_epi32(
            _mm512_madd_epi16(pair, _mm512_permutex2var_epi32(slope.0, i, slope.1)),
            _mm512_madd_epi16(cube, _mm512_permutex2var_epi32(bend.0, i, bend.1)),
        );
        let v = _mm512_add_epi32(_mm512_permutex2var_epi32(base.0, i, base.1), _mm512_srai_epi32::<8>(sum));
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_epi32(to.as_mut_ptr(), _mm512_max_epi32(v, _mm512_setzero_si512())) };
    }
    for (o, &x) in tail.iter_mut().zip(rest) {
        *o = p.value(x);
    }
}
