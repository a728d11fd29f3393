//! Matrix products by shifting and adding (MixPE): no multiplication inside a group.
//!
//! *What.* A weight code of b bits is b planes: `u = sum of 2^i u_i`. For integer activations the sums of a group are taken
//! plane by plane, `P_i = sum over k of (u_i ? a_k : 0)`, shifted once each and added, `D = sum of P_i << i`. Constant
//! offsets of the coding and zero points come off through `A = sum of a_k`, which all columns share. Scales come after
//! the group: `acc = fma(D, s, acc)`. That is the contract of `compute="int8"`, so both give the same bits.
//!
//! For 16-bit float activations a shift is an addition to the exponent, and the terms of one product are added
//! aligned: its 11 + b bits fit float32, so the product is exact whatever the order. Terms keep an exponent wider than
//! float16's, so nothing overflows; 0 stays 0; subnormal numbers are numbers like others. Products are then summed in
//! float32, k ascending within the group, and scaled after it. A row with NaN or infinity follows IEEE multiplication.
use super::strips::{check, parts, store, Codes, WIDE};
use crate::level::{at, Loop};
use crate::{Error, Exec, Result};
use nibblas_core::format::Zero;
use nibblas_core::{QView, ValueMap};

/// Activations that int16 sums of magnitudes up to 128 hold.
const SAFE: usize = 255;
/// Values of K that one pass over the sums takes.
const DEEP: usize = 4;

/// How a linear element reads its codes: `value = mul * u - sub`.
fn affine(w: &QView) -> Result<(i64, i64)> {
    let format = w.format;
    match format.element.map {
        ValueMap::Affine { mul, sub } if w.outer.is_empty() && format.element.plain.is_none() => {
            Ok((i64::from(mul), i64::from(sub)))
        }
        _ => Err(Error::Unsupported(format!(
            "{format} has no binary digits to shift by: expected int, uint, bipolar or ternary with plain scales"
        ))),
    }
}

/// Sums of one plane: `y[n] += sum over k of (mask[k][n] & a[k])`, in int16.
struct Plane<'a> {
    a: &'a [i16],
    masks: &'a [[i16; WIDE]],
    y: &'a mut [i16; WIDE],
}

impl Loop for Plane<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let (fours, rest) = self.a.as_chunks::<DEEP>();
        let (blocks, tail) = self.masks[..self.a.len()].as_chunks::<DEEP>();
        for (a, m) in fours.iter().zip(blocks) {
            for n in 0..WIDE {
                let sum = ((m[0][n] & a[0]) + (m[1][n] & a[1])) + ((m[2][n] & a[2]) + (m[3][n] & a[3]));
                self.y[n] += sum;
            }
        }
        for (&a, m) in rest.iter().zip(tail) {
            for n in 0..WIDE {
                self.y[n] += m[n] & a;
            }
        }
    }
}

/// Shifts a plane's sums into the group's.
struct Gather<'a> {
    plane: &'a [i16; WIDE],
    shift: u32,
    y: &'a mut [i64; WIDE],
}

impl Loop for Gather<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (y, &p) in self.y.iter_mut().zip(self.plane) {
            *y += i64::from(p) << self.shift;
        }
    }
}

/// The end of a group: `acc = fma(f32(D), s, acc)`, and the term of float zero points.
struct Finish<'a> {
    sums: &'a [i64; WIDE],
    mul: i64,
    /// What comes off for each unit of `total`: the coding's offset and integer zero points.
    less: &'a [i64; WIDE],
    total: i64,
    scales: &'a [f32; WIDE],
    /// `-fl(s * z)` for float zero points, else 0.
    floats: Option<&'a [f32; WIDE]>,
    y: &'a mut [f32; WIDE],
}

impl Loop for Finish<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        let total = self.total;
        for n in 0..WIDE {
            let d = self.sums[n] * self.mul - self.less[n] * total;
            self.y[n] = (d as f32).mul_add(self.scales[n], self.y[n]);
        }
        if let Some(floats) = self.floats {
            for n in 0..WIDE {
                self.y[n] = (total as f32).mul_add(floats[n], self.y[n]);
            }
        }
    }
}

/// What a group's columns are finished with.
struct Ends {
    less: [i64; WIDE],
    scales: [f32; WIDE],
    floats: Option<[f32; WIDE]>,
}

