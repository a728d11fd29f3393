//! The kernels, written once over [`Simd`] and instantiated per ISA.
//!
//! Register lanes are rows of a panel, so one accumulator register serves 16 outputs of one activation row and no sum
//! is ever split: k ascends, one accumulator per output. That is what makes every ISA give the same bits.
use super::simd::Simd;
use super::{F32Args, GemmArgs, Grp, Inner, Raw, ScalePtr};

/// How a register of codes is read from a block; see `pack.rs` for the planes.
///
/// # Safety
/// `p` must have `128*BITS` readable bytes and `r < 16`.
#[allow(clippy::missing_safety_doc)]
pub unsafe trait Unpack: 'static {
    /// Bits of a code.
    const BITS: usize;
    /// Planes that the bits are spread over.
    const PLANES: usize;
    /// Whether codes of integer products are bytes looked up in a table.
    const TABLE: bool = false;
    /// Whether what is multiplied is below 128, which is cheaper where the dot product saturates.
    const NARROW: bool = Self::BITS < 8 && !Self::TABLE;
    /// Whether what is multiplied is below 16, and the codes are of one plane.
    const SMALL: bool = Self::BITS <= 4 && Self::PLANES == 1 && !Self::TABLE;
    /// Whether two bytes are multiplied, halves `16*high + low`, whose sums are in neighbouring parts.
    const HALVES: bool = false;
    /// Whether halves were unpacked: low ones, then high ones, a KiB each.
    const UNPACKED: bool = false;
    /// Register `r` of the block at `p`: 64 codes, one per byte.
    unsafe fn reg<S: Simd>(p: *const u8, r: usize) -> S::I;
}

/// The bits of one plane, moved to start at bit `to` of each byte.
#[inline(always)]
unsafe fn plane<S: Simd, const W: usize>(p: *const u8, r: usize, to: usize) -> S::I {
    let per = 2 * W;
    let from = (r / per) * W;
    // SAFETY: the plane holds `per` registers; masks keep bits of neighbouring bytes out.
    unsafe {
        let v = S::load(p.add((r % per) * 64));
        if W == 8 {
            return v;
        }
        let v = if from >= to { S::shr(v, from - to) } else { S::shl(v, to - from) };
        S::and(v, S::splat8((((1u32 << W) - 1) << to) as u8))
    }
}

macro_rules! unpackers {
    ($($name:ident $bits:literal: $($w:literal at $off:literal bit $to:literal),+;)*) => { $(
        /// Codes of this many bits.
        #[derive(Debug)]
        pub struct $name;
        // SAFETY: reads stay within the planes of one block.
        unsafe impl Unpack for $name {
            const BITS: usize = $bits;
            const PLANES: usize = [$($w),+].len();
            #[inline(always)]
            unsafe fn reg<S: Simd>(p: *const u8, r: usize) -> S::I {
                // SAFETY: the caller gives a whole block; offsets are those of its planes.
                unsafe { unpackers!(@or S, $(plane::<S, $w>(p.add($off), r, $to)),+) }
            }
        }
    )* };
    (@or $s:ident, $a:expr) => { $a };
    (@or $s:ident, $a:expr, $($b:expr),+) => { $s::or($a, unpackers!(@or $s, $($b),+)) };
}
unpackers! {
    U1 1: 1 at 0 bit 0;
    U2 2: 2 at 0 bit 0;
    U3 3: 2 at 0 bit 0, 1 at 256 bit 2;
    U4 4: 4 at 0 bit 0;
    U5 5: 4 at 0 bit 0, 1 at 512 bit 4;
    U6 6: 4 at 0 bit 0, 2 at 512 bit 4;
    U7 7: 4 at 0 bit 0, 2 at 512 bit 4, 1 at 768 bit 6;
    U8 8: 8 at 0 bit 0;
}

/// Halves that were unpacked.
#[derive(Debug)]
pub struct Halved;
// SAFETY: reads the low half.
unsafe impl Unpack for Halved {
    const BITS: usize = 16;
    const PLANES: usize = 1;
    const HALVES: bool = true;
    const UNPACKED: bool = true;
    #[inline(always)]
    unsafe fn reg<S: Simd>(p: *const u8, r: usize) -> S::I {
        // SAFETY: the caller gives a whole block.
        unsafe { U8::reg::<S>(p, r) }
    }
}

macro_rules! bytes_below {
    ($($(#[$doc:meta])* $name:ident: small $small:literal;)*) => { $(
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name;
        // SAFETY: reads what `U8` reads.
        unsafe impl Unpack for $name {
            const BITS: usize = 8;
            const PLANES: usize = 1;
            const NARROW: bool = true;
            const SMALL: bool = $small;
            #[inline(always)]
            unsafe fn reg<S: Simd>(p: *const u8, r: usize) -> S::I {
                // SAFETY: the caller gives a whole block.
                unsafe { U8::reg::<S>(p, r) }
            }
        }
    )* };
}
bytes_below! {
    /// Codes of fewer than eight bits that were unpacked to bytes.
    Bytes7: small false;
    /// Codes below 16 that were unpacked to bytes.
    Bytes4: small true;
}

macro_rules! looked_up {
    ($($name:ident: $codes:ident, $halves:literal;)*) => { $(
        /// Codes that stand for the bytes of a table.
        #[derive(Debug)]
        pub struct $name;
        // SAFETY: as that of the codes.
        unsafe impl Unpack for $name {
            const BITS: usize = $codes::BITS;
            const PLANES: usize = $codes::PLANES;
            const TABLE: bool = true;
            const HALVES: bool = $halves;
            #[inline(always)]
            unsafe fn reg<S: Simd>(p: *const u8, r: usize) -> S::I {
                // SAFETY: the caller's block.
                unsafe { $codes::reg::<S>(p, r) }
            }
        }
    )* };
}
looked_up! {
    T4: U4, false;
    T6: U6, false;
    H6: U6, true;
}

/// The 64 bytes of a table, 16 in each register.
#[inline(always)]
pub(super) unsafe fn byte_table<S: Simd>(p: *const u8) -> [S::I; 4] {
    // SAFETY: the caller's table.
    unsafe { [S::repeat16(p), S::repeat16(p.add(16)), S::repeat16(p.add(32)), S::repeat16(p.add(48))] }
}

/// The table of the kernels of some codes.
#[inline(always)]
unsafe fn registers_of<S: Simd, U: Unpack>(table: *const u8) -> [S::I; 4] {
    // SAFETY: the caller's table, if the codes have one.
    unsafe {
        match (U::TABLE, U::HALVES, U::PLANES) {
            (false, ..) => [S::splat(0); 4],
            (_, true, _) => S::table_of_halves(table),
            (.., 1) => byte_table::<S>(table),
            _ => S::table64(table),
        }
    }
}

/// The bytes of the codes `u`, which are below 64, or below 16 where `SMALL`.
#[inline(always)]
pub(super) unsafe fn look_up<S: Simd, const SMALL: bool>(t: &[S::I; 4], u: S::I) -> S::I {
    // SAFETY: the caller's features.
    unsafe {
        if SMALL {
            return S::shuffle(t[0], u);
        }
        let i = S::and(u, S::splat8(15));
        let low = S::pick(u, 16, S::shuffle(t[0], i), S::shuffle(t[1], i));
        let high = S::pick(u, 16, S::shuffle(t[2], i), S::shuffle(t[3], i));
        S::pick(u, 32, low, high)
    }
}

/// The low and high halves of codes of six bits: those of 32 magnitudes, on either side of 32.
#[inline(always)]
pub(super) unsafe fn look_up_half<S: Simd>(t: &[S::I; 4], u: S::I) -> [S::I; 2] {
    // SAFETY: the caller's features.
    unsafe {
        let (i, twice) = (S::and(u, S::splat8(15)), S::splat8(64));
        let low = S::pick(u, 16, S::shuffle(t[0], i), S::shuffle(t[1], i));
        let high = S::pick(u, 16, S::shuffle(t[2], i), S::shuffle(t[3], i));
        [S::pick(u, 32, low, S::sub8(twice, low)), S::pick(u, 32, high, S::sub8(twice, high))]
    }
}

/// Makes of codes of six bits, in `n` KiB, their halves less `sub` (wrapping), a KiB of low ones before each of high ones.
/// `codes` may be the upper half of `out`.
///
/// # Safety
/// `codes` has `n` KiB, `out` twice as much, `table` 64 bytes; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn look_up_halves<S: Simd>(codes: *const u8, out: *mut u8, n: usize, table: *const u8, sub: u8) {
    // SAFETY: as the contract says.
    unsafe {
        let sub = S::splat8(sub);
        let t = S::table_of_halves(table);
        for b in 0..n {
            for r in 0..16 {
                let [low, high] = S::look_halves(&t, S::load(codes.add(1024 * b + 64 * r)));
                let to = out.add(2048 * b + 64 * r);
                S::store(to, S::sub8(low, sub));
                S::store(to.add(1024), S::sub8(high, sub));
            }
        }
    }
}

