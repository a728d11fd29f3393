//! Vector codes: `vq<b>`, b bits a weight, which are read in vectors along K that an entry of the matrix's codebook is
//! worth.
//!
//! The index of a vector is the codes of its weights, the first in the lowest bits: in the stream of a row's bits it is one
//! number. Vectors start with their group, and the last one of a group may be short; its few bits are the place among the
//! first entries, of which it takes the first values.
//!
//! The high bits of an index may be the place in a second codebook, for what the first leaves (`_r<bits>`): a vector is the
//! sum of two entries.
//!
//! Eight bits of index keep the codebook within the nearest cache, and are whole bytes: one bit for each of 8 weights
//! (`vq1`), two for 4 (`vq2`), four for 2 (`vq4`). Twelve bits leave less error to three bits for 4 weights (`vq3`) and two
//! for 6 (`vq2_v6`), and are worth their codebooks of 64 and 96 KiB in large matrices. Two small codebooks are for all
//! others: 8 and 4 bits for 4 weights (`vq3_r4`), 8 and 8 for 8 (`vq2_r8`).
//!
//! rtn: `s = rms(group)`, or a 16th of the largest magnitude if that is more; the entry with the least squared error, in
//! which each weight counts as its column is important; a tie the first. Of two codebooks the nearest pair, of those that
//! begin with one of the eight entries nearest by themselves. The codebook need not have 0: a group of zeros
//! gets the smallest positive scale.
mod kmeans;
mod nearest;

pub(crate) use kmeans::learn;

use super::lanes::{per_level, LANES};
use super::{Codec, Element, Fit, Level, ScaleType, ValueMap, FLOAT};
use crate::qtensor::zeros_vec;
use crate::Result;
use nearest::{nearest, nearest_pair, Leaves};

/// The largest magnitude in a codebook.
pub(super) const REACH: f32 = 16.0;

/// The longest vector.
const LONGEST: usize = 8;

#[derive(Debug)]
struct Vectors;

/// How the codes of a vector become numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Weights of a vector.
    pub len: usize,
    /// Bits of a weight.
    pub bits: usize,
    /// Bits of an index that are the place in the second codebook, the high ones; 0 where there is none.
    pub second: usize,
}

impl Shape {
    /// Bits of an index that are the place in the first codebook.
    fn first(self) -> usize {
        self.len * self.bits - self.second
    }

    /// Entries of the second codebook.
    pub(crate) fn rest(self) -> usize {
        match self.second {
            0 => 0,
            bits => 1 << bits,
        }
    }

    /// Where the second codebook begins.
    pub(crate) fn second_at(self) -> usize {
        self.len << self.first()
    }

    /// Entries of both codebooks, which follow each other.
    pub fn entries(self) -> usize {
        (1 << self.first()) + self.rest()
    }

    /// The entries whose sum a vector of these codes is, the second one after all of the first codebook.
    #[inline(always)]
    pub(crate) fn entries_of(self, codes: &[u8]) -> (usize, Option<usize>) {
        let i = codes.iter().enumerate().fold(0, |i, (j, u)| i | usize::from(*u) << (self.bits * j));
        match self.second {
            0 => (i, None),
            _ => (i & ((1 << self.first()) - 1), Some((1 << self.first()) + (i >> self.first()))),
        }
    }

    /// Entries of the first and of the second codebook that `n` weights of a vector may have.
    fn limits(self, n: usize) -> (usize, usize) {
        let bits = n * self.bits;
        let both = (bits.min(self.first()), bits.saturating_sub(self.first()));
        (1 << both.0, if self.second == 0 { 0 } else { 1 << both.1 })
    }
}

const fn row(name: &'static str, bits: u8, len: usize, second: usize) -> Element {
    let shape = Shape { len, bits: bits as usize, second };
    assert!(len <= LONGEST && len * bits as usize <= 16 && (second == 0 || second >= 4));
    let row = Element::affine(name, bits, 1, 0, 1 << bits, 0, &Vectors);
    Element { map: ValueMap::Vectors(shape), computes: FLOAT, scales: &ScaleType::ALL, ..row }
}

