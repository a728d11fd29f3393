//! Kept tiles on AMX: one panel by up to 32 rows of activations, the dropped tiles left out.
//!
//! A kept tile of 16 x 64 is loaded once and multiplied with one or two tiles of activations; a list says where along K those
//! are. Activations are loaded with the hint that they will not be wanted in the first-level cache: the tiles, which more rows
//! meet next, then stay there. Values are signed bytes, so a tile that is left out takes nothing with it.
use crate::buf::Plain;
use crate::kernel::x86::amx::{fetch_far, Ring, RowSums};
use crate::kernel::{ActRows, ScalePtr};
use std::arch::asm;

/// Where operands lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept<'a> {
    /// Blocks along K of the kept tiles.
    pub index: &'a [u32],
    /// The kept tiles, 1 KiB each.
    pub tiles: *const u8,
    /// Block 0 of the first 16 rows of activations; blocks are 1 KiB apart.
    pub a: *const i8,
    /// Bytes to the next 16 rows.
    pub a_stride: usize,
    /// Sums, read and written.
    pub c: *mut i32,
    /// Row stride of `c`.
    pub ldc: usize,
    /// How many calls fetch what comes next, each its part.
    pub passes: usize,
}

/// Fetches some more of what comes next into the second-level cache.
macro_rules! part {
    (1) => {
        concat!(
            fetch_far!("{f}"),
            fetch_far!("{f} + 256"),
            fetch_far!("{f} + 512"),
            fetch_far!("{f} + 768"),
            "add {f}, 1024"
        )
    };
    (2) => {
        concat!(fetch_far!("{f}"), fetch_far!("{f} + 256"), "add {f}, 512")
    };
    (4) => {
        concat!(fetch_far!("{f}"), "add {f}, 256")
    };
    (8) => {
        concat!(fetch_far!("{f}", 0, 64), "add {f}, 128")
    };
}

