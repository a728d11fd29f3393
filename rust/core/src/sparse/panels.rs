//! Bitmap panels: 16 rows, blocks of 64 along K, of each register a mask of 64 bits and the codes of its kept entries.
//!
//! ```text
//! block   16 masks of 64 bits   bit 4n + j of mask r: row n, k = 4r + j (see `pack.rs` for registers)
//!         codes of register 0, in the order of the bits, 8 bits each, or 4 where a code has at most 4
//!         codes of register 1, ...                       (each register begins at a byte)
//! ```
//!
//! A product walks through a panel from its first byte to its last: where the next register's codes begin is a count of
//! bits. Blocks are found by an offset each, for products that decode a window at a time.
use super::kernel::generic::MASKS;
use super::kernel::{self, BitRaw, Fill, SparseKernels};
use super::mask::code_bytes;
use super::{Patch, Summed};
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::gemm::Region;
use crate::pack::{Geometry, Shared, BLOCK, PANEL};
use crate::plan::Path;
use crate::pool;
use crate::qtensor::{zeros_vec, QView};

/// Kernels read a register's bytes from wherever its codes begin, numbers in two halves.
pub(crate) const SLACK: usize = 128;

/// A sparse weight of codes in bitmap panels.
#[derive(Debug)]
pub struct BitPanels {
    /// Bits of a stored code: 4 or 8.
    width: usize,
    data: Buf<u8>,
    /// Where blocks begin: `[panel][block]`, and the end.
    offsets: Vec<usize>,
    blocks: usize,
}

/// The entries of 16 rows in padded places.
pub(crate) struct Rows {
    /// Kept entries, `[row][kp/64]`.
    pub words: Vec<u64>,
    natural: Vec<u64>,
    blocks: usize,
}

impl Rows {
    pub fn new(g: &Geometry) -> Result<Self> {
        Ok(Self { words: zeros_vec(PANEL * g.blocks())?, natural: zeros_vec(g.k.div_ceil(64))?, blocks: g.blocks() })
    }

    /// Reads which entries of a panel's rows are kept; all of them where nothing is dropped.
    pub fn read(&mut self, q: &QView, g: &Geometry, panel: usize) {
        self.words.fill(0);
        for i in 0..PANEL.min(q.rows - panel * PANEL) {
            match q.mask {
                Some(mask) => mask.row_words(panel * PANEL + i, &mut self.natural),
                None => self.natural.fill(u64::MAX),
            }
            let row = &mut self.words[i * self.blocks..][..self.blocks];
            if g.is_plain() {
                row[..self.natural.len()].copy_from_slice(&self.natural);
                continue;
            }
            g.runs(|k0, p0, len| {
                for t in 0..len {
                    let (k, p) = (k0 + t, p0 + t);
                    row[p / 64] |= (self.natural[k / 64] >> (k % 64) & 1) << (p % 64);
                }
            });
        }
    }

    /// The kept places of each row in a block.
    pub fn block(&self, block: usize) -> [u64; PANEL] {
        std::array::from_fn(|n| self.words[n * self.blocks + block])
    }

    /// The masks of the 16 registers of a block.
    pub fn registers(&self, block: usize) -> [u64; 16] {
        let mut out = [0; 16];
        for (n, word) in self.block(block).into_iter().enumerate() {
            for (r, m) in out.iter_mut().enumerate() {
                *m |= (word >> (4 * r) & 15) << (4 * n);
            }
        }
        out
    }
}

/// Turns sizes of parts into offsets: entry `i` is where part `i` begins, the last one the end.
pub(crate) fn sum_up(sizes: &mut [usize]) -> Result<usize> {
    let mut at = 0usize;
    for s in sizes.iter_mut() {
        let size = *s;
        *s = at;
        at = at.checked_add(size).ok_or(Error::OutOfMemory(usize::MAX))?;
    }
    Ok(at)
}

