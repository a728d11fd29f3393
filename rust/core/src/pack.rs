//! Panels: the portable layout rearranged for the kernels.
//!
//! # Layout
//! A panel holds 16 rows of the weight, cut along K in *blocks* of 64. A block of b-bit codes is `128*b` bytes, made of
//! planes of 8, 4, 2 or 1 bits (3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1; the widest plane holds the low bits and comes first).
//!
//! Decoded to bytes, a block is 16 *registers* of 64 bytes; register `r`, byte `4*n + j` is row `n`, `k = 4r + j`: the order
//! of `VPDPBUSD` and of an AMX B tile. In the 4-bit plane registers `r` and `r + 8` share 64 bytes (low and high nibble),
//! in the 2-bit plane `r`, `r + 4`, `r + 8`, `r + 12`, in the 1-bit plane every second register from `r`:
//!
//! ```text
//! plane   bytes   register r lives in
//! 8       1024    bytes 64r..64r+64
//! 4        512    bytes 64(r%8)..,  bits 4(r/8)..
//! 2        256    bytes 64(r%4)..,  bits 2(r/4)..
//! 1        128    bytes 64(r%2)..,  bit   r/2
//! ```
//!
//! # Groups
//! Along K a group of g values takes `gp` places: g where g is 8, 16, 32 or a multiple of 64, else the next such number.
//! The padding meets activations of -0 (integer: 0), and its codes are chosen so that they change no sum. Rows beyond N
//! are zero codes with zero scales.
use crate::activation::Segments;
use crate::bits;
use crate::buf::{Buf, Taken};
use crate::dense::{DensePanels, TrellisPanels};
use crate::error::{Error, Result};
use crate::format::{e4m3_byte, e8m0_byte, Book, Format, ScaleType, ValueMap, Zero, HALF};
use crate::kernel::{Kernels, ScalePtr};
use crate::pool::{self, Order};
use crate::qtensor::{QTensor, QView, Scales, ScalesRef, ZerosRef};
use crate::quantize::ScalesMut;
use crate::sparse::floats::FloatPanels;
use crate::sparse::kernel::Fill;
use crate::sparse::Panels;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rows of a panel.
pub const PANEL: usize = 16;
/// Values of K in a block.
pub const BLOCK: usize = 64;

/// How K is laid out in a panel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Values of K.
    pub k: usize,
    /// Natural group length (K when one group spans the row).
    pub group: usize,
    /// Places a group takes.
    pub padded: usize,
    /// Groups in a row.
    pub groups: usize,
    /// Places of a whole row, a multiple of [`BLOCK`].
    pub kp: usize,
}

impl Geometry {
    /// The layout of `k` values in groups of `group` (`None`: one group).
    pub fn new(k: usize, group: Option<usize>) -> Self {
        if k == 0 {
            return Self { k, group: 1, padded: BLOCK, groups: 0, kp: 0 };
        }
        match group {
            Some(g) if g < k => {
                let padded = match g {
                    0..=8 => 8,
                    9..=16 => 16,
                    17..=32 => 32,
                    _ => g.next_multiple_of(BLOCK),
                };
                let groups = k.div_ceil(g);
                let tail = k - (groups - 1) * g;
                Self { k, group: g, padded, groups, kp: ((groups - 1) * padded + tail).next_multiple_of(BLOCK) }
            }
            _ => {
                let kp = k.next_multiple_of(BLOCK);
                Self { k, group: k, padded: kp, groups: 1, kp }
            }
        }
    }

    /// Blocks of a row.
    pub fn blocks(&self) -> usize {
        self.kp / BLOCK
    }

    /// Whether natural and padded positions agree.
    pub fn is_plain(&self) -> bool {
        self.group == self.padded || self.groups <= 1
    }

    /// Calls `f(natural start, padded start, length)` for each run of K that stays contiguous.
    pub fn runs(&self, mut f: impl FnMut(usize, usize, usize)) {
        if self.is_plain() {
            f(0, 0, self.k);
        } else {
            for g in 0..self.groups {
                let k0 = g * self.group;
                f(k0, g * self.padded, self.group.min(self.k - k0));
            }
        }
    }
}

/// Scales in panel order `[panel][group][16]`, in their stored type.
#[derive(Debug)]
pub enum PanelScales {
    /// binary32
    F32(Buf<f32>),
    /// binary16 bits
    F16(Buf<u16>),
    /// bfloat16 bits
    BF16(Buf<u16>),
}

impl PanelScales {
    /// The first of them.
    pub(crate) fn ptr(&self) -> ScalePtr {
        match self {
            Self::F32(b) => ScalePtr::F32(b.as_ptr()),
            Self::F16(b) => ScalePtr::F16(b.as_ptr()),
            Self::BF16(b) => ScalePtr::BF16(b.as_ptr()),
        }
    }

