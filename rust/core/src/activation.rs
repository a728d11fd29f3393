//! Activations as the integer kernels want them: int8 codes in blocks of 64 along K, with their scales and sums.
//!
//! One formula everywhere: `s = absmax/127` (one IEEE division), `q = clip(rint(x/s), -127, 127)`, ties to even; where s is
//! 0 so is q. A row with NaN or Inf is flagged, and its output row becomes NaN.
use crate::buf::Taken;
use crate::error::{Error, Result};
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
        let batch = (65_536 / (kp + 1)).clamp(1, 64);
        let threads = if rows * kp < 1 << 16 { 1 } else { threads };
        pool::try_run(threads, rows.div_ceil(batch), None, |t| {
            let mut s = RowScratch {
                floats: Taken::new(g.k.next_multiple_of(16))?,
                flat: Taken::new(g.k.next_multiple_of(16))?,
                placed: Taken::new(kp + 16)?,
                sums: Taken::new(n + 16)?,
                scales: Taken::new(act_group.map_or(1, |a| g.k.div_ceil(a)))?,
            };
            s.placed[..kp].fill(0);
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
    placed: Taken<i8>,
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
    // In a plain layout codes need no placing; the tail of `placed` past K stays 0.
    let plain = g.is_plain();
    let flat: &mut [i8] = if plain { &mut buf.placed } else { &mut buf.flat };
    // SAFETY: row m of the outputs belongs to the caller; buffers reach the next multiple of 16.
    unsafe {
        let s = if x.scalar == Scalar::I8 {
            copy_codes(x, m, flat);
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
            let finite = (kernels.quantise_groups)(src.as_ptr(), g.k, step, scales.as_mut_ptr(), flat.as_mut_ptr());
            *out.bad.get().add(m) = u8::from(!finite);
            if !finite {
                flat[..g.k].fill(0);
                scales.fill(1.0);
            }
            if act_group.is_some() {
                out.group_scales(m, segs, |j| scales.get(j).copied().unwrap_or(0.0));
            }
            scales[0]
        };
        *out.scale.get().add(m) = if act_group.is_some() { 1.0 } else { s };
        if plain {
            buf.placed[g.k..out.kp].fill(0);
        } else {
            g.runs(|k0, p0, len| buf.placed[p0..p0 + len].copy_from_slice(&buf.flat[k0..k0 + len]));
        }
        let (block, i) = (m / out.mb, m % out.mb);
        let to = out.codes.get().add(block * out.mb * out.kp + i * BLOCK);
        if out.mb == 1 {
            std::ptr::copy_nonoverlapping(buf.placed.as_ptr(), to, out.kp);
        } else {
            for (b, chunk) in buf.placed[..out.kp].chunks_exact(BLOCK).enumerate() {
                std::ptr::copy_nonoverlapping(chunk.as_ptr(), to.add(b * out.mb * BLOCK), BLOCK);
            }
        }
        let Some(factor) = factor else { return };
        let n = out.segments;
        if segs.registers() == 16 {
            let per = segs.blocks();
            for seg in 0..n {
                let count = per.min(out.kp / BLOCK - seg * per);
                buf.sums[seg] = (kernels.sum_blocks)(buf.placed.as_ptr().add(seg * per * BLOCK), count);
            }
        } else {
            buf.sums[..n].fill(0);
            for b in 0..out.kp / BLOCK {
                let first = buf.sums.as_mut_ptr().add(b * BLOCK / segs.len);
                (kernels.code_sums)(buf.placed.as_ptr().add(b * BLOCK), segs.registers(), first);
            }
        }
        for (seg, v) in buf.sums[..n].iter().enumerate() {
            *out.sums.get().add((block * n + seg) * out.mb + i) = v.wrapping_mul(factor);
        }
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
