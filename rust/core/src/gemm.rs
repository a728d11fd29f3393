//! The loop nest: cuts a product into tasks, decodes panels, calls kernels, finishes tiles. Products of two quantised
//! operands are in `pair.rs`.
use crate::activation::{Act, Segments};
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::isa::{self, Isa};
use crate::kernel::generic::{Finish, IN_ORDER, W_FLOAT, W_MUL1, W_MUL2, W_TABLE16, W_TABLE256, W_TABLE64};
use crate::kernel::{self, F32Args, GemmArgs, Grp, Kernels, Raw, ScalePtr};
use crate::matrix::{MatMut, MatRef, Scalar};
use crate::pack::{Inner, Packed, PanelScales, PanelZeros, Shared, BLOCK, HALF_ZERO, PANEL};
use crate::plan::{self, Blocking, Path, Plan};
use crate::pool;
use crate::sparse::{Panels, Patch, Summed};
use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// Arithmetic of the inner product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compute {
    /// float32 products and sums of the decoded weights.
    F32,
    /// bfloat16 operands, float32 sums.
    Bf16,
    /// int8 activations, integer sums; `group`: one activation scale per so many values of K instead of per row.
    Int8 {
        /// Values of K that share an activation scale.
        group: Option<u32>,
    },
}

impl Compute {
    /// Every compute, in the order of the documentation.
    pub const ALL: [Self; 5] = [
        Self::F32,
        Self::Bf16,
        Self::Int8 { group: None },
        Self::Int8 { group: Some(32) },
        Self::Int8 { group: Some(128) },
    ];

    /// Whether the kernels can quantise activations so: they do by 16 values at a time.
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::Int8 { group: Some(g) } if g == 0 || g % 16 != 0 => {
                Err(Error::Unsupported(format!("activation groups of {g}: their length must be a multiple of 16")))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::Bf16 => f.write_str("bf16"),
            Self::Int8 { group: None } => f.write_str("int8"),
            Self::Int8 { group: Some(g) } => write!(f, "int8_g{g}"),
        }
    }
}

impl FromStr for Compute {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|c| c.to_string() == s).ok_or_else(|| {
            let names = Self::ALL.map(|c| c.to_string()).join(", ");
            Error::Unsupported(format!("unknown compute {s:?}: expected one of {names}"))
        })
    }
}

/// How a product is to be done.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Arithmetic.
    pub compute: Compute,
    /// Added last, `[N]`.
    pub bias: Option<&'a [f32]>,
    /// Threads at most.
    pub threads: usize,
    /// ISA level.
    pub isa: Isa,
    /// Asked now and then from the calling thread whether to stop.
    pub poll: Option<&'a (dyn Fn() -> bool + Sync)>,
}

impl fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("compute", &self.compute)
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { compute: Compute::F32, bias: None, threads: 1, isa: crate::isa::active(), poll: None }
    }
}

/// Rows handled at a time, so that prepared activations stay small whatever M is.
pub(crate) const SLAB: usize = 4096;

/// Per-thread buffers, kept between calls.
#[derive(Default)]
pub(crate) struct Scratch {
    pub bytes: Option<Buf<u8>>,
    pub sums: Option<Buf<i32>>,
    pub wide: Option<Buf<i64>>,
    pub floats: Option<Buf<f32>>,
    pub weights: Option<Buf<f32>>,
    pub bias: Option<Buf<f32>>,
}

pub(crate) fn grown<T: crate::buf::Plain>(slot: &mut Option<Buf<T>>, len: usize) -> Result<&mut Buf<T>> {
    if slot.as_ref().is_none_or(|b| b.len() < len) {
        *slot = None;
        *slot = Some(Buf::zeroed(len)?);
    }
    slot.as_mut().ok_or(Error::OutOfMemory(len))
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `y = x @ w.T`, with `x` (M, K), `w` (N, K), `y` (M, N).
///
/// # Errors
/// [`Error::Shape`] where the shapes do not fit, [`Error::Unsupported`] where the compute does not fit the format,
/// [`Error::OutOfMemory`], [`Error::Interrupted`].
pub fn matmul(x: &MatRef, w: &Packed, y: &mut MatMut, o: &Options) -> Result<()> {
    check(x.rows, x.cols, w, y, o)?;
    if y.rows == 0 || y.cols == 0 {
        return Ok(());
    }
    if x.cols == 0 {
        return nothing(y, o);
    }
    for m0 in (0..x.rows).step_by(SLAB) {
        let rows = SLAB.min(x.rows - m0);
        let xs = slab(x, m0, rows);
        // SAFETY: the slab lies in y, and slabs are handled one after the other.
        let mut ys = unsafe {
            MatMut::from_raw(
                y.ptr.wrapping_offset(m0 as isize * y.row_stride),
                y.scalar,
                rows,
                y.cols,
                y.row_stride,
                y.col_stride,
            )
        };
        match o.compute {
            Compute::Int8 { group } => int8(&xs, w, &mut ys, o, group.map(|g| g as usize), None)?,
            Compute::F32 => float(&xs, w, &mut ys, o, false)?,
            Compute::Bf16 => float(&xs, w, &mut ys, o, true)?,
        }
    }
    Ok(())
}

/// The product where K is 0: zeros, or the bias.
pub(crate) fn nothing(y: &MatMut, o: &Options) -> Result<()> {
    let mut row = Buf::<f32>::zeroed(y.cols)?;
    if let Some(bias) = o.bias {
        row.copy_from_slice(bias);
    }
    for m in 0..y.rows {
        store_row(y, m, 0, &row, false);
    }
    Ok(())
}

/// The plan that [`matmul`] follows for `m` rows.
///
/// # Errors
/// [`Error::Unsupported`] where the compute does not fit the format.
pub fn explain(m: usize, w: &Packed, o: &Options) -> Result<Plan> {
    plan::plan(m, w, o.compute, o.isa, o.threads)
}

fn slab<'a>(x: &MatRef<'a>, m0: usize, rows: usize) -> MatRef<'a> {
    let p = x.ptr.wrapping_offset(m0 as isize * x.row_stride);
    // SAFETY: rows m0..m0+rows of a valid view.
    unsafe { MatRef::from_raw(p, x.scalar, rows, x.cols, x.row_stride, x.col_stride) }
}

pub(crate) fn check(m: usize, k: usize, w: &Packed, y: &MatMut, o: &Options) -> Result<()> {
    if k != w.geometry.k {
        return Err(Error::Shape(format!(
            "inner dimensions differ: ({m}, {k}) against a weight of shape ({}, {})",
            w.n, w.geometry.k
        )));
    }
    if (y.rows, y.cols) != (m, w.n) {
        return Err(Error::Shape(format!("output of shape ({}, {}), expected ({m}, {})", y.rows, y.cols, w.n)));
    }
    if y.scalar == Scalar::I8 {
        return Err(Error::Unsupported("int8 is not an output type".to_owned()));
    }
    if let Some(b) = o.bias {
        if b.len() != w.n {
            return Err(Error::Shape(format!("bias of length {}, expected {}", b.len(), w.n)));
        }
    }
    o.compute.check()?;
    available(o.isa)
}

pub(crate) fn available(isa: Isa) -> Result<()> {
    if isa.is_available() {
        return Ok(());
    }
    Err(Error::Unsupported(format!("ISA level {isa} is not available on this CPU")))
}

/// Runs the tasks of a blocking: `f(first panel, panels, first row, rows, scratch)`. Panels are taken back and forth, by more
/// rows and from call to call: what was read last is what the second-level cache still holds.
pub(crate) fn tasks(
    b: &Blocking,
    m: usize,
    w: &Packed,
    o: &Options,
    f: impl Fn(usize, usize, usize, usize, &mut Scratch) -> Result<()> + Sync,
) -> Result<()> {
    let panels = w.panels();
    let by_n = panels.div_ceil(b.task_panels);
    pool::try_run_in(b.threads, b.tasks, w.next_order(b.task_panels), o.poll, |t| {
        let (row, at) = (t / by_n, t % by_n);
        let at = if row % 2 == 0 { at } else { by_n - 1 - at };
        let (p0, m0) = (at * b.task_panels, row * b.task_rows);
        let (np, rows) = (b.task_panels.min(panels - p0), b.task_rows.min(m - m0));
        SCRATCH.with(|s| match s.try_borrow_mut() {
            Ok(mut s) => f(p0, np, m0, rows, &mut s),
            Err(_) => f(p0, np, m0, rows, &mut Scratch::default()),
        })
    })
}

