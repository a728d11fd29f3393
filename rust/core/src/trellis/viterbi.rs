//! The codes of a tile with the least squared error, by dynamic programming over the states.
use super::{Code, STATES, TILE, WINDOW};
use crate::format::lanes::{per_level, Level};
use crate::qtensor::zeros_vec;
use crate::Result;

/// States that are looked at together.
const CHUNK: usize = 256;

/// Weights on either side of the seam that choose where the circle is closed: by then the best paths have met.
const SEAM: usize = 48;

/// The weights of a state.
#[derive(Debug, Clone, Copy, Default)]
struct Step {
    first: f32,
    second: Option<f32>,
    /// Whether a second weight is missing.
    short: bool,
}

/// Buffers of the search, kept between tiles.
#[derive(Debug)]
pub struct Search {
    code: Code,
    /// Bits of a weight, and those that each state has more than the one before.
    weight: u32,
    bits: u32,
    /// Least cost of a path to each state.
    cost: Vec<f32>,
    next: Vec<f32>,
    /// The least of the costs of the states that may come before, by the bits that they share.
    best: Vec<f32>,
    /// Which of them it was, for each weight.
    back: Vec<u8>,
}

impl Search {
    /// Buffers for tiles of at most `len` weights.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(code: Code, bits: u32, len: usize) -> Result<Self> {
        let (weight, bits) = (bits, bits * code.weights() as u32);
        Ok(Self {
            code,
            weight,
            bits,
            cost: zeros_vec(STATES)?,
            next: zeros_vec(STATES)?,
            best: zeros_vec(STATES >> bits)?,
            back: zeros_vec(len.div_ceil(code.weights()).max(2 * SEAM) * (STATES >> bits))?,
        })
    }

    /// Codes of the numbers `x`, as near to them as a circle of codes comes. The place where the circle closes is chosen
    /// by a search across it; the rest is then optimal.
    ///
    /// # Panics
    /// If `x` is longer than the buffers were made for, or `out` has another length.
    pub fn tile(&mut self, level: Level, x: &[f32], out: &mut [u8]) {
        assert_eq!(x.len(), out.len());
        if x.is_empty() {
            return;
        }
        if x.len() * (self.weight as usize) <= WINDOW as usize {
            self.short(x, out);
            return;
        }
        let (groups, each) = (STATES >> self.bits, self.code.weights());
        let mut steps = [Step::default(); TILE];
        let steps = &mut steps[..x.len().div_ceil(each)];
        for (step, x) in steps.iter_mut().zip(x.chunks(each)) {
            *step = Step { first: x[0], second: x.get(1).copied(), short: x.len() < each };
        }
        // Around the circle, more than once where it is short.
        let first = steps.len() * SEAM - SEAM;
        let seam: [Step; 2 * SEAM] = std::array::from_fn(|i| steps[(first + i) % steps.len()]);
        self.forward(level, &seam, None);
        let end = least(self.cost.iter().copied().enumerate());
        let state = self.backward(seam.len(), end, SEAM, |_, _| ());
        let shared = state & (groups - 1);
        self.forward(level, steps, Some(shared));
        let ends = (0..1 << self.bits).map(|j| shared | (j << (WINDOW - self.bits)));
        let end = least(ends.map(|s| (s, self.cost[s])));
        let weight = self.weight;
        self.backward(steps.len(), end, 0, |t, u| {
            if each == 1 {
                out[t] = u;
                return;
            }
            out[2 * t] = u >> weight;
            if let Some(second) = out.get_mut(2 * t + 1) {
                *second = u & ((1 << weight) - 1);
            }
        });
    }

    /// Fills `cost` and `back`; `start` are the bits that the state before the first has in common with its successors.
    fn forward(&mut self, level: Level, x: &[Step], start: Option<usize>) {
        let (numbers, groups) = (self.code.numbers(), STATES >> self.bits);
        for (t, step) in x.iter().enumerate() {
            if t == 0 {
                self.best.fill(if start.is_some() { f32::INFINITY } else { 0.0 });
                if let Some(s) = start {
                    self.best[s] = 0.0;
                }
            } else {
                reduce(level, self.bits, &self.cost, &mut self.best, &mut self.back[t * groups..][..groups]);
            }
            extend(level, self.bits, step.first, numbers, &self.best, &mut self.next);
            match (self.code.seconds(), step.second) {
                (Some(seconds), Some(v)) => add_second(level, v, seconds, &mut self.next),
                // The code of a weight that is missing is 0.
                _ if step.short => {
                    for states in self.next.chunks_exact_mut(1 << self.weight) {
                        states[1..].fill(f32::INFINITY);
                    }
                }
                _ => (),
            }
            std::mem::swap(&mut self.cost, &mut self.next);
        }
    }

    /// Follows the best path from its `end` back to place `stop`, calling `f(t, code)`; returns the state before it.
    fn backward(&self, steps: usize, end: usize, stop: usize, mut f: impl FnMut(usize, u8)) -> usize {
        let groups = STATES >> self.bits;
        let mut state = end;
        for t in (stop..steps).rev() {
            f(t, (state & ((1 << self.bits) - 1)) as u8);
            let shared = state >> self.bits;
            let from = if t == 0 { 0 } else { usize::from(self.back[t * groups + shared]) };
            state = shared | (from << (WINDOW - self.bits));
        }
        state
    }

    /// Tiles of no more bits than a state has: every string is tried.
    fn short(&self, x: &[f32], out: &mut [u8]) {
        let mask = (1u32 << self.weight) - 1;
        let mut best = f64::INFINITY;
        let mut codes = vec![0u8; x.len()];
        for string in 0..1u32 << (self.weight as usize * x.len()) {
            for (i, u) in codes.iter_mut().enumerate() {
                *u = ((string >> (self.weight as usize * i)) & mask) as u8;
            }
            let mut error = 0.0;
            self.code.decode(self.weight, &codes, |t, v| {
                let d = f64::from(x[t]) - f64::from(v);
                error += d * d;
            });
            if error < best {
                best = error;
                out.copy_from_slice(&codes);
            }
        }
    }
}

