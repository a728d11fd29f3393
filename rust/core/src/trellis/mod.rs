//! Trellis codes: each weight has `b` bits of its own and shares 16 with its neighbours (see `README.md`).
pub mod hyb;
mod viterbi;

pub use viterbi::Search;

use std::sync::LazyLock;

/// Bits of a state.
pub const WINDOW: u32 = 16;
/// Number of states.
pub const STATES: usize = 1 << WINDOW;
/// Weights of a tile: one circular string of bits.
pub const TILE: usize = 256;

/// How a state becomes a number: a hash that looks normally distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// The sum of the four bytes of `0x83DC_D12D * state`, less 510.
    Mul1,
    /// The sum of the four bytes of `34038481 * state + 76625530`, less 510.
    Mad1,
    /// Two float16 numbers made of the bits of `89226354 * state + 64248484`, added in float16.
    Inst3,
    /// Two weights: an entry of a table of 512 pairs by nine bits of `state^2 + state`, of which bit 15 flips the first.
    Hyb,
}

impl Code {
    /// Weights that a state is worth.
    pub const fn weights(self) -> usize {
        match self {
            Self::Hyb => 2,
            _ => 1,
        }
    }

    /// The number of a state, the first of two.
    pub fn number(self, state: u16) -> f32 {
        let x = u32::from(state);
        let sum = |y: u32| y.to_le_bytes().iter().map(|&b| i32::from(b)).sum::<i32>();
        match self {
            Self::Mul1 => (sum(x.wrapping_mul(0x83DC_D12D)) - 510) as f32,
            Self::Mad1 => (sum(x.wrapping_mul(34_038_481).wrapping_add(76_625_530)) - 510) as f32,
            Self::Inst3 => {
                let y = x.wrapping_mul(89_226_354).wrapping_add(64_248_484);
                let z = (y & 0x8FFF_8FFF) ^ 0x3B60_3B60;
                let half = |bits: u32| half::f16::from_bits(bits as u16).to_f32();
                half::f16::from_f32(half(z >> 16) + half(z)).to_f32()
            }
            Self::Hyb => hyb::pair(state)[0],
        }
    }

    /// The numbers of all states, the first of two.
    pub fn numbers(self) -> &'static [f32; STATES] {
        fn table(code: Code) -> Box<[f32; STATES]> {
            let all: Vec<f32> = (0..=u16::MAX).map(|s| code.number(s)).collect();
            all.try_into().unwrap_or_else(|_| unreachable!("as many numbers as states"))
        }
        static MUL1: LazyLock<Box<[f32; STATES]>> = LazyLock::new(|| table(Code::Mul1));
        static MAD1: LazyLock<Box<[f32; STATES]>> = LazyLock::new(|| table(Code::Mad1));
        static INST3: LazyLock<Box<[f32; STATES]>> = LazyLock::new(|| table(Code::Inst3));
        static HYB: LazyLock<Box<[f32; STATES]>> = LazyLock::new(|| table(Code::Hyb));
        match self {
            Self::Mul1 => &MUL1,
            Self::Mad1 => &MAD1,
            Self::Inst3 => &INST3,
            Self::Hyb => &HYB,
        }
    }

    /// The second numbers of all states, of codes whose states are worth two weights.
    pub fn seconds(self) -> Option<&'static [f32; STATES]> {
        static HYB: LazyLock<Box<[f32; STATES]>> = LazyLock::new(|| {
            let all: Vec<f32> = (0..=u16::MAX).map(|s| hyb::pair(s)[1]).collect();
            all.try_into().unwrap_or_else(|_| unreachable!("as many numbers as states"))
        });
        (self == Self::Hyb).then(|| &**HYB)
    }

    /// Root mean square of the numbers.
    pub fn rms(self) -> f32 {
        let both = self.numbers().iter().chain(self.seconds().into_iter().flatten());
        let square: f64 = both.map(|&v| f64::from(v) * f64::from(v)).sum();
        (square / (self.weights() * STATES) as f64).sqrt() as f32
    }

    /// Calls `f(t, number)` for each of a tile's codes.
    pub fn decode(self, bits: u32, codes: &[u8], mut f: impl FnMut(usize, f32)) {
        let numbers = self.numbers();
        let Some(seconds) = self.seconds() else {
            return states(bits, codes, |t, state| f(t, numbers[usize::from(state)]));
        };
        let mut joined = [0; TILE / 2];
        let joined = &mut joined[..codes.len().div_ceil(2)];
        join(bits, codes, joined);
        states(2 * bits, joined, |t, state| {
            f(2 * t, numbers[usize::from(state)]);
            if 2 * t + 1 < codes.len() {
                f(2 * t + 1, seconds[usize::from(state)]);
            }
        });
    }
}