/// Largest K whose int32 sums of codes (at most `mul*(2^bits - 1)` times 128) cannot overflow.
pub(crate) fn int32_limit(w: &Packed) -> usize {
    (i32::MAX as usize) / (128 * w.mul as usize * w.byte_top.max(1) as usize)
}

fn scale_ptr(scales: &PanelScales, groups: usize, panel: usize) -> ScalePtr {
    let at = panel * groups * PANEL;
    match scales {
        PanelScales::F32(b) => ScalePtr::F32(b.as_ptr()),
        PanelScales::F16(b) => ScalePtr::F16(b.as_ptr()),
        PanelScales::BF16(b) => ScalePtr::BF16(b.as_ptr()),
    }
    .offset(at)
}

fn zero_ptrs(zeros: &PanelZeros, groups: usize, panel: usize) -> (*const u8, *const f32) {
    let at = panel * groups * PANEL;
    match zeros {
        PanelZeros::Const => (std::ptr::null(), std::ptr::null()),
        PanelZeros::Int(b) => (b.as_ptr().wrapping_add(at), std::ptr::null()),
        PanelZeros::Float(b) => (std::ptr::null(), b.as_ptr().wrapping_add(at)),
    }
}

/// The scales that integer products apply to a panel.
pub(crate) fn sum_scale_ptr(w: &Packed, panel: usize) -> ScalePtr {
    scale_ptr(w.sum_scales(), w.sum_groups(), panel)
}

/// The zero points that integer products subtract from a panel.
pub(crate) fn sum_zero_ptrs(w: &Packed, panel: usize) -> (*const u8, *const f32) {
    zero_ptrs(w.sum_zeros(), w.sum_groups(), panel)
}

/// The bytes of the codes, where they are not the codes themselves.
fn byte_table(w: &Packed) -> *const u8 {
    w.bytes.as_ref().map_or(std::ptr::null(), |b| b.as_ptr())
}

/// All ones where values are odd integers.
fn doubling(w: &Packed) -> i32 {
    -i32::from(w.mul == 2)
}

pub(crate) fn int8(
    x: &MatRef,
    w: &Packed,
    y: &mut MatMut,
    o: &Options,
    group: Option<usize>,
    given: Option<&[f32]>,
) -> Result<()> {
    w.check_integers(group)?;
    if let Some(trellis) = w.trellis() {
        return trellis.int8(x, w, y, o, given);
    }
    let t = kernel::table(o.isa);
    let segs = w.segments(group)?;
    let raw = w.sum_groups() <= 1 && group.is_none();
    if !raw && segs.len > int32_limit(w) {
        return Err(Error::Unsupported(format!(
            "groups of {} values of {} may overflow int32 sums; use compute=\"f32\"",
            segs.len, w.format
        )));
    }
    let long = raw && w.geometry.kp > int32_limit(w);
    let b = plan::int8(x.rows, w, &segs, group.is_some(), o.isa, o.threads);
    let mb = if b.path == Path::Tiles { 16 } else { b.mr };
    // Fused kernels of two-level weights sum group by group.
    let inner = w.inner.as_ref().filter(|_| b.path == Path::Fused);
    let segs = inner.map_or(segs, |i| Cow::Borrowed(&i.groups));
    let factor = match inner {
        Some(_) if w.has_zeros() => 1,
        Some(_) => w.sub,
        None if w.sums_have_zeros() || long => 1,
        None => w.sum_sub(),
    };
    let sums = !(b.path == Path::Tiles && !raw && plan::signed_bytes(w));
    let mut act = Act::quantise(x, &w.geometry, &segs, group, mb, factor, given, sums, t, b.threads)?;
    if w.step != 1.0 {
        act.scale.iter_mut().for_each(|s| *s *= w.step);
    }
    let job = IntJob { w, t, b, act: &act, segs: &segs };
    let y = &*y;
    tasks(&b, x.rows, w, o, |p0, np, m0, rows, s| {
        let (cols, ldc) = (np * PANEL, tile_ldc(&b, np));
        let padded = rows.next_multiple_of(mb.max(1)).next_multiple_of(if mb == 16 { 32 } else { 1 });
        let bias = padded_bias(&mut s.bias, o.bias, p0, np, w.n)?;
        if raw {
            let floats = grown(&mut s.floats, cols)?;
            let scales = row_scales(&mut s.weights, w.sum_scales(), p0, np)?;
            let (zi, zf) = sum_zero_ptrs(w, p0);
            let blocks = w.geometry.blocks();
            if long {
                let sums = &mut grown(&mut s.sums, padded * ldc)?[..padded * ldc];
                let wide = grown(&mut s.wide, padded * ldc)?;
                wide[..padded * ldc].fill(0);
                let step = int32_limit(w) / BLOCK;
                for b0 in (0..blocks).step_by(step) {
                    let at = Region { p0, np, m0, rows, b0, blocks: step.min(blocks - b0) };
                    job.raw_codes(at, sums, ldc, &mut s.bytes)?;
                    wide.iter_mut().zip(sums.iter()).for_each(|(a, &v)| *a += i64::from(v));
                }
                for m in 0..rows {
                    finish_wide(&wide[m * ldc..][..cols], &mut floats[..cols], w, &act, m0 + m, scales, zi, zf, bias);
                    store_row(y, m0 + m, p0 * PANEL, &floats[..cols], act.bad[m0 + m] != 0);
                }
                return Ok(());
            }
            let sums = &mut grown(&mut s.sums, padded * ldc)?[..padded * ldc];
            let at = Region { p0, np, m0, rows, b0: 0, blocks };
            let summed = if let Some(inner) = inner {
                job.two_level(inner, at, sums, ldc);
                Summed::Values
            } else {
                job.raw(at, sums, ldc, &mut s.bytes)?
            };
            for m in 0..rows {
                expect_row(y, m0, m, rows, p0 * PANEL, cols);
                let e = Finish {
                    cols,
                    act_scale: act.scale[m0 + m],
                    sum: if summed == Summed::Values || act.bad[m0 + m] != 0 { 0 } else { act.sum(m0 + m) },
                    dbl: doubling(w),
                    bias,
                    scales,
                    zeros: zi,
                    fzeros: zf,
                };
                finish_sums(t, y, m0 + m, p0 * PANEL, &sums[m * ldc..], floats, &e, act.bad[m0 + m] != 0);
            }
        } else {
            let c = &mut grown(&mut s.floats, padded * ldc)?[..padded * ldc];
            let at = Region { p0, np, m0, rows, b0: 0, blocks: w.geometry.blocks() };
            job.grouped(at, c, ldc, &mut s.bytes)?;
            for m in 0..rows {
                expect_row(y, m0, m, rows, p0 * PANEL, cols);
                let row = &mut c[m * ldc..][..cols];
                finish_row(t, y, m0 + m, p0 * PANEL, row, act.scale[m0 + m], bias, act.bad[m0 + m] != 0);
            }
        }
        Ok(())
    })
}

/// Row stride of the sums of `np` panels. Tiles come in pairs, so a lone last panel gets a partner whose columns are
/// dropped; and rows a power of two apart would fall on few cache sets.
pub(crate) fn tile_ldc(b: &Blocking, np: usize) -> usize {
    match b.path {
        Path::Tiles | Path::TilesBf16 => np.next_multiple_of(2) * PANEL + PANEL,
        _ => np * PANEL,
    }
}

/// Blocks of K that integer tiles work on at a time. With few rows decoding is most of the work, and stores that miss the
/// first-level cache are most of decoding: a window's decoded panels, codes, rows and sums have to fit there. With many
/// both operands stream from the second-level cache, and it counts that sums are fetched and stored seldom.
#[cfg(target_arch = "x86_64")]
fn raw_window(rows: usize) -> usize {
    if rows <= 64 {
        4
    } else {
        STREAM
    }
}

/// The same for what streams from the second-level cache, or is tiles already.
#[cfg(target_arch = "x86_64")]
const STREAM: usize = 64;

/// The same where float sums are fetched and stored for every segment of `per` blocks, or two, whatever the window is.
#[cfg(target_arch = "x86_64")]
fn grouped_window(rows: usize, per: usize) -> usize {
    let blocks = if (17..=64).contains(&rows) { 2 } else { 4 };
    (blocks / per).max(1) * per
}

/// The same where float sums stay in registers for a window.
#[cfg(target_arch = "x86_64")]
fn short_window(rows: usize) -> usize {
    match rows {
        0..=16 => 4,
        17..=64 => 8,
        _ => 64,
    }
}

