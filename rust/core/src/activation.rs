//! Activations as the integer kernels want them: int8 codes in blocks of 64 along K, with their scales and sums.
//!
//! One formula everywhere: `s = absmax/127` (one IEEE division), `q = clip(rint(x/s), -127, 127)`, ties to even; where s is
//! 0 so is q. A row with NaN or Inf is flagged, and its output row becomes NaN.
use crate::buf::Taken;
use crate::error::{Error, Result};
use crate::isa;
use crate::kernel::generic::Quantise;
use crate::kernel::{ActRows, Kernels};
use crate::matrix::{MatRef, Scalar};
use crate::pack::{Geometry, Shared, BLOCK};
use crate::pool;

/// The stretches of K whose integer sums are exact and get one float multiplication each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    /// Places of a segment: 8, 16, 32 or a multiple of 64.
    pub len: usize,
    /// Number of segments.
    pub count: usize,
    /// Weight group of each segment.
    pub group: Vec<u32>,
    /// Activation group of each segment (empty where rows have one scale).
    pub act: Vec<u32>,
}

impl Segments {
    /// Segments of a weight layout under activation groups of `act` (`None`: one scale per row).
    ///
    /// # Errors
    /// [`Error::Unsupported`] when neither group length divides the other.
    pub fn new(g: &Geometry, act: Option<usize>) -> Result<Self> {
        let whole = g.groups <= 1;
        let len = match act {
            Some(a) if (whole || g.group.is_multiple_of(a)) && (matches!(a, 8 | 16 | 32) || a % BLOCK == 0) => {
                a.min(g.padded)
            }
            Some(a) if whole || a % g.group != 0 => {
                return Err(Error::Unsupported(format!(
                    "activation groups of {a} need a weight whose group length divides {a} or is divided by it, not {}",
                    g.group
                )));
            }
            _ => g.padded,
        };
        let count = g.kp.div_ceil(len.max(1));
        let mut group = Vec::with_capacity(count);
        let mut acts = Vec::new();
        for i in 0..count {
            let place = i * len;
            let w = (place / g.padded).min(g.groups.max(1) - 1);
            group.push(w as u32);
            if let Some(a) = act {
                let natural = w * g.group + (place - w * g.padded).min(g.group - 1);
                acts.push((natural / a) as u32);
            }
        }
        Ok(Self { len, count, group, act: acts })
    }

    /// Registers (of four places) in a segment, 16 standing for whole blocks.
    pub fn registers(&self) -> usize {
        (self.len / 4).min(16)
    }

    /// Blocks of a segment, where it is whole blocks.
    pub fn blocks(&self) -> usize {
        self.len / BLOCK
    }
}

/// Quantised activations of one call.
#[derive(Debug)]
pub struct Act {
    /// Rows.
    pub rows: usize,
    /// Rows of a row block: rows m..m+mb of a block are 64 bytes apart.
    pub mb: usize,
    kp: usize,
    segments: usize,
    codes: Taken<i8>,
    sums: Taken<i32>,
    group_scales: Option<Taken<f32>>,
    /// Scale of each row (1 where scales are per group).
    pub(crate) scale: Taken<f32>,
    /// 1 for rows with NaN or Inf.
    pub(crate) bad: Taken<u8>,
}

