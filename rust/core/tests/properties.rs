//! Properties of products over random formats, shapes, computes, levels, threads and strides.
//!
//! `NIBBLAS_PROPERTY_CASES` sets the cases of each property, 400 by default.
mod common;

use common::quantised;
use nibblas_core::format::{e4m3_byte, e8m0_byte};
use nibblas_core::gemm::{self, Compute, Options};
use nibblas_core::isa::Isa;
use nibblas_core::pair::{self, RawOut};
use nibblas_core::reference::{
    f32_bound, integers, matmul_f32_ref, matmul_f64_ref, matmul_int8_ref, matmul_sums_ref, same_bits, Activations,
};
use nibblas_core::{pack, Format, MatMut, MatRef, QTensor, Scalar, ScaleType, Scales, ZeroKind, Zeros};
use proptest::prelude::*;
use proptest::sample::select;

fn config() -> ProptestConfig {
    let cases = std::env::var("NIBBLAS_PROPERTY_CASES").map_or(400, |s| s.parse().expect("a number of cases"));
    // Most formats have no integers that some of the properties are about.
    let max_global_rejects = 50 * cases;
    ProptestConfig { cases, max_global_rejects, failure_persistence: None, ..ProptestConfig::default() }
}

struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn unit(&mut self) -> f32 {
        (self.next() & 0xff_ffff) as f32 / 8_388_608.0 - 1.0
    }
}

/// How numbers are spread.
#[derive(Debug, Clone, Copy)]
enum Spread {
    Uniform,
    Lognormal,
    Cauchy,
    Extremes,
    Sparse,
    Subnormal,
}

const SPREADS: [Spread; 6] =
    [Spread::Uniform, Spread::Lognormal, Spread::Cauchy, Spread::Extremes, Spread::Sparse, Spread::Subnormal];

fn fill(rng: &mut Rng, spread: Spread, n: usize) -> Vec<f32> {
    (0..n)
        .map(|_| {
            let u = rng.unit();
            match spread {
                Spread::Uniform => u,
                Spread::Lognormal => (4.0 * (rng.unit() + rng.unit() + rng.unit())).exp().copysign(u),
                Spread::Cauchy => (u * 1.57).tan(),
                Spread::Extremes => 3e4f32.copysign(u),
                Spread::Sparse => {
                    if rng.below(8) == 0 {
                        u
                    } else {
                        0.0
                    }
                }
                Spread::Subnormal => u * 1e-38,
            }
        })
        .collect()
}

#[derive(Debug, Clone)]
struct Case {
    format: Format,
    m: usize,
    n: usize,
    k: usize,
    isa: Isa,
    threads: usize,
    bias: bool,
    float_zeros: bool,
    spread: Spread,
    /// Orders of x and y: see [`Strided`].
    orders: (u8, u8),
    seed: u64,
}

fn any_format() -> impl Strategy<Value = Format> {
    let elements: Vec<_> = nibblas_core::format::table().collect();
    let group = prop_oneof![
        3 => Just(None),
        5 => select(vec![8u32, 16, 32, 64, 128]).prop_map(Some),
        2 => (8u32..200).prop_map(Some),
    ];
    (select(elements), group, 0usize..4).prop_map(|(e, g, s)| {
        let scale = e.scales[s % e.scales.len()];
        let group = if scale == ScaleType::I8 { g.or(Some(32)) } else { g };
        Format::with(e, group, Some(scale)).unwrap()
    })
}

fn extent(top: usize) -> impl Strategy<Value = usize> {
    prop_oneof![3 => 1..=top, 2 => select(vec![1, 2, 4, 8, 16, 17, 32, 33, 64]), 1 => Just(0)]
}

