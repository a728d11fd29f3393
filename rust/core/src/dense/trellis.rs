//! Trellis codes in the order of `crate::kernel::trellis`, and their integer product.
use crate::activation::Act;
use crate::buf::{Buf, Taken};
use crate::error::{Error, Result};
use crate::gemm::{finish_row, grown, padded_bias, tasks, Options};
use crate::kernel::trellis::{dwords, hash, Pairs, Trellis};
#[cfg(target_arch = "x86_64")]
use crate::kernel::x86::tiles;
use crate::kernel::{self, Kernels};
use crate::matrix::{MatMut, MatRef};
use crate::pack::{panel_scales, Geometry, Packed, PanelScales, Shared, BLOCK, PANEL};
use crate::plan;
use crate::pool;
use crate::qtensor::QView;
use crate::trellis::{join, states, Code, TILE, WINDOW};

/// Chunks of bits, as the kernels want them.
#[derive(Debug)]
pub struct TrellisPanels {
    /// The layout of the activations.
    pub geometry: Geometry,
    /// Bits that a state has more than the one before.
    bits: usize,
    /// The hash, as kernels name it.
    pub(crate) hash: u8,
    /// `[panel][group][stride][16]`.
    chunks: Buf<u32>,
    /// Chunks of a group and row, the one in front included.
    stride: usize,
    /// Scales `[panel][group][16]`.
    scales: PanelScales,
}

impl TrellisPanels {
    /// The panels of a matrix.
    pub(super) fn new(q: &QView, code: Code, threads: usize) -> Result<Self> {
        let (each, weight) = (code.weights(), u32::from(q.format.element.bits));
        let bits = weight as usize * each;
        let geometry = Geometry::new(q.cols, q.format.group.map(|g| g as usize));
        let window = WINDOW as usize;
        let (groups, group) = (geometry.groups, geometry.group);
        let stride = 1 + (group.div_ceil(2 * each) * bits).div_ceil(window);
        let panels = q.rows.div_ceil(PANEL);
        let size = (panels * groups * stride).checked_mul(PANEL).ok_or(Error::OutOfMemory(usize::MAX))?;
        let mut chunks = Buf::<u32>::zeroed(size)?;
        let out = Shared(chunks.as_mut_ptr());
        pool::try_run(threads, panels, None, |p| {
            let (mut codes, mut joined) = ([0u8; TILE], [0u8; TILE / 2]);
            let mut row = vec![0u32; stride];
            for n in p * PANEL..q.rows.min((p + 1) * PANEL) {
                for g in 0..groups {
                    let codes = &mut codes[..group.min(q.cols - g * group)];
                    q.unpack_row(n, g * group, codes);
                    let codes = if each == 2 {
                        let joined = &mut joined[..codes.len().div_ceil(2)];
                        join(weight, codes, joined);
                        &*joined
                    } else {
                        &*codes
                    };
                    let half = codes.len().div_ceil(2);
                    row.fill(0);
                    states(bits as u32, codes, |t, state| {
                        // What comes before the first half ends the circle.
                        if t + 1 == codes.len() {
                            row[0] |= u32::from(state);
                        }
                        if t + 1 == half {
                            row[0] |= u32::from(state) << window;
                        }
                        // The state after a chunk's last code has all of the chunk in front of bits that come later.
                        let (t, shift) = if t < half { (t, 0) } else { (t - half, window) };
                        let (first, end) = (t * bits / window, (t * bits + bits - 1) / window);
                        let over = (end + 1) * window - (t + 1) * bits;
                        let code = u32::from(state) & ((1 << bits) - 1);
                        row[1 + end] |= (code << over & 0xffff) << shift;
                        if first < end {
                            row[1 + first] |= (code << over >> window) << shift;
                        }
                    });
                    let at = (p * groups + g) * stride * PANEL + n % PANEL;
                    for (i, chunk) in row.iter().enumerate() {
                        // SAFETY: the chunks of panel p belong to this task.
                        unsafe { *out.get().add(at + i * PANEL) = *chunk };
                    }
                }
            }
            Ok(())
        })?;
        let scales = panel_scales(q, groups)?;
        Ok(Self { geometry, bits, hash: hash(code), chunks, stride, scales })
    }

    /// The groups from `first` on of a panel, `count` of them.
    fn groups(&self, panel: usize, first: usize, count: usize) -> Trellis {
        let g = &self.geometry;
        let at = panel * g.groups + first;
        let last = if first + count == g.groups { g.k - (g.groups - 1) * g.group } else { g.group };
        Trellis {
            chunks: self.chunks.as_ptr().wrapping_add(at * self.stride * PANEL),
            stride: self.stride,
            bits: self.bits,
            groups: count,
            len: g.group,
            last,
            scales: self.scales.ptr().offset(at * PANEL),
        }
    }

