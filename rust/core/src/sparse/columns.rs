//! A weight by columns: an activation that is 0, or the same as before, costs nothing (the delta activation layer of
//! arXiv 2107.07305).
//!
//! ```text
//! codes   [K][N, padded to 64]   one byte each, as stored
//! ```
//!
//! Integer sums know no order, so `acc += (x' - x) * column` over the activations that changed gives the bits of a fresh
//! product. In float32 a product over the columns whose activation is not 0, k ascending, is the usual one less the terms
//! that change nothing.
use super::kernel::{self, FloatColumns};
use crate::activation::{Act, Segments};
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::format::ValueMap;
use crate::gemm::{finish_row, store_row, Compute, Options};
use crate::isa::Isa;
use crate::kernel::generic::Finish;
use crate::matrix::{MatMut, MatRef, Scalar};
use crate::pack::{Geometry, Shared};
use crate::pool;
use crate::qtensor::{zeros_vec, QView, ZerosRef};

/// Rows of activations that products by columns take at most: each walks over the weight by itself.
const FEW: usize = 4;
/// Sums are padded to so many.
const PAD: usize = 64;

/// A weight by columns.
#[derive(Debug)]
pub struct Columns {
    n: usize,
    k: usize,
    stride: usize,
    codes: Buf<u8>,
    /// Row scales, padded.
    scales: Buf<f32>,
    /// Row zero points, padded; empty where the zero is constant.
    zeros: Buf<u8>,
    mul: i32,
    sub: i32,
    /// What the integer 1 is worth.
    step: f32,
}

impl Columns {
    /// Rearranges a matrix with one scale per row.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for groups, values that are not integers, float zero points, and K so long that int32 sums
    /// could overflow; [`Error::OutOfMemory`].
    pub fn new(q: &QView, threads: usize) -> Result<Self> {
        let (f, e) = (q.format, q.format.element);
        let ValueMap::Affine { mul, sub } = e.map else {
            return Err(Error::Unsupported(format!(
                "products by columns need codes that are integers, not those of {f}"
            )));
        };
        if e.bits > 8 || !e.has_integers() {
            return Err(Error::Unsupported(format!(
                "products by columns need codes of at most 8 bits, not those of {f}"
            )));
        }
        if q.groups() > 1 {
            return Err(Error::Unsupported(format!("products by columns need one scale per row, but {f} is grouped")));
        }
        let top = ((1usize << e.bits) - 1) * mul as usize;
        if q.cols > i32::MAX as usize / (128 * top.max(1)) {
            return Err(Error::Unsupported(format!("{} columns of {f} may overflow int32 sums", q.cols)));
        }
        let stride = q.rows.next_multiple_of(PAD);
        let mut codes = Buf::<u8>::zeroed(stride.checked_mul(q.cols).ok_or(Error::OutOfMemory(usize::MAX))?)?;
        let out = Shared(codes.as_mut_ptr());
        pool::try_run(threads, stride / PAD, None, |b| {
            let mut rows = Taken::<u8>::new(PAD * q.cols)?;
            let count = PAD.min(q.rows - b * PAD);
            for i in 0..count {
                q.unpack_row(b * PAD + i, 0, &mut rows[i * q.cols..][..q.cols]);
            }
            for k in 0..q.cols {
                for i in 0..count {
                    // SAFETY: rows 64b.. of every column belong to this task.
                    unsafe { *out.get().add(k * stride + b * PAD + i) = rows[i * q.cols + k] };
                }
            }
            Ok(())
        })?;
        let mut scales = Buf::<f32>::zeroed(stride)?;
        let groups = q.groups();
        scales.iter_mut().take(q.rows * groups).enumerate().for_each(|(n, s)| *s = q.scale(n, 0));
        let zeros = match q.zeros {
            ZerosRef::None => Buf::zeroed(0)?,
            ZerosRef::Int(z) => {
                let mut zeros = Buf::<u8>::zeroed(stride)?;
                zeros[..z.len()].copy_from_slice(z);
                zeros
            }
            ZerosRef::Float(_) => {
                return Err(Error::Unsupported("products by columns need integer zero points".to_owned()));
            }
        };
        Ok(Self { n: q.rows, k: q.cols, stride, codes, scales, zeros, mul, sub, step: q.step() })
    }

