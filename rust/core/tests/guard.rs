//! Buffers that end, or begin, at pages that may not be touched: a read or write outside a matrix is a fault here.
//!
//! Inputs are read-only as well, and every byte of an output that belongs to no element must keep its value. The crate's
//! own buffers (panels, activations, sums) end at such pages too, by way of the allocator below: what assembly does with
//! them no sanitizer sees.
#![cfg(unix)]
mod common;

use common::quantised;
use nibblas_core::gemm::{self, Compute, Options};
use nibblas_core::isa::Isa;
use nibblas_core::pack::{self, Packed};
use nibblas_core::pair::{self, RawOut};
use nibblas_core::quantize::{quantize, quantize_into, Dest, Method, ScalesMut};
use nibblas_core::reference::{matmul_f32_ref, matmul_int8_ref, same_bits, Activations};
use nibblas_core::{
    Format, MatMut, MatRef, QTensor, QView, Scalar, ScaleType, Scales, ScalesRef, ZeroKind, Zeros, ZerosRef,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::{null_mut, NonNull};

/// Allocates what is aligned to cache lines, as the crate's buffers are and little else is, up to a forbidden page.
struct EndsAtPage;

#[global_allocator]
static ALLOCATOR: EndsAtPage = EndsAtPage;

/// Bytes of the pages that hold a buffer, and of the buffer in whole cache lines.
fn extents(layout: Layout) -> (usize, usize) {
    let lines = layout.size().next_multiple_of(64);
    (lines.next_multiple_of(PAGE), lines)
}

// SAFETY: memory comes from the system's allocator or from a mapping of its own, as the layout alone decides.
unsafe impl GlobalAlloc for EndsAtPage {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() != 64 {
            // SAFETY: the caller's contract.
            return unsafe { System.alloc(layout) };
        }
        let (pages, lines) = extents(layout);
        // SAFETY: a fresh mapping, one page of which loses its access; the rest of its last line is marked.
        unsafe {
            let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
            let base = libc::mmap(null_mut(), pages + PAGE, rights, kind, -1, 0);
            if base == libc::MAP_FAILED || libc::mprotect(base.byte_add(pages), PAGE, libc::PROT_NONE) != 0 {
                return null_mut();
            }
            let p = base.cast::<u8>().add(pages - lines);
            p.add(layout.size()).write_bytes(CANARY, lines - layout.size());
            p
        }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        if layout.align() != 64 {
            // SAFETY: the caller's contract.
            return unsafe { System.dealloc(p, layout) };
        }
        let (pages, lines) = extents(layout);
        // SAFETY: the mapping made in `alloc` for this layout.
        unsafe {
            let rest = std::slice::from_raw_parts(p.add(layout.size()), lines - layout.size());
            if rest.iter().any(|&b| b != CANARY) {
                eprintln!("a buffer of {} bytes was written past its end", layout.size());
                std::process::abort();
            }
            libc::munmap(p.sub(pages - lines).cast(), pages + PAGE);
        }
    }
}

/// Runs `f` on a thread of its own, whose scratch buffers are as small as the work allows.
fn fresh<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|s| s.spawn(f).join()).unwrap_or_else(|e| std::panic::resume_unwind(e))
}

const PAGE: usize = 4096;
/// What bytes outside the elements hold.
const CANARY: u8 = 0xa5;

/// Where a buffer lies between its two forbidden pages.
#[derive(Debug, Clone, Copy, PartialEq)]
enum At {
    /// So many bytes after the page before it.
    Start(usize),
    /// So many bytes before the page behind it.
    End(usize),
}

/// Bytes between two pages without access.
struct Guarded {
    base: NonNull<u8>,
    total: usize,
    at: usize,
    len: usize,
}

// SAFETY: a buffer that owns its memory, written through exclusive borrows only.
unsafe impl Send for Guarded {}
// SAFETY: as above.
unsafe impl Sync for Guarded {}

