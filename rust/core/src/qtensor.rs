//! A matrix in a format, in the portable layout.
//!
//! Codes are stored unsigned (`u`), bit-packed little-endian along K, element 0 in the lowest bits of byte 0; each row
//! starts at a byte. Scales are `[N][groups]`, zeros likewise.
use crate::bits;
use crate::format::{lanes, vq, Book, Format, Level, ScaleType, Tie, ValueMap, Zero, ZeroKind};
use crate::pool;
use crate::sparse::{mask, Mask};
use crate::{Error, Result};
use std::borrow::Cow;

/// Owned scales; 16-bit types are kept as their bits.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// binary32
    F32(Vec<f32>),
    /// binary16 bits
    F16(Vec<u16>),
    /// bfloat16 bits
    BF16(Vec<u16>),
    /// Powers of two, one byte each
    E8M0(Vec<u8>),
    /// Positive small floats, one byte each
    E4M3(Vec<u8>),
    /// Positive integers, one byte each
    I8(Vec<u8>),
}

/// Borrowed scales.
#[derive(Debug, Clone, Copy)]
pub enum ScalesRef<'a> {
    /// binary32
    F32(&'a [f32]),
    /// binary16 bits
    F16(&'a [u16]),
    /// bfloat16 bits
    BF16(&'a [u16]),
    /// Powers of two, one byte each
    E8M0(&'a [u8]),
    /// Positive small floats, one byte each
    E4M3(&'a [u8]),
    /// Positive integers, one byte each
    I8(&'a [u8]),
}

/// Owned zero points.
#[derive(Debug, Clone, PartialEq)]
pub enum Zeros {
    /// The format has none.
    None,
    /// Integers, subtracted from the codes in integer arithmetic.
    Int(Vec<u8>),
    /// Floats: `w = fma(u, s, -fl(s*z))`.
    Float(Vec<f32>),
}

/// Borrowed zero points.
#[derive(Debug, Clone, Copy)]
pub enum ZerosRef<'a> {
    /// The format has none.
    None,
    /// Integers.
    Int(&'a [u8]),
    /// Floats.
    Float(&'a [f32]),
}

/// A matrix in the portable layout, borrowed (the bytes may belong to `NumPy`).
#[derive(Debug, Clone, Copy)]
pub struct QView<'a> {
    /// The format.
    pub format: Format,
    /// N, the rows.
    pub rows: usize,
    /// K, the columns.
    pub cols: usize,
    /// `rows * row_bytes` bytes, or those of the kept entries.
    pub codes: &'a [u8],
    /// `[rows][groups]`.
    pub scales: ScalesRef<'a>,
    /// `[rows][groups]`, or none.
    pub zeros: ZerosRef<'a>,
    /// What multiplies the scales: one number of each row, one of the tensor, or nothing.
    pub outer: &'a [f32],
    /// Which entries are kept, of sparse formats.
    pub mask: Option<&'a Mask>,
    /// What each code is worth, where the matrix says that; else empty.
    pub table: &'a [f32],
}

/// A matrix in the portable layout, owned.
#[derive(Debug, Clone)]
pub struct QTensor {
    /// The format.
    pub format: Format,
    /// N, the rows.
    pub rows: usize,
    /// K, the columns.
    pub cols: usize,
    /// Packed codes.
    pub codes: Vec<u8>,
    /// Scales.
    pub scales: Scales,
    /// Zero points.
    pub zeros: Zeros,
    /// What multiplies the scales: one number of each row, one of the tensor, or nothing.
    pub outer: Vec<f32>,
    /// Which entries are kept, of sparse formats.
    pub mask: Option<Mask>,
    /// What each code is worth, where the matrix says that; else empty.
    pub table: Vec<f32>,
}

/// Rows that one task of a parallel pass takes: enough to be worth handing out, few enough to stop soon after a poll.
pub(crate) fn rows_per_task(rows: usize, cols: usize, threads: usize) -> usize {
    const MIN_ELEMENTS: usize = 1 << 16;
    let by_work = MIN_ELEMENTS.div_ceil(cols.max(1));
    rows.div_ceil(threads.max(1) * 4).clamp(by_work, 16 * by_work)
}

/// A vector of `len` zeros, or an error instead of an abort when memory runs out.
pub(crate) fn zeros_vec<T: Clone + Default>(len: usize) -> Result<Vec<T>> {
    let mut v = Vec::new();
    v.try_reserve_exact(len).map_err(|_| Error::OutOfMemory(len.saturating_mul(size_of::<T>())))?;
    v.resize(len, T::default());
    Ok(v)
}

/// `rows * cols`, if arrays of that many numbers can exist; neither extent may be past that by itself.
pub(crate) fn area(rows: usize, cols: usize) -> Result<usize> {
    rows.max(1)
        .checked_mul(cols.max(1))
        .filter(|&n| n < isize::MAX as usize / 8)
        .map(|_| rows * cols)
        .ok_or_else(|| Error::Shape(format!("shape ({rows}, {cols}) is too large")))
}

impl Scales {
    /// Zeroed scales of a type.
    pub(crate) fn zeroed(kind: ScaleType, len: usize) -> Result<Self> {
        Ok(match kind {
            ScaleType::F32 => Self::F32(zeros_vec(len)?),
            ScaleType::F16 => Self::F16(zeros_vec(len)?),
            ScaleType::BF16 => Self::BF16(zeros_vec(len)?),
            ScaleType::E8M0 => Self::E8M0(zeros_vec(len)?),
            ScaleType::E4M3 => Self::E4M3(zeros_vec(len)?),
            ScaleType::I8 => Self::I8(zeros_vec(len)?),
        })
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        let v = self.view();
        v.len() * v.kind().size()
    }

    /// Borrows the scales.
    pub fn view(&self) -> ScalesRef<'_> {
        match self {
            Self::F32(v) => ScalesRef::F32(v),
            Self::F16(v) => ScalesRef::F16(v),
            Self::BF16(v) => ScalesRef::BF16(v),
            Self::E8M0(v) => ScalesRef::E8M0(v),
            Self::E4M3(v) => ScalesRef::E4M3(v),
            Self::I8(v) => ScalesRef::I8(v),
        }
    }

    /// The scales in f32, which is exact.
    pub fn to_f32(&self) -> Vec<f32> {
        let v = self.view();
        (0..v.len()).map(|i| v.get(i)).collect()
    }
}

impl ScalesRef<'_> {
    /// Number of scales.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) | Self::BF16(v) => v.len(),
            Self::E8M0(v) | Self::E4M3(v) | Self::I8(v) => v.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Type of the scales.
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

    /// Scale `i` in f32, which is exact.
    ///
    /// # Panics
    /// If `i` is out of range.
    #[inline]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::F32(v) => v[i],
            Self::F16(v) => half::f16::from_bits(v[i]).to_f32(),
            Self::BF16(v) => f32::from_bits(u32::from(v[i]) << 16),
            Self::E8M0(v) => crate::format::e8m0(v[i]),
            Self::E4M3(v) => crate::format::e4m3(v[i]),
            Self::I8(v) => f32::from(v[i]),
        }
    }
}

impl Zeros {
    /// Borrows the zero points.
    pub fn view(&self) -> ZerosRef<'_> {
        match self {
            Self::None => ZerosRef::None,
            Self::Int(v) => ZerosRef::Int(v),
            Self::Float(v) => ZerosRef::Float(v),
        }
    }
}

