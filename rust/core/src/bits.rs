//! Bit packing of codes along K.
//!
//! A row of `b`-bit codes is one little-endian bit stream: code `i` occupies bits `i*b .. (i+1)*b`, bit `t` of the
//! stream is bit `t % 8` of byte `t / 8`. The last byte is padded with zero bits. Eight codes fill exactly `b` bytes,
//! so every multiple of eight codes starts at a byte; for `b = 3`:
//!
//! ```text
//! byte      2        1        0
//!       77766655 54443332 22111000     (digit = index of the code; low bits right)
//! ```
//!
//! Unpacked, a code is one byte; of 9 to 16 bits it is two, the low one first.

/// Bytes of a row of `len` codes of `bits` bits.
///
/// # Panics
/// If `bits` is not in 1..=16, or the row has 2^60 codes or more.
pub fn row_bytes(bits: u8, len: usize) -> usize {
    assert!((1..=16).contains(&bits), "codes have 1 to 16 bits");
    assert!(len >> (usize::BITS - 4) == 0, "row of {len} codes");
    (len / 8) * bits as usize + ((len % 8) * bits as usize).div_ceil(8)
}

/// Bytes of an unpacked code.
pub fn code_bytes(bits: u8) -> usize {
    if bits > 8 {
        2
    } else {
        1
    }
}

/// [`pack`] of codes of two bytes.
#[inline(always)]
fn pack_long(bits: u8, codes: &[u8], out: &mut [u8]) {
    let (mut held, mut count, mut at) = (0u32, 0, 0);
    for c in codes.chunks_exact(2) {
        held |= (u32::from(u16::from_le_bytes([c[0], c[1]])) & ((1 << bits) - 1)) << count;
        count += u32::from(bits);
        while count >= 8 {
            out[at] = held as u8;
            (held, count, at) = (held >> 8, count - 8, at + 1);
        }
    }
    if count > 0 {
        out[at] = held as u8;
    }
}

/// [`unpack`] of codes of two bytes.
#[inline(always)]
fn unpack_long<const B: usize>(bytes: &[u8], out: &mut [u8]) {
    let word = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("eight bytes"));
    let whole = out.len() / 16;
    // Eight codes are B bytes: four are in the first eight of them, four in the last.
    for (o, b) in out.chunks_exact_mut(16).zip(bytes.chunks_exact(B)) {
        let (low, high) = (word(&b[..8]), word(&b[B - 8..]) >> (64 - 4 * B));
        let four = |x: u64| [x, x >> B, x >> (2 * B), x >> (3 * B)].map(|x| (x & ((1 << B) - 1)) as u16);
        for (o, c) in o.chunks_exact_mut(2).zip(four(low).into_iter().chain(four(high))) {
            o.copy_from_slice(&c.to_le_bytes());
        }
    }
    for (i, o) in out.chunks_exact_mut(2).enumerate().skip(8 * whole) {
        o.copy_from_slice(&get(B as u8, bytes, i).to_le_bytes());
    }
}

/// Keeps the low `b` bits of each of the eight bytes of `x` and moves them together into the low `8*b` bits.
#[inline(always)]
fn gather<const B: u32>(x: u64) -> u64 {
    let x = x & (0x0101_0101_0101_0101 * ((1u64 << B) - 1));
    let x = (x & 0x00ff_00ff_00ff_00ff) | ((x & 0xff00_ff00_ff00_ff00) >> (8 - B));
    let x = (x & 0x0000_ffff_0000_ffff) | ((x & 0xffff_0000_ffff_0000) >> (16 - 2 * B));
    (x & 0xffff_ffff) | ((x >> 32) << (4 * B))
}

/// The reverse of [`gather`].
#[inline(always)]
fn spread<const B: u32>(x: u64) -> u64 {
    let low = |n: u32| (1u64 << n) - 1;
    let x = (x & low(4 * B)) | (((x >> (4 * B)) & low(4 * B)) << 32);
    let m = low(2 * B) * 0x0000_0001_0000_0001;
    let x = (x & m) | (((x >> (2 * B)) & m) << 16);
    let m = low(B) * 0x0001_0001_0001_0001;
    (x & m) | (((x >> B) & m) << 8)
}

