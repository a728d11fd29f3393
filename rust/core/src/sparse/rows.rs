//! Kept groups of 32 codes of at most 4 bits, row by row: what GQSA (arXiv 2412.17560) does for one activation row.
//!
//! ```text
//! slot   16 rows side by side, of each its next kept group (rows with fewer end in groups of zeros)
//!   codes   4 x 64 bytes       two rows of 32 values in the low halves of 64 bytes, two in the high halves: see `byte_of`
//!   index   [row]              which group of 32 along K, times 8
//!   scale   [row]              where groups of 32 have a scale each
//! ```
//!
//! A product visits kept groups alone, so its time goes with their number; rows of a panel wait for its fullest, which is
//! why pruning keeps as many groups in every row.
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
#[cfg(target_arch = "x86_64")]
use crate::gemm::{IntJob, Region};
use crate::isa::Isa;
use crate::pack::{Geometry, PanelScales, Shared, PANEL};
#[cfg(target_arch = "x86_64")]
use crate::plan::Path;
use crate::pool;
use crate::qtensor::{zeros_vec, QView};
#[cfg(target_arch = "x86_64")]
use crate::sparse::kernel::x86::bsr;
use crate::sparse::{Patch, Summed};

/// Values of a group.
pub const RUN: usize = 32;
/// Rows of activations up to which a product takes one after the other: of half of 4096 x 4096, 0.1 ms each (0.18 with scales of
/// groups) against 2.2 ms for decoding (Zen 4).
pub const DIRECT: usize = 16;
/// Bytes of a slot's codes.
const SLOT: usize = PANEL * RUN / 2;
/// Bytes that a group of activations takes in a kernel's table.
pub const ENTRY: usize = 2 * RUN;
/// What group numbers are stored times, so that an address needs no shift: 8 is the largest factor of an address.
pub const PLACE: usize = 8;

/// Where row `i` of a slot begins, and the shift of its codes within their bytes. Sums of rows come out of a kernel in
/// order: rows `r` and `r + 4` share a register, `r` and `r + 1` bytes.
fn byte_of(i: usize) -> (usize, usize) {
    (i / 8 * 128 + i % 4 / 2 * 64 + i / 4 % 2 * RUN, i % 2 * 4)
}

/// The kept groups of a weight.
#[derive(Debug)]
pub struct RowPanels {
    /// The code of 0.
    zero: u8,
    /// `[slot][256]` bytes.
    codes: Buf<u8>,
    /// `[slot][16]`, times [`PLACE`].
    index: Buf<u16>,
    /// `[slot][16]`, empty where rows have one scale.
    scales: Buf<u16>,
    /// The kept codes of each row added up, where rows have one scale.
    sums: Vec<i32>,
    /// Where the slots of each panel begin, and the end.
    starts: Vec<usize>,
    /// Kept groups of each row.
    kept: Vec<u32>,
}

/// A slot as a kernel sees it.
#[derive(Debug, Clone, Copy)]
pub struct Slots {
    /// Codes.
    pub codes: *const u8,
    /// Groups.
    pub index: *const u16,
    /// Scales or null.
    pub scales: *const u16,
    /// How many.
    pub count: usize,
}

impl RowPanels {
    /// Whether a matrix can be laid out so: its kept runs are of 32, its groups of 32 or whole rows, with f16 scales where
    /// they are 32, and no padding moves them.
    pub fn serves(q: &QView, g: &Geometry) -> bool {
        let e = q.format.element;
        let grouped = g.groups > 1;
        q.mask.is_some_and(|m| m.structure() == super::Structure::Groups(RUN as u32))
            && e.is_linear()
            && e.bits == 4
            && e.zero == crate::format::ZeroKind::None
            && g.is_plain()
            && g.kp <= 1 << 16 // sums of 16 times the codes stay within 32 bits
            && (!grouped || (g.group == RUN && q.format.scale == crate::format::ScaleType::F16))
    }

