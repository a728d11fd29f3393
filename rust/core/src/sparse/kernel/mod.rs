//! Kernels of sparse weights: each spreads kept entries into a dense register and multiplies that.
//!
//! The kernels are written once over [`Expand`], whose three implementations are `VPEXPANDB`/`VPEXPANDPS`, `PDEP`, and a
//! loop; where the next register's entries begin is a count of bits.
use crate::isa::Isa;
use crate::kernel::{ActRows, ScalePtr};

pub mod generic;
mod scalar;
#[cfg(target_arch = "x86_64")]
pub mod x86;

pub use generic::Expand;

/// What dropped codes are, and what becomes of every code.
#[derive(Debug, Clone, Copy)]
pub struct Fill {
    /// The code of 0 where it is constant.
    pub code: u8,
    /// Zero points of the panel, `[group][16]`, or null.
    pub zeros: *const u8,
    /// Places of a group.
    pub padded: usize,
    /// Groups in a row.
    pub groups: usize,
    /// The first block within the row.
    pub block0: usize,
    /// All ones where codes are to be doubled.
    pub dbl: u8,
    /// What is taken off at last.
    pub sub: u8,
}

/// Arguments of the ungrouped integer kernels over bitmap panels.
#[derive(Debug, Clone, Copy)]
pub struct BitRaw {
    /// First block of the panel.
    pub src: *const u8,
    /// Blocks of K.
    pub blocks: usize,
    /// Dropped codes; codes are taken as they are.
    pub fill: Fill,
    /// Whether to ask for memory ahead.
    pub prefetch: bool,
    /// Activations.
    pub act: ActRows,
    /// Sums `[m][ldc]`, read and written.
    pub c: *mut i32,
    /// Row stride of `c`.
    pub ldc: usize,
}

/// Rows of activations and of sums, as integer kernels over the values of a panel take them.
#[derive(Debug, Clone, Copy)]
pub struct ValueRows {
    /// Whether to ask for memory ahead.
    pub prefetch: bool,
    /// Activations from K = 0 on.
    pub act: ActRows,
    /// `[16]`: the values of each row of the panel added up.
    pub sums: *const i32,
    /// Results `[m][ldc]`.
    pub c: *mut i32,
    /// Row stride of `c`.
    pub ldc: usize,
}

/// Arguments of the integer kernels over kept tiles of a panel: signed bytes, 1 KiB each.
#[derive(Debug, Clone, Copy)]
pub struct KeptRaw {
    /// Blocks along K of the tiles.
    pub index: *const u32,
    /// How many.
    pub count: usize,
    /// The tiles.
    pub tiles: *const u8,
    /// Activations and sums.
    pub rows: ValueRows,
}

/// Entries of a panel; see [`crate::sparse::gaps`].
#[derive(Debug, Clone, Copy)]
pub struct Pairs {
    /// Steps and codes of pair after pair.
    pub src: *const u8,
    /// Where the places of each four begin.
    pub bases: *const u32,
    /// How many pairs.
    pub count: usize,
}

/// Arguments of the integer kernels over entries of a panel.
#[derive(Debug, Clone, Copy)]
pub struct GapRaw {
    /// The entries.
    pub pairs: Pairs,
    /// Activations and sums.
    pub rows: ValueRows,
}

/// Arguments of the float kernels over entries of a panel.
#[derive(Debug, Clone, Copy)]
pub struct GapFloat {
    /// The entries.
    pub pairs: Pairs,
    /// `[16]`: the scale of each row of the panel.
    pub scales: *const f32,
    /// Activations and sums.
    pub rows: FloatRows,
}

/// Arguments of the grouped integer kernels over kept tiles of a panel, as those of [`KeptRaw`].
#[derive(Debug, Clone, Copy)]
pub struct KeptGrouped {
    /// Blocks along K of the tiles.
    pub index: *const u32,
    /// How many.
    pub count: usize,
    /// The tiles.
    pub tiles: *const u8,
    /// Places of a segment, which gets one multiplication: 16, 32, or a multiple of 64.
    pub len: usize,
    /// The group of each segment.
    pub group: *const u32,
    /// The scales of the panel, `[groups][16]`.
    pub scales: ScalePtr,
    /// Activations from K = 0 on.
    pub act: ActRows,
    /// Float sums `[m][ldc]`, written.
    pub c: *mut f32,
    /// Row stride of `c`.
    pub ldc: usize,
}

