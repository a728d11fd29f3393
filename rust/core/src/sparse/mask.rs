//! The portable layout of a sparse matrix.
//!
//! ```text
//! mask   [units of N][bytes]   bit j of a row of units: unit j along K is kept; bits past the last unit are 0
//! codes  of the kept entries of row 0 in order of k, packed as any row of codes; then those of row 1, ...
//! ```
//!
//! Each row of codes begins at a byte, so where it begins follows from the mask. Scales and zero points are those of the
//! dense format, dropped groups included.
use super::Structure;
use crate::bits;
use crate::qtensor::zeros_vec;
use crate::{Error, Result};

/// Which entries of a matrix are kept, and where their codes begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    structure: Structure,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
    /// Kept entries before each row, and in all.
    starts: Vec<usize>,
    /// Where the codes of each row begin, in bytes, and where they end.
    offsets: Vec<usize>,
}

/// Bytes of `count` codes of `bits` bits; numbers of 16 and 32 bits are whole bytes.
pub(crate) fn code_bytes(bits: usize, count: usize) -> usize {
    if bits > 8 {
        count * (bits / 8)
    } else {
        bits::row_bytes(bits as u8, count)
    }
}

/// Sets bits `from..to` of a row of words.
fn set_range(words: &mut [u64], from: usize, to: usize) {
    let mut k = from;
    while k < to {
        let end = to.min((k / 64 + 1) * 64);
        let ones = u64::MAX >> (64 - (end - k));
        words[k / 64] |= ones << (k % 64);
        k = end;
    }
}

/// Entries of a mask that 2 of 4 keeps in a group of `len`.
fn kept_of(len: usize) -> u32 {
    2.min(len as u32)
}

impl Mask {
    /// A checked mask of a matrix whose codes have `bits` bits.
    ///
    /// # Errors
    /// [`Error::Shape`] for a wrong length, [`Error::Value`] for bits past the last unit, or fours of which not two are
    /// kept.
    pub fn new(structure: Structure, rows: usize, cols: usize, bits: usize, bytes: &[u8]) -> Result<Self> {
        let (unit_rows, per_row) = structure.mask_shape(rows, cols);
        if unit_rows.checked_mul(per_row) != Some(bytes.len()) {
            return Err(Error::Shape(format!(
                "a {structure} mask of shape ({rows}, {cols}) has {unit_rows} rows of {per_row} bytes, not {} in all",
                bytes.len()
            )));
        }
        let (_, c) = structure.unit(rows, cols);
        let used = cols.div_ceil(c) % 8;
        if used != 0 {
            let stray = !0u8 << used;
            if let Some(r) = bytes.chunks_exact(per_row).position(|row| row[per_row - 1] & stray != 0) {
                return Err(Error::Value(format!("row {r} of the mask has bits past its last unit")));
            }
        }
        let mut owned = zeros_vec(bytes.len())?;
        owned.copy_from_slice(bytes);
        let mut mask =
            Self { structure, rows, cols, bytes: owned, starts: zeros_vec(rows + 1)?, offsets: zeros_vec(rows + 1)? };
        let mut words = zeros_vec::<u64>(cols.div_ceil(64))?;
        for n in 0..rows {
            mask.row_words(n, &mut words);
            if structure == Structure::TwoOfFour {
                if let Some(k) = (0..cols).step_by(4).find(|&k| {
                    let four = (words[k / 64] >> (k % 64)) & 15;
                    four.count_ones() != kept_of(cols - k)
                }) {
                    let want = kept_of(cols - k);
                    return Err(Error::Value(format!(
                        "row {n} of a 2of4 mask keeps not {want} of the four at column {k}"
                    )));
                }
            }
            let count: usize = words.iter().map(|w| w.count_ones() as usize).sum();
            mask.starts[n + 1] = mask.starts[n] + count;
            mask.offsets[n + 1] = mask.offsets[n] + code_bytes(bits, count);
        }
        Ok(mask)
    }

    /// The structure.
    pub fn structure(&self) -> Structure {
        self.structure
    }

    /// The bits of the units, as stored.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Rows and columns of the matrix.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Kept entries of row `n`.
    pub fn kept(&self, n: usize) -> usize {
        self.starts[n + 1] - self.starts[n]
    }

    /// Kept entries in all.
    pub fn total(&self) -> usize {
        self.starts[self.rows]
    }

    /// Where the codes of row `n` begin and end.
    pub fn span(&self, n: usize) -> std::ops::Range<usize> {
        self.offsets[n]..self.offsets[n + 1]
    }

    /// Bytes of all codes.
    pub fn code_bytes(&self) -> usize {
        self.offsets[self.rows]
    }

    /// Whether unit `(i, j)` is kept.
    pub fn unit(&self, i: usize, j: usize) -> bool {
        let (_, per_row) = self.structure.mask_shape(self.rows, self.cols);
        self.bytes[i * per_row + j / 8] >> (j % 8) & 1 == 1
    }

