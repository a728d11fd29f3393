//! Sparse weights against the dense ones that they stand for: codes, decoded numbers, and products on every ISA.
use nibblas_core::format::plain_elements;
use nibblas_core::gemm::{self, Compute, Options};
use nibblas_core::isa::Isa;
use nibblas_core::quantize::{quantize, Method};
use nibblas_core::sparse::{self, Structure};
use nibblas_core::{pack, Format, MatMut, MatRef, QTensor};

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn normal(&mut self) -> f32 {
        let s: u64 = (0..4).map(|_| self.next() >> 48).sum();
        (s as f32 / 65536.0 - 2.0) * 1.7
    }
    fn matrix(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

const STRUCTURES: [Structure; 6] = [
    Structure::Bitmap,
    Structure::TwoOfFour,
    Structure::Groups(32),
    Structure::Groups(7),
    Structure::Blocks(16, 64),
    Structure::Blocks(5, 24),
];

/// (M, N, K).
const SHAPES: &[(usize, usize, usize)] =
    &[(1, 80, 192), (1, 1, 64), (3, 33, 8), (5, 70, 200), (2, 130, 320), (37, 45, 333), (17, 64, 129), (4, 20, 700)];

fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|i| i.is_available()).collect()
}

/// A matrix whose zeros follow the structure; `keep` of 8 units are kept.
fn pruned(rng: &mut Rng, s: Structure, n: usize, k: usize, keep: u64) -> Vec<f32> {
    let mut w = rng.matrix(n * k);
    if s == Structure::TwoOfFour {
        for row in w.chunks_exact_mut(k) {
            for four in row.chunks_mut(4) {
                let first = rng.next() as usize % four.len();
                for (i, v) in four.iter_mut().enumerate() {
                    if i != first && i != (first + 1) % 4 || rng.next().is_multiple_of(16) {
                        *v = 0.0;
                    }
                }
            }
        }
        return w;
    }
    let (r, c) = s.unit(n, k);
    for i in 0..n.div_ceil(r) {
        for j in 0..k.div_ceil(c) {
            if rng.next() % 8 >= keep {
                for n in i * r..n.min((i + 1) * r) {
                    w[n * k..][j * c..k.min((j + 1) * c)].fill(0.0);
                }
            }
        }
    }
    w
}

fn formats() -> Vec<Format> {
    let mut all = Vec::new();
    for e in nibblas_core::format::table().filter(|e| e.has_zero()) {
        all.push(Format::with(e, None, None).unwrap());
        if e.group.is_none() {
            all.push(Format::with(e, Some(32), None).unwrap());
            all.push(Format::with(e, Some(48), None).unwrap());
        }
    }
    all.extend(plain_elements().map(|e| Format::with(e, None, None).unwrap()));
    all
}

fn same(a: &[f32], b: &[f32]) -> Option<usize> {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .position(|(a, b)| a.to_bits() != b.to_bits() && !(*a == 0.0 && *b == 0.0) && !(a.is_nan() && b.is_nan()))
}

fn run(x: &[f32], m: usize, q: &QTensor, o: &Options) -> Vec<f32> {
    let w = pack::pack(&q.view(), 2).unwrap();
    let mut y = vec![f32::NAN; m * q.rows];
    gemm::matmul(&MatRef::from_f32(x, m, q.cols), &w, &mut MatMut::from_f32(&mut y, m, q.rows), o).unwrap();
    y
}

#[test]
fn packing_loses_nothing() {
    let mut rng = Rng(0x9E37_79B9_7F4A_7C15);
    for f in formats() {
        for s in STRUCTURES {
            for keep in [0, 3, 8] {
                let (n, k) = (35, 150);
                let w = pruned(&mut rng, s, n, k, keep);
                let dense = quantize(&MatRef::from_f32(&w, n, k), &f, Method::Rtn, 1).unwrap().tensor;
                let q = sparse::pack(&dense.view(), s).unwrap();
                assert_eq!(q.format.to_string(), format!("{f}_{s}"));
                assert_eq!(Format::parse(&q.format.to_string()).unwrap(), q.format);
                let back = sparse::unpack(&q.view()).unwrap();
                if f.element.plain.is_none() {
                    assert_eq!(back, dense, "{f} {s}");
                    for (n, k) in [(0, 0), (17, 149), (34, 63), (3, 64)] {
                        assert_eq!(q.view().code(n, k), dense.view().code(n, k));
                    }
                    let mut part = vec![0; 71];
                    q.view().unpack_row(9, 67, &mut part);
                    let mut want = vec![0; 71];
                    dense.view().unpack_row(9, 67, &mut want);
                    assert_eq!(part, want);
                }
                assert_eq!(same(&q.dequantize(2).unwrap(), &dense.dequantize(1).unwrap()), None, "{f} {s}");
                // The parts are checked as those of a file are.
                let mask = q.mask.as_ref().unwrap();
                let bits = f.element.bits.into();
                assert_eq!(sparse::Mask::new(s, n, k, bits, mask.bytes()).as_ref(), Ok(mask));
                assert_eq!(q.codes.len(), mask.code_bytes());
            }
        }
    }
}

