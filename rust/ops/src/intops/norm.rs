//! Layer norm and RMS norm of integer rows.
//!
//! A row is centred and shifted so that its largest deviation fills 23 bits, whatever the input's width: a mean is then
//! never rounded to a whole step, squares add up in 64 bits, and the scale of the input cancels (but for `eps`). One
//! integer square root per row gives `1 / sqrt(mean square)` with 31 significant bits. Parameters are integers with a
//! common shift: `y = (xhat * gain + bias) >> shift`, rounded once. A constant row gives the bias.
use super::rows_of;
use super::scale::{encode, positive, quotient, square_ratio, Affine};
use crate::level::{at, Loop};
use crate::{Error, Exec, Ints, IntsMut, Result};
use nibblas_core::buf::Buf;

/// What a row is normalised by.
#[derive(Debug, Clone, Copy)]
struct Shape {
    cols: usize,
    /// Whether the mean is subtracted.
    centre: bool,
    /// `eps / scale^2 = eps_m * 2^-eps_shift`.
    eps_m: u64,
    eps_shift: i32,
}

impl Shape {
    fn new(cols: usize, centre: bool, scale: f64, eps: f64) -> Result<Self> {
        let scale = positive("scale", scale)?;
        let ok = eps.is_finite() && eps >= 0.0;
        if !ok {
            return Err(Error::Value(format!("eps must be finite and not negative, got {eps}")));
        }
        let (eps_m, eps_shift) = encode(square_ratio(eps, scale), 31);
        Ok(Self { cols, centre, eps_m, eps_shift })
    }

    /// Bits of the number of columns.
    fn log_cols(self) -> u32 {
        usize::BITS - self.cols.leading_zeros()
    }

    /// Bits that the largest deviation of a row fills, so that squares add up within 62 bits.
    fn bits(self) -> i32 {
        23.min((62 - self.log_cols() as i32) / 2)
    }

    /// Fraction bits of a normalised value, which is at most the root of the number of columns.
    fn fraction(self) -> u32 {
        24.min(30 - self.log_cols().div_ceil(2))
    }
}

/// `v * 2^shift`, at most 2^100.
fn scaled(v: u128, shift: i32) -> u128 {
    if shift >= 0 {
        if v == 0 {
            0
        } else if shift as u32 >= v.leading_zeros().saturating_sub(27) {
            1 << 100
        } else {
            v << shift
        }
    } else {
        v.checked_shr(shift.unsigned_abs()).unwrap_or(0)
    }
}

/// What a row is multiplied by: `root * 2^-shift` is 1 over the root of the mean square, or 0.
#[derive(Debug, Clone, Copy)]
struct Ready {
    root: u32,
    shift: u32,
}

/// Writes a row's deviations, lifted to fill their bits, and returns what makes their mean square 1.
#[inline(always)]
fn prepare(x: &[i32], out: &mut [i32], s: Shape) -> Ready {
    let (mut sum, mut low, mut high) = (0i64, i32::MAX, i32::MIN);
    for &v in x {
        sum += i64::from(v);
        low = low.min(v);
        high = high.max(v);
    }
    let n = x.len() as i64;
    let (mean, rest) = if s.centre { (sum.div_euclid(n), sum.rem_euclid(n)) } else { (0, 0) };
    let reach = (i64::from(high) - mean).max(mean - i64::from(low)).max(0) + i64::from(s.centre);
    let lift = s.bits() - (64 - reach.leading_zeros() as i32);
    let mut squares = 0u64;
    if lift >= 0 {
        let part = ((i128::from(rest) << lift) + i128::from(n / 2)) / i128::from(n);
        let offset = (mean << lift) + part as i64;
        for (o, &v) in out.iter_mut().zip(x) {
            *o = ((i64::from(v) << lift) - offset) as i32;
        }
    } else {
        let down = lift.unsigned_abs();
        let half = 1i64 << (down - 1);
        for (o, &v) in out.iter_mut().zip(x) {
            *o = ((i64::from(v) - mean + half) >> down) as i32;
        }
    }
    for &v in &*out {
        squares += (i64::from(v) * i64::from(v)) as u64;
    }
    let eps = scaled(u128::from(s.eps_m) * n as u128, 2 * lift - s.eps_shift);
    let mut total = u128::from(squares) + eps;
    if total == 0 {
        return Ready { root: 0, shift: 60 };
    }
    // At most 64 bits, an even number of bits dropped.
    let drop = (128 - total.leading_zeros()).saturating_sub(64).next_multiple_of(2);
    total >>= drop;
    // n 2^t / total between 2^60 and 2^62, t + drop even.
    let wanted = 61 + (128 - total.leading_zeros()) - s.log_cols();
    let t = wanted + wanted % 2;
    let root = (((n as u128) << t) / total).isqrt();
    let root = root.min(u128::from(u32::MAX)) as u32;
    Ready { root, shift: t.midpoint(drop) }
}

