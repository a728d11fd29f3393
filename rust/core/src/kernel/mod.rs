//! The kernel table. A kernel multiplies tiles of one compute class on one ISA and knows no format: it sees codes in
//! panels (see `pack.rs`), scales and zeros.
pub mod generic;
pub mod scalar;
pub mod simd;
pub mod trellis;
pub mod wide;
#[cfg(target_arch = "x86_64")]
pub mod x86;

use crate::isa::Isa;
use generic::{Finish, Quantise};

/// Panel scales in their stored type.
#[derive(Debug, Clone, Copy)]
pub enum ScalePtr {
    /// binary32
    F32(*const f32),
    /// binary16
    F16(*const u16),
    /// bfloat16
    BF16(*const u16),
}

impl ScalePtr {
    /// The pointer moved on by `n` elements.
    #[must_use]
    pub fn offset(self, n: usize) -> Self {
        match self {
            Self::F32(p) => Self::F32(p.wrapping_add(n)),
            Self::F16(p) => Self::F16(p.wrapping_add(n)),
            Self::BF16(p) => Self::BF16(p.wrapping_add(n)),
        }
    }
}

/// Quantised activation rows, as a kernel sees them.
#[derive(Debug, Clone, Copy)]
pub struct ActRows {
    /// Codes: row m of block b at `b*block_stride + 64*m`.
    pub codes: *const i8,
    /// Bytes from one block of K to the next.
    pub block_stride: usize,
    /// Sums `[segment][rows]`.
    pub sums: *const i32,
    /// Scales `[segment][rows]`, null where rows have one scale.
    pub scales: *const f32,
    /// Row stride of `sums` and `scales`.
    pub rows: usize,
}

/// Arguments of the grouped integer kernels.
#[derive(Debug, Clone, Copy)]
pub struct Grp {
    /// First panel, first block.
    pub codes: *const u8,
    /// Bytes between panels.
    pub panel_stride: usize,
    /// Blocks of K.
    pub blocks: usize,
    /// Blocks of a segment (where segments are whole blocks).
    pub seg_blocks: usize,
    /// Registers of a segment, 16 where it is whole blocks.
    pub seg_registers: usize,
    /// First segment.
    pub seg0: usize,
    /// Group of each segment.
    pub seg_group: *const u32,
    /// Scales of the first panel.
    pub scales: ScalePtr,
    /// Elements between panels in scales and zeros.
    pub scale_stride: usize,
    /// Integer zeros of the first panel or null.
    pub zeros: *const u8,
    /// Float zeros of the first panel or null. Without either the zero is constant and folded into the sums.
    pub fzeros: *const f32,
    /// Activations.
    pub act: ActRows,
    /// Integer scales of the first panel, of two-level weights.
    pub inner: *const u8,
    /// Float sums `[m][ldc]`, read and written; int32 of two-level weights.
    pub c: *mut f32,
    /// Row stride of `c`.
    pub ldc: usize,
    /// All ones where values are `2u - sub`, else 0.
    pub dbl: i32,
    /// Bytes to prefetch ahead in the codes, 0 for none.
    pub prefetch: usize,
    /// The byte of each code, 64 entries, for kernels that look it up.
    pub table: *const u8,
}

/// Arguments of the ungrouped integer kernels.
#[derive(Debug, Clone, Copy)]
pub struct Raw {
    /// First panel, first block.
    pub codes: *const u8,
    /// Bytes between panels.
    pub panel_stride: usize,
    /// Blocks of K.
    pub blocks: usize,
    /// Activations.
    pub act: ActRows,
    /// Sums `[m][ldc]`, read and written.
    pub c: *mut i32,
    /// Row stride of `c`.
    pub ldc: usize,
    /// Bytes to prefetch ahead in the codes, 0 for none.
    pub prefetch: usize,
    /// The byte of each code, 64 entries, for kernels that look it up.
    pub table: *const u8,
}

/// Arguments of the kernel that decodes two-level weights.
#[derive(Debug, Clone, Copy)]
pub struct Inner {
    /// Packed codes.
    pub codes: *const u8,
    /// Where bytes go, 1024 for each block.
    pub bytes: *mut u8,
    /// Blocks of K.
    pub blocks: usize,
    /// The first block within the row.
    pub block0: usize,
    /// Places of a group.
    pub padded: usize,
    /// Groups in a row.
    pub groups: usize,
    /// Integer scales of the panel, `[group][16]`.
    pub mul: *const u8,
    /// What is added to the products, `[group][16]`.
    pub add: *const u8,
    /// What is subtracted from every byte.
    pub sub: u8,
    /// Bytes to prefetch ahead (wrapping).
    pub ahead: usize,
}