#[test]
fn products_equal_the_dense_ones_on_every_isa() {
    let mut rng = Rng(0x1234_5678_9ABC_DEF1);
    for (i, f) in formats().into_iter().enumerate() {
        for (j, s) in STRUCTURES.into_iter().enumerate() {
            let (m, n, k) = SHAPES[(i + j) % SHAPES.len()];
            let w = pruned(&mut rng, s, n, k, 3);
            let dense = quantize(&MatRef::from_f32(&w, n, k), &f, Method::Rtn, 1).unwrap().tensor;
            let q = sparse::pack(&dense.view(), s).unwrap();
            let x = rng.matrix(m * k);
            let bias = rng.matrix(n);
            for compute in Compute::ALL {
                if !f.computes().contains(&compute.to_string().as_str()) {
                    continue;
                }
                for isa in isas() {
                    let o = Options { compute, bias: Some(&bias), threads: 2, isa, poll: None };
                    let w = pack::pack(&dense.view(), 1).unwrap();
                    if gemm::explain(m, &w, &o).is_err() {
                        continue;
                    }
                    let (got, want) = (run(&x, m, &q, &o), run(&x, m, &dense, &o));
                    assert_eq!(same(&got, &want), None, "{f}_{s} {compute} {isa} {m}x{n}x{k}");
                }
            }
        }
    }
}

#[test]
fn every_shape_of_the_fast_paths() {
    let mut rng = Rng(77);
    for name in ["int8", "uint8", "int4", "int4_g32", "int4_g128", "f32", "f16", "bf16", "int8_g32", "ternary"] {
        for s in [Structure::Bitmap, Structure::Groups(32), Structure::Blocks(16, 64), Structure::Blocks(32, 128)] {
            for m in [1, 2, 3, 4, 5, 8, 9, 16, 33, 50, 70] {
                for (n, k, keep) in [(16, 64, 4), (50, 320, 2), (97, 200, 6), (64, 640, 0), (33, 129, 8)] {
                    let f = Format::parse(name).unwrap();
                    let w = pruned(&mut rng, s, n, k, keep);
                    let dense = quantize(&MatRef::from_f32(&w, n, k), &f, Method::Rtn, 1).unwrap().tensor;
                    let q = sparse::pack(&dense.view(), s).unwrap();
                    let x = rng.matrix(m * k);
                    for compute in [Compute::F32, Compute::Int8 { group: None }] {
                        if !f.computes().contains(&compute.to_string().as_str()) {
                            continue;
                        }
                        for isa in isas().into_iter().filter(|_| m < 10).chain([*isas().last().unwrap()]) {
                            let o = Options { compute, threads: 1 + m % 2, isa, ..Options::default() };
                            let (got, want) = (run(&x, m, &q, &o), run(&x, m, &dense, &o));
                            assert_eq!(same(&got, &want), None, "{f}_{s} {compute} {isa} {m}x{n}x{k}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn rows_that_are_not_finite_give_nan_where_dense_does() {
    let mut rng = Rng(5);
    let (m, n, k) = (6, 40, 192);
    for name in ["int8", "int4_g32", "f32"] {
        for s in STRUCTURES {
            let f = Format::parse(name).unwrap();
            let w = pruned(&mut rng, s, n, k, 2);
            let dense = quantize(&MatRef::from_f32(&w, n, k), &f, Method::Rtn, 1).unwrap().tensor;
            let q = sparse::pack(&dense.view(), s).unwrap();
            let mut x = rng.matrix(m * k);
            x[k + 7] = f32::NAN;
            x[2 * k + 100] = f32::INFINITY;
            x[5 * k] = f32::NEG_INFINITY;
            for compute in [Compute::F32, Compute::Int8 { group: None }] {
                if !f.computes().contains(&compute.to_string().as_str()) {
                    continue;
                }
                for (m, isa) in [1, 2, 6].into_iter().flat_map(|m| isas().into_iter().map(move |i| (m, i))) {
                    let o = Options { compute, isa, ..Options::default() };
                    for from in 0..=6 - m {
                        let x = &x[from * k..][..m * k];
                        assert_eq!(same(&run(x, m, &q, &o), &run(x, m, &dense, &o)), None, "{f}_{s} {compute} {isa}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let full = vec![1.0; 4 * 64];
    let int8 = Format::parse("int8").unwrap();
    let dense = quantize(&MatRef::from_f32(&full, 4, 64), &int8, Method::Rtn, 1).unwrap().tensor;
    let e = sparse::pack(&dense.view(), Structure::TwoOfFour).unwrap_err();
    assert!(e.to_string().contains("128 entries are in the way"), "{e}");
    for s in ["bipolar4_bitmap", "bipolar1_2of4", "int8_bsr0", "int8_block16", "int8_bitmap_g32", "int8_bitmap_2of4"] {
        assert!(Format::parse(s).is_err(), "{s}");
    }
    let q = sparse::pack(&dense.view(), Structure::Bitmap).unwrap();
    assert!(sparse::pack(&q.view(), Structure::Bitmap).is_err());
    let mask = q.mask.as_ref().unwrap();
    let view = |mask, codes| {
        nibblas_core::QView::with_mask(q.format, 4, 64, codes, q.scales.view(), q.zeros.view(), mask).map(|_| ())
    };
    assert!(view(Some(mask), &q.codes).is_ok());
    assert!(view(None, &q.codes).is_err());
    assert!(view(Some(mask), &q.codes[1..]).is_err());
    let fewer = sparse::Mask::new(Structure::Bitmap, 4, 64, 8, &[0; 32]).unwrap();
    assert!(view(Some(&fewer), &q.codes).is_err());
    assert!(view(Some(&fewer), &[]).is_ok());
    assert!(sparse::Mask::new(Structure::Bitmap, 4, 64, 8, &[0; 31]).is_err());
}