/// Panels whose sums stay in the first-level cache, 16 KiB of it where it can be, until K is through.
#[cfg(target_arch = "x86_64")]
fn close_panels(rows: usize) -> usize {
    (256 / rows).next_multiple_of(2).clamp(4, 16)
}

/// The order in which tiles take pairs of panels and windows of K, first panel and first block: `close` panels at a time.
#[cfg(target_arch = "x86_64")]
fn pairs(np: usize, close: usize, blocks: usize, window: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..np).step_by(close).flat_map(move |first| {
        let end = np.min(first + close);
        (0..blocks).step_by(window).flat_map(move |k| (first..end).step_by(2).map(move |p| (p, k)))
    })
}

/// As [`ahead`] in the order of [`pairs`].
#[cfg(target_arch = "x86_64")]
fn pairs_ahead(w: &Packed, p: usize, np: usize, close: usize, window: usize) -> usize {
    let first = p / close * close;
    ahead(w, p - first, close.min(np - first), 2, window)
}

/// What pass `i` over a pair of panels, `n` blocks of codes that are tiles, fetches of the pair that comes next, `distance`
/// bytes on: all passes together, or the first two, fetch the whole of it.
#[cfg(target_arch = "x86_64")]
fn panels_ahead(
    pair: [*const u8; 2],
    i: usize,
    rows: usize,
    n: usize,
    distance: usize,
) -> crate::kernel::x86::amx::Ahead {
    use crate::kernel::x86::amx::Ahead;
    let part = |quarters: usize| pair[i / quarters].wrapping_add(distance + (i % quarters) * n * 1024 / quarters);
    match i {
        0..8 if rows >= 8 * 32 => Ahead::PanelsSlowly(part(4)),
        0..2 if rows < 8 * 32 => Ahead::Panels(part(1)),
        _ => Ahead::Both,
    }
}

/// The bias of some panels, zero-padded; null where there is none.
pub(crate) fn padded_bias(
    slot: &mut Option<Buf<f32>>,
    bias: Option<&[f32]>,
    p0: usize,
    np: usize,
    n: usize,
) -> Result<*const f32> {
    let Some(b) = bias else { return Ok(std::ptr::null()) };
    let out = grown(slot, np * PANEL)?;
    let (lo, hi) = (p0 * PANEL, n.min((p0 + np) * PANEL));
    out.fill(0.0);
    out[..hi - lo].copy_from_slice(&b[lo..hi]);
    Ok(out.as_ptr())
}

/// The row scales of some panels as f32 (formats with one scale per row).
pub(crate) fn row_scales(
    slot: &mut Option<Buf<f32>>,
    scales: &PanelScales,
    p0: usize,
    np: usize,
) -> Result<*const f32> {
    let (lo, len) = (p0 * PANEL, np * PANEL);
    if let PanelScales::F32(b) = scales {
        if !b.is_empty() {
            return Ok(b[lo..lo + len].as_ptr());
        }
    }
    let out = grown(slot, len)?;
    if scales.nbytes() == 0 {
        out.fill(0.0);
    } else {
        scales.read(lo, &mut out[..len]);
    }
    Ok(out.as_ptr())
}

/// Finishes a row of int64 sums: the same arithmetic as `finish_raw`, the conversion rounding once.
fn finish_wide(
    d: &[i64],
    out: &mut [f32],
    w: &Packed,
    act: &Act,
    m: usize,
    scales: *const f32,
    zi: *const u8,
    zf: *const f32,
    bias: *const f32,
) {
    let sum = i64::from(act.sum(m));
    for (j, (o, &d)) in out.iter_mut().zip(d).enumerate() {
        // SAFETY: the arrays reach the end of the last panel, as `d` does.
        unsafe {
            let s = *scales.add(j);
            let zero = if zi.is_null() { i64::from(w.sum_sub()) } else { i64::from(*zi.add(j)) };
            let exact = d * i64::from(w.mul) - if zf.is_null() { zero * sum } else { 0 };
            let mut f = (exact as f32).mul_add(s, 0.0);
            if !zf.is_null() {
                f = (sum as f32).mul_add(-(s * *zf.add(j)), f);
            }
            f *= act.scale[m];
            *o = if bias.is_null() { f } else { f + *bias.add(j) };
        }
    }
}

/// Bytes (wrapping) from the codes of a window to those that are unpacked next in their place: the same window of the panel
/// `count` on, and after the last panels of a task the next window of the first.
pub(crate) fn ahead(w: &Packed, p: usize, np: usize, count: usize, window: usize) -> usize {
    if p + count < np {
        count * w.panel_bytes()
    } else {
        (window * w.block_bytes()).wrapping_sub(p * w.panel_bytes())
    }
}

/// A part of a product: panels `p0..p0 + np` by rows `m0..m0 + rows` of activations, over blocks `b0..b0 + blocks` of K.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Region {
    pub p0: usize,
    pub np: usize,
    pub m0: usize,
    pub rows: usize,
    pub b0: usize,
    pub blocks: usize,
}

/// One integer product: what every task shares.
pub(crate) struct IntJob<'a> {
    pub w: &'a Packed,
    pub t: &'static Kernels,
    pub b: Blocking,
    pub act: &'a Act,
    pub segs: &'a Segments,
}