impl<'a> QView<'a> {
    /// A checked view of a matrix in the portable layout. A view made as a literal is not checked; make one only of
    /// parts that were checked before.
    ///
    /// # Errors
    /// [`Error::Shape`] for a buffer of the wrong length, [`Error::Value`] for an illegal code, a padding bit that is
    /// set, a scale that is not finite, a zero point out of range or of the wrong kind.
    pub fn new(
        format: Format,
        rows: usize,
        cols: usize,
        codes: &'a [u8],
        scales: ScalesRef<'a>,
        zeros: ZerosRef<'a>,
    ) -> Result<Self> {
        Self::with_mask(format, rows, cols, codes, scales, zeros, None)
    }

    /// As [`QView::new`], with the mask that a sparse format has.
    ///
    /// # Errors
    /// As [`QView::new`], and [`Error::Value`] where the mask is missing, or one too many, or of another structure.
    pub fn with_mask(
        format: Format,
        rows: usize,
        cols: usize,
        codes: &'a [u8],
        scales: ScalesRef<'a>,
        zeros: ZerosRef<'a>,
        mask: Option<&'a Mask>,
    ) -> Result<Self> {
        area(rows, cols)?;
        let view = Self { format, rows, cols, codes, scales, zeros, outer: &[], mask, table: &[] };
        if mask.map(Mask::structure) != format.structure {
            return Err(Error::Value(format!("{format} needs the mask of its structure, and no other")));
        }
        if mask.is_some_and(|m| m.shape() != (rows, cols)) {
            return Err(Error::Shape(format!("the mask is of another shape than ({rows}, {cols})")));
        }
        if mask.is_some() && matches!(zeros, ZerosRef::Float(_)) {
            return Err(Error::Value(format!("{format} with float zero points has no code for 0")));
        }
        let want = mask.map_or(rows * format.row_bytes(cols), Mask::code_bytes);
        if codes.len() != want {
            return Err(Error::Shape(format!(
                "{format} of shape ({rows}, {cols}) has {want} bytes of codes, not {}",
                codes.len()
            )));
        }
        view.check_scales()?;
        view.check_codes()?;
        view.check_inner()?;
        Ok(view)
    }