/// Arguments of the float kernels that decode as they go.
#[derive(Debug, Clone, Copy)]
pub struct F32Args {
    /// Unpacked codes of the first panel.
    pub bytes: *const u8,
    /// Bytes between panels.
    pub byte_stride: usize,
    /// Blocks of K.
    pub blocks: usize,
    /// Places of a group.
    pub padded: usize,
    /// The first block within the row: windows and groups need not begin together.
    pub block0: usize,
    /// Groups in a row.
    pub groups: usize,
    /// Scales of the first panel.
    pub scales: ScalePtr,
    /// Elements between panels in scales and zeros.
    pub scale_stride: usize,
    /// Integer zeros or null.
    pub zeros: *const u8,
    /// Float zeros or null.
    pub fzeros: *const f32,
    /// Constant zero.
    pub sub: i32,
    /// What each code is worth before a stored zero is subtracted: 64 or 256 entries.
    pub values: *const f32,
    /// What multiplies every scale.
    pub tensor: f32,
    /// Bytes to prefetch ahead in packed codes, 0 for none.
    pub prefetch: usize,
    /// Activations in padded places: row m at `m*x_stride`.
    pub x: *const f32,
    /// Floats between rows of `x`.
    pub x_stride: isize,
    /// Sums `[m][ldc]`, read and written.
    pub c: *mut f32,
    /// Row stride of `c`.
    pub ldc: usize,
}

/// Arguments of the dense float kernel.
#[derive(Debug, Clone, Copy)]
pub struct GemmArgs {
    /// Activations `[k][rows]`: the rows of a register tile side by side.
    pub x: *const f32,
    /// Weights `[panel][k][16]`.
    pub w: *const f32,
    /// Floats between panels.
    pub panel_stride: usize,
    /// Values of K.
    pub k: usize,
    /// Sums `[m][ldc]`, read and written.
    pub c: *mut f32,
    /// Row stride of `c`.
    pub ldc: usize,
}

/// A grouped integer kernel.
pub type GroupedFn = unsafe fn(&Grp);
/// An ungrouped integer kernel.
pub type RawFn = unsafe fn(&Raw);
/// A decoding float kernel.
pub type GemvFn = unsafe fn(&F32Args);
/// A dense float kernel.
pub type GemmFn = unsafe fn(&GemmArgs);

/// A product with trellis codes: groups, activations, sums, row stride of the sums.
pub type TrellisFn = unsafe fn(&trellis::Trellis, &trellis::Pairs, *mut f32, usize);
/// Trellis codes as floats.
pub type TrellisFloatsFn = unsafe fn(&trellis::Trellis, *mut f32);
/// Words of 16 bits as floats.
pub type WideFn = unsafe fn(&wide::Wide, *mut f32);