impl IntJob<'_> {
    fn codes(&self, panel: usize, block: usize) -> *const u8 {
        self.w.codes_at(panel, block)
    }

    /// Unpacks blocks of one panel to bytes `u` (or values, where they fit a signed byte and `signed` is set).
    /// `ahead`: bytes to prefetch ahead.
    pub unsafe fn unpack(&self, panel: usize, block: usize, blocks: usize, signed: bool, ahead: usize, out: *mut u8) {
        let (dbl, sub) = if signed { (doubling(self.w) as u8, self.w.sum_sub() as u8) } else { (0, 0) };
        if let Some(bytes) = &self.w.bytes {
            // SAFETY: the caller's buffer holds the unpacked blocks, the table has 64 entries.
            unsafe {
                if self.w.is_halved() {
                    let codes = out.add(blocks * 1024);
                    self.w.unpack(self.t, panel, block, blocks, 0, 0, ahead, codes);
                    (self.t.look_up_halves)(
                        codes,
                        out,
                        blocks,
                        bytes.as_ptr(),
                        if signed { HALF_ZERO as u8 } else { 0 },
                    );
                    return;
                }
                self.w.unpack(self.t, panel, block, blocks, 0, 0, ahead, out);
                (self.t.look_up)(out, blocks, bytes.as_ptr(), sub, self.w.bits <= 4);
            }
            return;
        }
        if let Some(inner) = &self.w.inner {
            let (g, at) = (&self.w.geometry, panel * self.w.geometry.groups * PANEL);
            let a = kernel::Inner {
                codes: self.codes(panel, block),
                bytes: out,
                blocks,
                block0: block,
                padded: g.padded,
                groups: g.groups,
                mul: inner.mul[at..].as_ptr(),
                add: inner.add[at..].as_ptr(),
                sub,
                ahead,
            };
            // SAFETY: as above; a panel has 16 inner scales in each of its groups.
            unsafe { (self.t.unpack_inner[self.w.bits - 2])(&a) };
            return;
        }
        // SAFETY: as above.
        unsafe { self.w.unpack(self.t, panel, block, blocks, dbl, sub, ahead, out) };
    }

    /// Bytes to prefetch ahead: a KiB or two of each panel's stream, where that helps.
    pub fn prefetch(&self) -> usize {
        if !self.w.is_long() || ((self.b.mr == 1 || self.w.bits == 8) && isa::streams_by_itself()) {
            0
        } else {
            2048
        }
    }

    /// Ungrouped sums of a region, written to `c`, whose rows are those of whole tiles: of codes, or where sparse panels have them
    /// so, of values.
    pub fn raw(&self, at: Region, c: &mut [i32], ldc: usize, bytes: &mut Option<Buf<u8>>) -> Result<Summed> {
        let Region { p0, np, m0, rows, b0, blocks } = at;
        if let Some(sparse) = &self.w.sparse {
            if let Some(sums) = sparse.raw(&mut Patch { job: self, at, c: &mut *c, ldc }) {
                return Ok(sums);
            }
        }
        #[cfg(target_arch = "x86_64")]
        if self.b.path == Path::Tiles {
            use crate::kernel::x86::amx::{self, Ahead};
            if self.w.is_halved() {
                c.fill(0);
                self.halved_tiles::<true>(at, c.as_mut_ptr().cast(), ldc, bytes)?;
                return Ok(Summed::Codes);
            }
            let window = if self.w.is_bytes() { STREAM } else { raw_window(rows) };
            let streams = window == STREAM;
            let close = if streams { np } else { close_panels(rows) };
            let buf = grown(bytes, 2 * window * 1024)?;
            let second = buf.as_mut_ptr().wrapping_add(window * 1024);
            let stride = self.act.tile_stride();
            if blocks == 0 {
                c.fill(0);
            }
            // SAFETY: the plan chose tiles, so permission was granted; `c` has whole tiles (see `tile_ldc`).
            unsafe {
                let _tiles = amx::Tiles::new(64);
                for (p, k) in pairs(np, close, blocks, window) {
                    let n = window.min(blocks - k);
                    let last = (p + 1).min(np - 1);
                    // Codes of a byte are tiles already.
                    let pair = if self.w.is_bytes() {
                        [self.codes(p0 + p, b0 + k), self.codes(p0 + last, b0 + k)]
                    } else {
                        let ahead = pairs_ahead(self.w, p, np, close, window);
                        self.unpack(p0 + p, b0 + k, n, false, ahead, buf.as_mut_ptr());
                        self.unpack(p0 + last, b0 + k, n, false, ahead, second);
                        [buf.as_ptr(), second.cast_const()]
                    };
                    for m in (0..rows).step_by(32) {
                        let a0 = self.act.rows((m0 + m) / 16, b0 + k).codes;
                        let a1 = if m + 16 < rows {
                            self.act.rows((m0 + m) / 16 + 1, b0 + k).codes
                        } else {
                            std::ptr::null()
                        };
                        let ahead = match streams {
                            true if self.w.is_bytes() => panels_ahead(pair, m / 32, rows, n, 2 * self.w.panel_bytes()),
                            true => Ahead::Both,
                            false => Ahead::Rows(amx::rows_ahead(m, rows, stride)),
                        };
                        amx::raw([a0, a1], pair, n, ahead, k == 0, c.as_mut_ptr().add(m * ldc + p * PANEL), ldc);
                    }
                }
            }
            return Ok(Summed::Codes);
        }
        c.fill(0);
        let mr = self.b.mr;
        let call = |f: kernel::RawFn, codes, panel_stride, b: usize, n, p: usize, m: usize, c: *mut i32, prefetch| {
            let a = Raw {
                codes,
                panel_stride,
                blocks: n,
                act: self.act.rows((m0 + m) / mr, b),
                c: c.wrapping_add(m * ldc + p * PANEL),
                ldc,
                prefetch,
                table: byte_table(self.w),
            };
            // SAFETY: the arguments describe whole panels and padded rows.
            unsafe { f(&a) };
        };
        let c = c.as_mut_ptr();
        let find = || {
            if self.w.is_table() {
                (self.t.raw_table)(self.w.looked_up_bits(), mr)
            } else {
                (self.t.raw)(self.w.bits, mr)
            }
        };
        let fused = (self.b.path == Path::Fused).then(find).flatten();
        let mut p = 0;
        if let Some((f, fp)) = fused {
            while p + fp <= np {
                for m in (0..rows).step_by(mr) {
                    call(f, self.codes(p0 + p, b0), self.w.panel_bytes(), b0, blocks, p, m, c, self.prefetch());
                }
                p += fp;
            }
        }
        let window = if self.b.window == 0 { 16 } else { self.b.window };
        let buf = grown(bytes, window * self.w.unpacked_block())?;
        while p < np {
            for k in (0..blocks).step_by(window) {
                let n = window.min(blocks - k);
                // SAFETY: the buffer holds a window.
                unsafe { self.unpack(p0 + p, b0 + k, n, false, IN_ORDER, buf.as_mut_ptr()) };
                for m in (0..rows).step_by(mr) {
                    call((self.t.raw_bytes)(self.w.byte_top, mr), buf.as_ptr(), 0, b0 + k, n, p, m, c, 0);
                }
            }
            p += 1;
        }
        Ok(Summed::Codes)
    }

    /// As [`Self::raw`], always of codes. The sums of activations are their plain sums.
    pub fn raw_codes(&self, at: Region, c: &mut [i32], ldc: usize, bytes: &mut Option<Buf<u8>>) -> Result<()> {
        if self.raw(at, c, ldc, bytes)? == Summed::Values {
            for m in 0..at.rows {
                let share = self.act.sum(at.m0 + m).wrapping_mul(self.w.sub);
                c[m * ldc..][..at.np * PANEL].iter_mut().for_each(|v| *v = v.wrapping_add(share));
            }
        }
        Ok(())
    }

    /// Sums of two-level weights, each group's times its integer scale, written to `c`; all of K.
    fn two_level(&self, inner: &Inner, at: Region, c: &mut [i32], ldc: usize) {
        let Region { p0, np, m0, rows, .. } = at;
        let (w, mr) = (self.w, self.b.mr);
        let stride = w.geometry.groups * PANEL;
        let find = |single| (self.t.inner)(w.bits, w.has_zeros(), self.segs.registers(), mr, single);
        c.fill(0);
        let (Some(wide), Some(single)) = (find(false), find(true)) else { return };
        let c = c.as_mut_ptr();
        let mut p = 0;
        while p < np {
            let (f, count) = if np - p >= wide.1 { wide } else { single };
            let at = (p0 + p) * stride;
            for m in (0..rows).step_by(mr) {
                let a = Grp {
                    codes: self.codes(p0 + p, 0),
                    panel_stride: w.panel_bytes(),
                    blocks: w.geometry.blocks(),
                    seg_blocks: self.segs.blocks().max(1),
                    seg_registers: self.segs.registers(),
                    seg0: 0,
                    seg_group: self.segs.group.as_ptr(),
                    scales: ScalePtr::F32(std::ptr::null()),
                    scale_stride: stride,
                    zeros: zero_ptrs(&w.zeros, w.geometry.groups, p0 + p).0,
                    fzeros: std::ptr::null(),
                    inner: inner.mul[at..].as_ptr(),
                    act: self.act.rows((m0 + m) / mr, 0),
                    c: c.wrapping_add(m * ldc + p * PANEL).cast(),
                    ldc,
                    dbl: 0,
                    prefetch: self.prefetch(),
                    table: std::ptr::null(),
                };
                // SAFETY: whole panels, whole groups and padded rows; sums of floats and of integers are as wide.
                unsafe { f(&a) };
            }
            p += count;
        }
    }

    /// A grouped product of a region over all of K, written to `c`, whose rows are those of whole tiles.
    fn grouped(&self, at: Region, c: &mut [f32], ldc: usize, bytes: &mut Option<Buf<u8>>) -> Result<()> {
        let Region { p0, np, m0, rows, blocks, .. } = at;
        if let Some(sparse) = &self.w.sparse {
            if sparse.grouped(Patch { job: self, at, c: &mut *c, ldc }) {
                return Ok(());
            }
        }
        c.fill(0.0);
        #[cfg(target_arch = "x86_64")]
        if self.b.path == Path::Tiles {
            let close = close_panels(rows);
            for p in (0..np).step_by(close) {
                let at = Region { p0: p0 + p, np: close.min(np - p), ..at };
                self.grouped_tiles(at, &mut c[p * PANEL..], ldc, bytes)?;
            }
            return Ok(());
        }
        let w = self.w;
        let mr = self.b.mr;
        let regs = self.segs.registers();
        let stride = w.sum_groups() * PANEL;
        let c = c.as_mut_ptr();
        let call = |f: kernel::GroupedFn, codes, panel_stride, k: usize, n, p: usize, m: usize, prefetch| {
            let (zeros, fzeros) = sum_zero_ptrs(w, p0 + p);
            let a = Grp {
                codes,
                panel_stride,
                blocks: n,
                seg_blocks: self.segs.blocks().max(1),
                seg_registers: regs,
                seg0: k * BLOCK / self.segs.len,
                seg_group: self.segs.group.as_ptr(),
                scales: sum_scale_ptr(w, p0 + p),
                scale_stride: stride,
                zeros,
                fzeros,
                inner: std::ptr::null(),
                act: self.act.rows((m0 + m) / mr, k),
                c: c.wrapping_add(m * ldc + p * PANEL),
                ldc,
                dbl: doubling(w),
                prefetch,
                table: byte_table(w),
            };
            // SAFETY: the arguments describe whole panels, whole segments and padded rows.
            unsafe { f(&a) };
        };
        let find = || {
            if w.is_table() {
                (self.t.grouped_table)(w.looked_up_bits(), regs, mr)
            } else {
                (self.t.grouped)(w.bits, w.sums_have_zeros(), regs, mr)
            }
        };
        let fused = (self.b.path == Path::Fused).then(find).flatten();
        let mut p = 0;
        if let Some((f, fp)) = fused {
            while p + fp <= np {
                for m in (0..rows).step_by(mr) {
                    call(f, self.codes(p0 + p, 0), w.panel_bytes(), 0, blocks, p, m, self.prefetch());
                }
                p += fp;
            }
        }
        let per = self.segs.blocks().max(1);
        let window = if self.b.window == 0 { (16 / per).max(1) * per } else { self.b.window };
        let buf = grown(bytes, window.min(blocks) * w.unpacked_block())?;
        let f = (self.t.grouped_bytes)(w.byte_top, w.sums_have_zeros(), regs, mr);
        while p < np {
            for k in (0..blocks).step_by(window) {
                let n = window.min(blocks - k);
                // SAFETY: the buffer holds a window.
                unsafe { self.unpack(p0 + p, k, n, false, IN_ORDER, buf.as_mut_ptr()) };
                for m in (0..rows).step_by(mr) {
                    call(f, buf.as_ptr(), 0, k, n, p, m, 0);
                }
            }
            p += 1;
        }
        Ok(())
    }

    /// What tile kernels need for `rows` rows from `m` on against a pair of panels whose `n` blocks from `k` on are decoded at
    /// `b`.
    #[cfg(target_arch = "x86_64")]
    pub fn tile_args(
        &self,
        panels: [usize; 2],
        b: [*const u8; 2],
        k: usize,
        n: usize,
        m: usize,
        rows: usize,
        c: *mut f32,
        ldc: usize,
    ) -> crate::kernel::x86::amx::TileGrp {
        let act = self.act.rows(m / 16, k);
        let zeros = panels.map(|p| sum_zero_ptrs(self.w, p));
        crate::kernel::x86::amx::TileGrp {
            a: act.codes,
            a_stride: self.act.tile_stride(),
            rows,
            b,
            steps: n,
            seg_steps: self.segs.blocks(),
            parts: BLOCK / self.segs.len.clamp(1, BLOCK),
            seg0: k * BLOCK / self.segs.len,
            seg_group: self.segs.group.as_ptr(),
            scales: panels.map(|p| sum_scale_ptr(self.w, p)),
            zeros: zeros.map(|z| z.0),
            fzeros: zeros.map(|z| z.1),
            act,
            act_stride: self.act.tile_segments(),
            c,
            ldc,
            dbl: doubling(self.w),
        }
    }

    /// As [`Self::grouped_tiles`] for segments of one product.
    #[cfg(target_arch = "x86_64")]
    fn short_tiles(&self, at: Region, c: &mut [f32], ldc: usize, bytes: &mut Option<Buf<u8>>) -> Result<()> {
        use crate::kernel::x86::amx;
        let Region { p0, np, m0, rows, blocks, .. } = at;
        let w = self.w;
        let window = short_window(rows).min(blocks);
        let buf = grown(bytes, window * 1024)?;
        // SAFETY: the plan chose tiles, so permission was granted; `c` has whole tiles (see `tile_ldc`).
        unsafe {
            let _tiles = amx::Tiles::new(self.segs.len);
            for k in (0..blocks).step_by(window) {
                let n = window.min(blocks - k);
                for p in 0..np {
                    self.unpack(p0 + p, k, n, true, ahead(w, p, np, 1, window), buf.as_mut_ptr());
                    let at = c.as_mut_ptr().add(p * PANEL);
                    let a = self.tile_args([p0 + p; 2], [buf.as_ptr(); 2], k, n, m0, rows, at, ldc);
                    amx::short(!a.act.scales.is_null())(&a);
                }
            }
        }
        Ok(())
    }

    #[cfg(target_arch = "x86_64")]
    fn grouped_tiles(&self, at: Region, c: &mut [f32], ldc: usize, bytes: &mut Option<Buf<u8>>) -> Result<()> {
        use crate::kernel::x86::amx;
        let Region { p0, np, m0, rows, blocks, .. } = at;
        let w = self.w;
        if w.is_halved() {
            return self.halved_tiles::<false>(at, c.as_mut_ptr(), ldc, bytes);
        }
        let signed = plan::signed_bytes(w);
        // Scales of activations by groups cost more there than the sums gain, once rows are many.
        let act_groups = !self.act.rows(0, 0).scales.is_null();
        if signed && self.segs.len <= BLOCK && (!act_groups || rows <= 16) {
            return self.short_tiles(at, c, ldc, bytes);
        }
        let kernel = amx::grouped(signed);
        let per = self.segs.blocks().max(1);
        let window = grouped_window(rows, per);
        let buf = grown(bytes, 2 * window * 1024)?;
        let second = buf.as_mut_ptr().wrapping_add(window * 1024);
        // SAFETY: the plan chose tiles, so permission was granted; `c` has whole tiles (see `tile_ldc`).
        unsafe {
            let _tiles = amx::Tiles::new(self.segs.len.min(64));
            for k in (0..blocks).step_by(window) {
                let n = window.min(blocks - k);
                for p in (0..np).step_by(2) {
                    let last = (p + 1).min(np - 1);
                    let ahead = ahead(w, p, np, 2, window);
                    self.unpack(p0 + p, k, n, signed, ahead, buf.as_mut_ptr());
                    self.unpack(p0 + last, k, n, signed, ahead, second);
                    let pair = [buf.as_ptr(), second.cast_const()];
                    let at = c.as_mut_ptr().add(p * PANEL);
                    kernel(&self.tile_args([p0 + p, p0 + last], pair, k, n, m0, rows, at, ldc));
                }
            }
        }
        Ok(())
    }
}

