//! Softmax of integer rows: maximum, exponentials in Q30, their sum in 64 bits, one reciprocal, one rounding.
//!
//! The result is a fraction with all the bits of its type: `y = round(p * 2^digits)`, at most the type's highest value, so
//! that a row with one hot value saturates (255/256 in uint8). The lowest int32 stands for minus infinity: masked values
//! get 0, and a row of nothing else is 0.
use super::fixed::{decay, EXPONENT};
use super::rows_of;
use super::scale::{positive, quotient, Reach, LN_2};
use crate::level::{at, Loop};
use crate::{Exec, Ints, IntsMut, Result};
use nibblas_core::buf::Buf;

struct Rows<'a, 'b> {
    x: Ints<'a>,
    y: IntsMut<'a>,
    cols: usize,
    reach: Reach,
    wide: &'b mut [i32],
    exps: &'b mut [i32],
}

impl Loop for Rows<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn run(mut self) {
        let digits = self.y.digits();
        let top = i64::from(self.y.limits().1);
        for start in (0..self.x.len()).step_by(self.cols) {
            let x = self.x.slice(start..start + self.cols).widen(self.wide);
            let max = x.iter().fold(i32::MIN, |a, &b| a.max(b));
            for (e, &v) in self.exps.iter_mut().zip(x) {
                let d = max.wrapping_sub(v) as u32;
                let p = decay(d, self.reach);
                *e = if v == i32::MIN { 0 } else { p as i32 };
            }
            let sum = self.exps.iter().fold(0u64, |a, &e| a + u64::from(e as u32));
            // A power of two over the sum, with 31 significant bits: nothing is lost where the sum is large.
            let width = 64 - sum.max(1).leading_zeros();
            let inverse = ((1u128 << (30 + width)) / u128::from(sum.max(1))) as u64;
            let shift = 30 + width - digits;
            if shift > 62 {
                // A sum so large that no fraction reaches half a step.
                self.wide.fill(0);
                self.y.put(start, self.wide);
                continue;
            }
            let half = (1u64 << shift) >> 1;
            // The buffer of the input is free now.
            for (o, &e) in self.wide.iter_mut().zip(&*self.exps) {
                let p = (u64::from(e as u32) * u64::from(inverse as u32) + half) >> shift;
                *o = (p as i64).min(top) as i32;
            }
            self.y.put(start, self.wide);
        }
    }
}

/// Softmax of rows of `cols` integers with a scale.
///
/// # Errors
/// [`crate::Error::Shape`] where lengths do not fit, [`crate::Error::Value`] for a scale that is not positive and finite,
/// [`crate::Error::OutOfMemory`].
pub fn softmax(exec: &Exec, x: Ints, cols: usize, scale: f64, y: IntsMut) -> Result<()> {
    rows_of(x.len(), cols, y.len())?;
    let reach = Reach::new(quotient(positive("scale", scale)?, LN_2, 0), EXPONENT);
    let part = exec.part(x.len(), cols);
    exec.each(y.parts(part), |i, y| {
        let x = x.slice(i * part..i * part + y.len());
        let (mut wide, mut exps) = (Buf::<i32>::zeroed(cols)?, Buf::<i32>::zeroed(cols)?);
        at(exec.isa, Rows { x, y, cols, reach, wide: &mut wide, exps: &mut exps });
        Ok(())
    })
}
