//! The kernels, written once over [`Expand`].
use super::{BitRaw, Fill, FloatColumns, FloatGemv, KeptGrouped, KeptRaw, LaneArgs, SlotGemv, Slots};
use crate::kernel::generic::scales;
use crate::kernel::simd::Simd;
use crate::pack::PANEL;
use crate::sparse::slots::{four_bytes, place_of, FOUR};

/// Spreads entries to where the bits of a mask are set.
///
/// # Safety
/// Methods need the CPU features of the implementation; pointers have 64 readable bytes.
#[allow(clippy::missing_safety_doc)]
pub unsafe trait Expand: 'static {
    /// The operations on registers.
    type S: Simd;
    /// The first bytes at `p` in the bytes whose bit is set, `fill` in the others.
    unsafe fn bytes(fill: <Self::S as Simd>::I, mask: u64, p: *const u8) -> <Self::S as Simd>::I;
    /// The same of codes of four bits, the lower half of a byte first.
    unsafe fn nibbles(fill: <Self::S as Simd>::I, mask: u64, p: *const u8) -> <Self::S as Simd>::I;
    /// The first numbers at `p` in the lanes whose bit is set, +0 in the others. 128 bytes are readable.
    unsafe fn lanes<T: Number>(mask: u16, p: *const u8) -> <Self::S as Simd>::F;
}

/// A type of stored numbers.
///
/// # Safety
/// 16 numbers are readable at `p`.
#[allow(clippy::missing_safety_doc)]
pub unsafe trait Number: 'static {
    /// Bytes of one.
    const SIZE: usize;
    /// 16 numbers.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident $size:literal $load:ident $t:ty;)*) => { $(
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name;
        // SAFETY: reads 16 numbers.
        unsafe impl Number for $name {
            const SIZE: usize = $size;
            #[inline(always)]
            unsafe fn load<S: Simd>(p: *const u8) -> S::F {
                // SAFETY: the caller's pointer; loads need no alignment.
                #[allow(clippy::cast_ptr_alignment)]
                unsafe { S::$load(p.cast::<$t>()) }
            }
        }
    )* };
}
numbers! {
    /// binary32
    F32 4 loadf f32;
    /// binary16
    F16 2 load_f16 u16;
    /// bfloat16
    BF16 2 load_bf16 u16;
}

/// Bytes of the masks of a block: 16 words of 64 bits over codes, or 64 of 16 over numbers.
pub const MASKS: usize = 128;

/// How far ahead of the kept tiles in use memory is asked for.
const AHEAD: usize = 4096;
/// The same of short blocks, bitmaps and slots of few numbers: what the hardware fetches by itself comes too late. On a Xeon a C
/// program of the loop over bitmaps takes 1.7 times as long without, and 1.08 times with [`AHEAD`] alone; on a Zen 4 slots of
/// 10 % of floats take 1.27 times as long with [`AHEAD`] alone.
pub const NEAR: usize = 2048;
/// And as far as the second-level cache.
pub const FAR: usize = 16384;
/// The same where a few blocks of one panel are followed by those of another, a line for each register: as above they take 1.5
/// times as long at 50 % kept (measured).
const FAR_AHEAD: usize = 8192;
/// Beginnings of slots ahead that are asked for: so few that the hardware does not see them as a stream.
const BASES_AHEAD: usize = 64;
/// The same for numbers.
pub const NUMBERS_AHEAD: usize = 4096;

/// Asks for the lines from `from` on that lie before `to`, `near` bytes later, and `far` bytes later, unless that is 0, as far as
/// the second-level cache.
#[inline(always)]
unsafe fn fetch<S: Simd>(from: *const u8, to: *const u8, near: usize, far: usize) {
    // Hidden, so that the loop is not unrolled: it has a few rounds, of another number in every block.
    let line = std::hint::black_box(64);
    let mut at = from;
    while at < to {
        // SAFETY: no access.
        unsafe {
            S::prefetch(at.wrapping_add(near));
            if far > 0 {
                S::prefetch_l2(at.wrapping_add(far));
            }
        }
        at = at.wrapping_add(line);
    }
}

