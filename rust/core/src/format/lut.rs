//! `lut2` to `lut8`: tables that are learned, one for each matrix; `lut2_row` to `lut4_row`: one for each row.
//!
//! Tables are a part of the matrix: `2^b` floats, by code. A quantiser finds it by weighted k-means over the weights in
//! steps of their scales: the squared error that counts is that of the weights, so a value counts as the square of its
//! scale, times the importance of its column where one is given. In one dimension that is sorting: the values are counted
//! in 65536 bins, and the mean of all values between two borders is a difference of two running sums.
//!
//! rtn: `s = absmax`, the nearest value of `w/s`, a tie the lower one. The table need not have 0: a group of zeros gets
//! the smallest positive scale.
use super::lanes::absmax_bits;
use super::{Codec, Element, Fit, Format, Level, ScaleType, ValueMap, FLOAT, INTEGER};
use crate::qtensor::zeros_vec;
use crate::{MatRef, Result};
use std::ops::Range;

#[derive(Debug)]
struct Lut;

impl Codec for Lut {
    fn fit(&self, _: &Element, _: Level, _: &[f32], absmax: f32) -> Fit {
        Fit { scale: absmax, low: 0.0 }
    }

    fn has_zero(&self) -> bool {
        false
    }

    fn shrinks(&self, e: &Element) -> &'static [f32] {
        match e.bits {
            2 => &[0.36, 0.42, 0.48, 0.54, 0.60, 0.67, 0.75, 0.83, 0.91],
            3 => &[0.58, 0.64, 0.70, 0.76, 0.82, 0.86, 0.90, 0.94, 0.97],
            4 => &[0.66, 0.71, 0.76, 0.80, 0.84, 0.88, 0.92, 0.96],
            _ => &[0.84, 0.88, 0.91, 0.94, 0.96, 0.98, 0.99],
        }
    }
}