impl Act {
    /// Quantises `x` into row blocks of `mb`. Sums are multiplied by `factor`, and
    /// left out where no kernel wants them. An int8 `x` is taken as codes, with the
    /// scales `given` (`[rows][groups]`), or 1.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn quantise(
        x: &MatRef,
        g: &Geometry,
        segs: &Segments,
        act_group: Option<usize>,
        mb: usize,
        factor: i32,
        given: Option<&[f32]>,
        want_sums: bool,
        kernels: &Kernels,
        threads: usize,
    ) -> Result<Self> {
        let rows = x.rows;
        let padded = rows.next_multiple_of(mb);
        let (kp, n) = (g.kp, segs.count);
        let mut act = Self {
            rows,
            mb,
            kp,
            segments: n,
            codes: Taken::new(padded * kp)?,
            sums: Taken::new(padded * n)?,
            group_scales: None,
            scale: Taken::new(padded)?,
            bad: Taken::new(padded)?,
        };
        act.bad.fill(0);
        if act_group.is_some() {
            // Segments of padding alone keep the scale 0.
            act.group_scales.insert(Taken::new(padded * n)?).fill(0.0);
        }
        let out = Parts {
            mb,
            kp,
            segments: n,
            codes: Shared(act.codes.as_mut_ptr()),
            sums: Shared(act.sums.as_mut_ptr()),
            groups: Shared(act.group_scales.as_mut().map_or(std::ptr::null_mut(), |s| s.as_mut_ptr())),
            scale: Shared(act.scale.as_mut_ptr()),
            bad: Shared(act.bad.as_mut_ptr()),
        };
        // Rows that only fill a block up must be codes of 0.
        for m in rows..padded {
            for b in 0..kp / BLOCK {
                let at = (m / mb) * mb * kp + (b * mb + m % mb) * BLOCK;
                act.codes[at..at + BLOCK].fill(0);
            }
        }
        // A few tasks for each thread, of 8 to 256 KiB of codes.
        let threads = if rows * kp < 1 << 15 { 1 } else { threads };
        let batch = rows.div_ceil(4 * threads).max(8192_usize.div_ceil(kp + 1)).min((1 << 18) / (kp + 1)).max(1);
        pool::try_run(threads, rows.div_ceil(batch), None, |t| {
            let mut s = RowScratch {
                floats: Taken::new(g.k.next_multiple_of(16))?,
                flat: Taken::new(g.k.next_multiple_of(BLOCK))?,
                sums: Taken::new(n + 16)?,
                scales: Taken::new(act_group.map_or(1, |a| g.k.div_ceil(a)))?,
            };
            for m in t * batch..rows.min((t + 1) * batch) {
                // SAFETY: row m belongs to this task alone; the kernels' features were checked by the table look-up.
                unsafe {
                    quantise_one(x, m, g, segs, act_group, given, want_sums.then_some(factor), kernels, &out, &mut s);
                };
            }
            Ok(())
        })?;
        Ok(act)
    }

    /// Row block `i` from block `b` of K and segment `seg` on, as a kernel sees it.
    pub fn rows(&self, i: usize, b: usize) -> ActRows {
        ActRows {
            codes: self.codes.as_ptr().wrapping_add(i * self.mb * self.kp + b * self.mb * BLOCK),
            block_stride: self.mb * BLOCK,
            sums: self.sums.as_ptr().wrapping_add(i * self.mb * self.segments),
            scales: self
                .group_scales
                .as_ref()
                .map_or(std::ptr::null(), |s| s.as_ptr().wrapping_add(i * self.mb * self.segments)),
            rows: self.mb,
        }
    }

    /// Bytes from the codes of 16 rows to those of the next 16, where rows come by 16.
    pub(crate) fn tile_stride(&self) -> usize {
        16 * self.kp
    }

    /// Sums, or scales of groups, from 16 rows to the next 16, where rows come by 16.
    pub(crate) fn tile_segments(&self) -> usize {
        16 * self.segments
    }

    /// Sum of row `m` in a layout of one segment; 0 where there is nothing to sum.
    pub fn sum(&self, m: usize) -> i32 {
        let at = (m / self.mb) * self.mb * self.segments + m % self.mb;
        self.sums.get(at).copied().unwrap_or(0)
    }
}

struct RowScratch {
    floats: Taken<f32>,
    flat: Taken<i8>,
    sums: Taken<i32>,
    /// Of the row's groups.
    scales: Taken<f32>,
}

struct Parts {
    mb: usize,
    kp: usize,
    segments: usize,
    codes: Shared<i8>,
    sums: Shared<i32>,
    groups: Shared<f32>,
    scale: Shared<f32>,
    bad: Shared<u8>,
}