    /// Rows and columns of the weight.
    pub fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    /// Sums that a product needs room for.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        self.codes.len() + 4 * self.scales.len() + self.zeros.len()
    }

    /// `acc[n] += d * u[n][k]` for every `(k, d)` of the list, tasks of rows on several threads.
    ///
    /// # Panics
    /// If a column or a sum lies outside.
    fn add(&self, isa: Isa, list: &[(u32, i8)], acc: &mut [i32], threads: usize) -> Result<()> {
        assert!(acc.len() == self.stride && list.iter().all(|&(k, _)| (k as usize) < self.k));
        if list.is_empty() {
            return Ok(());
        }
        let f = kernel::table(isa).columns;
        let threads = if list.len() * self.stride < 1 << 18 { 1 } else { threads };
        let part = (self.stride / PAD).div_ceil(threads.max(1)).max(8) * PAD;
        let to = Shared(acc.as_mut_ptr());
        pool::try_run(threads, self.stride.div_ceil(part), None, |i| {
            let (at, len) = (i * part, part.min(self.stride - i * part));
            // SAFETY: columns are whole and sums of this task its own.
            unsafe { f(self.codes.as_ptr().add(at), self.stride, len, list, to.get().add(at)) };
            Ok(())
        })
    }

    /// One row of activations, in float32, over the columns whose activation is not 0. `out` has [`Self::stride`] floats.
    fn floats(&self, isa: Isa, list: &[(u32, f32)], out: &mut [f32], threads: usize) -> Result<()> {
        assert!(out.len() == self.stride && list.iter().all(|&(k, _)| (k as usize) < self.k));
        out.fill(0.0);
        let f = kernel::table(isa).float_columns;
        let threads = if list.len() * self.stride < 1 << 18 { 1 } else { threads };
        let part = (self.stride / PAD).div_ceil(threads.max(1)).max(8) * PAD;
        let to = Shared(out.as_mut_ptr());
        pool::try_run(threads, self.stride.div_ceil(part), None, |i| {
            let at = i * part;
            let a = FloatColumns {
                w: self.codes.as_ptr().wrapping_add(at),
                stride: self.stride,
                len: part.min(self.stride - at),
                mul: self.mul,
                sub: self.sub,
                zeros: if self.zeros.is_empty() { std::ptr::null() } else { self.zeros.as_ptr().wrapping_add(at) },
                scales: self.scales.as_ptr().wrapping_add(at),
                acc: to.get().wrapping_add(at),
            };
            // SAFETY: columns are whole, and sums of this task its own.
            unsafe { f(&a, list) };
            Ok(())
        })
    }

    /// `y = x @ w.T` over the columns whose activation is not 0, one row at a time; false, and nothing done, where there
    /// are too many rows or too few zeros for that to pay.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Unsupported`] for another compute than `F32` and `Int8` without groups,
    /// [`Error::OutOfMemory`].
    pub fn matmul(&self, x: &MatRef, y: &mut MatMut, o: &Options) -> Result<bool> {
        if (x.cols, y.rows, y.cols) != (self.k, x.rows, self.n) || o.bias.is_some_and(|b| b.len() != self.n) {
            return Err(Error::Shape(format!("({}, {}) does not fit ({}, {})", x.rows, x.cols, self.n, self.k)));
        }
        crate::gemm::available(o.isa)?;
        if x.rows > FEW || x.rows == 0 || self.k == 0 {
            return Ok(false);
        }
        let mut row = zeros_vec::<f32>(self.k)?;
        for m in 0..x.rows {
            x.read_row(m, 0, &mut row);
            if row.iter().filter(|v| **v != 0.0).count() * 2 > self.k {
                return Ok(false);
            }
        }
        match o.compute {
            Compute::Int8 { group: None } => {
                let mut state = Delta::new(self, x.rows)?;
                state.step(self, x, None, 0.0, o.bias, o.isa, o.threads, y)?;
            }
            Compute::F32 => {
                let bias = padded(o.bias, self.stride)?;
                let mut out = Buf::<f32>::zeroed(self.stride)?;
                for m in 0..x.rows {
                    x.read_row(m, 0, &mut row);
                    let live = row.iter().enumerate().filter(|(_, v)| **v != 0.0);
                    let list: Vec<(u32, f32)> = live.map(|(k, &v)| (k as u32, v)).collect();
                    self.floats(o.isa, &list, &mut out, o.threads)?;
                    finish_row(crate::kernel::table(o.isa), y, m, 0, &mut out, 1.0, pointer(&bias), false);
                }
            }
            other => return Err(Error::Unsupported(format!("products by columns have no compute {other}"))),
        }
        Ok(true)
    }

    /// Finishes sums of codes as an integer product does; `sum` is that of the activation's codes.
    fn finish(&self, isa: Isa, acc: &[i32], sum: i32, act_scale: f32, bias: *const f32, out: &mut [f32]) {
        let stored = !self.zeros.is_empty();
        let e = Finish {
            cols: self.stride,
            act_scale: act_scale * self.step,
            sum: if stored { sum } else { sum.wrapping_mul(self.sub) },
            dbl: -i32::from(self.mul == 2),
            bias,
            scales: self.scales.as_ptr(),
            zeros: if stored { self.zeros.as_ptr() } else { std::ptr::null() },
            fzeros: std::ptr::null(),
        };
        // SAFETY: all arrays are padded.
        unsafe { (crate::kernel::table(isa).finish_raw)(acc.as_ptr(), out.as_mut_ptr(), &e) };
    }
}

