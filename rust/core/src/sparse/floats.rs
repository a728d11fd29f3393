//! Panels of numbers that are not quantised: f32, f16, bf16, all of them or the kept ones.
//!
//! ```text
//! all    [panel][k][16]         numbers of 16 rows side by side
//! tiles  the same, but for blocks of 64 k that are dropped whole
//! masks  block of 64 k:  64 masks of 16 bits     bit n of mask k: row n
//!                        kept numbers of k = 0 in the order of rows, of k = 1, ...
//! slots  block of 64 k:  a slot is each row's next kept number, its first in slot 0
//!                        a byte: slots that every row fills; a byte: the others, which come after them
//!                        masks of 16 bits of the others     bit n: row n fills it
//!                        [slot] 16 bytes, where along the 64 k the number of each row belongs, then the numbers
//! ```
//!
//! Blocks are found by an offset each. Products are float32 sums as everywhere: k ascending, one accumulator per output,
//! fused multiply-adds. A number dropped by a mask is multiplied as 0. Slots and tiles leave out what is dropped, so rows of
//! activations that are not finite go another way, through dense windows.
//!
//! Masks cost a step for each k and 2 bytes, whatever is kept; slots a step for each, of which there are as many as the fullest
//! of 16 rows keeps numbers, and a byte beside each number: fewer steps and more bytes.
use super::kernel::generic::{FAR, MASKS, NEAR, NUMBERS_AHEAD};
use super::kernel::{self, FloatGemv, LaneArgs, Numbers, SparseKernels, MAX_NP};
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// Every number.
    All,
    /// Every number of the blocks that are kept, nothing of the others.
    Tiles,
    /// Masks, and the kept numbers.
    Masks,
    /// Slots of kept numbers.
    Slots,
}

impl Layout {
    /// How a block of kept numbers lies.
    fn numbers(self) -> Numbers {
        match self {
            Layout::All | Layout::Tiles => Numbers::All,
            Layout::Masks => Numbers::Masks,
            Layout::Slots => Numbers::Slots,
        }
    }

    /// Bytes of a block of numbers of `size` bytes, given the kept places of its rows.
    fn kept_bytes(self, rows: &[u64; PANEL], size: usize) -> usize {
        let kept = rows.iter().map(|w| w.count_ones() as usize).sum::<usize>();
        match self {
            Layout::All => BLOCK * PANEL * size,
            Layout::Tiles => BLOCK * PANEL * size * usize::from(kept > 0),
            Layout::Masks => MASKS + kept * size,
            Layout::Slots => {
                let (full, count) = slots(rows);
                2 + 2 * (count - full) + PANEL * count + kept * size
            }
        }
    }
}

/// Mean bytes of a block of slots up to which two levels of the cache are asked for it. Longer ones take up to 1.5 times as long
/// so (a Zen 4, measured).
const SHORT: usize = 1280;

/// Slots of a block that every row fills, and of all, given the kept places of its rows.
fn slots(rows: &[u64; PANEL]) -> (usize, usize) {
    let counts = rows.map(|r| r.count_ones() as usize);
    counts.iter().fold((BLOCK, 0), |(full, count), &c| (full.min(c), count.max(c)))
}

/// Fills `[panel][block]` with what `f` makes of the kept places of a block's rows.
fn each_block(
    q: &QView,
    g: &Geometry,
    threads: usize,
    out: &mut [usize],
    f: impl Fn(&[u64; PANEL]) -> usize + Sync,
) -> Result<()> {
    let (blocks, out) = (g.blocks(), Shared(out.as_mut_ptr()));
    pool::try_run(threads, q.rows.div_ceil(PANEL), None, |p| {
        let mut rows = Rows::new(g)?;
        rows.read(q, g, p);
        for b in 0..blocks {
            // SAFETY: the entries of panel p belong to this task.
            unsafe { *out.get().add(p * blocks + b) = f(&rows.block(b)) };
        }
        Ok(())
    })
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
    /// Share of the entries that products multiply.
    share: f64,
}

