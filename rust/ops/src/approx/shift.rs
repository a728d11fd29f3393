//! Matrix products with weights that are 0 or powers of two: a shift for each (`DeepShift`, the shift layers of `ShiftAddViT`).
//!
//! Shifts to the right would drop bits of negative and positive numbers unalike. So all go to the left, from the smallest power
//! that the format has: `D = sum of sign (a << (p - low))` is exact, and `2^low` goes into the group's scale. For 16-bit
//! floats a shift is an addition to the exponent, exact too, and sums are float32's, k ascending. Scales come after the group,
//! `acc = fma(f32(D), s, acc)`, as in all grouped products.
use super::shift_add::shifts_plainly;
use super::strips::{check, parts, store, Codes, WIDE};
use crate::level::{at, Loop};
use crate::{Error, Exec, Result};
use nibblas_core::{QView, ZerosRef};

/// Values of K that are decoded at a time.
const DEEP: usize = 64;
/// The longest shift whose sums of [`DEEP`] bytes int32 holds; and that of int64, with room for a group.
const NARROW: u32 = 17;
const LONGEST: u32 = 32;

/// What codes are worth: `sign * 2^(low + shift)`, or nothing.
struct Powers {
    low: i32,
    span: u32,
    digits: Vec<Digit>,
}

/// A weight: what a number is shifted by, all ones where the weight is not 0, and where it is negative.
#[derive(Clone, Copy, Default)]
struct Digit {
    shift: i32,
    keep: i32,
    sign: i32,
}

impl Powers {
    fn new(w: &QView) -> Result<Self> {
        let format = w.format;
        let unfit = || {
            let what = "expected weights of 0 and powers of two with plain scales, such as pow2_4 or ternary";
            Error::Unsupported(format!("{format} has weights that are no shifts: {what}"))
        };
        let e = format.element;
        if !w.outer.is_empty() || e.plain.is_some() || e.bits > 8 || !matches!(w.zeros, ZerosRef::None) {
            return Err(unfit());
        }
        let numbers: Vec<f32> = (0..e.levels).map(|u| e.number(u)).collect();
        let exponent = |v: f32| (v.to_bits() >> 23 & 255) as i32 - 127;
        let power = |v: f32| v == 0.0 || v.is_normal() && v.to_bits() << 9 == 0;
        let alive = || numbers.iter().filter(|v| **v != 0.0).map(|&v| exponent(v));
        let (Some(low), Some(high)) = (alive().min(), alive().max()) else { return Err(unfit()) };
        let span = (high - low) as u32;
        if !numbers.iter().all(|&v| power(v)) || span > LONGEST {
            return Err(unfit());
        }
        let digits = numbers.iter().map(|&v| match v {
            0.0 => Digit::default(),
            _ => Digit { shift: exponent(v) - low, keep: -1, sign: if v < 0.0 { -1 } else { 0 } },
        });
        let mut digits: Vec<_> = digits.collect();
        // Codes that no level has are not stored, but a table is quicker without a check.
        digits.resize(256, Digit::default());
        Ok(Self { low, span, digits })
    }
}

/// A strip of weights, an array for each part of them.
#[derive(Clone, Copy)]
struct Row<T> {
    shift: [T; WIDE],
    keep: [T; WIDE],
    sign: [T; WIDE],
}

impl Row<i32> {
    const ZERO: Self = Self { shift: [0; WIDE], keep: [0; WIDE], sign: [0; WIDE] };
}

impl Row<i64> {
    const ZERO: Self = Self { shift: [0; WIDE], keep: [0; WIDE], sign: [0; WIDE] };
}

fn rows_of<T: From<i32>>(codes: &[[u16; WIDE]], digits: &[Digit], out: &mut [Row<T>]) {
    for (to, from) in out.iter_mut().zip(codes) {
        for j in 0..WIDE {
            let d = digits[usize::from(from[j] & 255)];
            (to.shift[j], to.keep[j], to.sign[j]) = (d.shift.into(), d.keep.into(), d.sign.into());
        }
    }
}