    /// The entries of row `n` that are kept, 64 to a word.
    ///
    /// # Panics
    /// If `words` is not `ceil(K/64)` long.
    pub fn row_words(&self, n: usize, words: &mut [u64]) {
        assert_eq!(words.len(), self.cols.div_ceil(64));
        let (r, c) = self.structure.unit(self.rows, self.cols);
        let (_, per_row) = self.structure.mask_shape(self.rows, self.cols);
        let row = &self.bytes[n / r * per_row..][..per_row];
        if c == 1 {
            for (w, b) in words.iter_mut().zip(row.chunks(8)) {
                let mut word = [0; 8];
                word[..b.len()].copy_from_slice(b);
                *w = u64::from_le_bytes(word);
            }
            return;
        }
        words.fill(0);
        for j in 0..self.cols.div_ceil(c) {
            if row[j / 8] >> (j % 8) & 1 == 1 {
                set_range(words, j * c, ((j + 1) * c).min(self.cols));
            }
        }
    }
}

/// The units of a matrix that must be kept, from the entries that are not worth 0.
///
/// `nonzero(n, words)` fills the words of row `n`. Errors say how many entries do not fit.
pub(crate) fn cover(
    structure: Structure,
    rows: usize,
    cols: usize,
    nonzero: impl Fn(usize, &mut [u64]) -> Result<()>,
) -> Result<Vec<u8>> {
    let (unit_rows, per_row) = structure.mask_shape(rows, cols);
    let (r, c) = structure.unit(rows, cols);
    let mut bytes = zeros_vec::<u8>(unit_rows * per_row)?;
    let mut words = zeros_vec::<u64>(cols.div_ceil(64))?;
    let mut excess = 0;
    for n in 0..rows {
        nonzero(n, &mut words)?;
        let out = &mut bytes[n / r * per_row..][..per_row];
        match structure {
            Structure::Bitmap => store(&words, out),
            Structure::TwoOfFour => {
                excess += two_of_four(&mut words, cols);
                store(&words, out);
            }
            _ => {
                for (i, &word) in words.iter().enumerate() {
                    let mut rest = word;
                    while rest != 0 {
                        let j = (i * 64 + rest.trailing_zeros() as usize) / c;
                        out[j / 8] |= 1 << (j % 8);
                        // The unit's other entries in this word need no look.
                        let end = (j + 1) * c - i * 64;
                        rest = if end >= 64 { 0 } else { rest & (u64::MAX << end) };
                    }
                }
            }
        }
    }
    if excess > 0 {
        let s = if excess == 1 { "y is" } else { "ies are" };
        return Err(Error::Value(format!(
            "the zeros of the matrix do not fit {structure}: {excess} entr{s} in the way; see prune"
        )));
    }
    Ok(bytes)
}

fn store(words: &[u64], out: &mut [u8]) {
    for (w, b) in words.iter().zip(out.chunks_mut(8)) {
        b.copy_from_slice(&w.to_le_bytes()[..b.len()]);
    }
}

/// Fills each four up to two; returns how many entries are too many.
fn two_of_four(words: &mut [u64], cols: usize) -> usize {
    let mut excess = 0;
    for k in (0..cols).step_by(4) {
        let (word, shift, len) = (&mut words[k / 64], k % 64, 4.min(cols - k));
        let mut four = (*word >> shift) & 15;
        excess += (four.count_ones().saturating_sub(kept_of(len))) as usize;
        for t in 0..len {
            if four.count_ones() < kept_of(len) {
                four |= 1 << t;
            }
        }
        *word = (*word & !(15 << shift)) | (four << shift);
    }
    excess
}

/// Puts the entries of `kept` where the bits of `words` are set; the others are left as they are.
///
/// # Panics
/// If `kept` has fewer entries than there are bits within `out`.
pub(crate) fn scatter<T: Copy>(words: &[u64], kept: &[T], out: &mut [T]) {
    let mut at = 0;
    for (&word, part) in words.iter().zip(out.chunks_mut(64)) {
        if word == u64::MAX && part.len() == 64 {
            part.copy_from_slice(&kept[at..at + 64]);
            at += 64;
            continue;
        }
        let mut rest = word;
        while rest != 0 {
            part[rest.trailing_zeros() as usize] = kept[at];
            at += 1;
            rest &= rest - 1;
        }
    }
}

/// Puts the kept codes of row `n` from column `k0` on where they belong; dropped entries of `out` are left as they are.
pub(crate) fn spread_row(mask: &Mask, bits: u8, n: usize, codes: &[u8], k0: usize, out: &mut [u8]) {
    let mut words = vec![0; mask.cols.div_ceil(64) + 1];
    mask.row_words(n, &mut words[..mask.cols.div_ceil(64)]);
    let (first, shift) = (k0 / 64, k0 % 64);
    let low = |w: u64, count: usize| if count == 0 { 0 } else { w & (u64::MAX >> (64 - count)) };
    let before: usize = words[..first].iter().map(|w| w.count_ones() as usize).sum();
    let before = before + low(words[first], shift).count_ones() as usize;
    // Words that begin at k0, and end where `out` does.
    for i in 0..out.len().div_ceil(64) {
        let (a, b) = (words[first + i], words.get(first + i + 1).copied().unwrap_or(0));
        let word = if shift == 0 { a } else { a >> shift | b << (64 - shift) };
        words[i] = low(word, (out.len() - i * 64).min(64));
    }
    let words = &words[..out.len().div_ceil(64)];
    let mut kept = vec![0; words.iter().map(|w| w.count_ones() as usize).sum()];
    bits::unpack_from(bits, codes, before, &mut kept);
    scatter(words, &kept, out);
}