macro_rules! run {
    ($k:expr, $next:expr, [$($first:literal),*], [$($step:literal),*], [$($last:literal),*]) => {
        match $k.passes {
            1 => run!(part!(1), $k, $next, [$($first),*], [$($step),*], [$($last),*]),
            2..4 => run!(part!(2), $k, $next, [$($first),*], [$($step),*], [$($last),*]),
            4..8 => run!(part!(4), $k, $next, [$($first),*], [$($step),*], [$($last),*]),
            _ => run!(part!(8), $k, $next, [$($first),*], [$($step),*], [$($last),*]),
        }
    };
    ($part:expr, $k:expr, $next:expr, [$($first:literal),*], [$($step:literal),*], [$($last:literal),*]) => {
        asm!(
            "mov {t}, {c}",
            $($first,)*
            "2:",
            "mov {t:e}, dword ptr [{i}]",
            "shl {t}, 10",
            "add {t}, {a}",
            "tileloadd tmm7, [{b} + {s}]",
            $($step,)*
            $part,
            "add {b}, 1024",
            "add {i}, 4",
            "dec {n}",
            "jnz 2b",
            "mov {t}, {c}",
            $($last,)*
            i = inout(reg) $k.index.as_ptr() => _, b = inout(reg) $k.tiles => _, n = inout(reg) $k.index.len() => _,
            t = out(reg) _, f = inout(reg) $next, a = in(reg) $k.a, r = in(reg) $k.a_stride, s = in(reg) 64usize, c = in(reg) $k.c,
            l = in(reg) $k.ldc * 4, d = in(reg) $k.ldc * 64,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// Multiplies the kept tiles with `blocks` (1 or 2) blocks of 16 rows of activations: `c += sums`, or `c = sums` where they are
/// `fresh`. Fetches what lies at `next`, and returns where it stopped.
///
/// # Safety
/// The pointers in `k` hold what [`Kept`] says, for every block of the list and `16 * blocks` rows; tiles are configured for
/// 64 bytes.
pub(crate) unsafe fn multiply(k: &Kept, blocks: usize, fresh: bool, next: *const u8) -> *const u8 {
    let mut next = next;
    macro_rules! tiles {
        ($first0:literal, $first1:literal) => {
            match blocks {
                1 => run!(
                    k,
                    next,
                    [$first0],
                    ["tileloaddt1 tmm4, [{t} + {s}]", "tdpbssd tmm0, tmm4, tmm7", "/* {r} */"],
                    ["tilestored [{t} + {l}], tmm0 /* {d} */"]
                ),
                _ => run!(
                    k,
                    next,
                    [$first0, $first1],
                    [
                        "tileloaddt1 tmm4, [{t} + {s}]",
                        "tdpbssd tmm0, tmm4, tmm7",
                        "add {t}, {r}",
                        "tileloaddt1 tmm4, [{t} + {s}]",
                        "tdpbssd tmm1, tmm4, tmm7"
                    ],
                    ["tilestored [{t} + {l}], tmm0", "add {t}, {d}", "tilestored [{t} + {l}], tmm1"]
                ),
            }
        };
    }
    // SAFETY: as the contract says. `r` is named where one block alone does not need it.
    unsafe {
        match (fresh, k.index.is_empty()) {
            (true, true) => (0..16 * blocks).for_each(|r| k.c.add(r * k.ldc).write_bytes(0, 16)),
            (true, false) => tiles!("tilezero tmm0", "tilezero tmm1"),
            (false, true) => {}
            (false, false) => tiles!("tileloadd tmm0, [{t} + {l}]", "add {t}, {d}\ntileloadd tmm1, [{t} + {l}]"),
        }
    }
    next
}

/// A stretch of K whose sums get one multiplication, where a panel keeps some of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    /// The first of its kept tiles.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// Which part of the tile, where tiles are cut.
    pub part: u32,
    /// Its number along K.
    pub number: u32,
}
// SAFETY: plain numbers.
unsafe impl Plain for Segment {}

/// The kept segments of a panel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeptSegments<'a> {
    /// Blocks along K of the kept tiles.
    pub index: &'a [u32],
    /// The kept tiles, signed bytes, 1 KiB each.
    pub tiles: *const u8,
    /// Ascending along K.
    pub segments: &'a [Segment],
    /// Segments of a tile; 1 where they are whole tiles.
    pub parts: usize,
    /// The scales of the panel.
    pub scales: ScalePtr,
    /// The group of each segment.
    pub group: *const u32,
}

/// The sums of one segment by 16 rows.
#[inline(always)]
unsafe fn segment(k: &KeptSegments, s: Segment, a: *const i8, out: *mut i32) {
    let (first, part) = (s.first as usize, s.part as usize);
    // SAFETY: the caller's pointers hold the kept tiles and their places of 16 rows; tiles are configured for a part.
    unsafe {
        asm!(
            "tilezero tmm0",
            "2:",
            "mov {t:e}, dword ptr [{i}]",
            "shl {t}, 10",
            "add {t}, {a}",
            "tileloadd tmm6, [{b} + {s}]",
            "tileloaddt1 tmm4, [{t} + {s}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "add {b}, 1024",
            "add {i}, 4",
            "dec {n}",
            "jnz 2b",
            "tilestored [{o} + {s}], tmm0",
            i = inout(reg) k.index.as_ptr().add(first) => _,
            b = inout(reg) k.tiles.add(first * 1024 + part * (1024 / k.parts)) => _,
            n = inout(reg) s.count as usize => _,
            a = in(reg) a.add(part * (64 / k.parts)), o = in(reg) out, s = in(reg) 64usize, t = out(reg) _,
            out("tmm0") _, out("tmm4") _, out("tmm6") _,
            options(nostack),
        );
    }
}

/// 16 rows by the kept segments of a panel. Float sums stay in registers all the way, and take a segment's sums from a ring two
/// segments after its products were begun.
#[inline(always)]
unsafe fn grouped_body<const ACT: bool>(k: &KeptSegments, act: ActRows, c: *mut f32, ldc: usize) {
    // SAFETY: as the contract of `grouped` says.
    unsafe {
        let mut ring = Ring::<1024>::new();
        let ring = ring.as_mut_ptr();
        let mut f = RowSums::zero();
        for i in 0..k.segments.len() + 2 {
            if let Some(&s) = k.segments.get(i) {
                segment(k, s, act.codes, ring.add(i % 4 * 256));
            }
            if i >= 2 {
                let number = k.segments[i - 2].number as usize;
                let rows = act.scales.wrapping_add(number * act.rows);
                f.add::<ACT>(ring.add((i - 2) % 4 * 256), k.scales, *k.group.add(number), rows);
            }
        }
        f.store(c, ldc);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn grouped_entry<const ACT: bool>(k: &KeptSegments, act: ActRows, c: *mut f32, ldc: usize) {
    // SAFETY: as the caller says.
    unsafe { grouped_body::<ACT>(k, act, c, ldc) }
}

/// From 0 on `c = fma(sum, scale, c)` for each kept segment, for 16 rows whose codes and scales, if groups of them have scales, `act` holds.
///
/// # Safety
/// The pointers in `k` hold what [`KeptSegments`] says, `act` whole rows of K, `c` 16 rows; tiles are configured for a segment, or
/// for 64 places.
pub(crate) unsafe fn grouped(k: &KeptSegments, act: ActRows, c: *mut f32, ldc: usize) {
    // SAFETY: as the contract says; CPUs with tiles have the features.
    unsafe {
        if act.scales.is_null() {
            grouped_entry::<false>(k, act, c, ldc);
        } else {
            grouped_entry::<true>(k, act, c, ldc);
        }
    }
}