/// Replaces codes of at most six bits, or four where they are `small`, in `n` KiB, by `table[u] - sub` (wrapping).
///
/// # Safety
/// `bytes` has the codes, `table` 64 bytes; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn look_up_all<S: Simd>(bytes: *mut u8, n: usize, table: *const u8, sub: u8, small: bool) {
    // SAFETY: as the contract says.
    unsafe {
        let sub = S::splat8(sub);
        let registers = (0..16 * n).map(|i| bytes.add(64 * i));
        if small {
            let t = byte_table::<S>(table);
            registers.for_each(|p| S::store(p, S::sub8(look_up::<S, true>(&t, S::load(p)), sub)));
        } else {
            let t = S::table64(table);
            registers.for_each(|p| S::store(p, S::sub8(S::look64(&t, S::load(p)), sub)));
        }
    }
}

/// Repeats a body for the 16 registers of a block with a constant index, so that shifts and offsets fold.
macro_rules! regs {
    ($r:ident => $body:block) => {
        regs!(@ $r, $body, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    };
    (@ $r:ident, $body:block, $($i:literal),*) => { $( { const $r: usize = $i; $body } )* };
}
pub(crate) use regs;

/// Adds one block's dot products to `acc[panel][row][part]`, for registers `r0..r0 + len` of each part.
///
/// Formats of one plane hold `8/BITS` registers in each 64 bytes; part `t` of load `i` is register `t*PER + i`, so each
/// part has its own accumulator and needs one load, one shift and one mask; `MASKED` saves the shift, and the sums of part
/// `t` come out `2^(t*BITS)` times too large (see [`scaled`]). Formats of several planes put each register
/// together from them; they come as whole blocks.
#[inline(always)]
unsafe fn dots<S: Simd, U: Unpack, const MASKED: bool, const NP: usize, const MR: usize, const PARTS: usize>(
    acc: &mut [[[S::I; PARTS]; MR]; NP],
    w: *const u8,
    panel_stride: usize,
    x: *const i8,
    table: &[S::I; 4],
    r0: usize,
    len: usize,
) {
    // SAFETY: the caller gives whole blocks; `r0 + len` is at most the registers of a part.
    unsafe {
        let per = 16 / PARTS;
        if U::UNPACKED {
            for i in r0..r0 + len {
                for p in 0..NP {
                    let u = w.add(p * panel_stride + 64 * i);
                    let (low, high) = (S::load(u), S::load(u.add(1024)));
                    for m in 0..MR {
                        let q = S::splat(x.add(64 * m + 4 * i).cast::<i32>().read_unaligned());
                        acc[p][m][0] = S::dot7(acc[p][m][0], low, q);
                        acc[p][m][PARTS - 1] = S::dot7(acc[p][m][PARTS - 1], high, q);
                    }
                }
            }
            return;
        }
        if U::HALVES {
            regs!(R => {
                for p in 0..NP {
                    let [low, high] = S::look_halves(table, U::reg::<S>(w.add(p * panel_stride), R));
                    for m in 0..MR {
                        let q = S::splat(x.add(64 * m + 4 * R).cast::<i32>().read_unaligned());
                        let t = R / 8 * 2 % PARTS;
                        acc[p][m][t] = S::dot7(acc[p][m][t], low, q);
                        acc[p][m][(t + 1) % PARTS] = S::dot7(acc[p][m][(t + 1) % PARTS], high, q);
                    }
                }
            });
            return;
        }
        if U::PLANES > 1 {
            regs!(R => {
                let t = R / (16 / PARTS);
                for p in 0..NP {
                    let u = U::reg::<S>(w.add(p * panel_stride), R);
                    let u = if U::TABLE { S::look64(table, u) } else { u };
                    for m in 0..MR {
                        let q = S::splat(x.add(64 * m + 4 * R).cast::<i32>().read_unaligned());
                        acc[p][m][t] = if U::TABLE { S::dot(acc[p][m][t], u, q) } else { S::dot7(acc[p][m][t], u, q) };
                    }
                }
            });
            return;
        }
        if U::SMALL && S::SHORT {
            for first in (r0..r0 + len).step_by(8) {
                let len = (r0 + len - first).min(8);
                small_dots::<S, U, NP, MR, PARTS>(acc, w, panel_stride, x, first, len);
            }
            return;
        }
        let mask = ((1u32 << U::BITS) - 1) as u8;
        let masked = MASKED && scaled::<S, U>(1) > 0;
        for i in r0..r0 + len {
            for p in 0..NP {
                let v = S::load(w.add(p * panel_stride + 64 * i));
                for t in 0..PARTS {
                    let u = if U::BITS == 8 {
                        // Codes of a byte: parts are only separate chains of sums.
                        S::load(w.add(p * panel_stride + 64 * (t * per + i)))
                    } else if masked {
                        S::and(v, S::splat8(mask << (t * U::BITS)))
                    } else {
                        S::and(S::shr(v, t * U::BITS), S::splat8(mask))
                    };
                    let u = if U::TABLE { look_up::<S, true>(table, u) } else { u };
                    for m in 0..MR {
                        let q = S::splat(x.add(64 * m + 4 * (t * per + i)).cast::<i32>().read_unaligned());
                        acc[p][m][t] =
                            if U::NARROW && !masked { S::dot7(acc[p][m][t], u, q) } else { S::dot(acc[p][m][t], u, q) };
                    }
                }
            }
        }
    }
}

/// As [`dots`] for codes below 16 and at most eight registers of a part: sums stay in 16 bits until the end.
#[inline(always)]
unsafe fn small_dots<S: Simd, U: Unpack, const NP: usize, const MR: usize, const PARTS: usize>(
    acc: &mut [[[S::I; PARTS]; MR]; NP],
    w: *const u8,
    panel_stride: usize,
    x: *const i8,
    r0: usize,
    len: usize,
) {
    // SAFETY: as `dots`.
    unsafe {
        let per = 16 / PARTS;
        let mask = S::splat8(15 >> (4 - U::BITS.min(4)));
        let mut sums = [[[S::splat(0); PARTS]; MR]; NP];
        for i in r0..r0 + len {
            for p in 0..NP {
                let v = S::load(w.add(p * panel_stride + 64 * i));
                for t in 0..PARTS {
                    let u = if U::BITS == 8 {
                        S::load(w.add(p * panel_stride + 64 * (t * per + i)))
                    } else {
                        S::and(S::shr(v, t * U::BITS), mask)
                    };
                    for m in 0..MR {
                        let q = S::splat(x.add(64 * m + 4 * (t * per + i)).cast::<i32>().read_unaligned());
                        sums[p][m][t] = S::dot4(sums[p][m][t], u, q);
                    }
                }
            }
        }
        for p in 0..NP {
            for m in 0..MR {
                for t in 0..PARTS {
                    acc[p][m][t] = S::widen(acc[p][m][t], sums[p][m][t]);
                }
            }
        }
    }
}

/// Bits by which the masked sums of part `t` are too large.
const fn scaled<S: Simd, U: Unpack>(t: usize) -> usize {
    if S::WIDE_DOT && U::BITS < 8 && U::PLANES == 1 && !U::TABLE {
        t * U::BITS
    } else {
        0
    }
}

/// What the sums of part `t` count for.
#[inline(always)]
unsafe fn part<S: Simd, U: Unpack, const MASKED: bool>(sums: S::I, t: usize) -> S::I {
    // SAFETY: the caller's features.
    unsafe {
        if U::HALVES {
            return if t % 2 == 1 { S::shl32(sums, 4) } else { sums };
        }
        if MASKED {
            S::sar(sums, scaled::<S, U>(t))
        } else {
            sums
        }
    }
}

/// Registers of a part.
const fn registers<U: Unpack>(parts: usize) -> usize {
    if U::UNPACKED {
        16
    } else {
        16 / parts
    }
}

/// 16 scales at element offset `at`.
#[inline(always)]
pub(crate) unsafe fn scales<S: Simd>(p: ScalePtr, at: usize) -> S::F {
    // SAFETY: the caller's offset is within the panel scales.
    unsafe {
        match p {
            ScalePtr::F32(p) => S::loadf(p.add(at)),
            ScalePtr::F16(p) => S::load_f16(p.add(at)),
            ScalePtr::BF16(p) => S::load_bf16(p.add(at)),
        }
    }
}

/// Bytes that unpacking prefetches ahead where codes are unpacked in the order of memory: the next panel follows, so
/// running over the end is useful too.
pub const IN_ORDER: usize = 4096;

/// Stores what an expression makes of the codes `$u` of every register of some blocks; `$r` is the register, `$ahead` the
/// bytes to prefetch ahead. A closure in its place might stay a call, and a call has no features.
macro_rules! each_register {
    ($u:ident, $r:ident in $src:expr, $dst:expr, $blocks:expr, $ahead:expr => $e:expr) => {
        for b in 0..$blocks {
            let (p, q) = ($src.add(b * 128 * U::BITS), $dst.add(b * 1024));
            fetch::<S, 1>(p, 0, 128 * U::BITS, $ahead, usize::MAX);
            regs!(R => {
                let ($u, $r) = (U::reg::<S>(p, R), R);
                S::store(q.add(64 * R), $e);
            });
        }
    };
}

/// Decodes `blocks` blocks to bytes `v = u + (u & dbl) - sub` (wrapping), in register order; prefetches `ahead` bytes on
/// (wrapping).
///
/// # Safety
/// `src` holds the blocks, `dst` 1024 bytes for each; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn unpack<S: Simd, U: Unpack>(src: *const u8, dst: *mut u8, blocks: usize, dbl: u8, sub: u8, ahead: usize) {
    // SAFETY: as the contract says.
    unsafe {
        let (twice, less) = (S::splat8(dbl), S::splat8(sub));
        match (dbl, sub) {
            (0, 0) => each_register!(u, _r in src, dst, blocks, ahead => u),
            (0, _) => each_register!(u, _r in src, dst, blocks, ahead => S::sub8(u, less)),
            _ => each_register!(u, _r in src, dst, blocks, ahead => S::sub8(S::add8(u, S::and(u, twice)), less)),
        }
    }
}