impl Guarded {
    fn new(len: usize, at: At) -> Self {
        let slack = match at {
            At::Start(n) | At::End(n) => n,
        };
        let inner = (len + slack).next_multiple_of(PAGE).max(PAGE);
        let total = inner + 2 * PAGE;
        // SAFETY: a fresh private mapping, whose two outer pages lose their access; the result is checked.
        let base = unsafe {
            let p = libc::mmap(null_mut(), total, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANON, -1, 0);
            assert_ne!(p, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(p.cast::<u8>().add(PAGE).cast(), inner, libc::PROT_READ | libc::PROT_WRITE), 0);
            p.cast::<u8>().add(PAGE).write_bytes(CANARY, inner);
            p
        };
        let at = match at {
            At::Start(n) => PAGE + n,
            At::End(n) => PAGE + inner - n - len,
        };
        Self { base: NonNull::new(base.cast()).unwrap(), total, at, len }
    }

    /// A read-only copy of `bytes`.
    fn copy(bytes: &[u8], at: At) -> Self {
        let mut g = Self::new(bytes.len(), at);
        g.bytes_mut().copy_from_slice(bytes);
        g.seal();
        g
    }

    /// A read-only copy of numbers, aligned as they need be.
    fn of<T: Number>(data: &[T], at: At) -> Self {
        // SAFETY: plain numbers, all of whose bytes are initialised.
        Self::copy(unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }, at)
    }

    /// Takes the right to write.
    fn seal(&self) {
        // SAFETY: the inner pages of the mapping.
        let done =
            unsafe { libc::mprotect(self.base.as_ptr().add(PAGE).cast(), self.total - 2 * PAGE, libc::PROT_READ) };
        assert_eq!(done, 0);
    }

    fn ptr(&self) -> *mut u8 {
        self.base.as_ptr().wrapping_add(self.at)
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `len` readable bytes from `at` on, owned by self.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and writable until it is sealed.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(), self.len) }
    }

    fn slice<T: Number>(&self) -> &[T] {
        assert_eq!(self.ptr().align_offset(align_of::<T>()), 0);
        // SAFETY: aligned, `len` bytes, any bits are a number.
        unsafe { std::slice::from_raw_parts(self.ptr().cast(), self.len / size_of::<T>()) }
    }

    fn slice_mut<T: Number>(&mut self) -> &mut [T] {
        assert_eq!(self.ptr().align_offset(align_of::<T>()), 0);
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr().cast(), self.len / size_of::<T>()) }
    }

    /// Whether the bytes between the forbidden pages and the buffer are untouched.
    fn surroundings_untouched(&self) -> bool {
        // SAFETY: the inner pages of the mapping.
        let inner = unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(PAGE), self.total - 2 * PAGE) };
        let from = self.at - PAGE;
        inner[..from].iter().chain(&inner[from + self.len..]).all(|&b| b == CANARY)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.total) };
    }
}

/// Plain numbers.
trait Number: Copy {}
impl Number for u8 {}
impl Number for i16 {}
impl Number for u16 {}
impl Number for i32 {}
impl Number for i64 {}
impl Number for f32 {}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.next() as usize % of.len()]
    }
    fn normal(&mut self) -> f32 {
        let s: u64 = (0..4).map(|_| self.next() & 0xffff).sum();
        (s as f32 / 65536.0 - 2.0) * 1.7
    }
    fn matrix(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
    /// At either end, off any alignment.
    fn place(&mut self) -> At {
        let n = self.pick(&[0, 0, 0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 60, 63]);
        if self.next() & 1 == 0 {
            At::Start(n)
        } else {
            At::End(n)
        }
    }
    /// At either end, aligned for every number.
    fn aligned(&mut self) -> At {
        match self.place() {
            At::Start(n) => At::Start(n & !7),
            At::End(n) => At::End(n & !7),
        }
    }
}

/// Memory orders of a caller's matrix.
#[derive(Debug, Clone, Copy)]
enum Order {
    Rows,
    PaddedRows,
    Columns,
    RowsUp,
    ColumnsLeft,
    BothBack,
    EveryThird,
    OddStride,
    Broadcast,
}

const ORDERS: [Order; 8] = [
    Order::Rows,
    Order::PaddedRows,
    Order::Columns,
    Order::RowsUp,
    Order::ColumnsLeft,
    Order::BothBack,
    Order::EveryThird,
    Order::OddStride,
];

