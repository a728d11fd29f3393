//! The slow judge: the numeric contract written out one operation at a time. Kernels are compared with it bit for bit.
//!
//! Products are `y[m][n] = sum_k x[m][k] * w[n][k]`, row-major, with `w` in the portable layout.
use crate::format::Zero;
use crate::trellis::states;
use crate::{MatRef, QView, ValueMap};

/// Integer products of `a` (`m` by `k`) and `b` (`n` by `k`).
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn matmul_int_ref(a: &[i64], b: &[i64], m: usize, n: usize, k: usize) -> Vec<i64> {
    let mut y = Vec::with_capacity(m * n);
    for i in 0..m {
        for j in 0..n {
            y.push((0..k).map(|t| a[i * k + t] * b[j * k + t]).sum());
        }
    }
    y
}

/// The integers of integer products: value minus integer zero point, or the integers of a table. A float zero point is
/// not subtracted.
pub fn integers(w: &QView) -> Vec<i64> {
    let (g, book) = (w.group_len(), w.book());
    let integer = |u: u16| match &book {
        Some(b) => i64::from(b.integers()[usize::from(u)]),
        None => i64::from(w.format.element.integer(u)),
    };
    let mut out = Vec::with_capacity(w.rows * w.cols);
    if let ValueMap::Trellis(code) = w.format.element.map {
        for n in 0..w.rows {
            for k0 in (0..w.cols).step_by(g) {
                let mut codes = vec![0; g.min(w.cols - k0)];
                w.unpack_row(n, k0, &mut codes);
                states(u32::from(w.format.element.bits), &codes, |_, s| out.push(code.number(s) as i64));
            }
        }
        return out;
    }
    for n in 0..w.rows {
        for k in 0..w.cols {
            let value = integer(w.code(n, k));
            let value = match w.zero(n, k / g) {
                Zero::Int(z) => value - i64::from(z),
                Zero::None | Zero::Float(_) => value,
            };
            out.push(if w.format.is_two_level() { value * w.scale(n, k / g) as i64 } else { value });
        }
    }
    out
}

/// Raw sums of two tensors with one scale per row: products of their integers.
///
/// # Panics
/// If the columns differ.
pub fn matmul_sums_ref(a: &QView, b: &QView) -> Vec<i64> {
    assert_eq!(a.cols, b.cols);
    matmul_int_ref(&integers(a), &integers(b), a.rows, b.rows, a.cols)
}

fn read(x: &MatRef, m: usize) -> Vec<f32> {
    let mut row = vec![0.0; x.cols];
    x.read_row(m, 0, &mut row);
    row
}

fn decode(w: &QView, n: usize) -> Vec<f32> {
    let mut row = vec![0.0; w.cols];
    w.dequantize_row(n, 0, &mut row);
    row
}

fn each_pair<T>(x: &MatRef, w: &QView, mut f: impl FnMut(&[f32], &[f32], usize) -> T) -> Vec<T> {
    assert_eq!(x.cols, w.cols);
    let rows: Vec<Vec<f32>> = (0..w.rows).map(|n| decode(w, n)).collect();
    let mut y = Vec::with_capacity(x.rows * w.rows);
    for m in 0..x.rows {
        let a = read(x, m);
        for (n, b) in rows.iter().enumerate() {
            y.push(f(&a, b, n));
        }
    }
    y
}

/// Products with the decoded weights in f64.
///
/// # Panics
/// If the columns differ.
pub fn matmul_f64_ref(x: &MatRef, w: &QView) -> Vec<f64> {
    each_pair(x, w, |a, b, _| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum())
}

/// The contract of `compute="f32"`: one accumulator per output from +0, FMA, k ascending, bias last.
///
/// # Panics
/// If the columns differ, or the bias is shorter than the rows of `w`.
pub fn matmul_f32_ref(x: &MatRef, w: &QView, bias: Option<&[f32]>) -> Vec<f32> {
    each_pair(x, w, |a, b, n| {
        let y = a.iter().zip(b).fold(0.0f32, |acc, (a, b)| a.mul_add(*b, acc));
        bias.map_or(y, |bias| y + bias[n])
    })
}