/// Decodes blocks of two-level weights to bytes `u*mul + add - sub` (wrapping), the factors those of group and row. Two
/// codes are multiplied at once: a product is below 256, so that of the lower one never reaches the other.
///
/// # Safety
/// The pointers in `a` hold what [`Inner`] says; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn unpack_inner<S: Simd, U: Unpack>(a: &Inner) {
    // SAFETY: as the contract says.
    unsafe {
        let (pair, quad, sub) = (S::splat(0x0001_0001), S::splat(0x0101_0101), S::splat8(a.sub));
        macro_rules! factors {
            ($group:expr) => {{
                let at = $group.min(a.groups - 1) * 16;
                let mul = S::mul(S::load_u8(a.mul.add(at)), pair);
                (mul, S::sub8(S::mul(S::load_u8(a.add.add(at)), quad), sub))
            }};
        }
        // Blocks of one group.
        let long = (a.padded / 64).max(1);
        let (mut group, mut into) = (a.block0 / long, a.block0 % long);
        for b in 0..a.blocks {
            let (src, dst) = (a.codes.add(b * 128 * U::BITS), a.bytes.add(b * 1024));
            if a.padded >= 64 {
                let (mul, add) = factors!(group);
                each_register!(u, _r in src, dst, 1, a.ahead => S::add8(S::mul16(u, mul), add));
                into += 1;
                if into == long {
                    (group, into) = (group + 1, 0);
                }
                continue;
            }
            // Groups of 8, 16 or 32 places: at most eight in a block.
            let mut of = [(sub, sub); 8];
            let shift = a.padded.trailing_zeros();
            for (i, f) in of[..64 >> shift].iter_mut().enumerate() {
                *f = factors!((((a.block0 + b) << 6 >> shift) + i));
            }
            each_register!(u, r in src, dst, 1, a.ahead => {
                let (mul, add) = of[((4 * r) >> shift) & 7];
                S::add8(S::mul16(u, mul), add)
            });
        }
    }
}

