//! Weights that kernels meet as floats only: formats whose codes are longer than a byte, or mean nothing one by one. Their
//! panels are decoded from the portable layout, a window of K at a time.
use crate::format::lanes::per_level;
use crate::format::Level;
use crate::pack::PANEL;
use crate::qtensor::QView;

/// Decodes `out.len() / 16` values of K from `k0` on of the 16 rows of a panel, `[k][16]`; 0 beyond the matrix. `scratch`
/// has as many floats as `out`.
pub(crate) fn window(q: &QView, panel: usize, k0: usize, scratch: &mut [f32], out: &mut [f32]) {
    let len = out.len() / PANEL;
    let level = Level::detect();
    for (i, row) in scratch.chunks_exact_mut(len).enumerate() {
        let n = panel * PANEL + i;
        let real = if n < q.rows { q.cols.saturating_sub(k0).min(len) } else { 0 };
        if real > 0 {
            q.dequantize_row_at(level, n, k0, &mut row[..real]);
        }
        row[real..].fill(0.0);
    }
    transpose(level, scratch, out);
}

/// `[16][len]` to `[len][16]`, `len` a multiple of 16.
#[inline(always)]
fn transpose_body(rows: &[f32], out: &mut [f32]) {
    let len = out.len() / PANEL;
    for (b, square) in out.chunks_exact_mut(PANEL * PANEL).enumerate() {
        // Four rounds of a perfect shuffle of 256 numbers turn rows into columns.
        let mut a = [0.0f32; PANEL * PANEL];
        for i in 0..PANEL {
            a[i * PANEL..][..PANEL].copy_from_slice(&rows[i * len + b * PANEL..][..PANEL]);
        }
        let mut c = [0.0f32; PANEL * PANEL];
        shuffle(&a, &mut c);
        shuffle(&c, &mut a);
        shuffle(&a, &mut c);
        shuffle(&c, &mut a);
        square.copy_from_slice(&a);
    }
}
per_level! {
    /// See [`transpose_body`].
    transpose = transpose_body(rows: &[f32], out: &mut [f32]) -> ()
}

/// Interleaves the two halves: number `i` of the first goes to place `2i`, of the second to `2i + 1`.
#[inline(always)]
fn shuffle(from: &[f32; 256], to: &mut [f32; 256]) {
    for i in 0..128 {
        to[2 * i] = from[i];
        to[2 * i + 1] = from[128 + i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_turns_rows_into_columns() {
        let len = 48;
        let rows: Vec<f32> = (0..PANEL * len).map(|i| i as f32).collect();
        for level in Level::available() {
            let mut out = vec![0.0; rows.len()];
            transpose(level, &rows, &mut out);
            for (i, v) in out.iter().enumerate() {
                assert_eq!(*v, rows[(i % PANEL) * len + i / PANEL]);
            }
        }
    }
}