/// Float activations in padded places: read in place when they can be.
pub(crate) struct Floats {
    ptr: *const f32,
    pub stride: isize,
    _own: Option<Taken<f32>>,
}
// SAFETY: read only, and the owner outlives the job.
unsafe impl Sync for Floats {}

impl Floats {
    fn own(buf: Taken<f32>, stride: usize) -> Self {
        Self { ptr: buf.as_ptr(), stride: stride as isize, _own: Some(buf) }
    }

    /// Row `m` from place `k` on.
    pub fn at(&self, m: usize, k: usize) -> *const f32 {
        self.ptr.wrapping_offset(m as isize * self.stride).wrapping_add(k)
    }
}

/// Reads row `m` into its padded places, rounded to bfloat16 precision where asked. Padding holds -0, see `fill_padding`
/// in `pack.rs`.
fn read_padded(x: &MatRef, m: usize, w: &Packed, t: &Kernels, bf16: bool, row: &mut [f32]) {
    let g = &w.geometry;
    if g.kp != g.k {
        row.fill(-0.0);
    }
    g.runs(|k0, p0, len| x.read_row(m, k0, &mut row[p0..p0 + len]));
    if bf16 {
        // SAFETY: kp is a multiple of 64.
        unsafe { (t.round_bf16)(row.as_mut_ptr(), g.kp) };
    }
}

/// `mr`: rows are wanted side by side, `[block of mr][k][mr]` (the last block as narrow as its rows), which the dense
/// kernel reads in order; rows a power of two apart would fall on one cache set. `whole`: the last block is as wide as the
/// others, filled up with zeros. 0 keeps rows apart.
pub(crate) fn floats(
    x: &MatRef,
    w: &Packed,
    t: &Kernels,
    bf16: bool,
    mr: usize,
    whole: bool,
    threads: usize,
) -> Result<Floats> {
    let g = &w.geometry;
    let kp = g.kp;
    let threads = if x.rows * kp < 1 << 17 { 1 } else { threads };
    let direct = mr == 0
        && !bf16
        && g.is_plain()
        && kp == g.k
        && x.scalar == Scalar::F32
        && x.col_stride == 4
        && x.row_stride % 4 == 0
        && x.ptr.align_offset(4) == 0;
    if direct {
        return Ok(Floats { ptr: x.ptr.cast(), stride: x.row_stride / 4, _own: None });
    }
    let mut own = Taken::<f32>::new(if whole { x.rows.next_multiple_of(mr) } else { x.rows } * kp)?;
    let out = Shared(own.as_mut_ptr());
    if mr == 0 {
        pool::try_run(threads, x.rows, None, |m| {
            // SAFETY: row m of the buffer belongs to this task.
            let row = unsafe { std::slice::from_raw_parts_mut(out.get().add(m * kp), kp) };
            read_padded(x, m, w, t, bf16, row);
            Ok(())
        })?;
        return Ok(Floats::own(own, kp));
    }
    pool::try_run(threads, x.rows.div_ceil(mr), None, |i| {
        let (m0, count) = (i * mr, mr.min(x.rows - i * mr));
        let mut rows = Taken::<f32>::new(count * kp)?;
        for (j, row) in rows[..count * kp].chunks_exact_mut(kp.max(1)).enumerate() {
            read_padded(x, m0 + j, w, t, bf16, row);
        }
        let width = if whole { mr } else { count };
        // SAFETY: block i of the buffer belongs to this task.
        let to = unsafe { std::slice::from_raw_parts_mut(out.get().add(m0 * kp), width * kp) };
        if count < width {
            to.fill(0.0);
        }
        // A few values of K at a time, so that both sides of the transposition stay in cache.
        for (b, part) in to.chunks_mut(32 * width).enumerate() {
            for j in 0..count {
                let row = &rows[j * kp + b * 32..][..part.len() / width];
                part[j..].iter_mut().step_by(width).zip(row).for_each(|(o, &v)| *o = v);
            }
        }
        Ok(())
    })?;
    Ok(Floats::own(own, kp))
}