/// One register of a block whose codes have `W` bits: the mask, and where its codes begin, which moves on.
#[inline(always)]
unsafe fn register<E: Expand, const W: usize>(
    fill: <E::S as Simd>::I,
    masks: *const u8,
    r: usize,
    codes: &mut *const u8,
) -> <E::S as Simd>::I {
    // SAFETY: the caller's block, and 64 readable bytes after it.
    unsafe {
        let mask = masks.add(8 * r).cast::<u64>().read_unaligned();
        let p = *codes;
        let count = mask.count_ones() as usize;
        *codes = p.add(if W == 4 { count.div_ceil(2) } else { count });
        if W == 4 {
            E::nibbles(fill, mask, p)
        } else {
            E::bytes(fill, mask, p)
        }
    }
}

/// What dropped codes of register `r` of block `b` are: `same` unless zeros are `STORED`. A choice at run time costs a
/// branch for each register (measured: 1.1 to 1.2 times the time).
#[inline(always)]
unsafe fn filler<S: Simd, const STORED: bool>(f: &Fill, same: S::I, b: usize, r: usize) -> S::I {
    // SAFETY: zeros have an entry for each group.
    unsafe {
        if !STORED {
            return same;
        }
        let g = (((f.block0 + b) * 64 + 4 * r) / f.padded).min(f.groups - 1);
        S::mul(S::load_u8(f.zeros.add(g * PANEL)), S::splat(0x0101_0101))
    }
}

/// Spreads `blocks` blocks to bytes `v = u + (u & dbl) - sub` (wrapping), in the order of registers.
///
/// # Safety
/// `src` holds the blocks and 64 bytes more, `out` 1024 bytes for each; the CPU has the features of `E`.
#[inline(always)]
pub unsafe fn expand<E: Expand, const W: usize>(src: *const u8, out: *mut u8, blocks: usize, f: &Fill) {
    // SAFETY: as the contract says.
    unsafe {
        if f.zeros.is_null() {
            expand_body::<E, W, false>(src, out, blocks, f);
        } else {
            expand_body::<E, W, true>(src, out, blocks, f);
        }
    }
}

#[inline(always)]
unsafe fn expand_body<E: Expand, const W: usize, const STORED: bool>(
    src: *const u8,
    out: *mut u8,
    blocks: usize,
    f: &Fill,
) {
    // SAFETY: as the caller says.
    unsafe {
        let (dbl, sub) = (E::S::splat8(f.dbl), E::S::splat8(f.sub));
        let same = E::S::splat8(f.code);
        let mut src = src;
        for b in 0..blocks {
            let mut codes = src.add(MASKS);
            for r in 0..16 {
                E::S::prefetch(codes.wrapping_add(FAR_AHEAD));
                let fill = filler::<E::S, STORED>(f, same, b, r);
                let u = register::<E, W>(fill, src, r, &mut codes);
                let v = E::S::sub8(E::S::add8(u, E::S::and(u, dbl)), sub);
                E::S::store(out.add(b * 1024 + 64 * r), v);
            }
            src = codes;
        }
    }
}

/// Ungrouped product with one panel: `c += sum u*a` over all blocks, dropped codes included.
///
/// # Safety
/// The pointers in `a` hold what [`BitRaw`] says, `src` 64 bytes more; the CPU has the features of `E`.
#[inline(always)]
pub unsafe fn raw<E: Expand, const W: usize, const MR: usize>(a: &BitRaw) {
    // SAFETY: as the contract says.
    unsafe {
        if a.fill.zeros.is_null() {
            raw_body::<E, W, MR, false>(a);
        } else {
            raw_body::<E, W, MR, true>(a);
        }
    }
}

#[inline(always)]
unsafe fn raw_body<E: Expand, const W: usize, const MR: usize, const STORED: bool>(a: &BitRaw) {
    // SAFETY: as the caller says.
    unsafe {
        // Four chains of sums hide the latency of the dot product.
        let mut acc = [[E::S::splat(0); 4]; MR];
        let same = E::S::splat8(a.fill.code);
        // Hidden, or all registers would be done at once: every mask and code loaded first, and spilled (measured: 1.3 to 1.6
        // times the time).
        let fours = std::hint::black_box(4);
        let mut src = a.src;
        for b in 0..a.blocks {
            let x = a.act.codes.add(b * a.act.block_stride);
            let mut codes = src.add(MASKS);
            for four in 0..fours {
                for i in 0..4 {
                    let r = 4 * four + i;
                    let fill = filler::<E::S, STORED>(&a.fill, same, b, r);
                    let u = register::<E, W>(fill, src, r, &mut codes);
                    for m in 0..MR {
                        let q = E::S::splat(x.add(64 * m + 4 * r).cast::<i32>().read_unaligned());
                        acc[m][i] = E::S::dot(acc[m][i], u, q);
                    }
                }
            }
            if a.prefetch {
                fetch::<E::S>(src, codes, NEAR, FAR);
            }
            src = codes;
        }
        for m in 0..MR {
            let c = a.c.add(m * a.ldc);
            let pairs = [E::S::add(acc[m][0], acc[m][1]), E::S::add(acc[m][2], acc[m][3])];
            let d = E::S::add(E::S::load(c.cast()), E::S::add(pairs[0], pairs[1]));
            E::S::store(c.cast(), d);
        }
    }
}

