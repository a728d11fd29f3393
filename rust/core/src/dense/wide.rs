//! Words of 16 bits, `[panel][word][16 rows]`: codes of 9 to 16 bits, places in the tables of rows, or the places of vectors in
//! their codebook.
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::format::vq::Shape;
use crate::format::ValueMap;
use crate::kernel::wide::Wide;
#[cfg(target_arch = "x86_64")]
use crate::kernel::x86::tiles;
use crate::kernel::Kernels;
use crate::pack::{Shared, PANEL};
use crate::pool;
use crate::qtensor::QView;

/// What words stand for.
#[derive(Debug)]
enum Words {
    /// A code each, less its zero.
    Codes,
    /// The place of a value among `len` of each of the 16 rows, `[panel][16][len]`.
    Tables { len: usize, table: Buf<f32> },
    /// Vectors: the places of their entries in `table`, which is followed by two zeros.
    Vectors { shape: Shape, table: Buf<f32> },
}

impl Words {
    /// Values of a code or vector, and its words.
    fn lens(&self) -> (usize, usize) {
        match self {
            Self::Codes | Self::Tables { .. } => (1, 1),
            Self::Vectors { shape, .. } => (shape.len, if shape.second > 0 { 2 } else { 1 }),
        }
    }
}

/// Codes of more than a byte, or that tables of rows look up, or vectors.
#[derive(Debug)]
pub struct WidePanels {
    /// Values of K, and of a group.
    pub(super) k: usize,
    pub(super) group: usize,
    /// Words of a row, and of a whole group.
    stride: usize,
    per_group: usize,
    kind: Words,
    words: Buf<u16>,
    /// `[panel][group][16]`.
    scales: Buf<f32>,
}

impl WidePanels {
    /// The panels of a matrix.
    pub(super) fn new(q: &QView, threads: usize) -> Result<Self> {
        let (group, groups, panels) = (q.group_len(), q.groups(), q.rows.div_ceil(PANEL));
        let kind = match q.format.element.map {
            ValueMap::Vectors(shape) => {
                let mut table = Buf::zeroed(q.table.len() + 2)?;
                table[..q.table.len()].copy_from_slice(q.table);
                Words::Vectors { shape, table }
            }
            ValueMap::RowLearned => {
                let len = q.format.element.learned();
                let mut table = Buf::zeroed(panels * PANEL * len)?;
                table[..q.table.len()].copy_from_slice(q.table);
                Words::Tables { len, table }
            }
            _ => Words::Codes,
        };
        let (len, each) = kind.lens();
        let (whole, rest) = (q.cols / group, q.cols % group);
        let per_group = group.div_ceil(len) * each;
        let stride = whole * per_group + rest.div_ceil(len) * each;
        let size = (panels * stride).checked_mul(PANEL).ok_or(Error::OutOfMemory(usize::MAX))?;
        let (mut words, mut scales) = (Buf::<u16>::zeroed(size)?, Buf::<f32>::zeroed(panels * groups * PANEL)?);
        let (to_words, to_scales) = (Shared(words.as_mut_ptr()), Shared(scales.as_mut_ptr()));
        let size = q.format.element.code_bytes();
        let zero = q.format.element.value(0u32) as u16;
        pool::try_run(threads, panels, None, |p| {
            let mut codes = Taken::<u8>::new(group * size)?;
            for n in p * PANEL..q.rows.min((p + 1) * PANEL) {
                for g in 0..groups {
                    let count = group.min(q.cols - g * group);
                    let codes = &mut codes[..count * size];
                    q.unpack_row(n, g * group, codes);
                    let at = (p * stride + g * per_group) * PANEL + n % PANEL;
                    for (i, part) in codes.chunks(len * size).enumerate() {
                        let (first, second) = match &kind {
                            Words::Codes => (u16::from_le_bytes([part[0], part[1]]).wrapping_add(zero), None),
                            Words::Tables { len, .. } => ((n % PANEL * len) as u16 + u16::from(part[0]), None),
                            Words::Vectors { shape, .. } => {
                                let (first, second) = shape.entries_of(part);
                                ((first * len) as u16, second.map(|i| (i * len) as u16))
                            }
                        };
                        // SAFETY: the words of panel p belong to this task.
                        unsafe {
                            let to = to_words.get().add(at + i * each * PANEL);
                            *to = first;
                            if let Some(second) = second {
                                *to.add(PANEL) = second;
                            }
                        }
                    }
                    // SAFETY: and so do its scales.
                    unsafe { *to_scales.get().add((p * groups + g) * PANEL + n % PANEL) = q.full_scale(n, g) };
                }
            }
            Ok(())
        })?;
        Ok(Self { k: q.cols, group, stride, per_group, kind, words, scales })
    }

    /// `n` values of one group of a panel from `k` on.
    fn part(&self, panel: usize, k: usize, n: usize) -> Wide {
        let (g, into) = (k / self.group, k % self.group);
        let (len, each) = self.kind.lens();
        let at = panel * self.stride + g * self.per_group + into / len * each;
        let groups = self.k.div_ceil(self.group);
        Wide {
            words: self.words[at * PANEL..].as_ptr(),
            scales: self.scales[(panel * groups + g) * PANEL..].as_ptr(),
            n,
            table: match &self.kind {
                Words::Codes => std::ptr::null(),
                Words::Tables { len, table } => table[panel * PANEL * len..].as_ptr(),
                Words::Vectors { table, .. } => table.as_ptr(),
            },
            second: match &self.kind {
                Words::Vectors { shape, .. } => shape.second_at(),
                _ => 0,
            },
            skip: into % len,
            next: self.stride * PANEL,
        }
    }

    /// Values of one group of a panel from `k` on, `[k][16]`.
    pub(super) fn decode(&self, t: &Kernels, panel: usize, k: usize, out: &mut [f32]) {
        let a = self.part(panel, k, out.len() / PANEL);
        // SAFETY: words of an existing panel, and room for the values.
        unsafe {
            match &self.kind {
                Words::Codes => (t.wide)(&a, out.as_mut_ptr()),
                Words::Tables { len, .. } => (t.row_tables)(&a, *len, out.as_mut_ptr()),
                Words::Vectors { shape, .. } => (t.vectors)(shape.len, shape.rest())(&a, out.as_mut_ptr()),
            }
        }
    }

    /// An even number of values of one group from an even place on as bf16 tiles.
    ///
    /// # Safety
    /// `out` has the room, and the CPU has tiles.
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn tiles(&self, panel: usize, k: usize, n: usize, out: *mut u8) {
        let a = self.part(panel, k, n);
        // SAFETY: words of an existing panel, and the caller's room.
        unsafe {
            match &self.kind {
                Words::Codes => tiles::codes(&a, out.cast()),
                Words::Tables { len, .. } => tiles::row_tables(*len)(&a, out),
                Words::Vectors { shape, .. } => tiles::vectors(shape.len, shape.rest())(&a, out.cast()),
            }
        }
    }

    pub(super) fn nbytes(&self) -> usize {
        let table = match &self.kind {
            Words::Codes => 0,
            Words::Tables { table, .. } | Words::Vectors { table, .. } => table.len(),
        };
        2 * self.words.len() + 4 * (self.scales.len() + table)
    }
}