impl BitPanels {
    /// Rearranges a sparse matrix of codes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(q: &QView, g: &Geometry, threads: usize) -> Result<Self> {
        let width = if q.format.element.bits <= 4 { 4 } else { 8 };
        let (panels, blocks) = (q.rows.div_ceil(PANEL), g.blocks());
        let mut offsets = zeros_vec::<usize>(panels * blocks + 1)?;
        let out = Shared(offsets.as_mut_ptr());
        pool::try_run(threads, panels, None, |p| {
            let mut rows = Rows::new(g)?;
            rows.read(q, g, p);
            for b in 0..blocks {
                let bytes = rows.registers(b).iter().map(|m| code_bytes(width, m.count_ones() as usize)).sum::<usize>();
                // SAFETY: the sizes of panel p belong to this task.
                unsafe { *out.get().add(p * blocks + b) = MASKS + bytes };
            }
            Ok(())
        })?;
        let size = sum_up(&mut offsets)?;
        let mut data = Buf::<u8>::zeroed(size.checked_add(SLACK).ok_or(Error::OutOfMemory(usize::MAX))?)?;
        let out = Shared(data.as_mut_ptr());
        let offsets_ref = &offsets;
        pool::try_run(threads, panels, None, |p| {
            let mut rows = Rows::new(g)?;
            rows.read(q, g, p);
            let mut codes = Taken::<u8>::new(PANEL * g.kp)?;
            codes.fill(0);
            let mut flat = Taken::<u8>::new(g.k)?;
            let flat = &mut flat[..g.k];
            for i in 0..PANEL.min(q.rows - p * PANEL) {
                q.unpack_row(p * PANEL + i, 0, flat);
                let row = &mut codes[i * g.kp..][..g.kp];
                g.runs(|k0, p0, len| row[p0..p0 + len].copy_from_slice(&flat[k0..k0 + len]));
            }
            for b in 0..blocks {
                let (from, to) = (offsets_ref[p * blocks + b], offsets_ref[p * blocks + b + 1]);
                // SAFETY: the blocks of panel p belong to this task.
                let block = unsafe { std::slice::from_raw_parts_mut(out.get().add(from), to - from) };
                let (masks, mut values) = block.split_at_mut(MASKS);
                for (r, m) in rows.registers(b).into_iter().enumerate() {
                    masks[8 * r..8 * r + 8].copy_from_slice(&m.to_le_bytes());
                    let count = m.count_ones() as usize;
                    let (here, next) = values.split_at_mut(code_bytes(width, count));
                    let mut rest = m;
                    for i in 0..count {
                        let bit = rest.trailing_zeros() as usize;
                        rest &= rest - 1;
                        let u = codes[bit / 4 * g.kp + b * BLOCK + 4 * r + bit % 4];
                        if width == 4 {
                            here[i / 2] |= u << (4 * (i % 2));
                        } else {
                            here[i] = u;
                        }
                    }
                    values = next;
                }
            }
            Ok(())
        })?;
        Ok(Self { width, data, offsets, blocks })
    }

    /// Where a block begins.
    pub fn at(&self, panel: usize, block: usize) -> *const u8 {
        self.data[self.offsets[panel * self.blocks + block]..].as_ptr()
    }

    /// The kept places of a panel's rows; see [`super::Panels::words`].
    pub(crate) fn words(&self, panel: usize, words: &mut [u64]) {
        for b in 0..self.blocks {
            let masks = &self.data[self.offsets[panel * self.blocks + b]..][..MASKS];
            for (r, mask) in masks.as_chunks::<8>().0.iter().enumerate() {
                let mask = u64::from_le_bytes(*mask);
                for n in 0..PANEL {
                    words[n * self.blocks + b] |= (mask >> (4 * n) & 15) << (4 * r);
                }
            }
        }
    }

    /// Index of the kernels' arrays for the width of these codes.
    pub fn kind(&self) -> usize {
        usize::from(self.width == 8)
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        self.data.len() + self.offsets.len() * size_of::<usize>()
    }

    /// An ungrouped product of few rows straight from the panels; see [`super::Panels::raw`].
    pub(crate) fn raw(&self, a: &mut Patch<i32>) -> Option<Summed> {
        let &mut Patch { job, at: Region { p0, np, m0, rows, b0, blocks }, ref mut c, ldc } = a;
        let (w, mr) = (job.w, job.b.mr);
        let t = kernel::table(job.t.isa);
        if job.b.path == Path::Tiles || w.bytes.is_some() || !matches!(mr, 1 | 2 | 4) || mr > t.max_mr || blocks == 0 {
            return None;
        }
        let f = t.raw[self.kind()][mr.trailing_zeros() as usize];
        c.fill(0);
        for p in 0..np {
            for m in (0..rows).step_by(mr) {
                let a = BitRaw {
                    src: self.at(p0 + p, b0),
                    blocks,
                    fill: w.fill(p0 + p, b0, 0, 0),
                    prefetch: w.is_long(),
                    act: job.act.rows((m0 + m) / mr, b0),
                    c: c.as_mut_ptr().wrapping_add(m * ldc + p * PANEL),
                    ldc,
                };
                // SAFETY: whole panels and padded rows.
                unsafe { f(&a) };
            }
        }
        Some(Summed::Codes)
    }

    /// Spreads blocks of a panel to bytes.
    ///
    /// # Safety
    /// `out` has 1024 bytes for each block; the zeros of `fill` are those of the panel.
    pub(crate) unsafe fn unpack(
        &self,
        t: &SparseKernels,
        panel: usize,
        block: usize,
        blocks: usize,
        fill: &Fill,
        out: *mut u8,
    ) {
        if blocks > 0 {
            // SAFETY: whole blocks, and the slack after the last one.
            unsafe { (t.expand[self.kind()])(self.at(panel, block), out, blocks, fill) };
        }
    }
}