/// 64 activations of each row, as a kernel has them at hand.
#[repr(align(64))]
struct Near<const MR: usize>([[u8; 64]; MR]);

/// Product of the kept tiles of a panel, all of its K: `c = sum w*x`. Tiles are signed, so activations are made unsigned, `x + 128`;
/// 128 times the sum of a row's weights, known beforehand, goes off at last.
///
/// # Safety
/// The pointers in `a` hold what [`KeptRaw`] says; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn kept<S: Simd, const MR: usize>(a: &KeptRaw) {
    // SAFETY: as the contract says.
    unsafe {
        let top = S::splat8(128);
        // Four chains of sums at least hide the latency of the dot product.
        let mut acc = [[S::splat(0); 4]; MR];
        let mut x = Near([[0; 64]; MR]);
        for i in 0..a.count {
            let tile = a.tiles.add(1024 * i);
            if a.rows.prefetch {
                for line in (0..1024).step_by(64) {
                    S::prefetch(tile.wrapping_add(line + AHEAD));
                }
            }
            let codes = a.rows.act.codes.add(*a.index.add(i) as usize * a.rows.act.block_stride);
            for m in 0..MR {
                S::store(x.0[m].as_mut_ptr(), S::xor(S::load(codes.add(64 * m).cast()), top));
            }
            // Through memory, whose words are repeated as they are loaded; by shuffles in registers it takes 1.4 times as long
            // (measured).
            std::hint::black_box(&mut x);
            macro_rules! steps { ($($r:literal)*) => { $(
                let w = S::load(tile.add(64 * $r));
                for m in 0..MR {
                    let u = S::splat(x.0[m].as_ptr().add(4 * $r).cast::<i32>().read_unaligned());
                    let chain = if MR >= 4 { 0 } else { $r % 4 };
                    acc[m][chain] = S::dot(acc[m][chain], u, w);
                }
            )* } }
            steps!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        }
        let share = S::shl32(S::load(a.rows.sums.cast()), 7);
        for m in 0..MR {
            let pairs = [S::add(acc[m][0], acc[m][1]), S::add(acc[m][2], acc[m][3])];
            S::store(a.rows.c.add(m * a.rows.ldc).cast(), S::sub(S::add(pairs[0], pairs[1]), share));
        }
    }
}

/// As [`kept`] with a scale for each segment: from 0 on `c = fma(f32(sum), scale, c)` for those that keep anything, in order, where scale is
/// that of the weight's group, times that of the activations where groups of them have one. What the unsigned activations have too
/// much is 128 times the sum of a segment's weights, added up meanwhile.
///
/// # Safety
/// The pointers in `a` hold what [`KeptGrouped`] says; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn kept_grouped<S: Simd, const MR: usize>(a: &KeptGrouped) {
    // SAFETY: as the contract says.
    unsafe {
        if a.act.scales.is_null() {
            kept_grouped_body::<S, MR, false>(a);
        } else {
            kept_grouped_body::<S, MR, true>(a);
        }
    }
}