/// A linear layer whose input changes little from call to call: it keeps the codes of the last input and the integer sums.
#[derive(Debug)]
pub struct Delta {
    /// Codes of the last input that the sums stand for, `[row][K]`.
    codes: Vec<i8>,
    /// Sums, `[row][stride]`.
    acc: Vec<i32>,
    /// Of each row: the sum of its codes, and its scale (NaN before the first call).
    rows: Vec<(i32, f32)>,
    /// Columns that the last call added.
    pub added: usize,
}

impl Delta {
    /// No input yet, for `m` rows.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(w: &Columns, m: usize) -> Result<Self> {
        let mut rows = Vec::new();
        rows.try_reserve_exact(m).map_err(|_| Error::OutOfMemory(m))?;
        rows.resize(m, (0, f32::NAN));
        let size = |n: usize| m.checked_mul(n).ok_or(Error::OutOfMemory(usize::MAX));
        Ok(Self { codes: zeros_vec(size(w.k)?)?, acc: zeros_vec(size(w.stride)?)?, rows, added: 0 })
    }

    /// Rows of the input.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// The product with a new input. `scale`: that of the activations, where it is fixed.
    /// An input whose code moved by no more than `threshold` in real terms is taken as unchanged.
    ///
    /// # Errors
    /// [`Error::Shape`] for an input of another shape, [`Error::OutOfMemory`].
    pub fn step(
        &mut self,
        w: &Columns,
        x: &MatRef,
        scale: Option<f32>,
        threshold: f32,
        bias: Option<&[f32]>,
        isa: Isa,
        threads: usize,
        y: &mut MatMut,
    ) -> Result<()> {
        let m = self.rows.len();
        if (x.rows, x.cols) != (m, w.k) {
            return Err(Error::Shape(format!(
                "the state is of an input of shape ({m}, {}), not ({}, {})",
                w.k, x.rows, x.cols
            )));
        }
        if (y.rows, y.cols) != (m, w.n) {
            return Err(Error::Shape(format!("output of shape ({}, {}), expected ({m}, {})", y.rows, y.cols, w.n)));
        }
        let now = quantised(x, scale, isa, threads)?;
        if bias.is_some_and(|b| b.len() != w.n) {
            return Err(Error::Shape(format!("the bias has not the length {}", w.n)));
        }
        let bias = padded(bias, w.stride)?;
        let mut list = Vec::new();
        let mut out = Buf::<f32>::zeroed(w.stride)?;
        self.added = 0;
        for i in 0..m {
            let (s, bad) = (now.scale[i], now.bad[i] != 0);
            let row = &now.codes[i * w.k..][..w.k];
            let last = &mut self.codes[i * w.k..][..w.k];
            let acc = &mut self.acc[i * w.stride..][..w.stride];
            let state = &mut self.rows[i];
            if bad {
                // Nothing is known of the next input's distance to this one.
                *state = (0, f32::NAN);
                store_row(y, i, 0, &out, true);
                continue;
            }
            let mut limit = if s > 0.0 { (f64::from(threshold) / f64::from(s)).floor().min(255.0) as i32 } else { 0 };
            let moved = |a: i8, b: i8| (i32::from(a) - i32::from(b)).abs() > limit;
            let live = row.iter().filter(|&&c| c != 0).count();
            let changed = row.iter().zip(&*last).filter(|&(&a, &b)| moved(a, b)).count();
            if state.1.to_bits() != s.to_bits() || changed > live {
                // The sums stand for nothing at this scale, or a product from nothing adds fewer columns.
                last.fill(0);
                acc.fill(0);
                *state = (0, s);
                limit = 0;
            }
            list.clear();
            list.try_reserve(2 * w.k).map_err(|_| Error::OutOfMemory(2 * w.k))?;
            for (k, (&a, b)) in row.iter().zip(last.iter_mut()).enumerate() {
                let mut d = i32::from(a) - i32::from(*b);
                if d.abs() <= limit {
                    continue;
                }
                *b = a;
                state.0 += d;
                // A step past a byte goes in two or three.
                while d != 0 {
                    let part = d.clamp(-127, 127);
                    list.push((k as u32, part as i8));
                    d -= part;
                }
            }
            self.added += list.len();
            w.add(isa, &list, acc, threads)?;
            w.finish(isa, acc, state.0, s, pointer(&bias), &mut out);
            store_row(y, i, 0, &out, false);
        }
        Ok(())
    }
}