    /// Some of them as floats.
    pub(crate) fn read(&self, from: usize, out: &mut [f32]) {
        let these = from..from + out.len();
        match self {
            Self::F32(b) => out.copy_from_slice(&b[these]),
            Self::F16(b) => b[these].reinterpret_cast::<half::f16>().convert_to_f32_slice(out),
            Self::BF16(b) => b[these].reinterpret_cast::<half::bf16>().convert_to_f32_slice(out),
        }
    }

    pub(crate) fn nbytes(&self) -> usize {
        match self {
            Self::F32(b) => b.len() * 4,
            Self::F16(b) | Self::BF16(b) => b.len() * 2,
        }
    }
}

/// Zero points in panel order `[panel][group][16]`.
#[derive(Debug)]
pub enum PanelZeros {
    /// Every code has the format's constant offset.
    Const,
    /// Integers.
    Int(Buf<u8>),
    /// Floats.
    Float(Buf<f32>),
}

/// Bytes that are read forward even where panels are taken backward: what was asked for past their end is for nothing.
const STRETCH: usize = 1 << 20;

/// What the bytes of halves are above their values.
pub(crate) const HALF_ZERO: i32 = 32;

/// Low halves of the integers of the 32 codes without a sign, then the high ones.
fn halves(book: &Book) -> [u8; 64] {
    let integers = book.integers();
    std::array::from_fn(|i| {
        let v = integers[i % 32];
        (HALF_ZERO as i16 + if i < 32 { v % HALF } else { v / HALF }) as u8
    })
}

/// The inner level of a two-level weight, `[panel][group][16]`: what integer products make of the code `u` is the byte
/// `u*mul + add`, worth 128 less.
#[derive(Debug)]
pub struct Inner {
    /// Integer scales.
    pub mul: Buf<u8>,
    /// 128 less the zero point times the scale.
    pub add: Buf<u8>,
    /// Scales of the rows, `[panel][16]`.
    pub rows: PanelScales,
    /// The groups as segments, for kernels that sum them one by one.
    pub(crate) groups: Segments,
}

/// What two-level bytes are above their values.
pub(crate) const INNER_ZERO: i32 = 128;

/// Activation groups whose segments are kept.
const SEGMENT_GROUPS: [Option<usize>; 3] = [None, Some(32), Some(128)];

/// A weight in panels, ready for every kernel of every ISA.
#[derive(Debug)]
pub struct Packed {
    /// The format it came from.
    pub format: Format,
    /// N, rows of the weight.
    pub n: usize,
    /// The layout along K.
    pub geometry: Geometry,
    /// Bits of a stored code.
    pub bits: usize,
    /// `value = mul*u - zero`.
    pub mul: i32,
    /// The constant part of the zero (0 where zeros are stored).
    pub sub: i32,
    /// Largest stored integer zero.
    pub zero_max: u8,
    /// What the integer 1 is worth in integer products.
    pub step: f32,
    /// What multiplies every scale in float products.
    pub tensor: f32,
    /// The largest byte that a code becomes in integer products, or the largest integer made of two.
    pub byte_top: i32,
    /// What each code is worth, less a stored zero: 64 or 256 entries, repeated as needed.
    pub values: Buf<f32>,
    /// The byte `u` of each code in integer products (`mul*u - sub` is its integer), where it is not the code itself; of
    /// integers beyond a byte both halves of the magnitudes (see [`Self::is_halved`]).
    pub bytes: Option<Box<[u8; 64]>>,
    /// `[panel][block][128*bits]`.
    pub codes: Buf<u8>,
    /// Scales; of two-level weights the products of both levels, rounded, which float products apply.
    pub scales: PanelScales,
    /// Zeros.
    pub zeros: PanelZeros,
    /// The inner level, of two-level weights.
    pub inner: Option<Inner>,
    /// Kept entries, in the place of `codes`, of sparse formats.
    pub sparse: Option<Panels>,
    /// Numbers that are not quantised, in the place of `codes`.
    pub floats: Option<FloatPanels>,
    /// The matrix itself, where `dense` has its panels.
    pub portable: Option<QTensor>,
    /// Panels in the place of `codes`, of codes that are longer than a byte or read together.
    pub dense: Option<DensePanels>,
    /// Segments under one activation scale per row and under groups of 32 and 128, where they nest: a product looks them
    /// up instead of making them.
    segments: [Option<Segments>; 3],
    /// Whether the next product takes panels from the last on.
    backward: AtomicBool,
}

