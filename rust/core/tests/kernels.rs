//! Every kernel of every ISA of this CPU against the reference, bit for bit: formats x computes x shapes.
mod common;

use common::quantised;
use nibblas_core::gemm::{self, Compute, Options};
use nibblas_core::isa::Isa;
use nibblas_core::matrix::Scalar;
use nibblas_core::pair::{self, RawOut};
use nibblas_core::quantize::{quantize, Method};
use nibblas_core::reference::{
    f32_bound, matmul_f32_ref, matmul_f64_ref, matmul_int8_ref, matmul_sums_ref, same_bits, Activations,
};
use nibblas_core::{pack, Format, MatMut, MatRef, QTensor, ScaleType, Scales, Zeros};

/// A small generator, so that cases are the same everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// Roughly normal.
    fn normal(&mut self) -> f32 {
        let s: u64 = (0..4).map(|_| self.next() >> 48).sum();
        (s as f32 / 65536.0 - 2.0) * 1.7
    }
    fn matrix(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|i| i.is_available()).collect()
}

/// (class, M, N, K): the edges that break kernels.
const SHAPES: &[(&str, usize, usize, usize)] = &[
    ("gemv", 1, 80, 192),
    ("narrow", 1, 1, 64),
    ("shallow", 3, 33, 8),
    ("unaligned_m", 5, 70, 200),
    ("two_rows", 2, 130, 320),
    ("tile_aligned", 32, 64, 256),
    ("unaligned_all", 37, 45, 333),
    ("lone_panel", 17, 16, 129),
    ("deep", 4, 20, 2100),
];

fn run(x: &[f32], m: usize, q: &QTensor, o: &Options) -> Vec<f32> {
    let w = pack::pack(&q.view(), 1).unwrap();
    let mut y = vec![f32::NAN; m * q.rows];
    gemm::matmul(&MatRef::from_f32(x, m, q.cols), &w, &mut MatMut::from_f32(&mut y, m, q.rows), o).unwrap();
    y
}

fn formats() -> Vec<Format> {
    let mut all = Vec::new();
    for e in nibblas_core::format::table() {
        for suffix in ["", "_g8", "_g16", "_g32", "_g128", "_g48_sf32", "_g96_sbf16", "_sf16"] {
            if suffix.contains("_s") && e.scales.len() == 1 {
                continue;
            }
            all.push(Format::parse(&format!("{}{suffix}", e.name)).unwrap());
        }
        if e.span() > 1 {
            // As many windows of K as groups, which begin elsewhere.
            all.push(Format::with(e, Some(200), None).unwrap());
        }
        if e.is_dense() {
            // Neighbours along K with scales of their own, and codes that are read together cut short.
            all.push(Format::with(e, Some(25), None).unwrap());
        }
        if e.scales.contains(&ScaleType::I8) {
            for group in [8, 12, 32, 48, 96, 128, 4096] {
                all.push(Format::parse(&format!("{}_g{group}_si8", e.name)).unwrap());
            }
        }
    }
    all
}

/// The tensor of a case; every third one with float zero points where the format has zeros.
fn tensor(rng: &mut Rng, f: &Format, n: usize, k: usize, float_zeros: bool) -> QTensor {
    let w = rng.matrix(n * k);
    let mut q = quantised(f, &w, n, k);
    if let (Zeros::Int(z), true) = (&q.zeros, float_zeros && !f.is_two_level()) {
        q.zeros = Zeros::Float(z.iter().map(|&v| f32::from(v) + 0.25).collect());
    }
    q
}

