//! From floats to codes.
//!
//! `rtn` follows one rule per family (see the files of [`crate::format`]): the scale is computed in f32, rounded to its
//! type, and the codes are the nearest ones at the rounded scale, found by a true division, ties to even. A group of
//! zeros gets scale 1 and the code of 0 (in formats without a 0, see bipolar, the smallest scale). A scale that rounds
//! to 0 becomes the smallest positive value of its type, one that overflows is an error. Where the outermost code would
//! decode past the f32 range the scale is the next lower one.
//!
//! `mse` tries multiples of the `rtn` scale per group and keeps the one with the smallest squared error, the `rtn` scale
//! itself included: it is never worse. Where the whole tensor has one scale it is `rtn`.
use std::sync::Mutex;

use crate::format::vq::{self, Codebook};
use crate::format::{
    e4m3_byte, e8m0_byte, lanes, lut, Book, Element, Format, Level, ScaleType, Tie, ValueMap, Zero, ZeroKind,
};
use crate::qtensor::{area, parallel, rows_per_task, zeros_vec};
use crate::{Error, MatRef, QTensor, Result, Scales, Zeros};

/// How scales are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// Round to nearest with the rule's scale.
    Rtn,
    /// Search for the scale with the least squared error.
    Mse,
}

/// A quantised matrix and how far it is from the original.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// The matrix.
    pub tensor: QTensor,
    /// Per group, `[N][groups]`: an upper bound of `|w - decoded|`.
    pub bounds: Vec<f32>,
}

/// Where scales are written.
#[derive(Debug)]
pub enum ScalesMut<'a> {
    /// binary32
    F32(&'a mut [f32]),
    /// binary16 bits
    F16(&'a mut [u16]),
    /// bfloat16 bits
    BF16(&'a mut [u16]),
    /// Powers of two, one byte each
    E8M0(&'a mut [u8]),
    /// Positive small floats, one byte each
    E4M3(&'a mut [u8]),
    /// Positive integers, one byte each
    I8(&'a mut [u8]),
}

impl ScalesMut<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) | Self::BF16(v) => v.len(),
            Self::E8M0(v) | Self::E4M3(v) | Self::I8(v) => v.len(),
        }
    }

    /// Their type.
    pub fn kind(&self) -> ScaleType {
        match self {
            Self::F32(_) => ScaleType::F32,
            Self::F16(_) => ScaleType::F16,
            Self::BF16(_) => ScaleType::BF16,
            Self::E8M0(_) => ScaleType::E8M0,
            Self::E4M3(_) => ScaleType::E4M3,
            Self::I8(_) => ScaleType::I8,
        }
    }

    fn set(&mut self, i: usize, s: f32) {
        match self {
            Self::F32(v) => v[i] = s,
            Self::F16(v) => v[i] = half::f16::from_f32(s).to_bits(),
            Self::BF16(v) => v[i] = half::bf16::from_f32(s).to_bits(),
            Self::E8M0(v) => v[i] = e8m0_byte(s),
            Self::E4M3(v) => v[i] = e4m3_byte(s),
            Self::I8(v) => v[i] = s as u8,
        }
    }

    fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Self::F32(v) => {
                let (a, b) = v.split_at_mut(at);
                (Self::F32(a), Self::F32(b))
            }
            Self::F16(v) => {
                let (a, b) = v.split_at_mut(at);
                (Self::F16(a), Self::F16(b))
            }
            Self::BF16(v) => {
                let (a, b) = v.split_at_mut(at);
                (Self::BF16(a), Self::BF16(b))
            }
            Self::E8M0(v) => {
                let (a, b) = v.split_at_mut(at);
                (Self::E8M0(a), Self::E8M0(b))
            }
            Self::E4M3(v) => {
                let (a, b) = v.split_at_mut(at);
                (Self::E4M3(a), Self::E4M3(b))
            }
            Self::I8(v) => {
                let (a, b) = v.split_at_mut(at);
                (Self::I8(a), Self::I8(b))
            }
        }
    }
}

/// Buffers of the caller that receive a quantised matrix.
#[derive(Debug)]
pub struct Dest<'a> {
    /// `rows * row_bytes` bytes.
    pub codes: &'a mut [u8],
    /// `[rows][groups]`, of the format's type.
    pub scales: ScalesMut<'a>,
    /// `[rows][groups]` when the format has zero points, else empty.
    pub zeros: &'a mut [u8],
    /// `[rows][groups]`, or empty when the bounds are not wanted.
    pub bounds: &'a mut [f32],
    /// What multiplies the scales, as many as the format has.
    pub outer: &'a mut [f32],
    /// What each code is worth, where the matrix says that; else empty.
    pub table: &'a mut [f32],
}

