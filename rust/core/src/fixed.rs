//! Products of 16-bit integers with one scale for each matrix: dynamic fixed point.
//!
//! Two products of 16-bit integers fill an int32, so sums are spilled. With `t` the largest magnitudes of the operands, a chain
//! of `floor((2^31 - 1) / (t_a * t_b))` products is safe whatever they are. 16 lanes take pairs of neighbouring `k` in turn;
//! each adds as many pairs as are safe in int32, then adds that, rounded to float32, to its float32 sum. In the end lanes `j`
//! and `j + 8` are added, then `j` and `j + 4`, `j + 2`, `j + 1`, and the scales multiply the sum once.
//!
//! ```text
//! k        0 1 | 2 3 | ... | 30 31 | 32 33 | ...
//! lane      0     1            15      0
//! ```
use crate::error::{Error, Result};
use crate::format::lanes::{per_level, tree, LANES};
use crate::format::Level;
use crate::gemm::{store_row, Options};
use crate::matrix::MatMut;
use crate::pool;
use crate::qtensor::{zeros_vec, QView};

/// Values of K that the lanes take at a time.
const STEP: usize = 2 * LANES;

/// Products of magnitudes up to `a` and `b` whose sum an int32 holds.
pub fn safe_chain(a: u32, b: u32) -> usize {
    (i32::MAX as u64 / (u64::from(a.max(1)) * u64::from(b.max(1)))) as usize
}

/// Whether a matrix has integers and one scale for each row.
fn fits(q: &QView) -> bool {
    q.format.element.is_linear() && q.format.element.shared && q.groups() <= 1
}

/// Integers of a matrix, rows padded with zeros to a multiple of [`STEP`], and their largest magnitude.
fn integers(q: &QView, padded: usize) -> Result<(Vec<i16>, u32)> {
    let mut all = zeros_vec::<i16>(q.rows.checked_mul(padded).ok_or(Error::OutOfMemory(usize::MAX))?)?;
    let mut flat = zeros_vec::<i16>(q.rows * q.cols)?;
    q.codes_into(&mut flat, 1)?;
    let mut top = 0;
    for (to, from) in all.chunks_exact_mut(padded.max(1)).zip(flat.chunks_exact(q.cols.max(1))) {
        to[..q.cols].copy_from_slice(from);
        top = from.iter().fold(top, |t, v| t.max(u32::from(v.unsigned_abs())));
    }
    Ok((all, top))
}

/// Sum of products of two rows, spilled every `steps` steps.
#[inline(always)]
fn dot_body(a: &[i16], b: &[i16], steps: usize) -> f32 {
    let mut acc = [0.0f32; LANES];
    for (a, b) in a.chunks(steps * STEP).zip(b.chunks(steps * STEP)) {
        let mut sum = [0i32; LANES];
        for (a, b) in a.chunks_exact(STEP).zip(b.chunks_exact(STEP)) {
            for j in 0..LANES {
                let even = i32::from(a[2 * j]) * i32::from(b[2 * j]);
                sum[j] += even + i32::from(a[2 * j + 1]) * i32::from(b[2 * j + 1]);
            }
        }
        for j in 0..LANES {
            acc[j] += sum[j] as f32;
        }
    }
    tree(acc)
}
per_level! {
    /// See [`dot_body`].
    dot = dot_body(a: &[i16], b: &[i16], steps: usize) -> f32
}

/// The same where two products may be too much for an int32: the lowest code is there on both sides.
fn dot_wide(a: &[i16], b: &[i16]) -> f32 {
    let mut acc = [0.0f32; LANES];
    for (a, b) in a.chunks_exact(STEP).zip(b.chunks_exact(STEP)) {
        for j in 0..LANES {
            let product = |i: usize| i64::from(a[i]) * i64::from(b[i]);
            acc[j] += (product(2 * j) + product(2 * j + 1)) as f32;
        }
    }
    tree(acc)
}

/// `y[M][N] = A B^T`.
///
/// # Errors
/// [`Error::Unsupported`] where an operand is not such a matrix, [`Error::Shape`], [`Error::OutOfMemory`],
/// [`Error::Interrupted`].
pub fn matmul(a: &QView, b: &QView, y: &MatMut, o: &Options) -> Result<()> {
    if !fits(a) || !fits(b) {
        return Err(Error::Unsupported(format!("{} and {} have no products of 16-bit integers", a.format, b.format)));
    }
    if a.cols != b.cols || (y.rows, y.cols) != (a.rows, b.rows) {
        return Err(Error::Shape(format!("({}, {}) against ({}, {})", a.rows, a.cols, b.rows, b.cols)));
    }
    let padded = a.cols.next_multiple_of(STEP);
    let ((x, top_a), (w, top_b)) = (integers(a, padded)?, integers(b, padded)?);
    let steps = safe_chain(top_a, top_b) / 2;
    let scale = if a.cols > 0 && a.rows > 0 && b.rows > 0 { a.full_scale(0, 0) * b.full_scale(0, 0) } else { 0.0 };
    let level = Level::detect();
    // Blocks of rows of both, so that they stay in cache.
    let (by_m, by_n) = (a.rows.div_ceil(8), b.rows.div_ceil(64));
    pool::try_run(o.threads, by_m * by_n, o.poll, |task| {
        let (m0, n0) = (task / by_n * 8, task % by_n * 64);
        for m in m0..a.rows.min(m0 + 8) {
            let mut row = [0.0f32; 64];
            let row = &mut row[..b.rows.min(n0 + 64) - n0];
            for (n, out) in row.iter_mut().enumerate() {
                let (x, w) = (&x[m * padded..][..padded], &w[(n0 + n) * padded..][..padded]);
                let sum = if steps > 0 { dot(level, x, w, steps) } else { dot_wide(x, w) };
                *out = sum * scale + o.bias.map_or(0.0, |b| b[n0 + n]);
            }
            store_row(y, m, n0, row, false);
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_those_of_the_table() {
        for (bits, chain) in [(16, 2), (15, 8), (14, 32), (13, 128), (12, 512), (10, 8224), (8, 133_144)] {
            let top = (1u32 << (bits - 1)) - 1;
            assert_eq!(safe_chain(top, top), chain, "{bits} bits");
        }
        assert_eq!(safe_chain(32768, 32768), 1);
        assert_eq!(safe_chain(0, 5), i32::MAX as usize / 5);
    }

    #[test]
    fn the_largest_products_do_not_overflow() {
        for (v, w) in [(32767i16, 32767i16), (32767, -32767), (-32767, -32767)] {
            let (a, b) = ([v; 4 * STEP], [w; 4 * STEP]);
            let exact = 4.0 * STEP as f64 * f64::from(v) * f64::from(w);
            for level in Level::available() {
                let got = f64::from(dot(level, &a, &b, 1));
                assert!((got - exact).abs() <= 1e-6 * exact.abs());
            }
        }
        let a = [i16::MIN; STEP];
        assert_eq!(dot_wide(&a, &a), 32.0 * 2f32.powi(30));
    }
}