/// Checks that every kept code is legal, and bits past the last code of a row are 0.
pub(crate) fn check_codes(mask: &Mask, e: &crate::Element, codes: &[u8]) -> Result<()> {
    let mut buf = zeros_vec::<u8>(mask.cols)?;
    for n in 0..mask.rows {
        let (row, kept) = (&codes[mask.span(n)], mask.kept(n));
        let used = (kept % 8 * e.bits as usize) % 8;
        if used != 0 && row[row.len() - 1] & (!0u8 << used) != 0 {
            return Err(Error::Value(format!("row {n} of codes has padding bits that are not 0")));
        }
        if e.levels == 1 << e.bits {
            continue;
        }
        bits::unpack(e.bits, row, &mut buf[..kept]);
        if let Some(i) = buf[..kept].iter().position(|&u| u32::from(u) >= e.levels) {
            return Err(Error::Value(format!("{} has no code {}: row {n}, kept entry {i}", e.name, buf[i])));
        }
    }
    Ok(())
}

/// The entries of a row whose bits are set, in order; returns how many.
pub(crate) fn gather<T: Copy>(words: &[u64], row: &[T], out: &mut [T]) -> usize {
    let mut at = 0;
    for (&word, part) in words.iter().zip(row.chunks(64)) {
        let mut rest = word;
        while rest != 0 {
            out[at] = part[rest.trailing_zeros() as usize];
            at += 1;
            rest &= rest - 1;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words_of(rows: &[Vec<u8>]) -> impl Fn(usize, &mut [u64]) -> Result<()> + '_ {
        |n, words| {
            words.fill(0);
            rows[n].iter().enumerate().for_each(|(k, &v)| words[k / 64] |= u64::from(v != 0) << (k % 64));
            Ok(())
        }
    }

    #[test]
    fn every_structure_covers_what_is_not_zero() {
        let mut state = 1u32;
        for (rows, cols) in [(1, 1), (3, 7), (5, 64), (17, 130), (33, 200)] {
            for s in [Structure::Bitmap, Structure::Groups(5), Structure::Groups(64), Structure::Blocks(4, 6)] {
                let m: Vec<Vec<u8>> = (0..rows)
                    .map(|_| {
                        (0..cols)
                            .map(|_| {
                                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                                u8::from(state >> 28 == 0) * (1 + (state >> 20) as u8 % 3)
                            })
                            .collect()
                    })
                    .collect();
                let bytes = cover(s, rows, cols, words_of(&m)).unwrap();
                let mask = Mask::new(s, rows, cols, 4, &bytes).unwrap();
                let (r, c) = s.unit(rows, cols);
                let mut words = vec![0; cols.div_ceil(64)];
                for n in 0..rows {
                    mask.row_words(n, &mut words);
                    for k in 0..cols {
                        let (r0, k0) = (n / r * r, k / c * c);
                        let any = (r0..rows.min(r0 + r)).any(|i| (k0..cols.min(k0 + c)).any(|j| m[i][j] != 0));
                        assert_eq!(words[k / 64] >> (k % 64) & 1 == 1, any, "{s} {rows}x{cols} at ({n}, {k})");
                        assert_eq!(mask.unit(n / r, k / c), any);
                    }
                    let mut kept = vec![0; mask.kept(n)];
                    assert_eq!(gather(&words, &m[n], &mut kept), mask.kept(n));
                    let mut back = vec![0; cols];
                    scatter(&words, &kept, &mut back);
                    assert_eq!(back, m[n]);
                    assert_eq!(mask.span(n).len(), mask.kept(n).div_ceil(2));
                }
            }
        }
    }

    #[test]
    fn two_of_four_counts_what_is_in_the_way() {
        let m = vec![vec![1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1], vec![1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1]];
        let e = cover(Structure::TwoOfFour, 2, 11, words_of(&m)).unwrap_err();
        assert!(e.to_string().contains("4 entries are in the way"), "{e}");
        let bytes = cover(Structure::TwoOfFour, 1, 11, words_of(&m)).unwrap();
        // Fours with fewer entries keep their first zeros too.
        assert_eq!(bytes, [0b0011_0011, 0b0000_0101]);
        assert!(Mask::new(Structure::TwoOfFour, 1, 11, 8, &[0b0011_0111, 0b0000_0101]).is_err());
        assert!(Mask::new(Structure::TwoOfFour, 1, 11, 8, &[0b0011_0011, 0b0000_1101]).is_err());
        assert!(Mask::new(Structure::TwoOfFour, 1, 11, 8, &[0b0011_0011]).is_err());
    }
}