struct Norm<'a, 'b> {
    x: Ints<'a>,
    y: IntsMut<'a>,
    shape: Shape,
    affine: &'b Affine,
    wide: &'b mut [i32],
    ready: &'b mut [i32],
}

impl Loop for Norm<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn run(mut self) {
        let (lo, hi) = self.y.limits();
        let s = self.shape;
        let Affine { gain, bias, shift } = self.affine;
        let half = 1i64 << (shift - 1);
        for start in (0..self.x.len()).step_by(s.cols) {
            let x = self.x.slice(start..start + s.cols).widen(self.wide);
            let row = prepare(x, self.ready, s);
            let down = row.shift.saturating_sub(s.fraction());
            // Where eps is that large nothing is left of the row.
            let (root, down) = if down > 62 { (0, 0) } else { (i64::from(row.root), down) };
            for (((o, &v), &g), &b) in self.wide.iter_mut().zip(&*self.ready).zip(gain).zip(bias) {
                let xhat = i64::from(((i64::from(v) * root) >> down) as i32);
                let y = (xhat * i64::from(g) + b + half) >> shift;
                *o = y.clamp(i64::from(lo), i64::from(hi)) as i32;
            }
            self.y.put(start, self.wide);
        }
    }
}

fn norm(exec: &Exec, x: Ints, shape: Shape, affine: &Affine, y: IntsMut) -> Result<()> {
    let cols = shape.cols;
    rows_of(x.len(), cols, y.len())?;
    if affine.gain.len() != cols || affine.bias.len() != cols {
        return Err(Error::Shape(format!("weight and bias must have {cols} values")));
    }
    let part = exec.part(x.len(), cols);
    exec.each(y.parts(part), |i, y| {
        let x = x.slice(i * part..i * part + y.len());
        let (mut wide, mut ready) = (Buf::<i32>::zeroed(cols)?, Buf::<i32>::zeroed(cols)?);
        at(exec.isa, Norm { x, y, shape, affine, wide: &mut wide, ready: &mut ready });
        Ok(())
    })
}