/// How the float kernels decode this weight.
fn weight_mode(w: &Packed) -> u8 {
    if w.is_table() {
        return match w.bits {
            0..=4 => W_TABLE16,
            5 | 6 => W_TABLE64,
            _ => W_TABLE256,
        };
    }
    match (&w.zeros, w.mul) {
        (PanelZeros::Float(_), _) => W_FLOAT,
        (_, 2) => W_MUL2,
        _ => W_MUL1,
    }
}

/// Activations rounded to bf16, in blocks of 16 rows by 32 k: 1 KiB, a row every 64 bytes.
#[cfg(target_arch = "x86_64")]
fn bf16_blocks(x: &MatRef, w: &Packed, t: &Kernels, threads: usize) -> Result<Taken<u16>> {
    let kp = w.geometry.kp;
    let size = x.rows.next_multiple_of(16) * kp;
    let mut own = Taken::<u16>::new(size)?;
    let out = Shared(own.as_mut_ptr());
    pool::try_run(if x.rows * kp < 1 << 16 { 1 } else { threads }, x.rows.div_ceil(16), None, |i| {
        let mut copy = Taken::<f32>::new(kp)?;
        let copy = &mut copy[..kp];
        // SAFETY: block i of the buffer belongs to this task.
        let block = unsafe { std::slice::from_raw_parts_mut(out.get().add(i * 16 * kp), 16 * kp) };
        if x.rows < (i + 1) * 16 {
            block.fill(0);
        }
        for m in i * 16..x.rows.min((i + 1) * 16) {
            let row = if let Some(row) = x.row_f32(m).filter(|_| w.geometry.is_plain() && kp == x.cols) {
                row
            } else {
                read_padded(x, m, w, t, false, copy);
                &*copy
            };
            // SAFETY: the block has room for every step, the CPU has tiles and what came with them.
            unsafe { crate::kernel::x86::amx::bf16_row(row, block[(m % 16) * 32..].as_mut_ptr()) };
        }
        Ok(())
    })?;
    Ok(own)
}

/// Blocks of K that bf16 tiles work on at a time; see [`raw_window`].
#[cfg(target_arch = "x86_64")]
const BF16_WINDOW: usize = 4;
/// The same where scales come after the sums of a group: float sums are fetched and stored then either way, so what counts
/// is that decoded panels stay in the first-level cache beside rows and sums.
#[cfg(target_arch = "x86_64")]
const LATE_WINDOW: usize = 2;

/// The same for panels of their own, whose decoding takes longer than what it reads and writes: as for [`raw_window`], once
/// rows are more than a few it counts that sums are fetched and stored seldom.
#[cfg(target_arch = "x86_64")]
fn dense_window(rows: usize) -> usize {
    if rows <= 16 {
        BF16_WINDOW
    } else {
        16
    }
}

/// The shortest group whose scales are worth applying after its sums: at 32, one step of tiles, storing and adding the sums
/// costs more than scaling the codes.
#[cfg(target_arch = "x86_64")]
const LATE_GROUP: usize = 64;

/// How bf16 tiles take a weight's scales: after the sums of a segment, whose codes are then exact integers, or with the
/// codes.
#[cfg(target_arch = "x86_64")]
struct LateScales {
    /// Blocks decoded at a time.
    window: usize,
    /// Steps of a segment.
    steps: usize,
    /// Places of a segment.
    places: usize,
    /// Bits of the codes that a table of 32 entries decodes: 8 where they are unpacked first.
    table: Option<usize>,
}

#[cfg(target_arch = "x86_64")]
impl LateScales {
    fn new(w: &Packed) -> Option<Self> {
        let g = &w.geometry;
        if w.dense.is_some() || matches!(w.zeros, PanelZeros::Float(_)) || g.padded < LATE_GROUP || w.tensor != 1.0 {
            return None;
        }
        let small = if w.has_zeros() { w.bits <= 4 && w.zero_max <= 16 } else { w.bits <= 5 };
        // Longer tables are looked up in bf16: their values are rounded, as scaled ones would be.
        if w.is_table() && w.bits <= 6 && !(small && exact_in_bf16(w)) {
            return None;
        }
        let per = g.padded.div_ceil(BLOCK);
        let (window, places) = if per <= BF16_WINDOW {
            (((LATE_WINDOW / per).max(1) * per), g.padded)
        } else {
            // Long groups are cut where windows end.
            let fits = |n: &usize| g.groups <= 1 || per.is_multiple_of(*n);
            let n = (1..=BF16_WINDOW).rev().find(fits).unwrap_or(1);
            (n, n * BLOCK)
        };
        let table = small.then_some(if w.sparse.is_some() { 8 } else { w.bits });
        Some(Self { window, steps: places / 32, places, table })
    }
}

/// Whether bf16 has the values of a table.
#[cfg(target_arch = "x86_64")]
fn exact_in_bf16(w: &Packed) -> bool {
    w.values.iter().all(|v| v.to_bits() << 16 == 0)
}