/// Rows of activations that a float kernel of few rows multiplies, and where their sums are.
#[derive(Debug, Clone, Copy)]
pub struct FloatRows {
    /// Activations in padded places: row m at `m*x_stride`.
    pub x: *const f32,
    /// Floats between rows of `x`.
    pub x_stride: isize,
    /// Sums `[m][ldc]`, read and written.
    pub c: *mut f32,
    /// Row stride of `c`.
    pub ldc: usize,
}

/// Arguments of the float kernels over panels of numbers.
#[derive(Debug, Clone, Copy)]
pub struct FloatGemv {
    /// First block of each panel.
    pub src: [*const u8; MAX_NP],
    /// Blocks of K.
    pub blocks: usize,
    /// Bytes ahead that memory is asked for.
    pub ahead: usize,
    /// Activations and sums.
    pub rows: FloatRows,
}

/// Slots of a panel; see [`crate::sparse::slots`].
#[derive(Debug, Clone, Copy)]
pub struct Slots {
    /// Places and numbers of four slots after four.
    pub src: *const u8,
    /// Where the places of each four begin along K.
    pub bases: *const u32,
    /// How many fours.
    pub fours: usize,
}

/// Arguments of the float kernels over slots.
#[derive(Debug, Clone, Copy)]
pub struct SlotGemv {
    /// The slots.
    pub slots: Slots,
    /// Bytes ahead that memory is asked for, or 0.
    pub ahead: usize,
    /// The same as far as the second-level cache.
    pub far: usize,
    /// Activations and sums.
    pub rows: FloatRows,
}

/// Arguments of the float kernel whose lanes are rows of activations.
#[derive(Debug, Clone, Copy)]
pub struct LaneArgs {
    /// `[slot][16]`: where in `x` the activations of each row's number begin, in floats.
    pub places: *const u32,
    /// `[slot][16]`
    pub numbers: *const f32,
    /// Slots.
    pub slots: usize,
    /// Activations `[k][lanes]`.
    pub x: *const f32,
    /// Sums `[16][lanes]`, read and written.
    pub c: *mut f32,
}

/// How the numbers of a block lie; see [`crate::sparse::floats`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// All of them.
    All,
    /// The kept ones, behind a mask for each k.
    Masks,
}

/// Panels of a float kernel, at most.
pub const MAX_NP: usize = 4;

/// Spreads blocks of a bitmap panel to bytes.
pub type ExpandFn = unsafe fn(*const u8, *mut u8, usize, &Fill);
/// An ungrouped integer kernel over a bitmap panel.
pub type BitRawFn = unsafe fn(&BitRaw);
/// An integer kernel over kept tiles.
pub type KeptRawFn = unsafe fn(&KeptRaw);
/// An integer kernel over entries.
pub type GapRawFn = unsafe fn(&GapRaw);
/// A float kernel over entries.
pub type GapFloatFn = unsafe fn(&GapFloat);
/// A grouped integer kernel over kept tiles.
pub type KeptGroupedFn = unsafe fn(&KeptGrouped);
/// A float kernel over panels of numbers.
pub type FloatGemvFn = unsafe fn(&FloatGemv);
/// A float kernel over slots.
pub type SlotGemvFn = unsafe fn(&SlotGemv);
/// Lays slots out: see [`generic::lay`].
pub type LayFn = unsafe fn(&Slots, usize, *mut u32, *mut f32);
/// Spreads slots to f32 `[k][16]`: see [`generic::spread_slots`].
pub type SpreadFn = unsafe fn(&Slots, usize, *mut f32, usize);
/// A float kernel whose lanes are rows of activations.
pub type LanesFn = unsafe fn(&LaneArgs);
/// Spreads blocks of a panel of numbers to f32 `[k][16]`.
pub type FloatExpandFn = unsafe fn(*const u8, *mut f32, usize);
/// Adds multiples of columns to sums: see [`generic::add_columns`].
pub type ColumnsFn = unsafe fn(*const u8, usize, usize, &[(u32, i8)], *mut i32);

/// Adds multiples of decoded columns to sums: see [`generic::add_float_columns`].
pub type FloatColumnsFn = unsafe fn(&FloatColumns, &[(u32, f32)]);