impl Dest<'_> {
    fn check(&self, format: &Format, rows: usize, cols: usize) -> Result<()> {
        let count = rows * format.groups(cols);
        let zeros = if format.element.zero == ZeroKind::PerGroup { count } else { 0 };
        let fits = self.codes.len() == rows * format.row_bytes(cols)
            && self.scales.kind() == format.scale
            && self.scales.len() == count
            && self.zeros.len() == zeros
            && (self.bounds.is_empty() || self.bounds.len() == count)
            && self.outer.len() == format.outer_len(rows)
            && self.table.len() == format.table_len(rows);
        if fits {
            return Ok(());
        }
        Err(Error::Shape(format!(
            "buffers for {format} of shape ({rows}, {cols}): {} bytes of codes, {} {} scales, {} zero points, {} bounds",
            self.codes.len(),
            self.scales.len(),
            self.scales.kind().name(),
            self.zeros.len(),
            self.bounds.len()
        )))
    }

    /// The first `rows` rows and the rest.
    fn split(self, rows: usize, row_bytes: usize, groups: usize, outer: usize, table: usize) -> (Self, Self) {
        fn cut<T>(v: &mut [T], at: usize) -> (&mut [T], &mut [T]) {
            let at = at.min(v.len());
            v.split_at_mut(at)
        }
        let (codes, codes2) = cut(self.codes, rows * row_bytes);
        let (scales, scales2) = self.scales.split_at(rows * groups);
        let (zeros, zeros2) = cut(self.zeros, rows * groups);
        let (bounds, bounds2) = cut(self.bounds, rows * groups);
        let (outer, outer2) = cut(self.outer, outer);
        let (table, table2) = cut(self.table, table);
        let rest =
            Self { codes: codes2, scales: scales2, zeros: zeros2, bounds: bounds2, outer: outer2, table: table2 };
        (Self { codes, scales, zeros, bounds, outer, table }, rest)
    }
}

/// Quantises a matrix.
///
/// # Errors
/// [`Error::Value`] naming row and column of a value that is not finite, or row and group of a scale that overflows;
/// [`Error::Shape`], [`Error::OutOfMemory`].
pub fn quantize(x: &MatRef, format: &Format, method: Method, threads: usize) -> Result<Quantized> {
    let (rows, cols) = (x.rows, x.cols);
    area(rows, cols)?;
    let count = rows * format.groups(cols);
    let mut codes = zeros_vec(rows * format.row_bytes(cols))?;
    let mut scales = Scales::zeroed(format.scale, count)?;
    let mut zeros = zeros_vec(if format.element.zero == ZeroKind::PerGroup { count } else { 0 })?;
    let mut bounds = zeros_vec(count)?;
    let mut outer = zeros_vec(format.outer_len(rows))?;
    let mut table = zeros_vec(format.table_len(rows))?;
    let dest = Dest {
        codes: &mut codes,
        scales: match &mut scales {
            Scales::F32(v) => ScalesMut::F32(v),
            Scales::F16(v) => ScalesMut::F16(v),
            Scales::BF16(v) => ScalesMut::BF16(v),
            Scales::E8M0(v) => ScalesMut::E8M0(v),
            Scales::E4M3(v) => ScalesMut::E4M3(v),
            Scales::I8(v) => ScalesMut::I8(v),
        },
        zeros: &mut zeros,
        bounds: &mut bounds,
        outer: &mut outer,
        table: &mut table,
    };
    quantize_into(x, format, method, threads, dest)?;
    let zeros = if format.element.zero == ZeroKind::PerGroup { Zeros::Int(zeros) } else { Zeros::None };
    let tensor = QTensor { format: *format, rows, cols, codes, scales, zeros, outer, mask: None, table };
    Ok(Quantized { tensor, bounds })
}

/// As [`quantize`], into buffers of the caller. After an error their contents are unspecified.
///
/// # Errors
/// As [`quantize`], and [`Error::Shape`] for buffers that do not fit.
pub fn quantize_into(x: &MatRef, format: &Format, method: Method, threads: usize, dest: Dest) -> Result<()> {
    quantize_at(Level::detect(), x, format, method, None, threads, None, dest)
}

