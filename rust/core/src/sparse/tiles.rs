//! Kept tiles: where whole blocks of a panel are kept or dropped, the kept ones alone, and a list of which they are.
//!
//! A tile is a block of a dense panel, 16 rows by 64 of K, in the same order of codes. Products over their values, signed bytes, leave
//! dropped tiles out: there is no zero code to account for. Tiles of `int8` are stored as such, others become so panel by panel.
use super::kernel::{self, KeptGrouped, KeptRaw};
use super::mask::Mask;
use super::{Patch, Structure, Summed};
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::gemm::{sum_scale_ptr, IntJob, Region};
use crate::kernel::generic::IN_ORDER;
use crate::kernel::Kernels;
use crate::pack::{pack_block, Geometry, Shared, BLOCK, PANEL};
use crate::plan::Path;
use crate::pool;
use crate::qtensor::{zeros_vec, QView};

use std::ops::Range;

/// Rows of activations that meet a kept tile at a time: 32 take four tile registers. 64, which fetch a kept tile half as often and take
/// six, are hardly faster on a core whose other thread has no tiles, and slower where it has (`docs/performance.md`).
#[cfg(target_arch = "x86_64")]
const ROWS: usize = 32;

/// Codes of activations that all panels of a task meet before the next ones: half of the second-level cache.
#[cfg(target_arch = "x86_64")]
const CLOSE: usize = 1 << 20;

/// The kept tiles of a weight.
#[derive(Debug)]
pub struct TilePanels {
    bits: usize,
    /// What was taken off each code: 128 where values are stored as signed bytes.
    offset: u8,
    /// The code of 0.
    zero: u8,
    data: Buf<u8>,
    /// Blocks along K of the kept tiles, ascending within a panel.
    index: Vec<u32>,
    /// Where the tiles of each panel begin in `index`, and the end.
    starts: Vec<usize>,
    /// Whether values are signed bytes, dropped ones 0.
    summed: bool,
    /// The values of each row added up, where they are.
    sums: Vec<i32>,
}

impl TilePanels {
    /// Whether a structure drops whole tiles of panels laid out so.
    pub fn serves(structure: Structure, g: &Geometry) -> bool {
        let Structure::Blocks(r, c) = structure else { return false };
        r.is_multiple_of(PANEL as u32) && c.is_multiple_of(BLOCK as u32) && g.is_plain()
    }

