//! How the kept numbers of 16 rows are dealt into slots, and where each belongs.
//!
//! ```text
//! slot   for each of 16 rows its next kept number, if that lies within the 64 places of the slot's four
//! four   the first of 64 places along K (any, but for whole 64 to follow): the next kept one of all rows
//!        64 bytes: of four slots, of 16 rows, where among the 64 places; see `place`
//!        64 numbers, 0 where a row has none
//! ```
//!
//! Rows drift apart as they are dealt, up to 64 places, so that few have none: of 20 % kept 14.8 slots hold 64 places of K,
//! where the fullest of 16 rows keeps 18.7 of every 64.
use crate::pack::{BLOCK, PANEL};

/// Slots that share a beginning.
pub(crate) const FOUR: usize = 4;
/// Bytes of four slots of numbers of `size` bytes.
pub(crate) const fn four_bytes(size: usize) -> usize {
    FOUR * PANEL * (1 + size)
}

/// A place where there is none.
const NONE: u8 = 64;

/// The byte of one of 64 places: bit 7 is the same as bit 5, a sign for which half the registers that are looked up belong to.
fn place(at: usize) -> u8 {
    (at | (at & 32) << 2) as u8
}

/// The place that a byte stands for, if any.
pub(crate) fn place_of(byte: u8) -> Option<usize> {
    (byte & NONE == 0).then_some(usize::from(byte & 63))
}

/// The kept places of 16 rows, `[row][blocks]` words of 64 bits, each row taken in order.
pub(crate) struct Kept<'a> {
    words: &'a [u64],
    blocks: usize,
    /// Of each row the word of its next place, and what is left of it.
    next: [(usize, u64); PANEL],
}

impl<'a> Kept<'a> {
    pub fn new(words: &'a [u64], blocks: usize) -> Self {
        let mut kept = Self { words, blocks, next: [(0, 0); PANEL] };
        for n in 0..PANEL {
            kept.next[n].1 = words.get(n * blocks).copied().unwrap_or(0);
            kept.settle(n);
        }
        kept
    }

    /// Goes to the next word of row n that keeps something.
    fn settle(&mut self, n: usize) {
        let (word, rest) = &mut self.next[n];
        while *rest == 0 && *word < self.blocks {
            *word += 1;
            if *word < self.blocks {
                *rest = self.words[n * self.blocks + *word];
            }
        }
    }

    /// The next place of row n, or one past all.
    pub fn peek(&self, n: usize) -> usize {
        let (word, rest) = self.next[n];
        if rest == 0 {
            usize::MAX
        } else {
            word * BLOCK + rest.trailing_zeros() as usize
        }
    }

    /// Leaves the next place of row n behind.
    pub fn skip(&mut self, n: usize) {
        self.next[n].1 &= self.next[n].1 - 1;
        self.settle(n);
    }
}

/// Four slots: where their places begin, and the bytes.
pub(crate) type Four = (usize, [[u8; PANEL]; FOUR]);

/// Deals what 16 rows keep.
pub(crate) struct Deal<'a>(Kept<'a>);

impl<'a> Deal<'a> {
    pub fn new(words: &'a [u64], blocks: usize) -> Self {
        Self(Kept::new(words, blocks))
    }
}

impl Iterator for Deal<'_> {
    type Item = Four;

    fn next(&mut self) -> Option<Four> {
        let kept = &mut self.0;
        let first = (0..PANEL).map(|n| kept.peek(n)).min().filter(|&k| k < usize::MAX)?;
        let base = first.min((kept.blocks - 1) * BLOCK);
        let mut four = [[NONE; PANEL]; FOUR];
        for slot in &mut four {
            for (n, byte) in slot.iter_mut().enumerate() {
                let k = kept.peek(n);
                if k < base + BLOCK {
                    *byte = place(k - base);
                    kept.skip(n);
                }
            }
        }
        Some((base, four))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_dealt_once_and_in_order() {
        let blocks = 5;
        for kept in [1, 2, 3, 7, 40, 301] {
            let mut words = vec![0u64; PANEL * blocks];
            // Rows that differ: the first keeps all, the last nothing.
            for n in 0..PANEL - 1 {
                for k in (0..blocks * BLOCK).filter(|k| n == 0 || (n * 11 + k * 7) % kept == 0) {
                    words[n * blocks + k / 64] |= 1 << (k % 64);
                }
            }
            let (mut seen, mut last, mut before) = (vec![0u64; words.len()], [None; PANEL], 0);
            for (base, four) in Deal::new(&words, blocks) {
                assert!(base >= before && base + BLOCK <= blocks * BLOCK);
                before = base;
                for (n, byte) in four.iter().flat_map(|slot| slot.iter().enumerate()) {
                    let Some(at) = place_of(*byte) else { continue };
                    assert_eq!(*byte >> 7, (at / 32) as u8);
                    let k = base + at;
                    assert!(last[n] < Some(k));
                    last[n] = Some(k);
                    seen[n * blocks + k / 64] |= 1 << (k % 64);
                }
            }
            assert_eq!(seen, words);
        }
        assert_eq!(Deal::new(&[], 0).count() + Deal::new(&[0; PANEL], 1).count(), 0);
    }
}