/// `y[n] += sum over k of sign (a[k] << shift)`, in the integers that hold it.
struct Shifts<'a, T> {
    a: &'a [i8],
    w: &'a [Row<T>],
    y: &'a mut [i64; WIDE],
}

macro_rules! shifts {
    ($t:ty) => {
        impl Loop for Shifts<'_, $t> {
            type Out = ();
            #[inline(always)]
            fn run(self) {
                let mut sums: [$t; WIDE] = [0; WIDE];
                for (&a, w) in self.a.iter().zip(self.w) {
                    let a = <$t>::from(a);
                    for n in 0..WIDE {
                        let term = (a << (w.shift[n] & 63)) & w.keep[n];
                        sums[n] += (term ^ w.sign[n]) - w.sign[n];
                    }
                }
                for (y, &s) in self.y.iter_mut().zip(&sums) {
                    *y += i64::from(s);
                }
            }
        }
    };
}
shifts!(i32);
shifts!(i64);

/// `y[n] += fl(sign 2^p a[k])`, k ascending: `low + shift` is added to the exponent.
struct Exponents<'a> {
    /// Bits of float32: 0, or far from both ends.
    a: &'a [u32],
    w: &'a [Row<i32>],
    low: i32,
    y: &'a mut [f32; WIDE],
}

impl Loop for Exponents<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let mut sums = *self.y;
        for (&a, w) in self.a.iter().zip(self.w) {
            let alive = if a << 1 == 0 { 0 } else { u32::MAX };
            for n in 0..WIDE {
                let moved = a.wrapping_add(((self.low + w.shift[n]) as u32) << 23);
                let bits = moved & alive & w.keep[n] as u32;
                sums[n] += f32::from_bits(bits ^ (w.sign[n] as u32 & 1 << 31));
            }
        }
        *self.y = sums;
    }
}

/// The end of a group.
struct Finish<'a> {
    sums: &'a [f32; WIDE],
    scales: &'a [f32; WIDE],
    y: &'a mut [f32; WIDE],
}

impl Loop for Finish<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for n in 0..WIDE {
            self.y[n] = self.sums[n].mul_add(self.scales[n], self.y[n]);
        }
    }
}

fn scales(w: &QView, n0: usize, width: usize, g: usize) -> [f32; WIDE] {
    let mut s = [0.0; WIDE];
    for j in 0..width {
        s[j] = w.scale(n0 + j, g);
    }
    s
}