/// Activations as int8 codes with their scales.
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Length of the groups that share a scale; `None` is one scale per row.
    pub group: Option<usize>,
    /// `[rows][cols]`.
    pub codes: Vec<i8>,
    /// `[rows][groups]`; one per row even if the row is empty when there are no groups.
    pub scales: Vec<f32>,
    /// Rows with a value that is not finite; their results are NaN.
    pub poisoned: Vec<bool>,
}

impl Activations {
    /// Quantises each row or group: `s = absmax/127`, `q = clip(rint(x/s), -127, 127)`, 0 where `s` is 0.
    ///
    /// # Panics
    /// If a group has length 0.
    pub fn quantize(x: &MatRef, group: Option<usize>) -> Self {
        let mut a =
            Self { rows: x.rows, cols: x.cols, group, codes: Vec::new(), scales: Vec::new(), poisoned: Vec::new() };
        for m in 0..x.rows {
            let row = read(x, m);
            a.poisoned.push(row.iter().any(|v| !v.is_finite()));
            if group.is_none() && row.is_empty() {
                a.scales.push(0.0);
            }
            for part in row.chunks(group.unwrap_or(row.len()).max(1)) {
                let absmax = part.iter().fold(0.0f32, |s, v| s.max(v.abs()));
                let s = absmax / 127.0;
                a.scales.push(s);
                a.codes.extend(part.iter().map(|v| {
                    let q = (v / s).round_ties_even().clamp(-127.0, 127.0);
                    if s == 0.0 || !q.is_finite() {
                        0
                    } else {
                        q as i8
                    }
                }));
            }
        }
        a
    }

    /// Codes of the caller with scale 1.
    pub fn from_codes(codes: &[i8], rows: usize, cols: usize) -> Self {
        Self { rows, cols, group: None, codes: codes.to_vec(), scales: vec![1.0; rows], poisoned: vec![false; rows] }
    }

    fn groups(&self) -> usize {
        self.group.map_or(1, |g| self.cols.div_ceil(g))
    }
}

/// The contract of the integer computes.
///
/// K is cut into the longest runs that have one weight scale and one activation scale; the inner scales of two-level
/// weights are factors of their integers, their weight scale is that of the row. For the runs in ascending k,
/// with `D` the integer sum of activation codes times `value - z` (times `value` for a float zero point `z`), `A` the
/// sum of the activation codes, and `s` the weight scale, times the activation scale and rounded once if the
/// activations are grouped:
///
/// ```text
/// acc = fma(f32(D), s, acc)
/// acc = fma(f32(A), -fl(s*z), acc)     float zero point only
/// ```
///
/// from +0. Then `acc * fl(s_a * u)`, with `s_a` the activation scale of the row, 1 where activations are grouped, and `u`
/// what the integer 1 of a table is worth, times the scale of the tensor, 1 where there are none. The bias is added last. A poisoned row is NaN.
///
/// # Panics
/// If the columns differ, or the bias is shorter than the rows of `w`.
pub fn matmul_int8_ref(a: &Activations, w: &QView, bias: Option<&[f32]>) -> Vec<f32> {
    assert_eq!(a.cols, w.cols);
    let weights = integers(w);
    let mut y = Vec::with_capacity(a.rows * w.rows);
    for m in 0..a.rows {
        for n in 0..w.rows {
            if a.poisoned[m] {
                y.push(f32::NAN);
                continue;
            }
            let mut acc = row_by_row(a, w, &weights, m, n);
            let scale = if a.group.is_none() { a.scales[m] } else { 1.0 };
            acc *= scale * w.step();
            y.push(bias.map_or(acc, |b| acc + b[n]));
        }
    }
    y
}

