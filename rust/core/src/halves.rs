//! Integer products by tiles of weights whose integers take two bytes.
use crate::buf::Buf;
use crate::error::Result;
use crate::gemm::{ahead, grown, IntJob, Region};
use crate::kernel::x86::{amx, halves};
use crate::pack::{BLOCK, PANEL};

/// Blocks of K that are unpacked at a time: 64 KiB of the second-level cache, so that sums are fetched and stored seldom.
const WINDOW: usize = 32;

impl IntJob<'_> {
    /// Adds the products of a region to float sums, or to `RAW` int32 sums of all of K; `c` has whole tiles.
    pub(crate) fn halved_tiles<const RAW: bool>(
        &self,
        at: Region,
        c: *mut f32,
        ldc: usize,
        bytes: &mut Option<Buf<u8>>,
    ) -> Result<()> {
        let Region { p0, np, m0, rows, b0, blocks } = at;
        let per = if RAW { 1 } else { self.segs.blocks().max(1) };
        let window = ((WINDOW / per).max(1) * per).min(blocks.max(1));
        let buf = grown(bytes, window * self.w.unpacked_block())?.as_mut_ptr();
        // SAFETY: the plan chose tiles, so permission was granted; the buffer holds a window, `c` whole tiles.
        unsafe {
            let _tiles = amx::Tiles::new(if RAW { BLOCK } else { self.segs.len.min(BLOCK) });
            for k in (0..blocks).step_by(window) {
                let n = window.min(blocks - k);
                for p in 0..np {
                    // What finishes raw sums takes the zero away.
                    self.unpack(p0 + p, b0 + k, n, !RAW, ahead(self.w, p, np, 1, window), buf);
                    let at = c.add(p * PANEL);
                    let a = self.tile_args([p0 + p; 2], [buf.cast_const(); 2], b0 + k, n, m0, rows, at, ldc);
                    halves::kernel(!a.act.scales.is_null(), RAW)(&a);
                }
            }
        }
        Ok(())
    }
}
