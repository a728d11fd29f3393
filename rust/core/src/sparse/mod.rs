//! Sparse weights: stored as kept entries and a mask, multiplied as dense (Flash-LLM's idea, arXiv 2309.10285).
//!
//! * [`Structure`] says in which units entries are kept; it is the last suffix of a format's name.
//! * [`mask`] is the portable layout: which entries are kept, and codes of those alone.
//! * [`panels`], [`floats`], [`rows`] and [`tiles`] are the rearrangements for the kernels.
//! * [`columns`] holds a weight by columns, for activations that are mostly zero or mostly unchanged.
//!
//! A dropped entry is worth what the code of 0 decodes to. A sparse matrix is thus a dense one written shorter: every
//! product equals that of the dense format bit for bit for finite activations, -0 and +0 compared as equal.
pub mod columns;
pub mod convert;
pub mod floats;
pub mod gaps;
pub mod kernel;
pub mod mask;
pub mod panels;
mod restore;
pub mod rows;
mod slots;
pub mod tiles;

pub use convert::{pack, unpack};
pub use mask::Mask;

use crate::error::Result;
use crate::gemm::{IntJob, Region};
use crate::isa::Isa;
use crate::kernel::Kernels;
use crate::pack::{Geometry, PanelScales, PANEL};
use crate::qtensor::QView;
use kernel::{Fill, ValueRows};

use std::fmt;

/// The units in which entries are kept or dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Structure {
    /// Each entry by itself.
    Bitmap,
    /// Two of every four entries along K.
    TwoOfFour,
    /// Runs of so many entries along K, as quantised groups are (GQSA, arXiv 2412.17560).
    Groups(u32),
    /// Blocks of so many rows and columns.
    Blocks(u32, u32),
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bitmap => f.write_str("bitmap"),
            Self::TwoOfFour => f.write_str("2of4"),
            Self::Groups(g) => write!(f, "bsr{g}"),
            Self::Blocks(r, c) => write!(f, "block{r}x{c}"),
        }
    }
}

impl Structure {
    /// The structure that a suffix names; `None` where it names none, the inner `None` where its lengths are not
    /// numbers from 1 on.
    pub fn parse(suffix: &str) -> Option<Option<Self>> {
        let length = |s: &str| {
            let plain = !s.is_empty() && !s.starts_with('0') && s.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| s.parse::<u32>().ok()).flatten()
        };
        match suffix {
            "bitmap" => Some(Some(Self::Bitmap)),
            "2of4" => Some(Some(Self::TwoOfFour)),
            _ => {
                if let Some(g) = suffix.strip_prefix("bsr") {
                    return Some(length(g).map(Self::Groups));
                }
                let sides = suffix.strip_prefix("block")?;
                let both = sides.split_once('x').and_then(|(r, c)| Some(Self::Blocks(length(r)?, length(c)?)));
                Some(both)
            }
        }
    }

    /// Rows and columns of a unit, cut to the matrix.
    pub fn unit(self, rows: usize, cols: usize) -> (usize, usize) {
        match self {
            Self::Bitmap | Self::TwoOfFour => (1, 1),
            Self::Groups(g) => (1, (g as usize).min(cols).max(1)),
            Self::Blocks(r, c) => ((r as usize).min(rows).max(1), (c as usize).min(cols).max(1)),
        }
    }

    /// Rows and bytes per row of the mask of a matrix: a bit for each unit.
    pub fn mask_shape(self, rows: usize, cols: usize) -> (usize, usize) {
        let (r, c) = self.unit(rows, cols);
        (rows.div_ceil(r), cols.div_ceil(c).div_ceil(8))
    }
}

/// The rearrangement of a sparse weight.
#[derive(Debug)]
pub enum Panels {
    /// Masks and kept codes; serves every structure.
    Bits(panels::BitPanels),
    /// Kept bytes and the steps between them.
    Gaps(gaps::GapPanels),
    /// Kept tiles of 16 x 64.
    Tiles(tiles::TilePanels),
    /// Kept groups of 32, row by row.
    Rows(rows::RowPanels),
}

