//! Products of two quantised operands: exact integer sums of their code values, raw or with the scales of both.
use crate::activation::Act;
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::format::HALF;
use crate::gemm::{
    available, check, grown, int32_limit, int8, nothing, store_row, sum_zero_ptrs, tasks, tile_ldc, IntJob, Options,
    Region, SLAB,
};
use crate::kernel;
use crate::matrix::{MatMut, MatRef, Scalar};
use crate::pack::{Packed, PanelZeros, Shared, BLOCK, PANEL};
use crate::plan::{self, Path};
use crate::pool;
use crate::qtensor::{QView, ZerosRef};

/// Where raw integer sums go, row-major `[M][N]`.
#[derive(Debug)]
pub enum RawOut<'a> {
    /// int32; an error where the sums could overflow.
    I32(&'a mut [i32]),
    /// int64.
    I64(&'a mut [i64]),
}

/// A stretch of a row of exact sums.
#[derive(Clone, Copy)]
enum Sums<'a> {
    I32(&'a [i32]),
    I64(&'a [i64]),
}

impl Sums<'_> {
    fn len(&self) -> usize {
        match self {
            Sums::I32(s) => s.len(),
            Sums::I64(s) => s.len(),
        }
    }

    /// The sums from `at` on as floats.
    fn read(&self, at: usize, out: &mut [f32]) {
        match self {
            Sums::I32(s) => out.iter_mut().zip(&s[at..]).for_each(|(o, &d)| *o = d as f32),
            Sums::I64(s) => out.iter_mut().zip(&s[at..]).for_each(|(o, &d)| *o = d as f32),
        }
    }
}

/// The code values of a quantised matrix as one or two planes of int8: `value = planes[0]`, or `16*planes[0] + planes[1]`
/// where a byte is too narrow (8-bit bipolar codes, 8-bit codes less a zero point, and `e3m2`).
fn value_planes(a: &QView, o: &Options) -> Result<(Vec<Buf<i8>>, i64)> {
    let e = a.format.element;
    if !e.has_integers() || e.is_dense() {
        return Err(Error::Unsupported(format!("{} has no integer products", a.format)));
    }
    if matches!(a.zeros, ZerosRef::Float(_)) {
        return Err(Error::Unsupported("a left operand with float zero points has no integer values".to_owned()));
    }
    let (m, k) = (a.rows, a.cols);
    let size = m.checked_mul(k).ok_or(Error::OutOfMemory(usize::MAX))?;
    let book = a.book();
    let most = book.as_ref().filter(|b| b.is_halved()).map_or(127, |_| i32::from(HALF) * 32);
    let (lo, hi) = if e.is_linear() { e.values() } else { (-most, most) };
    let (lo, hi) = match a.zeros {
        _ if a.format.is_two_level() => (-128, 127),
        ZerosRef::Int(z) => {
            let top = i32::from(z.iter().copied().max().unwrap_or(0));
            (lo - top, hi - i32::from(z.iter().copied().min().unwrap_or(0)))
        }
        _ => (lo, hi),
    };
    let narrow = lo >= -128 && hi <= 127;
    let mut planes = vec![Buf::<i8>::zeroed(size)?];
    if !narrow {
        planes.push(Buf::zeroed(size)?);
    }
    let out: Vec<Shared<i8>> = planes.iter_mut().map(|p| Shared(p.as_mut_ptr())).collect();
    let (out, len) = (&out, a.group_len().max(1));
    let values: [i32; 256] = std::array::from_fn(|u| match &book {
        Some(b) => i32::from(b.integers()[u % b.integers().len()]),
        None => e.integer(u as u32),
    });
    pool::try_run(if size < 1 << 18 { 1 } else { o.threads }, m, o.poll, |i| {
        let mut row = Taken::<u8>::new(k)?;
        let row = &mut row[..k];
        a.unpack_row(i, 0, row);
        for (g, part) in row.chunks(len).enumerate() {
            let zero = match a.zeros {
                ZerosRef::Int(z) => i32::from(z[i * a.groups() + g]),
                _ => 0,
            };
            let inner = if a.format.is_two_level() { a.scale(i, g) as i32 } else { 1 };
            let at = i * k + g * len;
            // SAFETY: row i of each plane belongs to this task.
            let plane = |p: usize| unsafe { std::slice::from_raw_parts_mut(out[p].get().add(at), part.len()) };
            if narrow {
                let table = values.map(|v| ((v - zero) * inner) as i8);
                plane(0).iter_mut().zip(part).for_each(|(o, &u)| *o = table[usize::from(u)]);
            } else {
                for ((high, low), &u) in plane(0).iter_mut().zip(plane(1)).zip(part) {
                    let v = values[usize::from(u)] - zero;
                    (*high, *low) = (v.div_euclid(HALF.into()) as i8, v.rem_euclid(HALF.into()) as i8);
                }
            }
        }
        Ok(())
    })?;
    Ok((planes, i64::from(lo.unsigned_abs().max(hi.unsigned_abs()))))
}

fn plane_rows(p: &Buf<i8>, k: usize, m0: usize, rows: usize) -> MatRef<'_> {
    let ptr = p.as_ptr().wrapping_add(m0 * k).cast();
    // SAFETY: rows m0..m0+rows of an (M, k) matrix of bytes.
    unsafe { MatRef::from_raw(ptr, Scalar::I8, rows, k, k as isize, 1) }
}