#[inline(always)]
unsafe fn kept_grouped_body<S: Simd, const MR: usize, const ACT: bool>(a: &KeptGrouped) {
    // SAFETY: as the caller says.
    unsafe {
        let (top, ones) = (S::splat8(128), S::splat8(1));
        let mut x = Near([[0; 64]; MR]);
        let mut f = [S::splatf(0.0); MR];
        let (mut acc, mut sum) = ([S::splat(0); MR], S::splat(0));
        let parts = (64 / a.len).max(1);
        for i in 0..a.count {
            let block = *a.index.add(i) as usize;
            let tile = a.tiles.add(1024 * i);
            let codes = a.act.codes.add(block * a.act.block_stride);
            for m in 0..MR {
                S::store(x.0[m].as_mut_ptr(), S::xor(S::load(codes.add(64 * m).cast()), top));
            }
            // As in `kept`.
            std::hint::black_box(&mut x);
            for part in 0..parts {
                for r in part * 16 / parts..(part + 1) * 16 / parts {
                    let w = S::load(tile.add(64 * r));
                    sum = S::dot7(sum, ones, w);
                    for m in 0..MR {
                        let u = S::splat(x.0[m].as_ptr().add(4 * r).cast::<i32>().read_unaligned());
                        acc[m] = S::dot(acc[m], u, w);
                    }
                }
                let segment = (64 * block + 64 / parts * part) / a.len;
                // It goes on in the next tile.
                if parts == 1 && i + 1 < a.count && *a.index.add(i + 1) as usize * 64 / a.len == segment {
                    continue;
                }
                let s = scales::<S>(a.scales, *a.group.add(segment) as usize * PANEL);
                let share = S::shl32(sum, 7);
                for m in 0..MR {
                    let s = if ACT { S::mulf(s, S::splatf(*a.act.scales.add(segment * a.act.rows + m))) } else { s };
                    f[m] = S::fma(S::cvt(S::sub(acc[m], share)), s, f[m]);
                    acc[m] = S::splat(0);
                }
                sum = S::splat(0);
            }
        }
        for m in 0..MR {
            S::storef(a.c.add(m * a.ldc), f[m]);
        }
    }
}

/// `c[m][16p..] = fma(x[m][k], w[k], c)` for k ascending; `ALL`: every number is stored, there are no masks.
///
/// # Safety
/// The pointers in `a` hold what [`FloatGemv`] says, each panel 128 bytes more; the CPU has the features of `E`.
#[inline(always)]
pub unsafe fn gemv<E: Expand, T: Number, const ALL: bool, const NP: usize, const MR: usize>(a: &FloatGemv) {
    // SAFETY: as the contract says.
    unsafe {
        let mut f = [[E::S::splatf(0.0); MR]; NP];
        let mut src = [std::ptr::null::<u8>(); NP];
        for p in 0..NP {
            src[p] = a.src[p];
            for m in 0..MR {
                f[p][m] = E::S::loadf(a.rows.c.add(m * a.rows.ldc + p * PANEL));
            }
        }
        for b in 0..a.blocks {
            let masks = src;
            if !ALL {
                for s in &mut src {
                    *s = s.add(MASKS);
                }
            }
            for k in 0..64 {
                for p in 0..NP {
                    let w = number::<E, T, ALL>(masks[p], k, a.ahead, &mut src[p]);
                    for m in 0..MR {
                        let x = E::S::splatf(*a.rows.x.offset(m as isize * a.rows.x_stride).add(b * 64 + k));
                        f[p][m] = E::S::fma(x, w, f[p][m]);
                    }
                }
            }
        }
        for p in 0..NP {
            for m in 0..MR {
                E::S::storef(a.rows.c.add(m * a.rows.ldc + p * PANEL), f[p][m]);
            }
        }
    }
}

/// The 16 numbers of column `k` of a block; memory is asked for `ahead` bytes ahead.
#[inline(always)]
unsafe fn number<E: Expand, T: Number, const ALL: bool>(
    masks: *const u8,
    k: usize,
    ahead: usize,
    src: &mut *const u8,
) -> <E::S as Simd>::F {
    // SAFETY: the caller's block.
    unsafe {
        let p = *src;
        E::S::prefetch(p.wrapping_add(ahead));
        if ALL {
            *src = p.add(16 * T::SIZE);
            return T::load::<E::S>(p);
        }
        let mask = masks.add(2 * k).cast::<u16>().read_unaligned();
        *src = p.add(T::SIZE * mask.count_ones() as usize);
        E::lanes::<T>(mask, p)
    }
}

