//! Vector codes: `vq<b>`, b bits a weight, which are read in vectors along K that an entry of the matrix's codebook is
//! worth.
//!
//! The index of a vector is the codes of its weights, the first in the lowest bits: in the stream of a row's bits it is one
//! number. Vectors start with their group, and the last one of a group may be short; its few bits are the place among the
//! first entries, of which it takes the first values.
//!
//! Eight bits of index keep the codebook within the nearest cache, and are whole bytes: one bit for each of 8 weights
//! (`vq1`), two for 4 (`vq2`), four for 2 (`vq4`). Twelve bits leave less error to three bits for 4 weights (`vq3`) and two
//! for 6 (`vq2_v6`), and are worth their codebooks of 64 and 96 KiB in large matrices.
//!
//! rtn: `s = rms(group)`, or a 16th of the largest magnitude if that is more; the entry with the least squared error, in
//! which each weight counts as its column is important; a tie the first. The codebook need not have 0: a group of zeros
//! gets the smallest positive scale.
mod kmeans;

pub(crate) use kmeans::learn;

use super::lanes::{per_level, LANES};
use super::{Codec, Element, Fit, Level, ScaleType, ValueMap, FLOAT};
use crate::qtensor::zeros_vec;
use crate::Result;

/// The largest magnitude in a codebook.
pub(super) const REACH: f32 = 16.0;

/// The longest vector.
const LONGEST: usize = 8;

#[derive(Debug)]
struct Vectors;

const fn row(name: &'static str, bits: u8, len: usize) -> Element {
    assert!(len <= LONGEST && len * bits as usize <= 16);
    let row = Element::affine(name, bits, 1, 0, 1 << bits, 0, &Vectors);
    Element { map: ValueMap::Vectors(len), computes: FLOAT, scales: &ScaleType::ALL, ..row }
}

/// `vq1` to `vq2_v6`.
pub static ROWS: [Element; 5] =
    [row("vq1", 1, 8), row("vq2", 2, 4), row("vq3", 3, 4), row("vq4", 4, 2), row("vq2_v6", 2, 6)];

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
    len: usize,
    bits: usize,
    /// `[entries][len]`, as matrices have it.
    table: Vec<f32>,
    /// `[len][entries]`.
    columns: Vec<f32>,
}

impl Codebook {
    /// The codebook of vectors of `len` weights from the table of a matrix.
    pub(crate) fn new(e: &Element, len: usize, from: &[f32]) -> Result<Self> {
        let (mut table, mut columns) = (zeros_vec(from.len())?, zeros_vec(from.len())?);
        table.copy_from_slice(from);
        let entries = table.len() / len;
        for (i, entry) in table.chunks_exact(len).enumerate() {
            entry.iter().enumerate().for_each(|(j, v)| columns[j * entries + i] = *v);
        }
        Ok(Self { len, bits: e.bits.into(), table, columns })
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
        decode(level, self.bits, self.len, &self.table, u, s, out);
    }
}

/// The entry nearest to a vector, the first of equals, and the weighted square of the distance. Lanes are entries.
#[inline(always)]
fn nearest(book: &Codebook, x: &[f32], weights: &[f32]) -> (usize, f32) {
    let (entries, limit) = (book.columns.len() / book.len, 1 << (book.bits * x.len()));
    let (mut least, mut at) = ([f32::INFINITY; LANES], [0u32; LANES]);
    for base in (0..limit).step_by(LANES) {
        let mut d = [0.0f32; LANES];
        for (j, (x, w)) in x.iter().zip(weights).enumerate() {
            let values = &book.columns[j * entries + base..][..LANES];
            for l in 0..LANES {
                let t = x - values[l];
                d[l] += w * (t * t);
            }
        }
        for l in 0..LANES {
            at[l] = if d[l] < least[l] { base as u32 } else { at[l] };
            least[l] = if d[l] < least[l] { d[l] } else { least[l] };
        }
    }
    // A short vector may have fewer entries than there are lanes.
    let mut best = (0, f32::INFINITY);
    for l in 0..LANES.min(limit) {
        let i = at[l] as usize + l;
        if least[l] < best.1 || (least[l] == best.1 && i < best.0) {
            best = (i, least[l]);
        }
    }
    best
}

#[inline(always)]
fn encode_body(book: &Codebook, x: &[f32], s: f32, weights: &[f32], out: &mut [u8]) -> (f32, f32) {
    let (mut worst, mut sum) = (0.0f32, 0.0);
    let (len, bits) = (book.len, book.bits);
    for ((x, w), u) in x.chunks(len).zip(weights.chunks(len)).zip(out.chunks_mut(len)) {
        let mut t = [0.0; LONGEST];
        let t = &mut t[..x.len()];
        t.iter_mut().zip(x).for_each(|(t, v)| *t = v / s);
        let (i, d) = nearest(book, t, w);
        sum += d;
        for (j, (u, x)) in u.iter_mut().zip(x).enumerate() {
            *u = ((i >> (bits * j)) & ((1 << bits) - 1)) as u8;
            worst = worst.max((x - book.table[i * len + j] * s).abs());
        }
    }
    (worst, sum)
}
per_level! {
    /// Codes of a group; the largest `fl(|w - decoded|)` and the weighted square of the error in steps of the scale.
    encode = encode_body(book: &Codebook, x: &[f32], s: f32, weights: &[f32], out: &mut [u8]) -> (f32, f32)
}

#[inline(always)]
fn decode_body(bits: usize, len: usize, table: &[f32], u: &[u8], s: f32, out: &mut [f32]) {
    // Lengths that the compiler knows make entries a load each.
    match len {
        2 => vectors::<2>(bits, table, u, s, out),
        4 => vectors::<4>(bits, table, u, s, out),
        6 => vectors::<6>(bits, table, u, s, out),
        _ => vectors::<8>(bits, table, u, s, out),
    }
}
per_level! {
    /// Numbers of codes from the start of a vector on, by the table of a matrix.
    decode = decode_body(bits: usize, len: usize, table: &[f32], u: &[u8], s: f32, out: &mut [f32]) -> ()
}

#[inline(always)]
fn vectors<const V: usize>(bits: usize, table: &[f32], u: &[u8], s: f32, out: &mut [f32]) {
    let (entries, _) = table.as_chunks::<V>();
    let ((whole, short), (to, last)) = (u.as_chunks::<V>(), out.as_chunks_mut::<V>());
    for (u, out) in whole.iter().zip(to) {
        let i = (0..V).fold(0, |i, j| i | usize::from(u[j]) << (bits * j));
        let entry = &entries[i];
        for j in 0..V {
            out[j] = entry[j] * s;
        }
    }
    let i = short.iter().enumerate().fold(0, |i, (j, u)| i | usize::from(*u) << (bits * j));
    last.iter_mut().zip(entries.get(i).into_iter().flatten()).for_each(|(o, v)| *o = v * s);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_entry_is_the_first_of_the_nearest() {
        let e = &ROWS[1];
        let table: Vec<f32> = (0..1024u32).map(|i| (i.wrapping_mul(0x9E37_79B1) >> 29) as f32 - 4.0).collect();
        let book = Codebook::new(e, 4, &table).unwrap();
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
                    decode(level, 2, 4, &table, &u, -0.5, &mut w);
                    assert!(w.iter().zip(&table[4 * want..]).all(|(w, v)| *w == v * -0.5));
                }
            }
        }
    }
}