    /// The code of an entry of group `g` of row `n` that is worth 0.
    pub fn zero_code(&self, n: usize, g: usize) -> u8 {
        match self.zero(n, g) {
            Zero::Int(z) => z,
            _ => self.format.element.zero_code(),
        }
    }

    /// Stored codes of a row of a sparse matrix from column `k0` on, with those of 0 where entries were dropped.
    fn unpack_kept(&self, m: &Mask, n: usize, k0: usize, out: &mut [u8]) {
        let len = self.group_len();
        let (mut k, mut rest) = (k0, &mut *out);
        while !rest.is_empty() {
            let here = (len - k % len).min(rest.len());
            let (part, tail) = rest.split_at_mut(here);
            part.fill(self.zero_code(n, k / len));
            (k, rest) = (k + here, tail);
        }
        mask::spread_row(m, self.format.element.bits, n, &self.codes[m.span(n)], k0, out);
    }

    /// The view with what multiplies its scales; without this it is 1.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of them than the format has, [`Error::Value`] for one that is not positive and
    /// finite.
    pub fn with_outer(self, outer: &'a [f32]) -> Result<Self> {
        let want = self.format.outer_len(self.rows);
        if outer.len() != want {
            return Err(Error::Shape(format!("{} has {want} outer scales, not {}", self.format, outer.len())));
        }
        if let Some(s) = outer.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
            let what = if self.format.is_two_level() { "a scale of a row" } else { "the scale of the tensor" };
            return Err(Error::Value(format!("{what}, {s}, is not positive and finite")));
        }
        Ok(Self { outer, ..self })
    }

    /// The view with its table of values, of formats whose matrices bring one.
    ///
    /// # Errors
    /// [`Error::Shape`] for a table of another length, [`Error::Value`] for a value that is not finite.
    pub fn with_table(self, table: &'a [f32]) -> Result<Self> {
        let want = self.format.table_len(self.rows);
        if table.len() != want {
            return Err(Error::Shape(format!("{} has a table of {want} values, not {}", self.format, table.len())));
        }
        if let Some(i) = table.iter().position(|v| !v.is_finite()) {
            return Err(Error::Value(format!("value {} of the table, {}, is not finite", i, table[i])));
        }
        Ok(Self { table, ..self })
    }

    /// The table of a row, of formats whose matrices or rows bring one.
    pub fn row_table(&self, n: usize) -> &'a [f32] {
        if self.format.element.tables_of_rows() {
            let len = self.format.element.learned();
            return &self.table[n * len..(n + 1) * len];
        }
        self.table
    }

    /// The table of values with what integer products need, of formats that have one.
    pub fn book(&self) -> Option<Cow<'static, Book>> {
        match self.format.element.book() {
            Some(book) => Some(Cow::Borrowed(book)),
            None if self.table.is_empty() || !matches!(self.format.element.map, ValueMap::Learned) => None,
            None => Some(Cow::Owned(Book::new(self.table, Tie::Down))),
        }
    }

    fn check_scales(&self) -> Result<()> {
        let (format, rows, groups) = (self.format, self.rows, self.groups());
        let count = rows * groups;
        if self.scales.kind() != format.scale {
            return Err(Error::Value(format!(
                "{format} has {} scales, not {}",
                format.scale.name(),
                self.scales.kind().name()
            )));
        }
        let check_len = |what: &str, len: usize| {
            if len == count {
                return Ok(());
            }
            Err(Error::Shape(format!("{format} needs {what} of shape ({rows}, {groups}), {count} in all, not {len}")))
        };
        check_len("scales", self.scales.len())?;
        let negative = |s: f32| format.scale == ScaleType::E4M3 && s.is_sign_negative();
        let legal = |s: f32| (s.is_finite() && !negative(s)) || (format.element.nan && s.is_nan());
        if let Some(i) = (0..count).find(|&i| !legal(self.scales.get(i))) {
            let s = self.scales.get(i);
            let fault = if negative(s) && s.is_finite() { "negative" } else { "not finite" };
            return Err(Error::Value(format!("scale {s} at row {}, group {} is {fault}", i / groups, i % groups)));
        }
        if let ScalesRef::I8(inner) = self.scales {
            if let Some(i) = inner.iter().position(|t| *t == 0) {
                return Err(Error::Value(format!("scale 0 at row {}, group {} is below 1", i / groups, i % groups)));
            }
        }
        if format.element.shared {
            let first = |i: usize| self.scales.get(i).to_bits() == self.scales.get(0).to_bits();
            if let Some(i) = (0..count).find(|&i| !first(i)) {
                return Err(Error::Value(format!("{format} has one scale, but row {} has another", i / groups)));
            }
        }
        let top = format.element.levels - 1;
        match (format.element.zero, self.zeros) {
            (ZeroKind::None, ZerosRef::None) => Ok(()),
            (ZeroKind::None, _) => Err(Error::Value(format!("{format} has no zero points"))),
            (ZeroKind::PerGroup, ZerosRef::None) => Err(Error::Value(format!("{format} needs zero points"))),
            (ZeroKind::PerGroup, ZerosRef::Int(z)) => {
                check_len("zero points", z.len())?;
                match z.iter().position(|&z| u32::from(z) > top) {
                    None => Ok(()),
                    Some(i) => Err(Error::Value(format!(
                        "zero point {} at row {}, group {} is above {top}",
                        z[i],
                        i / groups,
                        i % groups
                    ))),
                }
            }
            (ZeroKind::PerGroup, ZerosRef::Float(z)) => {
                check_len("zero points", z.len())?;
                match z.iter().position(|z| !z.is_finite()) {
                    None => Ok(()),
                    Some(i) => Err(Error::Value(format!(
                        "zero point {} at row {}, group {} is not finite",
                        z[i],
                        i / groups,
                        i % groups
                    ))),
                }
            }
        }
    }

    /// That the inner level of two-level formats keeps every code within a byte.
    fn check_inner(&self) -> Result<()> {
        let ScalesRef::I8(inner) = self.scales else { return Ok(()) };
        if matches!(self.zeros, ZerosRef::Float(_)) {
            return Err(Error::Value(format!("{} needs integer zero points", self.format)));
        }
        let (e, groups, len) = (self.format.element, self.groups(), self.group_len());
        let mut codes = zeros_vec::<u8>(len)?;
        for (i, &t) in inner.iter().enumerate() {
            let (n, g) = (i / groups, i % groups);
            let zero = self.zero(n, g);
            if e.fits_inner(t, zero, (0, e.levels as i32 - 1)) {
                continue;
            }
            // Some code would leave the byte; perhaps not one of those that are there.
            let codes = &mut codes[..len.min(self.cols - g * len)];
            self.unpack_row(n, g * len, codes);
            let found = codes.iter().fold((255, 0), |(lo, hi), &u| (lo.min(i32::from(u)), hi.max(i32::from(u))));
            if !e.fits_inner(t, zero, found) {
                return Err(Error::Value(format!("scale {t} at row {n}, group {g} takes its values out of int8")));
            }
        }
        Ok(())
    }

    fn check_codes(&self) -> Result<()> {
        let (e, row_bytes) = (self.format.element, self.row_bytes());
        if self.rows == 0 || self.cols == 0 {
            return Ok(());
        }
        if let Some(kind) = e.plain {
            if let Some(n) = (0..self.rows).find(|&n| self.scales.get(n).to_bits() != 1f32.to_bits()) {
                return Err(Error::Value(format!("the scale of row {n} of {} is not 1", e.name)));
            }
            return match self.codes.chunks_exact(kind.size()).position(|b| !kind.read(b).is_finite()) {
                None => Ok(()),
                Some(i) => Err(Error::Value(format!("number {i} of those stored is not finite"))),
            };
        }
        if let Some(m) = self.mask {
            return mask::check_codes(m, e, self.codes);
        }
        let used = (self.cols % 8 * e.bits as usize) % 8;
        if used != 0 {
            let stray = !0u8 << used;
            for n in 0..self.rows {
                if self.codes[(n + 1) * row_bytes - 1] & stray != 0 {
                    return Err(Error::Value(format!("row {n} of codes has padding bits that are not 0")));
                }
            }
        }
        if e.levels == 1 << e.bits {
            return Ok(());
        }
        let level = Level::detect();
        let mut buf = [0u8; 1024];
        for n in 0..self.rows {
            for k0 in (0..self.cols).step_by(buf.len()) {
                let u = &mut buf[..(self.cols - k0).min(1024)];
                self.unpack(level, n, k0, u);
                if let Some(i) = u.iter().position(|&u| u32::from(u) >= e.levels) {
                    return Err(Error::Value(format!("{} has no code {}: row {n}, column {}", e.name, u[i], k0 + i)));
                }
            }
        }
        Ok(())
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.format.groups(self.cols)
    }

    /// Length of the groups (the last may be shorter); at least 1.
    pub fn group_len(&self) -> usize {
        self.format.group_len(self.cols)
    }

    /// Bytes of the codes of a row.
    pub fn row_bytes(&self) -> usize {
        self.format.row_bytes(self.cols)
    }

    /// Packed codes of row `n`; of sparse matrices those that are kept.
    pub fn row(&self, n: usize) -> &'a [u8] {
        let b = self.row_bytes();
        self.mask.map_or_else(|| &self.codes[n * b..(n + 1) * b], |m| &self.codes[m.span(n)])
    }

    /// What multiplies the values of group `g` of row `n`: the stored scale times the unit of the element, exactly.
    pub fn scale(&self, n: usize, g: usize) -> f32 {
        self.scales.get(n * self.groups() + g) * self.format.element.unit
    }

    /// What multiplies the values of a group in decoding: [`Self::scale`] times the scale of the tensor, rounded.
    pub fn full_scale(&self, n: usize, g: usize) -> f32 {
        self.scale(n, g) * self.outer_scale(n)
    }

    /// What multiplies the scales of row `n`.
    pub fn outer_scale(&self, n: usize) -> f32 {
        let at = if self.format.is_two_level() { n } else { 0 };
        self.outer.get(at).copied().unwrap_or(1.0)
    }

    /// What multiplies every scale.
    pub fn tensor(&self) -> f32 {
        if self.format.has_tensor_scale() {
            self.outer_scale(0)
        } else {
            1.0
        }
    }

    /// What the integer 1 is worth in integer products, before [`Self::scale`].
    pub fn step(&self) -> f32 {
        self.book().map_or(1.0, |b| b.unit()) * self.tensor()
    }

    /// Zero point of group `g` of row `n`.
    pub fn zero(&self, n: usize, g: usize) -> Zero {
        let i = n * self.groups() + g;
        match self.zeros {
            ZerosRef::None => Zero::None,
            ZerosRef::Int(z) => Zero::Int(z[i]),
            ZerosRef::Float(z) => Zero::Float(z[i]),
        }
    }

    /// Stored code at row `n`, column `k`.
    ///
    /// # Panics
    /// If the position is outside the matrix.
    pub fn code(&self, n: usize, k: usize) -> u16 {
        assert!(k < self.cols, "column {k} of {}", self.cols);
        if let Some(m) = self.mask {
            let mut u = [0];
            self.unpack_kept(m, n, k, &mut u);
            return u16::from(u[0]);
        }
        bits::get(self.format.element.bits, self.row(n), k)
    }

    /// The numbers of row `n` of a matrix that is not quantised, 0 where entries were dropped.
    ///
    /// # Panics
    /// If `out` has not as many bytes as a dense row.
    pub fn number_row(&self, n: usize, out: &mut [u8]) {
        let Some(m) = self.mask else {
            out.copy_from_slice(self.row(n));
            return;
        };
        out.fill(0);
        let mut words = vec![0; self.cols.div_ceil(64)];
        m.row_words(n, &mut words);
        if self.format.element.bits == 32 {
            mask::scatter(&words, self.row(n).as_chunks::<4>().0, out.as_chunks_mut::<4>().0);
        } else {
            mask::scatter(&words, self.row(n).as_chunks::<2>().0, out.as_chunks_mut::<2>().0);
        }
    }

    fn unpack(&self, level: Level, n: usize, k0: usize, out: &mut [u8]) {
        let bits = self.format.element.bits;
        if let Some(m) = self.mask {
            self.unpack_kept(m, n, k0, out);
        } else if k0.is_multiple_of(8) {
            crate::format::lanes::unpack(level, bits, &self.row(n)[bits::row_bytes(bits, k0)..], out);
        } else {
            bits::unpack_from(bits, self.row(n), k0, out);
        }
    }

    /// Stored codes of row `n` from column `k0` on, unpacked (see [`crate::bits`]).
    ///
    /// # Panics
    /// If the range leaves the matrix.
    pub fn unpack_row(&self, n: usize, k0: usize, out: &mut [u8]) {
        assert!(n < self.rows && k0 + out.len() / self.format.element.code_bytes() <= self.cols);
        self.unpack(Level::detect(), n, k0, out);
    }

    /// Decodes row `n` from column `k0` on.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    pub fn dequantize_row(&self, n: usize, k0: usize, out: &mut [f32]) {
        self.dequantize_row_at(Level::detect(), n, k0, out);
    }

    pub(crate) fn dequantize_row_at(&self, level: Level, n: usize, k0: usize, out: &mut [f32]) {
        assert!(n < self.rows && k0 + out.len() <= self.cols);
        if let Some(kind) = self.format.element.plain {
            let size = kind.size();
            let mut row = vec![0; self.cols * size];
            self.number_row(n, &mut row);
            out.iter_mut().zip(row[k0 * size..].chunks_exact(size)).for_each(|(o, b)| *o = kind.read(b));
            return;
        }
        let (e, g) = (self.format.element, self.group_len());
        if e.span() > 1 {
            return self.dequantize_tiles(level, n, k0, out);
        }
        let size = e.code_bytes();
        let values: [f32; 256] = match self.row_table(n) {
            [] => [0.0; 256],
            t => std::array::from_fn(|u| t[u % t.len()]),
        };
        let mut buf = [0u8; 1024];
        let (mut k, mut rest) = (k0, out);
        while !rest.is_empty() {
            let len = rest.len().min(buf.len() / size);
            let (mut part, tail) = rest.split_at_mut(len);
            self.unpack(level, n, k, &mut buf[..len * size]);
            let mut u = &buf[..len * size];
            while !u.is_empty() {
                let here = (g - k % g).min(u.len() / size);
                let (w, next) = part.split_at_mut(here);
                let s = self.full_scale(n, k / g);
                if self.table.is_empty() {
                    e.codec.decode(e, level, &u[..here * size], s, self.zero(n, k / g), w);
                } else {
                    lanes::book_decode(level, &u[..here], &values, s, w);
                }
                (part, u, k) = (next, &u[here * size..], k + here);
            }
            rest = tail;
        }
    }

    /// The same where codes are read together: whole tiles, of which only a part may be wanted.
    fn dequantize_tiles(&self, level: Level, n: usize, k0: usize, out: &mut [f32]) {
        let (e, g) = (self.format.element, self.group_len());
        let (mut codes, mut values) = ([0u8; 256], [0.0f32; 256]);
        let most = codes.len() / e.span() * e.span();
        let (mut k, end) = (k0, k0 + out.len());
        while k < end {
            let start = k - (k % g) % e.span();
            let stop = (start + most).min((k / g + 1) * g).min(self.cols);
            let (codes, values) = (&mut codes[..stop - start], &mut values[..stop - start]);
            self.unpack(level, n, start, codes);
            let s = self.full_scale(n, k / g);
            match e.map {
                ValueMap::Vectors(shape) => vq::decode(level, shape, self.table, codes, s, values),
                _ => e.codec.decode(e, level, codes, s, self.zero(n, k / g), values),
            }
            let here = stop.min(end) - k;
            out[k - k0..][..here].copy_from_slice(&values[k - start..][..here]);
            k += here;
        }
    }

    /// Decodes the whole matrix, row by row.
    ///
    /// # Errors
    /// [`Error::Shape`] if `out` is not `rows * cols` long.
    pub fn dequantize_into(&self, out: &mut [f32], threads: usize) -> Result<()> {
        self.fill(out, threads, |level, n, w| {
            self.dequantize_row_at(level, n, 0, w);
        })
    }

    /// The code values of the whole matrix, before zero point and scale.
    ///
    /// # Errors
    /// [`Error::Shape`] if `out` is not `rows * cols` long.
    pub fn codes_into(&self, out: &mut [i16], threads: usize) -> Result<()> {
        let e = self.format.element;
        if e.plain.is_some() {
            return Err(Error::Unsupported(format!("{} has no codes but its numbers", self.format)));
        }
        self.fill(out, threads, |level, n, values| {
            let (mut buf, size) = ([0u8; 1024], e.code_bytes());
            let step = buf.len() / size;
            for (i, part) in values.chunks_mut(step).enumerate() {
                let u = &mut buf[..part.len() * size];
                self.unpack(level, n, i * step, u);
                for (v, u) in part.iter_mut().zip(u.chunks_exact(size)) {
                    *v = e.value(u16::from_le_bytes([u[0], if size == 2 { u[1] } else { 0 }])) as i16;
                }
            }
        })
    }

    fn fill<T: Send>(&self, out: &mut [T], threads: usize, row: impl Fn(Level, usize, &mut [T]) + Sync) -> Result<()> {
        let (rows, cols) = (self.rows, self.cols);
        if out.len() != area(rows, cols)? {
            return Err(Error::Shape(format!("shape ({rows}, {cols}) does not fit {} values", out.len())));
        }
        if out.is_empty() {
            return Ok(());
        }
        let level = Level::detect();
        let step = rows_per_task(rows, cols, threads);
        let parts: Vec<_> = out.chunks_mut(step * cols).collect();
        parallel(threads, parts, None, |task, part: &mut [T]| {
            for (i, w) in part.chunks_exact_mut(cols).enumerate() {
                row(level, task * step + i, w);
            }
        })
    }

    /// An owned copy.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn to_owned(&self) -> Result<QTensor> {
        fn copy<T: Clone + Default>(v: &[T]) -> Result<Vec<T>> {
            let mut out = zeros_vec(v.len())?;
            out.clone_from_slice(v);
            Ok(out)
        }
        Ok(QTensor {
            format: self.format,
            rows: self.rows,
            cols: self.cols,
            codes: copy(self.codes)?,
            scales: match self.scales {
                ScalesRef::F32(v) => Scales::F32(copy(v)?),
                ScalesRef::F16(v) => Scales::F16(copy(v)?),
                ScalesRef::BF16(v) => Scales::BF16(copy(v)?),
                ScalesRef::E8M0(v) => Scales::E8M0(copy(v)?),
                ScalesRef::E4M3(v) => Scales::E4M3(copy(v)?),
                ScalesRef::I8(v) => Scales::I8(copy(v)?),
            },
            zeros: match self.zeros {
                ZerosRef::None => Zeros::None,
                ZerosRef::Int(v) => Zeros::Int(copy(v)?),
                ZerosRef::Float(v) => Zeros::Float(copy(v)?),
            },
            outer: copy(self.outer)?,
            mask: self.mask.cloned(),
            table: copy(self.table)?,
        })
    }
}

