//! Tables of values: what each code is worth, and which code is nearest to a number.
use super::lanes::{self, Level, LANES};

/// What a number half-way between two values becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tie {
    /// The one whose code is even.
    Even,
    /// The lower value.
    Down,
    /// The one nearer to 0.
    Inward,
}

/// A table of values, in the order of the codes, with what the search for the nearest one needs.
#[derive(Debug, Clone)]
pub struct Book {
    /// By code, repeated up to 256 entries.
    values: Box<[f32; 256]>,
    count: usize,
    /// Codes of the finite values in ascending order, -0 before +0.
    order: Vec<u8>,
    /// Their values.
    sorted: Vec<f32>,
    /// Number `t` belongs at or above `order[i + 1]` where `key(t) > cuts[i]`. Long lists are filled up to [`LONG`].
    cuts: Vec<i32>,
    integers: Vec<i16>,
    unit: f32,
    exact: bool,
}

/// Integers beyond a byte are `HALF*high + low`, `low` from 0 to `HALF - 1` in magnitude, both of one sign.
pub const HALF: i16 = 16;
/// The largest integer of two bytes that tables of 32 magnitudes hold.
pub(super) const TWO_BYTES: f32 = 511.0;

/// Length of a list of cuts that is searched by bisection.
pub(super) const LONG: usize = 255;

/// Orders floats as integers: -0 is -1, +0 is 0.
#[inline(always)]
pub(super) fn key(t: f32) -> i32 {
    let b = t.to_bits() as i32;
    b ^ (((b >> 31) as u32) >> 1) as i32
}

fn from_key(k: i32) -> f32 {
    f32::from_bits((k ^ (((k >> 31) as u32) >> 1) as i32) as u32)
}

impl Book {
    /// The table of `values`, one for each code. Of equal values the first code is the one that encoding gives; values
    /// that are not finite are decoded only.
    ///
    /// # Panics
    /// If no value is finite.
    pub fn new(values: &[f32], tie: Tie) -> Self {
        Self::with_integers(values, tie, 127.0)
    }

    /// As [`Self::new`] for values that integers up to `most` are to stand for exactly, where a power of two makes them so.
    pub(super) fn with_integers(values: &[f32], tie: Tie, most: f32) -> Self {
        let mut order: Vec<u8> = (0..values.len()).filter(|&u| values[u].is_finite()).map(|u| u as u8).collect();
        order.sort_by_key(|&u| (key(values[usize::from(u)]), u));
        order.dedup_by_key(|u| key(values[usize::from(*u)]));
        let mut cuts: Vec<i32> = order.windows(2).map(|p| cut(values, p[0], p[1], tie)).collect();
        if cuts.len() >= 64 {
            cuts.resize(LONG, i32::MAX);
        }
        let sorted = order.iter().map(|&u| values[usize::from(u)]).collect();
        let top = order.iter().fold(0.0f32, |m, &u| m.max(values[usize::from(u)].abs()));
        assert!(!order.is_empty(), "a table without a finite value");
        // Integers: the least power of two that makes every value one, if none is too large; else the nearest of 127 steps.
        let fits = |scale: f32| {
            values.iter().all(|v| v.is_finite() && (v * scale).fract() == 0.0 && (v * scale).abs() <= most)
        };
        let exact = (-8..=8).map(|p| 2f32.powi(p)).find(|&s| fits(s));
        let unit = exact.map_or(top / 127.0, |s| 1.0 / s);
        let integers = values
            .iter()
            .map(|v| if v.is_finite() { (v / unit).round_ties_even().clamp(-most, most) as i16 } else { 0 })
            .collect();
        Self {
            values: Box::new(std::array::from_fn(|u| values[u % values.len()])),
            count: values.len(),
            order,
            sorted,
            cuts,
            integers,
            unit,
            exact: exact.is_some(),
        }
    }

    /// What each code is worth.
    pub fn values(&self) -> &[f32] {
        &self.values[..self.count]
    }

    /// The values of all bytes: the table repeats.
    pub fn of_bytes(&self) -> &[f32; 256] {
        &self.values
    }

    /// The largest finite magnitude.
    pub fn top(&self) -> f32 {
        self.order.iter().fold(0.0f32, |m, &u| m.max(self.values[usize::from(u)].abs()))
    }

    /// The integer of each code for integer products: `value = integer * unit`, about or exactly.
    pub fn integers(&self) -> &[i16] {
        &self.integers
    }

    /// What the integer 1 is worth.
    pub fn unit(&self) -> f32 {
        self.unit
    }

    /// Whether the integers take two bytes, see [`HALF`].
    pub fn is_halved(&self) -> bool {
        self.integers.iter().any(|v| v.unsigned_abs() > 127)
    }

    /// Whether the integers are the values exactly.
    pub fn is_exact(&self) -> bool {
        self.exact
    }