fn row_by_row(a: &Activations, w: &QView, weights: &[i64], m: usize, n: usize) -> f32 {
    let two_level = w.format.is_two_level();
    let (cols, w_len) = (w.cols, if two_level { w.cols } else { w.group_len() });
    let a_len = a.group.unwrap_or(cols.max(1));
    let (mut acc, mut k) = (0.0f32, 0);
    while k < cols {
        let end = cols.min((k / w_len + 1) * w_len).min((k / a_len + 1) * a_len);
        let codes = &a.codes[m * cols + k..m * cols + end];
        let d: i64 = codes.iter().zip(&weights[n * cols + k..]).map(|(&q, &v)| i64::from(q) * v).sum();
        let mut s = if two_level { w.outer_scale(n) } else { w.scale(n, k / w_len) };
        if a.group.is_some() {
            s *= a.scales[m * a.groups() + k / a_len];
        }
        acc = (d as f32).mul_add(s, acc);
        if let Zero::Float(z) = w.zero(n, k / w_len) {
            let sum: i64 = codes.iter().map(|&q| i64::from(q)).sum();
            acc = (sum as f32).mul_add(-(s * z), acc);
        }
        k = end;
    }
    acc
}

/// Whether two results are equal bit for bit, NaN equal to NaN; the error shows the first mismatch.
///
/// # Errors
/// The position and both values.
pub fn same_bits(got: &[f32], want: &[f32], cols: usize) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} values instead of {}", got.len(), want.len()));
    }
    let differ = |(g, w): (&f32, &f32)| g.to_bits() != w.to_bits() && !(g.is_nan() && w.is_nan());
    let count = got.iter().zip(want).filter(|p| differ(*p)).count();
    match got.iter().zip(want).position(differ) {
        None => Ok(()),
        Some(i) => {
            let (m, n) = (i / cols.max(1), i % cols.max(1));
            let (g, w) = (got[i], want[i]);
            Err(format!(
                "{count} of {} differ, first at ({m}, {n}): {g:e} ({:#010x}) instead of {w:e} ({:#010x})",
                got.len(),
                g.to_bits(),
                w.to_bits()
            ))
        }
    }
}