impl FloatPanels {
    /// Rearranges a matrix of plain numbers.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(q: &QView, g: &Geometry, kind: ScaleType, threads: usize) -> Result<Self> {
        let (panels, blocks, size) = (q.rows.div_ceil(PANEL), g.blocks(), kind.size());
        let mut offsets = zeros_vec::<usize>(panels * blocks + 1)?;
        let layout = match q.mask {
            None => Layout::All,
            Some(m) if TilePanels::serves(m.structure(), g) => Layout::Tiles,
            Some(_) => {
                let most = kernel::table(crate::isa::active()).most_slots;
                each_block(q, g, threads, &mut offsets, |rows| slots(rows).1)?;
                if offsets.iter().sum::<usize>() * 100 <= panels * blocks * BLOCK * most {
                    Layout::Slots
                } else {
                    Layout::Masks
                }
            }
        };
        if layout == Layout::All {
            offsets[..panels * blocks].fill(BLOCK * PANEL * size);
        } else {
            each_block(q, g, threads, &mut offsets, |rows| layout.kept_bytes(rows, size))?;
        }
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
                if !block.is_empty() {
                    let number = |n: usize, k: usize| &numbers[n * stride + (b * BLOCK + k) * size..][..size];
                    fill(block, layout, rows.block(b), number);
                }
            }
            Ok(())
        })?;
        let skipping = q.mask.filter(|_| matches!(layout, Layout::Tiles | Layout::Slots));
        let share = skipping.map_or(1.0, |m| m.total() as f64 / (q.rows * q.cols).max(1) as f64);
        Ok(Self { kind, layout, data, offsets, blocks, share })
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
        self.layout == Layout::All
    }

    /// Share of the entries that products multiply: less than 1 where dropped numbers are left out.
    pub(crate) fn share(&self) -> f64 {
        self.share
    }

    /// The kept places of a panel's rows; see [`super::Panels::words`].
    pub(crate) fn words(&self, panel: usize, words: &mut [u64]) {
        for b in 0..self.blocks {
            let block = &self.data[self.offsets[panel * self.blocks + b]..self.offsets[panel * self.blocks + b + 1]];
            let mut keep = |mask: u16, n: usize, k: usize| words[n * self.blocks + b] |= u64::from(mask >> n & 1) << k;
            match self.layout {
                Layout::All | Layout::Tiles => {
                    let kept = if block.is_empty() { 0 } else { u64::MAX };
                    (0..PANEL).for_each(|n| words[n * self.blocks + b] |= kept);
                }
                Layout::Masks => {
                    for (k, mask) in block[..MASKS].as_chunks::<2>().0.iter().enumerate() {
                        (0..PANEL).for_each(|n| keep(u16::from_le_bytes(*mask), n, k));
                    }
                }
                Layout::Slots => {
                    let (full, some) = (usize::from(block[0]), usize::from(block[1]));
                    let (masks, mut rest) = block[2..].split_at(2 * some);
                    let masks = masks.as_chunks::<2>().0.iter().map(|m| u16::from_le_bytes(*m));
                    for mask in std::iter::repeat_n(u16::MAX, full).chain(masks) {
                        let (places, numbers) = rest.split_at(PANEL);
                        (0..PANEL).for_each(|n| keep(mask, n, usize::from(places[n])));
                        rest = &numbers[mask.count_ones() as usize * self.kind.size()..];
                    }
                }
            }
        }
    }

    /// Writes a panel as f32 `[k][16]`, dropped numbers as 0.
    ///
    /// # Panics
    /// If `out` has not room for every place of K.
    pub(crate) fn window(&self, panel: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.blocks * BLOCK * PANEL);
        self.spread(kernel::table(crate::isa::active()), panel, 0, out);
    }

    /// Writes blocks of a panel from `block` on as f32 `[k][16]`, dropped numbers as 0.
    fn spread(&self, s: &SparseKernels, panel: usize, block: usize, out: &mut [f32]) {
        let f = s.floats[self.index()][self.layout.numbers() as usize];
        let count = out.len() / (BLOCK * PANEL);
        assert!(block + count <= self.blocks);
        if self.layout != Layout::Tiles {
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
        self.data.len() + self.offsets.len() * size_of::<usize>()
    }

    /// Rows up to which a product reads panels as they are.
    pub(crate) fn few_rows(&self, isa: crate::isa::Isa) -> usize {
        if self.layout == Layout::Slots {
            kernel::table(isa).lanes_from - 1
        } else {
            4
        }
    }

    /// Rows of activations side by side where more than a few, `m`, meet slots.
    pub(crate) fn lanes(&self, isa: crate::isa::Isa, m: usize) -> Option<usize> {
        (self.layout == Layout::Slots).then(|| kernel::table(isa).lanes(m).1)
    }

    /// Panels of a register tile of few rows.
    pub(crate) fn gemv_panels(&self, isa: crate::isa::Isa, mr: usize) -> usize {
        (kernel::table(isa).gemv)(self.index(), self.layout.numbers(), mr, false).1
    }

    /// `y = x @ w.T` in float32.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Interrupted`].
    pub(crate) fn matmul(&self, x: &MatRef, w: &Packed, y: &MatMut, o: &Options, b: &Blocking) -> Result<()> {
        let (t, s) = (table(o.isa), kernel::table(o.isa));
        let tiles = self.layout == Layout::Tiles;
        let finite = !(tiles || self.layout == Layout::Slots) || x.is_within(f32::MAX);
        if b.path == Path::Lanes && finite {
            return self.matmul_lanes(x, w, y, o, b);
        }
        let dense = Blocking {
            path: Path::Gemm,
            mr: t.gemm_mr,
            np: t.gemm_np,
            window: 3,
            task_rows: x.rows,
            tasks: w.panels().div_ceil(b.task_panels),
            ..*b
        };
        let b = if matches!(b.path, Path::Gemv | Path::Lanes) && !finite { &dense } else { b };
        let xs = floats(x, w, t, false, if b.path == Path::Gemm { b.mr } else { 0 }, false, b.threads)?;
        let (xs, blocks) = (&xs, self.blocks);
        let tiles = tiles && finite;
        let flat = self.keeps_all() || tiles;
        let plain = flat && self.kind == ScaleType::F32;
        let [ahead, far] = match self.layout {
            Layout::Slots if self.data.len() < SHORT * self.offsets.len() => [NEAR, FAR],
            _ if flat && streams_by_itself() => [0, 0],
            _ => [NUMBERS_AHEAD, 0],
        };
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
                    while tiles && p < np {
                        let f = (s.gemv)(self.index(), Numbers::All, mr, true).0;
                        let mut from = 0;
                        while let Some((k, n)) = self.run(p0 + p, from..blocks) {
                            let mut src = [std::ptr::null(); MAX_NP];
                            src[0] = self.at(p0 + p, k);
                            let c = cp.wrapping_add(m * ldc + p * PANEL);
                            let x = xs.at(m0 + m, k * BLOCK);
                            // SAFETY: whole blocks, existing rows.
                            unsafe { f(&FloatGemv { src, blocks: n, ahead, far: 0, x, x_stride: xs.stride, c, ldc }) };
                            from = k + n;
                        }
                        p += 1;
                    }
                    while p < np {
                        let (mut f, mut count) = (s.gemv)(self.index(), self.layout.numbers(), mr, false);
                        if p + count > np {
                            (f, count) = (s.gemv)(self.index(), self.layout.numbers(), mr, true);
                        }
                        let mut src = [std::ptr::null(); MAX_NP];
                        for (i, to) in src.iter_mut().enumerate().take(count) {
                            *to = self.at(p0 + p + i, 0);
                        }
                        let c = cp.wrapping_add(m * ldc + p * PANEL);
                        let a = FloatGemv { src, blocks, ahead, far, x: xs.at(m0 + m, 0), x_stride: xs.stride, c, ldc };
                        // SAFETY: whole panels, existing rows.
                        unsafe { f(&a) };
                        p += count;
                    }
                    m += mr;
                }
            } else {
                let span = b.window * BLOCK * PANEL;
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

    /// [`FloatPanels::matmul`] of slots and more than a few rows, all of them finite: lanes are rows of activations, so that a
    /// kept number is one multiply-add for all of them, and a dropped one none.
    fn matmul_lanes(&self, x: &MatRef, w: &Packed, y: &MatMut, o: &Options, b: &Blocking) -> Result<()> {
        let (t, s) = (table(o.isa), kernel::table(o.isa));
        let lay = s.lay[self.index()];
        let (f, lanes) = s.lanes(x.rows);
        let xs = floats(x, w, t, false, lanes, true, b.threads)?;
        let (xs, blocks) = (&xs, self.blocks);
        // Slots of a window of a panel, at most: a place and a number for each row.
        let room = b.window * BLOCK * PANEL;
        tasks(b, x.rows, w, o, |p0, np, m0, rows, scratch| {
            let ldc = np * PANEL;
            let bias = padded_bias(&mut scratch.bias, o.bias, p0, np, w.n)?;
            let to = grown(&mut scratch.weights, 2 * np * room)?.as_mut_ptr();
            let (numbers, places) = (to, to.wrapping_add(np * room).cast::<u32>());
            let tile = PANEL * lanes;
            let tiles = rows.div_ceil(lanes) * np;
            let c = grown(&mut scratch.floats, tiles * tile + ldc)?;
            let (sums, row) = c.split_at_mut(tiles * tile);
            sums.fill(0.0);
            let mut counts = zeros_vec::<usize>(np)?;
            // Slots are multiplied while they lie in the first-level cache, or, by many rows, the activations are.
            let group = if rows <= lanes { 1 } else { np };
            for window in (0..blocks).step_by(b.window) {
                let n = b.window.min(blocks - window);
                for first in (0..np).step_by(group) {
                    let last = np.min(first + group);
                    for p in first..last {
                        let (places, numbers) = (places.wrapping_add(p * room), numbers.wrapping_add(p * room));
                        // SAFETY: whole blocks of an existing panel; room for as many slots as there can be.
                        counts[p] = unsafe { lay(self.at(p0 + p, window), n, lanes, places, numbers) };
                    }
                    for (m, sums) in sums.chunks_exact_mut(np * tile).enumerate() {
                        let x = xs.at(m0 + m * lanes, window * BLOCK * lanes);
                        for p in first..last {
                            let a = LaneArgs {
                                places: places.wrapping_add(p * room),
                                numbers: numbers.wrapping_add(p * room),
                                slots: counts[p],
                                x,
                                c: sums[p * tile..].as_mut_ptr(),
                            };
                            // SAFETY: the slots that were laid out, places within the window of the activations.
                            unsafe { f(&a) };
                        }
                    }
                }
            }
            let row = &mut row[..ldc];
            for m in 0..rows {
                let sums = &sums[m / lanes * np * tile + m % lanes..];
                row.iter_mut().zip(sums.iter().step_by(lanes)).for_each(|(to, &c)| *to = c);
                finish_row(t, y, m0 + m, p0 * PANEL, row, 1.0, bias, false);
            }
            Ok(())
        })
    }
}

