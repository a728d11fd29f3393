//! Tiles of integers beyond a byte: two products for each step, of the low and of the high halves, put together in int32.
use super::amx::{Ring, RowSums, TileFn, TileGrp};
use super::avx512::Avx512Vnni as V;
use crate::kernel::generic;
use crate::kernel::simd::Simd;
use std::arch::asm;

/// The products of a segment of `$n` steps from nothing, low halves before high ones.
macro_rules! products {
    ($a:expr, $b:expr, $n:expr, $o:expr) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{a} + {s}]",
            "tileloadd tmm6, [{b} + {s}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm6, [{b} + {s} + 1024]",
            "tdpbssd tmm1, tmm4, tmm6",
            "add {a}, 1024",
            "add {b}, 2048",
            "dec {n}",
            "jnz 2b",
            "tilestored [{o} + {s}], tmm0",
            "tilestored [{o} + {s} + 1024], tmm1",
            a = inout(reg) $a => _, b = inout(reg) $b => _, n = inout(reg) $n => _,
            o = in(reg) $o, s = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _,
            options(nostack),
        )
    };
}

/// 16 rows from `m` on by the first panel of a [`TileGrp`], whose steps are 2 KiB of signed halves: `c = fma(f32(16*high + low), s, c)` for
/// its segments; `RAW`: one segment, added to int32 sums. Sums stay in registers, and a segment is added while the tiles work on
/// the next.
#[inline(always)]
unsafe fn body<const ACT: bool, const RAW: bool>(a: &TileGrp, m: usize) {
    // SAFETY: as the contract of `kernel` says.
    unsafe {
        let mut ring = Ring::<1024>::new();
        let ring = ring.as_mut_ptr();
        let (count, per) = match (RAW, a.seg_steps) {
            (true, _) => (1, a.steps),
            (_, 0) => (a.steps * a.parts, 0),
            (_, per) => (a.steps.div_ceil(per), per),
        };
        let (rows, act, c) = (a.a.add(m / 16 * a.a_stride), a.act_at(m), a.c.add(m * a.ldc));
        let mut f = RowSums::load(c, a.ldc);
        for i in 0..=count {
            if i < count {
                let (x, w, n) = if per == 0 {
                    let (step, part) = (i / a.parts, i % a.parts);
                    (step * 1024 + part * 64 / a.parts, step * 2048 + part * 1024 / a.parts, 1)
                } else {
                    (i * per * 1024, i * per * 2048, per.min(a.steps - i * per))
                };
                let (x, w, o) = (rows.add(x), a.b[0].add(w), ring.add(i % 2 * 512));
                products!(x, w, n, o);
            }
            if i > 0 {
                let seg = a.seg0 + i - 1;
                let s = if RAW {
                    V::splatf(1.0)
                } else {
                    generic::scales::<V>(a.scales[0], *a.seg_group.add(seg) as usize * 16)
                };
                let scales = act.scales.wrapping_add(seg * act.rows);
                for (r, f) in f.0.iter_mut().enumerate() {
                    let at = ring.add((i - 1) % 2 * 512 + r * 16);
                    let d = V::add(V::load(at.cast()), V::shl32(V::load(at.add(256).cast()), 4));
                    *f = if RAW {
                        V::from_bits(V::add(V::bits(*f), d))
                    } else {
                        let s = if ACT { V::mulf(s, V::splatf(*scales.add(r))) } else { s };
                        V::fma(V::cvt(d), s, *f)
                    };
                }
            }
        }
        f.store(c, a.ldc);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn entry<const ACT: bool, const RAW: bool>(a: &TileGrp) {
    for m in (0..a.rows).step_by(16) {
        // SAFETY: as the caller says.
        unsafe { body::<ACT, RAW>(a, m) }
    }
}

/// The kernel of all rows by the first panel for groups of activations or none, or for one segment whose int32 sums `c` holds.
/// Tiles are configured for a segment, or for 64 places.
pub fn kernel(act_groups: bool, raw: bool) -> TileFn {
    match (act_groups, raw) {
        (_, true) => entry::<false, true>,
        (false, false) => entry::<false, false>,
        (true, false) => entry::<true, false>,
    }
}