/// What an ungrouped integer product adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Summed {
    /// Codes, dropped ones included, from which the share of the zero is to be taken.
    Codes,
    /// Values of kept codes.
    Values,
}

/// A region of an integer product that panels may compute themselves, into rows of `c` that are `ldc` apart.
pub(crate) struct Patch<'a, T> {
    pub job: &'a IntJob<'a>,
    pub at: Region,
    pub c: &'a mut [T],
    pub ldc: usize,
}

impl Patch<'_, i32> {
    /// Whether it goes over all of K.
    fn is_whole(&self) -> bool {
        self.at.b0 == 0 && self.at.blocks == self.job.w.geometry.blocks()
    }

    /// Calls `f` with what `of` says of a panel, and as many rows as the plan takes at a time, given the values of all rows of the
    /// weight added up.
    fn each<P: Copy>(
        &mut self,
        sums: &[i32],
        prefetch: bool,
        mut of: impl FnMut(usize) -> P,
        f: impl Fn(P, ValueRows),
    ) {
        let &mut Patch { job, at: Region { p0, np, m0, rows, .. }, ref mut c, ldc } = self;
        for p in 0..np {
            let panel = of(p0 + p);
            for m in (0..rows).step_by(job.b.mr) {
                let rows = ValueRows {
                    prefetch: prefetch && m == 0,
                    act: job.act.rows((m0 + m) / job.b.mr, 0),
                    sums: sums[(p0 + p) * PANEL..][..PANEL].as_ptr(),
                    c: c.as_mut_ptr().wrapping_add(m * ldc + p * PANEL),
                    ldc,
                };
                f(panel, rows);
            }
        }
    }
}