/// Everything one ISA offers. Look-ups answer `None` where a combination has no fused kernel; the byte kernels, which
/// read unpacked codes, serve every format.
#[derive(Debug)]
pub struct Kernels {
    /// The ISA.
    pub isa: Isa,
    /// Activation rows a byte kernel takes at most.
    pub max_mr: usize,
    /// `unpack[bits]`.
    pub unpack: [unsafe fn(*const u8, *mut u8, usize, u8, u8, usize); 9],
    /// See [`generic::look_up_all`].
    pub look_up: unsafe fn(*mut u8, usize, *const u8, u8, bool),
    /// See [`generic::look_up_halves`].
    pub look_up_halves: unsafe fn(*const u8, *mut u8, usize, *const u8, u8),
    /// See [`generic::unpack_inner`]; for codes of 2, 3 and 4 bits.
    pub unpack_inner: [unsafe fn(&Inner); 3],
    /// Fused grouped kernel for codes that are looked up, by (bits, twice those of halves; registers of a segment, rows).
    pub grouped_table: fn(usize, usize, usize) -> Option<(GroupedFn, usize)>,
    /// Fused ungrouped kernel for codes that are looked up, by (bits, twice those of halves; rows).
    pub raw_table: fn(usize, usize) -> Option<(RawFn, usize)>,
    /// Fused grouped kernel by (bits, stored zeros, registers of a segment, rows): kernel and panels.
    pub grouped: fn(usize, bool, usize, usize) -> Option<(GroupedFn, usize)>,
    /// Fused kernel for two-level weights by (bits, stored zeros, registers of a segment, rows, one panel only): kernel and
    /// panels.
    pub inner: fn(usize, bool, usize, usize, bool) -> Option<(GroupedFn, usize)>,
    /// Grouped kernel over bytes, one panel, by (largest code, stored zeros, registers of a segment, rows).
    pub grouped_bytes: fn(i32, bool, usize, usize) -> GroupedFn,
    /// Fused ungrouped kernel by (bits, rows).
    pub raw: fn(usize, usize) -> Option<(RawFn, usize)>,
    /// Ungrouped kernel over bytes, one panel, by (largest code, rows).
    pub raw_bytes: fn(i32, usize) -> RawFn,
    /// Float kernel over bytes by (weight mode, bf16 rounding, rows, one panel only): kernel and panels.
    pub gemv: fn(u8, bool, usize, bool) -> (GemvFn, usize),
    /// Float kernel over packed codes of 1, 2 or 4 bits by (bits, integer zeros, bf16 rounding, rows): kernel and panels.
    pub gemv_table: fn(usize, bool, bool, usize) -> Option<(GemvFn, usize)>,
    /// Expansion of bytes to floats by (weight mode, bf16 rounding).
    pub expand: fn(u8, bool) -> unsafe fn(&F32Args, *mut f32),
    /// Dense float kernel by (rows, one panel only).
    pub gemm: fn(usize, bool) -> GemmFn,
    /// Rows of the largest dense float kernel.
    pub gemm_mr: usize,
    /// Panels of the dense float kernel.
    pub gemm_np: usize,
    /// See [`generic::quantise_groups`].
    pub quantise_groups: unsafe fn(&Quantise) -> bool,
    /// See [`generic::code_sums`].
    pub code_sums: unsafe fn(*const i8, usize, *mut i32),
    /// See [`generic::sum_blocks`].
    pub sum_blocks: unsafe fn(*const i8, usize, usize) -> i32,
    /// See [`generic::finish_raw`].
    pub finish_raw: unsafe fn(*const i32, *mut f32, &Finish),
    /// See [`generic::finish_f32`].
    pub finish_f32: unsafe fn(*const f32, *mut f32, &Finish),
    /// Rounds floats to bfloat16 precision in place.
    pub round_bf16: unsafe fn(*mut f32, usize),
    /// Product with trellis codes by (bits, hash, rows): kernel and rows.
    pub trellis: fn(usize, u8, usize) -> (TrellisFn, usize),
    /// Trellis codes as floats by (bits, hash).
    pub trellis_expand: fn(usize, u8) -> TrellisFloatsFn,
    /// Codes of 9 to 16 bits as floats.
    pub wide: WideFn,
    /// Values of tables of rows, of so many values, as floats.
    pub row_tables: unsafe fn(&wide::Wide, usize, *mut f32),
    /// Vectors as floats by (length, entries of the second codebook).
    pub vectors: fn(usize, usize) -> WideFn,
}

/// The kernels of a level. AMX shares most vector kernels with AVX-512 VNNI and adds tiles (`x86::amx`).
pub fn table(isa: Isa) -> &'static Kernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &x86::AVX2,
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => &x86::AVXVNNI,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &x86::AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => &x86::AVX512VNNI,
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => &x86::tiles::KERNELS,
        _ => &SCALAR,
    }
}