/// Grouped product: for each group in increasing k, `c = fma(f32(D), s, c)` with `D` the exact integer sum.
///
/// `ZEROS`: zero points are stored, integers or floats; else the zero is constant and folded into the sums.
/// `INNER`: weights have two levels; then `c` holds int32 sums, and `c = c + D*t` with `t` the integer scale of the group.
/// `SEG` is the number of registers of a segment (8, or 4 where there are two parts), 16 where a segment is whole blocks, or 0 to take it from
/// `seg_registers` (codes of one byte).
///
/// # Safety
/// The pointers in `a` hold what [`Grp`] says; the CPU has the features of `S`.
#[allow(clippy::reversed_empty_ranges)] // flush!(0, 1) adds no further part
#[inline(always)]
pub unsafe fn grouped<
    S: Simd,
    U: Unpack,
    const ZEROS: bool,
    const INNER: bool,
    const SEG: usize,
    const NP: usize,
    const MR: usize,
    const PARTS: usize,
>(
    a: &Grp,
) {
    // SAFETY: as the contract says; indices follow the shapes in `a`.
    unsafe {
        let odd = a.dbl != 0;
        // Rows of one scale get it in the epilogue.
        let act_groups = !a.act.scales.is_null();
        let table = registers_of::<S, U>(a.table);
        let per = registers::<U>(PARTS);
        let mut f = [[S::splatf(0.0); MR]; NP];
        for p in 0..NP {
            for m in 0..MR {
                f[p][m] = S::loadf(a.c.add(m * a.ldc + p * 16));
            }
        }
        let mut acc = [[[S::splat(0); PARTS]; MR]; NP];
        let mut seg = a.seg0;
        // Closes segment `seg`, whose sums are in parts `from..to`. Where groups are short this is most of the work, so what
        // a weight or its activations do not need is left out.
        macro_rules! flush {
            ($from:expr, $to:expr) => {{
                match (act_groups, odd) {
                    (false, false) => flush!($from, $to, false, false),
                    (false, true) => flush!($from, $to, false, true),
                    (true, false) => flush!($from, $to, true, false),
                    (true, true) => flush!($from, $to, true, true),
                }
                seg += 1;
            }};
            ($from:expr, $to:expr, $act_groups:literal, $odd:literal) => {{
                let g = *a.seg_group.add(seg) as usize * 16;
                let sums = a.act.sums.add(seg * a.act.rows);
                for p in 0..NP {
                    let s = if INNER { S::splatf(0.0) } else { scales::<S>(a.scales, p * a.scale_stride + g) };
                    for m in 0..MR {
                        let mut d = part::<S, U, true>(acc[p][m][$from], $from);
                        acc[p][m][$from] = S::splat(0);
                        for t in $from + 1..$to {
                            d = S::add(d, part::<S, U, true>(acc[p][m][t], t));
                            acc[p][m][t] = S::splat(0);
                        }
                        let sum = S::splat(*sums.add(m));
                        if $odd {
                            d = S::add(d, d);
                        }
                        if INNER {
                            let zero =
                                if ZEROS { S::mul(S::load_u8(a.zeros.add(p * a.scale_stride + g)), sum) } else { sum };
                            let t = S::load_u8(a.inner.add(p * a.scale_stride + g));
                            let c = S::add(S::bits(f[p][m]), S::mul(S::sub(d, zero), t));
                            f[p][m] = S::from_bits(c);
                            continue;
                        }
                        let s = if $act_groups {
                            S::mulf(s, S::splatf(*a.act.scales.add(seg * a.act.rows + m)))
                        } else {
                            s
                        };
                        if !ZEROS {
                            f[p][m] = S::fma(S::cvt(S::sub(d, sum)), s, f[p][m]);
                        } else if a.fzeros.is_null() {
                            let z = S::mul(S::load_u8(a.zeros.add(p * a.scale_stride + g)), sum);
                            f[p][m] = S::fma(S::cvt(S::sub(d, z)), s, f[p][m]);
                        } else {
                            let z = S::mulf(s, S::loadf(a.fzeros.add(p * a.scale_stride + g)));
                            f[p][m] = S::fma(S::cvt(d), s, f[p][m]);
                            f[p][m] = S::fma(S::cvt(sum), S::from_bits(S::xor_sign(S::bits(z))), f[p][m]);
                        }
                    }
                }
            }};
        }
        let mut left = a.seg_blocks;
        for b in 0..a.blocks {
            let x = a.act.codes.add(b * a.act.block_stride);
            let w = a.codes.add(b * 128 * U::BITS);
            fetch::<S, NP>(w, a.panel_stride, 128 * U::BITS, a.prefetch, a.blocks - b);
            if SEG > 0 && SEG < 16 {
                // As they are already, since segments end with the block: said so that they are kept in registers.
                acc = [[[S::splat(0); PARTS]; MR]; NP];
            }
            let small = if SEG == 0 { a.seg_registers } else { SEG };
            if SEG == 0 && small < 16 {
                for i in (0..16).step_by(small) {
                    dots::<S, U, true, NP, MR, PARTS>(&mut acc, w, a.panel_stride, x, &table, i, small);
                    flush!(0, PARTS);
                }
            } else if SEG == 0 || SEG >= per {
                dots::<S, U, true, NP, MR, PARTS>(&mut acc, w, a.panel_stride, x, &table, 0, per);
                if SEG != 0 && SEG < 16 {
                    for t in (0..PARTS).step_by(SEG / per) {
                        flush!(t, t + SEG / per);
                    }
                }
            } else if PARTS == 2 {
                // Half a part each: the second part's sums wait until it is their turn.
                dots::<S, U, true, NP, MR, PARTS>(&mut acc, w, a.panel_stride, x, &table, 0, SEG);
                flush!(0, 1);
                let mut third = [[S::splat(0); MR]; NP];
                for p in 0..NP {
                    for m in 0..MR {
                        third[p][m] = acc[p][m][1];
                        acc[p][m][1] = S::splat(0);
                    }
                }
                dots::<S, U, true, NP, MR, PARTS>(&mut acc, w, a.panel_stride, x, &table, SEG, SEG);
                flush!(0, 1);
                for p in 0..NP {
                    for m in 0..MR {
                        (third[p][m], acc[p][m][1]) = (acc[p][m][1], third[p][m]);
                    }
                }
                flush!(1, 2);
                for p in 0..NP {
                    for m in 0..MR {
                        acc[p][m][1] = third[p][m];
                    }
                }
                flush!(1, 2);
            } else {
                for i in (0..per).step_by(SEG) {
                    dots::<S, U, true, NP, MR, PARTS>(&mut acc, w, a.panel_stride, x, &table, i, SEG);
                    flush!(0, 1);
                }
            }
            if small == 16 {
                left -= 1;
                if left == 0 || b + 1 == a.blocks {
                    flush!(0, PARTS);
                    left = a.seg_blocks;
                }
            }
        }
        for p in 0..NP {
            for m in 0..MR {
                S::storef(a.c.add(m * a.ldc + p * 16), f[p][m]);
            }
        }
    }
}

