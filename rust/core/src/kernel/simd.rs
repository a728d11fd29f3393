//! The vector operations that the generic kernels are written in. One implementation per ISA; each is a thin wrapper
//! of intrinsics, and the scalar one is their definition.
//!
//! A register is 64 bytes, seen as 16 lanes of i32 (four bytes each) or of f32: lane = row of a panel.

/// Vector operations of one ISA.
///
/// # Safety
/// Every method needs the ISA's CPU features; those with pointers need 64 readable (writable) bytes there unless they say
/// otherwise. No alignment is required.
#[allow(clippy::missing_safety_doc, missing_docs)]
pub unsafe trait Simd: 'static + Sized {
    /// 64 bytes of integers.
    type I: Copy;
    /// 16 lanes of f32.
    type F: Copy;

    /// Whether `dot` costs no more than `dot7`.
    const WIDE_DOT: bool = false;
    /// Whether `dot4` costs less than `dot7`.
    const SHORT: bool = false;

    unsafe fn load(p: *const u8) -> Self::I;
    unsafe fn store(p: *mut u8, v: Self::I) -> ();
    unsafe fn splat8(v: u8) -> Self::I;
    unsafe fn splat(v: i32) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Logical right shift of 16-bit lanes, `n < 8` and constant after inlining.
    unsafe fn shr(a: Self::I, n: usize) -> Self::I;
    /// Left shift of 16-bit lanes.
    unsafe fn shl(a: Self::I, n: usize) -> Self::I;
    unsafe fn add8(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sub8(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sub(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn mul(a: Self::I, b: Self::I) -> Self::I;
    /// Low halves of the products of 16-bit lanes.
    unsafe fn mul16(a: Self::I, b: Self::I) -> Self::I;
    /// High halves of the unsigned products of 16-bit lanes.
    unsafe fn mulhi16(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn add16(a: Self::I, b: Self::I) -> Self::I;
    /// Left shift of 16-bit lanes, `n < 16`, a constant after inlining where it matters.
    unsafe fn shl16(a: Self::I, n: usize) -> Self::I;
    /// Logical right shift of 16-bit lanes, likewise.
    unsafe fn shr16(a: Self::I, n: usize) -> Self::I;
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I;
    /// Unsigned maximum of 32-bit lanes.
    unsafe fn maxu(a: Self::I, b: Self::I) -> Self::I;
    /// The largest lane, unsigned.
    unsafe fn top(a: Self::I) -> u32;
    /// `acc + sum_j u[j]*s[j]` over the four bytes of each lane, u unsigned, s signed; exact for every byte.
    unsafe fn dot(acc: Self::I, u: Self::I, s: Self::I) -> Self::I;
    /// As `dot`, for u up to 127.
    unsafe fn dot7(acc: Self::I, u: Self::I, s: Self::I) -> Self::I;
    /// As `dot`, for u up to 15, the products of neighbours added in 16 bits: eight of these may follow each other before
    /// `widen`, since 8 * 2 * 15 * 128 < 2^15.
    #[inline(always)]
    unsafe fn dot4(acc: Self::I, u: Self::I, s: Self::I) -> Self::I {
        // SAFETY: the caller's features.
        unsafe { Self::dot7(acc, u, s) }
    }
    /// `acc` and the sums of `dot4`, which began at zero.
    #[inline(always)]
    unsafe fn widen(acc: Self::I, sums: Self::I) -> Self::I {
        // SAFETY: the caller's features.
        unsafe { Self::add(acc, sums) }
    }
    /// 16 bytes, zero-extended to lanes.
    unsafe fn load_u8(p: *const u8) -> Self::I;
    /// Lanes (each within i8) stored as 16 bytes.
    unsafe fn store_i8(p: *mut i8, v: Self::I) -> ();
    /// As `store_i8` for four registers, 64 bytes.
    unsafe fn store_i8x4(p: *mut i8, v: [Self::I; 4]) -> ();
    unsafe fn cvt(a: Self::I) -> Self::F;
    /// Round to nearest even.
    unsafe fn rint(a: Self::F) -> Self::I;
    /// Byte `j` of each lane as the float 2^23 + byte, exact.
    unsafe fn magic(a: Self::I, j: usize) -> Self::F;

    unsafe fn bits(a: Self::F) -> Self::I;
    unsafe fn from_bits(a: Self::I) -> Self::F;
    unsafe fn loadf(p: *const f32) -> Self::F;
    unsafe fn storef(p: *mut f32, v: Self::F) -> ();
    unsafe fn splatf(v: f32) -> Self::F;
    /// 16 binary16 numbers (32 bytes).
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// 16 bfloat16 numbers (32 bytes).
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn addf(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn subf(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mulf(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn divf(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn minf(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn maxf(a: Self::F, b: Self::F) -> Self::F;
    /// The greater of `a`, which is not negative, and the magnitude of `b`, neither of them NaN.
    #[inline(always)]
    unsafe fn max_abs(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the caller's features.
        unsafe { Self::maxf(a, Self::from_bits(Self::and(Self::bits(b), Self::splat(0x7fff_ffff)))) }
    }
    /// `a*b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// 32-bit logical right shift by 16, for rounding to bfloat16.
    unsafe fn shr32_16(a: Self::I) -> Self::I;
    /// 32-bit logical right shift, `n < 32` and constant after inlining.
    unsafe fn shr32(a: Self::I, n: usize) -> Self::I;
    /// 32-bit left shift, `n < 32` and constant after inlining.
    unsafe fn shl32(a: Self::I, n: usize) -> Self::I;
    /// 32-bit arithmetic right shift, `n < 32` and constant after inlining.
    unsafe fn sar(a: Self::I, n: usize) -> Self::I;
    /// `table[lane & 15]` for every lane.
    unsafe fn lut16(table: Self::F, lane: Self::I) -> Self::F;
    /// `table[lane & 63]` for every lane; 64 readable floats.
    unsafe fn lut64(table: *const f32, lane: Self::I) -> Self::F;
    /// `table[p[lane] & 63]` for 16 bytes whose bit 7 is the same as bit 5; 64 readable floats.
    #[inline(always)]
    unsafe fn look_up(table: *const f32, p: *const u8) -> Self::F {
        // SAFETY: the caller's features and pointers.
        unsafe { Self::lut64(table, Self::load_u8(p)) }
    }
    /// `table[lane]` for every lane, each within the table.
    unsafe fn gather(table: *const f32, lane: Self::I) -> Self::F;
    /// Two numbers in a row from `table[at[lane]]` on for every lane; each vector has one of them.
    unsafe fn pairs(table: *const f32, at: *const u16) -> [Self::F; 2];
    /// Four numbers in a row from `table[at[lane]]` on for every lane; each vector has one of them.
    unsafe fn quads(table: *const f32, at: *const u16) -> [Self::F; 4];
    /// As `quads`, the sums of the numbers from `at` and from `more` on.
    #[inline(always)]
    unsafe fn quad_sums(table: *const f32, at: *const u16, more: *const u16) -> [Self::F; 4] {
        // SAFETY: the caller's features and places.
        unsafe {
            let (a, b) = (Self::quads(table, at), Self::quads(table, more));
            [Self::addf(a[0], b[0]), Self::addf(a[1], b[1]), Self::addf(a[2], b[2]), Self::addf(a[3], b[3])]
        }
    }
    /// As `quads` with eight numbers; `SUMS`: as `quad_sums`.
    #[inline(always)]
    unsafe fn octets<const SUMS: bool>(table: *const f32, at: *const u16, more: *const u16) -> [Self::F; 8] {
        // SAFETY: the caller's features and places.
        unsafe {
            let high = table.add(4);
            let (a, b) = if SUMS {
                (Self::quad_sums(table, at, more), Self::quad_sums(high, at, more))
            } else {
                (Self::quads(table, at), Self::quads(high, at))
            };
            [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
        }
    }
    /// `now << n | next >> (16 - n)` in 16-bit lanes, `0 < n < 16`, a constant after inlining where it matters.
    #[inline(always)]
    unsafe fn funnel16(now: Self::I, next: Self::I, n: usize) -> Self::I {
        // SAFETY: the caller's features.
        unsafe { Self::or(Self::shl16(now, n), Self::shr16(next, 16 - n)) }
    }
    /// The numbers of the trellis code `3inst` of the states in the low and in the high halves of lanes, where there is a
    /// quick way.
    #[inline(always)]
    unsafe fn three_inst(_states: Self::I) -> Option<[Self::F; 2]> {
        None
    }
    /// The 64 bytes of a table, as `look64` wants them.
    #[inline(always)]
    unsafe fn table64(p: *const u8) -> [Self::I; 4] {
        // SAFETY: the caller's table.
        unsafe { super::generic::byte_table::<Self>(p) }
    }
    /// `table[u]` for every byte below 64 of `u`.
    #[inline(always)]
    unsafe fn look64(table: &[Self::I; 4], u: Self::I) -> Self::I {
        // SAFETY: the caller's features.
        unsafe { super::generic::look_up::<Self, false>(table, u) }
    }
    /// The low and the high halves of 32 magnitudes, as `look_halves` wants them.
    #[inline(always)]
    unsafe fn table_of_halves(p: *const u8) -> [Self::I; 4] {
        // SAFETY: the caller's table.
        unsafe { super::generic::byte_table::<Self>(p) }
    }
    /// Both halves of every byte below 64 of `u`, see [`super::generic::look_up_half`].
    #[inline(always)]
    unsafe fn look_halves(table: &[Self::I; 4], u: Self::I) -> [Self::I; 2] {
        // SAFETY: the caller's features.
        unsafe { super::generic::look_up_half::<Self>(table, u) }
    }
    /// Two rows of numbers as bfloat16, those of `odd` in the high halves of lanes.
    #[inline(always)]
    unsafe fn round_pairs(even: Self::F, odd: Self::F) -> Self::I {
        // SAFETY: the caller's features.
        unsafe {
            let (even, odd) = (super::generic::round_bf16::<Self>(even), super::generic::round_bf16::<Self>(odd));
            Self::or(Self::shr32_16(Self::bits(even)), Self::bits(odd))
        }
    }
    /// 16 bytes, four times.
    unsafe fn repeat16(p: *const u8) -> Self::I;
    /// `table[u]` for every byte below 16 of `u`, within each 16 bytes.
    unsafe fn shuffle(table: Self::I, u: Self::I) -> Self::I;
    /// The byte of `b` where the byte of `u` has the bit (16 or 32), else that of `a`.
    unsafe fn pick(u: Self::I, bit: u8, a: Self::I, b: Self::I) -> Self::I;
    /// Flips bit 31 of every lane.
    unsafe fn xor_sign(a: Self::I) -> Self::I;
    /// Whether any lane of `a` is above its lane of `b`.
    unsafe fn any_gt(a: Self::F, b: Self::F) -> bool;
    /// Fetches the cache line of `p` for reading soon.
    unsafe fn prefetch(p: *const u8) -> ();
    /// The same as far as the second-level cache.
    unsafe fn prefetch_l2(p: *const u8) -> ();
    /// Fetches the cache line of `p` for writing soon.
    unsafe fn prefetch_write(p: *const u8) -> ();
}

/// Writes the methods of a [`Simd`] implementation, one expression each.
macro_rules! ops {
    ($($name:ident($($a:ident: $t:ty),*) -> $r:ty = $e:expr;)*) => { $(
        #[inline(always)]
        unsafe fn $name($($a: $t),*) -> $r {
            // SAFETY: the trait's contract: the CPU has the features, and pointers are good for the access.
            #[allow(unused_unsafe)]
            unsafe { $e }
        }
    )* };
}
pub(crate) use ops;