/// `vq1` to `vq3_r4`.
pub static ROWS: [Element; 7] = [
    row("vq1", 1, 8, 0),
    row("vq2", 2, 4, 0),
    row("vq3", 3, 4, 0),
    row("vq4", 4, 2, 0),
    row("vq2_v6", 2, 6, 0),
    row("vq2_r8", 2, 8, 8),
    row("vq3_r4", 3, 4, 4),
];

impl Codec for Vectors {
    fn fit(&self, _: &Element, _: Level, x: &[f32], absmax: f32) -> Fit {
        let square: f64 = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        let rms = (square / x.len().max(1) as f64).sqrt() as f32;
        Fit { scale: rms.max(absmax / REACH).min(f32::MAX / REACH), low: 0.0 }
    }

    fn has_zero(&self) -> bool {
        false
    }

    fn shrinks(&self, _: &Element) -> &'static [f32] {
        &[0.94, 1.06]
    }
}

/// A codebook with what the search for the nearest entry needs.
#[derive(Debug, Clone)]
pub(crate) struct Codebook {
    shape: Shape,
    /// `[entries][len]`, as matrices have it.
    table: Vec<f32>,
    /// `[len][entries]`.
    columns: Vec<f32>,
    /// The first codebook, where it is long.
    leaves: Option<Leaves>,
}

impl Codebook {
    /// The codebook of vectors of a shape from the table of a matrix.
    pub(crate) fn new(shape: Shape, from: &[f32]) -> Result<Self> {
        let (mut table, mut columns) = (zeros_vec(from.len())?, zeros_vec(from.len())?);
        table.copy_from_slice(from);
        let entries = shape.entries();
        for (i, entry) in table.chunks_exact(shape.len).enumerate() {
            entry.iter().enumerate().for_each(|(j, v)| columns[j * entries + i] = *v);
        }
        let first = 1 << shape.first();
        let leaves = Leaves::new(&table[..first * shape.len], shape.len, first)?;
        Ok(Self { shape, table, columns, leaves })
    }

    /// Codes of a group at a scale, in which its weights count as `weights`; returns the largest `fl(|w - decoded|)`.
    pub(crate) fn encode(&self, level: Level, x: &[f32], s: f32, weights: &[f32], out: &mut [u8]) -> f32 {
        encode(level, self, x, s, weights, out).0
    }

    /// Squared error of a group at a scale, in squares of the scale.
    pub(crate) fn cost(&self, level: Level, x: &[f32], s: f32, weights: &[f32]) -> f32 {
        encode(level, self, x, s, weights, &mut vec![0; x.len()]).1
    }

    /// Numbers of the codes of a group.
    pub(crate) fn decode(&self, level: Level, u: &[u8], s: f32, out: &mut [f32]) {
        decode(level, self.shape, &self.table, u, s, out);
    }
}

#[inline(always)]
fn encode_body(book: &Codebook, x: &[f32], s: f32, weights: &[f32], out: &mut [u8]) -> (f32, f32) {
    let (mut worst, mut sum) = (0.0f32, 0.0);
    let Shape { len, bits, .. } = book.shape;
    let first = book.shape.first();
    for ((x, w), u) in x.chunks(len).zip(weights.chunks(len)).zip(out.chunks_mut(len)) {
        let mut t = [0.0; LONGEST];
        let t = &mut t[..x.len()];
        t.iter_mut().zip(x).for_each(|(t, v)| *t = v / s);
        let mut entry = [0.0; LONGEST];
        let (i, d) = if book.shape.second == 0 {
            let (i, d) = nearest(book, 0, book.shape.limits(t.len()).0, t, w);
            entry[..len].copy_from_slice(&book.table[i * len..][..len]);
            (i, d)
        } else {
            let (i, j, d) = nearest_pair(book, t, w);
            let (a, b) = (&book.table[i * len..][..len], &book.table[((1 << first) + j) * len..][..len]);
            entry.iter_mut().zip(a.iter().zip(b)).for_each(|(v, (a, b))| *v = a + b);
            (i | j << first, d)
        };
        sum += d;
        for (j, (u, x)) in u.iter_mut().zip(x).enumerate() {
            *u = ((i >> (bits * j)) & ((1 << bits) - 1)) as u8;
            worst = worst.max((x - entry[j] * s).abs());
        }
    }
    (worst, sum)
}
per_level! {
    /// Codes of a group; the largest `fl(|w - decoded|)` and the weighted square of the error in steps of the scale.
    encode = encode_body(book: &Codebook, x: &[f32], s: f32, weights: &[f32], out: &mut [u8]) -> (f32, f32)
}