/// Prefetches a block of each panel, `ahead` bytes on; beyond the panel's end, of which `left` blocks are left, that is the
/// start of the panel that comes after these `NP`.
#[inline(always)]
pub(crate) unsafe fn fetch<S: Simd, const NP: usize>(
    w: *const u8,
    panel_stride: usize,
    block: usize,
    ahead: usize,
    left: usize,
) {
    if ahead > 0 {
        let over = left <= ahead.div_ceil(block);
        let ahead = ahead + if over { (NP - 1) * panel_stride } else { 0 };
        for p in 0..NP {
            for line in (0..block).step_by(64) {
                // SAFETY: a prefetch may name any address.
                unsafe { S::prefetch(w.wrapping_add(p * panel_stride + ahead + line)) };
            }
        }
    }
}

/// Ungrouped product: `c += sum u*a` over all blocks, in int32.
///
/// # Safety
/// The pointers in `a` hold what [`Raw`] says; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn raw<S: Simd, U: Unpack, const NP: usize, const MR: usize, const PARTS: usize>(a: &Raw) {
    // SAFETY: as the contract says.
    unsafe {
        let table = registers_of::<S, U>(a.table);
        let mut acc = [[[S::splat(0); PARTS]; MR]; NP];
        for b in 0..a.blocks {
            let x = a.act.codes.add(b * a.act.block_stride);
            let w = a.codes.add(b * 128 * U::BITS);
            fetch::<S, NP>(w, a.panel_stride, 128 * U::BITS, a.prefetch, a.blocks - b);
            dots::<S, U, false, NP, MR, PARTS>(&mut acc, w, a.panel_stride, x, &table, 0, registers::<U>(PARTS));
        }
        for p in 0..NP {
            for m in 0..MR {
                let mut d = S::load(a.c.add(m * a.ldc + p * 16).cast());
                for t in 0..PARTS {
                    d = S::add(d, part::<S, U, false>(acc[p][m][t], t));
                }
                S::store(a.c.add(m * a.ldc + p * 16).cast(), d);
            }
        }
    }
}

/// `w = fl((u - z) * s)`.
pub const W_MUL1: u8 = 0;
/// `w = fl((2u - z) * s)`.
pub const W_MUL2: u8 = 1;
/// `w = fma(u, s, -fl(s*z))`.
pub const W_FLOAT: u8 = 2;
/// `w = fl(values[u] * s)`, 16 values.
pub const W_TABLE16: u8 = 3;
/// The same with 64 values.
pub const W_TABLE64: u8 = 4;
/// The same with 256 values.
pub const W_TABLE256: u8 = 5;

/// The decoded weights of one lane-byte: byte `j` of every lane of `w`.
///
/// # Safety
/// `values` has as many entries as the mode says; the CPU has the features of `S`.
#[inline(always)]
pub(crate) unsafe fn weight<S: Simd, const W: u8, const ROUND: bool>(
    w: S::I,
    j: usize,
    z: S::F,
    s: S::F,
    values: *const f32,
) -> S::F {
    // SAFETY: the caller's features; the table has as many values as the mode says.
    unsafe {
        let v = S::magic(w, j);
        let v = match W {
            W_TABLE16 => S::mulf(S::lut16(S::loadf(values), S::shr32(w, 8 * j)), s),
            W_TABLE64 => S::mulf(S::lut64(values, S::shr32(w, 8 * j)), s),
            W_TABLE256 => S::mulf(S::gather(values, S::and(S::shr32(w, 8 * j), S::splat(255))), s),
            // z already carries 2^23, so the difference is the exact integer.
            W_MUL1 => S::mulf(S::subf(v, z), s),
            W_MUL2 => {
                let u = S::subf(v, S::splatf(8_388_608.0));
                S::mulf(S::subf(S::addf(u, u), z), s)
            }
            _ => S::fma(S::subf(v, S::splatf(8_388_608.0)), s, z),
        };
        if ROUND {
            round_bf16::<S>(v)
        } else {
            v
        }
    }
}

/// Rounds finite lanes to bfloat16, ties to even.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
pub unsafe fn round_bf16<S: Simd>(v: S::F) -> S::F {
    // SAFETY: the caller's features.
    unsafe {
        let b = S::bits(v);
        let odd = S::and(S::shr32_16(b), S::splat(1));
        let r = S::add(b, S::add(odd, S::splat(0x7fff)));
        S::from_bits(S::and(r, S::splat(-65536)))
    }
}

/// Scale and zero vectors of one group, as [`weight`] wants them.
///
/// # Safety
/// The group is within the arrays of `a`; the CPU has the features of `S`.
#[inline(always)]
pub(crate) unsafe fn group<S: Simd, const W: u8>(a: &F32Args, panel: usize, g: usize) -> (S::F, S::F) {
    // SAFETY: the caller's group is in range.
    unsafe {
        let at = panel * a.scale_stride + g * 16;
        let s = S::mulf(scales::<S>(a.scales, at), S::splatf(a.tensor));
        let z = if W >= W_TABLE16 {
            S::splatf(0.0)
        } else if W == W_FLOAT {
            S::from_bits(S::xor_sign(S::bits(S::mulf(s, S::loadf(a.fzeros.add(at))))))
        } else {
            let base = if W == W_MUL1 { 8_388_608.0 } else { 0.0 };
            if a.zeros.is_null() {
                S::splatf(base + a.sub as f32)
            } else {
                S::addf(S::cvt(S::load_u8(a.zeros.add(at))), S::splatf(base))
            }
        };
        (s, z)
    }
}

/// `c[m][16p..] = fma(x[m][k], w[k], c)` for k ascending, from codes already unpacked to bytes.
///
/// # Safety
/// The pointers in `a` hold what [`F32Args`] says; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn gemv<S: Simd, const W: u8, const ROUND: bool, const NP: usize, const MR: usize>(a: &F32Args) {
    // SAFETY: as the contract says.
    unsafe {
        let mut f = [[S::splatf(0.0); MR]; NP];
        for p in 0..NP {
            for m in 0..MR {
                f[p][m] = S::loadf(a.c.add(m * a.ldc + p * 16));
            }
        }
        let step = a.padded.min(64) / 4;
        for b in 0..a.blocks {
            let mut g = (a.block0 + b) * 64 / a.padded;
            for r0 in (0..16).step_by(step) {
                let mut s = [S::splatf(0.0); NP];
                let mut z = [S::splatf(0.0); NP];
                for p in 0..NP {
                    (s[p], z[p]) = group::<S, W>(a, p, g.min(a.groups - 1));
                }
                g += 1;
                for r in r0..r0 + step {
                    for p in 0..NP {
                        let w = S::load(a.bytes.add(p * a.byte_stride + b * 1024 + 64 * r));
                        for j in 0..4 {
                            let w = weight::<S, W, ROUND>(w, j, z[p], s[p], a.values);
                            for m in 0..MR {
                                let x = S::splatf(*a.x.offset(m as isize * a.x_stride).add(b * 64 + 4 * r + j));
                                f[p][m] = S::fma(x, w, f[p][m]);
                            }
                        }
                    }
                }
            }
        }
        for p in 0..NP {
            for m in 0..MR {
                S::storef(a.c.add(m * a.ldc + p * 16), f[p][m]);
            }
        }
    }
}

