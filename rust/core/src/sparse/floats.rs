//! Panels of numbers that are not quantised: f32, f16, bf16, all of them or the kept ones.
//!
//! ```text
//! all    [panel][k][16]         numbers of 16 rows side by side
//! tiles  the same, but for blocks of 64 k that are dropped whole
//! masks  block of 64 k:  64 masks of 16 bits     bit n of mask k: row n
//!                        kept numbers of k = 0 in the order of rows, of k = 1, ...
//! slots  see `slots.rs`
//! ```
//!
//! Blocks are found by an offset each, of slots those that begin in a block. Products are float32 sums as everywhere: k
//! ascending, one accumulator per output, fused multiply-adds. A number dropped by a mask is multiplied as 0. Slots and tiles
//! leave out what is dropped, so rows of activations that are not finite go another way, through dense windows.
//!
//! Masks cost a step for each k and 2 bytes, whatever is kept; slots a step for each and 16 bytes, whether rows have a number
//! there or not: fewer steps, of more bytes.
use super::kernel::generic::{FAR, MASKS, NEAR, NUMBERS_AHEAD};
use super::kernel::{self, FloatGemv, FloatRows, LaneArgs, Numbers, SlotGemv, Slots, SparseKernels, MAX_NP};
use super::panels::{sum_up, Rows, SLACK};
use super::slots::{four_bytes, place_of, Deal, FOUR};
use super::tiles::TilePanels;
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::format::ScaleType;
use crate::gemm::{few, finish_row, floats, grown, padded_bias, pieces, tasks, Options};
use crate::isa::streams_by_itself;
use crate::kernel::table;
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
    /// How a block of kept numbers lies, unless in slots.
    fn numbers(self) -> Numbers {
        if self == Layout::Masks {
            Numbers::Masks
        } else {
            Numbers::All
        }
    }
}

/// Places of K at most for slots, so that those of 64 rows side by side are counted in 32 bits.
const FARTHEST: usize = 1 << 26;

/// Bytes of the slots of 64 k of a panel up to which a Zen 4 is faster if it is asked for them, on two levels of the cache, 1.2 to
/// 1.5x; of longer ones that costs a tenth. On a Xeon it is worth up to 1.1x of any against one level, 1.3x against none (measured).
const SHORT: usize = 960;

/// Fills `[panel][block]`, a panel at a time, given its rows.
fn each_panel(
    q: &QView,
    g: &Geometry,
    threads: usize,
    out: &mut [usize],
    f: impl Fn(&Rows, &mut [usize]) + Sync,
) -> Result<()> {
    let (blocks, out) = (g.blocks(), Shared(out.as_mut_ptr()));
    pool::try_run(threads, q.rows.div_ceil(PANEL), None, |p| {
        let mut rows = Rows::new(g)?;
        rows.read(q, g, p);
        // SAFETY: the entries of panel p belong to this task.
        f(&rows, unsafe { std::slice::from_raw_parts_mut(out.get().add(p * blocks), blocks) });
        Ok(())
    })
}