#[cfg(target_arch = "x86_64")]
fn float_tiles(x: &MatRef, w: &Packed, y: &mut MatMut, o: &Options, b: &Blocking) -> Result<()> {
    use crate::kernel::x86::amx::{self, Ahead};
    use crate::kernel::x86::words;
    let t = kernel::table(o.isa);
    let a = bf16_blocks(x, w, t, b.threads)?;
    let (a, y) = (&a, &*y);
    let g = &w.geometry;
    let late = LateScales::new(w);
    let long = w.is_table() && w.bits > 6 && (late.is_some() || exact_in_bf16(w));
    let (decode, window) = match &late {
        _ if long => {
            let decode = words::decoder(words::is_symmetric(&w.values, w.bits), late.is_some());
            (decode, late.as_ref().map_or(BF16_WINDOW, |l| l.window))
        }
        Some(LateScales { table: Some(bits), window, .. }) => (amx::bf16_table_decoder(*bits), *window),
        Some(l) => (words::integer_decoder(w.mul), l.window),
        None => (amx::bf16_decoder(weight_mode(w)), BF16_WINDOW),
    };
    let window = if w.dense.is_some() { dense_window(b.task_rows) } else { window };
    // Packed codes that their decoder unpacks itself, or that are bytes.
    let small = late.as_ref().is_some_and(|l| l.table.is_some());
    let fused = w.sparse.is_none() && (small || (w.bits == 8 && (long || late.is_some())));
    tasks(b, x.rows, w, o, |p0, np, m0, rows, s| {
        let ldc = tile_ldc(b, np);
        let bias = padded_bias(&mut s.bias, o.bias, p0, np, w.n)?;
        let padded = rows.next_multiple_of(32);
        let c = grown(&mut s.floats, padded * ldc)?;
        // Other products begin at 0 by themselves.
        if late.is_some() {
            c[..padded * ldc].fill(0.0);
        }
        let bytes = grown(&mut s.bytes, window * (1024 + 2 * 2048))?;
        let tiles = bytes.as_mut_ptr().wrapping_add(window * 1024);
        // SAFETY: permission came with the plan.
        let _tiles = unsafe { amx::Tiles::new(64) };
        let close = close_panels(rows);
        for (p, k) in pairs(np, close, g.blocks(), window) {
            let n = window.min(g.blocks() - k);
            // The groups of this window's segments.
            let mut groups = [0u32; 2 * BF16_WINDOW];
            if let Some(l) = &late {
                for (i, group) in groups.iter_mut().enumerate() {
                    *group = ((k * BLOCK + i * l.places) / g.padded).min(g.groups - 1) as u32;
                }
            }
            let count = 2.min(np - p);
            // SAFETY: buffers hold a window of two panels and the padded rows; permission came with the plan.
            unsafe {
                for i in 0..count {
                    let panel = p0 + p + i;
                    if let Some(panels) = &w.dense {
                        let to = tiles.wrapping_add(i * window * 2048);
                        panels.tiles(t, panel, k * BLOCK, n * BLOCK, &mut s.weights, to)?;
                        continue;
                    }
                    let ahead = pairs_ahead(w, p, np, close, window);
                    let (codes, prefetch) = if fused {
                        (w.codes_at(panel, k), ahead)
                    } else {
                        w.unpack(t, panel, k, n, 0, 0, ahead, bytes.as_mut_ptr());
                        (bytes.as_ptr(), 0)
                    };
                    let args = F32Args { bytes: codes, prefetch, ..decode_args(w, panel, k, n) };
                    decode(&args, tiles.wrapping_add(i * window * 2048));
                }
                let second = tiles.wrapping_add((count - 1) * window * 2048);
                let pair = [tiles.cast_const(), second.cast_const()];
                let at = |m: usize| a.as_ptr().wrapping_add((m0 + m) * g.kp + k * BLOCK * 16);
                let c = c.as_mut_ptr().add(p * PANEL);
                let Some(l) = &late else {
                    for m in (0..rows).step_by(32) {
                        let a1 = if m + 16 < rows { at(m + 16) } else { std::ptr::null() };
                        let ahead = Ahead::Rows(amx::rows_ahead(m, rows, 32 * g.kp));
                        amx::bf16([at(m), a1], pair, 2 * n, ahead, k == 0, c.add(m * ldc), ldc);
                    }
                    continue;
                };
                amx::GROUPED_BF16(&amx::TileGrp {
                    a: at(0).cast(),
                    a_stride: 32 * g.kp,
                    rows,
                    b: pair,
                    steps: 2 * n,
                    seg_steps: l.steps,
                    parts: 1,
                    seg0: 0,
                    seg_group: groups.as_ptr(),
                    scales: [p0 + p, p0 + p + count - 1].map(|panel| scale_ptr(&w.scales, w.geometry.groups, panel)),
                    zeros: [std::ptr::null(); 2],
                    fzeros: [std::ptr::null(); 2],
                    act: NO_SUMS,
                    act_stride: 0,
                    c,
                    ldc,
                    dbl: 0,
                });
            }
        }
        for m in 0..rows {
            expect_row(y, m0, m, rows, p0 * PANEL, np * PANEL);
            finish_row(t, y, m0 + m, p0 * PANEL, &mut c[m * ldc..][..np * PANEL], 1.0, bias, false);
        }
        Ok(())
    })
}

/// Activations that are not quantised have neither sums nor scales.
#[cfg(target_arch = "x86_64")]
const NO_SUMS: kernel::ActRows = kernel::ActRows {
    codes: std::ptr::null(),
    block_stride: 0,
    sums: std::ptr::null(),
    scales: std::ptr::null(),
    rows: 0,
};

/// Turns a row of integer sums into floats, as `e` says, and writes it to row `m` from column `n0`; `floats` is for what does not
/// go there straight.
pub(crate) fn finish_sums(
    t: &Kernels,
    y: &MatMut,
    m: usize,
    n0: usize,
    sums: &[i32],
    floats: &mut [f32],
    e: &Finish,
    bad: bool,
) {
    let direct = float_row(y, m, n0, e.cols).filter(|_| !bad);
    // SAFETY: the sums, the arrays of `e` and the row of floats reach the end of the last panel.
    unsafe { (t.finish_raw)(sums.as_ptr(), direct.unwrap_or(floats.as_mut_ptr()), e) };
    if direct.is_none() {
        store_row(y, m, n0, &floats[..e.cols], bad);
    }
}

/// Finishes a row of float sums, the activation scale, then the bias, and writes it to row `m` from column `n0`.
pub(crate) fn finish_row(
    t: &Kernels,
    y: &MatMut,
    m: usize,
    n0: usize,
    row: &mut [f32],
    act_scale: f32,
    bias: *const f32,
    bad: bool,
) {
    if bias.is_null() && act_scale == 1.0 {
        return store_row(y, m, n0, row, bad);
    }
    let e = Finish {
        cols: row.len(),
        act_scale,
        sum: 0,
        dbl: 0,
        bias,
        scales: std::ptr::null(),
        zeros: std::ptr::null(),
        fzeros: std::ptr::null(),
    };
    let direct = float_row(y, m, n0, row.len()).filter(|_| !bad);
    // SAFETY: the row, the bias and the row of y have as many floats.
    unsafe { (t.finish_f32)(row.as_ptr(), direct.unwrap_or(row.as_mut_ptr()), &e) };
    if direct.is_none() {
        store_row(y, m, n0, row, bad);
    }
}