/// As [`gemv`] for codes of 1, 2 or 4 bits read straight from their plane: the code, still among its neighbours' bits,
/// indexes the table of 16 values, which repeats every `2^BITS`.
///
/// # Safety
/// `a.bytes` and `a.byte_stride` describe the packed codes; otherwise as [`gemv`].
#[inline(always)]
pub unsafe fn gemv_table<
    S: Simd,
    const BITS: usize,
    const ZEROS: bool,
    const ROUND: bool,
    const NP: usize,
    const MR: usize,
>(
    a: &F32Args,
) {
    // SAFETY: as the contract says.
    unsafe {
        let table = S::loadf(a.values);
        let mut f = [[S::splatf(0.0); MR]; NP];
        for p in 0..NP {
            for m in 0..MR {
                f[p][m] = S::loadf(a.c.add(m * a.ldc + p * 16));
            }
        }
        let per = 2 * BITS;
        let step = (a.padded.min(64) / 4).min(per);
        let mut s = [S::splatf(0.0); NP];
        let mut z = [S::splatf(0.0); NP];
        for b in 0..a.blocks {
            let w = a.bytes.add(b * 128 * BITS);
            fetch::<S, NP>(w, a.byte_stride, 128 * BITS, a.prefetch, a.blocks - b);
            macro_rules! part {
                ($t:expr) => {
                    if $t < 8 / BITS {
                        for r0 in (0..per).step_by(step) {
                            let place = b * 64 + 4 * ($t * per + r0);
                            if place % a.padded.min(64) == 0 {
                                let g = ((a.block0 * 64 + place) / a.padded).min(a.groups - 1);
                                for p in 0..NP {
                                    s[p] = scales::<S>(a.scales, p * a.scale_stride + g * 16);
                                    s[p] = S::mulf(s[p], S::splatf(a.tensor));
                                    if ZEROS {
                                        z[p] = S::cvt(S::load_u8(a.zeros.add(p * a.scale_stride + g * 16)));
                                    }
                                }
                            }
                            for r in r0..r0 + step {
                                let x = a.x.add(b * 64 + 4 * ($t * per + r));
                                for p in 0..NP {
                                    let v = S::load(w.add(p * a.byte_stride + 64 * r));
                                    for j in 0..4 {
                                        let v = S::lut16(table, S::shr32(v, 8 * j + $t * BITS));
                                        let v = if ZEROS { S::subf(v, z[p]) } else { v };
                                        let v = S::mulf(v, s[p]);
                                        let v = if ROUND { round_bf16::<S>(v) } else { v };
                                        for m in 0..MR {
                                            let x = S::splatf(*x.offset(m as isize * a.x_stride).add(j));
                                            f[p][m] = S::fma(x, v, f[p][m]);
                                        }
                                    }
                                }
                            }
                        }
                    }
                };
            }
            part!(0);
            part!(1);
            part!(2);
            part!(3);
            part!(4);
            part!(5);
            part!(6);
            part!(7);
        }
        for p in 0..NP {
            for m in 0..MR {
                S::storef(a.c.add(m * a.ldc + p * 16), f[p][m]);
            }
        }
    }
}

/// Expands unpacked bytes of one panel to f32 weights `[k][16]`.
///
/// # Safety
/// As [`gemv`]; `out` has `blocks*1024` floats.
#[inline(always)]
pub unsafe fn expand<S: Simd, const W: u8, const ROUND: bool>(a: &F32Args, out: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let step = a.padded.min(64) / 4;
        for b in 0..a.blocks {
            let mut g = (a.block0 + b) * 64 / a.padded;
            for r0 in (0..16).step_by(step) {
                let (s, z) = group::<S, W>(a, 0, g.min(a.groups - 1));
                g += 1;
                for r in r0..r0 + step {
                    let w = S::load(a.bytes.add(b * 1024 + 64 * r));
                    for j in 0..4 {
                        S::storef(out.add((b * 64 + 4 * r + j) * 16), weight::<S, W, ROUND>(w, j, z, s, a.values));
                    }
                }
            }
        }
    }
}

/// `c[m][16p..] += x[m][k] * w[p][k]`, sequential FMA over k.
///
/// # Safety
/// The pointers in `a` hold what [`GemmArgs`] says; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn gemm<S: Simd, const NP: usize, const MR: usize>(a: &GemmArgs) {
    // SAFETY: as the contract says.
    unsafe {
        let mut f = [[S::splatf(0.0); NP]; MR];
        for m in 0..MR {
            for p in 0..NP {
                f[m][p] = S::loadf(a.c.add(m * a.ldc + p * 16));
            }
        }
        for k in 0..a.k {
            let mut w = [S::splatf(0.0); NP];
            for p in 0..NP {
                w[p] = S::loadf(a.w.add(p * a.panel_stride + k * 16));
            }
            for m in 0..MR {
                let x = S::splatf(*a.x.add(k * MR + m));
                for p in 0..NP {
                    f[m][p] = S::fma(x, w[p], f[m][p]);
                }
            }
        }
        for m in 0..MR {
            for p in 0..NP {
                S::storef(a.c.add(m * a.ldc + p * 16), f[m][p]);
            }
        }
    }
}

/// Largest absolute value of `n` floats as its bits: above `0x7f80_0000 - 1` when any is not finite.
///
/// # Safety
/// `x` has `n` readable floats; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn absmax_bits<S: Simd>(x: *const f32, n: usize) -> u32 {
    // SAFETY: as the contract says.
    unsafe {
        let mask = S::splat(0x7fff_ffff);
        let mut top = [S::splat(0); 4];
        let mut i = 0;
        while i + 64 <= n {
            for t in 0..4 {
                top[t] = S::maxu(top[t], S::and(S::bits(S::loadf(x.add(i + 16 * t))), mask));
            }
            i += 64;
        }
        while i + 16 <= n {
            top[0] = S::maxu(top[0], S::and(S::bits(S::loadf(x.add(i))), mask));
            i += 16;
        }
        let mut best = S::top(S::maxu(S::maxu(top[0], top[1]), S::maxu(top[2], top[3])));
        while i < n {
            best = best.max((*x.add(i)).to_bits() & 0x7fff_ffff);
            i += 1;
        }
        best
    }
}