impl Parts {
    /// Stores the scales of the activation groups of row `m` for the segments that they cover.
    unsafe fn group_scales(&self, m: usize, segs: &Segments, scales: impl Fn(usize) -> f32) {
        let at = (m / self.mb) * self.segments * self.mb + m % self.mb;
        for (seg, &j) in segs.act.iter().enumerate() {
            // SAFETY: the row's own entry.
            unsafe { *self.groups.get().add(at + seg * self.mb) = scales(j as usize) };
        }
    }
}

/// The codes of a row, where kernels read them: every 64 of them `stride` bytes after those before.
#[derive(Clone, Copy)]
struct RowCodes {
    first: *mut i8,
    stride: usize,
}

impl RowCodes {
    /// Writes codes from place `p` on.
    unsafe fn put(self, mut p: usize, mut codes: &[i8]) {
        while !codes.is_empty() {
            let n = codes.len().min(BLOCK - p % BLOCK);
            // SAFETY: the caller's row has the places.
            unsafe {
                let to = self.first.add(p / BLOCK * self.stride + p % BLOCK);
                // A length that is known needs no call.
                if n == BLOCK {
                    std::ptr::copy_nonoverlapping(codes.as_ptr(), to, BLOCK);
                } else {
                    std::ptr::copy_nonoverlapping(codes.as_ptr(), to, n);
                }
            }
            (p, codes) = (p + n, &codes[n..]);
        }
    }

    /// Zeros from place `p` up to `end`.
    unsafe fn clear(self, mut p: usize, end: usize) {
        while p < end {
            let n = (end - p).min(BLOCK - p % BLOCK);
            // SAFETY: the caller's row has the places.
            unsafe { self.first.add(p / BLOCK * self.stride + p % BLOCK).write_bytes(0, n) };
            p += n;
        }
    }
}

