//! AMX int8 tiles: 32x32 outputs from 2x2 tiles of 16x16, 64 (or 32) values of K a step.
//!
//! A is the quantised activations in blocks of 16 rows x 64 k, B the decoded panel, whose registers are the rows of a B
//! tile. Within a group the sums stay in tiles; at its end they go through a small buffer to float accumulators, while
//! the tiles already work on the next group. Tiles of bf16 do the same with integer codes, which are exact there, so that
//! weights lose nothing to rounding and decoding is a look-up.
//!
//! Every loop writes as few tile registers as it can, and writes each again as soon as its last product is issued. By what was
//! measured (`docs/performance.md`, `benches/probes/tiles.c`), the two threads of a core share the registers that tiles are renamed
//! to, all of those that either has written since it configured its tiles stay taken, and the rest is what loads run ahead with.
use super::avx512::Avx512Vnni as V;
use crate::kernel::generic::{
    self, group, regs, weight, Unpack, W_FLOAT, W_MUL1, W_MUL2, W_TABLE16, W_TABLE256, W_TABLE64,
};
use crate::kernel::generic::{U1, U2, U3, U4, U5, U8};
use crate::kernel::simd::Simd;
use crate::kernel::{ActRows, F32Args, ScalePtr};
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Tile configuration (palette 1): C 16x64 bytes, A 16 x `k` bytes, B `k/4` x 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    colsb: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    const fn new(k: u16) -> Self {
        let mut c = Self { palette: 1, start_row: 0, reserved: [0; 14], colsb: [0; 16], rows: [0; 16] };
        let mut t = 0;
        while t < 8 {
            c.colsb[t] = if t == 4 || t == 5 { k } else { 64 };
            c.rows[t] = if t >= 6 { (k / 4) as u8 } else { 16 };
            t += 1;
        }
        c
    }
}

static CONFIG64: Config = Config::new(64);
static CONFIG32: Config = Config::new(32);
static CONFIG16: Config = Config::new(16);

/// Holds the tile configuration of this thread; releases it when dropped, which leaves the tile state clean.
pub struct Tiles(());