/// As [`quantize_into`]; `importance` weighs the columns where a table is learned, and `poll` is asked now and then, from the calling thread, whether to stop.
///
/// # Errors
/// As [`quantize_into`], and [`Error::Interrupted`].
pub fn quantize_polled(
    x: &MatRef,
    format: &Format,
    method: Method,
    importance: Option<&[f32]>,
    threads: usize,
    poll: &(dyn Fn() -> bool + Sync),
    dest: Dest,
) -> Result<()> {
    quantize_at(Level::detect(), x, format, method, importance, threads, Some(poll), dest)
}

/// As [`quantize_into`] with the instructions of one level, and perhaps a `poll`.
///
/// # Errors
/// As [`quantize_polled`].
pub fn quantize_at(
    level: Level,
    x: &MatRef,
    format: &Format,
    method: Method,
    importance: Option<&[f32]>,
    threads: usize,
    poll: Option<&(dyn Fn() -> bool + Sync)>,
    dest: Dest,
) -> Result<()> {
    let (rows, cols) = (x.rows, x.cols);
    area(rows, cols)?;
    if format.structure.is_some() {
        return Err(Error::Unsupported(format!("{format} is packed from {}, see sparse::pack", format.dense())));
    }
    dest.check(format, rows, cols)?;
    if let Some(weights) = importance {
        check_importance(weights, format, cols)?;
    }
    let e = format.element;
    let top = if format.has_tensor_scale() || e.shared { largest(level, x, threads)? } else { 0.0 };
    let tensor = if format.has_tensor_scale() { tensor_scale(top, format) } else { 1.0 };
    let (book, codebook, weights);
    let worth = match e.map {
        ValueMap::Learned => {
            dest.table.copy_from_slice(&lut::learn(level, x, 0..rows, format, tensor, importance)?);
            book = Book::new(dest.table, Tie::Down);
            Worth::Table(&book)
        }
        ValueMap::Vectors(shape) => {
            weights = column_weights(importance, cols)?;
            dest.table.copy_from_slice(&vq::learn(level, x, format, shape, &weights, threads, poll)?);
            codebook = Codebook::new(shape, dest.table)?;
            Worth::Vectors(&codebook, &weights)
        }
        _ => Worth::Element,
    };
    let common = Common { tensor, top: e.shared.then_some(top), worth };
    dest.outer.fill(tensor);
    if e.tables_of_rows() {
        dest.table.fill(0.0);
    }
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let (row_bytes, groups) = (format.row_bytes(cols), format.groups(cols));
    let step = rows_per_task(rows, cols, threads);
    let mut parts = Vec::with_capacity(rows.div_ceil(step));
    let mut rest = dest;
    for row0 in (0..rows).step_by(step) {
        let n = step.min(rows - row0);
        let outer = if format.is_two_level() { n } else { 0 };
        let table = if e.tables_of_rows() { format.table_len(n) } else { 0 };
        let (part, tail) = rest.split(n, row_bytes, groups, outer, table);
        parts.push((row0, part));
        rest = tail;
    }
    // The first error in row order is reported, whichever thread met it first.
    let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let lock = || failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let finished = parallel(threads, parts, poll, |task, (row0, part)| {
        if lock().as_ref().is_some_and(|(t, _)| *t < task) {
            return;
        }
        let done = if e.tables_of_rows() {
            rows_with_tables(level, x, format, method, importance, common, row0, part)
        } else {
            rows_of(level, x, format, method, common, row0, part)
        };
        if let Err(e) = done {
            let mut slot = lock();
            if slot.as_ref().is_none_or(|(t, _)| task < *t) {
                *slot = Some((task, e));
            }
        }
    });
    let first = lock().take();
    first.map_or(finished, |(_, e)| Err(e))
}

/// Whether numbers can weigh the columns.
fn check_importance(weights: &[f32], format: &Format, cols: usize) -> Result<()> {
    if format.element.learned() == 0 {
        return Err(Error::Value(format!("{format} learns no table that importance could weigh")));
    }
    if weights.len() != cols {
        return Err(Error::Shape(format!("importance of {} columns, the matrix has {cols}", weights.len())));
    }
    match weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
        None => Ok(()),
        Some(k) => {
            Err(Error::Value(format!("importance {} of column {k} is not finite and positive, or 0", weights[k])))
        }
    }
}

