//! Panels of weights that the kernels of bytes do not know: codes longer than a byte, codes that are read together, and tables
//! of rows.
//! Kernels meet them as floats, a window of K at a time, in natural places along K: groups meet their scales here. Trellis
//! codes have integer products too.
mod trellis;
mod wide;

pub use trellis::TrellisPanels;
pub use wide::WidePanels;

#[cfg(target_arch = "x86_64")]
use crate::buf::Buf;
use crate::error::Result;
use crate::format::ValueMap;
#[cfg(target_arch = "x86_64")]
use crate::gemm::grown;
#[cfg(target_arch = "x86_64")]
use crate::kernel::x86::amx;
use crate::kernel::Kernels;
use crate::pack::PANEL;
use crate::qtensor::QView;

/// The panels of such a matrix.
#[derive(Debug)]
pub enum DensePanels {
    /// Trellis codes.
    Trellis(TrellisPanels),
    /// Codes of 9 to 16 bits, codes of tables of rows, and vectors.
    Wide(WidePanels),
}

impl DensePanels {
    /// The panels of a matrix.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(q: &QView, threads: usize) -> Result<Self> {
        Ok(match q.format.element.map {
            ValueMap::Trellis(code) => Self::Trellis(TrellisPanels::new(q, code, threads)?),
            _ => Self::Wide(WidePanels::new(q, threads)?),
        })
    }

    /// Decodes `out.len() / 16` values of K from `k0` on of the 16 rows of a panel, `[k][16]`; 0 beyond the matrix.
    pub(crate) fn decode(&self, t: &Kernels, panel: usize, k0: usize, out: &mut [f32]) {
        let (k, group) = match self {
            Self::Trellis(p) => (p.geometry.k, p.geometry.group),
            Self::Wide(p) => (p.k, p.group),
        };
        let end = k.min(k0 + out.len() / PANEL).max(k0);
        let (values, rest) = out.split_at_mut((end - k0) * PANEL);
        rest.fill(0.0);
        let mut at = k0;
        while at < end {
            let stop = end.min((at / group + 1) * group);
            let part = &mut values[(at - k0) * PANEL..(stop - k0) * PANEL];
            match self {
                Self::Trellis(p) => p.decode(t, panel, at, part),
                Self::Wide(p) => p.decode(t, panel, at, part),
            }
            at = stop;
        }
    }

    /// As [`Self::decode`] to bf16 tiles, `n` values of K, an even number.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    ///
    /// # Safety
    /// `out` has two bytes for each of 16 times `n` numbers, and the CPU has tiles.
    #[cfg(target_arch = "x86_64")]
    pub(crate) unsafe fn tiles(
        &self,
        t: &Kernels,
        panel: usize,
        k0: usize,
        n: usize,
        floats: &mut Option<Buf<f32>>,
        out: *mut u8,
    ) -> Result<()> {
        let (k, group) = match self {
            Self::Trellis(p) => (p.geometry.k, p.geometry.group),
            Self::Wide(p) => (p.k, p.group),
        };
        let end = k.min(k0 + n).max(k0);
        let mut at = k0;
        while at < k0 + n {
            // Two values side by side have one scale, or are rounded one by one.
            let stop = if group.is_multiple_of(2) { end.min((at / group + 1) * group) } else { at };
            let stop = if stop > at { stop } else { k0 + n };
            let to = out.wrapping_add((at - k0) * 2 * PANEL);
            let even = (stop - at).is_multiple_of(2) && stop <= end && group.is_multiple_of(2);
            // SAFETY: the caller's room, from this place on.
            let done = even
                && unsafe {
                    match self {
                        Self::Trellis(p) => p.tiles(panel, at, stop - at, to),
                        Self::Wide(p) => {
                            p.tiles(panel, at, stop - at, to);
                            true
                        }
                    }
                };
            let stop = stop.next_multiple_of(2);
            if !done {
                let floats = &mut grown(floats, (stop - at) * PANEL)?[..(stop - at) * PANEL];
                self.decode(t, panel, at, floats);
                // SAFETY: as above.
                unsafe { amx::bf16_tiles(floats, to) };
            }
            at = stop;
        }
        Ok(())
    }

    /// Bytes held.
    pub(crate) fn nbytes(&self) -> usize {
        match self {
            Self::Trellis(p) => p.nbytes(),
            Self::Wide(p) => p.nbytes(),
        }
    }
}