    /// Rearranges a sparse matrix.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(q: &QView, g: &Geometry, zero: u8, scales: &PanelScales, threads: usize) -> Result<Self> {
        let Some(mask) = q.mask else { return Err(Error::Unsupported("a dense matrix has no kept groups".to_owned())) };
        let panels = q.rows.div_ceil(PANEL);
        let runs = q.cols.div_ceil(RUN);
        let mut kept = zeros_vec::<u32>(panels * PANEL)?;
        for (n, k) in kept.iter_mut().enumerate().take(q.rows) {
            *k = (0..runs).filter(|&j| mask.unit(n, j)).count() as u32;
        }
        let mut starts = zeros_vec::<usize>(panels + 1)?;
        for (p, rows) in kept.chunks_exact(PANEL).enumerate() {
            starts[p + 1] = starts[p] + rows.iter().copied().max().unwrap_or(0) as usize;
        }
        let slots = starts[panels];
        let size = |each: usize| slots.checked_mul(PANEL * each).ok_or(Error::OutOfMemory(usize::MAX));
        let mut codes = Buf::<u8>::zeroed(size(SLOT / PANEL)?)?;
        let mut index = Buf::<u16>::zeroed(size(1)?)?;
        let own = match scales {
            PanelScales::F16(s) if g.groups > 1 => Some(s),
            _ => None,
        };
        let mut sums = zeros_vec::<i32>(if own.is_some() { 0 } else { kept.len() })?;
        let mut out_scales = Buf::<u16>::zeroed(if own.is_some() { size(1)? } else { 0 })?;
        codes.fill(zero * 17);
        let to = (Shared(codes.as_mut_ptr()), Shared(index.as_mut_ptr()), Shared(out_scales.as_mut_ptr()));
        let out_sums = Shared(sums.as_mut_ptr());
        let starts_ref = &starts;
        pool::try_run(threads, panels, None, |p| {
            let mut row = Taken::<u8>::new(runs * RUN)?;
            let row = &mut row[..runs * RUN];
            for i in 0..PANEL.min(q.rows - p * PANEL) {
                let n = p * PANEL + i;
                row.fill(zero);
                q.unpack_row(n, 0, &mut row[..q.cols]);
                if own.is_none() {
                    // SAFETY: the rows of panel p belong to this task.
                    unsafe { *out_sums.get().add(n) = row.iter().map(|&u| i32::from(u) - i32::from(zero)).sum() };
                }
                for (slot, j) in (0..runs).filter(|&j| mask.unit(n, j)).enumerate() {
                    let slot = starts_ref[p] + slot;
                    let (at, (byte, shift)) = (slot * PANEL + i, byte_of(i));
                    // SAFETY: the slots of panel p belong to this task.
                    unsafe {
                        for (t, &u) in row[j * RUN..][..RUN].iter().enumerate() {
                            let code = to.0.get().add(slot * SLOT + byte + t);
                            *code = *code & !(15 << shift) | u << shift;
                        }
                        *to.1.get().add(at) = (j * PLACE) as u16;
                        if let Some(s) = own {
                            *to.2.get().add(at) = s[(p * g.groups + j) * PANEL + i];
                        }
                    }
                }
            }
            Ok(())
        })?;
        Ok(Self { zero, codes, index, scales: out_scales, sums, starts, kept })
    }

    /// The slots of a panel.
    pub fn slots(&self, panel: usize) -> Slots {
        let (from, to) = (self.starts[panel], self.starts[panel + 1]);
        Slots {
            codes: self.codes.as_ptr().wrapping_add(from * SLOT),
            index: self.index.as_ptr().wrapping_add(from * PANEL),
            scales: if self.scales.is_empty() {
                std::ptr::null()
            } else {
                self.scales.as_ptr().wrapping_add(from * PANEL)
            },
            count: to - from,
        }
    }

    /// The kept places of a panel's rows; see [`super::Panels::words`].
    pub(crate) fn words(&self, panel: usize, words: &mut [u64]) {
        let blocks = words.len() / PANEL;
        for i in 0..PANEL {
            for slot in 0..self.kept[panel * PANEL + i] as usize {
                let j = usize::from(self.index[(self.starts[panel] + slot) * PANEL + i]) / PLACE;
                words[i * blocks + j / 2] |= 0xffff_ffff << (RUN * (j % 2));
            }
        }
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        let small = 2 * (self.index.len() + self.scales.len()) + 4 * (self.kept.len() + self.sums.len());
        self.codes.len() + small + self.starts.len() * size_of::<usize>()
    }

    /// Whether a level of the instruction set has kernels for one row.
    pub(crate) fn is_fast(isa: Isa) -> bool {
        isa >= Isa::Avx512Vnni
    }

    /// Whether there is a kernel for a product: one row of activations with one scale, and the instructions.
    #[cfg(target_arch = "x86_64")]
    fn serves_job(job: &IntJob) -> bool {
        job.b.path != Path::Tiles && job.b.mr == 1 && Self::is_fast(job.t.isa) && job.segs.act.is_empty()
    }

    /// An ungrouped product of one row at a time; see [`super::Panels::raw`].
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn raw(&self, a: &mut Patch<i32>) -> Option<Summed> {
        let &mut Patch { job, at: Region { p0, np, m0, rows, .. }, ldc, .. } = a;
        if !Self::serves_job(job) || !a.is_whole() || !self.scales.is_empty() {
            return None;
        }
        let groups = job.w.geometry.kp / RUN;
        let Ok(mut table) = Taken::<u8>::new(groups * RUN) else { return None };
        // The CPUs that gain by it have tiles.
        let product = if Isa::Amx.is_available() { bsr::raw::<4> } else { bsr::raw::<1> };
        a.c.fill(0);
        for m in 0..rows {
            // SAFETY: the row has codes for every place of K, the table an entry for every group; `serves_job` saw the level.
            unsafe { bsr::unsigned(job.act.rows(m0 + m, 0).codes, groups, table.as_mut_ptr()) };
            for (p, c) in a.c[m * ldc..][..np * PANEL].chunks_exact_mut(PANEL).enumerate() {
                let sums = self.sums[(p0 + p) * PANEL..][..PANEL].as_ptr();
                // SAFETY: whole slots, entries of every group, and the instructions of the level.
                unsafe { product(&self.slots(p0 + p), table.as_ptr(), sums, c.as_mut_ptr()) };
            }
        }
        Some(Summed::Values)
    }

    /// A grouped product of one row at a time; see [`super::Panels::grouped`].
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn grouped(&self, a: Patch<f32>) -> bool {
        let Patch { job, at: Region { p0, np, m0, rows, .. }, c, ldc } = a;
        if !Self::serves_job(job) || self.scales.is_empty() {
            return false;
        }
        let groups = job.w.geometry.kp / RUN;
        let Ok(mut table) = Taken::<u8>::new(groups * ENTRY) else { return false };
        for m in 0..rows {
            // SAFETY: as above.
            unsafe { bsr::entries(job.act.rows(m0 + m, 0).codes, groups, self.zero, table.as_mut_ptr()) };
            for (p, c) in c[m * ldc..][..np * PANEL].chunks_exact_mut(PANEL).enumerate() {
                // SAFETY: as above; there is a scale for each group of a slot.
                unsafe { bsr::grouped(&self.slots(p0 + p), table.as_ptr(), c.as_mut_ptr()) };
            }
        }
        true
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn raw(&self, _: &mut Patch<i32>) -> Option<Summed> {
        None
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn grouped(&self, _: Patch<f32>) -> bool {
        false
    }

    /// Decodes blocks of a panel to bytes less `sub`, at most 128, dropped groups too.
    ///
    /// # Safety
    /// `out` has 1024 bytes for each block.
    pub(crate) unsafe fn unpack(&self, panel: usize, block: usize, blocks: usize, sub: u8, out: *mut u8) {
        const CODES: u64 = 0x0f0f_0f0f_0f0f_0f0f;
        const TOP: u64 = 0x8080_8080_8080_8080;
        // SAFETY: the caller's buffer.
        let out = unsafe { std::slice::from_raw_parts_mut(out, blocks * 1024) };
        out.fill(self.zero.wrapping_sub(sub));
        // Fours of places, `[group][4 of its 32 places][row]`.
        let fours = out.as_chunks_mut::<4>().0;
        let (first, last) = (2 * block, 2 * (block + blocks));
        let slots = self.starts[panel]..self.starts[panel + 1];
        let index = self.index[slots.start * PANEL..slots.end * PANEL].as_chunks::<PANEL>().0;
        let codes = self.codes[slots.start * SLOT..slots.end * SLOT].as_chunks::<SLOT>().0;
        let sub = u64::from_ne_bytes([sub; 8]);
        for i in 0..PANEL {
            let kept = self.kept[panel * PANEL + i] as usize;
            if kept == 0 {
                continue;
            }
            let group = |slot: usize| usize::from(index[slot][i]) / PLACE;
            let (byte, shift) = byte_of(i);
            // A row that keeps groups evenly is found at once.
            let mut slot = kept * first / (group(kept - 1) + 1).max(first);
            while slot > 0 && group(slot - 1) >= first {
                slot -= 1;
            }
            for slot in slot..kept {
                let j = group(slot);
                if j < first {
                    continue;
                }
                if j >= last {
                    break;
                }
                let to = &mut fours[(j - first) * RUN / 4 * PANEL..][..RUN / 4 * PANEL];
                let from = codes[slot][byte..byte + RUN].as_chunks::<8>().0;
                for (eight, to) in from.iter().zip(to.as_chunks_mut::<{ 2 * PANEL }>().0) {
                    let u = u64::from_le_bytes(*eight) >> shift & CODES;
                    let [a, b, c, d, e, f, g, h] = (((u | TOP) - sub) ^ TOP).to_le_bytes();
                    (to[i], to[PANEL + i]) = ([a, b, c, d], [e, f, g, h]);
                }
            }
        }
    }
}