/// Runs `f(index, part)` for every part on up to `threads` threads. Once `poll` answers true no further part starts,
/// and the result is [`Error::Interrupted`].
pub(crate) fn parallel<P: Send>(
    threads: usize,
    parts: Vec<P>,
    poll: Option<&(dyn Fn() -> bool + Sync)>,
    f: impl Fn(usize, P) + Sync,
) -> Result<()> {
    let tasks = parts.len();
    let queue = std::sync::Mutex::new(parts.into_iter().enumerate());
    let finished = pool::run(threads, tasks, pool::Order::Forward, poll, |_| {
        let next = queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
        if let Some((i, p)) = next {
            f(i, p);
        }
    });
    if finished {
        Ok(())
    } else {
        Err(Error::Interrupted)
    }
}

/// Packs code values (see [`crate::Element::value`]) row by row into `out`.
///
/// # Errors
/// [`Error::Shape`] for lengths that do not fit, [`Error::Value`] naming the first value that has no code.
pub fn pack_values(format: Format, rows: usize, cols: usize, values: &[i16], out: &mut [u8]) -> Result<()> {
    let e = format.element;
    let count = area(rows, cols)?;
    let row_bytes = format.row_bytes(cols);
    if values.len() != count {
        return Err(Error::Shape(format!("shape ({rows}, {cols}) does not fit {} code values", values.len())));
    }
    if out.len() != rows * row_bytes {
        return Err(Error::Shape(format!("{} bytes for packed codes, {} needed", out.len(), rows * row_bytes)));
    }
    if values.is_empty() {
        return Ok(());
    }
    let level = Level::detect();
    let size = e.code_bytes();
    let mut row = zeros_vec::<u8>(cols * size)?;
    for (n, (v, o)) in values.chunks_exact(cols).zip(out.chunks_exact_mut(row_bytes)).enumerate() {
        for (k, (u, &v)) in row.chunks_exact_mut(size).zip(v).enumerate() {
            let code = e.code(i32::from(v)).ok_or_else(|| {
                let (lo, hi) = e.values();
                let kind = if e.value(1u32) - lo == 2 { "odd integers " } else { "" };
                Error::Value(format!("code {v} at row {n}, column {k}: {} has {kind}{lo} to {hi}", e.name))
            })?;
            u.copy_from_slice(&code.to_le_bytes()[..size]);
        }
        crate::format::lanes::pack(level, e.bits, &row, o);
    }
    Ok(())
}