/// Quantises row `m` and puts its codes, sums and scales where the kernels read them.
unsafe fn quantise_one(
    x: &MatRef,
    m: usize,
    g: &Geometry,
    segs: &Segments,
    act_group: Option<usize>,
    given: Option<&[f32]>,
    factor: Option<i32>,
    kernels: &Kernels,
    out: &Parts,
    buf: &mut RowScratch,
) {
    // SAFETY: row m of the outputs belongs to the caller; buffers reach the next multiple of 64.
    unsafe {
        let (block, i) = (m / out.mb, m % out.mb);
        let stride = out.mb * BLOCK;
        let to = RowCodes { first: out.codes.get().add(block * out.mb * out.kp + i * BLOCK), stride };
        // In a plain layout codes go where they belong at once.
        let plain = g.is_plain();
        let mut summed = false;
        let s = if x.scalar == Scalar::I8 {
            if plain && x.col_stride == 1 {
                to.put(0, std::slice::from_raw_parts(x.row_ptr(m).cast(), g.k));
            } else {
                copy_codes(x, m, &mut buf.flat);
                place(g, &buf.flat, to);
            }
            if let Some(a) = act_group {
                let count = g.k.div_ceil(a);
                out.group_scales(m, segs, |j| match given {
                    _ if j >= count => 0.0,
                    Some(s) => s[m * count + j],
                    None => 1.0,
                });
            }
            given.filter(|_| act_group.is_none()).map_or(1.0, |s| s[m])
        } else {
            let src = row(x, m, &mut buf.floats);
            let step = act_group.unwrap_or(g.k).max(1);
            let count = g.k.div_ceil(step);
            let scales = &mut buf.scales[..count];
            let (codes, stride) = if plain { (to.first, to.stride) } else { (buf.flat.as_mut_ptr(), BLOCK) };
            let in_place = std::ptr::eq(src.as_ptr().cast(), x.row_ptr(m));
            let fetch = in_place && m + 1 < x.rows && !isa::streams_by_itself();
            let ahead = if fetch { x.row_stride as usize } else { 0 };
            // The codes of the next of `mb` rows lie beside these, and were last read long ago.
            let next = if fetch && plain && i + 1 < out.mb { BLOCK } else { 0 };
            // Sums of whole blocks are made on the way, where the codes stay as they are.
            summed = plain && factor.is_some() && segs.registers() == 16;
            if summed {
                buf.sums[..out.segments].fill(0);
            }
            let finite = (kernels.quantise_groups)(&Quantise {
                x: src.as_ptr(),
                k: g.k,
                group: step,
                ahead,
                next,
                scales: scales.as_mut_ptr(),
                codes,
                stride,
                sums: if summed { buf.sums.as_mut_ptr() } else { std::ptr::null_mut() },
                blocks: segs.blocks(),
            });
            *out.bad.get().add(m) = u8::from(!finite);
            summed &= finite;
            if !finite {
                to.clear(0, out.kp);
                scales.fill(1.0);
            } else if !plain {
                place(g, &buf.flat, to);
            }
            if act_group.is_some() {
                out.group_scales(m, segs, |j| scales.get(j).copied().unwrap_or(0.0));
            }
            scales[0]
        };
        if plain {
            to.clear(g.k, out.kp);
        }
        *out.scale.get().add(m) = if act_group.is_some() { 1.0 } else { s };
        let Some(factor) = factor else { return };
        let n = out.segments;
        // Side by side they are read faster than a block of 16 rows apart.
        let in_place = x.scalar == Scalar::I8 && plain && x.col_stride == 1 && g.k == out.kp;
        let (first, step) = if in_place { (x.row_ptr(m).cast::<i8>(), BLOCK) } else { (to.first.cast_const(), stride) };
        let codes = |b: usize| first.wrapping_add(b * step);
        if !summed && segs.registers() == 16 {
            let per = segs.blocks();
            for seg in 0..n {
                let count = per.min(out.kp / BLOCK - seg * per);
                buf.sums[seg] = (kernels.sum_blocks)(codes(seg * per), step, count);
            }
        } else if !summed {
            buf.sums[..n].fill(0);
            for b in 0..out.kp / BLOCK {
                let first = buf.sums.as_mut_ptr().add(b * BLOCK / segs.len);
                (kernels.code_sums)(codes(b), segs.registers(), first);
            }
        }
        for (seg, v) in buf.sums[..n].iter().enumerate() {
            *out.sums.get().add((block * n + seg) * out.mb + i) = v.wrapping_mul(factor);
        }
    }
}

/// Puts the codes of a row into the padded places of a layout that is not plain; the others hold 0.
unsafe fn place(g: &Geometry, flat: &[i8], to: RowCodes) {
    // SAFETY: the caller's row has `kp` places.
    unsafe {
        to.clear(0, g.kp);
        g.runs(|k0, p0, len| to.put(p0, &flat[k0..k0 + len]));
    }
}

/// Row `m` as f32, read in place when it can be, and always readable up to the next multiple of 16.
fn row<'a>(x: &MatRef<'a>, m: usize, scratch: &'a mut [f32]) -> &'a [f32] {
    match x.row_f32(m) {
        Some(r) if r.len() % 16 == 0 => r,
        _ => {
            x.read_row(m, 0, &mut scratch[..x.cols]);
            scratch[x.cols..].fill(0.0);
            scratch
        }
    }
}