/// How much columns count within a vector: their importance, the largest being 1; 1 where none is given or all are 0.
fn column_weights(importance: Option<&[f32]>, cols: usize) -> Result<Vec<f32>> {
    let mut weights = zeros_vec(cols)?;
    let top = importance.unwrap_or(&[]).iter().fold(0.0f32, |m, w| m.max(*w));
    match importance {
        Some(given) if top > 0.0 => weights.iter_mut().zip(given).for_each(|(w, v)| *w = v / top),
        _ => weights.fill(1.0),
    }
    Ok(weights)
}

/// What the codes of a tensor are worth before the scale.
#[derive(Clone, Copy)]
enum Worth<'a> {
    /// What the element says.
    Element,
    /// A table that was learned.
    Table(&'a Book),
    /// A codebook that was learned, and how much each column counts.
    Vectors(&'a Codebook, &'a [f32]),
}

impl Worth<'_> {
    /// For some columns alone.
    fn of_columns(self, k0: usize, len: usize) -> Self {
        match self {
            Self::Vectors(book, weights) => Self::Vectors(book, &weights[k0..k0 + len]),
            all => all,
        }
    }

    /// As [`crate::format::Codec::encode`].
    fn encode(self, e: &Element, level: Level, x: &[f32], s: f32, z: Zero, out: &mut [u8]) -> f32 {
        match self {
            Self::Element => e.codec.encode(e, level, x, s, z, e.lowest, out),
            Self::Table(book) => book.encode(level, x, s, out),
            Self::Vectors(book, weights) => book.encode(level, x, s, weights, out),
        }
    }

    /// As [`crate::format::Codec::cost`].
    fn cost(self, e: &Element, level: Level, x: &[f32], s: f32, z: Zero) -> f32 {
        match self {
            Self::Element => e.codec.cost(e, level, x, s, z),
            Self::Table(book) => book.cost(level, x, s),
            Self::Vectors(book, weights) => book.cost(level, x, s, weights),
        }
    }

    /// As [`crate::format::Codec::decode`].
    fn decode(self, e: &Element, level: Level, u: &[u8], s: f32, z: Zero, out: &mut [f32]) {
        match self {
            Self::Element => e.codec.decode(e, level, u, s, z, out),
            Self::Table(book) => lanes::book_decode(level, u, book.of_bytes(), s, out),
            Self::Vectors(book, _) => book.decode(level, u, s, out),
        }
    }
}

/// What the groups of a tensor have in common.
#[derive(Clone, Copy)]
struct Common<'a> {
    /// What multiplies every scale.
    tensor: f32,
    /// The largest magnitude of the tensor, where it decides the scale of every group.
    top: Option<f32>,
    /// What codes are worth.
    worth: Worth<'a>,
}

/// The largest magnitude. Values that are not finite are left to be found later.
fn largest(level: Level, x: &MatRef, threads: usize) -> Result<f32> {
    let step = rows_per_task(x.rows.max(1), x.cols, threads);
    let mut tops = zeros_vec::<u32>(x.rows.div_ceil(step))?;
    parallel(threads, tops.iter_mut().collect(), None, |task, top| {
        let mut row = vec![0.0; x.cols];
        for n in task * step..x.rows.min((task + 1) * step) {
            x.read_row(n, 0, &mut row);
            let bits = lanes::absmax_bits(level, &row);
            *top = (*top).max(if bits < 0x7f80_0000 { bits } else { 0 });
        }
    })?;
    Ok(f32::from_bits(tops.into_iter().max().unwrap_or(0)))
}

/// The scale of the tensor: the largest magnitude over the largest number that element and group scale make, at least
/// `2^-126`; 1 where all is zero and the element has a code for it.
fn tensor_scale(top: f32, format: &Format) -> f32 {
    let largest = format.scale.largest() * format.element.top();
    let mut s = top / largest;
    while !(s * largest).is_finite() {
        s = s.next_down();
    }
    // Times the smallest group scale it must not vanish.
    if top > 0.0 || !format.element.codec.has_zero() {
        s.max(f32::MIN_POSITIVE)
    } else {
        1.0
    }
}

/// As [`rows_of`], of rows that have a table each.
fn rows_with_tables(
    level: Level,
    x: &MatRef,
    format: &Format,
    method: Method,
    importance: Option<&[f32]>,
    common: Common,
    row0: usize,
    mut part: Dest,
) -> Result<()> {
    let (row_bytes, groups) = (format.row_bytes(x.cols), format.groups(x.cols));
    for n in row0..row0 + part.codes.len() / row_bytes {
        let (own, rest) = part.split(1, row_bytes, groups, 0, format.table_len(1));
        own.table.copy_from_slice(&lut::learn(level, x, n..n + 1, format, common.tensor, importance)?);
        let book = Book::new(own.table, Tie::Down);
        rows_of(level, x, format, method, Common { worth: Worth::Table(&book), ..common }, n, own)?;
        part = rest;
    }
    Ok(())
}