/// As [`gemv`] with slots, for finite activations alone: dropped numbers are left out, but for those that fill a slot up. The 64
/// activations that four slots choose from are looked up in registers.
///
/// # Safety
/// The pointers in `a` hold what [`SlotGemv`] says; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn slots<S: Simd, T: Number, const MR: usize>(a: &SlotGemv) {
    // SAFETY: as the contract says.
    unsafe {
        let mut f = [S::splatf(0.0); MR];
        for m in 0..MR {
            f[m] = S::loadf(a.rows.c.add(m * a.rows.ldc));
        }
        let size = four_bytes(T::SIZE);
        let mut src = a.slots.src;
        for i in 0..a.slots.fours {
            let base = *a.slots.bases.add(i) as usize;
            S::prefetch(a.slots.bases.wrapping_add(i + BASES_AHEAD).cast());
            for line in (0..size).step_by(64) {
                if a.ahead > 0 {
                    S::prefetch(src.wrapping_add(line + a.ahead));
                }
                if a.far > 0 {
                    S::prefetch_l2(src.wrapping_add(line + a.far));
                }
            }
            for slot in 0..FOUR {
                let w = T::load::<S>(src.add(PANEL * (FOUR + slot * T::SIZE)));
                for m in 0..MR {
                    let x = a.rows.x.offset(m as isize * a.rows.x_stride).add(base);
                    f[m] = S::fma(S::look_up(x, src.add(PANEL * slot)), w, f[m]);
                }
            }
            src = src.add(size);
        }
        for m in 0..MR {
            S::storef(a.rows.c.add(m * a.rows.ldc), f[m]);
        }
    }
}

/// Lays slots out for [`lanes`]: `[slot][16]` places among activations `lanes` side by side, and numbers.
///
/// # Safety
/// `a` holds the slots, `places` and `numbers` have room for them; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn lay<S: Simd, T: Number>(a: &Slots, lanes: usize, places: *mut u32, numbers: *mut f32) {
    // SAFETY: as the contract says.
    unsafe {
        let (side, among) = (S::splat(lanes as i32), S::splat(63));
        let size = four_bytes(T::SIZE);
        for i in 0..a.fours {
            let (src, base) = (a.src.add(i * size), S::splat(*a.bases.add(i) as i32));
            for line in (0..size).step_by(64) {
                S::prefetch(src.wrapping_add(line + NUMBERS_AHEAD));
            }
            for slot in 0..FOUR {
                let at = S::add(S::and(S::load_u8(src.add(PANEL * slot)), among), base);
                S::store(places.add(PANEL * (FOUR * i + slot)).cast(), S::mul(at, side));
                let w = T::load::<S>(src.add(PANEL * (FOUR + slot * T::SIZE)));
                S::storef(numbers.add(PANEL * (FOUR * i + slot)), w);
            }
        }
    }
}

/// `c[n] = fma(number, x[place], c[n])` for the slots in order, `V` vectors of activations side by side, `N` rows of the panel at
/// a time.
///
/// # Safety
/// The pointers in `a` hold what [`LaneArgs`] says; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn lanes<S: Simd, const N: usize, const V: usize>(a: &LaneArgs) {
    // SAFETY: as the contract says.
    unsafe {
        for n0 in (0..PANEL).step_by(N) {
            let mut f = [[S::splatf(0.0); V]; N];
            for n in 0..N {
                for v in 0..V {
                    f[n][v] = S::loadf(a.c.add(((n0 + n) * V + v) * 16));
                }
            }
            for i in 0..a.slots {
                let (places, numbers) = (a.places.add(PANEL * i + n0), a.numbers.add(PANEL * i + n0));
                for n in 0..N {
                    let x = a.x.add(*places.add(n) as usize);
                    let w = S::splatf(*numbers.add(n));
                    for v in 0..V {
                        f[n][v] = S::fma(S::loadf(x.add(16 * v)), w, f[n][v]);
                    }
                }
            }
            for n in 0..N {
                for v in 0..V {
                    S::storef(a.c.add(((n0 + n) * V + v) * 16), f[n][v]);
                }
            }
        }
    }
}