impl Packed {
    /// The segments of a product under activation groups of `act`.
    pub(crate) fn segments(&self, act: Option<usize>) -> Result<Cow<'_, Segments>> {
        let known = SEGMENT_GROUPS.iter().position(|g| *g == act).and_then(|i| self.segments[i].as_ref());
        let known = known.map(Cow::Borrowed);
        known.map_or_else(|| self.cut(act).map(Cow::Owned), Ok)
    }

    fn cut(&self, act: Option<usize>) -> Result<Segments> {
        let geometry = self.trellis().map_or(&self.geometry, |t| &t.geometry);
        integer_segments(geometry, self.inner.is_some(), act)
    }

    /// That there are integer products under such activation groups.
    pub(crate) fn check_integers(&self, group: Option<usize>) -> Result<()> {
        if !self.format.element.has_integers() {
            return Err(Error::Unsupported(format!("{} has no integer products", self.format)));
        }
        if let (Some(g), true) = (group, self.trellis().is_some()) {
            return Err(Error::Unsupported(format!("{} has no products with activation groups of {g}", self.format)));
        }
        Ok(())
    }

    /// The order in which a product takes tasks of so many panels, another one each time.
    pub(crate) fn next_order(&self, panels: usize) -> Order {
        if self.backward.fetch_xor(true, Ordering::Relaxed) {
            let bytes = self.nbytes() * panels / self.panels().max(1);
            Order::Backward((STRETCH / bytes.max(1)).max(1))
        } else {
            Order::Forward
        }
    }

    /// Its panels, where its codes are trellis codes.
    pub(crate) fn trellis(&self) -> Option<&TrellisPanels> {
        match &self.dense {
            Some(DensePanels::Trellis(t)) => Some(t),
            _ => None,
        }
    }

    /// Groups whose scales integer products apply one by one.
    pub(crate) fn sum_groups(&self) -> usize {
        if self.inner.is_some() {
            self.geometry.groups.min(1)
        } else {
            self.geometry.groups
        }
    }

    /// The scales that integer products apply, `[panel][sum_groups][16]`.
    pub(crate) fn sum_scales(&self) -> &PanelScales {
        self.inner.as_ref().map_or(&self.scales, |i| &i.rows)
    }

    /// The zero points that integer products subtract.
    pub(crate) fn sum_zeros(&self) -> &PanelZeros {
        if self.inner.is_some() {
            &PanelZeros::Const
        } else {
            &self.zeros
        }
    }

    /// The constant zero of integer products.
    pub(crate) fn sum_sub(&self) -> i32 {
        if self.inner.is_some() {
            INNER_ZERO
        } else {
            self.sub
        }
    }

    /// Panels of 16 rows.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Rows of the weight (N).
    pub fn rows(&self) -> usize {
        self.n
    }

    /// Columns of the weight (K).
    pub fn cols(&self) -> usize {
        self.geometry.k
    }

    /// Whether zero points are stored, rather than constant.
    pub(crate) fn has_zeros(&self) -> bool {
        !matches!(self.zeros, PanelZeros::Const)
    }

    /// Whether integer products subtract stored zero points.
    pub(crate) fn sums_have_zeros(&self) -> bool {
        !matches!(self.sum_zeros(), PanelZeros::Const)
    }

    /// Whether the integers of codes are two bytes, `HALF*high + low`, with their sign in bit 5 of the code.
    pub(crate) fn is_halved(&self) -> bool {
        self.byte_top > 255
    }

    /// Bytes that a block becomes in integer products.
    pub(crate) fn unpacked_block(&self) -> usize {
        if self.is_halved() {
            2048
        } else {
            1024
        }
    }

    /// Bits of the codes of kernels that look bytes up, those of halves twice.
    pub(crate) fn looked_up_bits(&self) -> usize {
        self.bits * if self.is_halved() { 2 } else { 1 }
    }

    /// Whether the codes are the bytes of integer products, in their order.
    pub(crate) fn is_bytes(&self) -> bool {
        self.bits == 8 && self.bytes.is_none() && self.inner.is_none() && self.sparse.is_none()
    }

    /// Whether values are looked up in a table.
    pub fn is_table(&self) -> bool {
        !self.format.element.is_linear()
    }

    /// Decodes blocks of one panel to bytes `v = u + (u & dbl) - sub` (wrapping), in the order of registers.
    ///
    /// # Safety
    /// `out` has 1024 bytes for each block, and the CPU the features of `t`.
    pub(crate) unsafe fn unpack(
        &self,
        t: &Kernels,
        panel: usize,
        block: usize,
        blocks: usize,
        dbl: u8,
        sub: u8,
        ahead: usize,
        out: *mut u8,
    ) {
        // SAFETY: the caller's buffer; panels are whole.
        unsafe {
            if let Some(s) = &self.sparse {
                s.unpack(t, panel, blocks, &self.fill(panel, block, dbl, sub), out);
            } else {
                (t.unpack[self.bits])(self.codes_at(panel, block), out, blocks, dbl, sub, ahead);
            }
        }
    }

    /// What the dropped codes of a panel are from a block on.
    pub(crate) fn fill(&self, panel: usize, block: usize, dbl: u8, sub: u8) -> Fill {
        let zeros = match &self.zeros {
            PanelZeros::Int(z) => z.as_ptr().wrapping_add(panel * self.geometry.groups * PANEL),
            _ => std::ptr::null(),
        };
        let (padded, groups) = (self.geometry.padded, self.geometry.groups);
        Fill { code: self.format.element.zero_code(), zeros, padded, groups, block0: block, dbl, sub }
    }

    /// The codes of a panel from a block on.
    pub(crate) fn codes_at(&self, panel: usize, block: usize) -> *const u8 {
        self.codes.as_ptr().wrapping_add(panel * self.panel_bytes() + block * self.block_bytes())
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        128 * self.bits
    }

    /// Bytes of one panel's codes.
    pub fn panel_bytes(&self) -> usize {
        self.geometry.blocks() * self.block_bytes()
    }

    /// Whether panels are long enough to be asked for ahead.
    pub(crate) fn is_long(&self) -> bool {
        self.panel_bytes() >= 4096
    }

    /// Restores the portable codes that [`pack`] was given, bit for bit: `rows * row_bytes` bytes.
    ///
    /// # Errors
    /// [`Error::Shape`] for a buffer of another length, [`Error::OutOfMemory`].
    pub fn restore_codes(&self, out: &mut [u8], threads: usize) -> Result<()> {
        if let Some(q) = &self.portable {
            return copy("codes", &q.codes, out);
        }
        if self.sparse.is_some() || self.floats.is_some() {
            return self.restore_kept(out, threads);
        }
        let (k, kp) = (self.geometry.k, self.geometry.kp);
        let row_bytes = (k * self.bits).div_ceil(8);
        fits("codes", out.len(), self.n * row_bytes)?;
        let out = Shared(out.as_mut_ptr());
        let (panel_bytes, block_bytes) = (self.panel_bytes(), self.block_bytes());
        pool::try_run(threads, self.panels(), None, |p| {
            let mut rows = Taken::<u8>::new(PANEL * kp)?;
            let mut flat = Taken::<u8>::new(k)?;
            rows.fill(0);
            let flat = &mut flat[..k];
            for (b, block) in self.codes[p * panel_bytes..][..panel_bytes].chunks_exact(block_bytes).enumerate() {
                unpack_block(block, self.bits, b * BLOCK, kp, &mut rows);
            }
            for i in 0..PANEL.min(self.n - p * PANEL) {
                let row = &rows[i * kp..][..kp];
                self.geometry.runs(|k0, p0, len| flat[k0..k0 + len].copy_from_slice(&row[p0..p0 + len]));
                // SAFETY: the rows of panel p belong to this task.
                let to =
                    unsafe { std::slice::from_raw_parts_mut(out.get().add((p * PANEL + i) * row_bytes), row_bytes) };
                bits::pack(self.bits as u8, flat, to);
            }
            Ok(())
        })
    }

    /// Restores the scales that [`pack`] was given: `rows * groups`, of the format's type.
    ///
    /// # Errors
    /// [`Error::Shape`] for a buffer of another length or type.
    pub fn restore_scales(&self, out: ScalesMut) -> Result<()> {
        if let Some(q) = &self.portable {
            return match (&q.scales, out) {
                (Scales::F32(src), ScalesMut::F32(out)) => copy("scales", src, out),
                (Scales::F16(src), ScalesMut::F16(out)) | (Scales::BF16(src), ScalesMut::BF16(out)) => {
                    copy("scales", src, out)
                }
                (Scales::E8M0(src), ScalesMut::E8M0(out)) | (Scales::E4M3(src), ScalesMut::E4M3(out)) => {
                    copy("scales", src, out)
                }
                (_, out) => Err(wrong_scales(&self.format, &out)),
            };
        }
        match (&self.scales, out) {
            (PanelScales::F32(src), ScalesMut::F32(out)) => self.restore("scales", src, out),
            (PanelScales::F16(src), ScalesMut::F16(out)) | (PanelScales::BF16(src), ScalesMut::BF16(out)) => {
                self.restore("scales", src, out)
            }
            (_, ScalesMut::I8(out)) if self.inner.is_some() => {
                self.inner.as_ref().map_or(Ok(()), |i| self.restore("scales", &i.mul, out))
            }
            (PanelScales::BF16(src), ScalesMut::E8M0(out)) if self.format.scale == ScaleType::E8M0 => {
                let unit = self.format.element.unit;
                let byte = |s: u16| e8m0_byte(half::bf16::from_bits(s).to_f32() / unit);
                self.restore_as("scales", src, out, byte)
            }
            (PanelScales::F16(src), ScalesMut::E4M3(out)) if self.format.scale == ScaleType::E4M3 => {
                self.restore_as("scales", src, out, |s| e4m3_byte(half::f16::from_bits(s).to_f32()))
            }
            (_, out) => Err(wrong_scales(&self.format, &out)),
        }
    }

    /// Restores integer zero points: `rows * groups`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a buffer of another length, or where there are none.
    pub fn restore_zeros(&self, out: &mut [u8]) -> Result<()> {
        match &self.zeros {
            PanelZeros::Int(src) => self.restore("zeros", src, out),
            _ => Err(Error::Shape(format!("{} has no integer zero points here", self.format))),
        }
    }

    /// Restores float zero points: `rows * groups`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a buffer of another length, or where there are none.
    pub fn restore_float_zeros(&self, out: &mut [f32]) -> Result<()> {
        match &self.zeros {
            PanelZeros::Float(src) => self.restore("zeros", src, out),
            _ => Err(Error::Shape(format!("{} has no float zero points here", self.format))),
        }
    }

    /// `[N/16][groups][16]` to `[N][groups]`.
    fn restore<T: crate::buf::Plain>(&self, what: &str, src: &[T], out: &mut [T]) -> Result<()> {
        self.restore_as(what, src, out, |v| v)
    }

    fn restore_as<T: Copy, U>(&self, what: &str, src: &[T], out: &mut [U], f: impl Fn(T) -> U) -> Result<()> {
        let groups = self.geometry.groups;
        fits(what, out.len(), self.n * groups)?;
        for (n, row) in out.chunks_exact_mut(groups.max(1)).enumerate() {
            let base = (n / PANEL) * groups * PANEL + n % PANEL;
            row.iter_mut().enumerate().for_each(|(g, o)| *o = f(src[base + g * PANEL]));
        }
        Ok(())
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        let z = match &self.zeros {
            PanelZeros::Const => 0,
            PanelZeros::Int(b) => b.len(),
            PanelZeros::Float(b) => b.len() * 4,
        };
        let inner = self.inner.as_ref().map_or(0, |i| i.mul.len() + i.add.len() + i.rows.nbytes());
        let kept = self.sparse.as_ref().map_or(0, Panels::nbytes) + self.floats.as_ref().map_or(0, FloatPanels::nbytes);
        let whole = self.portable.as_ref().map_or(0, |q| q.codes.len() + q.scales.nbytes());
        let words = self.dense.as_ref().map_or(0, DensePanels::nbytes);
        self.codes.len() + kept + self.scales.nbytes() + z + inner + whole + words
    }
}

