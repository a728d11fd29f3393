//! Kept bytes of which few are kept: instead of a bit for every place, a step from each to the next.
//!
//! ```text
//! entry   a step of 1 to 15 places from where the row was, and the signed byte there: 0 where the step is too short to reach a
//!         kept one. A step of 0 and a 0: nothing
//! four    for each of 16 rows its next four entries, if they lie within the 64 places of the four
//! pair    64 bytes: the steps of a four, `[row][4]`, in the lower halves, of the next in the upper ones
//!         64 bytes of either
//! bases   of each four the first of its 64 places along K (any, but for whole 64 to follow)
//! ```
//!
//! Products walk through a panel from its first pair to its last; decoding begins at any fourth block, where a mark says with which
//! pair, and where the rows are then. The order in which integers are added does not matter.
//!
//! A register of a bitmap costs its 64 places three operations of the one port of Intel's CPUs that moves bytes across lanes,
//! however few it keeps; four entries of each row cost three too: at 20 % kept that is 3.8 times for 64 places of K, not 16.
use super::floats::few_rows;
use super::kernel::generic::MASKS;
use super::kernel::{GapFloat, GapRaw, Pairs};
use super::panels::{sum_up, Rows};
use super::slots::Kept;
use super::{Mask, Patch, Summed};
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::format::ValueMap;
use crate::gemm::Options;
use crate::isa::Isa;
use crate::matrix::{MatMut, MatRef};
use crate::pack::{Geometry, Packed, Shared, BLOCK, PANEL};
use crate::plan::{Blocking, Path};
use crate::pool;
use crate::qtensor::{zeros_vec, QView};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Blocks from one mark to the next.
pub(crate) const MARK: usize = 4;
/// Blocks that are spread at a time.
pub(crate) const MOST_BLOCKS: usize = 16;
/// Bytes of a pair.
const PAIR: usize = 192;
/// The longest step.
const LONGEST: usize = 15;
/// The code of 0.
const ZERO: u8 = 128;
/// Of a hundred bytes of a bitmap, as many as these panels may take instead: where more is kept the bitmap is as fast.
const MOST: usize = 122;

/// How to begin at a block: the first pair of the panel that reaches it, and how far beyond the block's first place each row is then.
#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    pair: u32,
    at: [i16; PANEL],
}

/// A weight of signed bytes, one scale a row.
#[derive(Debug)]
pub struct GapPanels {
    data: Buf<u8>,
    bases: Buf<u32>,
    /// The first pair of each panel, and the end.
    starts: Vec<usize>,
    /// `[panel][blocks / MARK]`
    marks: Vec<Mark>,
    blocks: usize,
    /// The values of each row added up.
    sums: Vec<i32>,
}

/// Entries of a four: where its places begin, steps, and places.
type Four = (usize, [[u8; 4]; PANEL], [[usize; 4]; PANEL]);

/// Deals the kept places of a panel to fours.
struct Deal<'a> {
    kept: Kept<'a>,
    blocks: usize,
    /// Where each row is, plus 1.
    at: [usize; PANEL],
}

impl<'a> Deal<'a> {
    fn new(words: &'a [u64], blocks: usize) -> Self {
        Self { kept: Kept::new(words, blocks), blocks, at: [0; PANEL] }
    }

    /// Where the next entry of row n lies.
    fn peek(&self, n: usize) -> Option<usize> {
        let kept = self.kept.peek(n);
        (kept < usize::MAX).then(|| kept.min(self.at[n] + LONGEST - 1))
    }
}

impl Iterator for Deal<'_> {
    type Item = Four;

    fn next(&mut self) -> Option<Four> {
        let first = (0..PANEL).filter_map(|n| self.peek(n)).min()?;
        let base = first.min((self.blocks - 1) * BLOCK);
        let (mut steps, mut places) = ([[0; 4]; PANEL], [[usize::MAX; 4]; PANEL]);
        for n in 0..PANEL {
            for i in 0..4 {
                let Some(k) = self.peek(n).filter(|&k| k < base + BLOCK) else { break };
                steps[n][i] = (k + 1 - self.at[n]) as u8;
                self.at[n] = k + 1;
                if self.kept.peek(n) == k {
                    places[n][i] = k;
                    self.kept.skip(n);
                }
            }
        }
        Some((base, steps, places))
    }
}