#[inline(always)]
fn decode_body(shape: Shape, table: &[f32], u: &[u8], s: f32, out: &mut [f32]) {
    // Lengths that the compiler knows make entries a load each.
    match (shape.len, shape.second) {
        (2, _) => vectors::<2, false>(shape, table, u, s, out),
        (4, 0) => vectors::<4, false>(shape, table, u, s, out),
        (4, _) => vectors::<4, true>(shape, table, u, s, out),
        (6, _) => vectors::<6, false>(shape, table, u, s, out),
        (_, 0) => vectors::<8, false>(shape, table, u, s, out),
        _ => vectors::<8, true>(shape, table, u, s, out),
    }
}
per_level! {
    /// Numbers of codes from the start of a vector on, by the table of a matrix.
    decode = decode_body(shape: Shape, table: &[f32], u: &[u8], s: f32, out: &mut [f32]) -> ()
}

#[inline(always)]
fn vectors<const V: usize, const TWO: bool>(shape: Shape, table: &[f32], u: &[u8], s: f32, out: &mut [f32]) {
    let (books, _) = table.as_chunks::<V>();
    let worth = |u: &[u8]| match shape.entries_of(u) {
        (a, Some(b)) if TWO => std::array::from_fn(|j| books[a][j] + books[b][j]),
        (a, _) => books[a],
    };
    let ((whole, short), (to, last)) = (u.as_chunks::<V>(), out.as_chunks_mut::<V>());
    for (u, out) in whole.iter().zip(to) {
        let entry = worth(u);
        for j in 0..V {
            out[j] = entry[j] * s;
        }
    }
    if !short.is_empty() {
        let entry = worth(short);
        last.iter_mut().zip(entry).for_each(|(o, v)| *o = v * s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_entry_is_the_first_of_the_nearest() {
        let table: Vec<f32> = (0..1024u32).map(|i| (i.wrapping_mul(0x9E37_79B1) >> 29) as f32 - 4.0).collect();
        let shape = Shape { len: 4, bits: 2, second: 0 };
        let book = Codebook::new(shape, &table).unwrap();
        for t in 0..200u32 {
            let x: Vec<f32> = (0..4).map(|j| ((t + j).wrapping_mul(0x85EB_CA6B) >> 28) as f32 / 2.0 - 4.0).collect();
            let weights = [1.0, 0.5, 0.0, 2.0];
            for n in 1..=4 {
                // All of these are exact in f32, so ties are ties.
                let d = |i: usize| (0..n).map(|j| weights[j] * (x[j] - table[4 * i + j]).powi(2)).sum::<f32>();
                let want = (0..1 << (2 * n)).min_by(|&a, &b| d(a).total_cmp(&d(b))).unwrap();
                for level in Level::available() {
                    let mut u = vec![9; n];
                    encode(level, &book, &x[..n], 1.0, &weights[..n], &mut u);
                    let got = u.iter().rev().fold(0, |i, u| i << 2 | usize::from(*u));
                    assert_eq!(got, want, "{n} {level:?}");
                    let mut w = vec![f32::NAN; n];
                    decode(level, shape, &table, &u, -0.5, &mut w);
                    assert!(w.iter().zip(&table[4 * want..]).all(|(w, v)| *w == v * -0.5));
                }
            }
        }
    }
}