#[test]
fn integer_products_equal_the_reference_on_every_isa() {
    let mut rng = Rng(0x9E37_79B9_7F4A_7C15);
    let mut cases = 0;
    for (i, f) in formats().iter().enumerate() {
        for (j, &(class, m, n, k)) in SHAPES.iter().enumerate() {
            // Each format meets every shape class, each shape most computes, without the full product.
            let group = [None, Some(32), Some(128)][(i + j) % 3];
            let q = tensor(&mut rng, f, n, k, (i + j) % 4 == 0);
            let mut x = rng.matrix(m * k);
            if (i + j) % 5 == 0 {
                x[(m - 1) * k + k / 2] = f32::INFINITY;
            }
            let bias = rng.matrix(n);
            let bias = (j % 2 == 0).then_some(&bias[..]);
            let o = Options { compute: Compute::Int8 { group }, bias, ..Options::default() };
            let acts = Activations::quantize(&MatRef::from_f32(&x, m, k), group.map(|g| g as usize));
            let w = pack::pack(&q.view(), 1).unwrap();
            if gemm::explain(m, &w, &o).is_err() {
                assert!((group.is_some() && f.group.is_some()) || !f.element.has_integers(), "{f} {group:?}");
                continue;
            }
            let want = matmul_int8_ref(&acts, &q.view(), bias);
            for isa in isas() {
                let got = run(&x, m, &q, &Options { isa, ..o });
                let plan = gemm::explain(m, &w, &Options { isa, ..o }).unwrap();
                same_bits(&got, &want, n).unwrap_or_else(|e| panic!("{f} {class} {group:?} {}: {e}", plan.kernel));
                cases += 1;
            }
        }
    }
    assert!(cases > 1000 * isas().len().min(2), "{cases}");
}

#[test]
fn float_products_equal_sequential_fma_on_every_isa() {
    let mut rng = Rng(0xD1B5_4A32_D192_ED03);
    for (i, f) in formats().iter().enumerate() {
        for (j, &(class, m, n, k)) in SHAPES.iter().enumerate() {
            if (i + j) % 2 == 0 {
                continue;
            }
            let q = tensor(&mut rng, f, n, k, i % 3 == 0);
            let x = rng.matrix(m * k);
            let bias = rng.matrix(n);
            let bias = (j % 2 == 0).then_some(&bias[..]);
            let o = Options { bias, ..Options::default() };
            let want = matmul_f32_ref(&MatRef::from_f32(&x, m, k), &q.view(), bias);
            for isa in isas() {
                let got = run(&x, m, &q, &Options { isa, ..o });
                same_bits(&got, &want, n).unwrap_or_else(|e| panic!("{f} {class} {isa}: {e}"));
            }
        }
    }
}

#[test]
fn bf16_products_stay_within_their_bound() {
    let mut rng = Rng(0xA076_1D64_78BD_642F);
    for (i, f) in formats().iter().enumerate() {
        let &(class, m, n, k) = &SHAPES[i % SHAPES.len()];
        let q = tensor(&mut rng, f, n, k, i % 3 == 0);
        let x = rng.matrix(m * k);
        let xs = MatRef::from_f32(&x, m, k);
        let exact = matmul_f64_ref(&xs, &q.view());
        let scale = f32_bound(&xs, &q.view());
        for isa in isas() {
            let o = Options { compute: Compute::Bf16, isa, ..Options::default() };
            let got = run(&x, m, &q, &o);
            for (t, (g, e)) in got.iter().zip(&exact).enumerate() {
                // Two operands rounded to 8 significant bits: at most 2^-8 of sum |x||w| each, beside the f32 term.
                let magnitude = scale[t] / (k as f64 * 2f64.powi(-24) + 2f64.powi(-23));
                let bound = scale[t] + magnitude * (2f64.powi(-7) + 2f64.powi(-16));
                assert!((f64::from(*g) - e).abs() <= bound, "{f} {class} {isa} at {t}: {g} {e} {bound}");
            }
        }
    }
}

#[test]
fn threads_and_batches_do_not_change_a_bit() {
    let mut rng = Rng(7);
    for name in ["int4_g32", "uint4_g128", "bipolar3", "int8", "ternary_g64", "int5_g16"] {
        let f = Format::parse(name).unwrap();
        let (m, n, k) = (130, 200, 384);
        let q = tensor(&mut rng, &f, n, k, false);
        let x = rng.matrix(m * k);
        for compute in [Compute::F32, Compute::Bf16, Compute::Int8 { group: None }, Compute::Int8 { group: Some(32) }] {
            let o = Options { compute, ..Options::default() };
            if compute == (Compute::Int8 { group: Some(32) }) && f.group == Some(16) {
                assert!(gemm::explain(m, &pack::pack(&q.view(), 1).unwrap(), &o).is_ok());
            }
            let all = run(&x, m, &q, &o);
            for threads in [2, 3, 7, 16] {
                same_bits(&run(&x, m, &q, &Options { threads, ..o }), &all, n).unwrap();
            }
            if compute == Compute::Bf16 {
                continue;
            }
            for rows in [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 64, 129] {
                let part = run(&x[..rows * k], rows, &q, &o);
                same_bits(&part, &all[..rows * n], n).unwrap_or_else(|e| panic!("{name} {compute} {rows}: {e}"));
            }
        }
    }
}

