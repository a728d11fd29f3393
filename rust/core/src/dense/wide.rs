//! Words of 16 bits, `[panel][word][16 rows]`: codes of 9 to 16 bits, places in the tables of rows, or the places of vectors in
//! their codebook.
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::format::vq::Shape;
use crate::format::ValueMap;
use crate::kernel::wide::Wide;
use crate::kernel::Kernels;
use crate::pack::{Shared, PANEL};
use crate::pool;
use crate::qtensor::QView;

/// What words stand for.
#[derive(Debug)]
enum Words {
    /// A code each, less `sub`.
    Codes { sub: i32 },
    /// The place of a value among `len` of each of the 16 rows, `[panel][16][len]`.
    Tables { len: usize, table: Buf<f32> },
    /// Vectors: the places of their entries in `table`, which is followed by two zeros.
    Vectors { shape: Shape, table: Buf<f32> },
}

impl Words {
    /// Values of a code or vector, and its words.
    fn lens(&self) -> (usize, usize) {
        match self {
            Self::Codes { .. } | Self::Tables { .. } => (1, 1),
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
            _ => Words::Codes { sub: -q.format.element.value(0u32) },
        };
        let (len, each) = kind.lens();
        let (whole, rest) = (q.cols / group, q.cols % group);
        let per_group = group.div_ceil(len) * each;
        let stride = whole * per_group + rest.div_ceil(len) * each;
        let size = (panels * stride).checked_mul(PANEL).ok_or(Error::OutOfMemory(usize::MAX))?;
        let (mut words, mut scales) = (Buf::<u16>::zeroed(size)?, Buf::<f32>::zeroed(panels * groups * PANEL)?);
        let (to_words, to_scales) = (Shared(words.as_mut_ptr()), Shared(scales.as_mut_ptr()));
        let size = q.format.element.code_bytes();
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
                            Words::Codes { .. } => (u16::from_le_bytes([part[0], part[1]]), None),
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

    /// Values of one group of a panel from `k` on, `[k][16]`.
    pub(super) fn decode(&self, t: &Kernels, panel: usize, k: usize, out: &mut [f32]) {
        let (g, into) = (k / self.group, k % self.group);
        let (len, each) = self.kind.lens();
        let at = panel * self.stride + g * self.per_group + into / len * each;
        let groups = self.k.div_ceil(self.group);
        let mut a = Wide {
            words: self.words[at * PANEL..].as_ptr(),
            scales: self.scales[(panel * groups + g) * PANEL..].as_ptr(),
            n: out.len() / PANEL,
            sub: 0,
            table: std::ptr::null(),
            skip: into % len,
            next: self.stride * PANEL,
        };
        let f = match &self.kind {
            Words::Codes { sub } => {
                a.sub = *sub;
                t.wide
            }
            Words::Tables { len, table } => {
                a.table = table[panel * PANEL * len..].as_ptr();
                t.row_tables
            }
            Words::Vectors { table, .. } => {
                a.table = table.as_ptr();
                (t.vectors)(len, each == 2)
            }
        };
        // SAFETY: words of an existing panel, and room for the values.
        unsafe { f(&a, out.as_mut_ptr()) };
    }

    pub(super) fn nbytes(&self) -> usize {
        let table = match &self.kind {
            Words::Codes { .. } => 0,
            Words::Tables { table, .. } | Words::Vectors { table, .. } => table.len(),
        };
        2 * self.words.len() + 4 * (self.scales.len() + table)
    }
}