    /// The code whose value has the given sign and the least magnitude, 0 counting with its sign; code 0 if none has.
    pub fn least(&self, negative: bool) -> u8 {
        let value = |u: u8| self.values[usize::from(u)];
        let signed = self.order.iter().copied().filter(|&u| value(u).is_sign_negative() == negative);
        signed.min_by(|&a, &b| value(a).abs().total_cmp(&value(b).abs())).unwrap_or(0)
    }

    /// The code of 0.
    pub fn zero(&self) -> Option<u8> {
        self.order.iter().copied().find(|&u| key(self.values[usize::from(u)]) == 0)
    }

    /// Nearest codes of `x` at a scale; returns the largest `fl(|w - decoded|)`.
    pub(crate) fn encode(&self, level: Level, x: &[f32], s: f32, out: &mut [u8]) -> f32 {
        lanes::book_encode(level, x, s, &self.cuts, &self.order, &self.sorted, out)
    }

    /// Squared error of `x` at a scale in squares of the scale, about.
    pub(crate) fn cost(&self, level: Level, x: &[f32], s: f32) -> f32 {
        lanes::book_cost(level, x, 1.0 / s, &self.cuts, &self.sorted)
    }
}

/// The greatest key that still belongs to the lower of two neighbours.
fn cut(values: &[f32], a: u8, b: u8, tie: Tie) -> i32 {
    let (lo, hi) = (values[usize::from(a)], values[usize::from(b)]);
    if lo == hi {
        return -1;
    }
    // Exact: neighbours of a table are not far apart in magnitude.
    let middle = f64::midpoint(f64::from(lo), f64::from(hi));
    let mut k = key(middle as f32);
    if f64::from(from_key(k)) > middle {
        k -= 1;
    }
    if f64::from(from_key(k)) < middle {
        return k;
    }
    let up = match tie {
        Tie::Even => b.is_multiple_of(2),
        Tie::Down => false,
        Tie::Inward => hi.abs() < lo.abs(),
    };
    // Half-way is both zeros where it is 0.
    match (up, middle == 0.0) {
        (false, true) => 0,
        (true, true) => -2,
        (true, false) => k - 1,
        (false, false) => k,
    }
}

/// How many cuts lie below each key.
#[inline(always)]
pub(super) fn place(keys: &[i32; LANES], cuts: &[i32]) -> [i32; LANES] {
    let mut at = [0i32; LANES];
    if let Ok(cuts) = <&[i32; LONG]>::try_from(cuts) {
        for step in [128, 64, 32, 16, 8, 4, 2, 1] {
            for j in 0..LANES {
                let probe = ((at[j] + step - 1) as usize).min(LONG - 1);
                at[j] += if keys[j] > cuts[probe] { step } else { 0 };
            }
        }
    } else {
        for &c in cuts {
            for j in 0..LANES {
                at[j] += i32::from(keys[j] > c);
            }
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_order_and_reversible() {
        let sorted = [f32::NEG_INFINITY, -2.0, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 2.0, f32::INFINITY];
        for pair in sorted.windows(2) {
            assert!(key(pair[0]) < key(pair[1]));
        }
        for v in sorted {
            assert_eq!(from_key(key(v)).to_bits(), v.to_bits());
        }
        assert_eq!((key(-0.0), key(0.0)), (-1, 0));
    }

    #[test]
    fn ties_follow_the_rule() {
        let near = |tie, x: f32| {
            let mut u = [0];
            Book::new(&[-2.0, -1.0, 0.0, 1.0, 2.0], tie).encode(Level::Base, &[x], 1.0, &mut u);
            u[0]
        };
        assert_eq!([-1.5, -0.5, 0.5, 1.5].map(|x| near(Tie::Down, x)), [0, 1, 2, 3]);
        assert_eq!([-1.5, -0.5, 0.5, 1.5].map(|x| near(Tie::Inward, x)), [1, 2, 2, 3]);
        assert_eq!([-1.5, -0.5, 0.5, 1.5].map(|x| near(Tie::Even, x)), [0, 2, 2, 4]);
        assert_eq!([-9.0, f32::MIN, f32::MAX].map(|x| near(Tie::Even, x)), [0, 0, 4]);
    }

    #[test]
    fn integers_are_exact_where_a_power_of_two_makes_them() {
        let b = Book::new(&[0.0, 0.5, 6.0, -6.0], Tie::Even);
        assert!(b.is_exact());
        assert_eq!((b.integers(), b.unit()), (&[0, 1, 12, -12][..], 0.5));
        let b = Book::new(&[0.0, 0.3, 1.0, f32::NAN], Tie::Down);
        assert!(!b.is_exact());
        assert_eq!(b.integers(), [0, 38, 127, 0]);
        assert_eq!((b.least(false), b.least(true), b.zero()), (0, 0, Some(0)));
    }
}