    /// Rearranges a sparse matrix whose zero code is constant; see [`super::Panels::new`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(q: &QView, mask: &Mask, g: &Geometry, values: Option<&[i8; 256]>, threads: usize) -> Result<Self> {
        let zero = q.format.element.zero_code();
        let bits = usize::from(q.format.element.bits);
        let (panels, bytes) = (q.rows.div_ceil(PANEL), 128 * bits);
        let (r, c) = mask.structure().unit(q.rows, q.cols);
        let kept = |p: usize, b: usize| mask.unit(p * PANEL / r, b * BLOCK / c);
        let mut index = Vec::new();
        let mut starts = zeros_vec::<usize>(panels + 1)?;
        for p in 0..panels {
            for b in (0..g.blocks()).filter(|&b| kept(p, b)) {
                index.try_reserve(1).map_err(|_| Error::OutOfMemory(index.len()))?;
                index.push(b as u32);
            }
            starts[p + 1] = index.len();
        }
        let count = index.len();
        let offset = if bits == 8 && zero == 128 { 128 } else { 0 };
        let mut data = Buf::<u8>::zeroed(count.checked_mul(bytes).ok_or(Error::OutOfMemory(usize::MAX))?)?;
        let mut sums = zeros_vec::<i32>(if values.is_some() { panels * PANEL } else { 0 })?;
        let out_sums = Shared(sums.as_mut_ptr());
        let out = Shared(data.as_mut_ptr());
        let (index_ref, starts_ref) = (&index, &starts);
        pool::try_run(threads, panels, None, |p| {
            let mut codes = Taken::<u8>::new(PANEL * g.kp)?;
            let codes = &mut codes[..PANEL * g.kp];
            codes.fill(zero);
            for i in 0..PANEL.min(q.rows - p * PANEL) {
                let row = &mut codes[i * g.kp..][..g.k];
                q.unpack_row(p * PANEL + i, 0, row);
                if let Some(values) = values {
                    let sum = row.iter().map(|&u| i32::from(values[usize::from(u)])).fold(0, i32::wrapping_add);
                    // SAFETY: the rows of panel p belong to this task.
                    unsafe { *out_sums.get().add(p * PANEL + i) = sum };
                }
            }
            for u in codes.iter_mut() {
                *u = u.wrapping_sub(offset);
            }
            for i in starts_ref[p]..starts_ref[p + 1] {
                // SAFETY: the tiles of panel p belong to this task.
                let tile = unsafe { std::slice::from_raw_parts_mut(out.get().add(i * bytes), bytes) };
                pack_block(codes, g.kp, index_ref[i] as usize * BLOCK, bits, tile);
            }
            Ok(())
        })?;
        Ok(Self { bits, offset, zero, data, index, starts, summed: values.is_some(), sums })
    }

    /// The blocks along K of the kept tiles of a panel that lie in a range, and the first of their codes.
    pub fn kept(&self, panel: usize, blocks: Range<usize>) -> (&[u32], *const u8) {
        let all = &self.index[self.starts[panel]..self.starts[panel + 1]];
        let from = all.partition_point(|&b| (b as usize) < blocks.start);
        let to = all.partition_point(|&b| (b as usize) < blocks.end);
        (&all[from..to], self.data.as_ptr().wrapping_add((self.starts[panel] + from) * 128 * self.bits))
    }

    /// The first kept tiles of a panel in a range that follow each other: block and count.
    pub(crate) fn run(&self, panel: usize, blocks: Range<usize>) -> Option<(usize, usize)> {
        let kept = self.kept(panel, blocks).0;
        let first = *kept.first()?;
        Some((first as usize, kept.iter().zip(first..).take_while(|(b, next)| *b == next).count()))
    }

    /// The kept places of a panel's rows; see [`super::Panels::words`].
    pub(crate) fn words(&self, panel: usize, words: &mut [u64]) {
        let blocks = words.len() / PANEL;
        for &b in self.kept(panel, 0..blocks).0 {
            (0..PANEL).for_each(|n| words[n * blocks + b as usize] = u64::MAX);
        }
    }

    /// Whether stored tiles are signed bytes, to be multiplied as they are.
    fn signed(&self) -> bool {
        self.offset == 128
    }

    /// Kept tiles in all.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether no tile is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        self.data.len() + (self.index.len() + self.sums.len()) * 4 + self.starts.len() * size_of::<usize>()
    }

    /// An ungrouped product by the kept tiles alone; see [`super::Panels::raw`].
    pub(crate) fn raw(&self, a: &mut Patch<i32>) -> Option<Summed> {
        if !self.summed || !a.is_whole() {
            return None;
        }
        let (job, Region { p0, np, blocks, .. }) = (a.job, a.at);
        let mut values = self.room(p0, np).ok()?;
        #[cfg(target_arch = "x86_64")]
        if job.b.path == Path::Tiles {
            self.tiles(a, &mut values);
            return Some(Summed::Values);
        }
        let mr = job.b.mr;
        let f = kernel::table(job.t.isa).kept.get(mr.trailing_zeros() as usize).filter(|_| mr.is_power_of_two())?;
        a.each(
            &self.sums,
            self.signed() && job.prefetch() > 0,
            |p| self.values(job, p, 0..blocks, &mut values),
            |(index, tiles), rows| {
                // SAFETY: tiles lie within K, `c` has padded rows; the level is available.
                unsafe { f(&KeptRaw { index: index.as_ptr(), count: index.len(), tiles, rows }) };
            },
        );
        Some(Summed::Values)
    }

    /// A grouped product; see [`super::Panels::grouped`].
    pub(crate) fn grouped(&self, a: Patch<f32>) -> bool {
        let (w, mr, len) = (a.job.w, a.job.b.mr, a.job.segs.len);
        if !self.summed {
            return false;
        }
        #[cfg(target_arch = "x86_64")]
        if a.job.b.path == Path::Tiles {
            return self.grouped_tiles(a);
        }
        if !len.is_multiple_of(BLOCK) && !matches!(len, 16 | 32) {
            return false;
        }
        let kernels = kernel::table(a.job.t.isa).kept_grouped;
        let Some(f) = kernels.get(mr.trailing_zeros() as usize).filter(|_| mr.is_power_of_two()) else { return false };
        let Patch { job, at: Region { p0, np, m0, rows, blocks, .. }, c, ldc } = a;
        let Ok(mut values) = self.room(p0, np) else { return false };
        for p in 0..np {
            let (index, tiles) = self.values(job, p0 + p, 0..blocks, &mut values);
            for m in (0..rows).step_by(mr) {
                let a = KeptGrouped {
                    index: index.as_ptr(),
                    count: index.len(),
                    tiles,
                    len,
                    group: job.segs.group.as_ptr(),
                    scales: sum_scale_ptr(w, p0 + p),
                    act: job.act.rows((m0 + m) / mr, 0),
                    c: c.as_mut_ptr().wrapping_add(m * ldc + p * PANEL),
                    ldc,
                };
                // SAFETY: tiles lie within K, there is a scale for each group, `c` has padded rows; the level is available.
                unsafe { f(&a) };
            }
        }
        true
    }

    /// The most tiles that one of some panels keeps.
    fn most(&self, p0: usize, np: usize) -> usize {
        self.starts[p0..=p0 + np].windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0)
    }

    /// Room for the values of one of some panels, where they need it: see [`Self::values`].
    fn room(&self, p0: usize, np: usize) -> Result<Taken<u8>> {
        Taken::new(if self.signed() { 0 } else { self.most(p0, np) * 1024 })
    }

    /// The kept blocks of a panel that lie in a range along K, and their values as signed bytes: `values`, which has room for them,
    /// where they are not such already.
    fn values(&self, job: &IntJob, panel: usize, blocks: Range<usize>, values: &mut [u8]) -> (&[u32], *const u8) {
        let (index, tiles) = self.kept(panel, blocks);
        if self.signed() {
            return (index, tiles);
        }
        assert!(index.len() * 1024 <= values.len(), "no room for {} tiles", index.len());
        let (t, n, out) = (job.t, index.len(), values.as_mut_ptr());
        let sub = job.w.sum_sub() as u8;
        // SAFETY: the buffer holds the tiles, which lie one after the other; tables have 64 entries.
        unsafe {
            if let Some(bytes) = &job.w.bytes {
                (t.unpack[self.bits])(tiles, out, n, 0, 0, IN_ORDER);
                (t.look_up)(out, n, bytes.as_ptr(), sub, self.bits <= 4);
            } else {
                (t.unpack[self.bits])(tiles, out, n, 0, sub, IN_ORDER);
            }
        }
        (index, values.as_ptr())
    }

    /// As [`Self::grouped`], on tiles of the CPU: 16 rows after the other meet what is kept of a panel, which stays in the
    /// first-level cache.
    #[cfg(target_arch = "x86_64")]
    fn grouped_tiles(&self, a: Patch<f32>) -> bool {
        use super::kernel::x86::amx::{grouped, KeptSegments, Segment};
        let Patch { job, at: Region { p0, np, m0, rows, blocks, .. }, c, ldc } = a;
        let len = job.segs.len;
        // Of longer groups the dense kernel loads less for each product: from two thirds kept on it has fewer tile instructions.
        let many = len > BLOCK && 3 * self.len() > 2 * (self.starts.len() - 1) * blocks;
        if many || (!len.is_multiple_of(BLOCK) && !matches!(len, 16 | 32)) {
            return false;
        }
        let (parts, per) = ((BLOCK / len).max(1), (len / BLOCK).max(1));
        let Ok(mut values) = self.room(p0, np) else { return false };
        let Ok(mut segments) = Taken::<Segment>::new(self.most(p0, np) * parts) else { return false };
        // SAFETY: the plan chose tiles, so permission was granted; `c` has whole tiles, activations come by 16 rows.
        unsafe {
            let _tiles = crate::kernel::x86::amx::Tiles::new(len.min(BLOCK));
            for p in 0..np {
                let (index, tiles) = self.values(job, p0 + p, 0..blocks, &mut values);
                let mut count = 0;
                let groups = index.chunk_by(|a, b| a / per as u32 == b / per as u32);
                let mut first = 0;
                for group in groups {
                    let number = group[0] / per as u32 * parts as u32;
                    for part in 0..parts as u32 {
                        segments[count] = Segment { first, count: group.len() as u32, part, number: number + part };
                        count += 1;
                    }
                    first += group.len() as u32;
                }
                let kept = KeptSegments {
                    index,
                    tiles,
                    segments: &segments[..count],
                    parts,
                    scales: sum_scale_ptr(job.w, p0 + p),
                    group: job.segs.group.as_ptr(),
                };
                for m in (0..rows).step_by(16) {
                    let c = c.as_mut_ptr().wrapping_add(m * ldc + p * PANEL);
                    grouped(&kept, job.act.rows((m0 + m) / 16, 0), c, ldc);
                }
            }
        }
        true
    }

    /// As [`Self::raw`], of many rows on tiles of the CPU. All rows meet a panel before the next panel: what is kept of it stays in
    /// the first-level cache, past which the activations stream.
    #[cfg(target_arch = "x86_64")]
    fn tiles(&self, a: &mut Patch<i32>, values: &mut [u8]) {
        use super::kernel::x86::amx::{multiply, Kept};
        let &mut Patch { job, at: Region { p0, np, m0, rows, blocks, .. }, ldc, .. } = a;
        let c = a.c.as_mut_ptr();
        let passes = rows.div_ceil(ROWS);
        let window = (CLOSE / (passes * ROWS * BLOCK)).max(16);
        // SAFETY: the plan chose tiles, so permission was granted; `c` has whole tiles.
        unsafe {
            let _tiles = crate::kernel::x86::amx::Tiles::new(64);
            for k in (0..blocks).step_by(window) {
                for p in 0..np {
                    let (index, tiles) = self.values(job, p0 + p, k..blocks.min(k + window), values);
                    // Where the tiles lie that come next; after the task's last, those of the panel that follows.
                    let mut next = match p + 1 < np {
                        _ if !self.signed() => tiles,
                        true => self.kept(p0 + p + 1, k..blocks).1,
                        false if k + window < blocks => self.kept(p0, k + window..blocks).1,
                        false => tiles.wrapping_add(index.len() * 1024),
                    };
                    for m in (0..rows).step_by(ROWS) {
                        let kept = Kept {
                            index,
                            tiles,
                            a: job.act.rows((m0 + m) / 16, 0).codes,
                            a_stride: job.act.tile_stride(),
                            c: c.wrapping_add(m * ldc + p * PANEL),
                            ldc,
                            passes,
                        };
                        next = multiply(&kept, ROWS.min(rows - m).div_ceil(16), k == 0, next);
                    }
                }
            }
        }
    }

    /// Decodes blocks of a panel to bytes, dropped ones too.
    ///
    /// # Safety
    /// `out` has 1024 bytes for each block.
    pub(crate) unsafe fn unpack(
        &self,
        t: &Kernels,
        panel: usize,
        block: usize,
        blocks: usize,
        dbl: u8,
        sub: u8,
        out: *mut u8,
    ) {
        let (kept, mut src) = self.kept(panel, block..block + blocks);
        let zero = (self.zero + (self.zero & dbl)).wrapping_sub(sub);
        let mut next = kept.iter().map(|&b| b as usize - block).peekable();
        for b in 0..blocks {
            // SAFETY: the caller's buffer; a kept block has its codes.
            unsafe {
                if next.next_if_eq(&b).is_some() {
                    (t.unpack[self.bits])(src, out.add(b * 1024), 1, dbl, sub.wrapping_sub(self.offset), IN_ORDER);
                    src = src.wrapping_add(128 * self.bits);
                } else {
                    out.add(b * 1024).write_bytes(zero, 1024);
                }
            }
        }
    }
}
