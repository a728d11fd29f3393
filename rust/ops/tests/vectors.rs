//! Numbers that the operators' sources publish, or that follow from their formulas.
use nibblas_ops::approx::lmul::{lmul, Model};
use nibblas_ops::intops::compat::{self, Family};
use nibblas_ops::intops::gelu::{apply, Function};
use nibblas_ops::intops::requant::{requantize, Rounding};
use nibblas_ops::intops::scale::Dyadic;
use nibblas_ops::intops::softmax::softmax;
use nibblas_ops::intops::sqrt::{sqrt32, sqrt64};
use nibblas_ops::{Error, Exec, Ints, IntsMut};

fn rescaled(x: i32, multiplier: i32, shift: i32, rounding: Rounding) -> i32 {
    let mut y = [0i32];
    let factor = [Dyadic { multiplier, shift }];
    requantize(&Exec::default(), Ints::I32(&[x]), &factor, 1, 0, rounding, IntsMut::I32(&mut y)).unwrap();
    y[0]
}

#[test]
fn one_rounding_and_two_differ_where_they_are_known_to() {
    for (x, m, n, single, gemmlowp) in [
        (91581, 2012766816, 3, 10729, 10730),
        (-521882, 1382566725, 4, -20999, -21000),
        (3, 1 << 30, 0, 2, 2),
        (-3, 1 << 30, 0, -1, -1),
        (i32::MIN, i32::MIN, 0, i32::MAX, i32::MAX),
    ] {
        assert_eq!(rescaled(x, m, n, Rounding::Single), single, "{x} {m} {n}");
        assert_eq!(rescaled(x, m, n, Rounding::Gemmlowp), gemmlowp, "{x} {m} {n}");
    }
}

#[test]
fn shifts_beyond_31_and_scales_that_underflow_are_errors() {
    let (exec, mut y) = (Exec::default(), [0i32]);
    let factor = [Dyadic { multiplier: 1 << 30, shift: 32 }];
    let got = requantize(&exec, Ints::I32(&[1]), &factor, 1, 0, Rounding::Single, IntsMut::I32(&mut y));
    assert!(matches!(got, Err(Error::Value(m)) if m.contains("shift must lie in -31..=31")));
    for (scale, what) in [(1e-12, "underflows"), (1e12, "overflows"), (0.0, "positive"), (f64::NAN, "positive")] {
        assert!(matches!(Dyadic::new(scale), Err(Error::Value(m)) if m.contains(what)), "{scale}");
    }
}

#[test]
fn softmax_of_scales_that_leave_nothing_and_of_rows_of_minus_infinity() {
    let exec = Exec::default();
    for family in [Family::Ibert, Family::Ivit] {
        for scale in [0.01, 1.6, 1.7, 2.0, 1e3, 1e9] {
            let mut y = [0i64; 4];
            match compat::softmax(&exec, family, Ints::I32(&[0, 1, -5, i32::MIN]), 4, scale, &mut y) {
                Ok(()) => assert!(y.iter().all(|&v| v >= 0), "{scale}: {y:?}"),
                Err(e) => assert!(matches!(e, Error::Value(m) if m.contains("too"))),
            }
        }
    }
    let mut y = [7i32; 3];
    softmax(&exec, Ints::I32(&[i32::MIN; 3]), 3, 0.01, IntsMut::I32(&mut y)).unwrap();
    assert_eq!(y, [0; 3]);
}

/// Squares and their neighbours, both ends, and a stride over all 32 bits.
#[test]
fn roots_are_exact() {
    let exec = Exec { threads: 2, ..Exec::default() };
    let mut v: Vec<u32> = (0..1u32 << 16).flat_map(|r| [r * r, (r * r).saturating_sub(1), r * r + 2 * r]).collect();
    v.extend((0..1u64 << 32).step_by(4099).map(|x| x as u32));
    v.extend([u32::MAX, u32::MAX - 1, 1 << 31, (1 << 31) - 1]);
    let mut roots = vec![0; v.len()];
    sqrt32(&exec, &v, &mut roots).unwrap();
    let floor = |v: u64, r: u64| r * r <= v && u128::from(r + 1).pow(2) > u128::from(v);
    assert!(v.iter().zip(&roots).all(|(&v, &r)| floor(u64::from(v), u64::from(r))));
    let v: Vec<u64> =
        (0..1u64 << 32).step_by(65_537).flat_map(|r| [r * r, (r * r).saturating_sub(1), r * r + 2 * r]).collect();
    let mut roots = vec![0; v.len()];
    sqrt64(&exec, &v, &mut roots).unwrap();
    assert!(v.iter().zip(&roots).all(|(&v, &r)| floor(v, r)));
    let mut top = [0];
    sqrt64(&exec, &[u64::MAX], &mut top).unwrap();
    assert_eq!(top, [(1 << 32) - 1]);
}