fn rows_of(
    level: Level,
    x: &MatRef,
    format: &Format,
    method: Method,
    common: Common,
    row0: usize,
    mut part: Dest,
) -> Result<()> {
    let (e, cols) = (format.element, x.cols);
    if e.span() > 1 {
        // A search takes long: what is bad is found first.
        finite(level, x, row0, part.codes.len() / format.row_bytes(cols))?;
    }
    let (row_bytes, groups, len) = (format.row_bytes(cols), format.groups(cols), format.group_len(cols));
    let size = e.code_bytes();
    let mut codes = zeros_vec::<u8>(cols * size)?;
    let mut scratch = Scratch::default();
    let mut copy = Vec::new();
    for i in 0..part.codes.len() / row_bytes {
        let row = row0 + i;
        let values = if let Some(v) = x.row_f32(row) {
            v
        } else {
            if copy.is_empty() {
                copy = zeros_vec(cols)?;
            }
            x.read_row(row, 0, &mut copy);
            &copy[..]
        };
        if let Some(kind) = e.plain {
            part.scales.set(i, 1.0);
            let mut worst = 0.0f32;
            for (k, (&w, b)) in values.iter().zip(part.codes[i * row_bytes..].chunks_exact_mut(kind.size())).enumerate()
            {
                kind.write(w, b);
                let v = kind.read(b);
                if !v.is_finite() {
                    let fault =
                        if w.is_finite() { format!("overflows {}", kind.name()) } else { "is not finite".into() };
                    return Err(Error::Value(format!("{w} at row {row}, column {k} {fault}")));
                }
                worst = worst.max((w - v).abs());
            }
            if !part.bounds.is_empty() {
                part.bounds[i] = upper(worst);
            }
            continue;
        }
        let outer = if format.is_two_level() {
            part.outer[i] = row_scale(level, format, values);
            part.outer[i]
        } else {
            common.tensor
        };
        let common = Common { tensor: outer, ..common };
        for (g, (w, u)) in values.chunks(len).zip(codes.chunks_mut(len * size)).enumerate() {
            let bits = lanes::absmax_bits(level, w);
            let at = i * groups + g;
            if bits >= 0x7f80_0000 && e.nan {
                u.fill(e.zero_code());
                part.scales.set(at, f32::NAN);
                if !part.bounds.is_empty() {
                    part.bounds[at] = 0.0;
                }
                continue;
            }
            if bits >= 0x7f80_0000 {
                return Err(not_finite(w, row, g * len));
            }
            let top = common.top.unwrap_or(f32::from_bits(bits));
            let common = Common { worth: common.worth.of_columns(g * len, w.len()), ..common };
            let group = encode_group(level, format, method, common, w, top, u, &mut scratch).map_err(|s| {
                Error::Value(format!("scale {s:e} at row {row}, group {g} overflows {}", format.scale.name()))
            })?;
            part.scales.set(at, group.scale);
            if let Zero::Int(z) = group.zero {
                part.zeros[at] = z;
            }
            if !part.bounds.is_empty() {
                part.bounds[at] = group.bound;
            }
        }
        lanes::pack(level, e.bits, &codes, &mut part.codes[i * row_bytes..(i + 1) * row_bytes]);
    }
    Ok(())
}

/// The scale of a row in a two-level format: its largest group gets the largest inner scale. Values that are not finite are
/// left to be found later.
fn row_scale(level: Level, format: &Format, row: &[f32]) -> f32 {
    let e = format.element;
    let absmax = |x: &[f32]| f32::from_bits(lanes::absmax_bits(level, x).min(f32::MAX.to_bits()));
    let wanted = if e.zero == ZeroKind::PerGroup {
        absmax(row) / e.inner_reach() as f32
    } else {
        let groups = row.chunks(format.group_len(row.len()));
        let scale = |x: &[f32]| match absmax(x) {
            top if top > 0.0 && top < f32::MAX => e.codec.fit(e, level, x, top).scale,
            _ => 0.0,
        };
        groups.map(scale).fold(0.0, f32::max) / f32::from(e.inner_top())
    };
    // Times the largest byte it must stay finite, and it must not vanish.
    wanted.clamp(f32::MIN_POSITIVE, f32::MAX / 256.0)
}