impl QTensor {
    /// A matrix from code values (see [`crate::Element::value`]), scales and zero points; a table of values is evenly spaced,
    /// an outer scale 1.
    ///
    /// # Errors
    /// As [`pack_values`] and [`QView::new`].
    pub fn from_values(
        format: Format,
        rows: usize,
        cols: usize,
        values: &[i16],
        scales: Scales,
        zeros: Zeros,
    ) -> Result<Self> {
        area(rows, cols)?;
        let mut codes = zeros_vec(rows * format.row_bytes(cols))?;
        pack_values(format, rows, cols, values, &mut codes)?;
        QView::new(format, rows, cols, &codes, scales.view(), zeros.view())?;
        let outer = vec![1.0; format.outer_len(rows)];
        let levels = format.element.learned();
        let even = |u: usize| (2 * (u % levels) + 1) as f32 / levels as f32 - 1.0;
        let table = (0..format.table_len(rows)).map(even).collect();
        Ok(Self { format, rows, cols, codes, scales, zeros, outer, mask: None, table })
    }

    /// Borrows the matrix.
    pub fn view(&self) -> QView<'_> {
        QView {
            format: self.format,
            rows: self.rows,
            cols: self.cols,
            codes: &self.codes,
            scales: self.scales.view(),
            zeros: self.zeros.view(),
            outer: &self.outer,
            mask: self.mask.as_ref(),
            table: &self.table,
        }
    }

    /// The decoded matrix, row-major.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn dequantize(&self, threads: usize) -> Result<Vec<f32>> {
        let mut out = zeros_vec(area(self.rows, self.cols)?)?;
        self.view().dequantize_into(&mut out, threads)?;
        Ok(out)
    }
}

impl PartialEq for QTensor {
    /// Same format, shape and bytes.
    fn eq(&self, other: &Self) -> bool {
        self.format == other.format
            && (self.rows, self.cols) == (other.rows, other.cols)
            && same_bits(&self.outer, &other.outer)
            && same_bits(&self.table, &other.table)
            && self.codes == other.codes
            && self.mask == other.mask
            && match (&self.scales, &other.scales) {
                (Scales::F32(a), Scales::F32(b)) => same_bits(a, b),
                (a, b) => a == b,
            }
            && match (&self.zeros, &other.zeros) {
                (Zeros::Float(a), Zeros::Float(b)) => same_bits(a, b),
                (a, b) => a == b,
            }
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