#[test]
fn the_published_root_is_wrong_below_34_000_and_ours_is_not() {
    let v = [100u64, 1000, 10_000, 100_000, (1 << 32) - 1];
    let (mut theirs, mut ours) = ([0; 5], [0; 5]);
    compat::ivit_sqrt(&v, &mut theirs).unwrap();
    sqrt64(&Exec::default(), &v, &mut ours).unwrap();
    assert_eq!(theirs, [64, 68, 108, 316, 65536]);
    assert_eq!(ours, [10, 31, 100, 316, 65535]);
}

/// The largest error of an exponential over `[-20, 0]`, for codes of a scale.
fn exp_error(family: Option<Family>, scale: f64) -> f64 {
    let x: Vec<i32> = (0..=(20.0 / scale) as i32).map(|v| -v).collect();
    let exec = Exec::default();
    let (codes, unit) = if let Some(family) = family {
        let mut y = vec![0; x.len()];
        compat::exp(&exec, family, Ints::I32(&x), scale, &mut y).unwrap();
        let unit =
            if family == Family::Ibert { 0.35815147 * scale * scale / 2f64.powi(30) } else { scale / 2f64.powi(15) };
        (y, unit)
    } else {
        let mut y = vec![0i32; x.len()];
        apply(&exec, Function::Exp, Ints::I32(&x), scale, 2f64.powi(-30), IntsMut::I32(&mut y)).unwrap();
        (y.iter().map(|&v| i64::from(v)).collect(), 2f64.powi(-30))
    };
    let errors = x.iter().zip(&codes).map(|(&x, &c)| (c as f64 * unit - (f64::from(x) * scale).exp()).abs());
    errors.fold(0.0, f64::max)
}

#[test]
fn exponentials_are_as_far_off_as_published() {
    for (scale, ibert, ivit) in
        [(1.0 / 16.0, 2.7e-2, 6.5e-2), (1.0 / 64.0, 5.4e-3, 5.0e-2), (1.0 / 256.0, 1.93e-3, 4.6e-2)]
    {
        let near = |found: f64, want: f64| (found / want - 1.0).abs() < 0.05;
        assert!(near(exp_error(Some(Family::Ibert), scale), ibert), "{scale}");
        assert!(near(exp_error(Some(Family::Ivit), scale), ivit), "{scale}");
        assert!(exp_error(None, scale) < 3e-6, "{scale}");
    }
}

/// `Phi(x)` by its series, which is exact enough up to 6.
fn normal(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / 2.0 / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    0.5 + sum / (2.0 * std::f64::consts::PI).sqrt()
}

#[test]
fn gelu_is_within_its_bound_and_the_published_one_within_its_own() {
    let (exec, scale) = (Exec::default(), 2f64.powi(-13));
    let x: Vec<i32> = (-(1 << 15)..=1 << 15).step_by(3).collect();
    let exact: Vec<f64> = x.iter().map(|&x| f64::from(x) * scale).map(|x| x * normal(x)).collect();
    let worst = |codes: &[i64], unit: f64| {
        codes.iter().zip(&exact).map(|(&c, e)| (c as f64 * unit - e).abs()).fold(0.0, f64::max)
    };
    let mut y = vec![0; x.len()];
    compat::gelu(&exec, Family::Ibert, Ints::I32(&x), 1, scale, &mut y).unwrap();
    // The published constant, which is not the root of 2.
    let s = scale * 1e4 / 14142.0;
    let found = worst(&y, scale * -0.2888 * s * s * 2f64.powi(14) / 2.0);
    assert!((found / 1.82e-2 - 1.0).abs() < 0.02, "{found}");
    for out in [2f64.powi(-22), 2f64.powi(-24)] {
        let mut y = vec![0i32; x.len()];
        apply(&exec, Function::Gelu, Ints::I32(&x), scale, out, IntsMut::I32(&mut y)).unwrap();
        let found = worst(&y.iter().map(|&v| i64::from(v)).collect::<Vec<_>>(), out);
        assert!(found < 7e-6 + out, "{found}");
    }
}

/// Float32 with L-Mul's offset.
const LMUL: Model = Model { offset: 0x3f78_0000, smallest: 0x0080_0000, largest: 0x7f7f_ffff, beyond: 0x7f7f_ffff };

#[test]
fn lmul_of_four_pairs() {
    let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let (a, b) = (bits(&[1.0, 1.5, 3.0, -2.0, 0.0]), bits(&[1.0, 1.5, 5.0, 0.75, 7.0]));
    let mut y = [1; 5];
    lmul(&Exec::default(), LMUL, &a, &b, &mut y).unwrap();
    assert_eq!(y.to_vec(), bits(&[1.0625, 2.125, 14.5, -1.5625, 0.0]));
    assert!(matches!(lmul(&Exec::default(), LMUL, &a, &b[1..], &mut y), Err(Error::Shape(_))));
}
