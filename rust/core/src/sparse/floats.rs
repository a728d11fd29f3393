//! Panels of numbers that are not quantised: f32, f16, bf16, all of them or the kept ones.
//!
//! ```text
//! all    [panel][k][16]         numbers of 16 rows side by side
//! tiles  the same, but for blocks of 64 k that are dropped whole
//! kept   block of 64 k:  64 masks of 16 bits     bit n of mask k: row n
//!                        kept numbers of k = 0 in the order of rows, of k = 1, ...
//! ```
//!
//! Blocks of kept numbers are found by an offset each. Products are float32 sums as everywhere: k ascending, one
//! accumulator per output, fused multiply-adds; a dropped number is multiplied as 0.
use super::kernel::generic::{MASKS, NUMBERS_AHEAD};
use super::kernel::{self, FloatGemv, ListGemv, SparseKernels, MAX_NP};
use super::lists::Lists;
use super::panels::{sum_up, Rows, SLACK};
use super::tiles::TilePanels;
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::format::ScaleType;
use crate::gemm::{finish_row, floats, grown, padded_bias, tasks, Options};
use crate::isa::streams_by_itself;
use crate::kernel::{table, GemmArgs};
use crate::matrix::{MatMut, MatRef};
use crate::pack::{Geometry, Packed, Shared, BLOCK, PANEL};
use crate::plan::{Blocking, Path};
use crate::pool;
use crate::qtensor::{zeros_vec, QView};

/// How numbers lie in blocks of 64 k.
#[derive(Debug)]
enum Layout {
    /// Every number.
    All,
    /// Every number of the blocks that are kept, nothing of the others.
    Tiles,
    /// Masks, and the kept numbers.
    Masks,
    /// Not in blocks: where few numbers are kept.
    Lists(Lists),
}

/// A weight of plain numbers in panels.
#[derive(Debug)]
pub struct FloatPanels {
    kind: ScaleType,
    layout: Layout,
    data: Buf<u8>,
    /// Where blocks begin: `[panel][block]`, and the end.
    offsets: Vec<usize>,
    blocks: usize,
}

