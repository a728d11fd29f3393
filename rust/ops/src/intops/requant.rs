//! int32 sums to a narrower type: `zero + x * multiplier * 2^-31 * 2^-shift`, rounded in one of three ways.
//!
//! * *single*: `(x*M + 2^(30+n)) >> (31+n)`; halves go up.
//! * *gemmlowp*: the doubling high product of 32 bits, halves up, then a shift whose halves go away from zero. Two
//!   roundings, so it differs from *single* by one in a few per cent of all cases.
//! * *float*: in float32, halves to even, as libraries do that convert and multiply.
use super::rows_of;
use super::scale::Dyadic;
use crate::ints::BLOCK;
use crate::level::{at, Loop};
use crate::{Error, Exec, Ints, IntsMut, Result};

/// Which of the three definitions in use a result follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// One rounding, halves up.
    Single,
    /// Two roundings.
    Gemmlowp,
    /// float32 and halves to even.
    Float,
}

#[inline(always)]
fn single(x: i32, d: Dyadic) -> i64 {
    let shift = (31 + d.shift) as u32;
    let half = (1i64 << shift) >> 1;
    (i64::from(x) * i64::from(d.multiplier) + half) >> shift
}

#[inline(always)]
fn gemmlowp(x: i32, d: Dyadic) -> i64 {
    let left = (-d.shift).max(0);
    let right = d.shift.max(0);
    let x = (i64::from(x) << left).clamp(i64::from(i32::MIN), i64::from(i32::MAX));
    let product = x * i64::from(d.multiplier);
    let nudge = if product >= 0 { 1 << 30 } else { 1 - (1 << 30) };
    let sum = product + nudge;
    // Truncating division by 2^31; only the lowest number times itself leaves 32 bits.
    let high = (sum + ((sum >> 63) & ((1 << 31) - 1))) >> 31;
    let high = high.min(i64::from(i32::MAX));
    let mask = (1i64 << right) - 1;
    let threshold = (mask >> 1) + i64::from(high < 0);
    (high >> right) + i64::from(high & mask > threshold)
}

#[allow(clippy::float_arithmetic)]
fn as_float(d: Dyadic) -> f32 {
    // Exact in binary64 and rounded once.
    (f64::from(d.multiplier) * 2f64.powi(-31 - d.shift)) as f32
}

#[inline(always)]
#[allow(clippy::float_arithmetic)]
fn float(x: i32, scale: f32) -> i64 {
    i64::from((x as f32 * scale).round_ties_even() as i32)
}

/// A rule with its parameters: a struct and not a closure, because only a method can be marked to be inlined into the
/// loops of every level.
pub(crate) trait Rule: Copy {
    /// The result for `x`, the j-th of its run, before it saturates.
    fn value(self, j: usize, x: i32) -> i64;
}

#[derive(Clone, Copy)]
struct Single<'a>(&'a [Dyadic]);
#[derive(Clone, Copy)]
struct Gemmlowp<'a>(&'a [Dyadic]);
#[derive(Clone, Copy)]
struct Float<'a>(&'a [f32]);
/// One parameter for all.
#[derive(Clone, Copy)]
struct Same<T>(T);

impl Rule for Single<'_> {
    #[inline(always)]
    fn value(self, j: usize, x: i32) -> i64 {
        single(x, self.0[j])
    }
}

impl Rule for Gemmlowp<'_> {
    #[inline(always)]
    fn value(self, j: usize, x: i32) -> i64 {
        gemmlowp(x, self.0[j])
    }
}

impl Rule for Float<'_> {
    #[inline(always)]
    fn value(self, j: usize, x: i32) -> i64 {
        float(x, self.0[j])
    }
}

impl<T: Rule> Rule for Same<T> {
    #[inline(always)]
    fn value(self, _: usize, x: i32) -> i64 {
        self.0.value(0, x)
    }
}

/// Applies a rule to a run of values.
pub(crate) struct Run<'a, 'b, R> {
    pub x: Ints<'a>,
    pub y: &'b mut IntsMut<'a>,
    /// Where in `y` the run begins.
    pub start: usize,
    pub zero: i64,
    pub rule: R,
}

impl<R: Rule> Loop for Run<'_, '_, R> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let Self { x, y, start, zero, rule } = self;
        let (lo, hi) = y.limits();
        let mut wide = [0i32; BLOCK];
        let mut done = [0i32; BLOCK];
        let mut at = 0;
        while at < x.len() {
            let n = BLOCK.min(x.len() - at);
            let input = x.slice(at..at + n).widen(&mut wide[..n]);
            for (j, (o, &v)) in done[..n].iter_mut().zip(input).enumerate() {
                *o = (rule.value(at + j, v) + zero).clamp(i64::from(lo), i64::from(hi)) as i32;
            }
            y.put(start + at, &done[..n]);
            at += n;
        }
    }
}

/// Rescales `x`, whose channels repeat as `[channels][inner]`; one factor for all, or one per channel.
///
/// # Errors
/// [`Error::Shape`] where lengths do not fit, [`Error::Value`] for shifts outside -31..=31.
pub fn requantize(
    exec: &Exec,
    x: Ints,
    factors: &[Dyadic],
    inner: usize,
    zero: i32,
    rounding: Rounding,
    y: IntsMut,
) -> Result<()> {
    let channels = factors.len();
    let period = channels * inner;
    rows_of(x.len(), period, y.len())?;
    if let Some(bad) = factors.iter().find(|d| !(-31..=31).contains(&d.shift)) {
        return Err(Error::Value(format!("shift must lie in -31..=31, got {}", bad.shift)));
    }
    let floats: Vec<f32> = factors.iter().map(|&d| as_float(d)).collect();
    let zero = i64::from(zero);
    let isa = exec.isa;
    // One factor has rows of any length.
    let unit = if channels == 1 { 1 } else { period };
    let part = exec.part(x.len(), unit);
    exec.each(y.parts(part), |i, mut y| {
        let x = x.slice(i * part..i * part + y.len());
        let y = &mut y;
        if inner == 1 && channels > 1 {
            for start in (0..x.len()).step_by(channels) {
                let x = x.slice(start..start + channels);
                match rounding {
                    Rounding::Single => at(isa, Run { x, y, start, zero, rule: Single(&factors[..channels]) }),
                    Rounding::Gemmlowp => at(isa, Run { x, y, start, zero, rule: Gemmlowp(&factors[..channels]) }),
                    Rounding::Float => at(isa, Run { x, y, start, zero, rule: Float(&floats[..channels]) }),
                }
            }
            return Ok(());
        }
        let run = if channels == 1 { x.len() } else { inner };
        for start in (0..x.len()).step_by(run.max(1)) {
            let (x, c) = (x.slice(start..start + run), start / run % channels);
            match rounding {
                Rounding::Single => at(isa, Run { x, y, start, zero, rule: Same(Single(&factors[c..])) }),
                Rounding::Gemmlowp => at(isa, Run { x, y, start, zero, rule: Same(Gemmlowp(&factors[c..])) }),
                Rounding::Float => at(isa, Run { x, y, start, zero, rule: Same(Float(&floats[c..])) }),
            }
        }
        Ok(())
    })
}