fn ends(w: &QView, n0: usize, width: usize, g: usize, sub: i64) -> Ends {
    let mut e = Ends { less: [sub; WIDE], scales: [0.0; WIDE], floats: None };
    for j in 0..width {
        e.scales[j] = w.scale(n0 + j, g);
        match w.zero(n0 + j, g) {
            Zero::None => {}
            Zero::Int(z) => e.less[j] = sub + i64::from(z),
            Zero::Float(z) => e.floats.get_or_insert([0.0; WIDE])[j] = -(e.scales[j] * z),
        }
    }
    e
}

/// `y[m][n] = sum over groups of scale * D + bias`, for int8 activations: the bits of `compute="int8"`.
///
/// # Errors
/// [`Error::Unsupported`] for formats whose codes are places in a table, [`Error::Shape`] where lengths do not fit.
pub fn matmul_int8(exec: &Exec, a: &[i8], w: &QView, bias: Option<&[f32]>, y: &mut [f32]) -> Result<()> {
    let (mul, sub) = affine(w)?;
    check(a.len(), w, bias, y.len())?;
    if y.is_empty() {
        return Ok(());
    }
    let (k, n, bits) = (w.cols, w.rows, u32::from(w.format.element.bits));
    let isa = exec.isa;
    let jobs = parts(exec, y, n);
    exec.each(jobs, |_, (m0, n0, y)| {
        let columns = n.min(y.len());
        let rows = y.len() / columns;
        let mut acc = vec![[0f32; WIDE]; rows];
        let mut strip = Codes::new(SAFE);
        let mut masks = vec![[0i16; WIDE]; SAFE * bits as usize];
        for start in (0..columns).step_by(WIDE) {
            let width = WIDE.min(columns - start);
            acc.fill([0.0; WIDE]);
            for g in 0..w.groups() {
                let (first, last) = (g * w.group_len(), k.min((g + 1) * w.group_len()));
                let e = ends(w, n0 + start, width, g, sub);
                let mut sums = vec![[0i64; WIDE]; rows];
                for k0 in (first..last).step_by(SAFE) {
                    let deep = SAFE.min(last - k0);
                    let codes = strip.decode(w, n0 + start, width, k0, deep);
                    for (i, masks) in masks.chunks_mut(SAFE).enumerate() {
                        at(isa, Masks { codes, plane: i as u32, y: masks });
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let mut wide = [0i16; SAFE];
                        let from = (m0 + r) * k + k0;
                        for (to, &a) in wide.iter_mut().zip(&a[from..from + deep]) {
                            *to = i16::from(a);
                        }
                        for (i, masks) in masks.chunks(SAFE).enumerate() {
                            let mut plane = [0i16; WIDE];
                            at(isa, Plane { a: &wide[..deep], masks, y: &mut plane });
                            at(isa, Gather { plane: &plane, shift: i as u32, y: sums });
                        }
                    }
                }
                for (r, (sums, acc)) in sums.iter().zip(&mut acc).enumerate() {
                    let row = (m0 + r) * k;
                    let total = a[row + first..row + last].iter().map(|&v| i64::from(v)).sum();
                    let (scales, floats, less) = (&e.scales, e.floats.as_ref(), &e.less);
                    at(isa, Finish { sums, mul, less, total, scales, floats, y: acc });
                }
            }
            store(&acc, bias, n0 + start, width, columns, start, y);
        }
        Ok(())
    })
}

/// All ones where a code has a bit.
struct Masks<'a> {
    codes: &'a [[u16; WIDE]],
    plane: u32,
    y: &'a mut [[i16; WIDE]],
}

impl Loop for Masks<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (to, from) in self.y.iter_mut().zip(self.codes) {
            for (to, &u) in to.iter_mut().zip(from) {
                *to = -((u >> self.plane & 1) as i16);
            }
        }
    }
}

/// The digits of `value - zero` of a column's weights: magnitudes, and the sign in the place of float32's.
#[derive(Clone, Copy)]
struct Digits {
    magnitude: [u32; WIDE],
    sign: [u32; WIDE],
}

/// Products of one activation row with a group, by adding exponents: `y[n] += fl(...)`, k ascending.
struct Terms<'a> {
    /// Bits of float32, none of them subnormal or without a finite value.
    a: &'a [u32],
    digits: &'a [Digits],
    /// Digits of the longest magnitude.
    bits: u32,
    y: &'a mut [f32; WIDE],
}