/// Strides of rows and columns, the place of element (0, 0), and the bytes from the first to the last element.
fn strides(order: Order, rows: usize, cols: usize, size: usize) -> (isize, isize, usize, usize) {
    let (r, c, s) = (rows as isize, cols as isize, size as isize);
    let (rs, cs) = match order {
        Order::Rows => (c * s, s),
        Order::PaddedRows => (c * s + 3 * s, s),
        Order::Columns => (s, r * s),
        Order::RowsUp => (-c * s, s),
        Order::ColumnsLeft => (c * s, -s),
        Order::BothBack => (-c * s, -s),
        Order::EveryThird => (3 * c * s, 3 * s),
        Order::OddStride => (c * (s + 1) + 1, s + 1),
        Order::Broadcast => (0, s),
    };
    if rows == 0 || cols == 0 {
        return (rs, cs, 0, 0);
    }
    let span = |n: isize, stride: isize| (n - 1) * stride;
    let first = -(span(r, rs).min(0) + span(c, cs).min(0));
    let last = span(r, rs).max(0) + span(c, cs).max(0);
    (rs, cs, first as usize, (first + last) as usize + size)
}

/// A caller's matrix between forbidden pages.
struct Matrix {
    memory: Guarded,
    scalar: Scalar,
    rows: usize,
    cols: usize,
    order: Order,
}

impl Matrix {
    fn new(scalar: Scalar, rows: usize, cols: usize, order: Order, at: At) -> Self {
        let (.., len) = strides(order, rows, cols, scalar.size());
        Self { memory: Guarded::new(len, at), scalar, rows, cols, order }
    }

    /// A read-only matrix of elements given as their bytes, row-major.
    fn input(scalar: Scalar, rows: usize, cols: usize, data: &[u8], order: Order, at: At) -> Self {
        let mut m = Self::new(scalar, rows, cols, order, at);
        let size = scalar.size();
        for i in 0..rows {
            for j in 0..cols {
                let (from, to) = ((i * cols + j) * size, m.offset(i, j));
                m.memory.bytes_mut()[to..to + size].copy_from_slice(&data[from..from + size]);
            }
        }
        m.memory.seal();
        m
    }

    fn offset(&self, i: usize, j: usize) -> usize {
        let (rs, cs, first, _) = strides(self.order, self.rows, self.cols, self.scalar.size());
        (first as isize + i as isize * rs + j as isize * cs) as usize
    }

    fn view(&self) -> MatRef<'_> {
        let (rs, cs, first, _) = strides(self.order, self.rows, self.cols, self.scalar.size());
        // SAFETY: `strides` describes the bytes of `memory`.
        unsafe { MatRef::from_raw(self.memory.ptr().wrapping_add(first), self.scalar, self.rows, self.cols, rs, cs) }
    }

    fn view_mut(&mut self) -> MatMut<'_> {
        let (rs, cs, first, _) = strides(self.order, self.rows, self.cols, self.scalar.size());
        // SAFETY: as above, borrowed exclusively; no order used for outputs lets elements overlap.
        unsafe { MatMut::from_raw(self.memory.ptr().wrapping_add(first), self.scalar, self.rows, self.cols, rs, cs) }
    }

    /// Whether the elements are `want`, converted to the element type, and all other bytes are as they were.
    fn holds(&self, want: &[f32]) -> Result<(), String> {
        let bytes = self.memory.bytes();
        let size = self.scalar.size();
        let mut element = vec![false; bytes.len()];
        for i in 0..self.rows {
            for j in 0..self.cols {
                let (w, at) = (want[i * self.cols + j], self.offset(i, j));
                let got = &bytes[at..at + size];
                element[at..at + size].fill(true);
                let same = match self.scalar {
                    Scalar::F32 => got == w.to_ne_bytes(),
                    Scalar::F64 => got == f64::from(w).to_ne_bytes(),
                    Scalar::F16 => got == half::f16::from_f32(w).to_bits().to_ne_bytes(),
                    Scalar::BF16 => got == half::bf16::from_f32(w).to_bits().to_ne_bytes(),
                    Scalar::I8 => unreachable!("not an output"),
                };
                if !same && !w.is_nan() {
                    return Err(format!("({i}, {j}) is {got:x?} instead of {w:e}"));
                }
            }
        }
        if !element.iter().zip(bytes).all(|(&e, &b)| e || b == CANARY) {
            return Err("a byte between the elements was written".to_owned());
        }
        if !self.memory.surroundings_untouched() {
            return Err("a byte beside the matrix was written".to_owned());
        }
        Ok(())
    }
}