/// A weight of plain numbers in panels.
#[derive(Debug)]
pub struct FloatPanels {
    kind: ScaleType,
    layout: Layout,
    data: Buf<u8>,
    /// Where the places of each four slots begin.
    bases: Buf<u32>,
    /// Where blocks begin, of slots the number of the first four that begins there: `[panel][block]`, and the end.
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
                each_panel(q, g, threads, &mut offsets, |rows, fours| {
                    Deal::new(&rows.words, blocks).for_each(|(base, _)| fours[base / BLOCK] += 1);
                })?;
                let slots = FOUR * offsets.iter().sum::<usize>();
                let most = kernel::table(crate::isa::active()).most_slots;
                if slots * 100 <= panels * blocks * BLOCK * most && g.kp <= FARTHEST {
                    Layout::Slots
                } else {
                    Layout::Masks
                }
            }
        };
        let whole = BLOCK * PANEL * size;
        match layout {
            Layout::All => offsets[..panels * blocks].fill(whole),
            Layout::Slots => {}
            Layout::Tiles | Layout::Masks => each_panel(q, g, threads, &mut offsets, |rows, bytes| {
                for (b, bytes) in bytes.iter_mut().enumerate() {
                    let kept = rows.block(b).iter().map(|w| w.count_ones() as usize).sum::<usize>();
                    *bytes = match layout.numbers() {
                        Numbers::All => whole * usize::from(kept > 0),
                        Numbers::Masks => MASKS + kept * size,
                    };
                }
            })?,
        }
        let total = sum_up(&mut offsets)?;
        let (unit, fours) = if layout == Layout::Slots { (four_bytes(size), total) } else { (1, 0) };
        let bytes = total.checked_mul(unit).and_then(|n| n.checked_add(SLACK)).ok_or(Error::OutOfMemory(usize::MAX))?;
        let (mut data, mut bases) = (Buf::<u8>::zeroed(bytes)?, Buf::<u32>::zeroed(fours)?);
        let (out, starts) = (Shared(data.as_mut_ptr()), Shared(bases.as_mut_ptr()));
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
            let number = |n: usize, k: usize| &numbers[n * stride + k * size..][..size];
            let ends = &offsets_ref[p * blocks..][..=blocks];
            // SAFETY: the bytes of panel p belong to this task.
            let part = |from: usize, to: usize| unsafe {
                std::slice::from_raw_parts_mut(out.get().add(from * unit), (to - from) * unit)
            };
            if layout == Layout::Slots {
                let fours = part(ends[0], ends[blocks]).chunks_exact_mut(unit);
                for (i, (to, (base, places))) in fours.zip(Deal::new(&rows.words, blocks)).enumerate() {
                    // SAFETY: as above; `new` has seen that K fits.
                    unsafe { *starts.get().add(ends[0] + i) = base as u32 };
                    let (bytes, to) = to.split_at_mut(FOUR * PANEL);
                    bytes.copy_from_slice(places.as_flattened());
                    for (i, to) in to.chunks_exact_mut(size).enumerate() {
                        if let Some(at) = place_of(bytes[i]) {
                            to.copy_from_slice(number(i % PANEL, base + at));
                        }
                    }
                }
                return Ok(());
            }
            for b in 0..blocks {
                let block = part(ends[b], ends[b + 1]);
                if !block.is_empty() {
                    fill(block, layout.numbers(), rows.block(b), |n, k| number(n, b * BLOCK + k));
                }
            }
            Ok(())
        })?;
        let skipping = q.mask.filter(|_| matches!(layout, Layout::Tiles | Layout::Slots));
        let share = skipping.map_or(1.0, |m| m.total() as f64 / (q.rows * q.cols).max(1) as f64);
        Ok(Self { kind, layout, data, bases, offsets, blocks, share })
    }

    /// The slots of a panel that begin in some blocks.
    fn slots(&self, panel: usize, blocks: std::ops::Range<usize>) -> Slots {
        let ends = &self.offsets[panel * self.blocks..];
        let (from, to) = (ends[blocks.start], ends[blocks.end]);
        let src = self.data[from * four_bytes(self.kind.size())..].as_ptr();
        Slots { src, bases: self.bases[from..].as_ptr(), fours: to - from }
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
        let ends = &self.offsets[panel * self.blocks..][..=self.blocks];
        if self.layout == Layout::Slots {
            let unit = four_bytes(self.kind.size());
            let fours = self.data[ends[0] * unit..ends[self.blocks] * unit].chunks_exact(unit);
            for (four, base) in fours.zip(&self.bases[ends[0]..]) {
                for (i, byte) in four[..FOUR * PANEL].iter().enumerate() {
                    if let Some(at) = place_of(*byte) {
                        let k = *base as usize + at;
                        words[i % PANEL * self.blocks + k / BLOCK] |= 1 << (k % BLOCK);
                    }
                }
            }
            return;
        }
        for b in 0..self.blocks {
            let block = &self.data[ends[b]..ends[b + 1]];
            if self.layout == Layout::Masks {
                for (k, mask) in block[..MASKS].as_chunks::<2>().0.iter().enumerate() {
                    let mask = u64::from(u16::from_le_bytes(*mask));
                    (0..PANEL).for_each(|n| words[n * self.blocks + b] |= (mask >> n & 1) << k);
                }
            } else if !block.is_empty() {
                (0..PANEL).for_each(|n| words[n * self.blocks + b] = u64::MAX);
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
        let count = out.len() / (BLOCK * PANEL);
        assert!(block + count <= self.blocks);
        if self.layout == Layout::Slots {
            // Those that begin in the block before reach into this one.
            let slots = self.slots(panel, block.saturating_sub(1)..block + count);
            // SAFETY: slots of an existing panel, and room for each block.
            unsafe { (s.spread_slots[self.index()])(&slots, block * BLOCK, out.as_mut_ptr(), count) };
            return;
        }
        let f = s.floats[self.index()][self.layout.numbers() as usize];
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
        self.data.len() + self.bases.len() * size_of::<u32>() + self.offsets.len() * size_of::<usize>()
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
        match self.layout {
            Layout::Slots => 1,
            _ => (kernel::table(isa).gemv)(self.index(), self.layout.numbers(), mr, false).1,
        }
    }

    /// `y = x @ w.T` in float32.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Interrupted`].
    pub(crate) fn matmul(&self, x: &MatRef, w: &Packed, y: &MatMut, o: &Options, b: &Blocking) -> Result<()> {
        let (t, s) = (table(o.isa), kernel::table(o.isa));
        let tiles = self.layout == Layout::Tiles;
        let finite = !(tiles || self.layout == Layout::Slots) || x.is_within(f32::MAX);
        if self.layout == Layout::Slots && finite {
            return match b.path {
                Path::Lanes => self.matmul_lanes(x, w, y, o, b),
                _ => self.matmul_slots(x, w, y, o, b),
            };
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
                    let mr = few(rows - m).min(s.max_mr);
                    let mut p = 0;
                    while tiles && p < np {
                        let f = (s.gemv)(self.index(), Numbers::All, mr, true).0;
                        let mut from = 0;
                        while let Some((k, n)) = self.run(p0 + p, from..blocks) {
                            let mut src = [std::ptr::null(); MAX_NP];
                            src[0] = self.at(p0 + p, k);
                            let c = cp.wrapping_add(m * ldc + p * PANEL);
                            let rows = FloatRows { x: xs.at(m0 + m, k * BLOCK), x_stride: xs.stride, c, ldc };
                            // SAFETY: whole blocks, existing rows.
                            unsafe { f(&FloatGemv { src, blocks: n, ahead, rows }) };
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
                        let rows = FloatRows { x: xs.at(m0 + m, 0), x_stride: xs.stride, c, ldc };
                        // SAFETY: whole panels, existing rows.
                        unsafe { f(&FloatGemv { src, blocks, ahead, rows }) };
                        p += count;
                    }
                    m += mr;
                }
            } else {
                let span = b.window * BLOCK * PANEL;
                let run = tiles.then_some(|p: usize, blocks| self.run(p0 + p, blocks));
                for window in (0..blocks).step_by(b.window) {
                    for piece in pieces(0..np, b.np, window..blocks.min(window + b.window), run.as_ref()) {
                        let (p, k) = (p0 + piece.p, piece.k);
                        let (weights, stride) = if plain {
                            (self.at(p, k).cast::<f32>(), blocks * BLOCK * PANEL)
                        } else {
                            let to = grown(&mut scratch.weights, b.np * span)?;
                            for (i, to) in to.chunks_exact_mut(span).take(piece.count).enumerate() {
                                self.spread(s, p + i, k, &mut to[..piece.blocks * BLOCK * PANEL]);
                            }
                            (to.as_ptr(), span)
                        };
                        // SAFETY: whole windows and existing rows.
                        unsafe { piece.multiply(t, xs, m0..m0 + rows, b.mr, weights, stride, cp, ldc) };
                    }
                }
            }
            for m in 0..rows {
                finish_row(t, y, m0 + m, p0 * PANEL, &mut c[m * ldc..][..ldc], 1.0, bias, false);
            }
            Ok(())
        })
    }

    /// [`FloatPanels::matmul`] of slots and a few rows, all of them finite.
    fn matmul_slots(&self, x: &MatRef, w: &Packed, y: &MatMut, o: &Options, b: &Blocking) -> Result<()> {
        let s = kernel::table(o.isa);
        let long = self.data.len() >= SHORT * self.offsets.len();
        let [ahead, far] = if long && streams_by_itself() { [0, 0] } else { [NEAR, FAR] };
        few_rows(x, w, y, o, false, b, s.max_mr, |panel, count, rows| {
            let a = SlotGemv { slots: self.slots(panel, 0..self.blocks), ahead, far, rows };
            // SAFETY: the slots of a panel, existing rows.
            unsafe { (s.slots[self.index()][count.ilog2() as usize])(&a) };
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
        // Slots that begin in a window of a panel, at most: each takes one of every row, or four in a row all that there are.
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
                        let slots = self.slots(p0 + p, window..window + n);
                        counts[p] = FOUR * slots.fours;
                        assert!(counts[p] * PANEL <= room);
                        // SAFETY: slots of an existing panel, and room for them.
                        unsafe { lay(&slots, lanes, places, numbers) };
                    }
                    for (m, sums) in sums.chunks_exact_mut(np * tile).enumerate() {
                        let x = xs.at(m0 + m * lanes, 0);
                        for p in first..last {
                            let a = LaneArgs {
                                places: places.wrapping_add(p * room),
                                numbers: numbers.wrapping_add(p * room),
                                slots: counts[p],
                                x,
                                c: sums[p * tile..].as_mut_ptr(),
                            };
                            // SAFETY: the slots that were laid out, places within the activations.
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

/// A float product of a few rows, rounded to bfloat16 if `bf16`: `f(panel, count, rows)` for a power of two of them, `most` (1 or
/// 4) or fewer, at a time.
pub(super) fn few_rows(
    x: &MatRef,
    w: &Packed,
    y: &MatMut,
    o: &Options,
    bf16: bool,
    b: &Blocking,
    most: usize,
    f: impl Fn(usize, usize, FloatRows) + Sync,
) -> Result<()> {
    let t = table(o.isa);
    let xs = &floats(x, w, t, bf16, 0, false, b.threads)?;
    tasks(b, x.rows, w, o, |p0, np, m0, rows, scratch| {
        let ldc = np * PANEL;
        let bias = padded_bias(&mut scratch.bias, o.bias, p0, np, w.n)?;
        let c = &mut grown(&mut scratch.floats, rows * ldc)?[..rows * ldc];
        c.fill(0.0);
        for p in 0..np {
            let mut m = 0;
            while m < rows {
                let mr = few(rows - m).min(most);
                let c = c[m * ldc + p * PANEL..].as_mut_ptr();
                f(p0 + p, mr, FloatRows { x: xs.at(m0 + m, 0), x_stride: xs.stride, c, ldc });
                m += mr;
            }
        }
        for m in 0..rows {
            finish_row(t, y, m0 + m, p0 * PANEL, &mut c[m * ldc..][..ldc], 1.0, bias, false);
        }
        Ok(())
    })
}

/// Writes a block of zeroed bytes, given the kept places of its rows and the number at row n and place k.
fn fill<'a>(block: &mut [u8], how: Numbers, rows: [u64; PANEL], number: impl Fn(usize, usize) -> &'a [u8]) {
    match how {
        Numbers::All => {
            let size = block.len() / (BLOCK * PANEL);
            for (i, to) in block.chunks_exact_mut(size).enumerate() {
                to.copy_from_slice(number(i % PANEL, i / PANEL));
            }
        }
        Numbers::Masks => {
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