/// Writes a block of zeroed bytes, given the kept places of its rows and the number at row n and place k.
fn fill<'a>(block: &mut [u8], layout: Layout, mut rows: [u64; PANEL], number: impl Fn(usize, usize) -> &'a [u8]) {
    match layout {
        Layout::All | Layout::Tiles => {
            let size = block.len() / (BLOCK * PANEL);
            for (i, to) in block.chunks_exact_mut(size).enumerate() {
                to.copy_from_slice(number(i % PANEL, i / PANEL));
            }
        }
        Layout::Masks => {
            let (masks, mut rest) = block.split_at_mut(MASKS);
            for (k, mask) in masks.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let mut bits = 0u16;
                for n in (0..PANEL).filter(|&n| rows[n] >> k & 1 == 1) {
                    bits |= 1 << n;
                    rest = put(rest, number(n, k));
                }
                *mask = bits.to_le_bytes();
            }
        }
        Layout::Slots => {
            let (full, count) = slots(&rows);
            let (head, rest) = block.split_at_mut(2);
            head.copy_from_slice(&[full as u8, (count - full) as u8]);
            let (masks, mut rest) = rest.split_at_mut(2 * (count - full));
            for i in 0..count {
                let (places, mut numbers) = rest.split_at_mut(PANEL);
                let mut bits = 0u16;
                for (n, row) in rows.iter_mut().enumerate().filter(|(_, row)| **row != 0) {
                    let k = row.trailing_zeros() as usize;
                    *row &= *row - 1;
                    bits |= 1 << n;
                    places[n] = k as u8;
                    numbers = put(numbers, number(n, k));
                }
                rest = numbers;
                if i >= full {
                    masks[2 * (i - full)..][..2].copy_from_slice(&bits.to_le_bytes());
                }
            }
        }
    }
}

