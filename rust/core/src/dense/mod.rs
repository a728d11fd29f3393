//! Panels of weights that the kernels of bytes do not know: codes longer than a byte, codes that are read together, and tables
//! of rows.
//! Kernels meet them as floats, a window of K at a time, in natural places along K: groups meet their scales here. Trellis
//! codes have integer products too.
mod trellis;
mod wide;

pub use trellis::TrellisPanels;
pub use wide::WidePanels;

use crate::error::Result;
use crate::format::ValueMap;
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

    /// Bytes held.
    pub(crate) fn nbytes(&self) -> usize {
        match self {
            Self::Trellis(p) => p.nbytes(),
            Self::Wide(p) => p.nbytes(),
        }
    }
}