/// Arguments of the float kernel over columns of codes.
#[derive(Debug, Clone, Copy)]
pub struct FloatColumns {
    /// First column.
    pub w: *const u8,
    /// Bytes between columns.
    pub stride: usize,
    /// Sums.
    pub len: usize,
    /// Values are `(mul*u - zero) * scale`.
    pub mul: i32,
    /// The zero where it is constant.
    pub sub: i32,
    /// Zero of each sum's row, or null.
    pub zeros: *const u8,
    /// Scale of each sum's row.
    pub scales: *const f32,
    /// Sums, read and written.
    pub acc: *mut f32,
}

/// Everything one level offers.
#[derive(Debug)]
pub struct SparseKernels {
    /// Rows of the integer and float kernels at most.
    pub max_mr: usize,
    /// By bits of a stored code, 4 or 8.
    pub expand: [ExpandFn; 2],
    /// By bits of a stored code, then rows 1, 2, 4.
    pub raw: [[BitRawFn; 3]; 2],
    /// By rows 1, 2, 4, 8.
    pub kept: [KeptRawFn; 4],
    /// By rows 1, 2, 4, 8.
    pub kept_grouped: [KeptGroupedFn; 4],
    /// By type of number (f32, f16, bf16), how they lie, rows 1, 2, 4, whether of one panel: kernel and panels.
    pub gemv: fn(usize, Numbers, usize, bool) -> (FloatGemvFn, usize),
    /// By type of number, then how they lie.
    pub floats: [[FloatExpandFn; 2]; 3],
    /// By type of number, then rows 1, 2, 4.
    pub slots: [[SlotGemvFn; 3]; 3],
    /// By type of number: slots spread to where they belong.
    pub spread_slots: [SpreadFn; 3],
    /// By type of number: slots laid out for `lanes`.
    pub lay: [LayFn; 3],
    /// Of a hundred k, the most slots that are better than masks: looked up by a gather they cost more.
    pub most_slots: usize,
    /// From how many rows on lanes of rows of activations are better than lanes of rows of the weight.
    pub lanes_from: usize,
    /// Kernel and lanes, for up to 16 rows and for more.
    pub lanes: [(LanesFn, usize); 2],
    /// Sums of columns.
    pub columns: ColumnsFn,
    /// Sums of decoded columns.
    pub float_columns: FloatColumnsFn,
}

impl SparseKernels {
    /// The kernel whose lanes are `m` rows of activations, and its lanes.
    pub fn lanes(&self, m: usize) -> (LanesFn, usize) {
        self.lanes[usize::from(m > self.lanes[0].1)]
    }
}

/// The kernels of a level on this CPU.
pub fn table(isa: Isa) -> &'static SparseKernels {
    #[cfg(target_arch = "x86_64")]
    if let Some(t) = x86::table(isa) {
        return t;
    }
    let _ = isa;
    &scalar::SCALAR
}