impl GapPanels {
    /// Rearranges a sparse matrix, if these panels suit it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(q: &QView, g: &Geometry, threads: usize) -> Result<Option<Self>> {
        let e = q.format.element;
        let plain = matches!(e.map, ValueMap::Affine { mul: 1, .. }) && e.bits == 8 && e.zero_code() == ZERO;
        let fits = g.is_plain() && g.groups <= 1 && u32::try_from(g.kp).is_ok();
        if !plain || !fits || kernel(crate::isa::active(), 1).is_none() {
            return Ok(None);
        }
        let (panels, blocks) = (q.rows.div_ceil(PANEL), g.blocks());
        let kept = q.mask.map_or(usize::MAX, Mask::total);
        let most = kept.saturating_add(panels * blocks * MASKS).saturating_mul(MOST);
        // Entries take a byte and a half at least: no need to count them where so many are kept.
        if kept.saturating_mul(150) > most {
            return Ok(None);
        }
        let mut starts = zeros_vec::<usize>(panels + 1)?;
        let out = Shared(starts.as_mut_ptr());
        pool::try_run(threads, panels, None, |p| {
            let mut rows = Rows::new(g)?;
            rows.read(q, g, p);
            // SAFETY: the entry of panel p belongs to this task.
            unsafe { *out.get().add(p) = Deal::new(&rows.words, blocks).count().div_ceil(2) };
            Ok(())
        })?;
        let pairs = sum_up(&mut starts)?;
        if pairs.saturating_mul((PAIR + 8) * 100) > most {
            return Ok(None);
        }
        let per_panel = blocks.div_ceil(MARK);
        let mut data = Buf::<u8>::zeroed(pairs.checked_mul(PAIR).ok_or(Error::OutOfMemory(usize::MAX))?)?;
        let (mut bases, mut sums) = (Buf::<u32>::zeroed(2 * pairs)?, zeros_vec::<i32>(panels * PANEL)?);
        let mut marks = zeros_vec::<Mark>(panels * per_panel)?;
        let (out, out_bases, out_sums, out_marks) = (
            Shared(data.as_mut_ptr()),
            Shared(bases.as_mut_ptr()),
            Shared(sums.as_mut_ptr()),
            Shared(marks.as_mut_ptr()),
        );
        let (starts_ref, zeros) = (&starts, AtomicBool::new(false));
        pool::try_run(threads, panels, None, |p| {
            let mut rows = Rows::new(g)?;
            rows.read(q, g, p);
            let mut codes = Taken::<u8>::new(PANEL * g.kp)?;
            for i in 0..PANEL.min(q.rows - p * PANEL) {
                let row = &mut codes[i * g.kp..][..g.k];
                q.unpack_row(p * PANEL + i, 0, row);
                let sum = row.iter().map(|&u| i32::from(u) - i32::from(ZERO)).fold(0, i32::wrapping_add);
                // SAFETY: the rows of panel p belong to this task.
                unsafe { *out_sums.get().add(p * PANEL + i) = sum };
            }
            let (from, count) = (starts_ref[p], starts_ref[p + 1] - starts_ref[p]);
            // SAFETY: the pairs and marks of panel p belong to this task.
            let (pairs, bases, marks) = unsafe {
                (
                    std::slice::from_raw_parts_mut(out.get().add(from * PAIR), count * PAIR),
                    std::slice::from_raw_parts_mut(out_bases.get().add(2 * from), 2 * count),
                    std::slice::from_raw_parts_mut(out_marks.get().add(p * per_panel), per_panel),
                )
            };
            // Where a four that is missing begins: after all others.
            bases.fill(((blocks.max(1) - 1) * BLOCK) as u32);
            let (mut deal, mut before, mut marked) = (Deal::new(&rows.words, blocks), [0; PANEL], 0);
            for i in 0.. {
                if i % 2 == 0 {
                    before = deal.at;
                }
                let Some((base, steps, places)) = deal.next() else { break };
                while marked < per_panel && base + BLOCK > marked * MARK * BLOCK {
                    marks[marked] = Mark { pair: (i / 2) as u32, at: before.map(|at| beyond(at, marked * MARK)) };
                    marked += 1;
                }
                let (pair, second) = (&mut pairs[i / 2 * PAIR..][..PAIR], i % 2);
                bases[i] = base as u32;
                for n in 0..PANEL {
                    for j in 0..4 {
                        pair[4 * n + j] |= steps[n][j] << (4 * second);
                        if places[n][j] != usize::MAX {
                            let code = codes[n * g.kp + places[n][j]];
                            if code == ZERO {
                                zeros.store(true, Ordering::Relaxed);
                            }
                            pair[64 + 64 * second + 4 * n + j] = code.wrapping_sub(ZERO);
                        }
                    }
                }
            }
            marks[marked..].fill(Mark { pair: count as u32, at: [0; PANEL] });
            Ok(())
        })?;
        // A kept 0 looks like none.
        if zeros.into_inner() {
            return Ok(None);
        }
        Ok(Some(Self { data, bases, starts, marks, blocks, sums }))
    }

    /// The entries of a panel from one of its pairs on.
    fn pairs(&self, panel: usize, first: usize) -> Pairs {
        let (src, bases) = (self.data[first * PAIR..].as_ptr(), self.bases[2 * first..].as_ptr());
        Pairs { src, bases, count: self.starts[panel + 1] - first }
    }

    /// The first pair that reaches a block, and how far beyond the block's first place each row is then.
    fn begin(&self, panel: usize, block: usize) -> (usize, [i16; PANEL]) {
        let mark = &self.marks[panel * self.blocks.div_ceil(MARK) + block / MARK];
        let at = mark.at.map(|at| at.saturating_sub((block % MARK * BLOCK) as i16));
        (self.starts[panel] + mark.pair as usize, at)
    }

    /// Calls `f` with row, place from the first block on, and value of every entry of these blocks of a panel that is one.
    fn each(&self, panel: usize, blocks: Range<usize>, mut f: impl FnMut(usize, usize, u8)) {
        if blocks.is_empty() {
            return;
        }
        let (first, at) = self.begin(panel, blocks.start);
        let mut places = at.map(isize::from);
        for i in first..self.starts[panel + 1] {
            if self.bases[2 * i] as usize >= blocks.end * BLOCK {
                break;
            }
            let (steps, codes) = self.data[i * PAIR..(i + 1) * PAIR].split_at(64);
            for (shift, codes) in [0, 4].into_iter().zip(codes.as_chunks::<64>().0) {
                for (i, (step, code)) in steps.iter().zip(codes).enumerate() {
                    let place = &mut places[i / 4];
                    *place += isize::from(step >> shift & 15);
                    let k = (*place - 1).cast_unsigned();
                    if *code != 0 && k < blocks.len() * BLOCK {
                        f(i / 4, k, *code);
                    }
                }
            }
        }
    }

    /// The kept places of a panel's rows; see [`super::Panels::words`].
    pub(crate) fn words(&self, panel: usize, words: &mut [u64]) {
        self.each(panel, 0..self.blocks, |n, k, _| words[n * self.blocks + k / BLOCK] |= 1 << (k % BLOCK));
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        self.data.len()
            + size_of_val(&*self.bases)
            + size_of_val(&*self.starts)
            + size_of_val(&*self.marks)
            + size_of_val(&*self.sums)
    }

    /// An ungrouped product of few rows straight from the panels; see [`super::Panels::raw`].
    pub(crate) fn raw(&self, a: &mut Patch<i32>) -> Option<Summed> {
        let f = kernel(a.job.t.isa, a.job.b.mr).filter(|_| a.is_whole() && a.job.b.path != Path::Tiles)?;
        a.each(
            &self.sums,
            true,
            |p| self.pairs(p, self.starts[p]),
            |pairs, rows| {
                // SAFETY: the pairs of a panel, whose places lie within K; `c` has padded rows; the level is available.
                unsafe { f(&GapRaw { pairs, rows }) };
            },
        );
        Some(Summed::Values)
    }

    /// Rows that float products take straight from the panels, at most, where there are kernels for it.
    pub(crate) fn few_rows(isa: Isa, bf16: bool) -> Option<usize> {
        float_kernels(isa, bf16).map(|_| 16)
    }

    /// `y = x @ w.T` in float32 of a few rows straight from the panels, where that is possible.
    pub(crate) fn matmul(
        &self,
        x: &MatRef,
        w: &Packed,
        y: &MatMut,
        o: &Options,
        bf16: bool,
        b: &Blocking,
    ) -> Option<Result<()>> {
        let kernels = float_kernels(o.isa, bf16)?;
        let most = if bf16 { half::bf16::MAX.to_f32() } else { f32::MAX };
        if b.path != Path::Gemv || w.tensor != 1.0 || w.step != 1.0 || !x.is_within(most) {
            return None;
        }
        Some(few_rows(x, w, y, o, bf16, b, 4, |p, count, rows| {
            let mut scales = [0.0; PANEL];
            w.scales.read(p * PANEL, &mut scales);
            let a = GapFloat { pairs: self.pairs(p, self.starts[p]), scales: scales.as_ptr(), rows };
            // SAFETY: the pairs of a panel, whose places lie within K, existing rows; the level is available.
            unsafe { kernels[count.ilog2() as usize](&a) };
        }))
    }

    /// Decodes blocks of a panel to bytes, dropped ones too, `sub` less than their codes.
    ///
    /// # Safety
    /// `out` has 1024 bytes for each block.
    pub(crate) unsafe fn unpack(&self, isa: Isa, panel: usize, block: usize, blocks: usize, sub: u8, out: *mut u8) {
        // SAFETY: the caller's buffer.
        let out = unsafe { std::slice::from_raw_parts_mut(out, blocks * 1024) };
        let add = ZERO.wrapping_sub(sub);
        #[cfg(target_arch = "x86_64")]
        if let Some(f) = super::kernel::x86::gaps::spreads(isa) {
            let mut bytes = std::mem::MaybeUninit::<super::kernel::x86::gaps::Bytes>::uninit();
            let bytes = bytes.as_mut_ptr();
            for (i, out) in out.chunks_mut(MOST_BLOCKS * 1024).enumerate() {
                let (from, n) = (block + i * MOST_BLOCKS, out.len() / 1024);
                let (first, at) = self.begin(panel, from);
                let pairs = self.pairs(panel, first);
                // SAFETY: the pairs of a panel from those of the first block on, room for the blocks; the level is available.
                unsafe {
                    bytes.cast::<u8>().write_bytes(add, out.len());
                    f(&pairs, from..from + n, &at, add, bytes);
                    out.as_mut_ptr().copy_from_nonoverlapping(bytes.cast(), out.len());
                }
            }
            return;
        }
        out.fill(add);
        self.each(panel, block..block + blocks, |n, k, code| out[k / 4 * 64 + 4 * n + k % 4] = code.wrapping_add(add));
    }
}