fn copy_codes(x: &MatRef, m: usize, out: &mut [i8]) {
    let base = x.row_ptr(m);
    if x.col_stride == 1 {
        // SAFETY: `cols` bytes of the view, contiguous.
        unsafe { std::ptr::copy_nonoverlapping(base.cast(), out.as_mut_ptr(), x.cols.min(out.len())) };
        return;
    }
    for (j, o) in out[..x.cols].iter_mut().enumerate() {
        // SAFETY: element (m, j) of the view, one byte.
        *o = unsafe { *base.wrapping_offset(j as isize * x.col_stride).cast::<i8>() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::kernel;

    /// Floats near ties and far from them, of a size that `shift` moves down to the subnormal ones, some groups all zeros.
    fn values(k: usize, group: usize, seed: u32, shift: i32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            state >> 8
        };
        let mut x = vec![0f32; k.next_multiple_of(16)];
        for (j, part) in x[..k].chunks_mut(group).enumerate() {
            if j % 5 == 4 {
                continue;
            }
            for v in part.iter_mut() {
                let t = (next() % 509) as f32 / 2.0 - 127.0;
                let t = if next() % 4 == 0 { t + (next() % 1000) as f32 * 1e-6 } else { t };
                *v = t * 2f32.powi(shift / 2) * 2f32.powi(shift - shift / 2);
            }
            part[0] = 127.0 * 2f32.powi(shift / 2) * 2f32.powi(shift - shift / 2);
        }
        x
    }

    #[test]
    fn codes_are_the_rounded_quotients_on_every_level() {
        for isa in Isa::ALL.into_iter().filter(|i| i.is_available()) {
            let t = kernel::table(isa);
            for (k, seed) in
                [(1, 1), (15, 2), (16, 3), (17, 4), (63, 5), (64, 6), (65, 7), (100, 8), (1328, 9), (4100, 10)]
            {
                for group in [16, 32, 48, 64, 128, 192, k] {
                    for (shift, stride) in [(0, 64), (-9, 192), (-126, 64), (-133, 1024), (-146, 64), (100, 128)] {
                        let x = values(k, group, seed, shift);
                        let count = k.div_ceil(group);
                        let mut scales = vec![0f32; count];
                        let mut q = vec![99i8; k.div_ceil(64) * stride];
                        let mut a = Quantise {
                            x: x.as_ptr(),
                            k,
                            group,
                            ahead: 0,
                            next: 64,
                            scales: scales.as_mut_ptr(),
                            codes: q.as_mut_ptr(),
                            stride,
                            sums: std::ptr::null_mut(),
                            blocks: 0,
                        };
                        // SAFETY: buffers reach as far as the contract says; the level is available.
                        assert!(unsafe { (t.quantise_groups)(&a) });
                        for (i, &v) in x[..k].iter().enumerate() {
                            let part = &x[i / group * group..k.min((i / group + 1) * group)];
                            let s = part.iter().fold(0f32, |t, v| t.max(v.abs())) / 127.0;
                            assert_eq!(
                                scales[i / group].to_bits(),
                                s.to_bits(),
                                "{isa} k={k} group={group} shift={shift}"
                            );
                            let want = if s == 0.0 { 0.0 } else { (v / s).round_ties_even().clamp(-127.0, 127.0) };
                            let got = q[i / 64 * stride + i % 64];
                            assert_eq!(
                                f32::from(got),
                                want,
                                "{isa} k={k} group={group} shift={shift} at {i}: {v} / {s}"
                            );
                        }
                        for blocks in [1, 2, 3, 100] {
                            let codes: Vec<i32> = (0..k).map(|i| i32::from(q[i / 64 * stride + i % 64])).collect();
                            let want: Vec<i32> = codes.chunks(64 * blocks).map(|c| c.iter().sum()).collect();
                            let mut sums = vec![77; want.len() + 1];
                            (a.sums, a.blocks) = (sums.as_mut_ptr(), blocks);
                            // SAFETY: as above; a sum for every part.
                            assert!(unsafe { (t.quantise_groups)(&a) });
                            assert_eq!(sums[..want.len()], want, "{isa} k={k} group={group} blocks={blocks}");
                            assert_eq!(sums[want.len()], 77);
                        }
                        // What lies between the blocks is not theirs.
                        let between = q.chunks(stride).flat_map(|c| &c[64..]);
                        assert!(between.into_iter().all(|&v| v == 99));
                        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                            let mut x = x.clone();
                            x[k - 1] = bad;
                            // SAFETY: as above.
                            let finite = unsafe { (t.quantise_groups)(&Quantise { x: x.as_ptr(), ..a }) };
                            assert!(!finite, "{isa} k={k} group={group}: {bad}");
                        }
                    }
                }
            }
        }
    }
}