/// The bias, padded; empty where there is none.
fn padded(bias: Option<&[f32]>, stride: usize) -> Result<Buf<f32>> {
    let Some(b) = bias else { return Buf::zeroed(0) };
    let mut out = Buf::zeroed(stride)?;
    out[..b.len()].copy_from_slice(b);
    Ok(out)
}

fn pointer(bias: &Buf<f32>) -> *const f32 {
    if bias.is_empty() {
        std::ptr::null()
    } else {
        bias.as_ptr()
    }
}

/// Activations as plain rows of codes.
struct Now {
    codes: Vec<i8>,
    scale: Vec<f32>,
    bad: Vec<u8>,
}

/// 1.5 * 2^23: the float32 from which on neighbours are 1 apart.
const ROUND: f32 = 12_582_912.0;

/// Quantises as an integer product does: dynamic scales, or a fixed one.
fn quantised(x: &MatRef, scale: Option<f32>, isa: Isa, threads: usize) -> Result<Now> {
    let (m, k) = (x.rows, x.cols);
    let mut now = Now { codes: zeros_vec(m * k)?, scale: zeros_vec(m)?, bad: zeros_vec(m)? };
    if let (Some(s), true) = (scale, x.scalar != Scalar::I8) {
        let mut row = zeros_vec::<f32>(k)?;
        for i in 0..m {
            x.read_row(i, 0, &mut row);
            now.bad[i] = u8::from(row.iter().any(|v| !v.is_finite()));
            now.scale[i] = s;
            for (c, v) in now.codes[i * k..][..k].iter_mut().zip(&row) {
                // Rounds to even as the addition does, and leaves the integer in the lowest byte.
                *c = ((v / s).clamp(-127.0, 127.0) + ROUND).to_bits() as i8;
            }
        }
        return Ok(now);
    }
    let g = Geometry::new(k, None);
    let segs = Segments::new(&g, None)?;
    let t = crate::kernel::table(isa);
    let act = Act::quantise(x, &g, &segs, None, 1, 1, None, false, t, threads)?;
    for i in 0..m {
        let from = act.rows(i, 0).codes;
        // SAFETY: a row of the quantised activations has kp >= k codes.
        now.codes[i * k..][..k].copy_from_slice(unsafe { std::slice::from_raw_parts(from, k) });
        now.scale[i] = if x.scalar == Scalar::I8 { scale.unwrap_or(1.0) } else { act.scale[i] };
        now.bad[i] = act.bad[i];
    }
    Ok(now)
}
