//! Trellis codes: `trellis<b>`, b bits a weight whose meaning depends on the bits before (see `crate::trellis`).
//!
//! The codes of a group, of at most 256 weights, form a circle; the number of a weight is that of the
//! last 16 bits up to its own. `trellis<b>` hashes them with `mul1`, whose numbers are integers from -510 to 510;
//! `trellis2_1mad` and `trellis2_3inst` with the codes of those names. The states of `trellis<b>_hyb` are worth two weights,
//! of whose codes they take both bits; where a group is odd, the last weight is joined by one whose code is 0. Groups are 256
//! values unless the name says otherwise.
//!
//! rtn: `s = rms(group) / (f * rms(code))`, with a factor `f` for each number of bits; the codes are those of
//! least squared error that the search finds. There is no code for 0: a group of zeros gets the smallest positive scale.
use super::lanes::Level;
use super::{Codec, Element, Fit, ScaleType, ValueMap, Zero, FLOAT};
use crate::trellis::{narrow, Code, Search, TILE};
use std::cell::RefCell;

#[derive(Debug)]
struct Trellis;

const fn row(name: &'static str, bits: u8, code: Code) -> Element {
    Element {
        map: ValueMap::Trellis(code),
        computes: match code {
            Code::Inst3 | Code::Hyb => FLOAT,
            Code::Mul1 | Code::Mad1 => &["f32", "bf16", "int8"],
        },
        group: Some(TILE as u32),
        scales: &ScaleType::ALL,
        ..Element::affine(name, bits, 1, 0, 1 << bits, 0, &Trellis)
    }
}

/// `trellis1` to `trellis4_hyb`.
pub static ROWS: [Element; 13] = [
    row("trellis1", 1, Code::Mul1),
    row("trellis2", 2, Code::Mul1),
    row("trellis3", 3, Code::Mul1),
    row("trellis4", 4, Code::Mul1),
    row("trellis5", 5, Code::Mul1),
    row("trellis6", 6, Code::Mul1),
    row("trellis7", 7, Code::Mul1),
    row("trellis8", 8, Code::Mul1),
    row("trellis2_1mad", 2, Code::Mad1),
    row("trellis2_3inst", 2, Code::Inst3),
    row("trellis2_hyb", 2, Code::Hyb),
    row("trellis3_hyb", 3, Code::Hyb),
    row("trellis4_hyb", 4, Code::Hyb),
];

fn code(e: &Element) -> Code {
    match e.map {
        ValueMap::Trellis(code) => code,
        _ => Code::Mul1,
    }
}

/// Buffers of the search that this thread did last.
type Kept = Option<(Code, u8, Search)>;

thread_local! {
    static SEARCH: RefCell<Kept> = const { RefCell::new(None) };
}

/// Codes of a group at a scale; calls `f` with the numbers of each tile.
fn search(e: &Element, level: Level, x: &[f32], s: f32, out: &mut [u8], mut f: impl FnMut(&[f32], &[f32])) {
    let (code, bits) = (code(e), e.bits);
    let (mut scaled, mut found) = ([0.0f32; TILE], [0.0f32; TILE]);
    let mut run = |kept: &mut Kept| {
        if !matches!(kept, Some((c, b, _)) if (*c, *b) == (code, bits)) {
            *kept = None;
            *kept = Search::new(code, u32::from(bits), TILE).ok().map(|search| (code, bits, search));
        }
        for (x, out) in x.chunks(TILE).zip(out.chunks_mut(TILE)) {
            let (scaled, found) = (&mut scaled[..x.len()], &mut found[..x.len()]);
            scaled.iter_mut().zip(x).for_each(|(t, v)| *t = v / s);
            match kept {
                Some((_, _, search)) => search.tile(level, scaled, out),
                None => out.fill(0),
            }
            code.decode(u32::from(bits), out, |t, v| found[t] = v);
            f(x, found);
        }
    };
    SEARCH.with(|kept| match kept.try_borrow_mut() {
        Ok(mut kept) => run(&mut kept),
        Err(_) => run(&mut None),
    });
}

impl Codec for Trellis {
    fn fit(&self, e: &Element, _: Level, x: &[f32], _: f32) -> Fit {
        let square: f64 = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        let rms = (square / x.len().max(1) as f64).sqrt() as f32;
        Fit { scale: rms / (narrow(u32::from(e.bits)) * code(e).rms()), low: 0.0 }
    }

    fn has_zero(&self) -> bool {
        false
    }

    fn encode(&self, e: &Element, level: Level, x: &[f32], s: f32, _: Zero, _: u8, out: &mut [u8]) -> f32 {
        let mut worst = 0.0f32;
        search(e, level, x, s, out, |x, found| {
            worst = x.iter().zip(found).fold(worst, |m, (x, v)| m.max((x - v * s).abs()));
        });
        worst
    }

    fn cost(&self, e: &Element, level: Level, x: &[f32], s: f32, _: Zero) -> f32 {
        let mut codes = vec![0; x.len()];
        let mut sum = 0.0f32;
        search(e, level, x, s, &mut codes, |x, found| {
            sum += x.iter().zip(found).map(|(x, v)| (x / s - v) * (x / s - v)).sum::<f32>();
        });
        sum
    }

    fn shrinks(&self, _: &Element) -> &'static [f32] {
        &[0.92, 1.08]
    }

    fn decode(&self, e: &Element, _: Level, u: &[u8], s: f32, _: Zero, out: &mut [f32]) {
        for (u, out) in u.chunks(TILE).zip(out.chunks_mut(TILE)) {
            code(e).decode(u32::from(e.bits), u, |t, v| out[t] = v * s);
        }
    }
}
