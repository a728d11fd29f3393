//! Kept tiles on AMX: one panel by up to 32 rows of activations, the dropped tiles left out.
//!
//! A kept tile of 16 x 64 is loaded once and multiplied with one or two tiles of activations; a list says where along K
//! those are. The tile of the step after the next is fetched meanwhile, and where tiles come from beyond the second-level cache
//! the one of eight steps later into that; activations come from there as fast without. Values are signed bytes, so a tile that
//! is left out takes nothing with it.
use crate::kernel::x86::amx::{fetch, fetch_far};
use std::arch::asm;

/// Where operands lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept<'a> {
    /// Blocks along K of the kept tiles.
    pub index: &'a [u32],
    /// The kept tiles, 1 KiB each.
    pub tiles: *const u8,
    /// Whether they are read for the first time in a while.
    pub distant: bool,
    /// Block 0 of the first 16 rows of activations; blocks are 1 KiB apart.
    pub a: *const i8,
    /// Bytes to the next 16 rows.
    pub a_stride: usize,
    /// Sums, read and written.
    pub c: *mut i32,
    /// Row stride of `c`.
    pub ldc: usize,
}

macro_rules! run {
    (far $far:expr, $k:expr, [$first:literal $(, $load:literal)*], [$($step:literal),*], [$last:literal $(, $store:literal)*]) => {
        asm!(
            "mov {t}, {c}",
            $first,
            $("add {t}, {d}", $load,)*
            "2:",
            "mov {t:e}, dword ptr [{i}]",
            "shl {t}, 10",
            "add {t}, {a}",
            "tileloadd tmm7, [{b} + {s}]",
            $($step,)*
            fetch!("{b} + 2048"),
            $far,
            "add {b}, 1024",
            "add {i}, 4",
            "dec {n}",
            "jnz 2b",
            "mov {t}, {c}",
            $last,
            $("add {t}, {d}", $store,)*
            i = inout(reg) $k.index.as_ptr() => _, b = inout(reg) $k.tiles => _, n = inout(reg) $k.index.len() => _,
            t = out(reg) _, a = in(reg) $k.a, r = in(reg) $k.a_stride, s = in(reg) 64usize,
            c = in(reg) $k.c, l = in(reg) $k.ldc * 4, d = in(reg) $k.ldc * 64,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
    ($k:expr, $($list:tt),*) => {
        if $k.distant {
            run!(
                far concat!(
                    fetch_far!("{b} + 8192"), fetch_far!("{b} + 8448"), fetch_far!("{b} + 8704"), fetch_far!("{b} + 8960")
                ),
                $k, $($list),*
            )
        } else {
            run!(far "", $k, $($list),*)
        }
    };
}

/// Multiplies the kept tiles with `blocks` (1 or 2) blocks of 16 rows of activations: `c += sums`, or `c = sums` where they are
/// `fresh`.
///
/// # Safety
/// The pointers in `k` hold what [`Kept`] says, for every block of the list and `16 * blocks` rows; tiles are configured for
/// 64 bytes.
pub(crate) unsafe fn multiply(k: &Kept, blocks: usize, fresh: bool) {
    macro_rules! tiles {
        ($first0:literal, $first1:literal) => {
            match blocks {
                1 => run!(
                    k,
                    [$first0],
                    ["tileloadd tmm4, [{t} + {s}]", "tdpbssd tmm0, tmm4, tmm7", "/* {r} */"],
                    ["tilestored [{t} + {l}], tmm0 /* {d} */"]
                ),
                _ => run!(
                    k,
                    [$first0, $first1],
                    [
                        "tileloadd tmm4, [{t} + {s}]",
                        "tdpbssd tmm0, tmm4, tmm7",
                        "add {t}, {r}",
                        "tileloadd tmm5, [{t} + {s}]",
                        "tdpbssd tmm1, tmm5, tmm7"
                    ],
                    ["tilestored [{t} + {l}], tmm0", "tilestored [{t} + {l}], tmm1"]
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
            (false, false) => tiles!("tileloadd tmm0, [{t} + {l}]", "tileloadd tmm1, [{t} + {l}]"),
        }
    }
}