/// The bytes of numbers converted to a type.
fn encode(scalar: Scalar, x: &[f32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(x.len() * scalar.size());
    for &v in x {
        match scalar {
            Scalar::F32 => out.extend(v.to_ne_bytes()),
            // Not a number of f32, so that the conversion has to round.
            Scalar::F64 => out.extend((f64::from(v) * (1.0 + 2f64.powi(-30))).to_ne_bytes()),
            Scalar::F16 => out.extend(half::f16::from_f32(v).to_bits().to_ne_bytes()),
            Scalar::BF16 => out.extend(half::bf16::from_f32(v).to_bits().to_ne_bytes()),
            Scalar::I8 => out.push((v * 60.0).clamp(-128.0, 127.0) as i8 as u8),
        }
    }
    out
}

/// A quantised matrix whose every part lies between forbidden pages.
struct Parts {
    format: Format,
    rows: usize,
    cols: usize,
    codes: Guarded,
    scales: Guarded,
    zeros: Guarded,
    float_zeros: bool,
    outer: Guarded,
    table: Guarded,
}

impl Parts {
    fn new(q: &QTensor, rng: &mut Rng) -> Self {
        let scales = match &q.scales {
            Scales::F32(v) => Guarded::of(v, rng.aligned()),
            Scales::F16(v) | Scales::BF16(v) => Guarded::of(v, rng.aligned()),
            Scales::E8M0(v) | Scales::E4M3(v) | Scales::I8(v) => Guarded::of(v, rng.place()),
        };
        let (zeros, float_zeros) = match &q.zeros {
            Zeros::None => (Guarded::copy(&[], At::End(0)), false),
            Zeros::Int(v) => (Guarded::of(v, rng.place()), false),
            Zeros::Float(v) => (Guarded::of(v, rng.aligned()), true),
        };
        let codes = Guarded::copy(&q.codes, rng.place());
        let outer = Guarded::of(&q.outer, rng.aligned());
        let table = Guarded::of(&q.table, rng.aligned());
        Self { format: q.format, rows: q.rows, cols: q.cols, codes, scales, zeros, float_zeros, outer, table }
    }

    fn view(&self) -> QView<'_> {
        let scales = match self.format.scale {
            ScaleType::F32 => ScalesRef::F32(self.scales.slice()),
            ScaleType::F16 => ScalesRef::F16(self.scales.slice()),
            ScaleType::BF16 => ScalesRef::BF16(self.scales.slice()),
            ScaleType::E8M0 => ScalesRef::E8M0(self.scales.bytes()),
            ScaleType::E4M3 => ScalesRef::E4M3(self.scales.bytes()),
            ScaleType::I8 => ScalesRef::I8(self.scales.bytes()),
        };
        let zeros = match (self.format.element.zero, self.float_zeros) {
            (ZeroKind::None, _) => ZerosRef::None,
            (ZeroKind::PerGroup, false) => ZerosRef::Int(self.zeros.slice()),
            (ZeroKind::PerGroup, true) => ZerosRef::Float(self.zeros.slice()),
        };
        let view = QView::new(self.format, self.rows, self.cols, self.codes.bytes(), scales, zeros).unwrap();
        view.with_outer(self.outer.slice()).unwrap().with_table(self.table.slice()).unwrap()
    }
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|i| i.is_available())
}

fn any_format(rng: &mut Rng) -> Format {
    let elements: Vec<_> = nibblas_core::format::table().collect();
    let group = rng.pick(&[None, None, Some(8), Some(13), Some(16), Some(32), Some(48), Some(64), Some(128)]);
    let element = rng.pick(&elements);
    let scale = rng.pick(element.scales);
    let group = if scale == ScaleType::I8 { group.or(Some(32)) } else { group };
    Format::with(element, group, Some(scale)).unwrap()
}