#[test]
fn raw_sums_and_quantised_pairs_are_exact() {
    let mut rng = Rng(99);
    let integer = nibblas_core::format::table().filter(|e| e.has_integers() && e.group.is_none());
    let names: Vec<_> = integer.map(|e| e.name).collect();
    for (i, a_name) in names.iter().enumerate() {
        let b_name = names[(i * 7 + 3) % names.len()];
        let (fa, fb) = (Format::parse(a_name).unwrap(), Format::parse(b_name).unwrap());
        for (m, n, k) in [(1, 40, 100), (20, 33, 130)] {
            let (a, b) = (tensor(&mut rng, &fa, m, k, false), tensor(&mut rng, &fb, n, k, false));
            let want = matmul_sums_ref(&a.view(), &b.view());
            let w = pack::pack(&b.view(), 1).unwrap();
            for isa in isas() {
                let o = Options { isa, ..Options::default() };
                let mut wide = vec![0i64; m * n];
                let done = pair::matmul_raw(&a.view(), &w, &mut RawOut::I64(&mut wide), &o);
                if fa.element.is_linear() && fb.element.is_linear() {
                    done.unwrap();
                    assert_eq!(wide, want, "{a_name} x {b_name} on {isa}");
                    let mut narrow = vec![0i32; m * n];
                    pair::matmul_raw(&a.view(), &w, &mut RawOut::I32(&mut narrow), &o).unwrap();
                    assert!(narrow.iter().zip(&want).all(|(&g, &v)| i64::from(g) == v));
                } else {
                    assert!(done.unwrap_err().to_string().contains("codes that are integers"));
                }
                let mut y = vec![0f32; m * n];
                pair::matmul_q(&a.view(), &w, &mut MatMut::from_f32(&mut y, m, n), &o).unwrap();
                for (t, v) in y.iter().enumerate() {
                    let (a, b) = (a.view(), b.view());
                    let (sa, sb) = (a.scale(t / n, 0) * a.step() * b.step(), b.scale(t % n, 0));
                    assert_eq!(*v, (want[t] as f32).mul_add(sb, 0.0) * sa, "{a_name} x {b_name} on {isa}");
                }
            }
        }
    }
}

#[test]
fn long_rows_are_summed_in_int64() {
    let mut rng = Rng(5);
    let (n, k) = (3, 140_000);
    for name in ["uint8", "int8", "bipolar8", "e3m2"] {
        let f = Format::parse(name).unwrap();
        // One sign throughout, so that the sums do pass 2^31.
        let w: Vec<f32> = (0..n * k).map(|_| 1.0 + rng.normal().abs() * 0.01).collect();
        let q = quantize(&MatRef::from_f32(&w, n, k), &f, Method::Rtn, 1).unwrap().tensor;
        for m in [1, 9] {
            let x: Vec<f32> = (0..m * k).map(|_| 1.0 + rng.normal().abs() * 0.01).collect();
            let acts = Activations::quantize(&MatRef::from_f32(&x, m, k), None);
            let want = matmul_int8_ref(&acts, &q.view(), None);
            for isa in isas() {
                let o = Options { compute: Compute::Int8 { group: None }, isa, ..Options::default() };
                same_bits(&run(&x, m, &q, &o), &want, n).unwrap_or_else(|e| panic!("{name} {isa} {m}: {e}"));
            }
        }
    }
}

#[test]
fn two_level_pairs_are_exact() {
    let mut rng = Rng(7);
    for (a, b) in [("int4_g32_si8", "int8"), ("int8", "uint4_g8_si8"), ("uint3_g24_si8", "int4_g128_si8")] {
        let (fa, fb) = (Format::parse(a).unwrap(), Format::parse(b).unwrap());
        for (m, n, k) in [(1, 40, 100), (20, 33, 130)] {
            let (p, q) = (tensor(&mut rng, &fa, m, k, false), tensor(&mut rng, &fb, n, k, false));
            let sums = matmul_sums_ref(&p.view(), &q.view());
            let scale = |t: &QTensor, i| if t.format.is_two_level() { t.outer[i] } else { t.scales.view().get(i) };
            let want: Vec<f32> =
                (0..m * n).map(|i| (sums[i] as f32).mul_add(scale(&q, i % n), 0.0) * scale(&p, i / n)).collect();
            let w = pack::pack(&q.view(), 1).unwrap();
            for isa in isas() {
                let o = Options { isa, ..Options::default() };
                let mut y = vec![0f32; m * n];
                pair::matmul_q(&p.view(), &w, &mut MatMut::from_f32(&mut y, m, n), &o).unwrap();
                same_bits(&y, &want, n).unwrap_or_else(|e| panic!("{a} x {b} on {isa}: {e}"));
                let raw = pair::matmul_raw(&p.view(), &w, &mut RawOut::I64(&mut vec![0; m * n]), &o);
                assert!(matches!(raw, Err(nibblas_core::Error::Value(_))));
            }
        }
    }
}