fn case() -> impl Strategy<Value = Case> {
    let isas: Vec<_> = Isa::ALL.into_iter().filter(|i| i.is_available()).collect();
    (
        (any_format(), extent(70), extent(90), prop_oneof![4 => extent(300), 1 => 300usize..1200]),
        (select(isas), 1usize..5, any::<bool>(), any::<bool>(), select(SPREADS.to_vec())),
        ((0u8..5, 0u8..5), any::<u64>()),
    )
        .prop_map(|((format, m, n, k), (isa, threads, bias, float_zeros, spread), (orders, seed))| Case {
            format,
            m,
            n,
            k,
            isa,
            threads,
            bias,
            float_zeros,
            spread,
            orders,
            seed,
        })
}

/// A matrix in one of five memory orders: rows, rows apart, rows backwards, columns, every other column.
struct Strided {
    data: Vec<f32>,
    order: u8,
    rows: usize,
    cols: usize,
}

impl Strided {
    fn new(order: u8, rows: usize, cols: usize) -> Self {
        Self { data: vec![f32::NAN; 2 * rows * cols + 3 * rows], order, rows, cols }
    }

    fn of(x: &[f32], order: u8, rows: usize, cols: usize) -> Self {
        let mut s = Self::new(order, rows, cols);
        for i in 0..rows {
            for j in 0..cols {
                let at = s.at(i, j);
                s.data[at] = x[i * cols + j];
            }
        }
        s
    }

    /// First element and strides, in elements.
    fn layout(&self) -> (usize, isize, isize) {
        let (r, c) = (self.rows as isize, self.cols as isize);
        match self.order {
            0 => (0, c, 1),
            1 => (1, c + 3, 1),
            2 => (self.rows.saturating_sub(1) * self.cols, -c, 1),
            3 => (0, 1, r),
            _ => (0, 2 * c + 1, 2),
        }
    }

    fn at(&self, i: usize, j: usize) -> usize {
        let (first, rs, cs) = self.layout();
        (first as isize + i as isize * rs + j as isize * cs) as usize
    }

    fn view(&self) -> MatRef<'_> {
        let (first, rs, cs) = self.layout();
        let p = self.data.as_ptr().wrapping_add(first).cast();
        // SAFETY: `at` gives the places of all elements, and indexing `data` there was checked in `of`.
        unsafe { MatRef::from_raw(p, Scalar::F32, self.rows, self.cols, rs * 4, cs * 4) }
    }

    fn view_mut(&mut self) -> MatMut<'_> {
        let (first, rs, cs) = self.layout();
        let p = self.data.as_mut_ptr().wrapping_add(first).cast();
        // SAFETY: as above; no two elements share a place.
        unsafe { MatMut::from_raw(p, Scalar::F32, self.rows, self.cols, rs * 4, cs * 4) }
    }

    fn dense(&self) -> Vec<f32> {
        (0..self.rows * self.cols).map(|t| self.data[self.at(t / self.cols, t % self.cols)]).collect()
    }
}

/// Weights, activations and bias of a case.
fn operands(c: &Case) -> (QTensor, Vec<f32>, Vec<f32>) {
    let mut rng = Rng::new(c.seed);
    let spread = match c.spread {
        // Scales of 16 bits end there.
        Spread::Cauchy | Spread::Lognormal | Spread::Subnormal => Spread::Uniform,
        s => s,
    };
    let w = fill(&mut rng, spread, c.n * c.k);
    let mut q = quantised(&c.format, &w, c.n, c.k);
    if let (Zeros::Int(z), true) = (&q.zeros, c.float_zeros && !c.format.is_two_level()) {
        q.zeros = Zeros::Float(z.iter().map(|&v| f32::from(v) + 0.25).collect());
    }
    let x = fill(&mut rng, c.spread, c.m * c.k);
    let bias = fill(&mut rng, Spread::Uniform, c.n);
    (q, x, bias)
}

fn product(c: &Case, q: &QTensor, x: &[f32], bias: &[f32], compute: Compute) -> Result<Vec<f32>, nibblas_core::Error> {
    let w = pack::pack(&q.view(), c.threads)?;
    let o = Options { compute, bias: c.bias.then_some(bias), threads: c.threads, isa: c.isa, poll: None };
    let xs = Strided::of(x, c.orders.0, c.m, c.k);
    let mut y = Strided::new(c.orders.1, c.m, q.rows);
    gemm::matmul(&xs.view(), &w, &mut y.view_mut(), &o)?;
    Ok(y.dense())
}