    /// Values of one group of a panel from `k` on, `[k][16]`.
    pub(super) fn decode(&self, t: &Kernels, panel: usize, k: usize, out: &mut [f32]) {
        let (g, into) = (k / self.geometry.group, k % self.geometry.group);
        let a = self.groups(panel, g, 1);
        let f = (t.trellis_expand)(self.bits, self.hash);
        if a.last * PANEL == out.len() {
            // SAFETY: a group of an existing panel, and room for its values.
            unsafe { f(&a, out.as_mut_ptr()) };
            return;
        }
        // Groups are decoded whole.
        let mut whole = [0.0; TILE * PANEL];
        // SAFETY: as above; no group is longer.
        unsafe { f(&a, whole.as_mut_ptr()) };
        out.copy_from_slice(&whole[into * PANEL..][..out.len()]);
    }

    /// The same of a whole group as bf16 tiles, where it is long enough; answers whether it is done.
    ///
    /// # Safety
    /// `out` has the room of `n` values, and the CPU has tiles.
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn tiles(&self, panel: usize, k: usize, n: usize, out: *mut u8) -> bool {
        let (g, into) = (k / self.geometry.group, k % self.geometry.group);
        let a = self.groups(panel, g, 1);
        let done = into == 0 && a.last == n && n.is_multiple_of(4);
        if done {
            // SAFETY: a group of an existing panel, and the caller's room.
            unsafe { tiles::trellis_values::<true>(self.bits, self.hash)(&a, out.cast()) };
        }
        done
    }

    pub(super) fn nbytes(&self) -> usize {
        4 * self.chunks.len() + self.scales.nbytes()
    }

    /// The codes of activations as kernels meet them, `[block of rows][group][place in a half][dwords][rows]`.
    fn pairs(&self, act: &Act, mr: usize) -> Result<Taken<i32>> {
        let g = &self.geometry;
        let (half, each) = (g.group.div_ceil(2), dwords(self.hash));
        let blocks = act.rows.div_ceil(mr);
        let mut out = Taken::<i32>::new(blocks * g.groups * half * each * mr)?;
        let mut at = 0;
        for i in 0..blocks {
            let rows = act.rows(i, 0);
            for group in 0..g.groups {
                let len = g.group.min(g.k - group * g.group);
                let h = len.div_ceil(2);
                for j in 0..h {
                    for m in 0..mr {
                        let code = |t: usize| {
                            let place = group * g.padded + t;
                            let at = place / BLOCK * rows.block_stride + m * BLOCK + place % BLOCK;
                            // SAFETY: a place of the layout that the activations have.
                            u32::from(unsafe { *rows.codes.add(at) } as u8)
                        };
                        let (a, b) = (code(j), if h + j < len { code(h + j) } else { 0 });
                        let to = at + j * each * mr + m;
                        if each == 1 {
                            out[to] = ((a * 0x0101) | ((b * 0x0101) << 16)) as i32;
                        } else {
                            out[to] = (a * 0x0101_0101) as i32;
                            out[to + mr] = (b * 0x0101_0101) as i32;
                        }
                    }
                }
                at += half * each * mr;
            }
        }
        Ok(out)
    }

    /// The integer product: numbers are sums of four bytes less 510, which the sums of the activations take away.
    pub(crate) fn int8(
        &self,
        x: &MatRef,
        w: &Packed,
        y: &mut MatMut,
        o: &Options,
        given: Option<&[f32]>,
    ) -> Result<()> {
        let t = kernel::table(o.isa);
        let segs = w.segments(None)?;
        let b = plan::int8(x.rows, w, &segs, false, o.isa, o.threads);
        let (f, mr) = (t.trellis)(self.bits, self.hash, x.rows);
        let act = Act::quantise(x, &self.geometry, &segs, None, mr, 510, given, true, t, b.threads)?;
        let pairs = self.pairs(&act, mr)?;
        let (pairs, g) = (&pairs, &self.geometry);
        let stride = g.groups * g.group.div_ceil(2) * dwords(self.hash) * mr;
        let y = &*y;
        tasks(&b, x.rows, w, o, |p0, np, m0, rows, s| {
            let ldc = np * PANEL;
            let bias = padded_bias(&mut s.bias, o.bias, p0, np, w.n)?;
            let c = grown(&mut s.floats, rows.next_multiple_of(mr) * ldc)?;
            c[..rows.next_multiple_of(mr) * ldc].fill(0.0);
            for p in 0..np {
                let a = self.groups(p0 + p, 0, g.groups);
                for m in (0..rows).step_by(mr) {
                    let i = (m0 + m) / mr;
                    let act = act.rows(i, 0);
                    let x = Pairs { codes: pairs[i * stride..].as_ptr(), sums: act.sums, rows: act.rows };
                    let c = c.as_mut_ptr().wrapping_add(m * ldc + p * PANEL);
                    // SAFETY: whole groups of an existing panel, activations of blocks of `mr` rows, padded sums.
                    unsafe { f(&a, &x, c, ldc) };
                }
            }
            for m in 0..rows {
                let row = &mut c[m * ldc..][..ldc];
                finish_row(t, y, m0 + m, p0 * PANEL, row, act.scale[m0 + m], bias, act.bad[m0 + m] != 0);
            }
            Ok(())
        })
    }
}