/// Instantiates the generic kernels for one vector type as a [`Kernels`] table. `bytes` names the types of unpacked codes
/// below 16 and below 128: `Bytes4` and `Bytes7` where they have cheaper dot products, else `U8`, which serves all.
macro_rules! instantiate {
    (
        $(#[$feature:meta])* $name:ident, $isa:expr, $v:ty,
        fused [$(($bits:literal, $u:ident, $parts:literal, [$np1:literal, $np2:literal, $np4:literal] $(, eight $np8:literal)? $(, short [$fn1:literal, $fn2:literal, $fn4:literal])?)),*],
        lut [$(($lb:literal, $l:ident, $lp:literal, [$ln1:literal, $ln2:literal, $ln4:literal] $(, short [$sn1:literal, $sn2:literal, $sn4:literal])?)),*],
        inner [$(($ib:literal, $iu:ident, $ip:literal)),*], bytes [$small:ident, $narrow:ident], rows [$r2:literal, $r4:literal, $max_mr:literal], gemv [$vp1:literal, $vp4:literal], gemm $gnp:literal [$($mr:literal),*]
    ) => {
        pub(crate) const $name: crate::kernel::Kernels = {
            use crate::kernel::generic::{self, *};
            use crate::kernel::*;
            $(#[$feature])*
            unsafe fn unpack<U: Unpack>(src: *const u8, dst: *mut u8, n: usize, dbl: u8, sub: u8, ahead: usize) {
                // SAFETY: the caller's contract is that of the generic kernel.
                unsafe { generic::unpack::<$v, U>(src, dst, n, dbl, sub, ahead) }
            }
            $(#[$feature])*
            unsafe fn look_up(bytes: *mut u8, n: usize, table: *const u8, sub: u8, small: bool) {
                // SAFETY: as above.
                unsafe { generic::look_up_all::<$v>(bytes, n, table, sub, small) }
            }
            $(#[$feature])*
            unsafe fn look_up_halves(codes: *const u8, out: *mut u8, n: usize, table: *const u8, sub: u8) {
                // SAFETY: as above.
                unsafe { generic::look_up_halves::<$v>(codes, out, n, table, sub) }
            }
            $(#[$feature])*
            unsafe fn unpack_inner<U: Unpack>(a: &Inner) {
                // SAFETY: as above.
                unsafe { generic::unpack_inner::<$v, U>(a) }
            }
            $(#[$feature])*
            unsafe fn grouped<U: Unpack, const Z: bool, const SEG: usize, const NP: usize, const MR: usize, const PARTS: usize>(a: &Grp) {
                // SAFETY: as above.
                unsafe { generic::grouped::<$v, U, Z, false, SEG, NP, MR, PARTS>(a) }
            }
            $(#[$feature])*
            #[allow(dead_code)]
            unsafe fn two_level<U: Unpack, const Z: bool, const SEG: usize, const NP: usize, const MR: usize, const PARTS: usize>(a: &Grp) {
                // SAFETY: as above.
                unsafe { generic::grouped::<$v, U, Z, true, SEG, NP, MR, PARTS>(a) }
            }
            #[allow(unused_variables)]
            fn inner(bits: usize, zeros: bool, seg: usize, mr: usize, single: bool) -> Option<(GroupedFn, usize)> {
                macro_rules! rows { ($z:literal) => { match (bits, seg, mr, single) {
                    $( ($ib, 16, 1, false) => Some((two_level::<$iu, $z, 16, 4, 1, $ip> as GroupedFn, 4)),
                       ($ib, 16, 1, true) => Some((two_level::<$iu, $z, 16, 1, 1, $ip>, 1)),
                       ($ib, 16, 2, false) => Some((two_level::<$iu, $z, 16, 2, 2, $ip>, 2)),
                       ($ib, 16, 2, true) => Some((two_level::<$iu, $z, 16, 1, 2, $ip>, 1)),
                       ($ib, 16, 4, _) => Some((two_level::<$iu, $z, 16, 1, 4, $ip>, 1)),
                       ($ib, 8, 1, false) => Some((two_level::<$iu, $z, 8, 4, 1, $ip>, 4)),
                       ($ib, 8, 1, true) => Some((two_level::<$iu, $z, 8, 1, 1, $ip>, 1)),
                       ($ib, 8, 2, false) => Some((two_level::<$iu, $z, 8, 2, 2, $ip>, 2)),
                       ($ib, 8, 2, true) => Some((two_level::<$iu, $z, 8, 1, 2, $ip>, 1)),
                       ($ib, 8, 4, _) => Some((two_level::<$iu, $z, 8, 1, 4, $ip>, 1)), )*
                    _ => None,
                } } }
                if zeros { rows!(true) } else { rows!(false) }
            }
            $(#[$feature])*
            unsafe fn raw<U: Unpack, const NP: usize, const MR: usize, const PARTS: usize>(a: &Raw) {
                // SAFETY: as above.
                unsafe { generic::raw::<$v, U, NP, MR, PARTS>(a) }
            }
            $(#[$feature])*
            unsafe fn gemv<const W: u8, const ROUND: bool, const NP: usize, const MR: usize>(a: &F32Args) {
                // SAFETY: as above.
                unsafe { generic::gemv::<$v, W, ROUND, NP, MR>(a) }
            }
            $(#[$feature])*
            unsafe fn expand<const W: u8, const ROUND: bool>(a: &F32Args, out: *mut f32) {
                // SAFETY: as above.
                unsafe { generic::expand::<$v, W, ROUND>(a, out) }
            }
            $(#[$feature])*
            unsafe fn gemm<const NP: usize, const MR: usize>(a: &GemmArgs) {
                // SAFETY: as above.
                unsafe { generic::gemm::<$v, NP, MR>(a) }
            }
            $(#[$feature])*
            unsafe fn quantise_groups(a: &Quantise) -> bool {
                // SAFETY: as above.
                unsafe { generic::quantise_groups::<$v>(a) }
            }
            $(#[$feature])*
            unsafe fn code_sums(q: *const i8, seg: usize, out: *mut i32) {
                // SAFETY: as above.
                unsafe { generic::code_sums::<$v>(q, seg, out) }
            }
            $(#[$feature])*
            unsafe fn sum_blocks(q: *const i8, stride: usize, n: usize) -> i32 {
                // SAFETY: as above.
                unsafe { generic::sum_blocks::<$v>(q, stride, n) }
            }
            $(#[$feature])*
            unsafe fn finish_raw(c: *const i32, out: *mut f32, e: &Finish) {
                // SAFETY: as above.
                unsafe { generic::finish_raw::<$v>(c, out, e) }
            }
            $(#[$feature])*
            unsafe fn finish_f32(c: *const f32, out: *mut f32, e: &Finish) {
                // SAFETY: as above.
                unsafe { generic::finish_f32::<$v>(c, out, e) }
            }
            $(#[$feature])*
            unsafe fn round_bf16(x: *mut f32, n: usize) {
                // SAFETY: as above.
                unsafe { generic::round_rows::<$v>(x, n) }
            }
            $(#[$feature])*
            unsafe fn trellis_product<const B: usize, const HASH: u8, const MR: usize>(a: &trellis::Trellis, x: &trellis::Pairs, c: *mut f32, ldc: usize) {
                // SAFETY: as above.
                unsafe { trellis::product::<$v, B, HASH, MR>(a, x, c, ldc) }
            }
            $(#[$feature])*
            unsafe fn trellis_floats<const B: usize, const HASH: u8>(a: &trellis::Trellis, out: *mut f32) {
                // SAFETY: as above.
                unsafe { trellis::expand::<$v, B, HASH, false>(a, out) }
            }
            $(#[$feature])*
            unsafe fn wide_codes(a: &wide::Wide, out: *mut f32) {
                // SAFETY: as above.
                unsafe { wide::codes::<$v, false>(a, out) }
            }
            $(#[$feature])*
            unsafe fn row_tables(a: &wide::Wide, len: usize, out: *mut f32) {
                // SAFETY: as above.
                unsafe { wide::row_tables::<$v>(a, len, out) }
            }
            $(#[$feature])*
            unsafe fn wide_vectors<const V: usize, const SECOND: u8>(a: &wide::Wide, out: *mut f32) {
                // SAFETY: as above.
                unsafe { wide::vectors::<$v, V, SECOND, false>(a, out) }
            }
            fn vectors(len: usize, second: usize) -> WideFn {
                use wide::{ALONE, MANY, SIXTEEN};
                match (len, second) {
                    (2, _) => wide_vectors::<2, ALONE>,
                    (4, 0) => wide_vectors::<4, ALONE>,
                    (4, 16) => wide_vectors::<4, SIXTEEN>,
                    (4, _) => wide_vectors::<4, MANY>,
                    (6, _) => wide_vectors::<6, ALONE>,
                    (_, 0) => wide_vectors::<8, ALONE>,
                    _ => wide_vectors::<8, MANY>,
                }
            }
            fn trellis_pick(bits: usize, hash: u8, rows: usize) -> (TrellisFn, usize) {
                use trellis::{MAD1, MUL1};
                macro_rules! rows { ($b:literal, $hash:ident) => {
                    if rows == 1 { (trellis_product::<$b, $hash, 1> as TrellisFn, 1) } else { (trellis_product::<$b, $hash, 4>, 4) }
                } }
                match (hash, bits) {
                    (MUL1, 1) => rows!(1, MUL1),
                    (MUL1, 2) => rows!(2, MUL1),
                    (MUL1, 3) => rows!(3, MUL1),
                    (MUL1, 4) => rows!(4, MUL1),
                    (MUL1, _) => rows!(0, MUL1),
                    (_, 2) => rows!(2, MAD1),
                    _ => rows!(0, MAD1),
                }
            }
            fn trellis_expand(bits: usize, hash: u8) -> TrellisFloatsFn {
                use trellis::{HYB, INST3, MAD1, MUL1};
                match (hash, bits) {
                    (MUL1, 1) => trellis_floats::<1, MUL1>,
                    (MUL1, 2) => trellis_floats::<2, MUL1>,
                    (MUL1, 3) => trellis_floats::<3, MUL1>,
                    (MUL1, 4) => trellis_floats::<4, MUL1>,
                    (MUL1, _) => trellis_floats::<0, MUL1>,
                    (MAD1, 2) => trellis_floats::<2, MAD1>,
                    (MAD1, _) => trellis_floats::<0, MAD1>,
                    (INST3, 2) => trellis_floats::<2, INST3>,
                    (INST3, _) => trellis_floats::<0, INST3>,
                    (HYB, 4) => trellis_floats::<4, HYB>,
                    (HYB, 6) => trellis_floats::<6, HYB>,
                    _ => trellis_floats::<8, HYB>,
                }
            }
            #[allow(unused_variables, unreachable_patterns)]
            fn grouped_fused(bits: usize, zeros: bool, seg: usize, mr: usize) -> Option<(GroupedFn, usize)> {
                macro_rules! rows { ($z:literal) => { match (bits, seg, mr) {
                    $( ($bits, 16, 1) => Some((grouped::<$u, $z, 16, $np1, 1, $parts> as GroupedFn, $np1)),
                       ($bits, 16, 2) => Some((grouped::<$u, $z, 16, $np2, 2, $parts>, $np2)),
                       ($bits, 16, 4) => Some((grouped::<$u, $z, 16, $np4, 4, $parts>, $np4)),
                       $( ($bits, 8, 2) => Some((grouped::<$u, $z, 8, $fn2, 2, $parts>, $fn2)),
                          ($bits, 8, 4) => Some((grouped::<$u, $z, 8, $fn4, 4, $parts>, $fn4)), )?
                       ($bits, 8, 1) => Some((grouped::<$u, $z, 8, $np1, 1, $parts>, $np1)),
                       ($bits, 8, 2) => Some((grouped::<$u, $z, 8, $np2, 2, $parts>, $np2)),
                       ($bits, 8, 4) => Some((grouped::<$u, $z, 8, $np4, 4, $parts>, $np4)),
                       $( ($bits, 16, 8) => Some((grouped::<$u, $z, 16, $np8, 8, $parts>, $np8)), )?
                       $( ($bits, 4, 1) => Some((grouped::<$u, $z, 4, $fn1, 1, $parts>, $fn1)),
                          ($bits, 4, 2) => Some((grouped::<$u, $z, 4, $fn2, 2, $parts>, $fn2)),
                          ($bits, 4, 4) => Some((grouped::<$u, $z, 4, $fn4, 4, $parts>, $fn4)), )? )*
                    _ => None,
                } } }
                if zeros { rows!(true) } else { rows!(false) }
            }
            fn grouped_bytes(top: i32, zeros: bool, seg: usize, mr: usize) -> GroupedFn {
                // One row alone needs several chains of sums to hide the latency of the dot product.
                macro_rules! rows { ($by:ident, $z:literal) => { match (mr, seg) {
                    (1, 16) => grouped::<$by, $z, 16, 1, 1, 4> as GroupedFn,
                    (1, 8) => grouped::<$by, $z, 8, 1, 1, 4>,
                    (1, _) => grouped::<$by, $z, 0, 1, 1, 1>,
                    (2, _) => grouped::<$by, $z, 0, 1, $r2, 1>,
                    (4, _) => grouped::<$by, $z, 0, 1, $r4, 1>,
                    _ => grouped::<$by, $z, 0, 1, $max_mr, 1>,
                } } }
                if top > 255 {
                    return match mr {
                        1 => grouped::<Halved, false, 0, 1, 1, 2>,
                        2 => grouped::<Halved, false, 0, 1, $r2, 2>,
                        4 => grouped::<Halved, false, 0, 1, $r4, 2>,
                        _ => grouped::<Halved, false, 0, 1, $max_mr, 2>,
                    };
                }
                match (top, zeros) {
                    (..16, false) => rows!($small, false),
                    (..16, true) => rows!($small, true),
                    (..128, false) => rows!($narrow, false),
                    (..128, true) => rows!($narrow, true),
                    (_, false) => rows!(U8, false),
                    (_, true) => rows!(U8, true),
                }
            }
            #[allow(unused_variables)]
            fn raw_fused(bits: usize, mr: usize) -> Option<(RawFn, usize)> {
                match (bits, mr) {
                    $( ($bits, 1) => Some((raw::<$u, $np1, 1, $parts> as RawFn, $np1)),
                       ($bits, 2) => Some((raw::<$u, $np2, 2, $parts> as RawFn, $np2)),
                       ($bits, 4) => Some((raw::<$u, $np4, 4, $parts> as RawFn, $np4)), )*
                    _ => None,
                }
            }
            #[allow(unused_variables)]
            fn raw_table(bits: usize, mr: usize) -> Option<(RawFn, usize)> {
                match (bits, mr) {
                    $( ($lb, 1) => Some((raw::<$l, $ln1, 1, $lp> as RawFn, $ln1)),
                       ($lb, 2) => Some((raw::<$l, $ln2, 2, $lp> as RawFn, $ln2)),
                       ($lb, 4) => Some((raw::<$l, $ln4, 4, $lp> as RawFn, $ln4)), )*
                    _ => None,
                }
            }
            #[allow(unused_variables)]
            fn grouped_table(bits: usize, seg: usize, mr: usize) -> Option<(GroupedFn, usize)> {
                match (bits, seg, mr) {
                    $( ($lb, 16, 1) => Some((grouped::<$l, false, 16, $ln1, 1, $lp> as GroupedFn, $ln1)),
                       ($lb, 16, 2) => Some((grouped::<$l, false, 16, $ln2, 2, $lp>, $ln2)),
                       ($lb, 16, 4) => Some((grouped::<$l, false, 16, $ln4, 4, $lp>, $ln4)),
                       ($lb, 8, 1) => Some((grouped::<$l, false, 8, $ln1, 1, $lp>, $ln1)),
                       ($lb, 8, 2) => Some((grouped::<$l, false, 8, $ln2, 2, $lp>, $ln2)),
                       ($lb, 8, 4) => Some((grouped::<$l, false, 8, $ln4, 4, $lp>, $ln4)),
                       $( ($lb, 4, 1) => Some((grouped::<$l, false, 4, $sn1, 1, $lp>, $sn1)),
                          ($lb, 4, 2) => Some((grouped::<$l, false, 4, $sn2, 2, $lp>, $sn2)),
                          ($lb, 4, 4) => Some((grouped::<$l, false, 4, $sn4, 4, $lp>, $sn4)), )? )*
                    _ => None,
                }
            }
            fn raw_bytes(top: i32, mr: usize) -> RawFn {
                macro_rules! rows { ($by:ident) => { match mr {
                    1 => raw::<$by, 1, 1, 4> as RawFn,
                    2 => raw::<$by, 1, $r2, 1>,
                    4 => raw::<$by, 1, $r4, 1>,
                    _ => raw::<$by, 1, $max_mr, 1>,
                } } }
                if top > 255 {
                    return match mr {
                        1 => raw::<Halved, 1, 1, 2>,
                        2 => raw::<Halved, 1, $r2, 2>,
                        4 => raw::<Halved, 1, $r4, 2>,
                        _ => raw::<Halved, 1, $max_mr, 2>,
                    };
                }
                match top {
                    ..16 => rows!($small),
                    ..128 => rows!($narrow),
                    _ => rows!(U8),
                }
            }
            fn gemv_pick(w: u8, round: bool, mr: usize, single: bool) -> (GemvFn, usize) {
                macro_rules! rows { ($w:ident, $r:literal) => { match (mr, single) {
                    (1, false) => (gemv::<$w, $r, $vp1, 1> as GemvFn, $vp1),
                    (2, false) => (gemv::<$w, $r, $vp1, $r2> as GemvFn, $vp1),
                    (_, false) => (gemv::<$w, $r, $vp4, $r4> as GemvFn, $vp4),
                    (1, true) => (gemv::<$w, $r, 1, 1> as GemvFn, 1),
                    (2, true) => (gemv::<$w, $r, 1, $r2> as GemvFn, 1),
                    (_, true) => (gemv::<$w, $r, 1, $r4> as GemvFn, 1),
                } } }
                match (w, round) {
                    (W_MUL1, false) => rows!(W_MUL1, false),
                    (W_MUL1, true) => rows!(W_MUL1, true),
                    (W_MUL2, false) => rows!(W_MUL2, false),
                    (W_MUL2, true) => rows!(W_MUL2, true),
                    (W_TABLE16 | W_TABLE64, false) => rows!(W_TABLE64, false),
                    (W_TABLE16 | W_TABLE64, true) => rows!(W_TABLE64, true),
                    (W_TABLE256, false) => rows!(W_TABLE256, false),
                    (W_TABLE256, true) => rows!(W_TABLE256, true),
                    (_, false) => rows!(W_FLOAT, false),
                    (_, true) => rows!(W_FLOAT, true),
                }
            }
            $(#[$feature])*
            unsafe fn gemv_table<const B: usize, const Z: bool, const ROUND: bool, const NP: usize, const MR: usize>(a: &F32Args) {
                // SAFETY: as above.
                unsafe { generic::gemv_table::<$v, B, Z, ROUND, NP, MR>(a) }
            }
            fn table_pick(bits: usize, z: bool, round: bool, mr: usize) -> Option<(GemvFn, usize)> {
                macro_rules! rows { ($b:literal, $z:literal, $r:literal) => { match mr {
                    1 => (gemv_table::<$b, $z, $r, $vp1, 1> as GemvFn, $vp1),
                    2 => (gemv_table::<$b, $z, $r, $vp1, $r2> as GemvFn, $vp1),
                    _ => (gemv_table::<$b, $z, $r, $vp4, $r4> as GemvFn, $vp4),
                } } }
                macro_rules! modes { ($b:literal) => { match (z, round) {
                    (false, false) => rows!($b, false, false),
                    (false, true) => rows!($b, false, true),
                    (true, false) => rows!($b, true, false),
                    (true, true) => rows!($b, true, true),
                } } }
                Some(match bits {
                    1 => modes!(1),
                    2 => modes!(2),
                    4 => modes!(4),
                    _ => return None,
                })
            }
            fn expand_pick(w: u8, round: bool) -> unsafe fn(&F32Args, *mut f32) {
                match (w, round) {
                    (W_MUL1, false) => expand::<W_MUL1, false>,
                    (W_MUL1, true) => expand::<W_MUL1, true>,
                    (W_MUL2, false) => expand::<W_MUL2, false>,
                    (W_MUL2, true) => expand::<W_MUL2, true>,
                    (W_TABLE16, false) => expand::<W_TABLE16, false>,
                    (W_TABLE16, true) => expand::<W_TABLE16, true>,
                    (W_TABLE64, false) => expand::<W_TABLE64, false>,
                    (W_TABLE64, true) => expand::<W_TABLE64, true>,
                    (W_TABLE256, false) => expand::<W_TABLE256, false>,
                    (W_TABLE256, true) => expand::<W_TABLE256, true>,
                    (_, false) => expand::<W_FLOAT, false>,
                    (_, true) => expand::<W_FLOAT, true>,
                }
            }
            fn gemm_pick(mr: usize, single: bool) -> GemmFn {
                match (mr, single) {
                    $( ($mr, false) => gemm::<$gnp, $mr>, ($mr, true) => gemm::<1, $mr>, )*
                    _ => unreachable!("the loop nest asks for at most gemm_mr rows"),
                }
            }
            crate::kernel::Kernels {
                isa: $isa,
                max_mr: $max_mr,
                unpack: [
                    unpack::<U8>, unpack::<U1>, unpack::<U2>, unpack::<U3>, unpack::<U4>,
                    unpack::<U5>, unpack::<U6>, unpack::<U7>, unpack::<U8>,
                ],
                look_up,
                look_up_halves,
                unpack_inner: [unpack_inner::<U2>, unpack_inner::<U3>, unpack_inner::<U4>],
                grouped_table,
                raw_table,
                grouped: grouped_fused,
                inner,
                grouped_bytes,
                raw: raw_fused,
                raw_bytes,
                gemv: gemv_pick,
                gemv_table: table_pick,
                expand: expand_pick,
                gemm: gemm_pick,
                gemm_mr: [$($mr),*].len(),
                gemm_np: $gnp,
                quantise_groups,
                code_sums,
                sum_blocks,
                finish_raw,
                finish_f32,
                round_bf16,
                trellis: trellis_pick,
                trellis_expand,
                wide: wide_codes,
                row_tables,
                vectors,
            }
        };
    };
}
pub(crate) use instantiate;

instantiate!(
    SCALAR, Isa::Scalar, scalar::Scalar,
    fused [], lut [], inner [], bytes [U8, U8], rows [1, 1, 1], gemv [1, 1], gemm 1 [1]
);