/// Raw sums of code values of two quantised operands, `a` (M, K) and `w` (N, K), one scale per row on both sides.
///
/// # Errors
/// [`Error::Shape`], [`Error::Value`] where an operand is grouped or int32 could overflow, [`Error::Unsupported`] where
/// zero points are floats.
pub fn matmul_raw(a: &QView, w: &Packed, out: &mut RawOut, o: &Options) -> Result<()> {
    let (m, n, k) = (a.rows, w.n, w.geometry.k);
    if a.cols != k {
        return Err(Error::Shape(format!("inner dimensions differ: ({m}, {}) against ({n}, {k})", a.cols)));
    }
    if a.groups() > 1 || w.geometry.groups > 1 {
        return Err(Error::Value(format!(
            "raw sums need one scale per row on both sides, not {} and {}",
            a.format, w.format
        )));
    }
    for f in [a.format, w.format] {
        if f.is_two_level() {
            return Err(Error::Value(format!("raw sums need one scale per row, but {f} has two levels")));
        }
        if !f.element.is_linear() || f.element.is_dense() {
            return Err(Error::Value(format!(
                "raw sums need codes that are integers of a byte, which those of {f} are not"
            )));
        }
    }
    if matches!(w.zeros, PanelZeros::Float(_)) {
        return Err(Error::Unsupported("raw sums need integer zero points".to_owned()));
    }
    let size = match out {
        RawOut::I32(s) => s.len(),
        RawOut::I64(s) => s.len(),
    };
    if m.checked_mul(n) != Some(size) {
        return Err(Error::Shape(format!("output of {size} elements, expected ({m}, {n})")));
    }
    available(o.isa)?;
    if size == 0 {
        return Ok(());
    }
    if k == 0 {
        // No panel holds anything to point at.
        match out {
            RawOut::I32(s) => s.fill(0),
            RawOut::I64(s) => s.fill(0),
        }
        return Ok(());
    }
    let to = match out {
        RawOut::I32(s) => (Shared(s.as_mut_ptr()), Shared(std::ptr::null_mut::<i64>())),
        RawOut::I64(s) => (Shared(std::ptr::null_mut::<i32>()), Shared(s.as_mut_ptr())),
    };
    let emit = |row: usize, n0: usize, sums: Sums| {
        let at = row * n + n0;
        // SAFETY: tasks own disjoint parts of row `row` of the output.
        unsafe {
            match (sums, to.1.get().is_null()) {
                (Sums::I32(s), true) => std::ptr::copy_nonoverlapping(s.as_ptr(), to.0.get().add(at), s.len()),
                (Sums::I64(s), false) => std::ptr::copy_nonoverlapping(s.as_ptr(), to.1.get().add(at), s.len()),
                (Sums::I64(s), true) => s.iter().enumerate().for_each(|(j, &v)| *to.0.get().add(at + j) = v as i32),
                (Sums::I32(s), false) => {
                    s.iter().enumerate().for_each(|(j, &v)| *to.1.get().add(at + j) = i64::from(v));
                }
            }
        }
    };
    #[cfg(target_arch = "x86_64")]
    if bits::serve(a, w, o) {
        return bits::products(a, w, o, |at, sums, ldc, _| {
            for (r, row) in sums.chunks_exact_mut(ldc).enumerate() {
                let row = &mut row[..(at.np * PANEL).min(n - at.p0 * PANEL)];
                for v in row.iter_mut() {
                    *v = 2 * *v - k as i32;
                }
                emit(at.m0 + r, at.p0 * PANEL, Sums::I32(row));
            }
            Ok(())
        });
    }
    let (planes, a_top) = value_planes(a, o)?;
    let w_top = i64::from(w.mul) * i64::from(w.byte_top) + i64::from(w.sub).max(i64::from(w.zero_max));
    if matches!(out, RawOut::I32(_)) && i128::from(a_top) * i128::from(w_top) * k as i128 > i128::from(i32::MAX) {
        let (lo, hi) = w.format.element.values();
        let exact = i64::from(lo.abs().max(hi.abs()) + i32::from(w.zero_max));
        if i128::from(a_top) * i128::from(exact) * k as i128 > i128::from(i32::MAX) {
            return Err(Error::Value(format!(
                "int32 sums of {} by {} may overflow at K = {k}; ask for int64",
                a.format, w.format
            )));
        }
    }
    raw_products(&planes, m, w, o, emit)
}