impl Loop for Terms<'_> {
    type Out = ();
    #[inline(always)]
    fn run(self) {
        for (&a, d) in self.a.iter().zip(self.digits) {
            let mut product = [0f32; WIDE];
            for i in 0..self.bits {
                // 2^i times a: i added to the exponent. Zero has none to add to.
                let shifted = if a << 1 == 0 { a } else { a + (i << 23) };
                for (p, &u) in product.iter_mut().zip(&d.magnitude) {
                    let mask = 0u32.wrapping_sub(u >> i & 1);
                    *p += f32::from_bits(shifted & mask);
                }
            }
            for ((y, &p), &s) in self.y.iter_mut().zip(&product).zip(&d.sign) {
                *y += f32::from_bits(p.to_bits() ^ s);
            }
        }
    }
}

/// Whether adding up to `up` to an exponent, or taking up to `down` from it, gives a normal number: 0 has none, and bfloat16
/// reaches both ends of float32.
pub(super) fn shifts_plainly(a: &[f32], down: u32, up: u32) -> bool {
    a.iter().all(|v| {
        let field = v.to_bits() >> 23 & 255;
        *v == 0.0 || (down < field && field + up < 255)
    })
}

/// As [`matmul_int8`] for 16-bit floats, given as float32: exponents are added, and products summed in float32. Rows with a
/// number whose products may leave float32's normal ones (NaN, infinity, the ends of bfloat16) are multiplied.
///
/// # Errors
/// As [`matmul_int8`]; float zero points have no digits either, and codes of more than 12 bits no exact product.
pub fn matmul_half(exec: &Exec, a: &[f32], w: &QView, bias: Option<&[f32]>, y: &mut [f32]) -> Result<()> {
    let (mul, sub) = affine(w)?;
    check(a.len(), w, bias, y.len())?;
    if matches!(w.zeros, nibblas_core::ZerosRef::Float(_)) {
        return Err(Error::Unsupported("float zero points have no binary digits to shift by".into()));
    }
    if w.format.element.bits > 12 {
        return Err(Error::Unsupported(format!("{}: products with floats are exact up to 12 bits", w.format)));
    }
    if y.is_empty() {
        return Ok(());
    }
    let (k, n) = (w.cols, w.rows);
    let jobs = parts(exec, y, n);
    exec.each(jobs, |_, (m0, n0, y)| {
        let columns = n.min(y.len());
        let rows = y.len() / columns;
        // A product is below 2^13 times its float.
        let plain: Vec<bool> = (0..rows).map(|r| shifts_plainly(&a[(m0 + r) * k..][..k], 0, 13)).collect();
        let mut acc = vec![[0f32; WIDE]; rows];
        let mut strip = Codes::new(SAFE);
        let mut digits = vec![Digits { magnitude: [0; WIDE], sign: [0; WIDE] }; SAFE];
        for start in (0..columns).step_by(WIDE) {
            let width = WIDE.min(columns - start);
            acc.fill([0.0; WIDE]);
            for g in 0..w.groups() {
                let (first, last) = (g * w.group_len(), k.min((g + 1) * w.group_len()));
                let e = ends(w, n0 + start, width, g, sub);
                let mut sums = vec![[0f32; WIDE]; rows];
                for k0 in (first..last).step_by(SAFE) {
                    let deep = SAFE.min(last - k0);
                    let codes = strip.decode(w, n0 + start, width, k0, deep);
                    let mut longest = 0;
                    for (to, from) in digits.iter_mut().zip(codes) {
                        for j in 0..WIDE {
                            let value = if j < width { mul * i64::from(from[j]) - e.less[j] } else { 0 };
                            to.magnitude[j] = value.unsigned_abs() as u32;
                            to.sign[j] = if value < 0 { 1 << 31 } else { 0 };
                            longest |= to.magnitude[j];
                        }
                    }
                    let bits = u32::BITS - longest.leading_zeros();
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let from = (m0 + r) * k + k0;
                        let a = &a[from..from + deep];
                        if plain[r] {
                            let mut patterns = [0u32; SAFE];
                            for (to, v) in patterns.iter_mut().zip(a) {
                                *to = v.to_bits();
                            }
                            at(exec.isa, Terms { a: &patterns[..deep], digits: &digits[..deep], bits, y: sums });
                        } else {
                            for (&a, d) in a.iter().zip(&digits) {
                                for j in 0..WIDE {
                                    sums[j] += a * f32::from_bits((d.magnitude[j] as f32).to_bits() | d.sign[j]);
                                }
                            }
                        }
                    }
                }
                for (sums, acc) in sums.iter().zip(&mut acc) {
                    for j in 0..WIDE {
                        acc[j] = sums[j].mul_add(e.scales[j], acc[j]);
                    }
                }
            }
            store(&acc, bias, n0 + start, width, columns, start, y);
        }
        Ok(())
    })
}