/// How far a place lies beyond the first one of a block, as far as that can be told.
fn beyond(at: usize, block: usize) -> i16 {
    (at as isize - (block * BLOCK) as isize).clamp(i16::MIN.into(), i16::MAX.into()) as i16
}

/// The float kernels of 1, 2 and 4 rows, where the level has them.
fn float_kernels(isa: Isa, bf16: bool) -> Option<[super::kernel::GapFloatFn; 3]> {
    #[cfg(target_arch = "x86_64")]
    return super::kernel::x86::gaps::float(isa, bf16);
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (isa, bf16);
        None
    }
}

/// The kernel of `mr` rows, where the level has one.
fn kernel(isa: Isa, mr: usize) -> Option<super::kernel::GapRawFn> {
    #[cfg(target_arch = "x86_64")]
    return super::kernel::x86::gaps::kernel(isa, mr);
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (isa, mr);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;
    use crate::quantize::{quantize, Method};
    use crate::sparse::{self, Structure};

    fn panels(n: usize, k: usize, keep: impl Fn(usize, usize) -> bool) -> (Option<GapPanels>, Vec<u8>) {
        let value = |i: usize| if keep(i / k, i % k) { 1.0 - 2.0 * ((i % 2) as f32) } else { 0.0 };
        let w = (0..n * k).map(value).collect::<Vec<_>>();
        let dense =
            quantize(&MatRef::from_f32(&w, n, k), &Format::parse("int8").unwrap(), Method::Rtn, 1).unwrap().tensor;
        let codes = (0..n).flat_map(|i| {
            let mut row = vec![0; k];
            dense.view().unpack_row(i, 0, &mut row);
            row
        });
        let codes = codes.collect();
        let q = sparse::pack(&dense.view(), Structure::Bitmap).unwrap();
        (GapPanels::new(&q.view(), &Geometry::new(k, None), 2).unwrap(), codes)
    }

    #[test]
    fn entries_come_back() {
        if kernel(crate::isa::active(), 1).is_none() {
            return;
        }
        let patterns: [fn(usize, usize) -> bool; 6] = [
            |n, k| (n * 7 + k * 3).is_multiple_of(10),
            // Steps that are just long enough and just too long.
            |n, k| k.is_multiple_of(15 + usize::from(n % 8 == 0)),
            // One row far ahead of the others; a row of nothing.
            |n, k| (n == 3 && k < 60) || (n != 5 && k % 1024 > 1000),
            // Rows far behind the others: what leads them there are 0s.
            |n, k| (k + n % 2).is_multiple_of(1024),
            |_, _| false,
            |n, k| n == 0 && k == 0,
        ];
        for (n, k) in [(21, 2240), (16, 64), (1, 1024), (33, 1100)] {
            for (i, keep) in patterns.into_iter().enumerate() {
                let (p, codes) = panels(n, k, keep);
                // A pair is more than the masks of a single block, entries of one row more than its bits.
                let Some(p) = p else {
                    assert!((k == 64 && i > 0) || (n == 1 && i < 2), "pattern {i} of {n}x{k} lies in another way");
                    continue;
                };
                let blocks = k.div_ceil(BLOCK);
                for panel in 0..n.div_ceil(PANEL) {
                    let mut words = vec![0; PANEL * blocks];
                    p.words(panel, &mut words);
                    let parts = [(0, blocks), (blocks / 2, blocks - blocks / 2), (blocks - 1, 1)];
                    let levels = [Isa::Scalar, crate::isa::active()];
                    for ((from, count), isa) in parts.into_iter().flat_map(|p| levels.map(|isa| (p, isa))) {
                        let mut out = vec![0u8; count * 1024];
                        // SAFETY: room for every block.
                        unsafe { p.unpack(isa, panel, from, count, 1, out.as_mut_ptr()) };
                        for (row, at) in (0..PANEL).flat_map(|r| (0..count * BLOCK).map(move |at| (r, at))) {
                            let (wide, place) = (panel * PANEL + row, from * BLOCK + at);
                            let inside = wide < n && place < k;
                            let code = if inside { codes[wide * k + place] } else { ZERO };
                            assert_eq!(out[at / 4 * 64 + 4 * row + at % 4], code - 1, "pattern {i} of {n}x{k}");
                            let kept = words[row * blocks + place / BLOCK] >> (place % BLOCK) & 1 == 1;
                            assert_eq!(kept, inside && keep(wide, place), "pattern {i} of {n}x{k}");
                        }
                    }
                }
            }
        }
        assert!(panels(16, 256, |n, k| (n + k) % 2 == 0).0.is_none());
    }
}