/// Activations of one of the two kinds.
#[derive(Clone, Copy)]
enum Left<'a> {
    Bytes(&'a [i8]),
    Floats(&'a [f32]),
}

/// `y[m][n] = sum over groups of scale * D + bias`, for int8 activations.
///
/// # Errors
/// [`Error::Unsupported`] for formats with other weights than 0 and powers of two, [`Error::Shape`] where lengths do not fit.
pub fn matmul_int8(exec: &Exec, a: &[i8], w: &QView, bias: Option<&[f32]>, y: &mut [f32]) -> Result<()> {
    matmul(exec, Left::Bytes(a), w, bias, y)
}

/// As [`matmul_int8`] for 16-bit floats, given as float32. Rows with NaN, infinity or numbers near the ends of float32 are
/// multiplied.
///
/// # Errors
/// As [`matmul_int8`].
pub fn matmul_half(exec: &Exec, a: &[f32], w: &QView, bias: Option<&[f32]>, y: &mut [f32]) -> Result<()> {
    matmul(exec, Left::Floats(a), w, bias, y)
}

/// Decoded weights in the narrowest integers that hold the sums.
enum Rows {
    Narrow(Vec<Row<i32>>),
    Wide(Vec<Row<i64>>),
}

fn matmul(exec: &Exec, a: Left, w: &QView, bias: Option<&[f32]>, y: &mut [f32]) -> Result<()> {
    let powers = Powers::new(w)?;
    let len = match a {
        Left::Bytes(a) => a.len(),
        Left::Floats(a) => a.len(),
    };
    check(len, w, bias, y.len())?;
    if y.is_empty() {
        return Ok(());
    }
    let (k, n, isa) = (w.cols, w.rows, exec.isa);
    let unit = f32::from_bits(((127 + powers.low) as u32) << 23);
    let (down, up) = ((-powers.low).max(0) as u32, (powers.low + powers.span as i32).max(0) as u32);
    let narrow = powers.span <= NARROW || matches!(a, Left::Floats(_));
    let jobs = parts(exec, y, n);
    exec.each(jobs, |_, (m0, n0, y)| {
        let columns = n.min(y.len());
        let rows = y.len() / columns;
        let plain: Vec<bool> = (m0..m0 + rows)
            .map(|m| match a {
                Left::Bytes(_) => true,
                Left::Floats(a) => shifts_plainly(&a[m * k..(m + 1) * k], down, up),
            })
            .collect();
        let mut acc = vec![[0f32; WIDE]; rows];
        let mut strip = Codes::new(DEEP);
        let mut decoded =
            if narrow { Rows::Narrow(vec![Row::<i32>::ZERO; DEEP]) } else { Rows::Wide(vec![Row::<i64>::ZERO; DEEP]) };
        for start in (0..columns).step_by(WIDE) {
            let width = WIDE.min(columns - start);
            acc.fill([0.0; WIDE]);
            for g in 0..w.groups() {
                let (first, last) = (g * w.group_len(), k.min((g + 1) * w.group_len()));
                let mut whole = vec![[0i64; WIDE]; rows];
                let mut sums = vec![[0f32; WIDE]; rows];
                for k0 in (first..last).step_by(DEEP) {
                    let deep = DEEP.min(last - k0);
                    let codes = strip.decode(w, n0 + start, width, k0, deep);
                    match &mut decoded {
                        Rows::Narrow(r) => rows_of(codes, &powers.digits, r),
                        Rows::Wide(r) => rows_of(codes, &powers.digits, r),
                    }
                    for r in 0..rows {
                        let range = (m0 + r) * k + k0..(m0 + r) * k + k0 + deep;
                        match (a, &decoded) {
                            (Left::Bytes(a), Rows::Narrow(w)) => {
                                at(isa, Shifts { a: &a[range], w: &w[..deep], y: &mut whole[r] });
                            }
                            (Left::Bytes(a), Rows::Wide(w)) => {
                                at(isa, Shifts { a: &a[range], w: &w[..deep], y: &mut whole[r] });
                            }
                            (Left::Floats(a), Rows::Narrow(w)) if plain[r] => {
                                let mut bits = [0u32; DEEP];
                                bits.iter_mut().zip(&a[range]).for_each(|(b, v)| *b = v.to_bits());
                                let (a, w, low) = (&bits[..deep], &w[..deep], powers.low);
                                at(isa, Exponents { a, w, low, y: &mut sums[r] });
                            }
                            (Left::Floats(a), _) => multiply(&a[range], codes, w, &mut sums[r]),
                        }
                    }
                }
                let s = scales(w, n0 + start, width, g);
                for ((acc, sums), whole) in acc.iter_mut().zip(&mut sums).zip(&whole) {
                    if matches!(a, Left::Bytes(_)) {
                        sums.iter_mut().zip(whole).for_each(|(s, &d)| *s = d as f32 * unit);
                    }
                    at(isa, Finish { sums, scales: &s, y: acc });
                }
            }
            store(&acc, bias, n0 + start, width, columns, start, y);
        }
        Ok(())
    })
}

/// What IEEE multiplication gives.
fn multiply(a: &[f32], codes: &[[u16; WIDE]], w: &QView, y: &mut [f32; WIDE]) {
    for (&a, u) in a.iter().zip(codes) {
        for (y, &u) in y.iter_mut().zip(u) {
            *y += a * w.format.element.number(u);
        }
    }
}
