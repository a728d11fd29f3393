//! Activation functions. What GELU and `SiLU` lack to the positive part is a small even bump, and that is what is computed.
//!
//! `gelu(x) = max(x, 0) - |x| Phi(-|x|)` and `silu(x) = max(x, 0) - |x| sigmoid(-|x|)`: large inputs pass unchanged, to the
//! last bit, and the bump is at most 0.17 and 0.28, so that 30 fraction bits hold it.
use super::fixed::{decay, gelu_short, low, mul, reciprocal, EXPONENT, GELU_END, Q};
use super::pieces::Pieces;
use super::requant::{Rule, Run};
use super::scale::{positive, quotient, Ratio, Reach, Short, LN_2};
use crate::ints::BLOCK;
use crate::level::{at, Loop};
use crate::{Error, Exec, Ints, IntsMut, Result};
use nibblas_core::isa::Isa;

/// Fraction bits of both terms before they are rounded together.
const FRACTION: u32 = 16;

/// The functions of one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Function {
    /// `x Phi(x)`
    Gelu,
    /// `x / (1 + e^-x)`
    Silu,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `e^x` for x of at most 0; greater x count as 0.
    Exp,
}

fn check(x: &Ints, y: &IntsMut) -> Result<()> {
    if x.len() == y.len() {
        Ok(())
    } else {
        Err(Error::Shape(format!("{} values do not fit {} results", x.len(), y.len())))
    }
}

fn map<R: Rule + Sync>(exec: &Exec, x: Ints, y: IntsMut, rule: R) -> Result<()> {
    let part = exec.part(y.len(), 1);
    // Bytes have 256 answers.
    if x.limits().1 <= 255 && x.len() > 4096 {
        let mut answers = [0i32; 256];
        let ((lo, hi), first) = (y.limits(), x.limits().0);
        for (i, o) in answers.iter_mut().enumerate() {
            *o = rule.value(0, first + i as i32).clamp(i64::from(lo), i64::from(hi)) as i32;
        }
        let table = Table { answers: &answers, first };
        return exec.each(y.parts(part), |i, mut y| {
            let x = x.slice(i * part..i * part + y.len());
            at(exec.isa, Run { x, y: &mut y, start: 0, zero: 0, rule: table });
            Ok(())
        });
    }
    exec.each(y.parts(part), |i, mut y| {
        let x = x.slice(i * part..i * part + y.len());
        at(exec.isa, Run { x, y: &mut y, start: 0, zero: 0, rule });
        Ok(())
    })
}

/// A function of a byte.
#[derive(Clone, Copy)]
struct Table<'a> {
    answers: &'a [i32; 256],
    first: i32,
}

impl Rule for Table<'_> {
    #[inline(always)]
    fn value(self, _: usize, x: i32) -> i64 {
        i64::from(self.answers[(x - self.first) as usize & 255])
    }
}

/// Rounds a Q30 number to the output's scale, given what 2^-30 is worth in its steps.
#[inline(always)]
fn round(v: i64, unit: Ratio) -> i64 {
    (((v * i64::from(unit.m)) >> unit.shift) + (1 << (FRACTION - 1))) >> FRACTION
}

#[derive(Clone, Copy)]
struct Exp {
    reach: Reach,
    unit: Ratio,
}

impl Rule for Exp {
    #[inline(always)]
    fn value(self, _: usize, x: i32) -> i64 {
        round(decay(x.min(0).unsigned_abs(), self.reach), self.unit)
    }
}

#[derive(Clone, Copy)]
struct Sigmoid {
    reach: Reach,
    unit: Ratio,
}

impl Rule for Sigmoid {
    #[inline(always)]
    fn value(self, _: usize, x: i32) -> i64 {
        let e = decay(x.unsigned_abs(), self.reach);
        let r = reciprocal(e);
        let left = low(mul(e, r));
        round(if x >= 0 { r } else { left }, self.unit)
    }
}

/// `max(x, 0) * scale - bump`, rounded to the output's scale.
#[inline(always)]
fn less(x: i32, bump: i64, whole: Ratio, unit: Ratio) -> i64 {
    let line = (i64::from(x.max(0)) * i64::from(whole.m)) >> whole.shift;
    let bump = (low(bump) * i64::from(unit.m)) >> unit.shift;
    (line - bump + (1 << (FRACTION - 1))) >> FRACTION
}

#[derive(Clone, Copy)]
struct Silu {
    reach: Reach,
    /// The input in units of 2^-23.
    place: Reach,
    whole: Ratio,
    unit: Ratio,
}

impl Rule for Silu {
    #[inline(always)]
    fn value(self, _: usize, x: i32) -> i64 {
        let a = x.unsigned_abs();
        let e = decay(a, self.reach);
        let tail = low(mul(e, reciprocal(e)));
        let v = (u64::from(a) * u64::from(self.place.m)) >> self.place.shift;
        // At 32 the bump is below 1e-12.
        let v = if a > self.place.limit { 0 } else { (v as u32).min(1 << 28) };
        less(x, (i64::from(v) * tail) >> 23, self.whole, self.unit)
    }
}

/// The last step of GELU: `line - bump`, rounded and saturated.
struct Less<'a> {
    x: &'a [i32],
    bump: &'a [i32],
    y: &'a mut [i32],
    /// Fraction bits of the bumps.
    fraction: i32,
    /// The scale of the input over that of the output; none where they are the same.
    whole: Option<Ratio>,
    limits: (i32, i32),
}

