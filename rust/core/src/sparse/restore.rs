//! The portable arrays back from the panels, bit for bit: which entries are kept, and what they are.
use super::mask::gather;
use super::Mask;
use crate::bits;
use crate::buf::Taken;
use crate::error::{Error, Result};
use crate::format::ScaleType;
use crate::isa;
use crate::kernel;
use crate::kernel::generic::IN_ORDER;
use crate::pack::{Packed, Shared, BLOCK, PANEL};
use crate::pool;
use crate::qtensor::zeros_vec;

/// Which places of a panel's rows are kept, 64 to a word, `[row][kp/64]`; places past K may be anything.
fn panel_words(w: &Packed, panel: usize, words: &mut [u64]) {
    words.fill(0);
    match (&w.sparse, &w.floats) {
        (Some(p), _) => p.words(panel, words),
        (None, Some(f)) if !f.keeps_all() => f.words(panel, words),
        _ => words.fill(u64::MAX),
    }
}

/// The mask of a sparse weight; `None` where nothing is dropped.
///
/// # Errors
/// [`Error::OutOfMemory`].
fn mask(w: &Packed) -> Result<Option<Mask>> {
    let Some(structure) = w.format.structure else { return Ok(None) };
    let (g, rows) = (&w.geometry, w.n);
    let (unit_rows, per_row) = structure.mask_shape(rows, g.k);
    let (r, c) = structure.unit(rows, g.k);
    let mut bytes = zeros_vec::<u8>(unit_rows.checked_mul(per_row).ok_or(Error::OutOfMemory(usize::MAX))?)?;
    let mut words = zeros_vec::<u64>(PANEL * g.blocks())?;
    let mut read = usize::MAX;
    for (i, out) in bytes.chunks_exact_mut(per_row.max(1)).enumerate() {
        let n = i * r;
        if n / PANEL != read {
            read = n / PANEL;
            panel_words(w, read, &mut words);
        }
        let row = &words[n % PANEL * g.blocks()..][..g.blocks()];
        // A unit is kept or dropped whole: its first entry tells.
        g.runs(|k0, p0, len| {
            for k in (k0.next_multiple_of(c)..k0 + len).step_by(c) {
                let (place, j) = (p0 + k - k0, k / c);
                out[j / 8] |= ((row[place / 64] >> (place % 64) & 1) as u8) << (j % 8);
            }
        });
    }
    Mask::new(structure, rows, g.k, w.format.element.bits.into(), &bytes).map(Some)
}

impl Packed {
    /// Restores the mask that [`crate::pack::pack`] was given.
    ///
    /// # Errors
    /// [`Error::Shape`] for a buffer of another length or a format that keeps all entries, [`Error::OutOfMemory`].
    pub fn restore_mask(&self, out: &mut [u8]) -> Result<()> {
        let mask = mask(self)?.ok_or_else(|| Error::Shape(format!("{} has no mask", self.format)))?;
        if mask.bytes().len() != out.len() {
            return Err(Error::Shape(format!("a buffer for {} bytes of a mask of {}", out.len(), mask.bytes().len())));
        }
        out.copy_from_slice(mask.bytes());
        Ok(())
    }

    /// Restores the kept codes, or the numbers of a weight that is not quantised.
    pub(crate) fn restore_kept(&self, out: &mut [u8], threads: usize) -> Result<()> {
        let mask = mask(self)?;
        let (g, size) = (&self.geometry, self.floats.as_ref().map_or(1, |f| f.kind().size()));
        let want = mask.as_ref().map_or(self.n * g.k * size, Mask::code_bytes);
        if out.len() != want {
            return Err(Error::Shape(format!("a buffer for {} bytes of codes, expected {want}", out.len())));
        }
        let out = Shared(out.as_mut_ptr());
        pool::try_run(threads, self.panels(), None, |p| {
            let mut places = Taken::<u8>::new(PANEL * g.kp * size)?;
            let mut row = zeros_vec::<u8>(g.k * size)?;
            let mut some = zeros_vec::<u8>(g.k * size)?;
            let mut words = zeros_vec::<u64>(g.k.div_ceil(64))?;
            self.decode_places(p, &mut places)?;
            for i in 0..PANEL.min(self.n - p * PANEL) {
                let (n, from) = (p * PANEL + i, &places[i * g.kp * size..][..g.kp * size]);
                g.runs(|k0, p0, len| row[k0 * size..][..len * size].copy_from_slice(&from[p0 * size..][..len * size]));
                let span = match &mask {
                    Some(mask) => mask.span(n),
                    None => n * g.k * size..(n + 1) * g.k * size,
                };
                // SAFETY: the bytes of row n belong to this task, and lie in the buffer.
                let to = unsafe { std::slice::from_raw_parts_mut(out.get().add(span.start), span.len()) };
                let Some(mask) = &mask else {
                    to.copy_from_slice(&row);
                    continue;
                };
                mask.row_words(n, &mut words);
                let count = match size {
                    4 => gather(&words, row.as_chunks::<4>().0, to.as_chunks_mut::<4>().0),
                    2 => gather(&words, row.as_chunks::<2>().0, to.as_chunks_mut::<2>().0),
                    _ => gather(&words, &row, &mut some),
                };
                if size == 1 {
                    bits::pack(self.format.element.bits, &some[..count], to);
                }
            }
            Ok(())
        })
    }

    /// The entries of a panel's rows in padded places, `[row][kp]`: a byte for each code, or the bytes of a number.
    fn decode_places(&self, panel: usize, out: &mut [u8]) -> Result<()> {
        let (kp, blocks) = (self.geometry.kp, self.geometry.blocks());
        if let Some(floats) = &self.floats {
            let mut wide = Taken::<f32>::new(kp * PANEL)?;
            let wide = &mut wide[..kp * PANEL];
            floats.window(panel, wide);
            for (k, numbers) in wide.chunks_exact(PANEL).enumerate() {
                for (i, &v) in numbers.iter().enumerate() {
                    // Each number came from its type, so none is rounded.
                    match floats.kind() {
                        ScaleType::F16 => {
                            out[2 * (i * kp + k)..][..2].copy_from_slice(&half::f16::from_f32(v).to_le_bytes());
                        }
                        ScaleType::BF16 => out[2 * (i * kp + k)..][..2].copy_from_slice(&v.to_le_bytes()[2..]),
                        _ => out[4 * (i * kp + k)..][..4].copy_from_slice(&v.to_le_bytes()),
                    }
                }
            }
            return Ok(());
        }
        let mut bytes = Taken::<u8>::new(kp * PANEL)?;
        // SAFETY: 1024 bytes for each block of an existing panel; the level is available.
        unsafe { self.unpack(kernel::table(isa::active()), panel, 0, blocks, 0, 0, IN_ORDER, bytes.as_mut_ptr()) };
        for (b, block) in bytes[..kp * PANEL].chunks_exact(BLOCK * PANEL).enumerate() {
            for (r, register) in block.chunks_exact(4 * PANEL).enumerate() {
                for (i, four) in register.as_chunks::<4>().0.iter().enumerate() {
                    out[i * kp + b * BLOCK + 4 * r..][..4].copy_from_slice(four);
                }
            }
        }
        Ok(())
    }
}