/// Writes a number; what lies behind it.
fn put<'a>(to: &'a mut [u8], number: &[u8]) -> &'a mut [u8] {
    let (first, rest) = to.split_at_mut(number.len());
    first.copy_from_slice(number);
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;
    use crate::quantize::{quantize, Method};
    use crate::sparse::{self, Structure};

    /// A matrix whose entry at row n and place k is kept where `keep` says so.
    fn panels(n: usize, k: usize, keep: impl Fn(usize, usize) -> bool) -> (FloatPanels, Vec<f32>) {
        let w = (0..n * k).map(|i| if keep(i / k, i % k) { i as f32 + 1.0 } else { 0.0 }).collect::<Vec<_>>();
        let dense =
            quantize(&MatRef::from_f32(&w, n, k), &Format::parse("f32").unwrap(), Method::Rtn, 1).unwrap().tensor;
        let q = sparse::pack(&dense.view(), Structure::Bitmap).unwrap();
        (FloatPanels::new(&q.view(), &Geometry::new(k, None), ScaleType::F32, 1).unwrap(), w)
    }

    #[test]
    fn few_numbers_lie_in_slots_and_come_back() {
        let (n, k) = (21, 250);
        for (kept, layout) in [(0, Layout::Slots), (10, Layout::Slots), (2, Layout::Masks), (1, Layout::Masks)] {
            let keep = |n: usize, k: usize| kept > 0 && (n * 7 + k * 3).is_multiple_of(kept);
            let (p, w) = panels(n, k, keep);
            assert_eq!(p.layout, layout, "one of {kept}");
            for panel in 0..2 {
                let mut words = [0; PANEL * 4];
                p.words(panel, &mut words);
                let mut window = vec![f32::NAN; 4 * BLOCK * PANEL];
                p.window(panel, &mut window);
                for (i, at) in (0..PANEL).flat_map(|i| (0..4 * BLOCK).map(move |at| (i, at))) {
                    let row = panel * PANEL + i;
                    let there = row < n && at < k && keep(row, at);
                    assert_eq!(words[i * 4 + at / 64] >> (at % 64) & 1 == 1, there);
                    assert_eq!(window[at * PANEL + i], if there { w[row * k + at] } else { 0.0 });
                }
            }
        }
    }
}