/// Writes what slots keep of `blocks` blocks from place `from` on as f32 `[k][16]`, dropped numbers as 0.
///
/// # Safety
/// `a` holds the slots, `out` has room for 1024 floats a block; the CPU has the features of `S`.
#[inline(always)]
pub unsafe fn spread_slots<S: Simd, T: Number>(a: &Slots, from: usize, out: *mut f32, blocks: usize) {
    // SAFETY: as the contract says; places outside are left out.
    unsafe {
        for k in 0..64 * blocks {
            S::storef(out.add(k * PANEL), S::splatf(0.0));
        }
        let mut numbers = [0f32; PANEL];
        for i in 0..a.fours {
            let src = a.src.add(i * four_bytes(T::SIZE));
            let base = *a.bases.add(i) as usize;
            for slot in 0..FOUR {
                S::storef(numbers.as_mut_ptr(), T::load::<S>(src.add(PANEL * (FOUR + slot * T::SIZE))));
                for (n, v) in numbers.iter().enumerate() {
                    let Some(at) = place_of(*src.add(PANEL * slot + n)) else { continue };
                    let k = (base + at).wrapping_sub(from);
                    if k < 64 * blocks {
                        *out.add(k * PANEL + n) = *v;
                    }
                }
            }
        }
    }
}

/// Spreads `blocks` blocks to f32 `[k][16]`.
///
/// # Safety
/// `src` holds the blocks and 128 bytes more, `out` 1024 floats for each; the CPU has the features of `E`.
#[inline(always)]
pub unsafe fn floats<E: Expand, T: Number, const ALL: bool>(src: *const u8, out: *mut f32, blocks: usize) {
    // SAFETY: as the contract says.
    unsafe {
        let mut src = src;
        for b in 0..blocks {
            let masks = src;
            if !ALL {
                src = src.add(MASKS);
            }
            for k in 0..64 {
                E::S::storef(out.add((b * 64 + k) * 16), number::<E, T, ALL>(masks, k, NUMBERS_AHEAD, &mut src));
            }
        }
    }
}

/// `acc[n] += d * w[k][n]` for every `(k, d)` of the list and the first `len` bytes of a column; columns are `stride` apart.
///
/// # Safety
/// `w` has `len` bytes of every column of the list, `acc` as many sums.
#[inline(always)]
pub unsafe fn add_columns(w: *const u8, stride: usize, len: usize, list: &[(u32, i8)], acc: *mut i32) {
    // SAFETY: as the contract says.
    let acc = unsafe { std::slice::from_raw_parts_mut(acc, len) };
    // A stretch of sums stays in the first-level cache while the columns pass.
    for (i, part) in acc.chunks_mut(2048).enumerate() {
        for &(k, d) in list {
            // SAFETY: as above.
            let column = unsafe { std::slice::from_raw_parts(w.add(k as usize * stride + i * 2048), part.len()) };
            for (a, &u) in part.iter_mut().zip(column) {
                *a += i32::from(d) * i32::from(u);
            }
        }
    }
}

/// `acc[n] = fma(x, w[k][n], acc[n])` for every `(k, x)` of the list in order, with `w = fl((mul*u - zero) * scale)`.
///
/// # Safety
/// The pointers in `a` hold what [`FloatColumns`] says.
#[inline(always)]
pub unsafe fn add_float_columns(a: &FloatColumns, list: &[(u32, f32)]) {
    for at in (0..a.len).step_by(2048) {
        let len = 2048.min(a.len - at);
        // SAFETY: as the contract says.
        let acc = unsafe { std::slice::from_raw_parts_mut(a.acc.add(at), len) };
        // SAFETY: see above.
        let scales = unsafe { std::slice::from_raw_parts(a.scales.add(at), len) };
        for &(k, x) in list {
            // SAFETY: see above.
            let column = unsafe { std::slice::from_raw_parts(a.w.add(k as usize * a.stride + at), len) };
            if a.zeros.is_null() {
                for ((o, &u), &s) in acc.iter_mut().zip(column).zip(scales) {
                    *o = x.mul_add((a.mul * i32::from(u) - a.sub) as f32 * s, *o);
                }
            } else {
                // SAFETY: see above.
                let zeros = unsafe { std::slice::from_raw_parts(a.zeros.add(at), len) };
                for (((o, &u), &s), &z) in acc.iter_mut().zip(column).zip(scales).zip(zeros) {
                    *o = x.mul_add((a.mul * i32::from(u) - i32::from(z)) as f32 * s, *o);
                }
            }
        }
    }
}

/// The bytes of a filled register with entries put where bits are set: what the vector forms are held to.
#[inline(always)]
pub(super) fn spread(fill: &mut [u8; 64], mask: u64, entry: impl Fn(usize) -> u8) {
    let (mut rest, mut at) = (mask, 0);
    while rest != 0 {
        fill[rest.trailing_zeros() as usize] = entry(at);
        at += 1;
        rest &= rest - 1;
    }
}