/// The first of the states with the least cost.
fn least(all: impl Iterator<Item = (usize, f32)>) -> usize {
    all.fold((0, f32::INFINITY), |a, b| if b.1 < a.1 { b } else { a }).0
}

/// The least of the costs of the `2^B` states that share their low bits, and which it was. It takes the lowest bits of the
/// cost with it: costs are not negative, so their bits are in order.
#[inline(always)]
fn reduce_bits<const B: u32>(cost: &[f32], best: &mut [f32], back: &mut [u8]) {
    let (groups, mask) = (STATES >> B, (1u32 << B) - 1);
    for m in (0..groups).step_by(CHUNK) {
        let mut low = [u32::MAX; CHUNK];
        for j in 0..1usize << B {
            let part = &cost[j * groups + m..][..CHUNK];
            for (low, c) in low.iter_mut().zip(part) {
                *low = (*low).min((c.to_bits() & !mask) | j as u32);
            }
        }
        for (best, low) in best[m..][..CHUNK].iter_mut().zip(&low) {
            *best = f32::from_bits(low & !mask);
        }
        for (back, low) in back[m..][..CHUNK].iter_mut().zip(&low) {
            *back = (low & mask) as u8;
        }
    }
}

/// Each number twice.
#[inline(always)]
fn twice(from: &[f32], to: &mut [f32]) {
    for (to, from) in to.chunks_exact_mut(2).zip(from) {
        to[0] = *from;
        to[1] = *from;
    }
}

/// The cost of every state at the number `x`.
#[inline(always)]
fn extend_bits<const B: u32>(x: f32, numbers: &[f32; STATES], best: &[f32], next: &mut [f32]) {
    if B >= 3 {
        // At least a vector of states has the same states before it.
        for (before, (next, numbers)) in
            best.iter().zip(next.chunks_exact_mut(1 << B).zip(numbers.chunks_exact(1 << B)))
        {
            for (next, number) in next.iter_mut().zip(numbers) {
                *next = before + (number - x) * (number - x);
            }
        }
        return;
    }
    let per = CHUNK >> B;
    for (before, (next, numbers)) in
        best.chunks_exact(per).zip(next.chunks_exact_mut(CHUNK).zip(numbers.chunks_exact(CHUNK)))
    {
        let (mut a, mut c) = ([0.0f32; CHUNK], [0.0f32; CHUNK]);
        twice(before, &mut a[..2 * per]);
        for b in 1..B {
            let n = per << b;
            twice(&a[..n], &mut c[..2 * n]);
            a[..2 * n].copy_from_slice(&c[..2 * n]);
        }
        for ((next, number), before) in next.iter_mut().zip(numbers).zip(&a) {
            *next = before + (number - x) * (number - x);
        }
    }
}

macro_rules! by_bits {
    ($bits:ident, $f:ident($($a:expr),*)) => {
        match $bits {
            1 => $f::<1>($($a),*),
            2 => $f::<2>($($a),*),
            3 => $f::<3>($($a),*),
            4 => $f::<4>($($a),*),
            5 => $f::<5>($($a),*),
            6 => $f::<6>($($a),*),
            7 => $f::<7>($($a),*),
            _ => $f::<8>($($a),*),
        }
    };
}

/// The loops with the instructions of a level. The widest are written out: from the portable ones compilers do not make the
/// shuffles.
fn reduce(level: Level, bits: u32, cost: &[f32], best: &mut [f32], back: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if level == Level::Avx512 {
        return crate::kernel::x86::viterbi::reduce(bits, cost, best, back);
    }
    reduce_loops(level, bits, cost, best, back);
}