#[inline(always)]
fn pack_wide<const B: usize>(codes: &[u8], out: &mut [u8]) {
    let (head, tail) = codes.split_at(codes.len() / 8 * 8);
    let (out_head, out_tail) = out.split_at_mut(head.len() / 8 * B);
    for (c, o) in head.chunks_exact(8).zip(out_head.chunks_exact_mut(B)) {
        let x = u64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]);
        o.copy_from_slice(&gather_any::<B>(x).to_le_bytes()[..B]);
    }
    if !tail.is_empty() {
        let mut c = [0; 8];
        c[..tail.len()].copy_from_slice(tail);
        let bytes = gather_any::<B>(u64::from_le_bytes(c)).to_le_bytes();
        out_tail.copy_from_slice(&bytes[..out_tail.len()]);
    }
}

#[inline(always)]
fn unpack_wide<const B: usize>(bytes: &[u8], out: &mut [u8]) {
    let n8 = out.len() / 8;
    let (head, tail) = out.split_at_mut(n8 * 8);
    let (bytes_head, bytes_tail) = bytes.split_at(n8 * B);
    for (b, o) in bytes_head.chunks_exact(B).zip(head.chunks_exact_mut(8)) {
        let mut x = [0; 8];
        x[..B].copy_from_slice(b);
        o.copy_from_slice(&spread_any::<B>(u64::from_le_bytes(x)).to_le_bytes());
    }
    if !tail.is_empty() {
        let need = (tail.len() * B).div_ceil(8);
        let mut x = [0; 8];
        x[..need].copy_from_slice(&bytes_tail[..need]);
        let codes = spread_any::<B>(u64::from_le_bytes(x)).to_le_bytes();
        tail.copy_from_slice(&codes[..tail.len()]);
    }
}

#[inline(always)]
fn gather_any<const B: usize>(x: u64) -> u64 {
    match B {
        1 => gather::<1>(x),
        2 => gather::<2>(x),
        3 => gather::<3>(x),
        4 => gather::<4>(x),
        5 => gather::<5>(x),
        6 => gather::<6>(x),
        7 => gather::<7>(x),
        _ => x,
    }
}

#[inline(always)]
fn spread_any<const B: usize>(x: u64) -> u64 {
    match B {
        1 => spread::<1>(x),
        2 => spread::<2>(x),
        3 => spread::<3>(x),
        4 => spread::<4>(x),
        5 => spread::<5>(x),
        6 => spread::<6>(x),
        7 => spread::<7>(x),
        _ => x,
    }
}

/// Packs unpacked `codes` (only the low `bits` bits of each are kept) into `out`.
///
/// # Panics
/// If `out` is not as long as [`row_bytes`] of their number.
pub fn pack(bits: u8, codes: &[u8], out: &mut [u8]) {
    pack_inline(bits, codes, out);
}

/// [`pack`], to be compiled into the caller with the caller's instructions.
#[inline(always)]
pub(crate) fn pack_inline(bits: u8, codes: &[u8], out: &mut [u8]) {
    assert_eq!(out.len(), row_bytes(bits, codes.len() / code_bytes(bits)), "packed row length");
    match bits {
        1 => pack_wide::<1>(codes, out),
        2 => pack_wide::<2>(codes, out),
        3 => pack_wide::<3>(codes, out),
        4 => pack_wide::<4>(codes, out),
        5 => pack_wide::<5>(codes, out),
        6 => pack_wide::<6>(codes, out),
        7 => pack_wide::<7>(codes, out),
        8 => out.copy_from_slice(codes),
        _ => pack_long(bits, codes, out),
    }
}

/// Unpacks the first codes of the row `bytes`, as many as `out` takes.
///
/// # Panics
/// If `bytes` is shorter than [`row_bytes`] of their number.
pub fn unpack(bits: u8, bytes: &[u8], out: &mut [u8]) {
    unpack_inline(bits, bytes, out);
}

