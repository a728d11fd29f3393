//! L-Mul: floats multiplied by adding their bit patterns.
//!
//! *What.* With `x = (1 + xm) 2^xe` the product's `1 + xm + ym + xm ym` becomes `1 + xm + ym + c`, and because a sum of
//! mantissas past 1 carries into the exponent by itself, the whole product is one integer addition:
//! `R = X + Y - (bias - c)`, the sign apart. `c = 2^-l(m)` is L-Mul, `c = 0` is Mitchell's logarithm.
//!
//! *Layout.* Numbers of every format come as float32, which holds them exactly: exponent and mantissa then stand in the
//! same bits for all formats, and a format is three numbers ([`Model`]). No rounding occurs, so nothing is lost by that.
//!
//! *Contract.* Zero or a subnormal number times anything finite is a zero with the product's sign; so is a product below
//! the smallest normal number. Past the largest finite number a product is that number, or infinity. NaN, and zero times
//! infinity, give NaN; infinity times the rest is infinity.
use crate::level::{at, Loop};
use crate::{Error, Exec, Result};
use nibblas_core::buf::Buf;

const MAGNITUDE: u32 = 0x7fff_ffff;
const SIGN: u32 = 0x8000_0000;
const INFINITY: u32 = 0x7f80_0000;
const NAN: u32 = 0x7fc0_0000;

/// A format and its offset, as bit patterns of float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// What is subtracted: 1, less the offset of the mantissa.
    pub offset: u32,
    /// The smallest normal number.
    pub smallest: u32,
    /// The largest finite number.
    pub largest: u32,
    /// What stands past it: itself, or infinity.
    pub beyond: u32,
}

impl Model {
    /// The product of magnitudes that are finite and 0 or normal.
    #[inline(always)]
    fn magnitude(self, x: u32, y: u32) -> u32 {
        // Below 2^32, since both are below 2^31.
        let sum = x + y;
        let r = sum.wrapping_sub(self.offset);
        let r = if r > self.largest { self.beyond } else { r };
        let lives = (x != 0) & (y != 0) & (sum >= self.offset + self.smallest);
        if lives {
            r
        } else {
            0
        }
    }

    /// The product of finite numbers, none of them subnormal.
    #[inline(always)]
    fn term(self, a: i32, b: i32) -> f32 {
        let (a, b) = (a as u32, b as u32);
        f32::from_bits(self.magnitude(a & MAGNITUDE, b & MAGNITUDE) | ((a ^ b) & SIGN))
    }

    /// The bits of a magnitude, 0 where it is subnormal.
    #[inline(always)]
    fn flush(self, x: u32) -> u32 {
        if x < self.smallest {
            0
        } else {
            x
        }
    }

    /// The product of any two numbers.
    #[inline(always)]
    pub fn product(self, a: u32, b: u32) -> u32 {
        let (x, y) = (self.flush(a & MAGNITUDE), self.flush(b & MAGNITUDE));
        let sign = (a ^ b) & SIGN;
        let finite = self.magnitude(x.min(self.largest), y.min(self.largest));
        let infinite = if (x == 0) | (y == 0) { NAN } else { INFINITY };
        let r = if (x >= INFINITY) | (y >= INFINITY) { infinite } else { finite };
        if (x > INFINITY) | (y > INFINITY) {
            NAN
        } else {
            r | sign
        }
    }
}

struct Products<'a> {
    model: Model,
    a: &'a [u32],
    b: &'a [u32],
    y: &'a mut [u32],
}

impl Loop for Products<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for ((o, &a), &b) in self.y.iter_mut().zip(self.a).zip(self.b) {
            *o = self.model.product(a, b);
        }
    }
}

/// Products of pairs of bit patterns.
///
/// # Errors
/// [`Error::Shape`] for different lengths.
pub fn lmul(exec: &Exec, model: Model, a: &[u32], b: &[u32], y: &mut [u32]) -> Result<()> {
    if a.len() != y.len() || b.len() != y.len() {
        return Err(Error::Shape(format!("lengths differ: {}, {} and {}", a.len(), b.len(), y.len())));
    }
    let part = exec.part(y.len(), 1);
    exec.each(y.chunks_mut(part).collect(), |i, y| {
        let range = i * part..i * part + y.len();
        at(exec.isa, Products { model, a: &a[range.clone()], b: &b[range], y });
        Ok(())
    })
}

