//! The sum of two integer tensors with scales of their own: the residual connection.
use super::scale::{positive, quotient, Ratio};
use crate::ints::BLOCK;
use crate::level::{at, Loop};
use crate::{Error, Exec, Ints, IntsMut, Result};

/// Fraction bits of both terms before they are rounded together.
const FRACTION: u32 = 16;

struct Add<'a> {
    a: Ints<'a>,
    b: Ints<'a>,
    y: IntsMut<'a>,
    ra: Ratio,
    rb: Ratio,
    each: bool,
}

impl Loop for Add<'_> {
    type Out = ();
    #[inline(always)]
    fn run(mut self) {
        let (lo, hi) = self.y.limits();
        let (mut wa, mut wb, mut done) = ([0i32; BLOCK], [0i32; BLOCK], [0i32; BLOCK]);
        let len = self.a.len();
        let half = 1i64 << (FRACTION - 1);
        // Where each branch is rounded to the output's scale by itself, fractions are dropped before the sum.
        let keep = if self.each { -1 << FRACTION } else { -1i64 };
        let nudge = if self.each { half } else { 0 };
        let (ma, mb) = (i64::from(self.ra.m), i64::from(self.rb.m));
        let mut at = 0;
        while at < len {
            let n = BLOCK.min(len - at);
            let a = self.a.slice(at..at + n).widen(&mut wa[..n]);
            let b = self.b.slice(at..at + n).widen(&mut wb[..n]);
            for ((o, &a), &b) in done[..n].iter_mut().zip(a).zip(b) {
                let a = (((i64::from(a) * ma) >> self.ra.shift) + nudge) & keep;
                let b = (((i64::from(b) * mb) >> self.rb.shift) + nudge) & keep;
                let sum = (a + b + half - nudge) >> FRACTION;
                *o = sum.clamp(i64::from(lo), i64::from(hi)) as i32;
            }
            self.y.put(at, &done[..n]);
            at += n;
        }
    }
}

/// `y = round((a*scale_a + b*scale_b) / out_scale)`, halves up; with `each`, both terms are rounded before the sum.
///
/// # Errors
/// [`Error::Shape`] for different lengths, [`Error::Value`] for scales that are not positive, or too far apart.
pub fn add(
    exec: &Exec,
    a: Ints,
    scale_a: f64,
    b: Ints,
    scale_b: f64,
    out_scale: f64,
    each: bool,
    y: IntsMut,
) -> Result<()> {
    if a.len() != b.len() || a.len() != y.len() {
        return Err(Error::Shape(format!("lengths differ: {}, {} and {}", a.len(), b.len(), y.len())));
    }
    let out = positive("out_scale", out_scale)?;
    let ratio = |name: &str, s: f64| Ratio::new(name, quotient(positive(name, s)?, out, 0), FRACTION);
    let (ra, rb) = (ratio("a_scale", scale_a)?, ratio("b_scale", scale_b)?);
    let part = exec.part(y.len(), 1);
    exec.each(y.parts(part), |i, y| {
        let range = i * part..i * part + y.len();
        at(exec.isa, Add { a: a.slice(range.clone()), b: b.slice(range), y, ra, rb, each });
        Ok(())
    })
}