/// Instantiates the generic kernels for one implementation of [`Expand`].
macro_rules! instantiate {
    ($(#[$feature:meta])* $name:ident, $e:ty, rows [$r2:literal, $r4:literal], gemv [$np:literal, $bp1:literal, $bp4:literal], slots $slots:literal, lanes [$l1:literal, $l2:literal x $lv:literal] from $lm:literal, columns $columns:path) => {
        pub(in crate::sparse::kernel) static $name: crate::sparse::kernel::SparseKernels = {
            use crate::sparse::kernel::generic::{self, Number, BF16, F16, F32};
            use crate::sparse::kernel::*;
            $(#[$feature])*
            unsafe fn expand<const W: usize>(src: *const u8, out: *mut u8, blocks: usize, f: &Fill) {
                // SAFETY: the caller's contract is that of the generic kernel.
                unsafe { generic::expand::<$e, W>(src, out, blocks, f) }
            }
            $(#[$feature])*
            unsafe fn raw<const W: usize, const MR: usize>(a: &BitRaw) {
                // SAFETY: as above.
                unsafe { generic::raw::<$e, W, MR>(a) }
            }
            $(#[$feature])*
            unsafe fn kept<const MR: usize>(a: &KeptRaw) {
                // SAFETY: as above.
                unsafe { generic::kept::<<$e as Expand>::S, MR>(a) }
            }
            $(#[$feature])*
            unsafe fn kept_grouped<const MR: usize>(a: &KeptGrouped) {
                // SAFETY: as above.
                unsafe { generic::kept_grouped::<<$e as Expand>::S, MR>(a) }
            }
            $(#[$feature])*
            unsafe fn gemv<T: Number, const ALL: bool, const NP: usize, const MR: usize>(a: &FloatGemv) {
                // SAFETY: as above.
                unsafe { generic::gemv::<$e, T, ALL, NP, MR>(a) }
            }
            $(#[$feature])*
            unsafe fn slots<T: Number, const MR: usize>(a: &SlotGemv) {
                // SAFETY: as above.
                unsafe { generic::slots::<<$e as Expand>::S, T, MR>(a) }
            }
            $(#[$feature])*
            unsafe fn lay<T: Number>(a: &Slots, lanes: usize, places: *mut u32, numbers: *mut f32) {
                // SAFETY: as above.
                unsafe { generic::lay::<<$e as Expand>::S, T>(a, lanes, places, numbers) }
            }
            $(#[$feature])*
            unsafe fn lanes<const N: usize, const V: usize>(a: &LaneArgs) {
                // SAFETY: as above.
                unsafe { generic::lanes::<<$e as Expand>::S, N, V>(a) }
            }
            $(#[$feature])*
            unsafe fn floats<T: Number, const ALL: bool>(src: *const u8, out: *mut f32, blocks: usize) {
                // SAFETY: as above.
                unsafe { generic::floats::<$e, T, ALL>(src, out, blocks) }
            }
            $(#[$feature])*
            unsafe fn spread_slots<T: Number>(a: &Slots, from: usize, out: *mut f32, blocks: usize) {
                // SAFETY: as above.
                unsafe { generic::spread_slots::<<$e as Expand>::S, T>(a, from, out, blocks) }
            }
            $(#[$feature])*
            unsafe fn columns(w: *const u8, stride: usize, len: usize, list: &[(u32, i8)], acc: *mut i32) {
                // SAFETY: as above.
                unsafe { $columns(w, stride, len, list, acc) }
            }
            $(#[$feature])*
            unsafe fn float_columns(a: &FloatColumns, list: &[(u32, f32)]) {
                // SAFETY: as above.
                unsafe { generic::add_float_columns(a, list) }
            }
            fn pick(kind: usize, how: Numbers, mr: usize, single: bool) -> (FloatGemvFn, usize) {
                macro_rules! rows { ($t:ty, $all:literal, $n1:literal, $n4:literal) => { match (mr, single) {
                    (1, false) => (gemv::<$t, $all, $n1, 1> as FloatGemvFn, $n1),
                    (2, false) => (gemv::<$t, $all, $n4, $r2>, $n4),
                    (_, false) => (gemv::<$t, $all, $n4, $r4>, $n4),
                    (1, true) => (gemv::<$t, $all, 1, 1>, 1),
                    (2, true) => (gemv::<$t, $all, 1, $r2>, 1),
                    (_, true) => (gemv::<$t, $all, 1, $r4>, 1),
                } } }
                macro_rules! types { ($t:ty) => { match how {
                    Numbers::All => rows!($t, true, $np, $np),
                    Numbers::Masks => rows!($t, false, $bp1, $bp4),
                } } }
                match kind {
                    0 => types!(F32),
                    1 => types!(F16),
                    _ => types!(BF16),
                }
            }
            crate::sparse::kernel::SparseKernels {
                max_mr: $r4,
                expand: [expand::<4>, expand::<8>],
                raw: [[raw::<4, 1>, raw::<4, $r2>, raw::<4, $r4>], [raw::<8, 1>, raw::<8, $r2>, raw::<8, $r4>]],
                kept: [kept::<1>, kept::<2>, kept::<4>, kept::<8>],
                kept_grouped: [kept_grouped::<1>, kept_grouped::<2>, kept_grouped::<4>, kept_grouped::<8>],
                gemv: pick,
                floats: [
                    [floats::<F32, true>, floats::<F32, false>],
                    [floats::<F16, true>, floats::<F16, false>],
                    [floats::<BF16, true>, floats::<BF16, false>],
                ],
                slots: [
                    [slots::<F32, 1>, slots::<F32, $r2>, slots::<F32, $r4>],
                    [slots::<F16, 1>, slots::<F16, $r2>, slots::<F16, $r4>],
                    [slots::<BF16, 1>, slots::<BF16, $r2>, slots::<BF16, $r4>],
                ],
                spread_slots: [spread_slots::<F32>, spread_slots::<F16>, spread_slots::<BF16>],
                lay: [lay::<F32>, lay::<F16>, lay::<BF16>],
                most_slots: $slots,
                lanes_from: $lm,
                lanes: [(lanes::<$l1, 1>, 16), (lanes::<$l2, $lv>, 16 * $lv)],
                columns,
                float_columns,
            }
        };
    };
}
pub(crate) use instantiate;