fn tensor(rng: &mut Rng, f: &Format, n: usize, k: usize) -> QTensor {
    let w = rng.matrix(n * k);
    let mut q = quantised(f, &w, n, k);
    if let (Zeros::Int(z), 0, false) = (&q.zeros, rng.next() % 3, f.is_two_level()) {
        q.zeros = Zeros::Float(z.iter().map(|&v| f32::from(v) + 0.25).collect());
    }
    q
}

const INPUTS: [Scalar; 5] = [Scalar::F32, Scalar::F16, Scalar::BF16, Scalar::F64, Scalar::I8];
const OUTPUTS: [Scalar; 4] = [Scalar::F32, Scalar::F16, Scalar::BF16, Scalar::F64];

/// One shape: every ISA, with one format, and another order, type and place for each run.
fn products(rng: &mut Rng, m: usize, n: usize, k: usize, threads: usize) -> usize {
    let f = any_format(rng);
    let q = tensor(rng, &f, n, k);
    let parts = Parts::new(&q, rng);
    let plain = pack::pack(&q.view(), 1).unwrap();
    let w: Packed = pack::pack(&parts.view(), threads).unwrap();
    assert_eq!(plain.codes[..], w.codes[..], "{f} ({n}, {k})");
    let x = rng.matrix(m * k);
    let bias = rng.matrix(n);
    let mut runs = 0;
    for compute in Compute::ALL {
        let scalar = rng.pick(&INPUTS);
        let data = encode(scalar, &x);
        // SAFETY: (m, k) row-major elements.
        let flat = unsafe {
            MatRef::from_raw(data.as_ptr(), scalar, m, k, (k * scalar.size()) as isize, scalar.size() as isize)
        };
        let with_bias = rng.next() & 1 == 0;
        let b = with_bias.then_some(&bias[..]);
        if gemm::explain(m, &plain, &Options { compute, ..Options::default() }).is_err() {
            assert!(
                matches!(compute, Compute::Int8 { group } if group.is_some() || !f.element.has_integers()),
                "{f} {compute}"
            );
            continue;
        }
        let mut want = match compute {
            Compute::F32 => matmul_f32_ref(&flat, &q.view(), b),
            Compute::Int8 { group } if scalar != Scalar::I8 => {
                matmul_int8_ref(&Activations::quantize(&flat, group.map(|g| g as usize)), &q.view(), b)
            }
            _ => Vec::new(),
        };
        for isa in isas() {
            if want.is_empty() || compute == Compute::Bf16 {
                want = vec![0.0; m * n];
                let o = Options { compute, bias: b, isa, threads: 1, poll: None };
                gemm::matmul(&flat, &plain, &mut MatMut::from_f32(&mut want, m, n), &o).unwrap();
            }
            let guarded = Guarded::of(&bias, rng.aligned());
            let o = Options { compute, bias: with_bias.then(|| guarded.slice()), isa, threads, poll: None };
            let order = if m == 1 { rng.pick(&[Order::Rows, Order::Broadcast]) } else { rng.pick(&ORDERS) };
            let xs = Matrix::input(scalar, m, k, &data, order, rng.place());
            let mut y = Matrix::new(rng.pick(&OUTPUTS), m, n, rng.pick(&ORDERS), rng.place());
            fresh(|| gemm::matmul(&xs.view(), &w, &mut y.view_mut(), &o)).unwrap();
            y.holds(&want).unwrap_or_else(|e| {
                panic!("({m}, {n}, {k}) {f} {compute} {isa}: {scalar:?} {order:?} to {:?} {:?}: {e}", y.scalar, y.order)
            });
            runs += 1;
        }
    }
    runs
}

const EDGES: [usize; 11] = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65];