/// A pointer that tasks may share because each writes its own part.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub *mut T);
// SAFETY: users index disjoint parts per task.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}
impl<T> Shared<T> {
    /// The pointer (a method, so that closures capture the wrapper).
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

/// Packs a matrix that kernels of bytes do not know, and keeps it: panels do not give its arrays back.
fn keep(q: &QView, threads: usize) -> Result<Packed> {
    // Groups meet their scales before the kernels do.
    let geometry = Geometry::new(q.cols, None);
    Ok(Packed {
        format: q.format,
        n: q.rows,
        geometry,
        bits: usize::from(q.format.element.bits),
        mul: 1,
        sub: 0,
        zero_max: 0,
        step: q.step(),
        tensor: 1.0,
        byte_top: 255,
        values: Buf::zeroed(256)?,
        bytes: None,
        codes: Buf::zeroed(0)?,
        scales: PanelScales::F32(Buf::zeroed(0)?),
        zeros: PanelZeros::Const,
        inner: None,
        sparse: None,
        floats: None,
        portable: Some(q.to_owned()?),
        dense: Some(DensePanels::new(q, threads)?),
        segments: [const { None }; 3],
        backward: AtomicBool::new(false),
    })
}

/// Rearranges a quantised matrix into panels.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub fn pack(q: &QView, threads: usize) -> Result<Packed> {
    if q.format.element.is_dense() {
        return keep(q, threads);
    }
    let bits = usize::from(q.format.element.bits);
    let book = q.book();
    let geometry = Geometry::new(q.cols, q.format.group.map(|g| g as usize));
    let panels = q.rows.div_ceil(PANEL);
    let block_bytes = 128 * bits;
    let panel_bytes = geometry.blocks() * block_bytes;
    let plain = q.format.element.plain;
    let dense = if q.mask.is_none() && plain.is_none() { panels } else { 0 };
    let mut codes = Buf::<u8>::zeroed(dense.checked_mul(panel_bytes).ok_or(Error::OutOfMemory(usize::MAX))?)?;
    let row_bytes = (q.cols * bits).div_ceil(8);
    let out = Shared(codes.as_mut_ptr());
    pool::try_run(threads, dense, None, |p| {
        let mut rows = Taken::<u8>::new(PANEL * geometry.kp)?;
        let mut flat = Taken::<u8>::new(geometry.k)?;
        rows.fill(0);
        let flat = &mut flat[..geometry.k];
        for i in 0..PANEL.min(q.rows - p * PANEL) {
            let n = p * PANEL + i;
            bits::unpack(bits as u8, &q.codes[n * row_bytes..(n + 1) * row_bytes], flat);
            let row = &mut rows[i * geometry.kp..(i + 1) * geometry.kp];
            fill_padding(q, book.as_deref(), n, &geometry, row);
            geometry.runs(|k0, p0, len| row[p0..p0 + len].copy_from_slice(&flat[k0..k0 + len]));
        }
        // SAFETY: panel p owns this part of the buffer, and no other task touches it.
        let dst = unsafe { std::slice::from_raw_parts_mut(out.get().add(p * panel_bytes), panel_bytes) };
        for (b, block) in dst.chunks_exact_mut(block_bytes.max(1)).enumerate() {
            pack_block(&rows, geometry.kp, b * BLOCK, bits, block);
        }
        Ok(())
    })?;
    let groups = geometry.groups;
    let scales = panel_scales(q, groups)?;
    let e = q.format.element;
    let (mul, sub, bytes, byte_top) = match (e.map, &book) {
        (ValueMap::Affine { .. }, _) if plain.is_some() => (1, 0, None, 0),
        (ValueMap::Affine { mul, sub }, _) => (mul, sub, None, (1 << bits) - 1),
        (_, Some(book)) if e.has_integers() && book.is_halved() => {
            let bytes = halves(book);
            let top = bytes.iter().copied().max().unwrap_or(0);
            let both = i32::from(HALF) + 1;
            (1, both * HALF_ZERO, Some(Box::new(bytes)), both * i32::from(top))
        }
        (_, Some(book)) if e.has_integers() => {
            let integers = book.integers();
            let low = integers.iter().copied().min().unwrap_or(0);
            let byte = |u: usize| (integers[u % integers.len()] - low) as u8;
            let bytes: Box<[u8; 64]> = Box::new(std::array::from_fn(byte));
            let top = bytes.iter().copied().max().unwrap_or(0);
            (1, -i32::from(low), Some(bytes), i32::from(top))
        }
        _ => (1, 0, None, 255),
    };
    let entries = if bits > 6 { 256 } else { 64 };
    let mut values = Buf::<f32>::zeroed(if plain.is_some() { 0 } else { entries })?;
    for (u, v) in values.iter_mut().enumerate() {
        let u = u & ((1 << bits) - 1);
        *v = book.as_ref().map_or_else(|| e.number(u as u32), |b| b.of_bytes()[u]);
    }
    let (zeros, zero_max) = match q.zeros {
        ZerosRef::None => (PanelZeros::Const, 0),
        ZerosRef::Int(z) => (PanelZeros::Int(panelise(z, q.rows, groups)?), z.iter().copied().max().unwrap_or(0)),
        ZerosRef::Float(z) => (PanelZeros::Float(panelise(z, q.rows, groups)?), 0),
    };
    let inner = match q.scales {
        ScalesRef::I8(t) => {
            // The zero point of a code is a byte, and so is its share: see `QView::new`.
            let zero = |i: usize| match q.zero(i / groups, i % groups) {
                Zero::Int(z) => i32::from(z),
                _ => sub,
            };
            let add: Vec<u8> =
                t.iter().enumerate().map(|(i, &t)| (INNER_ZERO - zero(i) * i32::from(t)) as u8).collect();
            let rows = PanelScales::F32(panelise(q.outer, q.rows, 1)?);
            Some(Inner {
                mul: panelise(t, q.rows, groups)?,
                add: panelise(&add, q.rows, groups)?,
                rows,
                groups: Segments::new(&geometry, None)?,
            })
        }
        _ => None,
    };
    let byte_top = if inner.is_some() { 255 } else { byte_top };
    let segments = SEGMENT_GROUPS.map(|act| integer_segments(&geometry, inner.is_some(), act).ok());
    let (step, tensor) = (q.step(), q.tensor());
    let format = q.format;
    let floats = plain.map(|kind| FloatPanels::new(q, &geometry, kind, threads)).transpose()?;
    let mask = if plain.is_some() { None } else { q.mask };
    let signed = signed_values(q, sub, bytes.as_deref(), byte_top);
    let sparse = mask.map(|m| Panels::new(q, m, &geometry, &scales, signed.as_ref(), threads)).transpose()?;
    Ok(Packed {
        format,
        n: q.rows,
        geometry,
        bits,
        mul,
        sub,
        zero_max,
        step,
        tensor,
        byte_top,
        values,
        bytes,
        codes,
        scales,
        zeros,
        inner,
        sparse,
        floats,
        portable: None,
        dense: None,
        segments,
        backward: AtomicBool::new(false),
    })
}