fn fits(q: &QTensor, compute: Compute) -> bool {
    let w = pack::pack(&q.view(), 1).unwrap();
    gemm::explain(1, &w, &Options { compute, ..Options::default() }).is_ok()
}

/// Rows `from..to` of a tensor.
fn rows(q: &QTensor, from: usize, to: usize) -> QTensor {
    let (bytes, groups) = (q.view().row_bytes(), q.view().groups());
    let span = from * groups..to * groups;
    QTensor {
        format: q.format,
        rows: to - from,
        cols: q.cols,
        codes: q.codes[from * bytes..to * bytes].to_vec(),
        scales: match &q.scales {
            Scales::F32(v) => Scales::F32(v[span.clone()].to_vec()),
            Scales::F16(v) => Scales::F16(v[span.clone()].to_vec()),
            Scales::BF16(v) => Scales::BF16(v[span.clone()].to_vec()),
            Scales::E8M0(v) => Scales::E8M0(v[span.clone()].to_vec()),
            Scales::E4M3(v) => Scales::E4M3(v[span.clone()].to_vec()),
            Scales::I8(v) => Scales::I8(v[span.clone()].to_vec()),
        },
        zeros: match &q.zeros {
            Zeros::None => Zeros::None,
            Zeros::Int(v) => Zeros::Int(v[span].to_vec()),
            Zeros::Float(v) => Zeros::Float(v[span].to_vec()),
        },
        outer: if q.format.is_two_level() { q.outer[from..to].to_vec() } else { q.outer.clone() },
        mask: None,
        table: if q.format.element.tables_of_rows() {
            (from..to).flat_map(|n| q.view().row_table(n).to_vec()).collect()
        } else {
            q.table.clone()
        },
    }
}

const INTEGER: [Compute; 3] =
    [Compute::Int8 { group: None }, Compute::Int8 { group: Some(32) }, Compute::Int8 { group: Some(128) }];