#[test]
fn products_stay_inside_their_matrices() {
    let mut rng = Rng(0x2545_F491_4F6C_DD1D);
    let mut runs = 0;
    for m in EDGES {
        for n in EDGES {
            for k in EDGES {
                // A third of the cube, every pair of extents in it.
                if (m + n + k + usize::from(m > 16)) % 3 == 0 || (m.min(n).min(k) <= 1 && rng.next() & 1 == 0) {
                    runs += products(&mut rng, m, n, k, 1);
                }
            }
        }
    }
    assert!(runs > 1000 * isas().count(), "{runs}");
}

#[test]
fn products_of_many_blocks_stay_inside_their_matrices() {
    let mut rng = Rng(0x9E37_79B9_7F4A_7C15);
    for (m, n, k) in [
        (1, 80, 1100),
        (1, 257, 192),
        (2, 130, 513),
        (3, 70, 1024),
        (4, 65, 577),
        (7, 48, 130),
        (8, 100, 260),
        (9, 33, 1100),
        (13, 31, 129),
        (260, 17, 65),
        (300, 50, 70),
        (33, 129, 333),
    ] {
        for threads in [1, 1, 3] {
            products(&mut rng, m, n, k, threads);
        }
    }
}

#[test]
fn one_row_repeated_by_a_stride_of_zero() {
    let mut rng = Rng(17);
    let (n, k) = (40, 130);
    let f = Format::parse("int4_g32").unwrap();
    let q = tensor(&mut rng, &f, n, k);
    let w = pack::pack(&q.view(), 1).unwrap();
    let x = rng.matrix(k);
    for m in [1, 3, 9, 40] {
        let many: Vec<f32> = (0..m).flat_map(|_| x.iter().copied()).collect();
        let want = matmul_f32_ref(&MatRef::from_f32(&many, m, k), &q.view(), None);
        for isa in isas() {
            let xs = Matrix::input(Scalar::F32, m, k, &encode(Scalar::F32, &many), Order::Broadcast, rng.place());
            let mut y = Matrix::new(Scalar::F32, m, n, Order::Rows, rng.place());
            gemm::matmul(&xs.view(), &w, &mut y.view_mut(), &Options { isa, ..Options::default() }).unwrap();
            y.holds(&want).unwrap_or_else(|e| panic!("{m} {isa}: {e}"));
        }
    }
}

#[test]
fn any_activation_group_is_right_or_refused() {
    let mut rng = Rng(3);
    let (m, n) = (3, 20);
    let mut served = 0;
    for name in ["int4", "int4_g8", "uint4_g16", "bipolar3_g48", "int8_g96", "int4_g192"] {
        let f = Format::parse(name).unwrap();
        for k in [7, 16, 24, 65, 200] {
            let q = tensor(&mut rng, &f, n, k);
            let w = pack::pack(&q.view(), 1).unwrap();
            let x = rng.matrix(m * k);
            for g in [0, 1, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, u32::MAX] {
                for isa in isas() {
                    let o = Options { compute: Compute::Int8 { group: Some(g) }, isa, ..Options::default() };
                    let xs = Matrix::input(Scalar::F32, m, k, &encode(Scalar::F32, &x), Order::Rows, At::End(0));
                    let mut y = Matrix::new(Scalar::F32, m, n, Order::Rows, At::End(0));
                    let done = gemm::matmul(&xs.view(), &w, &mut y.view_mut(), &o);
                    assert_eq!(done.is_ok(), gemm::explain(m, &w, &o).is_ok());
                    if done.is_ok() {
                        let acts = Activations::quantize(&xs.view(), Some(g as usize));
                        y.holds(&matmul_int8_ref(&acts, &q.view(), None))
                            .unwrap_or_else(|e| panic!("{f} K = {k}, groups of {g}, {isa}: {e}"));
                        served += 1;
                    }
                }
            }
        }
    }
    assert!(served > 50 * isas().count(), "{served}");
}