/// The published bound of `compute="f32"` for a product with the decoded weights: `(K 2^-24 + 2^-23) sum |x||w|`.
///
/// # Panics
/// If the columns differ.
pub fn f32_bound(x: &MatRef, w: &QView) -> Vec<f64> {
    let factor = w.cols as f64 * 2f64.powi(-24) + 2f64.powi(-23);
    each_pair(x, w, |a, b, _| factor * a.iter().zip(b).map(|(a, b)| (f64::from(*a) * f64::from(*b)).abs()).sum::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Format, QTensor, Scales, Zeros};

    fn tensor(name: &str, rows: usize, cols: usize, values: &[i16], scales: Scales, zeros: Zeros) -> QTensor {
        QTensor::from_values(Format::parse(name).unwrap(), rows, cols, values, scales, zeros).unwrap()
    }

    #[test]
    fn integer_products() {
        assert_eq!(matmul_int_ref(&[1, 2, 3, 4], &[5, -6, 7, 8], 2, 2, 2), [-7, 23, -9, 53]);
        assert_eq!(matmul_int_ref(&[], &[], 2, 1, 0), [0, 0]);
    }

    #[test]
    fn raw_sums_subtract_zero_points() {
        let a = tensor("uint4", 1, 3, &[0, 5, 15], Scales::F32(vec![9.0]), Zeros::Int(vec![5]));
        let b = tensor("bipolar2", 2, 3, &[-3, -1, 1, 3, 1, -1], Scales::F32(vec![1.0, 1.0]), Zeros::None);
        assert_eq!(matmul_sums_ref(&a.view(), &b.view()), [15 + 10, -15 - 10]);
    }

    #[test]
    fn activations_follow_the_formula() {
        let x = [1.0, -127.0, 0.5, 1.5, 0.0, 0.0, 2.0, f32::NAN, 1.0, 1e-45, 0.0, 0.0];
        let a = Activations::quantize(&MatRef::from_f32(&x, 3, 4), None);
        // Ties go to even; the smallest subnormal has a scale that underflows.
        assert_eq!(a.codes[..4], [1, -127, 0, 2]);
        assert_eq!(a.scales[0], 1.0);
        assert_eq!(a.poisoned, [false, true, false]);
        let tiny = [1e-45, 0.0];
        let a = Activations::quantize(&MatRef::from_f32(&tiny, 1, 2), None);
        assert_eq!((a.codes, a.scales), (vec![0, 0], vec![0.0]));
        let a = Activations::quantize(&MatRef::from_f32(&x[..6], 1, 6), Some(4));
        assert_eq!((a.codes, a.scales), (vec![1, -127, 0, 2, 0, 0], vec![1.0, 0.0]));
    }

    #[test]
    fn groups_accumulate_in_order() {
        // Two groups whose order shows: 2^24 absorbs 1 when it comes first.
        let values = [1i16; 9];
        let w = tensor("int8_g8_sf32", 1, 9, &values, Scales::F32(vec![2f32.powi(21), 1.0]), Zeros::None);
        let a = Activations::from_codes(&[1; 9], 1, 9);
        assert_eq!(matmul_int8_ref(&a, &w.view(), None), [16777216.0]);
        assert_eq!(matmul_int8_ref(&a, &w.view(), Some(&[2.0])), [16777218.0]);
        let w = tensor("int8_g8_sf32", 1, 9, &values, Scales::F32(vec![1.0, 2f32.powi(24)]), Zeros::None);
        assert_eq!(matmul_int8_ref(&a, &w.view(), None), [16777224.0]);
    }

    #[test]
    fn float_zero_points_are_a_second_term() {
        let w = tensor("uint4_g8_sf32", 1, 10, &[3; 10], Scales::F32(vec![0.5, 2.0]), Zeros::Float(vec![2.5, 1.0]));
        let a = Activations::from_codes(&[2; 10], 1, 10);
        // 0.5*(48 - 2.5*16) + 2*(12 - 4)
        assert_eq!(matmul_int8_ref(&a, &w.view(), None), [20.0]);
        let mut grouped = a.clone();
        grouped.group = Some(4);
        grouped.scales = vec![1.0, 2.0, 4.0];
        // Runs of 4, 4, 2: 0.5*(24-20) + 1*(24-20) + 8*(12-4)
        assert_eq!(matmul_int8_ref(&grouped, &w.view(), None), [2.0 + 4.0 + 64.0]);
    }

    #[test]
    fn non_finite_rows_are_nan_and_the_others_are_not() {
        let w = tensor("int4", 2, 2, &[0, 0, 1, 1], Scales::F32(vec![1.0, 1.0]), Zeros::None);
        let x = [1.0, f32::INFINITY, 1.0, 2.0];
        let y = matmul_int8_ref(&Activations::quantize(&MatRef::from_f32(&x, 2, 2), None), &w.view(), None);
        assert!(y[0].is_nan() && y[1].is_nan() && y[2] == 0.0);
        assert!((y[3] - 3.0).abs() < 0.02);
    }

    #[test]
    fn float_path_is_within_its_bound() {
        let x: Vec<f32> = (0..300).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.37).collect();
        let m = MatRef::from_f32(&x, 3, 100);
        let f = Format::parse("int4_g32").unwrap();
        let q = crate::quantize::quantize(&m, &f, crate::quantize::Method::Rtn, 1).unwrap().tensor;
        let (y, exact) = (matmul_f32_ref(&m, &q.view(), None), matmul_f64_ref(&m, &q.view()));
        for ((y, e), b) in y.iter().zip(&exact).zip(f32_bound(&m, &q.view())) {
            assert!((f64::from(*y) - e).abs() <= b);
        }
        assert_ne!(y.iter().map(|y| f64::from(*y)).collect::<Vec<_>>(), exact);
    }

    #[test]
    fn mismatches_are_located() {
        same_bits(&[1.0, f32::NAN], &[1.0, -f32::NAN], 2).unwrap();
        assert!(same_bits(&[1.0, 0.0, 1.0], &[1.0, 0.0, 2.0], 2).unwrap_err().contains("(1, 0)"));
        assert!(same_bits(&[0.0], &[-0.0], 1).is_err());
        assert!(same_bits(&[0.0], &[], 1).is_err());
    }
}
