//! Lists of numbers that are not quantised, where few are kept: each row's numbers and places along K, 16 rows side by side.
//!
//! ```text
//! slot   16 rows side by side, of each its next kept number (rows with fewer end in zeros)
//!   numbers  [row]
//!   index    [row]   place along K, 16 bits
//! ```
//!
//! Below a sixth, fetching the activation of each number costs less than spreading the numbers over 16 rows. What is
//! dropped is not multiplied, so rows of activations that are not finite go the other way, through dense windows.
use super::kernel::ListGemv;
use super::panels::sum_up;
use crate::buf::Buf;
use crate::error::{Error, Result};
use crate::format::ScaleType;
use crate::pack::{Geometry, Shared, PANEL};
use crate::pool;
use crate::qtensor::{zeros_vec, QView};
use crate::sparse::Mask;

/// Kept numbers, slot by slot.
#[derive(Debug)]
pub struct Lists {
    kind: ScaleType,
    numbers: Buf<u8>,
    index: Buf<u16>,
    /// Where the slots of each panel begin, and the end.
    starts: Vec<usize>,
    /// Kept numbers of each row.
    kept: Vec<u32>,
}

impl Lists {
    /// Whether lists are the better panels for a mask.
    pub fn serves(mask: &Mask, g: &Geometry) -> bool {
        let (rows, cols) = mask.shape();
        mask.total() * 6 < rows * cols && g.kp <= 1 << 16
    }

    /// Rearranges a sparse matrix of plain numbers.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(q: &QView, mask: &Mask, kind: ScaleType, threads: usize) -> Result<Self> {
        let (panels, size) = (q.rows.div_ceil(PANEL), kind.size());
        let mut kept = zeros_vec::<u32>(panels * PANEL)?;
        for (n, k) in kept.iter_mut().enumerate().take(q.rows) {
            *k = mask.kept(n) as u32;
        }
        let mut starts = zeros_vec::<usize>(panels + 1)?;
        for (s, rows) in starts.iter_mut().zip(kept.chunks_exact(PANEL)) {
            *s = rows.iter().copied().max().unwrap_or(0) as usize;
        }
        let slots = sum_up(&mut starts)?;
        let count = slots.checked_mul(PANEL).ok_or(Error::OutOfMemory(usize::MAX))?;
        let mut numbers = Buf::<u8>::zeroed(count.checked_mul(size).ok_or(Error::OutOfMemory(usize::MAX))?)?;
        let mut index = Buf::<u16>::zeroed(count)?;
        let to = (Shared(numbers.as_mut_ptr()), Shared(index.as_mut_ptr()));
        let starts_ref = &starts;
        pool::try_run(threads, panels, None, |p| {
            let mut words = zeros_vec::<u64>(q.cols.div_ceil(64))?;
            for i in 0..PANEL.min(q.rows - p * PANEL) {
                let n = p * PANEL + i;
                mask.row_words(n, &mut words);
                let mut numbers = q.row(n).chunks_exact(size);
                let mut at = starts_ref[p] * PANEL + i;
                for (b, &word) in words.iter().enumerate() {
                    let mut rest = word;
                    while rest != 0 {
                        let Some(number) = numbers.next() else { break };
                        // SAFETY: the slots of panel p belong to this task.
                        unsafe {
                            std::ptr::copy_nonoverlapping(number.as_ptr(), to.0.get().add(at * size), size);
                            *to.1.get().add(at) = (b * 64) as u16 + rest.trailing_zeros() as u16;
                        }
                        at += PANEL;
                        rest &= rest - 1;
                    }
                }
            }
            Ok(())
        })?;
        Ok(Self { kind, numbers, index, starts, kept })
    }

    /// The kept places of a panel's rows; see [`super::Panels::words`].
    pub(crate) fn words(&self, panel: usize, words: &mut [u64]) {
        let blocks = words.len() / PANEL;
        for i in 0..PANEL {
            for slot in 0..self.kept[panel * PANEL + i] as usize {
                let k = usize::from(self.index[(self.starts[panel] + slot) * PANEL + i]);
                words[i * blocks + k / 64] |= 1 << (k % 64);
            }
        }
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        self.numbers.len() + 2 * self.index.len() + 4 * self.kept.len() + self.starts.len() * size_of::<usize>()
    }

    /// The slots of a panel, for a kernel; the caller adds activations and sums.
    pub(crate) fn slots(&self, panel: usize) -> ListGemv {
        let (from, to) = (self.starts[panel] * PANEL, self.starts[panel + 1] * PANEL);
        ListGemv {
            numbers: self.numbers.as_ptr().wrapping_add(from * self.kind.size()),
            index: self.index.as_ptr().wrapping_add(from),
            slots: (to - from) / PANEL,
            x: std::ptr::null(),
            x_stride: 0,
            c: std::ptr::null_mut(),
            ldc: 0,
        }
    }

    /// Writes places `k0..k0 + out.len()/16` of a panel as f32 `[k][16]`. `next` has for each row the first of its kept
    /// numbers that is not before `k0`, and is moved on.
    pub(crate) fn window(&self, panel: usize, k0: usize, next: &mut [u32; PANEL], out: &mut [f32]) {
        match self.kind.size() {
            2 => self.spread::<2>(panel, k0, next, out),
            _ => self.spread::<4>(panel, k0, next, out),
        }
    }

    #[inline(always)]
    fn spread<const S: usize>(&self, panel: usize, k0: usize, next: &mut [u32; PANEL], out: &mut [f32]) {
        out.fill(0.0);
        let end = k0 + out.len() / PANEL;
        let from = self.starts[panel] * PANEL;
        let (index, numbers) = (&self.index[from..], &self.numbers.as_chunks::<S>().0[from..]);
        for (i, next) in next.iter_mut().enumerate() {
            let kept = self.kept[panel * PANEL + i] as usize;
            let mut slot = *next as usize;
            while slot < kept {
                let k = usize::from(index[slot * PANEL + i]);
                if k >= end {
                    break;
                }
                out[(k - k0) * PANEL + i] = self.kind.read(&numbers[slot * PANEL + i]);
                slot += 1;
            }
            *next = slot as u32;
        }
    }
}