impl Panels {
    /// Rearranges a sparse matrix; `values` is what codes are worth in integer products, where dropped ones are worth 0 and all fit.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn new(
        q: &QView,
        mask: &Mask,
        g: &Geometry,
        scales: &PanelScales,
        values: Option<&[i8; 256]>,
        threads: usize,
    ) -> Result<Self> {
        let stored = !matches!(q.zeros, crate::ZerosRef::None);
        let zero = q.format.element.zero_code();
        if !stored && tiles::TilePanels::serves(mask.structure(), g) {
            return tiles::TilePanels::new(q, mask, g, values, threads).map(Self::Tiles);
        }
        if rows::RowPanels::serves(q, g) {
            return rows::RowPanels::new(q, g, zero, scales, threads).map(Self::Rows);
        }
        if let Some(gaps) = if stored { None } else { gaps::GapPanels::new(q, g, threads)? } {
            return Ok(Self::Gaps(gaps));
        }
        panels::BitPanels::new(q, g, threads).map(Self::Bits)
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        match self {
            Self::Bits(p) => p.nbytes(),
            Self::Gaps(p) => p.nbytes(),
            Self::Tiles(p) => p.nbytes(),
            Self::Rows(p) => p.nbytes(),
        }
    }

    /// Sets the bits of the kept places of a panel's rows, `[row][kp/64]`; places past K may be set too.
    pub(crate) fn words(&self, panel: usize, words: &mut [u64]) {
        match self {
            Self::Bits(p) => p.words(panel, words),
            Self::Gaps(p) => p.words(panel, words),
            Self::Tiles(p) => p.words(panel, words),
            Self::Rows(p) => p.words(panel, words),
        }
    }

    /// An ungrouped integer product written to `c`, where these panels have a kernel for it.
    pub(crate) fn raw(&self, a: &mut Patch<i32>) -> Option<Summed> {
        match self {
            Self::Bits(p) => p.raw(a),
            Self::Gaps(p) => p.raw(a),
            Self::Tiles(p) => p.raw(a),
            Self::Rows(p) => p.raw(a),
        }
    }

    /// A grouped integer product, from 0 on `c = fma(sum, scale, c)` for each kept group, where these panels have a kernel for it.
    pub(crate) fn grouped(&self, a: Patch<f32>) -> bool {
        match self {
            Self::Rows(p) => p.grouped(a),
            Self::Tiles(p) => p.grouped(a),
            Self::Bits(_) | Self::Gaps(_) => false,
        }
    }

    /// Rows of a float product up to which it is one of few, where these panels have kernels of their own for it.
    pub(crate) fn few_float_rows(&self, isa: Isa, bf16: bool) -> Option<usize> {
        match self {
            Self::Gaps(_) => gaps::GapPanels::few_rows(isa, bf16),
            Self::Bits(_) | Self::Tiles(_) | Self::Rows(_) => None,
        }
    }

    /// Blocks from one place where decoding may begin to the next, unless every block is.
    pub(crate) fn step(&self) -> Option<usize> {
        matches!(self, Self::Gaps(_)).then_some(gaps::MARK)
    }

    /// Whether an integer product of so many rows takes one after the other.
    pub(crate) fn by_row(&self, rows: usize, isa: Isa) -> bool {
        matches!(self, Self::Rows(_)) && rows <= rows::DIRECT && rows::RowPanels::is_fast(isa)
    }

    /// Activation rows up to which a product that could go over tiles of the CPU does not, where the panels say: these would have
    /// to be decoded. Gaps at 20 % kept, 4096 x 4096: 65 us for each row of activations against 1.4 ms for 64 by tiles and 3.4 ms
    /// for decoding (Xeon).
    pub(crate) fn direct_rows(&self) -> Option<usize> {
        match self {
            Self::Gaps(_) => Some(64),
            Self::Rows(_) => Some(rows::DIRECT),
            Self::Bits(_) | Self::Tiles(_) => None,
        }
    }

    /// Decodes blocks of a panel to bytes `v = u + (u & dbl) - sub`, dropped entries too, in the order of registers.
    ///
    /// # Safety
    /// `out` has 1024 bytes for each block; `fill` describes the panel.
    pub(crate) unsafe fn unpack(&self, t: &Kernels, panel: usize, blocks: usize, fill: &Fill, out: *mut u8) {
        let block = fill.block0;
        // SAFETY: the caller's buffer.
        unsafe {
            match self {
                Self::Bits(p) => p.unpack(kernel::table(t.isa), panel, block, blocks, fill, out),
                Self::Gaps(p) => p.unpack(t.isa, panel, block, blocks, fill.sub, out),
                Self::Tiles(p) => p.unpack(t, panel, block, blocks, fill.dbl, fill.sub, out),
                Self::Rows(p) => p.unpack(panel, block, blocks, fill.sub, out),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_round_trip() {
        for s in [Structure::Bitmap, Structure::TwoOfFour, Structure::Groups(32), Structure::Blocks(16, 64)] {
            assert_eq!(Structure::parse(&s.to_string()), Some(Some(s)));
        }
        for bad in ["bsr", "bsr0", "bsr-1", "bsr032", "block16", "block16x", "blockx16", "block1x0", "bsr99999999999"] {
            assert_eq!(Structure::parse(bad), Some(None), "{bad}");
        }
        for other in ["g32", "sf16", "2of8", "bitmaps", "even"] {
            assert_eq!(Structure::parse(other), None, "{other}");
        }
    }

    #[test]
    fn units_never_leave_the_matrix() {
        assert_eq!(Structure::Groups(32).unit(4, 20), (1, 20));
        assert_eq!(Structure::Blocks(16, 64).unit(5, 100), (5, 64));
        assert_eq!(Structure::Blocks(16, 64).mask_shape(17, 100), (2, 1));
        assert_eq!(Structure::Bitmap.mask_shape(3, 9), (3, 2));
        assert_eq!(Structure::Bitmap.mask_shape(0, 0), (0, 0));
    }
}
