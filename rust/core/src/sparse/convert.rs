//! From dense codes to kept ones and back, without loss.
use super::{mask, Mask, Structure};
use crate::bits;
use crate::qtensor::{zeros_vec, QView};
use crate::{Error, QTensor, Result};

/// Keeps the entries of a dense matrix that are not 0, in the units of a structure.
///
/// # Errors
/// [`Error::Value`] saying how many entries are in the way, where the zeros do not fit; [`Error::Format`] where the format
/// has no 0; [`Error::Unsupported`] for a matrix that is sparse already.
pub fn pack(q: &QView, structure: Structure) -> Result<QTensor> {
    let format = q.format.sparse(structure)?;
    if q.mask.is_some() {
        return Err(Error::Unsupported(format!("{} is sparse already", q.format)));
    }
    if matches!(q.zeros, crate::ZerosRef::Float(_)) {
        return Err(Error::Value(format!("{format} with float zero points has no code for 0")));
    }
    let (rows, cols, code_bits) = (q.rows, q.cols, q.format.element.bits);
    if let Some(kind) = q.format.element.plain {
        return pack_numbers(q, structure, kind.size());
    }
    let len = q.group_len();
    let row = |n: usize, codes: &mut [u8]| q.unpack_row(n, 0, codes);
    let bytes = mask::cover(structure, rows, cols, |n, words| {
        let mut codes = zeros_vec::<u8>(cols)?;
        row(n, &mut codes);
        words.fill(0);
        for (g, part) in codes.chunks(len).enumerate() {
            let zero = q.zero_code(n, g);
            for (i, &u) in part.iter().enumerate() {
                let k = g * len + i;
                words[k / 64] |= u64::from(u != zero) << (k % 64);
            }
        }
        Ok(())
    })?;
    let mask = Mask::new(structure, rows, cols, code_bits.into(), &bytes)?;
    let mut kept = zeros_vec::<u8>(mask.code_bytes())?;
    let (mut codes, mut some) = (zeros_vec::<u8>(cols)?, zeros_vec::<u8>(cols)?);
    let mut words = zeros_vec::<u64>(cols.div_ceil(64))?;
    for n in 0..rows {
        row(n, &mut codes);
        mask.row_words(n, &mut words);
        let count = mask::gather(&words, &codes, &mut some);
        bits::pack(code_bits, &some[..count], &mut kept[mask.span(n)]);
    }
    let mut out = QView { format, mask: Some(&mask), codes: &[], ..*q }.to_owned()?;
    out.codes = kept;
    Ok(out)
}

/// [`pack`] of numbers of `size` bytes.
fn pack_numbers(q: &QView, structure: Structure, size: usize) -> Result<QTensor> {
    let (rows, cols) = (q.rows, q.cols);
    let bytes = mask::cover(structure, rows, cols, |n, words| {
        words.fill(0);
        for (k, b) in q.row(n).chunks_exact(size).enumerate() {
            // Both zeros are worth 0; the sign of one that is dropped is lost, which no product shows.
            let zero = b[..size - 1].iter().all(|&b| b == 0) && b[size - 1].trailing_zeros() >= 7;
            words[k / 64] |= u64::from(!zero) << (k % 64);
        }
        Ok(())
    })?;
    let mask = Mask::new(structure, rows, cols, size * 8, &bytes)?;
    let mut kept = zeros_vec::<u8>(mask.code_bytes())?;
    let mut words = zeros_vec::<u64>(cols.div_ceil(64))?;
    for n in 0..rows {
        mask.row_words(n, &mut words);
        let (row, out) = (q.row(n), &mut kept[mask.span(n)]);
        if size == 4 {
            mask::gather(&words, row.as_chunks::<4>().0, out.as_chunks_mut::<4>().0);
        } else {
            mask::gather(&words, row.as_chunks::<2>().0, out.as_chunks_mut::<2>().0);
        }
    }
    let format = q.format.sparse(structure)?;
    let mut out = QView { format, mask: Some(&mask), codes: &[], ..*q }.to_owned()?;
    out.codes = kept;
    Ok(out)
}

/// The same matrix with all entries kept.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub fn unpack(q: &QView) -> Result<QTensor> {
    let format = q.format.dense();
    if format.element.plain.is_some() {
        let row_bytes = format.row_bytes(q.cols);
        let mut dense = zeros_vec::<u8>(q.rows.checked_mul(row_bytes).ok_or(Error::OutOfMemory(usize::MAX))?)?;
        for (n, out) in dense.chunks_exact_mut(row_bytes.max(1)).enumerate() {
            q.number_row(n, out);
        }
        let mut out = QView { format, mask: None, codes: &[], ..*q }.to_owned()?;
        out.codes = dense;
        return Ok(out);
    }
    let (row_bytes, code_bits) = (format.row_bytes(q.cols), format.element.bits);
    let mut dense = zeros_vec::<u8>(q.rows.checked_mul(row_bytes).ok_or(Error::OutOfMemory(usize::MAX))?)?;
    let mut codes = zeros_vec::<u8>(q.cols)?;
    for (n, out) in dense.chunks_exact_mut(row_bytes.max(1)).enumerate() {
        q.unpack_row(n, 0, &mut codes);
        bits::pack(code_bits, &codes, out);
    }
    let mut out = QView { format, mask: None, codes: &[], ..*q }.to_owned()?;
    out.codes = dense;
    Ok(out)
}