/// Columns that are summed at a time: a strip of `b` and the sums stay in the caches.
const STRIP: usize = 256;
/// Values of K that one pass over the sums takes.
const DEEP: usize = 4;

/// One strip: `y[j] += sum over k of a[k] * b[k][j]`, k ascending.
struct Strip<'a> {
    model: Model,
    /// Bit patterns; the buffers of the core are of i32.
    a: &'a [i32],
    b: &'a [i32],
    y: &'a mut [f32],
    /// Whether every number is finite.
    plain: bool,
}

impl Strip<'_> {
    #[inline(always)]
    fn plain(self) {
        let n = self.y.len();
        let model = self.model;
        let (fours, rest) = self.a.as_chunks::<DEEP>();
        let mut b = self.b;
        for &[a0, a1, a2, a3] in fours {
            let (b0, tail) = b.split_at(n);
            let (b1, tail) = tail.split_at(n);
            let (b2, tail) = tail.split_at(n);
            let (b3, tail) = tail.split_at(n);
            for ((((o, &b0), &b1), &b2), &b3) in self.y.iter_mut().zip(b0).zip(b1).zip(b2).zip(b3) {
                *o = *o + model.term(a0, b0) + model.term(a1, b1) + model.term(a2, b2) + model.term(a3, b3);
            }
            b = tail;
        }
        for (&a, b) in rest.iter().zip(b.chunks_exact(n)) {
            for (o, &b) in self.y.iter_mut().zip(b) {
                *o += model.term(a, b);
            }
        }
    }
}

impl Loop for Strip<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        if self.plain {
            return self.plain();
        }
        for (&a, b) in self.a.iter().zip(self.b.chunks_exact(self.y.len())) {
            for (o, &b) in self.y.iter_mut().zip(b) {
                *o += f32::from_bits(self.model.product(a as u32, b as u32));
            }
        }
    }
}

/// `y[m][n] = sum over k of a[m][k] * b[k][n]`, float32 sums in ascending k from +0.
///
/// # Errors
/// [`Error::Shape`] where lengths do not fit, [`Error::OutOfMemory`].
pub fn matmul(exec: &Exec, model: Model, a: &[u32], b: &[u32], n: usize, k: usize, y: &mut [f32]) -> Result<()> {
    let m = y.len().checked_div(n).unwrap_or(0);
    if y.len() != m * n || a.len() != m * k || b.len() != k * n {
        return Err(Error::Shape(format!("{} and {} values do not make {m} x {n} sums of {k}", a.len(), b.len())));
    }
    y.fill(0.0);
    if y.is_empty() || k == 0 {
        return Ok(());
    }
    let plain = a.iter().chain(b).all(|&v| v & MAGNITUDE < INFINITY);
    // Subnormal numbers of the format become zeros once, here, and not in every product.
    let zeros = |v: u32| if v & MAGNITUDE < model.smallest { v & SIGN } else { v };
    let rows = m.div_ceil(exec.threads.max(1) * 2).clamp(1, 64);
    exec.each(y.chunks_mut(rows * n).collect(), |i, y| {
        let a = &a[i * rows * k..i * rows * k + y.len() / n * k];
        let mut left = Buf::<i32>::zeroed(k)?;
        let mut strip = Buf::<i32>::zeroed(k * STRIP.min(n))?;
        for start in (0..n).step_by(STRIP) {
            let width = STRIP.min(n - start);
            let strip = &mut strip[..k * width];
            for (to, from) in strip.chunks_exact_mut(width).zip(b.chunks_exact(n)) {
                for (to, &from) in to.iter_mut().zip(&from[start..start + width]) {
                    *to = zeros(from) as i32;
                }
            }
            for (y, a) in y.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
                for (to, &from) in left.iter_mut().zip(a) {
                    *to = zeros(from) as i32;
                }
                let y = &mut y[start..start + width];
                at(exec.isa, Strip { model, a: &left[..k], b: strip, y, plain });
            }
        }
        Ok(())
    })
}