fn extend(level: Level, bits: u32, x: f32, numbers: &[f32; STATES], best: &[f32], next: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if level == Level::Avx512 {
        return crate::kernel::x86::viterbi::extend(bits, x, numbers, best, next);
    }
    extend_loops(level, bits, x, numbers, best, next);
}

#[inline(always)]
fn second_body(x: f32, numbers: &[f32; STATES], next: &mut [f32]) {
    for (next, number) in next.iter_mut().zip(numbers) {
        *next += (number - x) * (number - x);
    }
}
per_level! {
    /// Adds the cost of every state at the second number `x`.
    add_second = second_body(x: f32, numbers: &[f32; STATES], next: &mut [f32]) -> ()
}

#[inline(always)]
fn reduce_body(bits: u32, cost: &[f32], best: &mut [f32], back: &mut [u8]) {
    by_bits!(bits, reduce_bits(cost, best, back));
}
per_level! {
    /// See [`reduce_bits`].
    reduce_loops = reduce_body(bits: u32, cost: &[f32], best: &mut [f32], back: &mut [u8]) -> ()
}

#[inline(always)]
fn extend_body(bits: u32, x: f32, numbers: &[f32; STATES], best: &[f32], next: &mut [f32]) {
    by_bits!(bits, extend_bits(x, numbers, best, next));
}
per_level! {
    /// See [`extend_bits`].
    extend_loops = extend_body(bits: u32, x: f32, numbers: &[f32; STATES], best: &[f32], next: &mut [f32]) -> ()
}

#[cfg(test)]
mod tests {
    use super::super::narrow;
    use super::*;

    /// Numbers that are normal, about: sums of twelve uniforms.
    fn normal(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            f64::from(state) / 4_294_967_296.0
        };
        (0..n).map(|_| ((0..12).map(|_| next()).sum::<f64>() - 6.0) as f32).collect()
    }

    fn error(code: Code, bits: u32, x: &[f32], codes: &[u8]) -> f64 {
        let mut sum = 0.0;
        code.decode(bits, codes, |t, v| sum += (f64::from(v) - f64::from(x[t])).powi(2));
        sum
    }

    #[test]
    fn tiles_cut_short_cost_little() {
        for (len, limit) in [(5, 0.13), (8, 0.10), (12, 0.33), (24, 0.13), (48, 0.09), (96, 0.08)] {
            let (mut sum, mut square) = (0.0, 0.0);
            let mut search = Search::new(Code::Mul1, 2, TILE).unwrap();
            for seed in 0..30 {
                let x: Vec<f32> = normal(len, seed).iter().map(|v| v * 147.8).collect();
                let mut out = vec![0; len];
                search.tile(Level::detect(), &x, &mut out);
                sum += error(Code::Mul1, 2, &x, &out);
                square += x.iter().map(|v| f64::from(v * v)).sum::<f64>();
            }
            let error = sum / square;
            assert!(error < limit && error > 0.03, "{len}: {error}");
        }
    }

    #[test]
    fn errors_are_those_of_the_published_codes() {
        let x = normal(24 * TILE, 3);
        // Squared errors of numbers with variance 1; 2 bits: 0.0668 to 0.0679.
        for (code, bits, limit) in [
            (Code::Mul1, 1, 0.285),
            (Code::Mul1, 2, 0.0700),
            (Code::Mad1, 2, 0.0710),
            (Code::Inst3, 2, 0.0710),
            (Code::Mul1, 3, 0.0180),
            (Code::Mul1, 4, 0.0046),
            (Code::Hyb, 2, 0.0710),
            (Code::Hyb, 3, 0.0190),
            (Code::Hyb, 4, 0.0060),
        ] {
            let mut search = Search::new(code, bits, TILE).unwrap();
            let scale = 1.0 / (narrow(bits) * code.rms());
            let mut out = vec![0; TILE];
            let mut sum = 0.0;
            for tile in x.chunks(TILE) {
                let t: Vec<f32> = tile.iter().map(|v| v / scale).collect();
                search.tile(Level::detect(), &t, &mut out);
                sum += error(code, bits, &t, &out) * f64::from(scale).powi(2);
            }
            let mean = sum / x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            assert!(mean < limit && mean > 0.8 * limit, "{code:?} {bits}: {mean}");
        }
    }

    #[test]
    fn every_level_finds_the_same_codes() {
        let all = (1..=8).map(|bits| (Code::Mul1, bits, 140.0, 100)).chain((2..=4).map(|b| (Code::Hyb, b, 1.0, 99)));
        for (code, bits, scale, len) in all {
            let x: Vec<f32> = normal(len, 9).iter().map(|v| v * scale).collect();
            let mut want = vec![0; x.len()];
            Search::new(code, bits, TILE).unwrap().tile(Level::Base, &x, &mut want);
            for level in Level::available() {
                let mut got = vec![0; x.len()];
                Search::new(code, bits, TILE).unwrap().tile(level, &x, &mut got);
                assert_eq!(got, want, "{code:?} {bits} bits {level:?}");
            }
        }
    }
}