impl Tiles {
    /// Configures tiles for steps of `k` = 64, 32 or 16.
    ///
    /// # Safety
    /// The process has AMX permission.
    pub unsafe fn new(k: usize) -> Self {
        let c = match k {
            16 => &CONFIG16,
            32 => &CONFIG32,
            _ => &CONFIG64,
        };
        // SAFETY: the 64-byte configuration is valid; the operand is declared as the whole structure by the pointer and
        // the absence of `nomem`.
        unsafe { asm!("ldtilecfg [{}]", in(reg) c, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles were configured by `new` on this thread (the type is not Send through its raw use in one task).
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Arguments of a grouped tile product: rows of activations by two panels, over a window of K.
#[derive(Debug, Clone, Copy)]
pub struct TileGrp {
    /// First step of the first 16 rows: steps are 1 KiB each.
    pub a: *const i8,
    /// Bytes to the next 16 rows.
    pub a_stride: usize,
    /// Rows of activations.
    pub rows: usize,
    /// Decoded panels, 1 KiB a step.
    pub b: [*const u8; 2],
    /// Steps of K: 64 places of int8 or 32 of bf16.
    pub steps: usize,
    /// Steps of a segment (0: half a step).
    pub seg_steps: usize,
    /// Segments of a step, 2 or 4, where `seg_steps` is 0.
    pub parts: usize,
    /// First segment.
    pub seg0: usize,
    /// Group of each segment.
    pub seg_group: *const u32,
    /// Scales of the two panels.
    pub scales: [ScalePtr; 2],
    /// Integer zeros of the two panels or null.
    pub zeros: [*const u8; 2],
    /// Float zeros of the two panels or null.
    pub fzeros: [*const f32; 2],
    /// Sums and scales of the first 16 rows (`codes` unused).
    pub act: ActRows,
    /// Sums, or scales, to those of the next 16 rows.
    pub act_stride: usize,
    /// Float sums `[m][ldc]`, read and written; whole tiles of rows.
    pub c: *mut f32,
    /// Row stride of `c`.
    pub ldc: usize,
    /// All ones where values are `2u - sub`.
    pub dbl: i32,
}

impl TileGrp {
    /// Sums and scales of the rows from `m` on, a multiple of 16.
    #[inline(always)]
    pub(super) fn act_at(&self, m: usize) -> ActRows {
        let by = m / 16 * self.act_stride;
        ActRows { sums: self.act.sums.wrapping_add(by), scales: self.act.scales.wrapping_add(by), ..self.act }
    }
}

/// What a product fetches into the first-level cache for products to come, a tile for each that it loads. A load of a tile
/// that misses there holds up all that follow it; a fetch costs next to nothing.
#[derive(Debug, Clone, Copy)]
pub enum Ahead {
    /// Activations so many bytes on (0: they are there); panels are there.
    Rows(isize),
    /// Both operands, two steps on.
    Both,
    /// As `Both`, and into the second-level cache 1 KiB a step from here on.
    Panels(*const u8),
    /// The same by 256 bytes a step.
    PanelsSlowly(*const u8),
}

/// Bytes from the activations of rows `m..m + 32` to those that are multiplied next by the same panels, the first rows after
/// the last; `stride` bytes lie between 16 rows. 0 where all rows stay close.
#[inline(always)]
pub fn rows_ahead(m: usize, rows: usize, stride: usize) -> isize {
    let next = if m + 32 < rows { m + 32 } else { 0 };
    (next as isize - m as isize) / 16 * stride as isize
}

/// Memory for `N` sums on their way from tiles to registers, not initialised.
#[repr(align(64))]
pub(crate) struct Ring<const N: usize>(MaybeUninit<[i32; N]>);

impl<const N: usize> Ring<N> {
    #[inline(always)]
    pub(crate) const fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    #[inline(always)]
    pub(crate) fn as_mut_ptr(&mut self) -> *mut i32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Fetches the tile at an address, 16 lines.
macro_rules! fetch {
    ($at:literal) => {
        concat!(fetch!($at, 0, 64, 128, 192, 256, 320, 384, 448), fetch!($at, 512, 576, 640, 704, 768, 832, 896, 960))
    };
    ($at:literal, $($line:literal),*) => {
        concat!($("prefetcht0 [", $at, " + ", $line, "]\n"),*)
    };
}

/// Fetches 256 bytes into the second-level cache.
macro_rules! fetch_far {
    ($at:literal) => {
        fetch_far!($at, 0, 64, 128, 192)
    };
    ($at:literal, $($line:literal),*) => {
        concat!($("prefetcht1 [", $at, " + ", $line, "]\n"),*)
    };
}

pub(crate) use fetch_far;

/// Asm of a pass over `n` steps of K, 1 KiB of each operand tile a step: 2x2 tiles of sums, or 1x2. What comes before the
/// loop and after it, what is fetched after the first and the last load of activations, and the operands of that, are given.
macro_rules! tile_loop {
    (2, $dp:literal, [$($first:expr),*], [$($last:literal),*], [$fetch0:expr, $fetch1:expr], $a0:expr, $a1:expr, $b0:expr, $b1:expr, $n:expr, $($more:tt)*) => {
        asm!(
            $($first,)*
            "2:",
            "tileloadd tmm6, [{b0} + {s}]",
            "tileloadd tmm4, [{a0} + {s}]",
            $fetch0,
            concat!($dp, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{b1} + {s}]",
            concat!($dp, " tmm1, tmm4, tmm7"),
            "tileloadd tmm4, [{a1} + {s}]",
            $fetch1,
            concat!($dp, " tmm2, tmm4, tmm6"),
            concat!($dp, " tmm3, tmm4, tmm7"),
            "add {a0}, 1024", "add {a1}, 1024", "add {b0}, 1024", "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            $($last,)*
            a0 = inout(reg) $a0 => _, a1 = inout(reg) $a1 => _,
            b0 = inout(reg) $b0 => _, b1 = inout(reg) $b1 => _,
            n = inout(reg) $n => _, s = in(reg) 64usize, $($more)*,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
    (1, $dp:literal, [$($first:expr),*], [$($last:literal),*], [$fetch0:expr, $fetch1:expr], $a0:expr, $a1:expr, $b0:expr, $b1:expr, $n:expr, $($more:tt)*) => {
        asm!(
            $($first,)*
            "2:",
            "tileloadd tmm6, [{b0} + {s}]",
            "tileloadd tmm4, [{a0} + {s}]",
            $fetch0,
            concat!($dp, " tmm0, tmm4, tmm6"),
            "tileloadd tmm6, [{b1} + {s}]",
            $fetch1,
            concat!($dp, " tmm1, tmm4, tmm6"),
            "add {a0}, 1024", "add {b0}, 1024", "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            $($last,)*
            a0 = inout(reg) $a0 => _,
            b0 = inout(reg) $b0 => _, b1 = inout(reg) $b1 => _,
            n = inout(reg) $n => _, s = in(reg) 64usize, $($more)*,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _,
            options(nostack),
        )
    };
}

/// Sums from nothing, stored 1 KiB each.
macro_rules! fresh {
    (2, $dp:literal, $fetch:tt, $a0:expr, $a1:expr, $b0:expr, $b1:expr, $n:expr, $out:expr, $($more:tt)*) => {
        tile_loop!(
            2, $dp,
            ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
            ["tilestored [{o} + {s}], tmm0", "tilestored [{o} + {s} + 1024], tmm1",
             "tilestored [{o} + {s} + 2048], tmm2", "tilestored [{o} + {s} + 3072], tmm3"],
            $fetch, $a0, $a1, $b0, $b1, $n, o = in(reg) $out $($more)*
        )
    };
    (1, $dp:literal, $fetch:tt, $a0:expr, $a1:expr, $b0:expr, $b1:expr, $n:expr, $out:expr, $($more:tt)*) => {
        tile_loop!(
            1, $dp,
            ["tilezero tmm0", "tilezero tmm1"],
            ["tilestored [{o} + {s}], tmm0", "tilestored [{o} + {s} + 1024], tmm1"],
            $fetch, $a0, $a1, $b0, $b1, $n, o = in(reg) $out $($more)*
        )
    };
}

/// How sums of `c` begin: at 0, or as they are there.
macro_rules! begin {
    (1, zero) => {
        "tilezero tmm0\ntilezero tmm1"
    };
    (2, zero) => {
        "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3"
    };
    (1, load) => {
        "tileloadd tmm0, [{c0} + {t}]\ntileloadd tmm1, [{c0} + {t} + 64]"
    };
    (2, load) => {
        concat!(begin!(1, load), "\ntileloadd tmm2, [{c2} + {t}]\ntileloadd tmm3, [{c2} + {t} + 64]")
    };
}

/// Sums written to `c`, which begin at 0 or as they are there; one row of tiles where `a1` is null.
macro_rules! accumulate {
    ($dp:literal, $fresh:expr, $ahead:expr, $a0:expr, $a1:expr, $b:expr, $n:expr, $c:expr, $ldc:expr) => {
        if $fresh {
            accumulate!(zero, $dp, $ahead, $a0, $a1, $b, $n, $c, $ldc)
        } else {
            accumulate!(load, $dp, $ahead, $a0, $a1, $b, $n, $c, $ldc)
        }
    };
    ($begin:ident, $dp:literal, $ahead:expr, $a0:expr, $a1:expr, $b:expr, $n:expr, $c:expr, $ldc:expr) => {
        match ($a1.is_null(), $ahead) {
            (true, Ahead::Rows(_)) => accumulate!(1, $begin, $dp, ["", ""], $a0, $a1, $b, $n, $c, $ldc,),
            (true, _) => accumulate!(
                1, $begin, $dp, [concat!(fetch!("{a0} + 2048"), fetch!("{b0} + 2048")), fetch!("{b1} + 2048")],
                $a0, $a1, $b, $n, $c, $ldc,
            ),
            (false, Ahead::Rows(0)) => accumulate!(2, $begin, $dp, ["", ""], $a0, $a1, $b, $n, $c, $ldc,),
            (false, Ahead::Rows(d)) => accumulate!(
                2, $begin, $dp, [fetch!("{a0} + {d}"), fetch!("{a1} + {d}")],
                $a0, $a1, $b, $n, $c, $ldc, , d = in(reg) d
            ),
            (false, Ahead::Both) => accumulate!(
                2, $begin, $dp,
                [concat!(fetch!("{a0} + 2048"), fetch!("{b0} + 2048")),
                 concat!(fetch!("{a1} + 2048"), fetch!("{b1} + 2048"))],
                $a0, $a1, $b, $n, $c, $ldc,
            ),
            (false, Ahead::Panels(next)) => accumulate!(
                2, $begin, $dp,
                [concat!(fetch!("{a0} + 2048"), fetch!("{b0} + 2048"),
                         fetch_far!("{f}"), fetch_far!("{f} + 256")),
                 concat!(fetch!("{a1} + 2048"), fetch!("{b1} + 2048"),
                         fetch_far!("{f} + 512"), fetch_far!("{f} + 768"), "add {f}, 1024")],
                $a0, $a1, $b, $n, $c, $ldc, , f = inout(reg) next => _
            ),
            (false, Ahead::PanelsSlowly(next)) => accumulate!(
                2, $begin, $dp,
                [concat!(fetch!("{a0} + 2048"), fetch!("{b0} + 2048"), fetch_far!("{f}"), "add {f}, 256"),
                 concat!(fetch!("{a1} + 2048"), fetch!("{b1} + 2048"))],
                $a0, $a1, $b, $n, $c, $ldc, , f = inout(reg) next => _
            ),
        }
    };
    (1, $begin:ident, $dp:literal, $fetch:tt, $a0:expr, $a1:expr, $b:expr, $n:expr, $c:expr, $ldc:expr, $($more:tt)*) => {
        tile_loop!(
            1, $dp,
            [begin!(1, $begin)],
            ["tilestored [{c0} + {t}], tmm0", "tilestored [{c0} + {t} + 64], tmm1"],
            $fetch, $a0, $a1, $b[0], $b[1], $n, c0 = in(reg) $c, t = in(reg) $ldc * 4 $($more)*
        )
    };
    (2, $begin:ident, $dp:literal, $fetch:tt, $a0:expr, $a1:expr, $b:expr, $n:expr, $c:expr, $ldc:expr, $($more:tt)*) => {
        tile_loop!(
            2, $dp,
            [begin!(2, $begin)],
            ["tilestored [{c0} + {t}], tmm0", "tilestored [{c0} + {t} + 64], tmm1",
             "tilestored [{c2} + {t}], tmm2", "tilestored [{c2} + {t} + 64], tmm3"],
            $fetch, $a0, $a1, $b[0], $b[1], $n,
            c0 = in(reg) $c, c2 = in(reg) $c.wrapping_add(16 * $ldc), t = in(reg) $ldc * 4 $($more)*
        )
    };
}

/// Tiles of B hold signed values: sums are those of the values.
const SIGNED: u8 = 0;
/// Tiles of B hold unsigned codes: the zero is taken off when a segment ends.
const UNSIGNED: u8 = 1;
/// Tiles hold bfloat16: sums are float32.
const FLOAT: u8 = 2;

/// Multiplies `n` steps into `out` (tiles row-block major, 1 KiB each), and fetches activations `ahead` bytes on.
#[inline(always)]
unsafe fn steps<const MT: usize, const KIND: u8>(
    a: [*const i8; 2],
    b: [*const u8; 2],
    n: usize,
    ahead: isize,
    out: *mut i32,
) {
    macro_rules! run {
        ($dp:literal) => {
            if MT == 1 {
                fresh!(1, $dp, ["", ""], a[0], a[1], b[0], b[1], n, out,)
            } else if ahead == 0 {
                fresh!(2, $dp, ["", ""], a[0], a[1], b[0], b[1], n, out,)
            } else {
                fresh!(
                    2, $dp, [fetch!("{a0} + {d}"), fetch!("{a1} + {d}")],
                    a[0], a[1], b[0], b[1], n, out, , d = in(reg) ahead
                )
            }
        };
    }
    // SAFETY: the caller's pointers hold n steps; tiles are configured.
    unsafe {
        match KIND {
            SIGNED => run!("tdpbssd"),
            UNSIGNED => run!("tdpbsud"),
            _ => run!("tdpbf16ps"),
        }
    }
}

/// Adds the tiles of `S` segments that follow each other to the float sums, which are fetched and stored once: of 16 rows, or 32,
/// from `m` on.
#[inline(always)]
unsafe fn flush<const MT: usize, const KIND: u8, const S: usize>(
    a: &TileGrp,
    m: usize,
    seg: usize,
    panels: &[Segment; S],
    tiles: *const i32,
) {
    // SAFETY: the caller's arguments; tiles hold MT*2 KiB for each segment, 4 KiB apart.
    unsafe {
        let dbl = V::splat(a.dbl);
        let act_groups = !a.act.scales.is_null();
        let float_zeros = !a.fzeros[0].is_null();
        for t in 0..MT {
            let act = a.act_at(m + 16 * t);
            for r in 0..16 {
                let c = a.c.add((m + t * 16 + r) * a.ldc);
                let mut f = [V::loadf(c), V::loadf(c.add(16))];
                for (s, panels) in panels.iter().enumerate() {
                    let at = (seg + s) * act.rows + r;
                    let row = if act_groups { V::splatf(*act.scales.add(at)) } else { V::splatf(1.0) };
                    let sum = if KIND == UNSIGNED { V::splat(*act.sums.add(at)) } else { V::splat(0) };
                    for p in 0..2 {
                        let d = V::load(tiles.add(s * 1024 + (t * 2 + p) * 256 + r * 16).cast());
                        let scale = if act_groups { V::mulf(panels.scales[p], row) } else { panels.scales[p] };
                        f[p] = if KIND == FLOAT {
                            V::fma(V::from_bits(d), scale, f[p])
                        } else if KIND == SIGNED {
                            V::fma(V::cvt(d), scale, f[p])
                        } else {
                            let d = V::add(d, V::and(d, dbl));
                            if float_zeros {
                                let f = V::fma(V::cvt(d), scale, f[p]);
                                let zero = V::mulf(scale, panels.float_zeros[p]);
                                V::fma(V::cvt(sum), V::from_bits(V::xor_sign(V::bits(zero))), f)
                            } else {
                                V::fma(V::cvt(V::sub(d, V::mul(panels.zeros[p], sum))), scale, f[p])
                            }
                        };
                    }
                }
                V::storef(c, f[0]);
                V::storef(c.add(16), f[1]);
            }
        }
    }
}

/// What a segment's sums are multiplied with, for two panels.
#[derive(Clone, Copy)]
struct Segment {
    scales: [__m512; 2],
    zeros: [__m512i; 2],
    float_zeros: [__m512; 2],
}

impl Segment {
    #[inline(always)]
    unsafe fn new<const KIND: u8>(a: &TileGrp, seg: usize) -> Self {
        // SAFETY: the caller's arguments; zeros that are not null have 16 numbers for each group.
        unsafe {
            let g = *a.seg_group.add(seg) as usize * 16;
            let mut s = Self { scales: [V::splatf(0.0); 2], zeros: [V::splat(1); 2], float_zeros: [V::splatf(0.0); 2] };
            for p in 0..2 {
                s.scales[p] = generic::scales::<V>(a.scales[p], g);
                if KIND == UNSIGNED && !a.zeros[0].is_null() {
                    s.zeros[p] = V::load_u8(a.zeros[p].add(g));
                }
                if KIND == UNSIGNED && !a.fzeros[0].is_null() {
                    s.float_zeros[p] = V::loadf(a.fzeros[p].add(g));
                }
            }
            s
        }
    }
}

/// `S` segments from segment `i` of the window on: all rows, 32 at a time, then 16.
#[inline(always)]
unsafe fn segments<const KIND: u8, const S: usize>(a: &TileGrp, i: usize, tiles: *mut i32) {
    // SAFETY: as the caller says; tiles hold 4 KiB for each segment.
    unsafe {
        let mut panels = [Segment::new::<KIND>(a, a.seg0 + i); S];
        for (s, panels) in panels.iter_mut().enumerate().skip(1) {
            *panels = Segment::new::<KIND>(a, a.seg0 + i + s);
        }
        let mut m = 0;
        while m < a.rows {
            let rows = a.a.add(m / 16 * a.a_stride);
            let two = m + 16 < a.rows;
            let next = rows_ahead(m, a.rows, a.a_stride);
            for s in 0..S {
                let i = i + s;
                // Offsets of a segment: whole steps, or parts of one (A: so many bytes into each row, B: rows on).
                let (ao, bo, n) = if a.seg_steps == 0 {
                    ((i / a.parts) * 1024 + (i % a.parts) * (64 / a.parts), i * (1024 / a.parts), 1)
                } else {
                    (i * a.seg_steps * 1024, i * a.seg_steps * 1024, a.seg_steps.min(a.steps - i * a.seg_steps))
                };
                let x = rows.add(ao);
                let b = a.b.map(|b| b.add(bo));
                if two {
                    // A step's rows are fetched with its first part.
                    let ahead = if a.seg_steps == 0 && !i.is_multiple_of(a.parts) { 0 } else { next };
                    steps::<2, KIND>([x, x.add(a.a_stride)], b, n, ahead, tiles.add(s * 1024));
                } else {
                    steps::<1, KIND>([x, x], b, n, 0, tiles.add(s * 1024));
                }
            }
            if two {
                flush::<2, KIND, S>(a, m, a.seg0 + i, &panels, tiles);
            } else {
                flush::<1, KIND, S>(a, m, a.seg0 + i, &panels, tiles);
            }
            m += 32;
        }
    }
}

#[inline(always)]
unsafe fn grouped_body<const KIND: u8>(a: &TileGrp) {
    // SAFETY: as the caller says.
    unsafe {
        let mut tiles = Ring::<2048>::new();
        let tiles = tiles.as_mut_ptr();
        let count = if a.seg_steps == 0 { a.steps * a.parts } else { a.steps.div_ceil(a.seg_steps) };
        for i in (0..count / 2 * 2).step_by(2) {
            segments::<KIND, 2>(a, i, tiles);
        }
        if count % 2 == 1 {
            segments::<KIND, 1>(a, count - 1, tiles);
        }
    }
}

/// Float sums of 16 rows of activations by one panel, in registers.
pub(crate) struct RowSums(pub(super) [__m512; 16]);

impl RowSums {
    /// All 0.
    #[inline(always)]
    pub(crate) unsafe fn zero() -> Self {
        // SAFETY: the caller has the features.
        unsafe { Self([V::splatf(0.0); 16]) }
    }

    /// Reads them from rows `ldc` apart.
    #[inline(always)]
    pub(crate) unsafe fn load(c: *const f32, ldc: usize) -> Self {
        // SAFETY: the caller has the features, `c` 16 rows.
        unsafe {
            let mut f = [V::splatf(0.0); 16];
            for (r, f) in f.iter_mut().enumerate() {
                *f = V::loadf(c.add(r * ldc));
            }
            Self(f)
        }
    }

    /// Adds the integer sums of a segment times a scale for each column: those of a group of the panel, and, with `ACT`, a scale for
    /// each row.
    #[inline(always)]
    pub(crate) unsafe fn add<const ACT: bool>(
        &mut self,
        sums: *const i32,
        scales: ScalePtr,
        group: u32,
        rows: *const f32,
    ) {
        // SAFETY: the caller has the features, 16 rows of sums side by side, the group its scales.
        unsafe {
            let s = generic::scales::<V>(scales, group as usize * 16);
            for (r, f) in self.0.iter_mut().enumerate() {
                let s = if ACT { V::mulf(s, V::splatf(*rows.add(r))) } else { s };
                *f = V::fma(V::cvt(V::load(sums.add(r * 16).cast())), s, *f);
            }
        }
    }

    /// Writes them to rows `ldc` apart.
    #[inline(always)]
    pub(crate) unsafe fn store(&self, c: *mut f32, ldc: usize) {
        for (r, f) in self.0.iter().enumerate() {
            // SAFETY: as for `load`.
            unsafe { V::storef(c.add(r * ldc), *f) };
        }
    }
}

/// 16 rows from `m` on by one panel of signed values whose segments are one product each (64 places or fewer). What bounds these
/// is the way of the sums, not the products: float sums stay in registers all the way, and take a segment's sums from a ring
/// two segments after its product was begun.
#[inline(always)]
unsafe fn short_body<const ACT: bool>(a: &TileGrp, m: usize) {
    // SAFETY: the caller's arguments; tiles are configured for a segment.
    unsafe {
        let mut ring = Ring::<1024>::new();
        let ring = ring.as_mut_ptr();
        let count = a.steps * a.parts;
        let shift = a.parts.trailing_zeros();
        let (x, act, c) = (a.a.add(m / 16 * a.a_stride), a.act_at(m), a.c.add(m * a.ldc));
        let mut f = RowSums::load(c, a.ldc);
        for i in 0..count + 2 {
            if i < count {
                let (step, part) = (i >> shift, i & (a.parts - 1));
                asm!(
                    "tilezero tmm0",
                    "tileloadd tmm6, [{b} + {s}]",
                    "tileloadd tmm4, [{a} + {s}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tilestored [{o} + {s}], tmm0",
                    a = in(reg) x.add(step * 1024 + ((part * 64) >> shift)),
                    b = in(reg) a.b[0].add((i * 1024) >> shift),
                    o = in(reg) ring.add(i % 4 * 256), s = in(reg) 64usize,
                    out("tmm0") _, out("tmm4") _, out("tmm6") _,
                    options(nostack),
                );
            }
            if i >= 2 {
                let seg = a.seg0 + i - 2;
                let rows = act.scales.wrapping_add(seg * act.rows);
                f.add::<ACT>(ring.add((i - 2) % 4 * 256), a.scales[0], *a.seg_group.add(seg), rows);
            }
        }
        f.store(c, a.ldc);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn short_entry<const ACT: bool>(a: &TileGrp) {
    for m in (0..a.rows).step_by(16) {
        // SAFETY: as the caller says.
        unsafe { short_body::<ACT>(a, m) }
    }
}

/// The kernel of a [`TileGrp`]'s first panel for segments of 64 places or fewer, signed and without zeros.
pub fn short(act_groups: bool) -> TileFn {
    if act_groups {
        short_entry::<true>
    } else {
        short_entry::<false>
    }
}

/// A grouped tile kernel.
pub type TileFn = unsafe fn(&TileGrp);

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn grouped_entry<const KIND: u8>(a: &TileGrp) {
    // SAFETY: as the caller says.
    unsafe { grouped_body::<KIND>(a) }
}

/// The grouped tile kernel. `signed`: B holds the values themselves, so nothing needs correcting.
pub fn grouped(signed: bool) -> TileFn {
    if signed {
        grouped_entry::<SIGNED>
    } else {
        grouped_entry::<UNSIGNED>
    }
}

/// The grouped tile kernel for bf16 operands whose scales come after the sums.
pub const GROUPED_BF16: TileFn = grouped_entry::<FLOAT>;

/// Rounds two rows of floats to bf16, ties to even, and pairs them, the even one in the low halves. Subnormal numbers become
/// 0, as the tiles would have them.
#[inline(always)]
pub(super) unsafe fn round_pairs(even: __m512, odd: __m512) -> __m512i {
    // SAFETY: the caller has AVX-512 BF16, as every CPU with bf16 tiles.
    unsafe {
        let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
        let order: [u32; 16] = std::array::from_fn(|n| n as u32 | (n as u32 + 16) << 16);
        _mm512_permutexvar_epi16(_mm512_loadu_si512(order.as_ptr().cast()), both)
    }
}

/// Decodes unpacked bytes of one panel to bf16 tiles: 2 KiB a block, row r of a tile holds k = 2r, 2r+1 of 16 rows.
#[inline(always)]
unsafe fn decode_bf16<const W: u8>(a: &F32Args, out: *mut u8) {
    // SAFETY: as the caller says.
    unsafe {
        let step = a.padded.min(64) / 4;
        for b in 0..a.blocks {
            let mut g = (a.block0 + b) * 64 / a.padded;
            for r0 in (0..16).step_by(step) {
                let (s, z) = group::<V, W>(a, 0, g.min(a.groups - 1));
                g += 1;
                for r in r0..r0 + step {
                    let w = V::load(a.bytes.add(b * 1024 + 64 * r));
                    for half in 0..2 {
                        let even = weight::<V, W, false>(w, 2 * half, z, s, a.values);
                        let odd = weight::<V, W, false>(w, 2 * half + 1, z, s, a.values);
                        V::store(out.add(b * 2048 + (2 * r + half) * 64), round_pairs(even, odd));
                    }
                }
            }
        }
    }
}

/// Rounds a row of activations, a multiple of 32, to bf16: steps of 32, 1 KiB apart.
///
/// # Safety
/// `out` has 64 bytes for each step; the CPU has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub unsafe fn bf16_row(row: &[f32], out: *mut u16) {
    // SAFETY: as the caller says.
    unsafe {
        for (s, step) in row.chunks_exact(32).enumerate() {
            let (low, high) = (V::loadf(step.as_ptr()), V::loadf(step.as_ptr().add(16)));
            V::store(out.add(512 * s).cast(), std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)));
        }
    }
}

/// Rounds floats `[k][16]`, an even number of k, to bf16 tiles.
///
/// # Safety
/// `out` has two bytes for each float; the CPU has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub unsafe fn bf16_tiles(floats: &[f32], out: *mut u8) {
    // SAFETY: as the caller says.
    unsafe {
        for (r, two) in floats.chunks_exact(32).enumerate() {
            let pairs = round_pairs(V::loadf(two.as_ptr()), V::loadf(two.as_ptr().add(16)));
            V::store(out.add(64 * r), pairs);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
unsafe fn decode_entry<const W: u8>(a: &F32Args, out: *mut u8) {
    // SAFETY: as the caller says.
    unsafe { decode_bf16::<W>(a, out) }
}

/// As [`decode_bf16`] without the scales, straight from packed codes (or unpacked ones: `U` is [`U8`]) in groups of 64 and more, for
/// values that one table of 32 entries holds: those of codes below 32, or `u - z + 16` where zeros are stored.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn decode_table<U: Unpack>(a: &F32Args, out: *mut u8) {
    // SAFETY: as the caller says.
    unsafe {
        let stored = !a.zeros.is_null();
        let words: [u16; 32] = std::array::from_fn(|i| {
            let v = if stored { i as f32 - 16.0 } else { *a.values.add(i) };
            (v.to_bits() >> 16) as u16
        });
        let table = _mm512_loadu_si512(words.as_ptr().cast());
        // Bytes 0 and 1 of each dword to its words, and bytes 2 and 3.
        let pick = [0x8001_8000_u32 as i32, 0x8003_8002_u32 as i32].map(|base| {
            let lane: [i32; 4] = std::array::from_fn(|d| base + 0x0004_0004 * d as i32);
            _mm512_broadcast_i32x4(_mm_loadu_si128(lane.as_ptr().cast()))
        });
        for b in 0..a.blocks {
            let (codes, tiles) = (a.bytes.add(b * 128 * U::BITS), out.add(b * 2048));
            generic::fetch::<V, 1>(codes, 0, 128 * U::BITS, a.prefetch, usize::MAX);
            let shift = if stored {
                let z = V::load_u8(a.zeros.add(((a.block0 + b) * 64 / a.padded).min(a.groups - 1) * 16));
                // 16 - z in each byte of the row.
                _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(16), z), _mm512_set1_epi32(0x0101_0101))
            } else {
                _mm512_setzero_si512()
            };
            regs!(R => {
                let w = _mm512_add_epi8(U::reg::<V>(codes, R), shift);
                for (half, pick) in pick.iter().enumerate() {
                    let pair = _mm512_permutexvar_epi16(_mm512_shuffle_epi8(w, *pick), table);
                    V::store(tiles.add((2 * R + half) * 64), pair);
                }
            });
        }
    }
}

/// The decoder to bf16 tiles for a weight mode, 2 KiB a block: scaled values, rounded.
pub fn bf16_decoder(mode: u8) -> unsafe fn(&F32Args, *mut u8) {
    match mode {
        W_MUL1 => decode_entry::<W_MUL1>,
        W_MUL2 => decode_entry::<W_MUL2>,
        W_TABLE16 => decode_entry::<W_TABLE16>,
        W_TABLE64 => decode_entry::<W_TABLE64>,
        W_TABLE256 => decode_entry::<W_TABLE256>,
        _ => decode_entry::<W_FLOAT>,
    }
}

/// The same without scales, exact, where a table of 32 entries serves, from codes of so many bits (8: unpacked ones).
pub fn bf16_table_decoder(bits: usize) -> unsafe fn(&F32Args, *mut u8) {
    match bits {
        1 => decode_table::<U1>,
        2 => decode_table::<U2>,
        3 => decode_table::<U3>,
        4 => decode_table::<U4>,
        5 => decode_table::<U5>,
        _ => decode_table::<U8>,
    }
}

/// bf16 product of 16 (`a1` null) or 32 rows by two panels over `n` steps of 32 k, added to `c` (`[m][ldc]` floats), or put
/// there where it is `fresh`.
///
/// # Safety
/// Each pointer has `n` KiB, `c` is readable and writable for whole tiles, tiles are configured for 64 bytes.
pub unsafe fn bf16(
    a: [*const u16; 2],
    b: [*const u8; 2],
    n: usize,
    ahead: Ahead,
    fresh: bool,
    c: *mut f32,
    ldc: usize,
) {
    // SAFETY: as the caller says.
    unsafe { accumulate!("tdpbf16ps", fresh, ahead, a[0], a[1], b, n, c, ldc) }
}

/// Integer product of unsigned codes: 16 (`a1` null) or 32 rows by two panels over `n` blocks, added to `c` (int32), or put
/// there where it is `fresh`.
///
/// # Safety
/// As [`bf16`].
pub unsafe fn raw(a: [*const i8; 2], b: [*const u8; 2], n: usize, ahead: Ahead, fresh: bool, c: *mut i32, ldc: usize) {
    // SAFETY: as the caller says.
    unsafe { accumulate!("tdpbsud", fresh, ahead, a[0], a[1], b, n, c, ldc) }
}