/// What each code is worth in integer products, where that fits a signed byte and a dropped entry is worth 0 (so codes are not of odd
/// integers).
fn signed_values(q: &QView, sub: i32, bytes: Option<&[u8; 64]>, top: i32) -> Option<[i8; 256]> {
    let e = q.format.element;
    let constant = matches!(q.zeros, ZerosRef::None) && !matches!(q.scales, ScalesRef::I8(_));
    let odd = matches!(e.map, ValueMap::Affine { mul: 2, .. });
    if !constant || odd || !e.has_integers() || top > 255 {
        return None;
    }
    let worth = |u: usize| bytes.map_or(u as i32, |b| i32::from(b[u % 64])) - sub;
    let codes = 1usize << e.bits;
    let fit = (0..codes).all(|u| i8::try_from(worth(u)).is_ok());
    (fit && worth(usize::from(e.zero_code())) == 0).then(|| std::array::from_fn(|u| worth(u % codes) as i8))
}

/// The segments of integer products: two-level weights have one scale per row.
fn integer_segments(g: &Geometry, two_level: bool, act: Option<usize>) -> Result<Segments> {
    if !two_level {
        return Segments::new(g, act);
    }
    if act.is_none() || g.is_plain() {
        return Segments::new(&Geometry { group: g.k, padded: g.kp.max(BLOCK), groups: g.groups.min(1), ..*g }, act);
    }
    let mut segments = Segments::new(g, act)?;
    segments.group.fill(0);
    Ok(segments)
}

