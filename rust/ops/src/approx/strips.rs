//! What products without a multiplier have in common: strips of output columns whose weights are decoded together, for all
//! rows of a part.
use crate::{Error, Exec, Result};
use nibblas_core::QView;

/// Output columns that one pass decodes: their masks, plane by plane, stay in the first cache.
pub(super) const WIDE: usize = 64;

/// A strip of decoded codes, `[k][column]`.
pub(super) struct Codes {
    pub u: Vec<[u16; WIDE]>,
    row: Vec<u8>,
}

impl Codes {
    pub fn new(deep: usize) -> Self {
        Self { u: vec![[0; WIDE]; deep], row: vec![0; 2 * deep] }
    }

    /// Decodes columns `n0..n0 + width` for `deep` values of k; 0 beyond the width.
    pub fn decode(&mut self, w: &QView, n0: usize, width: usize, k0: usize, deep: usize) -> &[[u16; WIDE]] {
        let size = w.format.element.code_bytes();
        let row = &mut self.row[..deep * size];
        for j in 0..width {
            w.unpack_row(n0 + j, k0, row);
            if size == 1 {
                self.u.iter_mut().zip(&*row).for_each(|(to, &u)| to[j] = u16::from(u));
            } else {
                self.u.iter_mut().zip(row.as_chunks().0).for_each(|(to, &u)| to[j] = u16::from_le_bytes(u));
            }
        }
        for to in &mut self.u[..deep] {
            to[width..].fill(0);
        }
        &self.u[..deep]
    }
}

/// Rows of the output that share the decoding of a weight.
fn rows_per_part(exec: &Exec, m: usize) -> usize {
    m.div_ceil(exec.threads.max(1)).clamp(1, 256)
}

/// Rows of the output, where the lengths fit.
pub(super) fn check(a: usize, w: &QView, bias: Option<&[f32]>, y: usize) -> Result<usize> {
    let rows = y.checked_div(w.rows).unwrap_or(0);
    if y != rows * w.rows || a != rows * w.cols && y != 0 || bias.is_some_and(|b| b.len() != w.rows) {
        return Err(Error::Shape(format!("{a} activations do not fit a weight of ({}, {})", w.rows, w.cols)));
    }
    Ok(rows)
}

/// Parts of the output for threads: rows, and for single rows columns, each with its place.
pub(super) fn parts<'a>(exec: &Exec, y: &'a mut [f32], n: usize) -> Vec<(usize, usize, &'a mut [f32])> {
    let m = y.len() / n;
    if m == 1 {
        let columns = n.div_ceil(exec.threads.max(1) * 2).next_multiple_of(WIDE);
        return y.chunks_mut(columns).enumerate().map(|(i, y)| (0, i * columns, y)).collect();
    }
    let rows = rows_per_part(exec, m);
    y.chunks_mut(rows * n).enumerate().map(|(i, y)| (i * rows, 0, y)).collect()
}

/// Writes a strip's sums, and adds the bias.
pub(super) fn store(
    acc: &[[f32; WIDE]],
    bias: Option<&[f32]>,
    n0: usize,
    width: usize,
    columns: usize,
    start: usize,
    y: &mut [f32],
) {
    for (acc, y) in acc.iter().zip(y.chunks_exact_mut(columns)) {
        for (j, (y, &v)) in y[start..start + width].iter_mut().zip(acc).enumerate() {
            *y = bias.map_or(v, |b| v + b[n0 + j]);
        }
    }
}