/// The codes of two weights each in one, the first on top; what a last one lacks is 0.
pub fn join(bits: u32, codes: &[u8], out: &mut [u8]) {
    for (out, two) in out.iter_mut().zip(codes.chunks(2)) {
        *out = two[0] << bits | two.get(1).copied().unwrap_or(0);
    }
}

/// What the numbers of normal weights are divided by, in units of the code's, for the least error at some bits: few bits
/// reach all numbers seldom, many bits suffer from those beyond the largest.
pub fn narrow(bits: u32) -> f32 {
    match bits {
        1 => 1.05,
        2 => 1.0,
        3..=7 => 0.95,
        _ => 0.87,
    }
}

/// Calls `f(t, state)` for each of a tile's codes: the state is the last 16 bits up to the end of code `t`, the newest in
/// the low bits, on the circle that the codes form.
pub fn states(bits: u32, codes: &[u8], mut f: impl FnMut(usize, u16)) {
    let (n, back) = (codes.len(), WINDOW.div_ceil(bits) as usize);
    let push = |s: u32, u: u8| ((s << bits) | u32::from(u)) & (STATES as u32 - 1);
    let mut s = (0..back).fold(0, |s, i| push(s, codes[(n * back - back + i) % n]));
    for (t, &u) in codes.iter().enumerate() {
        s = push(s, u);
        f(t, s as u16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_look_normal() {
        // Means, spreads and counts of values that the published codes have.
        for (code, mean, rms, distinct) in
            [(Code::Mad1, 0.0, 147.8, 908), (Code::Mul1, 0.26, 147.8, 0), (Code::Inst3, 0.0, 1.2437, 0)]
        {
            let n = code.numbers();
            let average = n.iter().map(|&v| f64::from(v)).sum::<f64>() / STATES as f64;
            assert!((average - mean).abs() < 0.005 * rms, "{code:?}: {average}");
            assert!((f64::from(code.rms()) - rms).abs() < 0.005 * rms, "{code:?}: {}", code.rms());
            let mut sorted = n.to_vec();
            sorted.sort_by(f32::total_cmp);
            sorted.dedup();
            assert!(distinct == 0 || sorted.len() == distinct, "{code:?}: {}", sorted.len());
        }
        assert_eq!(Code::Mul1.number(0), -510.0);
        assert_eq!(Code::Mul1.number(1), (0x83 + 0xDC + 0xD1 + 0x2D - 510) as f32);
        assert_eq!(Code::Inst3.number(0), {
            // 64248484 = 0x03D4_5AA4.
            let h = |b: u16| half::f16::from_bits((b & 0x8FFF) ^ 0x3B60).to_f32();
            h(0x03D4) + h(0x5AA4)
        });
    }

    #[test]
    fn states_are_windows_of_the_circle() {
        let seen = |bits, codes: &[u8]| {
            let mut all = Vec::new();
            states(bits, codes, |t, s| all.push((t, s)));
            all
        };
        assert_eq!(seen(8, &[0xab, 0xcd, 0xef]), [(0, 0xefab), (1, 0xabcd), (2, 0xcdef)]);
        assert_eq!(seen(8, &[0x12]), [(0, 0x1212)]);
        let codes = [3, 1, 0, 2, 2, 1, 0, 3, 3];
        for (t, s) in seen(2, &codes) {
            let want = (0..8).fold(0u16, |w, i| w | u16::from(codes[(t + 9 - i) % 9]) << (2 * i));
            assert_eq!(s, want);
        }
        // Three bits do not divide sixteen: the oldest code is cut.
        let codes = [7, 0, 5, 2, 1, 6, 4];
        for (t, s) in seen(3, &codes) {
            let want = (0..6).fold(0u32, |w, i| w | u32::from(codes[(t + 7 - i) % 7]) << (3 * i));
            assert_eq!(u32::from(s), want & 0xffff);
        }
    }
}