/// Gives the padding of a row the code that decodes to the least weight that is +0 or more, where there is one. A padded
/// place meets an activation of -0, so their product is -0, which added to any sum, -0 included, changes nothing; a
/// small weight stays finite under the largest scales.
fn fill_padding(q: &QView, book: Option<&Book>, n: usize, geometry: &Geometry, row: &mut [u8]) {
    let ValueMap::Affine { mul, sub } = q.format.element.map else {
        let least = [false, true].map(|negative| book.map_or(0, |b| b.least(negative)));
        for (g, part) in row.chunks_mut(geometry.padded).enumerate() {
            let s = q.scale(n, g.min(geometry.groups - 1));
            part.fill(least[usize::from(s.is_sign_negative())]);
        }
        return;
    };
    let top = q.format.element.levels as i32 - 1;
    for (g, part) in row.chunks_mut(geometry.padded).enumerate() {
        let g = g.min(geometry.groups - 1);
        let s = q.scale(n, g);
        // Codes on either side of 0, or 0 itself on the upper side.
        let around = |zero: i32| if s.is_sign_negative() { (zero - 1).div_euclid(mul) } else { (zero + mul - 1) / mul };
        let code = match q.zero(n, g) {
            Zero::None => around(sub),
            Zero::Int(z) => around(i32::from(z)),
            Zero::Float(z) => {
                let high = (top as f32).mul_add(s, -(s * z));
                if (-(s * z)).is_sign_negative() && high.is_finite() {
                    top
                } else {
                    0
                }
            }
        };
        part.fill(code.clamp(0, top) as u8);
    }
}