#[test]
fn quantised_pairs_stay_inside_their_buffers() {
    let mut rng = Rng(0xD1B5_4A32_D192_ED03);
    let mut raw = 0;
    for i in 0..400 {
        let [m, n, k] = [rng.pick(&EDGES), rng.pick(&EDGES), rng.pick(&EDGES)];
        let (mut fa, mut fb) = (any_format(&mut rng), any_format(&mut rng));
        if i % 2 == 0 {
            while !fa.element.is_linear() || !fb.element.is_linear() {
                (fa, fb) = (any_format(&mut rng), any_format(&mut rng));
            }
            (fa.group, fb.group) = (None, None);
        }
        let (a, b) = (tensor(&mut rng, &fa, m, k), tensor(&mut rng, &fb, n, k));
        let (pa, pb) = (Parts::new(&a, &mut rng), Parts::new(&b, &mut rng));
        let (w, plain) = (pack::pack(&pb.view(), 1).unwrap(), pack::pack(&b.view(), 1).unwrap());
        for isa in isas() {
            let o = Options { isa, ..Options::default() };
            let mut want = vec![0f32; m * n];
            let ok = pair::matmul_q(&a.view(), &plain, &mut MatMut::from_f32(&mut want, m, n), &o).is_ok();
            let mut y = Matrix::new(rng.pick(&OUTPUTS), m, n, rng.pick(&ORDERS), rng.place());
            assert_eq!(ok, fresh(|| pair::matmul_q(&pa.view(), &w, &mut y.view_mut(), &o)).is_ok());
            if ok {
                y.holds(&want).unwrap_or_else(|e| panic!("({m}, {n}, {k}) {fa} x {fb} {isa}: {e}"));
            }
            let mut want = vec![0i64; m * n];
            if pair::matmul_raw(&a.view(), &plain, &mut RawOut::I64(&mut want), &o).is_err() {
                continue;
            }
            let mut y = Guarded::new(m * n * 8, rng.aligned());
            fresh(|| pair::matmul_raw(&pa.view(), &w, &mut RawOut::I64(y.slice_mut()), &o)).unwrap();
            assert_eq!(y.slice::<i64>(), want, "({m}, {n}, {k}) {fa} x {fb} {isa}");
            assert!(y.surroundings_untouched());
            let mut y = Guarded::new(m * n * 4, rng.aligned());
            pair::matmul_raw(&pa.view(), &w, &mut RawOut::I32(y.slice_mut()), &o).unwrap();
            assert!(y.slice::<i32>().iter().zip(&want).all(|(&g, &w)| i64::from(g) == w));
            assert!(y.surroundings_untouched());
            raw += 1;
        }
    }
    assert!(raw > 50 * isas().count(), "{raw}");
}

#[test]
fn decoding_stays_inside_its_buffers() {
    let mut rng = Rng(0xA076_1D64_78BD_642F);
    for i in 0..1500 {
        let (n, k) = (rng.pick(&EDGES[..9]), rng.pick(&[0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 129, 1025]));
        let f = any_format(&mut rng);
        let q = tensor(&mut rng, &f, n, k);
        let parts = Parts::new(&q, &mut rng);
        let mut out = Guarded::new(n * k * 4, rng.aligned());
        parts.view().dequantize_into(out.slice_mut(), 1 + i % 3).unwrap();
        same_bits(out.slice(), &q.dequantize(1).unwrap(), k).unwrap_or_else(|e| panic!("{f} ({n}, {k}): {e}"));
        assert!(out.surroundings_untouched());
        let mut codes = Guarded::new(n * k * 2, rng.aligned());
        parts.view().codes_into(codes.slice_mut(), 1).unwrap();
        for (t, &v) in codes.slice::<i16>().iter().enumerate() {
            assert_eq!(i32::from(v), f.element.value(q.view().code(t / k, t % k)));
        }
        assert!(codes.surroundings_untouched());
        if n > 0 && k > 0 {
            let k0 = rng.next() as usize % k;
            let size = f.element.code_bytes();
            let mut row = Guarded::new((k - k0) * size, rng.place());
            parts.view().unpack_row(n - 1, k0, row.bytes_mut());
            for (j, u) in row.bytes().chunks_exact(size).enumerate() {
                assert_eq!(u, &q.view().code(n - 1, k0 + j).to_le_bytes()[..size]);
            }
            assert!(row.surroundings_untouched());
            let mut row = Guarded::new((k - k0) * 4, rng.aligned());
            parts.view().dequantize_row(n - 1, k0, row.slice_mut());
            assert!(row.surroundings_untouched());
        }
    }
}