/// Exact sums `sum_k a*w` of the planes of `a` against an ungrouped `w`, given to `emit(row, first column, sums)`.
fn raw_products(
    planes: &[Buf<i8>],
    m: usize,
    w: &Packed,
    o: &Options,
    emit: impl Fn(usize, usize, Sums) + Sync,
) -> Result<()> {
    let t = kernel::table(o.isa);
    let segs = w.segments(None)?;
    let (k, kp) = (w.geometry.k, w.geometry.kp);
    // The zero's share, 128 times the sum of its row, must fit as well.
    let w_top = w.mul as usize * w.byte_top as usize + (w.sub as usize).max(usize::from(w.zero_max));
    let narrow = planes.len() == 1 && kp <= int32_limit(w) && i32::try_from(kp * 128 * w_top).is_ok();
    for m0 in (0..m).step_by(SLAB) {
        let rows = SLAB.min(m - m0);
        let b = plan::int8(rows, w, &segs, false, o.isa, o.threads);
        let mb = if b.path == Path::Tiles { 16 } else { b.mr };
        let acts = planes
            .iter()
            .map(|p| {
                let x = plane_rows(p, k, m0, rows);
                Act::quantise(&x, &w.geometry, &segs, None, mb, 1, None, true, t, b.threads)
            })
            .collect::<Result<Vec<_>>>()?;
        let emit = &emit;
        let segs = &*segs;
        tasks(&b, rows, w, o, |p0, np, r0, count, s| {
            let ldc = tile_ldc(&b, np);
            let padded = count.next_multiple_of(mb).next_multiple_of(if mb == 16 { 32 } else { 1 });
            let len = padded * ldc;
            let cols = (np * PANEL).min(w.n - p0 * PANEL);
            let (zi, _) = sum_zero_ptrs(w, p0);
            // SAFETY: zeros reach the end of the last panel.
            let zero = |j: usize| if zi.is_null() { w.sub } else { i32::from(unsafe { *zi.add(j) }) };
            if narrow {
                let sums = &mut grown(&mut s.sums, len)?[..len];
                let at = Region { p0, np, m0: r0, rows: count, b0: 0, blocks: kp / BLOCK };
                IntJob { w, t, b, act: &acts[0], segs }.raw_codes(at, sums, ldc, &mut s.bytes)?;
                for r in 0..count {
                    let row = &mut sums[r * ldc..][..cols];
                    let sum = acts[0].sum(r0 + r);
                    if zi.is_null() {
                        for v in row.iter_mut() {
                            *v = *v * w.mul - w.sub * sum;
                        }
                    } else {
                        row.iter_mut().enumerate().for_each(|(j, v)| *v = *v * w.mul - zero(j) * sum);
                    }
                    emit(m0 + r0 + r, p0 * PANEL, Sums::I32(row));
                }
                return Ok(());
            }
            grown(&mut s.wide, len)?[..len].fill(0);
            for (i, act) in acts.iter().enumerate() {
                let job = IntJob { w, t, b, act, segs };
                let weight = if i + 1 < acts.len() { i64::from(HALF) } else { 1 };
                let step = (int32_limit(w) / BLOCK).max(1);
                for b0 in (0..kp / BLOCK).step_by(step) {
                    let sums = &mut grown(&mut s.sums, len)?[..len];
                    let at = Region { p0, np, m0: r0, rows: count, b0, blocks: step.min(kp / BLOCK - b0) };
                    job.raw_codes(at, sums, ldc, &mut s.bytes)?;
                    let wide = grown(&mut s.wide, len)?;
                    wide.iter_mut().zip(&*sums).for_each(|(a, &v)| *a += weight * i64::from(v));
                }
            }
            let wide = grown(&mut s.wide, len)?;
            for r in 0..count {
                let sum: i64 = acts.iter().enumerate().fold(0, |t, (i, a)| {
                    t + if i + 1 < acts.len() { i64::from(HALF) } else { 1 } * i64::from(a.sum(r0 + r))
                });
                let row = &mut wide[r * ldc..][..cols];
                row.iter_mut().enumerate().for_each(|(j, v)| *v = *v * i64::from(w.mul) - i64::from(zero(j)) * sum);
                emit(m0 + r0 + r, p0 * PANEL, Sums::I64(row));
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// `y = a @ w.T` of two quantised operands, as integers: exact sums per group, then scales as
/// [`matmul`](crate::gemm::matmul) applies them with `a`'s scales in the place of the activation's.
///
/// # Errors
/// [`Error::Unsupported`] where the group lengths do not nest, or an operand's values are not integers.
pub fn matmul_q(a: &QView, w: &Packed, y: &mut MatMut, o: &Options) -> Result<()> {
    check(a.rows, a.cols, w, y, o)?;
    let (m, k) = (a.rows, a.cols);
    if m == 0 || w.n == 0 {
        return Ok(());
    }
    if k == 0 {
        return nothing(y, o);
    }
    if let Some(q) = &w.portable {
        return crate::fixed::matmul(a, &q.view(), y, o);
    }
    if !w.format.element.has_integers() {
        return Err(Error::Unsupported(format!("{} has no integer products", w.format)));
    }
    let (groups, step) = (if a.format.is_two_level() { 1 } else { a.groups() }, a.step());
    let scale = |n: usize, g: usize| if a.format.is_two_level() { a.outer_scale(n) } else { a.scale(n, g) };
    let mut scales = Taken::<f32>::new(m * groups)?;
    scales[..m * groups].iter_mut().enumerate().for_each(|(i, s)| *s = scale(i / groups, i % groups) * step);
    let scales = &scales[..m * groups];
    let plain = w.inner.is_none() && !matches!(w.zeros, PanelZeros::Float(_));
    let ungrouped = groups <= 1 && w.geometry.groups <= 1 && plain;
    #[cfg(target_arch = "x86_64")]
    if ungrouped && bits::serve(a, w, o) {
        use crate::gemm::{finish_sums, padded_bias, row_scales};
        use crate::kernel::generic::Finish;
        let (t, y) = (kernel::table(o.isa), &*y);
        return bits::products(a, w, o, |at, sums, ldc, s| {
            let (cols, n0) = (at.np * PANEL, at.p0 * PANEL);
            let bias = padded_bias(&mut s.bias, o.bias, at.p0, at.np, w.n)?;
            let w_scales = row_scales(&mut s.weights, w.sum_scales(), at.p0, at.np)?;
            let floats = grown(&mut s.floats, cols)?;
            for (r, row) in sums.chunks_exact(ldc).enumerate() {
                let e = Finish {
                    cols,
                    act_scale: scales[at.m0 + r] * w.step,
                    sum: k as i32,
                    dbl: -1,
                    bias,
                    scales: w_scales,
                    zeros: std::ptr::null(),
                    fzeros: std::ptr::null(),
                };
                finish_sums(t, y, at.m0 + r, n0, row, floats, &e, false);
            }
            Ok(())
        });
    }
    let count = if ungrouped { w.n } else { 0 };
    let mut w_scales = Taken::<f32>::new(count)?;
    w.scales.read(0, &mut w_scales[..count]);
    let (w_scales, out) = (&w_scales[..count], &*y);
    let emit = |row: usize, n0: usize, sums: Sums| {
        let factor = scales[row] * w.step;
        let mut floats = [0.0f32; 256];
        for at in (0..sums.len()).step_by(floats.len()) {
            let floats = &mut floats[..(sums.len() - at).min(256)];
            sums.read(at, floats);
            for (f, s) in floats.iter_mut().zip(&w_scales[n0 + at..]) {
                // The sum is an integer: its product neither loses digits below the normal range nor keeps the sign of 0.
                *f = (*f * s + 0.0) * factor;
            }
            if let Some(bias) = o.bias {
                floats.iter_mut().zip(&bias[n0 + at..]).for_each(|(f, b)| *f += b);
            }
            store_row(out, row, n0 + at, floats, false);
        }
    };
    let (planes, _) = value_planes(a, o)?;
    if planes.len() > 1 {
        if !ungrouped {
            return Err(Error::Unsupported(format!("{} has no integer product with {}", a.format, w.format)));
        }
        return raw_products(&planes, m, w, o, emit);
    }
    let group = (groups > 1).then(|| a.group_len());
    for m0 in (0..m).step_by(SLAB) {
        let rows = SLAB.min(m - m0);
        let x = plane_rows(&planes[0], k, m0, rows);
        // SAFETY: a slab of rows of y, one after the other.
        let mut ys = unsafe {
            let p = y.ptr.wrapping_offset(m0 as isize * y.row_stride);
            MatMut::from_raw(p, y.scalar, rows, y.cols, y.row_stride, y.col_stride)
        };
        int8(&x, w, &mut ys, o, group, Some(&scales[m0 * groups..]))?;
    }
    Ok(())
}

/// One bit on both sides, each worth +-1: of K products those of differing bits are -1, so a sum is `K - 2*differing`, and
/// differing bits are counted 512 at a time (XNOR-Net, arXiv 1603.05279, section 3.2).
#[cfg(target_arch = "x86_64")]
mod bits {
    use super::*;
    use crate::format::ValueMap;
    use crate::gemm::Scratch;
    use crate::isa::Isa;
    use crate::kernel::x86::popcount::{self, Equal};
    use crate::plan::Blocking;

    fn is_sign(map: ValueMap, bits: usize) -> bool {
        bits == 1 && matches!(map, ValueMap::Affine { mul: 2, sub: 1 })
    }

    /// Whether this module serves the product.
    pub(super) fn serve(a: &QView, w: &Packed, o: &Options) -> bool {
        let (e, f) = (a.format.element, w.format.element);
        is_sign(e.map, e.bits.into()) && is_sign(f.map, w.bits) && o.isa >= Isa::Avx512Vnni && popcount::is_available()
    }

    /// 64 bits of a row in the order of a panel's lanes: bit `8j + t` of word `i` is value `8t + 4i + j` of the block. As a
    /// matrix of 8 x 8 bits, the transpose.
    fn lanes(x: u64) -> [u32; 2] {
        let swap = |x: u64, by: u32, mask: u64| {
            let t = (x ^ (x >> by)) & mask;
            x ^ t ^ (t << by)
        };
        let x = swap(x, 7, 0x00AA_00AA_00AA_00AA);
        let x = swap(x, 14, 0x0000_CCCC_0000_CCCC);
        let x = swap(x, 28, 0x0000_0000_F0F0_F0F0);
        [x as u32, (x >> 32) as u32]
    }

    /// How many values of each two rows are equal, task by task: given to `finish(region, counts [rows][ldc], ldc, scratch)`.
    /// With `e` of them equal the product is `2e - K`.
    pub(super) fn products(
        a: &QView,
        w: &Packed,
        o: &Options,
        finish: impl Fn(Region, &mut [i32], usize, &mut Scratch) -> Result<()> + Sync,
    ) -> Result<()> {
        let (m, k, blocks) = (a.rows, a.cols, w.geometry.blocks());
        let row_bytes = k.div_ceil(8);
        let mut x = Taken::<i32>::new(m * blocks * 2)?;
        for (row, to) in a.codes.chunks_exact(row_bytes).zip(x.chunks_exact_mut(blocks * 2)) {
            for (bytes, to) in row.chunks(8).zip(to.chunks_exact_mut(2)) {
                let mut word = [0u8; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                to.copy_from_slice(&lanes(u64::from_le_bytes(word)).map(|v| v as i32));
            }
        }
        // What lies beyond K in the last block counts for nothing, whatever the padding is.
        let rest = k - (blocks - 1) * BLOCK;
        let mask = lanes(u64::MAX >> (BLOCK - rest));
        let x = &x;
        let mr = popcount::MR;
        let base = Blocking {
            path: Path::Fused,
            mr,
            np: popcount::NP,
            task_panels: 16,
            task_rows: m.min(512),
            window: 0,
            threads: 1,
            tasks: 1,
        };
        let b = base.cut(m, w.panels(), w.n, k, o.threads, popcount::NP);
        tasks(&b, m, w, o, |p0, np, m0, rows, s| {
            let ldc = np * PANEL;
            let mut own = s.sums.take();
            let sums = &mut grown(&mut own, rows * ldc)?[..rows * ldc];
            let mut p = 0;
            while p < np {
                let wide = np - p >= popcount::NP;
                let mut r = 0;
                while r < rows {
                    let many = rows - r >= mr;
                    let args = Equal {
                        codes: w.codes.as_ptr().wrapping_add((p0 + p) * w.panel_bytes()),
                        panel_stride: w.panel_bytes(),
                        blocks,
                        mask,
                        x: x.as_ptr().cast::<u32>().wrapping_add((m0 + r) * blocks * 2),
                        x_stride: blocks * 2,
                        c: sums.as_mut_ptr().wrapping_add(r * ldc + p * PANEL),
                        ldc,
                    };
                    // SAFETY: whole panels, existing rows, and the CPU counts bits (`serve`).
                    unsafe { popcount::equal(wide, many)(&args) };
                    r += if many { mr } else { 1 };
                }
                p += if wide { popcount::NP } else { 1 };
            }
            let done = finish(Region { p0, np, m0, rows, b0: 0, blocks }, sums, ldc, s);
            s.sums = own;
            done
        })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn lanes_follow_the_panel() {
            for k in 0..64 {
                let (t, i, j) = (k / 8, k % 8 / 4, k % 4);
                let mut want = [0u32; 2];
                want[i] = 1 << (8 * j + t);
                assert_eq!(lanes(1 << k), want, "value {k}");
            }
        }
    }
}