/// The error that names the first value of a row that is not finite.
fn not_finite(w: &[f32], row: usize, k0: usize) -> Error {
    let k = w.iter().position(|v| !v.is_finite()).unwrap_or(0);
    Error::Value(format!("{} at row {row}, column {} is not finite", w[k], k0 + k))
}

/// Whether all values of some rows are finite.
fn finite(level: Level, x: &MatRef, row0: usize, rows: usize) -> Result<()> {
    let mut values = zeros_vec(x.cols)?;
    for row in row0..row0 + rows {
        x.read_row(row, 0, &mut values);
        if lanes::absmax_bits(level, &values) >= 0x7f80_0000 {
            return Err(not_finite(&values, row, 0));
        }
    }
    Ok(())
}

struct Group {
    scale: f32,
    zero: Zero,
    bound: f32,
}

#[derive(Default)]
struct Scratch {
    codes: Vec<u8>,
    values: Vec<f32>,
}

/// Chooses the scale of a group and writes its codes; the error is a scale that overflows.
fn encode_group(
    level: Level,
    format: &Format,
    method: Method,
    common: Common,
    x: &[f32],
    absmax: f32,
    out: &mut [u8],
    scratch: &mut Scratch,
) -> std::result::Result<Group, f32> {
    let (e, tensor, worth) = (format.element, common.tensor, common.worth);
    let (unit, codec) = (e.unit * tensor, e.codec);
    let encode = |s: f32, z: Zero, out: &mut [u8]| worth.encode(e, level, x, s, z, out);
    if absmax == 0.0 && codec.has_zero() {
        let zero = codec.zero(e, 0.0, 1.0);
        let error = encode(unit, zero, out);
        return Ok(Group { scale: 1.0, zero, bound: upper(error) });
    }
    let fit = codec.fit(e, level, x, absmax);
    let scale = format.round_scale(fit.scale / tensor)?;
    let zero = codec.zero(e, fit.low, scale * tensor);
    let error = encode(scale * unit, zero, out);
    let group = Group { scale, zero, bound: upper(error) };
    if method == Method::Rtn || e.shared {
        return Ok(group);
    }

    let cost = |s: f32, z: Zero| worth.cost(e, level, x, s * unit, z) * (s / scale) * (s / scale);
    let mut best = (cost(scale, zero), scale, zero);
    // Short groups gain little from a fine search, and the search may cost at most ten times `rtn`.
    let step = match x.len() {
        0..16 => 3,
        16..64 => 2,
        _ => 1,
    };
    let shrinks = codec.shrinks(e);
    let step = if shrinks.len() < 4 { 1 } else { step };
    for &f in shrinks.iter().step_by(step) {
        let Ok(s) = format.round_scale(fit.scale / tensor * f) else {
            continue;
        };
        if s == scale {
            continue;
        }
        let z = codec.zero(e, fit.low * f, s * tensor);
        if format.is_two_level() && !e.fits_inner(s as u8, z, (0, e.levels as i32 - 1)) {
            continue;
        }
        let c = cost(s, z);
        if c < best.0 {
            best = (c, s, z);
        }
    }
    if best.1 == scale {
        return Ok(group);
    }
    // The ranking is approximate; the choice is made on the decoded numbers.
    let (_, s, z) = best;
    scratch.codes.resize(x.len() * e.code_bytes(), 0);
    scratch.values.resize(x.len(), 0.0);
    let decode = |u: &[u8], s: f32, z: Zero, out: &mut [f32]| worth.decode(e, level, u, s, z, out);
    let error = encode(s * unit, z, &mut scratch.codes);
    decode(out, scale * unit, zero, &mut scratch.values);
    let before = lanes::square_error(level, x, &scratch.values);
    decode(&scratch.codes, s * unit, z, &mut scratch.values);
    if lanes::square_error(level, x, &scratch.values) < before {
        out.copy_from_slice(&scratch.codes);
        return Ok(Group { scale: s, zero: z, bound: upper(error) });
    }
    Ok(group)
}

/// An upper bound of the error whose rounded value is `e`: a rounded difference of two floats is below the true one by
/// less than one step, and 0 only if the two are equal.
fn upper(e: f32) -> f32 {
    if e > 0.0 {
        e.next_up()
    } else {
        0.0
    }
}
