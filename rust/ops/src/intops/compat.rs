//! The operators of I-BERT and I-ViT as published, their quirks included, in 64-bit integers.
//!
//! For networks that were trained with them, and to compare: the operators beside this file have none of the defects that
//! the README lists. Results come with the scale that they imply. Where the published arithmetic would leave 64 bits, or
//! divide by zero, there is an error instead.
use super::rows_of;
use super::scale::{positive, published};
use crate::{Error, Exec, Ints, Result};
use nibblas_core::buf::Buf;

/// Whose operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Second-order polynomials.
    Ibert,
    /// Shifts.
    Ivit,
}

/// A result of at most 62 bits, or an error before anything is computed.
fn within(what: &str, bound: i128) -> Result<()> {
    if bound < 1 << 62 {
        Ok(())
    } else {
        Err(Error::Value(format!("the scale is too small: {what} would leave 62 bits")))
    }
}

/// The exponential of numbers of at most 0.
#[derive(Debug, Clone, Copy)]
struct Exp {
    family: Family,
    /// One range reduction, negative.
    q0: i64,
    qb: i64,
    qc: i64,
    n: i64,
}

impl Exp {
    fn new(family: Family, scale: f64, n: i64) -> Result<Self> {
        let [q0, qb, qc] = match family {
            Family::Ibert => published::ibert_exp(scale),
            Family::Ivit => published::ivit_exp(scale),
        };
        let top = match family {
            Family::Ibert => i128::from(qc),
            Family::Ivit => -i128::from(q0),
        };
        within("the exponential", top.saturating_mul(1 << n))?;
        Ok(Self { family, q0, qb, qc, n })
    }

    fn at(self, q: i64) -> i64 {
        let Self { q0, qb, qc, n, .. } = self;
        let q = if self.family == Family::Ivit { q + (q >> 1) - (q >> 4) } else { q };
        let q = q.max(n * q0);
        // The floor: division truncates, and a positive q, which only one operator passes on, has a negative quotient.
        let z = q / q0 - i64::from(q > 0 && q % q0 != 0);
        let r = q - q0 * z;
        let p = match self.family {
            Family::Ibert => r * (r + qb) + qc,
            Family::Ivit => (r >> 1) - q0,
        };
        let shift = n - z;
        if shift >= i64::from(p.max(1).leading_zeros()) - 1 {
            // Positive arguments, which one published operator passes on: clamped by whoever asked.
            return i64::MAX >> 1;
        }
        (p << shift).max(0)
    }
}

/// `e^x` for x of at most 0.
///
/// # Errors
/// [`Error::Value`] for scales that are not positive or too small, [`Error::Shape`] for different lengths.
pub fn exp(exec: &Exec, family: Family, x: Ints, scale: f64, y: &mut [i64]) -> Result<()> {
    let n = if family == Family::Ibert { 30 } else { 15 };
    let e = Exp::new(family, positive("scale", scale)?, n)?;
    rows(exec, x, 1, y, |x, y| {
        y[0] = e.at(i64::from(x[0]).min(0));
        Ok(())
    })
}

fn rows(
    exec: &Exec,
    x: Ints,
    cols: usize,
    y: &mut [i64],
    f: impl Fn(&[i32], &mut [i64]) -> Result<()> + Sync,
) -> Result<()> {
    rows_of(x.len(), cols, y.len())?;
    let part = exec.part(x.len(), cols);
    exec.each(y.chunks_mut(part).collect(), |i, y| {
        let x = x.slice(i * part..i * part + y.len());
        let mut wide = Buf::<i32>::zeroed(x.len())?;
        let x = x.widen(&mut wide);
        x.chunks(cols.max(1)).zip(y.chunks_mut(cols.max(1))).try_for_each(|(x, y)| f(x, y))
    })
}

fn highest(x: &[i32]) -> i64 {
    x.iter().fold(i64::MIN, |a, &v| a.max(i64::from(v)))
}

const TOP: i64 = (1 << 31) - 1;