/// [`unpack`], to be compiled into the caller with the caller's instructions.
#[inline(always)]
pub(crate) fn unpack_inline(bits: u8, bytes: &[u8], out: &mut [u8]) {
    let need = row_bytes(bits, out.len() / code_bytes(bits));
    assert!(bytes.len() >= need, "packed row too short: {} bytes, {need} needed", bytes.len());
    match bits {
        1 => unpack_wide::<1>(bytes, out),
        2 => unpack_wide::<2>(bytes, out),
        3 => unpack_wide::<3>(bytes, out),
        4 => unpack_wide::<4>(bytes, out),
        5 => unpack_wide::<5>(bytes, out),
        6 => unpack_wide::<6>(bytes, out),
        7 => unpack_wide::<7>(bytes, out),
        8 | 16 => out.copy_from_slice(&bytes[..need]),
        9 => unpack_long::<9>(bytes, out),
        10 => unpack_long::<10>(bytes, out),
        11 => unpack_long::<11>(bytes, out),
        12 => unpack_long::<12>(bytes, out),
        13 => unpack_long::<13>(bytes, out),
        14 => unpack_long::<14>(bytes, out),
        _ => unpack_long::<15>(bytes, out),
    }
}

/// Unpacks codes from code `start` on, as many as `out` takes; any start.
///
/// # Panics
/// If the codes leave `bytes`.
pub fn unpack_from(bits: u8, bytes: &[u8], start: usize, out: &mut [u8]) {
    let size = code_bytes(bits);
    let lead = (start.wrapping_neg() % 8).min(out.len() / size);
    let (first, rest) = out.split_at_mut(lead * size);
    for (i, o) in first.chunks_exact_mut(size).enumerate() {
        o.copy_from_slice(&get(bits, bytes, start + i).to_le_bytes()[..size]);
    }
    if !rest.is_empty() {
        unpack(bits, &bytes[row_bytes(bits, start + lead)..], rest);
    }
}

/// Code `i` of the row `bytes`.
///
/// # Panics
/// If the code lies outside `bytes`.
#[inline]
pub fn get(bits: u8, bytes: &[u8], i: usize) -> u16 {
    let bits = bits as usize;
    let shift = (i % 8) * bits;
    let first = (i / 8) * bits + shift / 8;
    let last = first + (shift % 8 + bits - 1) / 8;
    let held = bytes[first..=last].iter().rev().fold(0u32, |h, &b| (h << 8) | u32::from(b));
    ((held >> (shift % 8)) & ((1 << bits) - 1)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One bit at a time, straight from the definition.
    fn pack_by_bit(bits: u8, codes: &[u16]) -> Vec<u8> {
        let mut out = vec![0u8; row_bytes(bits, codes.len())];
        for (i, c) in codes.iter().enumerate() {
            for t in 0..bits as usize {
                let at = i * bits as usize + t;
                out[at / 8] |= (((c >> t) & 1) as u8) << (at % 8);
            }
        }
        out
    }

    #[test]
    fn every_width_and_length_follows_the_definition() {
        let mut state = 1u32;
        for bits in 1..=16u8 {
            let size = code_bytes(bits);
            for len in 0..70 {
                let codes: Vec<u16> = (0..len)
                    .map(|_| {
                        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                        ((state >> 16) & ((1 << bits) - 1)) as u16
                    })
                    .collect();
                let flat: Vec<u8> = codes.iter().flat_map(|c| c.to_le_bytes()[..size].to_vec()).collect();
                let mut packed = vec![0xaa; row_bytes(bits, len)];
                pack(bits, &flat, &mut packed);
                assert_eq!(packed, pack_by_bit(bits, &codes), "bits {bits}, length {len}");
                let mut back = vec![0xaa; len * size];
                unpack(bits, &packed, &mut back);
                assert_eq!(back, flat);
                for (i, &c) in codes.iter().enumerate() {
                    assert_eq!(get(bits, &packed, i), c);
                    let mut part = vec![0xaa; (len - i) * size];
                    unpack_from(bits, &packed, i, &mut part);
                    assert_eq!(part, flat[i * size..]);
                }
            }
        }
    }

    #[test]
    fn high_bits_of_a_code_do_not_leak() {
        let mut out = [0; 3];
        pack(3, &[0xff, 0xf8, 0xff, 0xf8, 0xff, 0xf8, 0xff, 0xf8], &mut out);
        assert_eq!(out, pack_by_bit(3, &[7, 0, 7, 0, 7, 0, 7, 0])[..]);
        let mut out = [0; 3];
        pack(12, &[0xff, 0xff, 0x00, 0xf0], &mut out);
        assert_eq!(out, pack_by_bit(12, &[0xfff, 0])[..]);
    }

    #[test]
    fn rows_past_the_address_space_are_refused() {
        assert!(std::panic::catch_unwind(|| row_bytes(8, usize::MAX)).is_err());
    }
}