/// Codes anywhere in their range, scales powers of two near 1, integer zero points.
fn integer_tensor(rng: &mut Rng, f: &Format, n: usize, k: usize, float_zeros: bool) -> QTensor {
    let (e, count) = (f.element, n * f.groups(k));
    let lowest = u32::from(e.lowest);
    let mut code = || lowest + rng.below(u64::from(e.levels - lowest)) as u32;
    let values: Vec<i16> = (0..n * k).map(|_| e.value(code()) as i16).collect();
    let mut scales: Vec<f32> = (0..count).map(|_| 2f32.powi(rng.below(5) as i32 - 2)).collect();
    if e.shared {
        scales.fill(0.5);
    }
    let scales = match f.scale {
        ScaleType::F32 => Scales::F32(scales),
        ScaleType::F16 => Scales::F16(scales.iter().map(|&s| half::f16::from_f32(s).to_bits()).collect()),
        ScaleType::BF16 => Scales::BF16(scales.iter().map(|&s| half::bf16::from_f32(s).to_bits()).collect()),
        ScaleType::E8M0 => Scales::E8M0(scales.iter().map(|&s| e8m0_byte(s)).collect()),
        ScaleType::E4M3 => Scales::E4M3(scales.iter().map(|&s| e4m3_byte(s)).collect()),
        ScaleType::I8 => Scales::I8(scales.iter().map(|&s| (4.0 * s).min(7.0) as u8).collect()),
    };
    let zeros: Vec<u8> = (0..count).map(|_| rng.below(u64::from(e.levels)) as u8).collect();
    let zeros = match (e.zero, float_zeros && !f.is_two_level()) {
        (ZeroKind::None, _) => Zeros::None,
        (ZeroKind::PerGroup, false) => Zeros::Int(zeros),
        (ZeroKind::PerGroup, true) => Zeros::Float(zeros.iter().map(|&z| f32::from(z)).collect()),
    };
    QTensor::from_values(*f, n, k, &values, scales, zeros).unwrap()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn integer_paths_equal_the_reference(c in case(), compute in select(INTEGER.to_vec()), poison in 0u8..8) {
        let (q, mut x, bias) = operands(&c);
        if poison == 0 && !x.is_empty() {
            let at = c.seed as usize % x.len();
            x[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][c.seed as usize % 3];
        }
        prop_assume!(fits(&q, compute));
        let Compute::Int8 { group } = compute else { unreachable!() };
        let acts = Activations::quantize(&MatRef::from_f32(&x, c.m, c.k), group.map(|g| g as usize));
        let want = matmul_int8_ref(&acts, &q.view(), c.bias.then_some(&bias));
        let got = product(&c, &q, &x, &bias, compute).unwrap();
        prop_assert_eq!(same_bits(&got, &want, c.n), Ok(()));
    }

    #[test]
    fn the_f32_path_equals_the_reference_and_keeps_its_bound(c in case(), poison in 0u8..8) {
        let (q, mut x, bias) = operands(&c);
        if poison == 0 && !x.is_empty() {
            let at = c.seed as usize % x.len();
            x[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][c.seed as usize % 3];
        }
        let xs = MatRef::from_f32(&x, c.m, c.k);
        let want = matmul_f32_ref(&xs, &q.view(), c.bias.then_some(&bias));
        let got = product(&c, &q, &x, &bias, Compute::F32).unwrap();
        prop_assert_eq!(same_bits(&got, &want, c.n), Ok(()));
        if c.bias || poison == 0 {
            return Ok(());
        }
        let exact = matmul_f64_ref(&xs, &q.view());
        for ((y, e), b) in got.iter().zip(&exact).zip(f32_bound(&xs, &q.view())) {
            // A result below the normal range has the absolute error of that range besides.
            let b = b + c.k as f64 * 2f64.powi(-149);
            prop_assert!((f64::from(*y) - e).abs() <= b, "{y} {e} {b}");
        }
    }

    #[test]
    fn underflow_keeps_the_sign_of_zero(c in case()) {
        // Products below the smallest float round to 0 with a sign, which padding along K must not change. A float zero
        // point may lie beyond every code and leave no weight of the right sign to pad with.
        let (mut q, _, bias) = operands(&Case { spread: Spread::Uniform, float_zeros: false, ..c.clone() });
        if let Scales::F32(s) = &mut q.scales {
            for s in s {
                *s *= 1e-30;
            }
        }
        let mut rng = Rng::new(c.seed ^ 1);
        let x: Vec<f32> = (0..c.m * c.k).map(|_| 1e-30 * rng.unit()).collect();
        let want = matmul_f32_ref(&MatRef::from_f32(&x, c.m, c.k), &q.view(), c.bias.then_some(&bias));
        let got = product(&c, &q, &x, &bias, Compute::F32).unwrap();
        prop_assert_eq!(same_bits(&got, &want, c.n), Ok(()));
    }

    #[test]
    fn a_window_of_the_product_is_the_product_of_windows(
        c in case(),
        compute in select(vec![Compute::F32, INTEGER[0], INTEGER[1]]),
        cut in (0usize..1000, 0usize..1000, 0usize..1000, 0usize..1000),
    ) {
        let (q, x, bias) = operands(&c);
        prop_assume!(fits(&q, compute));
        let range = |a: usize, b: usize, n: usize| ((a % (n + 1)).min(b % (n + 1)), (a % (n + 1)).max(b % (n + 1)));
        let ((m0, m1), (n0, n1)) = (range(cut.0, cut.1, c.m), range(cut.2, cut.3, c.n));
        let all = product(&c, &q, &x, &bias, compute).unwrap();
        let part = Case { m: m1 - m0, n: n1 - n0, ..c.clone() };
        let got = product(&part, &rows(&q, n0, n1), &x[m0 * c.k..m1 * c.k], &bias[n0..n1], compute).unwrap();
        let want: Vec<f32> = (m0..m1).flat_map(|m| all[m * c.n + n0..m * c.n + n1].iter().copied()).collect();
        prop_assert_eq!(same_bits(&got, &want, n1 - n0), Ok(()));
    }

    #[test]
    fn products_of_integers_are_exact_on_every_path(c in case(), compute in select(Compute::ALL.to_vec())) {
        // 7 * 255 * 4 in units of 1/4, twice over 256 places, stays below 2^24.
        let c = Case { k: c.k % 257, ..c };
        prop_assume!(c.format.element.is_linear() && !c.format.element.is_dense());
        let mut rng = Rng::new(c.seed);
        let q = integer_tensor(&mut rng, &c.format, c.n, c.k, c.float_zeros);
        let x: Vec<i8> = (0..c.m * c.k).map(|_| rng.below(15) as i8 - 7).collect();
        let bias: Vec<f32> = (0..c.n).map(|_| rng.below(15) as f32 - 7.0).collect();
        prop_assume!(fits(&q, compute));
        let weights = integers(&q.view());
        let mut want = vec![0f32; c.m * c.n];
        let len = q.view().group_len();
        for m in 0..c.m {
            for n in 0..c.n {
                let sum: f64 = (0..c.k)
                    .map(|k| {
                        let zero = match &q.zeros {
                            Zeros::Float(z) => f64::from(z[n * q.view().groups() + k / len]),
                            _ => 0.0,
                        };
                        f64::from(x[m * c.k + k])
                            * (weights[n * c.k + k] as f64 - zero)
                            * if c.format.is_two_level() { 1.0 } else { f64::from(q.view().scale(n, k / len)) }
                    })
                    .sum();
                want[m * c.n + n] = (sum + if c.bias { f64::from(bias[n]) } else { 0.0 }) as f32;
            }
        }
        let got = if matches!(compute, Compute::Int8 { .. }) {
            // As codes, whose scale is 1.
            let w = pack::pack(&q.view(), 1).unwrap();
            let o = Options { compute, bias: c.bias.then_some(&bias), threads: c.threads, isa: c.isa, poll: None };
            let mut y = vec![0f32; c.m * c.n];
            // SAFETY: (m, k) row-major bytes.
            let xs = unsafe { MatRef::from_raw(x.as_ptr().cast(), Scalar::I8, c.m, c.k, c.k as isize, 1) };
            gemm::matmul(&xs, &w, &mut MatMut::from_f32(&mut y, c.m, c.n), &o).unwrap();
            y
        } else {
            let x: Vec<f32> = x.iter().map(|&v| f32::from(v)).collect();
            product(&c, &q, &x, &bias, compute).unwrap()
        };
        for (t, (g, w)) in got.iter().zip(&want).enumerate() {
            prop_assert!(g == w, "{g} instead of {w} at ({}, {})", t / c.n, t % c.n);
        }
    }

    #[test]
    fn raw_sums_are_exact(c in case(), left in any_format()) {
        let mut rng = Rng::new(c.seed);
        let (mut fa, mut fb) = (left, c.format);
        for f in [&mut fa, &mut fb] {
            if !f.element.is_linear() || f.element.is_dense() || f.is_two_level() {
                *f = Format::parse("int5").unwrap();
            }
        }
        (fa.group, fb.group) = (None, None);
        let a = integer_tensor(&mut rng, &fa, c.m, c.k, false);
        let b = integer_tensor(&mut rng, &fb, c.n, c.k, false);
        let w = pack::pack(&b.view(), 1).unwrap();
        let want = matmul_sums_ref(&a.view(), &b.view());
        let o = Options { isa: c.isa, threads: c.threads, ..Options::default() };
        let mut wide = vec![1i64; c.m * c.n];
        pair::matmul_raw(&a.view(), &w, &mut RawOut::I64(&mut wide), &o).unwrap();
        prop_assert_eq!(&wide, &want);
        let mut narrow = vec![1i32; c.m * c.n];
        pair::matmul_raw(&a.view(), &w, &mut RawOut::I32(&mut narrow), &o).unwrap();
        prop_assert!(narrow.iter().zip(&want).all(|(&g, &w)| i64::from(g) == w));
    }
}