/// Softmax: of scale 2^-8 for I-BERT, whose exponentials are coded in 16 bits first, 2^-7 for I-ViT.
///
/// # Errors
/// As [`exp`], and [`Error::Value`] for a scale so coarse that the exponential is 0 everywhere.
pub fn softmax(exec: &Exec, family: Family, x: Ints, cols: usize, scale: f64, y: &mut [i64]) -> Result<()> {
    let scale = positive("scale", scale)?;
    let n = if family == Family::Ibert { 30 } else { 15 };
    let e = Exp::new(family, scale, n)?;
    // The exponential at 0, which 16 bits code as 32767.
    let one = i128::from(e.at(0));
    if one <= 0 {
        return Err(Error::Value(format!("scale {scale} is too coarse: the exponential is 0 everywhere")));
    }
    rows(exec, x, cols, y, |x, y| {
        let max = highest(x);
        let mut sum = 0i64;
        for (o, &v) in y.iter_mut().zip(x) {
            let p = e.at(i64::from(v) - max);
            *o = if family == Family::Ibert { ((i128::from(p) * 32767 * 2 + one) / (2 * one)) as i64 } else { p };
            sum = sum.saturating_add(*o);
        }
        for o in y {
            *o = match family {
                Family::Ibert => (*o * ((1i64 << 32) / sum)) >> 24,
                Family::Ivit => (*o * (TOP / sum.min(TOP))) >> 24,
            };
        }
        Ok(())
    })
}

/// GELU. I-ViT's takes the maximum of a row of `cols`, so its results depend on the row.
///
/// # Errors
/// As [`exp`].
pub fn gelu(exec: &Exec, family: Family, x: Ints, cols: usize, scale: f64, y: &mut [i64]) -> Result<()> {
    let scale = positive("scale", scale)?;
    if family == Family::Ibert {
        let [qb, qc, one] = published::ibert_erf(scale);
        let most = i128::from(qc).abs() + i128::from(qb) * i128::from(qb) + i128::from(one).abs();
        within("the polynomial", most)?;
        within("GELU", (most >> 13).saturating_mul(1 << 31))?;
        return rows(exec, x, 1, y, |x, y| {
            let q = i64::from(x[0]);
            let a = q.abs().min(-qb) + qb;
            let p = q.signum() * (a * a + qc);
            y[0] = q * ((p >> 14) + one);
            Ok(())
        });
    }
    let e = Exp::new(family, published::ivit_sigmoid(scale), 23)?;
    rows(exec, x, cols, y, |x, y| {
        let max = highest(x);
        let floor = e.at(-max);
        for (o, &v) in y.iter_mut().zip(x) {
            let p = e.at(i64::from(v) - max);
            let factor = TOP / p.saturating_add(floor).clamp(1, TOP);
            *o = i64::from(v) * ((i128::from(p) * i128::from(factor)) >> 24) as i64;
        }
        Ok(())
    })
}

/// I-ViT's square root: ten halvings from 65536, wrong below some 34,000.
///
/// # Errors
/// [`Error::Shape`] for different lengths.
pub fn ivit_sqrt(x: &[u64], y: &mut [u64]) -> Result<()> {
    rows_of(x.len(), 1, y.len())?;
    for (o, &v) in y.iter_mut().zip(x) {
        *o = ten_halvings(v);
    }
    Ok(())
}

fn ten_halvings(v: u64) -> u64 {
    (0..10).fold(1 << 16, |k: u64, _| k.midpoint(v / k.max(1)))
}

/// Layer norm of scale `sqrt(n) / 2^30 * weight`: `bias` holds `floor(bias / weight / (sqrt(n) / 2^30))`.
///
/// # Errors
/// As [`exp`]; [`Error::Shape`] where a row and the bias differ in length.
pub fn layer_norm(exec: &Exec, family: Family, x: Ints, bias: &[i64], y: &mut [i64]) -> Result<()> {
    let cols = bias.len();
    rows(exec, x, cols, y, |x, y| {
        let n = cols as i64;
        let sum: i64 = x.iter().map(|&v| i64::from(v)).sum();
        // Halves to even.
        let (floor, rest) = (sum.div_euclid(n), 2 * sum.rem_euclid(n));
        let mean = floor + i64::from(rest > n || (rest == n && floor % 2 != 0));
        let mut shift = 0;
        let mut squares: u128;
        // I-BERT's shift is found in training; here, the least that keeps the sum within 32 bits.
        loop {
            squares = x.iter().map(|&v| u128::from(((i64::from(v) - mean) >> shift).unsigned_abs()).pow(2)).sum();
            if family == Family::Ivit || squares < 1 << 32 {
                break;
            }
            shift += 1;
        }
        let squares = u64::try_from(squares).map_err(|_| Error::Value("the sum of squares leaves 64 bits".into()))?;
        let factor = match family {
            // A constant row divides by zero as published; its deviations are 0, whatever the factor.
            Family::Ibert => (1i64 << 31) / ((squares.isqrt() as i64) << shift).max(1),
            Family::Ivit => TOP / (ten_halvings(squares) as i64).max(1),
        };
        for ((o, &v), &b) in y.iter_mut().zip(x).zip(bias) {
            *o = (((i64::from(v) - mean) * factor) >> 1).saturating_add(b);
        }
        Ok(())
    })
}