impl FloatPanels {
    /// Rearranges a matrix of plain numbers.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(q: &QView, g: &Geometry, kind: ScaleType, threads: usize) -> Result<Self> {
        let (panels, blocks, size) = (q.rows.div_ceil(PANEL), g.blocks(), kind.size());
        let layout = match q.mask {
            None => Layout::All,
            Some(m) if TilePanels::serves(m.structure(), g) => Layout::Tiles,
            Some(m) if Lists::serves(m, g) => {
                let layout = Layout::Lists(Lists::new(q, m, kind, threads)?);
                return Ok(Self { kind, layout, data: Buf::zeroed(0)?, offsets: Vec::new(), blocks });
            }
            Some(_) => Layout::Masks,
        };
        let flat = !matches!(layout, Layout::Masks);
        let mut offsets = zeros_vec::<usize>(panels * blocks + 1)?;
        let out = Shared(offsets.as_mut_ptr());
        pool::try_run(threads, panels, None, |p| {
            let mut rows = Rows::new(g)?;
            rows.read(q, g, p);
            for b in 0..blocks {
                let kept = (0..PANEL).map(|n| rows.words[n * blocks + b].count_ones() as usize).sum::<usize>();
                let bytes = match layout {
                    Layout::Tiles if kept == 0 => 0,
                    Layout::Masks => MASKS + kept * size,
                    _ => BLOCK * PANEL * size,
                };
                // SAFETY: the sizes of panel p belong to this task.
                unsafe { *out.get().add(p * blocks + b) = bytes };
            }
            Ok(())
        })?;
        let total = sum_up(&mut offsets)?;
        let mut data = Buf::<u8>::zeroed(total.checked_add(SLACK).ok_or(Error::OutOfMemory(usize::MAX))?)?;
        let out = Shared(data.as_mut_ptr());
        let offsets_ref = &offsets;
        pool::try_run(threads, panels, None, |p| {
            let mut rows = Rows::new(g)?;
            rows.read(q, g, p);
            let stride = g.kp * size;
            let mut numbers = Taken::<u8>::new(PANEL * stride)?;
            numbers.fill(0);
            for i in 0..PANEL.min(q.rows - p * PANEL) {
                q.number_row(p * PANEL + i, &mut numbers[i * stride..][..g.k * size]);
            }
            for b in 0..blocks {
                let (from, to) = (offsets_ref[p * blocks + b], offsets_ref[p * blocks + b + 1]);
                // SAFETY: the blocks of panel p belong to this task.
                let block = unsafe { std::slice::from_raw_parts_mut(out.get().add(from), to - from) };
                if block.is_empty() {
                    continue;
                }
                let mut at = if flat { 0 } else { MASKS };
                for k in 0..BLOCK {
                    let mut mask = 0u16;
                    for n in 0..PANEL {
                        let kept = rows.words[n * blocks + b] >> k & 1 == 1;
                        mask |= u16::from(kept) << n;
                        if flat || kept {
                            let number = &numbers[n * stride + (b * BLOCK + k) * size..][..size];
                            block[at..at + size].copy_from_slice(number);
                            at += size;
                        }
                    }
                    if !flat {
                        block[2 * k..2 * k + 2].copy_from_slice(&mask.to_le_bytes());
                    }
                }
            }
            Ok(())
        })?;
        Ok(Self { kind, layout, data, offsets, blocks })
    }

    fn at(&self, panel: usize, block: usize) -> *const u8 {
        self.data[self.offsets[panel * self.blocks + block]..].as_ptr()
    }

    /// The first kept tiles of a panel in a range that follow each other: block and count.
    fn run(&self, panel: usize, mut blocks: std::ops::Range<usize>) -> Option<(usize, usize)> {
        let ends = &self.offsets[panel * self.blocks..];
        let keeps = |b: &usize| ends[b + 1] > ends[*b];
        let first = blocks.find(keeps)?;
        Some((first, 1 + blocks.take_while(keeps).count()))
    }

    /// The type of the numbers.
    pub(crate) fn kind(&self) -> ScaleType {
        self.kind
    }

    /// Whether no number is dropped.
    pub(crate) fn keeps_all(&self) -> bool {
        matches!(self.layout, Layout::All)
    }

    /// The kept places of a panel's rows; see [`super::Panels::words`].
    pub(crate) fn words(&self, panel: usize, words: &mut [u64]) {
        if let Layout::Lists(lists) = &self.layout {
            return lists.words(panel, words);
        }
        for b in 0..self.blocks {
            if self.is_flat() {
                let kept = if self.run(panel, b..b + 1).is_some() { u64::MAX } else { 0 };
                (0..PANEL).for_each(|n| words[n * self.blocks + b] |= kept);
                continue;
            }
            let masks = &self.data[self.offsets[panel * self.blocks + b]..][..MASKS];
            for (k, mask) in masks.as_chunks::<2>().0.iter().enumerate() {
                let mask = u16::from_le_bytes(*mask);
                (0..PANEL).for_each(|n| words[n * self.blocks + b] |= u64::from(mask >> n & 1) << k);
            }
        }
    }

    /// Writes a panel as f32 `[k][16]`, dropped numbers as 0.
    ///
    /// # Panics
    /// If `out` has not room for every place of K.
    pub(crate) fn window(&self, panel: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.blocks * BLOCK * PANEL);
        if let Layout::Lists(lists) = &self.layout {
            return lists.window(panel, 0, &mut [0; PANEL], out);
        }
        self.spread(kernel::table(crate::isa::active()), panel, 0, out);
    }

    /// Writes blocks of a panel from `block` on as f32 `[k][16]`, dropped numbers as 0.
    fn spread(&self, s: &SparseKernels, panel: usize, block: usize, out: &mut [f32]) {
        let f = s.floats[self.index()][usize::from(self.is_flat())];
        let count = out.len() / (BLOCK * PANEL);
        assert!(block + count <= self.blocks);
        if !matches!(self.layout, Layout::Tiles) {
            if count > 0 {
                // SAFETY: whole blocks of an existing panel, and room for each.
                unsafe { f(self.at(panel, block), out.as_mut_ptr(), count) };
            }
            return;
        }
        for (i, out) in out.chunks_exact_mut(BLOCK * PANEL).enumerate() {
            if self.run(panel, block + i..block + i + 1).is_some() {
                // SAFETY: as above.
                unsafe { f(self.at(panel, block + i), out.as_mut_ptr(), 1) };
            } else {
                out.fill(0.0);
            }
        }
    }

    /// Whether the numbers of a block lie without masks.
    fn is_flat(&self) -> bool {
        matches!(self.layout, Layout::All | Layout::Tiles)
    }

    fn lists(&self) -> Option<&Lists> {
        match &self.layout {
            Layout::Lists(lists) => Some(lists),
            _ => None,
        }
    }

    /// Index of the kernels' arrays.
    fn index(&self) -> usize {
        match self.kind {
            ScaleType::F16 => 1,
            ScaleType::BF16 => 2,
            _ => 0,
        }
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        let lists = self.lists().map_or(0, Lists::nbytes);
        self.data.len() + self.offsets.len() * size_of::<usize>() + lists
    }

    /// Panels of a register tile of few rows.
    pub(crate) fn gemv_panels(&self, isa: crate::isa::Isa, mr: usize) -> usize {
        if self.lists().is_some() {
            return 1;
        }
        (kernel::table(isa).gemv)(self.index(), self.is_flat(), mr, false).1
    }

    /// `y = x @ w.T` in float32.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Interrupted`].
    pub(crate) fn matmul(&self, x: &MatRef, w: &Packed, y: &MatMut, o: &Options, b: &Blocking) -> Result<()> {
        let (t, s) = (table(o.isa), kernel::table(o.isa));
        // Lists and tiles leave out what is dropped, which changes the result of rows that are not finite.
        let dense = Blocking { path: Path::Gemm, mr: t.gemm_mr, np: t.gemm_np, window: 3, ..*b };
        let tiles = matches!(self.layout, Layout::Tiles);
        let skips = tiles || (self.lists().is_some() && b.path == Path::Gemv);
        let finite = !skips || x.is_within(f32::MAX);
        let b = if b.path == Path::Gemv && !finite { &dense } else { b };
        let xs = floats(x, w, t, false, if b.path == Path::Gemm { b.mr } else { 0 }, b.threads)?;
        let (xs, blocks) = (&xs, self.blocks);
        let tiles = tiles && finite;
        let flat = self.keeps_all() || tiles;
        let plain = flat && self.kind == ScaleType::F32;
        let ahead = if flat && streams_by_itself() { 0 } else { NUMBERS_AHEAD };
        tasks(b, x.rows, w, o, |p0, np, m0, rows, scratch| {
            let ldc = np * PANEL;
            let bias = padded_bias(&mut scratch.bias, o.bias, p0, np, w.n)?;
            let c = grown(&mut scratch.floats, rows * ldc)?;
            c[..rows * ldc].fill(0.0);
            let cp = c.as_mut_ptr();
            if b.path == Path::Gemv {
                let mut m = 0;
                while m < rows {
                    let mr = match rows - m {
                        1 => 1,
                        2 | 3 => 2,
                        _ => 4,
                    }
                    .min(s.max_mr);
                    let mut p = 0;
                    if let Some(lists) = self.lists() {
                        let f = s.lists[self.index()][mr.trailing_zeros() as usize];
                        for p in 0..np {
                            let c = cp.wrapping_add(m * ldc + p * PANEL);
                            let a =
                                ListGemv { x: xs.at(m0 + m, 0), x_stride: xs.stride, c, ldc, ..lists.slots(p0 + p) };
                            // SAFETY: whole slots, existing rows, places within K.
                            unsafe { f(&a) };
                        }
                        p = np;
                    }
                    while tiles && p < np {
                        let f = (s.gemv)(self.index(), true, mr, true).0;
                        let mut from = 0;
                        while let Some((k, n)) = self.run(p0 + p, from..blocks) {
                            let mut src = [std::ptr::null(); MAX_NP];
                            src[0] = self.at(p0 + p, k);
                            let c = cp.wrapping_add(m * ldc + p * PANEL);
                            let x = xs.at(m0 + m, k * BLOCK);
                            // SAFETY: whole blocks, existing rows.
                            unsafe { f(&FloatGemv { src, blocks: n, ahead, x, x_stride: xs.stride, c, ldc }) };
                            from = k + n;
                        }
                        p += 1;
                    }
                    while p < np {
                        let (mut f, mut count) = (s.gemv)(self.index(), self.keeps_all(), mr, false);
                        if p + count > np {
                            (f, count) = (s.gemv)(self.index(), self.keeps_all(), mr, true);
                        }
                        let mut src = [std::ptr::null(); MAX_NP];
                        for (i, to) in src.iter_mut().enumerate().take(count) {
                            *to = self.at(p0 + p + i, 0);
                        }
                        let c = cp.wrapping_add(m * ldc + p * PANEL);
                        let a = FloatGemv { src, blocks, ahead, x: xs.at(m0 + m, 0), x_stride: xs.stride, c, ldc };
                        // SAFETY: whole panels, existing rows.
                        unsafe { f(&a) };
                        p += count;
                    }
                    m += mr;
                }
            } else {
                let span = b.window * BLOCK * PANEL;
                // Where each row of the lists is, window after window.
                let mut next = zeros_vec::<[u32; PANEL]>(if self.lists().is_some() { np } else { 0 })?;
                for window in (0..blocks).step_by(b.window) {
                    let end = blocks.min(window + b.window);
                    let (mut p, mut from) = (0, window);
                    while p < np {
                        let wide = !tiles && np - p >= b.np;
                        let count = if wide { b.np } else { 1 };
                        let run = if tiles {
                            self.run(p0 + p, from..end)
                        } else {
                            (from < end).then_some((from, end - from))
                        };
                        let Some((k, n)) = run else {
                            (p, from) = (p + count, window);
                            continue;
                        };
                        from = k + n;
                        let (weights, stride) = if plain {
                            (self.at(p0 + p, k).cast::<f32>(), blocks * BLOCK * PANEL)
                        } else {
                            let to = grown(&mut scratch.weights, b.np * span)?;
                            for i in 0..count {
                                if let Some(lists) = self.lists() {
                                    let to = &mut to[i * span..][..n * BLOCK * PANEL];
                                    lists.window(p0 + p + i, k * BLOCK, &mut next[p + i], to);
                                    continue;
                                }
                                self.spread(s, p0 + p + i, k, &mut to[i * span..][..n * BLOCK * PANEL]);
                            }
                            (to.as_ptr(), span)
                        };
                        let mut m = 0;
                        while m < rows {
                            let mr = (rows - m).min(b.mr);
                            let a = GemmArgs {
                                x: xs.at(m0 + m, k * BLOCK * mr),
                                w: weights,
                                panel_stride: stride,
                                k: n * BLOCK,
                                c: cp.wrapping_add(m * ldc + p * PANEL),
                                ldc,
                            };
                            // SAFETY: whole windows and existing rows.
                            unsafe { (t.gemm)(mr, !wide)(&a) };
                            m += mr;
                        }
                    }
                }
            }
            for m in 0..rows {
                finish_row(t, y, m0 + m, p0 * PANEL, &mut c[m * ldc..][..ldc], 1.0, bias, false);
            }
            Ok(())
        })
    }
}