impl Loop for Less<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let (lo, hi) = self.limits;
        let values = self.y.iter_mut().zip(self.x.iter().zip(self.bump));
        if let Some(whole) = self.whole {
            // Bumps with the fraction bits of the line.
            let (left, right) = sides(FRACTION as i32 - self.fraction);
            for (o, (&x, &b)) in values {
                let line = (i64::from(x.max(0)) * i64::from(whole.m)) >> whole.shift;
                let y = (line - ((i64::from(b) << left) >> right) + (1 << (FRACTION - 1))) >> FRACTION;
                *o = y.clamp(i64::from(lo), i64::from(hi)) as i32;
            }
            return;
        }
        // The line has no fraction: 32-bit lanes do.
        let (left, right) = sides(-self.fraction);
        let half = (1 << right) >> 1;
        for (o, (&x, &b)) in values {
            *o = (x.max(0) + ((half - (b << left)) >> right)).clamp(lo, hi);
        }
    }
}

/// A shift to the left as two, one of them 0.
fn sides(left: i32) -> (u32, u32) {
    (left.max(0) as u32, (-left).max(0) as u32)
}

/// GELU by [`Pieces`].
#[derive(Clone)]
struct Gelu {
    pieces: Pieces,
    whole: Option<Ratio>,
}

impl Gelu {
    fn run(&self, isa: Isa, x: Ints, y: &mut IntsMut) {
        let (mut wide, mut bump, mut done) = ([0i32; BLOCK], [0i32; BLOCK], [0i32; BLOCK]);
        for start in (0..x.len()).step_by(BLOCK) {
            let n = BLOCK.min(x.len() - start);
            let x = x.slice(start..start + n).widen(&mut wide[..n]);
            let (bump, done) = (&mut bump[..n], &mut done[..n]);
            self.pieces.apply(isa, x, bump);
            let (fraction, whole, limits) = (self.pieces.fraction, self.whole, y.limits());
            at(isa, Less { x, bump, y: done, fraction, whole, limits });
            y.put(start, done);
        }
    }
}

/// GELU in 32-bit lanes, for outputs of 8 bits whose steps hide the short polynomial's error.
struct ShortGelu<'a, 'b> {
    x: Ints<'a>,
    y: &'b mut IntsMut<'a>,
    p: Short,
}

impl Loop for ShortGelu<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let Self { x, y, p } = self;
        let (lo, hi) = y.limits();
        let mut wide = [0i32; BLOCK];
        let mut done = [0i32; BLOCK];
        let half = (1 << p.shift) >> 1;
        let mut at = 0;
        while at < x.len() {
            let n = BLOCK.min(x.len() - at);
            let input = x.slice(at..at + n).widen(&mut wide[..n]);
            for (o, &x) in done[..n].iter_mut().zip(input) {
                let a = x.saturating_abs().min(p.end);
                let bump = gelu_short(((a >> p.coarse) * p.place) >> p.place_shift);
                let bump = if a == p.end { 0 } else { bump };
                let line = (x.clamp(0, p.top) >> p.line_coarse) * p.line;
                let y = (line - bump * p.unit + half) >> p.shift;
                *o = y.clamp(lo, hi);
            }
            y.put(at, &done[..n]);
            at += n;
        }
    }
}

/// Applies a function to integers with a scale; results are rounded to `out_scale`, halves up, and saturate.
///
/// # Errors
/// [`Error::Shape`] for different lengths, [`Error::Value`] for scales that are not positive, or too far apart.
pub fn apply(exec: &Exec, function: Function, x: Ints, scale: f64, out_scale: f64, y: IntsMut) -> Result<()> {
    check(&x, &y)?;
    let (s, out) = (positive("scale", scale)?, positive("out_scale", out_scale)?);
    // What 2^-30 is worth in steps of the output.
    let unit = Ratio::new("1 / out_scale", quotient(1.0, out, -(Q as i32)), FRACTION)?;
    let whole = || Ratio::new("scale / out_scale", quotient(s, out, 0), FRACTION);
    let reach = Reach::new(quotient(s, LN_2, 0), EXPONENT);
    match function {
        Function::Exp => map(exec, x, y, Exp { reach, unit }),
        Function::Sigmoid => map(exec, x, y, Sigmoid { reach, unit }),
        Function::Silu => map(exec, x, y, Silu { reach, place: Reach::new(s, 23), whole: whole()?, unit }),
        Function::Gelu => {
            if let Some(p) = Short::new(s, out, y.digits(), f64::from(GELU_END)) {
                let part = exec.part(y.len(), 1);
                return exec.each(y.parts(part), |i, mut y| {
                    let x = x.slice(i * part..i * part + y.len());
                    at(exec.isa, ShortGelu { x, y: &mut y, p });
                    Ok(())
                });
            }
            let gelu = Gelu { pieces: Pieces::new(s, out), whole: if s == out { None } else { Some(whole()?) } };
            let part = exec.part(y.len(), 1);
            exec.each(y.parts(part), |i, mut y| {
                gelu.run(exec.isa, x.slice(i * part..i * part + y.len()), &mut y);
                Ok(())
            })
        }
    }
}