/// Asks for the part of a later row of a task that is finished soon, to be written: a row is too short for the hardware to see
/// that it goes on, and far from the next.
pub(crate) fn expect_row(y: &MatMut, m0: usize, m: usize, rows: usize, n0: usize, cols: usize) {
    const AHEAD: usize = 2;
    let row = (m + AHEAD < rows).then(|| float_row(y, m0 + m + AHEAD, n0, cols)).flatten();
    #[cfg(target_arch = "x86_64")]
    if let Some(row) = row {
        crate::kernel::x86::fetch_to_write(row.cast(), 4 * cols);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// Columns `n0..n0 + cols` of row `m`, where they lie there as floats side by side.
fn float_row(y: &MatMut, m: usize, n0: usize, cols: usize) -> Option<*mut f32> {
    let whole = y.scalar == Scalar::F32 && y.col_stride == 4 && n0 + cols <= y.cols;
    let row = y.ptr.wrapping_offset(m as isize * y.row_stride + 4 * n0 as isize).cast::<f32>();
    (whole && row.is_aligned()).then_some(row)
}

/// What the float kernels need to decode panel `panel` from block `block0` on; the caller adds codes, activations, sums.
fn decode_args(w: &Packed, panel: usize, block0: usize, blocks: usize) -> F32Args {
    let (zeros, fzeros) = zero_ptrs(&w.zeros, w.geometry.groups, panel);
    F32Args {
        bytes: std::ptr::null(),
        byte_stride: 0,
        blocks,
        padded: w.geometry.padded,
        block0,
        groups: w.geometry.groups,
        scales: scale_ptr(&w.scales, w.geometry.groups, panel),
        scale_stride: w.geometry.groups * PANEL,
        zeros,
        fzeros,
        sub: w.sub,
        values: w.values.as_ptr(),
        tensor: w.tensor,
        prefetch: 0,
        x: std::ptr::null(),
        x_stride: 0,
        c: std::ptr::null_mut(),
        ldc: 0,
    }
}

/// Rows that the kernels of few rows take at a time, of as many that are left.
pub(crate) fn few(rows: usize) -> usize {
    if rows == 3 {
        2
    } else {
        rows.min(4)
    }
}

/// What a register tile of float products takes at a time: panels, the first counted within its task, and blocks of K.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub p: usize,
    pub count: usize,
    pub k: usize,
    pub blocks: usize,
    /// Whether it has all the panels that a kernel takes side by side.
    pub wide: bool,
}

/// Cuts the blocks of some panels into pieces: `np` panels by all of the blocks, or, given `run`, the next blocks of one panel that
/// are kept and follow each other.
pub(crate) fn pieces(
    panels: Range<usize>,
    np: usize,
    blocks: Range<usize>,
    run: Option<impl Fn(usize, Range<usize>) -> Option<(usize, usize)>>,
) -> impl Iterator<Item = Piece> {
    let (mut p, mut from) = (panels.start, blocks.start);
    std::iter::from_fn(move || {
        while p < panels.end {
            let wide = run.is_none() && panels.end - p >= np;
            let count = if wide { np } else { 1 };
            let rest = from..blocks.end;
            let next = match &run {
                Some(run) => run(p, rest),
                None => (!rest.is_empty()).then_some((rest.start, rest.len())),
            };
            if let Some((k, n)) = next {
                from = k + n;
                return Some(Piece { p, count, k, blocks: n, wide });
            }
            (p, from) = (p + count, blocks.start);
        }
        None
    })
}

impl Piece {
    /// Adds the products with these rows of activations, `mr` at a time, to the sums of a task at `c`.
    ///
    /// # Safety
    /// `weights` are the floats of the piece, its panels `span` apart; activations lie by blocks of `mr` rows; `c` has the task's
    /// rows, `ldc` apart.
    pub(crate) unsafe fn multiply(
        &self,
        t: &Kernels,
        xs: &Floats,
        rows: Range<usize>,
        mr: usize,
        weights: *const f32,
        span: usize,
        c: *mut f32,
        ldc: usize,
    ) {
        for m in rows.clone().step_by(mr) {
            let mr = (rows.end - m).min(mr);
            let a = GemmArgs {
                x: xs.at(m, self.k * BLOCK * mr),
                w: weights,
                panel_stride: span,
                k: self.blocks * BLOCK,
                c: c.wrapping_add((m - rows.start) * ldc + self.p * PANEL),
                ldc,
            };
            // SAFETY: as the contract says.
            unsafe { (t.gemm)(mr, !self.wide)(&a) };
        }
    }
}

fn float(x: &MatRef, w: &Packed, y: &mut MatMut, o: &Options, bf16: bool) -> Result<()> {
    let t = kernel::table(o.isa);
    let b = plan::float(x.rows, w, bf16, o.isa, o.threads);
    if let Some(p) = &w.floats {
        return p.matmul(x, w, y, o, &b);
    }
    if let Some(Panels::Gaps(gaps)) = &w.sparse {
        if let Some(done) = gaps.matmul(x, w, y, o, bf16, &b) {
            return done;
        }
    }
    #[cfg(target_arch = "x86_64")]
    if b.path == Path::TilesBf16 {
        return float_tiles(x, w, y, o, &b);
    }
    let xs = floats(x, w, t, bf16, if b.path == Path::Gemm { b.mr } else { 0 }, false, b.threads)?;
    let mode = weight_mode(w);
    let g = &w.geometry;
    // Dropped tiles are left out where they add 0 for sure: 0 times a NaN or an infinity is none.
    let tiles = match &w.sparse {
        Some(Panels::Tiles(tiles)) if x.is_within(if bf16 { half::bf16::MAX.to_f32() } else { f32::MAX }) => {
            Some(tiles)
        }
        _ => None,
    };
    let (xs, stride) = (&xs, xs.stride);
    let y = &*y;
    tasks(&b, x.rows, w, o, |p0, np, m0, rows, s| {
        let ldc = np * PANEL;
        let bias = padded_bias(&mut s.bias, o.bias, p0, np, w.n)?;
        let c = grown(&mut s.floats, rows * ldc)?;
        c[..rows * ldc].fill(0.0);
        let cp = c.as_mut_ptr();
        let args = |panel: usize, bytes: *const u8, k: usize, n: usize, m: usize, c: *mut f32| F32Args {
            bytes,
            byte_stride: b.window * 1024,
            prefetch: if !w.is_long() || isa::streams_by_itself() { 0 } else { 2048 },
            x: xs.at(m0 + m, k * BLOCK),
            x_stride: stride,
            c,
            ldc,
            ..decode_args(w, panel, k, n)
        };
        let blocks = g.blocks();
        let mut first = 0;
        if b.path == Path::Gemv && mode != W_FLOAT && w.sparse.is_none() {
            let zeros = matches!(w.zeros, PanelZeros::Int(_));
            if let Some((f, fp)) = (t.gemv_table)(w.bits, zeros, bf16, b.mr) {
                while first + fp <= np {
                    let src = w.codes.as_ptr().wrapping_add((p0 + first) * w.panel_bytes());
                    let mut m = 0;
                    while m < rows {
                        let (f, mr) = if m + b.mr <= rows {
                            (f, b.mr)
                        } else {
                            ((t.gemv_table)(w.bits, zeros, bf16, 1).map_or(f, |f| f.0), 1)
                        };
                        let a = F32Args {
                            byte_stride: w.panel_bytes(),
                            ..args(p0 + first, src, 0, blocks, m, cp.wrapping_add(m * ldc + first * PANEL))
                        };
                        // SAFETY: whole panels and existing rows.
                        unsafe { f(&a) };
                        m += mr;
                    }
                    first += fp;
                }
            }
        }
        let run = tiles.map(|tiles| move |p: usize, blocks| tiles.run(p0 + p, blocks));
        // SAFETY (whole loop): arguments describe whole panels, existing rows, and buffers of the plan's window.
        for window in (0..blocks).step_by(b.window) {
            for piece in pieces(first..np, b.np, window..blocks.min(window + b.window), run.as_ref()) {
                let Piece { p, count, k, blocks: n, wide } = piece;
                let bytes = grown(&mut s.bytes, b.np * b.window * 1024)?;
                let coded = if w.dense.is_some() { 0 } else { count };
                for i in 0..coded {
                    // SAFETY: see above.
                    unsafe {
                        w.unpack(t, p0 + p + i, k, n, 0, 0, IN_ORDER, bytes.as_mut_ptr().add(i * b.window * 1024));
                    };
                }
                if b.path == Path::Gemv {
                    let mut m = 0;
                    while m < rows {
                        let mr = few(rows - m).min(t.max_mr);
                        let (f, fp) = (t.gemv)(mode, bf16, mr, !wide);
                        for i in (0..count).step_by(fp) {
                            let at = bytes.as_ptr().wrapping_add(i * b.window * 1024);
                            let a = args(p0 + p + i, at, k, n, m, cp.wrapping_add(m * ldc + (p + i) * PANEL));
                            // SAFETY: see above.
                            unsafe { f(&a) };
                        }
                        m += mr;
                    }
                } else {
                    let span = b.window * 1024;
                    let weights = grown(&mut s.weights, b.np * span)?;
                    if let Some(panels) = &w.dense {
                        for (i, out) in weights.chunks_exact_mut(span).take(count).enumerate() {
                            let out = &mut out[..n * 1024];
                            panels.decode(t, p0 + p + i, k * BLOCK, out);
                            if bf16 {
                                // SAFETY: a multiple of 16 floats.
                                unsafe { (t.round_bf16)(out.as_mut_ptr(), out.len()) };
                            }
                        }
                    }
                    for i in 0..coded {
                        let at = bytes.as_ptr().wrapping_add(i * span);
                        let a = args(p0 + p + i, at, k, n, 0, cp);
                        // SAFETY: see above.
                        unsafe { (t.expand)(mode, bf16)(&a, weights.as_mut_ptr().add(i * span)) };
                    }
                    // SAFETY: see above.
                    unsafe { piece.multiply(t, xs, m0..m0 + rows, b.mr, weights.as_ptr(), span, cp, ldc) };
                }
            }
        }
        for m in 0..rows {
            finish_row(t, y, m0 + m, p0 * PANEL, &mut c[m * ldc..][..ldc], 1.0, bias, false);
        }
        Ok(())
    })
}

/// Writes finished floats to row `m` from column `n0`, converted to the output type; NaN where the row is bad.
pub(crate) fn store_row(y: &MatMut, m: usize, n0: usize, row: &[f32], bad: bool) {
    let cols = row.len().min(y.cols - n0);
    let base = y.ptr.wrapping_offset(m as isize * y.row_stride + n0 as isize * y.col_stride);
    // SAFETY (all arms): elements (m, n0..n0+cols) of the view; tasks write disjoint elements.
    if y.scalar == Scalar::F32 && y.col_stride == 4 && !bad {
        // SAFETY: as above; byte copies need no alignment.
        unsafe { std::ptr::copy_nonoverlapping(row.as_ptr().cast::<u8>(), base, cols * 4) };
        return;
    }
    for (j, &v) in row[..cols].iter().enumerate() {
        let v = if bad { f32::NAN } else { v };
        let p = base.wrapping_offset(j as isize * y.col_stride);
        // SAFETY: as above, unaligned stores.
        unsafe {
            match y.scalar {
                Scalar::F32 => p.cast::<f32>().write_unaligned(v),
                Scalar::F64 => p.cast::<f64>().write_unaligned(f64::from(v)),
                Scalar::F16 => p.cast::<u16>().write_unaligned(half::f16::from_f32(v).to_bits()),
                Scalar::BF16 => p.cast::<u16>().write_unaligned(half::bf16::from_f32(v).to_bits()),
                Scalar::I8 => {}
            }
        }
    }
}