#[test]
fn quantising_stays_inside_its_buffers() {
    let mut rng = Rng(0x1234_5678_9ABC_DEF1);
    for i in 0..1500 {
        let (n, k) = (rng.pick(&EDGES[..9]), rng.pick(&[0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 129]));
        let f = any_format(&mut rng);
        if f.element.span() > 1 && n * k > 500 {
            continue; // A search, which takes long.
        }
        let method = if i % 4 == 0 { Method::Mse } else { Method::Rtn };
        let scalar = rng.pick(&OUTPUTS);
        let data = encode(scalar, &rng.matrix(n * k));
        let x = Matrix::input(scalar, n, k, &data, rng.pick(&ORDERS), rng.place());
        // SAFETY: (n, k) row-major elements.
        let flat = unsafe {
            MatRef::from_raw(data.as_ptr(), scalar, n, k, (k * scalar.size()) as isize, scalar.size() as isize)
        };
        let want = quantize(&flat, &f, method, 1).unwrap();
        let count = n * f.groups(k);
        let zeros = if f.element.zero == ZeroKind::PerGroup { count } else { 0 };
        let mut codes = Guarded::new(n * f.row_bytes(k), rng.place());
        let mut scales = Guarded::new(count * f.scale.size(), rng.aligned());
        let mut zeros = Guarded::new(zeros, rng.place());
        let mut bounds = Guarded::new(count * 4, rng.aligned());
        let mut outer = Guarded::new(f.outer_len(n) * 4, rng.aligned());
        let mut table = Guarded::new(f.table_len(n) * 4, rng.aligned());
        let dest = Dest {
            codes: codes.bytes_mut(),
            scales: match f.scale {
                ScaleType::F32 => ScalesMut::F32(scales.slice_mut()),
                ScaleType::F16 => ScalesMut::F16(scales.slice_mut()),
                ScaleType::BF16 => ScalesMut::BF16(scales.slice_mut()),
                ScaleType::E8M0 => ScalesMut::E8M0(scales.bytes_mut()),
                ScaleType::E4M3 => ScalesMut::E4M3(scales.bytes_mut()),
                ScaleType::I8 => ScalesMut::I8(scales.bytes_mut()),
            },
            zeros: zeros.bytes_mut(),
            bounds: bounds.slice_mut(),
            outer: outer.slice_mut(),
            table: table.slice_mut(),
        };
        quantize_into(&x.view(), &f, method, 1 + i % 3, dest).unwrap();
        let q = &want.tensor;
        assert_eq!(codes.bytes(), q.codes, "{f} ({n}, {k}) {scalar:?} {:?}", x.order);
        match &q.scales {
            Scales::F32(v) => assert_eq!(scales.slice::<f32>(), v),
            Scales::F16(v) | Scales::BF16(v) => assert_eq!(scales.slice::<u16>(), v),
            Scales::E8M0(v) | Scales::E4M3(v) | Scales::I8(v) => assert_eq!(scales.bytes(), v),
        }
        if let Zeros::Int(z) = &q.zeros {
            assert_eq!(zeros.bytes(), z);
        }
        assert_eq!(outer.slice::<f32>(), q.outer);
        assert_eq!(table.slice::<f32>(), q.table);
        assert_eq!(bounds.slice::<f32>(), want.bounds);
        for g in [&codes, &scales, &zeros, &outer, &table, &bounds] {
            assert!(g.surroundings_untouched());
        }
    }
}

#[test]
fn own_buffers_end_at_forbidden_pages() {
    let b = nibblas_core::buf::Buf::<u8>::zeroed(128).unwrap();
    // SAFETY: asks which pages are mapped how, by writing a byte of the next page to a pipe: the kernel refuses it.
    unsafe {
        let mut pipe = [0; 2];
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        assert_eq!(libc::write(pipe[1], b.as_ptr().add(127).cast(), 1), 1);
        assert_eq!(libc::write(pipe[1], b.as_ptr().add(128).cast(), 1), -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
        libc::close(pipe[0]);
        libc::close(pipe[1]);
    }
}