const fn row(name: &'static str, bits: u8, computes: &'static [&'static str]) -> Element {
    let row = Element::affine(name, bits, 1, 0, 1 << bits, 0, &Lut);
    Element { map: ValueMap::Learned, computes, scales: &ScaleType::NESTED, ..row }
}

/// `lut2` to `lut8`.
pub static ROWS: [Element; 7] = [
    row("lut2", 2, INTEGER),
    row("lut3", 3, INTEGER),
    row("lut4", 4, INTEGER),
    row("lut5", 5, INTEGER),
    row("lut6", 6, INTEGER),
    row("lut7", 7, FLOAT),
    row("lut8", 8, FLOAT),
];

const fn by_row(name: &'static str, bits: u8) -> Element {
    Element { map: ValueMap::RowLearned, ..row(name, bits, FLOAT) }
}

/// `lut2_row` to `lut4_row`.
pub static BY_ROW: [Element; 3] = [by_row("lut2_row", 2), by_row("lut3_row", 3), by_row("lut4_row", 4)];

/// Bins of the values from -1 to 1.
const BINS: usize = 1 << 16;

/// Rounds of k-means at most; a round moves borders and costs as much as the table is long.
const ROUNDS: usize = 1000;

fn bin(v: f64) -> usize {
    ((v + 1.0) * (0.5 * BINS as f64)).clamp(0.0, BINS as f64 - 1.0) as usize
}

/// Learns a table for some rows of a matrix, ascending; `outer` multiplies its scales, `importance` weighs its columns.
/// Values that are not finite are left out, to be found later.
pub(crate) fn learn(
    level: Level,
    x: &MatRef,
    rows: Range<usize>,
    format: &Format,
    outer: f32,
    importance: Option<&[f32]>,
) -> Result<Vec<f32>> {
    let len = format.group_len(x.cols);
    let (mut weight, mut moment) = (zeros_vec::<f64>(BINS + 1)?, zeros_vec::<f64>(BINS + 1)?);
    let mut row = zeros_vec::<f32>(x.cols)?;
    for n in rows {
        x.read_row(n, 0, &mut row);
        for (g, part) in row.chunks(len).enumerate() {
            let bits = absmax_bits(level, part);
            let scale = format.round_scale(f32::from_bits(bits) / outer).map(|s| s * outer);
            let (Ok(scale), true) = (scale, (1..0x7f80_0000).contains(&bits)) else { continue };
            let (inv, square) = (1.0 / f64::from(scale), f64::from(scale) * f64::from(scale));
            for (k, &v) in part.iter().enumerate() {
                let v = f64::from(v) * inv;
                let w = square * importance.map_or(1.0, |i| f64::from(i[g * len + k]));
                let b = bin(v) + 1;
                weight[b] += w;
                moment[b] += w * v;
            }
        }
    }
    Ok(means(&mut weight, &mut moment, 1 << format.element.bits))
}

/// k-means of `count` values: `weight` and `moment` hold what bin `b` holds at `b + 1`, and become running sums.
fn means(weight: &mut [f64], moment: &mut [f64], count: usize) -> Vec<f32> {
    // The best density of values is the cube root of that of the weights (Panter and Dite); coarsely it is a start.
    const COARSE: usize = 256;
    let mut density: Vec<f64> = weight[1..].chunks(BINS / COARSE).map(|c| c.iter().sum::<f64>().cbrt()).collect();
    let total: f64 = density.iter().sum();
    for b in 1..COARSE {
        density[b] += density[b - 1];
    }
    let mut table: Vec<f64> = (0..count)
        .map(|i| {
            let want = total * (i as f64 + 0.5) / count as f64;
            let at = density.partition_point(|&d| d < want);
            let before = if at == 0 { 0.0 } else { density[at - 1] };
            let inside = density.get(at).map_or(0.5, |d| (want - before) / (d - before).max(f64::MIN_POSITIVE));
            (at as f64 + inside.clamp(0.0, 1.0)) / (COARSE as f64 / 2.0) - 1.0
        })
        .collect();
    if total == 0.0 {
        // Nothing to learn from.
        table = (0..count).map(|i| (2 * i + 1) as f64 / count as f64 - 1.0).collect();
    }
    for b in 1..=BINS {
        weight[b] += weight[b - 1];
        moment[b] += moment[b - 1];
    }
    for _ in 0..ROUNDS {
        let mut moved = false;
        let mut low = 0;
        let borders: Vec<usize> = table.windows(2).map(|p| bin(f64::midpoint(p[0], p[1]))).chain([BINS]).collect();
        for (v, high) in table.iter_mut().zip(borders) {
            let high = high.max(low);
            let w = weight[high] - weight[low];
            if w > 0.0 {
                let mean = (moment[high] - moment[low]) / w;
                moved |= (mean - *v).abs() > 1e-7;
                *v = mean.clamp(-1.0, 1.0);
            }
            low = high;
        }
        if !moved {
            break;
        }
    }
    table.sort_by(f64::total_cmp);
    table.into_iter().map(|v| v as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(values: &[f32], bits: u8) -> Vec<f32> {
        let format = Format::parse(&format!("lut{bits}")).unwrap();
        learn(Level::detect(), &MatRef::from_f32(values, 1, values.len()), 0..1, &format, 1.0, None).unwrap()
    }

    #[test]
    fn few_values_are_learned_exactly() {
        let x: Vec<f32> = (0..4000).map(|i| [-1.0, -0.25, 0.125, 0.75][i % 4]).collect();
        for (got, want) in learned(&x, 2).iter().zip([-1.0, -0.25, 0.125, 0.75]) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
        assert_eq!(learned(&[0.0; 9], 2), [-0.75, -0.25, 0.25, 0.75]);
        assert!(learned(&[f32::NAN, 1.0], 3).iter().all(|v| v.is_finite()));
    }

    #[test]
    fn values_are_means_of_what_is_nearest() {
        // A triangle, denser towards 1.
        let x: Vec<f32> = (1..=20_000).map(|i| 2.0 * (i as f32 / 20_000.0).sqrt() - 1.0).collect();
        for bits in 2..=6 {
            let table = learned(&x, bits);
            assert!(table.windows(2).all(|p| p[0] < p[1]));
            let mut sums = vec![(0.0f64, 0.0f64); table.len()];
            for &v in &x {
                let near = (0..table.len()).min_by(|&a, &b| (table[a] - v).abs().total_cmp(&(table[b] - v).abs()));
                let slot = &mut sums[near.unwrap()];
                *slot = (slot.0 + f64::from(v), slot.1 + 1.0);
            }
            for (v, (sum, count)) in table.iter().zip(sums) {
                // A hundredth of a cell: the search ends after some rounds.
                assert!((f64::from(*v) - sum / count).abs() < 2e-2 / f64::from(1u32 << bits), "{bits}: {v}");
            }
        }
    }
}