/// How groups of activations are quantised: by a product with the reciprocal of the scale, or by a division. Of quotients up to
/// 127 the product is off by less than 2^-16 and the division by 2^-17, so that both round alike where the product is not within
/// 2^-15 of a tie.
struct Divisors {
    scale: [f32; 16],
    /// 0 where the scale is, so that codes are too.
    inverse: [f32; 16],
    /// Groups whose reciprocals are too coarse.
    divide: [bool; 16],
}

impl Divisors {
    /// Scales `top / 127` of sixteen groups from the bits of their largest magnitudes: one division serves all.
    #[inline(always)]
    unsafe fn new<S: Simd>(top: &[u32; 16]) -> Self {
        // SAFETY: the caller's features.
        unsafe {
            let s = S::divf(S::from_bits(S::load(top.as_ptr().cast())), S::splatf(127.0));
            let mut d = Self { scale: [0.0; 16], inverse: [0.0; 16], divide: [false; 16] };
            S::storef(d.scale.as_mut_ptr(), s);
            S::storef(d.inverse.as_mut_ptr(), S::divf(S::splatf(1.0), s));
            for j in 0..16 {
                if d.scale[j] == 0.0 {
                    d.inverse[j] = 0.0;
                } else {
                    d.divide[j] = d.scale[j] < f32::MIN_POSITIVE * 4.0 || d.inverse[j] < f32::MIN_POSITIVE;
                }
            }
            d
        }
    }

    /// `clip(rint(x/s), -127, 127)` for `R` times 16 floats, those of group `j[i]`; false where a product does not decide all.
    #[inline(always)]
    unsafe fn quick<S: Simd, const R: usize>(&self, x: *const f32, j: [usize; R], out: &mut [S::I; R]) -> bool {
        // SAFETY: the caller's floats and features.
        unsafe {
            let (mut worst, mut divide) = (S::splatf(0.0), false);
            for i in 0..R {
                divide |= self.divide[j[i]];
                let t = S::mulf(S::loadf(x.add(16 * i)), S::splatf(self.inverse[j[i]]));
                out[i] = S::rint(t);
                worst = S::max_abs(worst, S::subf(t, S::cvt(out[i])));
            }
            !divide && !S::any_gt(worst, S::splatf(0.5 - 1.0 / 32768.0))
        }
    }

    /// The same by division.
    #[inline(always)]
    unsafe fn exact<S: Simd, const R: usize>(&self, x: *const f32, j: [usize; R], out: &mut [S::I; R]) {
        // SAFETY: the caller's floats and features.
        unsafe {
            for i in 0..R {
                let scale = self.scale[j[i]];
                out[i] = if scale == 0.0 {
                    S::splat(0)
                } else {
                    let t = S::divf(S::loadf(x.add(16 * i)), S::splatf(scale));
                    S::rint(S::maxf(S::minf(t, S::splatf(127.0)), S::splatf(-127.0)))
                };
            }
        }
    }

    #[inline(always)]
    unsafe fn codes<S: Simd, const R: usize>(&self, x: *const f32, j: [usize; R]) -> [S::I; R] {
        // SAFETY: the caller's floats and features.
        unsafe {
            let mut out = [S::splat(0); R];
            if !self.quick::<S, R>(x, j, &mut out) {
                self.exact::<S, R>(x, j, &mut out);
            }
            out
        }
    }
}

/// Sums of the codes of every so many blocks of 64, while they are made; none where nobody asks.
struct Sums<S: Simd> {
    sum: S::I,
    /// Blocks that `sum` holds.
    blocks: usize,
    out: *mut i32,
}

impl<S: Simd> Sums<S> {
    /// Takes in the codes of a block, the last one of its row or not.
    #[inline(always)]
    unsafe fn add(&mut self, codes: [S::I; 4], blocks: usize, last: bool) {
        if self.out.is_null() {
            return;
        }
        // SAFETY: the caller's features; a sum for every `blocks` blocks.
        unsafe {
            self.sum = S::add(self.sum, S::add(S::add(codes[0], codes[1]), S::add(codes[2], codes[3])));
            self.blocks += 1;
            if self.blocks == blocks || last {
                self.out.write(total::<S>(self.sum));
                *self = Self { sum: S::splat(0), blocks: 0, out: self.out.add(1) };
            }
        }
    }
}

/// Floats to quantise, and where what becomes of them goes.
#[derive(Debug, Clone, Copy)]
pub struct Quantise {
    /// The floats, readable up to the next multiple of 16.
    pub x: *const f32,
    /// How many.
    pub k: usize,
    /// How many share a scale: a multiple of 16, or all of them.
    pub group: usize,
    /// Bytes from `x` to floats that are asked for meanwhile, those of the row that comes next.
    pub ahead: usize,
    /// Bytes from `codes` to those of that row, asked for to be written.
    pub next: usize,
    /// A scale for each group, `absmax / 127`.
    pub scales: *mut f32,
    /// The codes, the last 64 whole.
    pub codes: *mut i8,
    /// Bytes from 64 codes to the next 64.
    pub stride: usize,
    /// The sum of the codes of every `blocks` times 64, or null.
    pub sums: *mut i32,
    /// See `sums`.
    pub blocks: usize,
}

impl Quantise {
    /// Asks for what belongs to 64 floats in the row that comes next.
    #[inline(always)]
    unsafe fn fetch<S: Simd>(&self, at: usize) {
        for line in 0..4 {
            // SAFETY: the caller's features; a prefetch may name any address.
            unsafe { S::prefetch(self.x.wrapping_add(at + 16 * line).cast::<u8>().wrapping_add(self.ahead)) };
        }
        if self.next > 0 {
            // SAFETY: likewise.
            unsafe { S::prefetch_write(self.codes.wrapping_add(at / 64 * self.stride + self.next).cast()) };
        }
    }
}