fn check(x: &Ints, gain: &[f32]) -> Result<()> {
    if x.is_empty() || !gain.is_empty() {
        return Ok(());
    }
    Err(Error::Shape("rows of length 0 cannot hold values".into()))
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias`, in steps of `out_scale`.
///
/// # Errors
/// [`Error::Shape`] where lengths do not fit, [`Error::Value`] for parameters that are not finite and scales that are not
/// positive, [`Error::OutOfMemory`].
pub fn layer_norm(
    exec: &Exec,
    x: Ints,
    scale: f64,
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f64,
    out_scale: f64,
    y: IntsMut,
) -> Result<()> {
    check(&x, weight)?;
    let shape = Shape::new(weight.len(), true, scale, eps)?;
    let affine = Affine::new(weight, bias, positive("out_scale", out_scale)?, shape.fraction())?;
    norm(exec, x, shape, &affine, y)
}

/// `x / sqrt(mean(x^2) + eps) * weight`, in steps of `out_scale`.
///
/// # Errors
/// As [`layer_norm`].
pub fn rms_norm(exec: &Exec, x: Ints, scale: f64, weight: &[f32], eps: f64, out_scale: f64, y: IntsMut) -> Result<()> {
    check(&x, weight)?;
    let shape = Shape::new(weight.len(), false, scale, eps)?;
    let affine = Affine::new(weight, None, positive("out_scale", out_scale)?, shape.fraction())?;
    norm(exec, x, shape, &affine, y)
}

struct Coded<'a, 'b> {
    x: Ints<'a>,
    y: &'b mut [i8],
    scales: &'b mut [[i32; 2]],
    shape: Shape,
    gain: &'b [i32],
    /// `weight = gain * 2^-shift`.
    shift: i32,
    wide: &'b mut [i32],
    ready: &'b mut [i32],
}

impl Loop for Coded<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let cols = self.shape.cols;
        for (r, y) in self.y.chunks_exact_mut(cols).enumerate() {
            let x = self.x.slice(r * cols..(r + 1) * cols).widen(self.wide);
            let row = prepare(x, self.ready, self.shape);
            let mut top = 0u64;
            for (&v, &g) in self.ready.iter().zip(self.gain) {
                top = top.max((i64::from(v) * i64::from(g)).unsigned_abs());
            }
            if top == 0 || row.root == 0 {
                y.fill(0);
                self.scales[r] = [0, 0];
                continue;
            }
            // The largest product in 31 bits, and 127 over it. The root of the mean square cancels.
            let down = (64 - top.leading_zeros()).saturating_sub(31);
            let top31 = (top >> down).max(1);
            let factor = ((127u128 << 54) / u128::from(top31)).min(i64::MAX as u128) as i64;
            let small = 63 - (factor as u64).leading_zeros() as i32 - 31;
            let (factor, digits) = if small > 0 { (factor >> small, 54 - small) } else { (factor, 54) };
            let half = 1i64 << (digits - 1);
            for ((o, &v), &g) in y.iter_mut().zip(&*self.ready).zip(self.gain) {
                let p = (i64::from(v) * i64::from(g)) >> down;
                *o = ((p * factor + half) >> digits).clamp(-127, 127) as i8;
            }
            // top * 2^-self.shift is the largest value before the root.
            let scale = u128::from(top) * u128::from(row.root) / 127;
            let width = 128 - scale.leading_zeros() as i32;
            let m = if width > 31 { scale >> (width - 31) } else { scale << (31 - width) };
            self.scales[r] = [m as i32, row.shift as i32 + self.shift - width];
        }
    }
}

/// RMS norm whose rows are coded as int8 with a scale each: what a `BitLinear` layer multiplies.
///
/// `y = round(127 v / max|v|)` with `v = x * weight`, since the root of the mean square is common to the row and cancels; it
/// is in the row's scale, `scales[r] = [m, n]` for `m * 2^-31 * 2^-n`, `[0, 0]` for rows of zeros.
///
/// # Errors
/// As [`layer_norm`].
pub fn rms_norm_codes(
    exec: &Exec,
    x: Ints,
    scale: f64,
    weight: &[f32],
    eps: f64,
    y: &mut [i8],
    scales: &mut [[i32; 2]],
) -> Result<()> {
    check(&x, weight)?;
    let cols = weight.len();
    let shape = Shape::new(cols, false, scale, eps)?;
    if rows_of(x.len(), cols, y.len())? != scales.len() && cols > 0 {
        return Err(Error::Shape(format!("{} scales do not fit", scales.len())));
    }
    if cols == 0 {
        scales.fill([0, 0]);
        return Ok(());
    }
    let affine = Affine::new(weight, None, quotient(1.0, 1.0, 0), 0)?;
    let part = exec.part(x.len(), cols);
    let parts = y.chunks_mut(part).zip(scales.chunks_mut(part / cols)).collect();
    exec.each(parts, |i, (y, scales)| {
        let x = x.slice(i * part..i * part + y.len());
        let (mut wide, mut ready) = (Buf::<i32>::zeroed(cols)?, Buf::<i32>::zeroed(cols)?);
        let (gain, shift) = (&affine.gain[..], affine.shift as i32);
        at(exec.isa, Coded { x, y, scales, shape, gain, shift, wide: &mut wide, ready: &mut ready });
        Ok(())
    })
}