/// Scales in panel order, in a type that kernels read.
pub(crate) fn panel_scales(q: &QView, groups: usize) -> Result<PanelScales> {
    Ok(match q.scales {
        ScalesRef::F32(s) => PanelScales::F32(panelise(s, q.rows, groups)?),
        ScalesRef::F16(s) => PanelScales::F16(panelise(s, q.rows, groups)?),
        ScalesRef::BF16(s) => PanelScales::BF16(panelise(s, q.rows, groups)?),
        ScalesRef::I8(_) => {
            let full: Vec<f32> = (0..q.rows * groups).map(|i| q.full_scale(i / groups, i % groups)).collect();
            PanelScales::F32(panelise(&full, q.rows, groups)?)
        }
        ScalesRef::E4M3(_) => {
            // float16 has every number of E4M3.
            let wide: Vec<u16> = (0..q.rows * groups).map(|i| half::f16::from_f32(q.scales.get(i)).to_bits()).collect();
            PanelScales::F16(panelise(&wide, q.rows, groups)?)
        }
        ScalesRef::E8M0(_) => {
            // bfloat16 has every power of two of E8M0, and of the units too.
            let wide: Vec<u16> =
                (0..q.rows * groups).map(|i| half::bf16::from_f32(q.scale(i / groups, i % groups)).to_bits()).collect();
            PanelScales::BF16(panelise(&wide, q.rows, groups)?)
        }
    })
}