/// Quantises a row of floats by groups; codes of a group whose scale is 0 are 0. Returns false at the first group that is not
/// finite.
///
/// # Safety
/// The pointers in `a` hold what [`Quantise`] says; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn quantise_groups<S: Simd>(a: &Quantise) -> bool {
    // SAFETY: as the contract says.
    unsafe {
        let &Quantise { x, k, group, .. } = a;
        let mut sums = Sums::<S> { sum: S::splat(0), blocks: 0, out: a.sums };
        // Whole blocks are the rule: what holds for a whole group is not asked for each.
        let whole = group.is_multiple_of(64) || group >= k;
        // Sixteen groups at a time, whose largest values wait for nothing: they begin with a block of codes.
        for g0 in (0..k.div_ceil(group)).step_by(16) {
            let count = 16.min(k.div_ceil(group) - g0);
            let mut top = [0u32; 16];
            for (j, t) in top[..count].iter_mut().enumerate() {
                let at = (g0 + j) * group;
                *t = absmax_bits::<S>(x.add(at), group.min(k - at));
                if *t >= 0x7f80_0000 {
                    return false;
                }
            }
            let d = Divisors::new::<S>(&top);
            a.scales.add(g0).copy_from_nonoverlapping(d.scale.as_ptr(), count);
            let end = k.min((g0 + count) * group);
            let mut at = g0 * group;
            for j in 0..if whole { count } else { 0 } {
                let last = end.min((g0 + j + 1) * group);
                while at + 64 <= last {
                    a.fetch::<S>(at);
                    let codes = d.codes::<S, 4>(x.add(at), [j; 4]);
                    S::store_i8x4(a.codes.add(at / 64 * a.stride), codes);
                    sums.add(codes, a.blocks, at + 64 >= k);
                    at += 64;
                }
            }
            // The group of the next 16 floats, and how many of them it has left.
            let (mut j, mut left) = if whole { (count - 1, end - at) } else { (0, group) };
            while at < end {
                let mut of = [0; 4];
                for of in &mut of {
                    if left == 0 {
                        (j, left) = (j + 1, group);
                    }
                    *of = j;
                    left = left.saturating_sub(16);
                }
                a.fetch::<S>(at);
                let to = a.codes.add(at / 64 * a.stride);
                let mut codes = [S::splat(0); 4];
                if at + 64 <= end {
                    codes = d.codes::<S, 4>(x.add(at), of);
                    S::store_i8x4(to, codes);
                } else {
                    for i in 0..(end - at).div_ceil(16) {
                        codes[i] = d.codes::<S, 1>(x.add(at + 16 * i), [of[i]])[0];
                        S::store_i8(to.add(16 * i), codes[i]);
                    }
                }
                sums.add(codes, a.blocks, at + 64 >= k);
                at += 64;
            }
        }
        true
    }
}

/// The sum of the sixteen lanes.
#[inline(always)]
unsafe fn total<S: Simd>(v: S::I) -> i32 {
    let mut lanes = [0i32; 16];
    // SAFETY: the caller's features; the lanes are as wide as a register.
    unsafe { S::store(lanes.as_mut_ptr().cast(), v) };
    lanes.iter().fold(0, |t, &v| t.wrapping_add(v))
}

/// Sums of the codes of one 64-byte run per segment of `SEG` dwords (16 for the whole run).
///
/// # Safety
/// `q` has 64 readable bytes, `out` `16/seg` writable sums; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn code_sums<S: Simd>(q: *const i8, seg: usize, out: *mut i32) {
    // SAFETY: as the contract says.
    unsafe {
        let d = S::dot7(S::splat(0), S::splat8(1), S::load(q.cast()));
        let mut lanes = [0i32; 16];
        S::store(lanes.as_mut_ptr().cast(), d);
        for (i, part) in lanes.chunks(seg).enumerate() {
            *out.add(i) += part.iter().sum::<i32>();
        }
    }
}

/// Sum of the codes of `n` runs of 64 bytes, `stride` apart.
///
/// # Safety
/// The runs are readable; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn sum_blocks<S: Simd>(q: *const i8, stride: usize, n: usize) -> i32 {
    // SAFETY: as the contract says.
    unsafe {
        let one = S::splat8(1);
        let mut d = S::splat(0);
        for b in 0..n {
            d = S::dot7(d, one, S::load(q.add(b * stride).cast()));
        }
        total::<S>(d)
    }
}

/// What the epilogue needs to finish one row of a tile.
#[derive(Debug, Clone, Copy)]
pub struct Finish {
    /// Columns, up to a multiple of 16 (buffers are padded).
    pub cols: usize,
    /// Row scale of the activations (1 where it is already in the sums).
    pub act_scale: f32,
    /// Activation sum of the row (times the constant zero for constant formats).
    pub sum: i32,
    /// All ones where values are odd integers `2u - sub`.
    pub dbl: i32,
    /// `[cols]` bias or null.
    pub bias: *const f32,
    /// `[cols]` row scales.
    pub scales: *const f32,
    /// `[cols]` integer zeros or null.
    pub zeros: *const u8,
    /// `[cols]` float zeros or null.
    pub fzeros: *const f32,
}

/// Turns raw sums of one row into floats: `acc = f32(D)*s`, float zero, activation scale, bias.
///
/// # Safety
/// `c` and the arrays in `e` have `cols` elements rounded up to 16; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn finish_raw<S: Simd>(c: *const i32, out: *mut f32, e: &Finish) {
    // SAFETY: as the contract says.
    unsafe {
        let (dbl, sum) = (S::splat(e.dbl), S::splat(e.sum));
        for j in (0..e.cols).step_by(16) {
            let d = S::load(c.add(j).cast());
            let mut d = S::add(d, S::and(d, dbl));
            if !e.zeros.is_null() {
                d = S::sub(d, S::mul(S::load_u8(e.zeros.add(j)), sum));
            } else if e.fzeros.is_null() {
                d = S::sub(d, sum);
            }
            let s = S::loadf(e.scales.add(j));
            let mut f = S::fma(S::cvt(d), s, S::splatf(0.0));
            if !e.fzeros.is_null() {
                let sz = S::from_bits(S::xor_sign(S::bits(S::mulf(s, S::loadf(e.fzeros.add(j))))));
                f = S::fma(S::cvt(sum), sz, f);
            }
            f = S::mulf(f, S::splatf(e.act_scale));
            if !e.bias.is_null() {
                f = S::addf(f, S::loadf(e.bias.add(j)));
            }
            S::storef(out.add(j), f);
        }
    }
}

/// Finishes one row of float sums, in place or elsewhere: `out = c*act_scale + bias`.
///
/// # Safety
/// `c` and `out` have `cols` floats rounded up to 16, and so has the bias; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn finish_f32<S: Simd>(c: *const f32, out: *mut f32, e: &Finish) {
    // SAFETY: as the contract says.
    unsafe {
        let s = S::splatf(e.act_scale);
        for j in (0..e.cols).step_by(16) {
            let mut f = S::mulf(S::loadf(c.add(j)), s);
            if !e.bias.is_null() {
                f = S::addf(f, S::loadf(e.bias.add(j)));
            }
            S::storef(out.add(j), f);
        }
    }
}

/// Rounds `n` floats (a multiple of 16) to bfloat16 precision in place; NaN stays NaN.
///
/// # Safety
/// `x` has `n` floats; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn round_rows<S: Simd>(x: *mut f32, n: usize) {
    // SAFETY: as the contract says.
    unsafe {
        let top = S::from_bits(S::splat(0x7f80_0000 - 1));
        for i in (0..n).step_by(16) {
            let v = S::loadf(x.add(i));
            let mag = S::and(S::bits(v), S::splat(0x7fff_ffff));
            let big = S::maxu(mag, S::bits(top));
            // Rows with Inf or NaN are rare: lane by lane there.
            let mut lanes = [0u32; 16];
            S::store(lanes.as_mut_ptr().cast(), big);
            if lanes.iter().any(|&b| b >= 0x7f80_0000) {
                for t in 0..16 {
                    let v = *x.add(i + t);
                    if v.is_finite() {
                        *x.add(i + t) = half::bf16::from_f32(v).to_f32();
                    }
                }
            } else {
                S::storef(x.add(i), round_bf16::<S>(v));
            }
        }
    }
}