/// The largest integer scales that are legal, at the codes that make the largest products.
#[test]
fn two_level_extremes_are_exact() {
    let mut rng = Rng(11);
    for (name, low, high, t, z) in [
        ("int4_g32_si8", -7, 7, 17u8, 0u8),
        ("int4_g32_si8", -8, 7, 16, 0),
        ("int3_g32_si8", -4, 3, 32, 0),
        ("int2_g32_si8", -1, 1, 85, 0),
        ("ternary_g32_si8", -1, 1, 127, 0),
        ("uint4_g32_si8", 8, 15, 17, 8),
        ("uint4_g32_si8", 0, 2, 127, 1),
        ("uint2_g32_si8", 2, 3, 85, 2),
    ] {
        let f = Format::parse(name).unwrap();
        for (m, n, k) in [(1, 40, 100), (3, 17, 64), (20, 33, 130)] {
            let values: Vec<i16> = (0..n * k).map(|_| if rng.next() & 1 == 0 { low } else { high }).collect();
            let count = n * f.groups(k);
            let zeros = if name.starts_with('u') { Zeros::Int(vec![z; count]) } else { Zeros::None };
            let q = QTensor::from_values(f, n, k, &values, Scales::I8(vec![t; count]), zeros).unwrap();
            let x = rng.matrix(m * k);
            let acts = Activations::quantize(&MatRef::from_f32(&x, m, k), None);
            let want = matmul_int8_ref(&acts, &q.view(), None);
            for isa in isas() {
                let o = Options { isa, compute: Compute::Int8 { group: None }, ..Options::default() };
                same_bits(&run(&x, m, &q, &o), &want, n).unwrap_or_else(|e| panic!("{name} t = {t} {isa}: {e}"));
            }
        }
    }
}

/// Sums as large as they become on the way: every code the largest or the smallest, against -128 and 127. What adds
/// products in 16 bits first has no room beyond this.
#[test]
fn extreme_codes_are_exact() {
    for name in ["int2", "int3", "int4", "int5", "int6", "int7", "int8", "uint4", "uint7", "uint8", "bipolar4"] {
        for suffix in ["", "_g32_sf32", "_g128_sf32"] {
            let f = Format::parse(&format!("{name}{suffix}")).unwrap();
            let (lo, hi) = f.element.values();
            for (m, n, k) in [(1, 33, 256), (5, 17, 520), (33, 40, 256)] {
                for value in [lo, hi] {
                    let zeros = if name.starts_with('u') { Zeros::Int(vec![0; n * f.groups(k)]) } else { Zeros::None };
                    let scales = Scales::F32(vec![1.0; n * f.groups(k)]);
                    let q = QTensor::from_values(f, n, k, &vec![value as i16; n * k], scales, zeros).unwrap();
                    for a in [-128i8, 127] {
                        let x = vec![a; m * k];
                        // SAFETY: an (m, k) matrix of bytes.
                        let x = unsafe { MatRef::from_raw(x.as_ptr().cast(), Scalar::I8, m, k, k as isize, 1) };
                        let w = pack::pack(&q.view(), 1).unwrap();
                        for isa in isas() {
                            let o = Options { isa, compute: Compute::Int8 { group: None }, ..Options::default() };
                            let mut y = vec![f32::NAN; m * n];
                            gemm::matmul(&x, &w, &mut MatMut::from_f32(&mut y, m, n), &o).unwrap();
                            let want = (k as i32 * value * i32::from(a)) as f32;
                            assert!(y.iter().all(|&v| v == want), "{f} {isa} {m}: {a} x {value}");
                        }
                    }
                }
            }
        }
    }
}