/// `[N][groups]` to `[N/16][groups][16]`.
fn panelise<T: crate::buf::Plain>(src: &[T], rows: usize, groups: usize) -> Result<Buf<T>> {
    let mut out = Buf::zeroed(rows.div_ceil(PANEL) * groups * PANEL)?;
    for n in 0..rows {
        let base = (n / PANEL) * groups * PANEL + n % PANEL;
        for g in 0..groups {
            out[base + g * PANEL] = src[n * groups + g];
        }
    }
    Ok(out)
}

/// Widths of the planes of a code, widest (low bits) first.
fn planes(bits: usize) -> &'static [usize] {
    match bits {
        1 => &[1],
        2 => &[2],
        3 => &[2, 1],
        4 => &[4],
        5 => &[4, 1],
        6 => &[4, 2],
        7 => &[4, 2, 1],
        _ => &[8],
    }
}

fn copy<T: Copy>(what: &str, src: &[T], out: &mut [T]) -> Result<()> {
    fits(what, out.len(), src.len())?;
    out.copy_from_slice(src);
    Ok(())
}

fn wrong_scales(format: &Format, out: &ScalesMut) -> Error {
    Error::Shape(format!("a buffer of {} scales for {format}", out.kind().name()))
}

fn fits(what: &str, got: usize, want: usize) -> Result<()> {
    if got == want {
        return Ok(());
    }
    Err(Error::Shape(format!("a buffer for {got} {what}, expected {want}")))
}

/// Writes one block from 16 rows of unpacked codes (`rows[n*stride + k0 + k]`).
pub(crate) fn pack_block(rows: &[u8], stride: usize, k0: usize, bits: usize, out: &mut [u8]) {
    let mut at = 0;
    let mut low = 0;
    for &w in planes(bits) {
        let plane = &mut out[at..at + 128 * w];
        let per = 16 / (8 / w);
        let mask = if w == 8 { 0xff } else { (1u8 << w) - 1 };
        for n in 0..PANEL {
            let row: &[u8; BLOCK] = rows[n * stride + k0..][..BLOCK].try_into().expect("a block of 64");
            for r in 0..16 {
                let shift = (r / per) * w;
                let base = (r % per) * 64 + 4 * n;
                for j in 0..4 {
                    plane[base + j] |= ((row[4 * r + j] >> low) & mask) << shift;
                }
            }
        }
        at += 128 * w;
        low += w;
    }
}

/// The inverse of [`pack_block`]; `rows` holds zeros where the block goes.
fn unpack_block(block: &[u8], bits: usize, k0: usize, stride: usize, rows: &mut [u8]) {
    let mut at = 0;
    let mut low = 0;
    for &w in planes(bits) {
        let plane = &block[at..at + 128 * w];
        let per = 16 / (8 / w);
        let mask = if w == 8 { 0xff } else { (1u8 << w) - 1 };
        for n in 0..PANEL {
            let row: &mut [u8; BLOCK] = (&mut rows[n * stride + k0..][..BLOCK]).try_into().expect("a block of 64");
            for r in 0..16 {
                let shift = (r / per) * w;
                let base = (r % per) * 64 + 4 * n;
                for j in 0..4 {
                    row[4 * r + j] |= ((plane[base + j] >> shift) & mask) << low;
                }
            }
        }
        at += 128 * w;
        low += w;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_of_every_group_length() {
        assert_eq!(Geometry::new(0, Some(32)).kp, 0);
        let g = Geometry::new(576, Some(128));
        assert_eq!((g.padded, g.groups, g.kp, g.is_plain()), (128, 5, 576, true));
        let g = Geometry::new(100, Some(12));
        assert_eq!((g.padded, g.groups, g.kp), (16, 9, 192));
        let g = Geometry::new(100, Some(200));
        assert_eq!((g.group, g.padded, g.groups, g.kp), (100, 128, 1, 128));
        for k in 1..300 {
            for g in 8..70 {
                let geo = Geometry::new(k, Some(g));
                let mut seen = 0;
                geo.runs(|k0, p0, len| {
                    assert_eq!(k0, seen);
                    assert!(p0 + len <= geo.kp);
                    seen += len;
                });
                assert_eq!(seen, k);
            }
        }
    }
}
