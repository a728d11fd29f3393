//! The format table, the grammar of names, packing, quantising and decoding, against plain restatements of the rules.
use nibblas_core::format::{e4m3, e4m3_byte, e8m0_byte, table, Level, ScaleMode, Zero};
use nibblas_core::quantize::{quantize, quantize_at, quantize_polled, Dest, Method, Quantized, ScalesMut};
use nibblas_core::{
    Element, Error, Format, MatRef, QTensor, QView, Scalar, ScaleType, Scales, ScalesRef, Zeros, ZerosRef,
};
use proptest::prelude::*;

/// Every element with one scale per row and in groups, with every scale type but the integers of two-level formats; elements
/// whose codes are searched for, which takes long, as they are by default.
fn formats() -> Vec<Format> {
    let mut all = Vec::new();
    for e in table() {
        if e.span() > 1 {
            all.push(Format::with(e, None, None).unwrap());
            continue;
        }
        for group in [None, Some(8), Some(13), Some(32), Some(128)] {
            for &scale in e.scales.iter().filter(|s| **s != ScaleType::I8) {
                all.push(Format::with(e, group, Some(scale)).unwrap());
            }
        }
        if e.mantissa.is_some() {
            let f = Format::with(e, None, None).unwrap();
            all.extend(ScaleMode::ALL.map(|mode| Format { mode, ..f }));
        }
    }
    all
}

fn scales_of(kind: ScaleType, values: &[f32]) -> Scales {
    match kind {
        ScaleType::F32 => Scales::F32(values.to_vec()),
        ScaleType::F16 => Scales::F16(values.iter().map(|&s| half::f16::from_f32(s).to_bits()).collect()),
        ScaleType::BF16 => Scales::BF16(values.iter().map(|&s| half::bf16::from_f32(s).to_bits()).collect()),
        ScaleType::E8M0 => Scales::E8M0(values.iter().map(|&s| e8m0_byte(s)).collect()),
        ScaleType::E4M3 => Scales::E4M3(values.iter().map(|&s| e4m3_byte(s)).collect()),
        ScaleType::I8 => Scales::I8(values.iter().map(|&s| s as u8).collect()),
    }
}

/// Numbers like weights: a pseudo-random sum of uniforms.
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / 4294967296.0 - 0.5
    };
    (0..n).map(|_| next() + next() + next() + next()).collect()
}

fn rtn(x: &[f32], rows: usize, cols: usize, f: Format) -> Quantized {
    quantize(&MatRef::from_f32(x, rows, cols), &f, Method::Rtn, 2).unwrap()
}

fn square_error(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

#[test]
fn names_round_trip() {
    for f in formats() {
        assert_eq!(Format::parse(&f.to_string()).unwrap(), f);
    }
    assert_eq!(Format::parse("int4_g128_sf16").unwrap().to_string(), "int4_g128");
    assert_eq!(Format::parse("uint4_sf32").unwrap().to_string(), "uint4");
    assert_eq!(Format::parse("ternary_sf16").unwrap().to_string(), "ternary_sf16");
    assert_eq!(Format::parse("int4_g4294967295").unwrap().group, Some(u32::MAX));
    assert_eq!(Format::parse("mxfp4_g32_floor").unwrap().to_string(), "mxfp4");
    assert_eq!(Format::parse("mxfp6_e2m3_g64_rceil").unwrap().to_string(), "mxfp6_e2m3_g64_rceil");
    assert_eq!(Format::parse("bfp8").unwrap().group, Some(16));
    assert_eq!(Format::parse("msfp12").unwrap().to_string(), "bfp4");
    assert_eq!(Format::parse("msfp16_g32").unwrap().to_string(), "bfp8_g32");
}

#[test]
fn malformed_names_say_what_is_wrong() {
    for (name, says) in [
        ("", "unknown element"),
        ("int9", "did you mean int"),
        ("itn4", "int4"),
        ("INT4", "did you mean int4"),
        ("banana", "known are int2"),
        ("int4_g0", "below 8"),
        ("int4_g7", "below 8"),
        ("int4_g", "not a number"),
        ("int4_g-8", "not a number"),
        ("int4_g+8", "not a number"),
        ("int4_gx", "not a number"),
        ("int4_g 32", "not a number"),
        ("int4_g032", "starts with a zero"),
        ("int4_g4294967296", "above"),
        ("int4_g99999999999999999999999", "above"),
        ("int4_sf64", "none of f32"),
        ("int4_s", "none of f32"),
        ("int4_q", "unknown suffix"),
        ("int4_", "unknown suffix"),
        ("_int4", "unknown element"),
        ("int4__g32", "unknown suffix"),
        ("int4_g32_g32", "one group length"),
        ("int4_sf16_g32", "before the scale type"),
        ("int4_sf16_sf16", "two scale types"),
        (" int4", "unknown element"),
        ("int4_floor", "has no scale mode"),
        ("mxfp4_sf32", "scales of type e8m0, not f32"),
        ("mxfp4_rceil_even", "after the scale mode"),
        ("mxfp4_rceil_g32", "after the scale mode"),
        ("mxfp5", "did you mean mxfp4"),
        ("mxfp4_se8m0", "none of f32"),
        ("nvfp4_rceil", "has no scale mode"),
    ] {
        match Format::parse(name) {
            Err(Error::Format(text)) => assert!(text.contains(says), "{name:?}: {text}"),
            other => panic!("{name:?}: {other:?}"),
        }
    }
    let long = "x".repeat(1 << 20);
    assert!(Format::parse(&long).unwrap_err().to_string().len() < 400);
    assert!(Format::parse(&format!("int4_g{long}")).unwrap_err().to_string().len() < 400);
}

#[test]
fn table_is_consistent() {
    let mut names: Vec<&str> = table().map(|e| e.name).collect();
    let rows = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), rows);
    for e in table() {
        assert!((1..=16).contains(&e.bits) && e.levels <= 1 << e.bits && u32::from(e.lowest) < e.levels, "{}", e.name);
        let mut values: Vec<i32> = (0..e.levels).map(|u| e.value(u)).collect();
        for (u, &v) in values.iter().enumerate() {
            assert_eq!(e.code(v), Some(u as u16), "{}", e.name);
        }
        values.dedup();
        assert_eq!(values.len(), e.levels as usize);
        assert_eq!(e.code(values[0] - 1), None);
        assert_eq!(e.code(values[values.len() - 1] + 1), None);
    }
    let bits = |name: &str| Format::parse(name).unwrap().bits_per_weight(1, 4096);
    assert_eq!(bits("int4_g128"), 4.125);
    assert_eq!(bits("uint4_g64"), 4.375);
    assert_eq!(bits("ternary"), 2.0 + 32.0 / 4096.0);
}

#[test]
fn every_code_decodes_by_its_rule_and_encodes_back() {
    let scales = [1.0f32, 0.3, 7.25e-3, 2.0_f32.powi(-20), 5.9604645e-8, 1.7e4, -0.3];
    for f in formats() {
        let e = f.element;
        let zeros: Vec<Zero> = if e.name.starts_with("uint") {
            let step = 1 + e.levels as usize / 9;
            (0..e.levels).step_by(step).map(|z| Zero::Int(z as u8)).chain([Zero::Float(2.5)]).collect()
        } else {
            vec![Zero::None]
        };
        let codes: Vec<u32> = (0..e.levels).filter(|&u| e.number(u).is_finite()).collect();
        let u: Vec<u8> = codes.iter().flat_map(|u| u.to_le_bytes()[..e.code_bytes()].to_vec()).collect();
        let (mut w, mut back) = (vec![0.0; codes.len()], vec![0; u.len()]);
        for &s in &scales {
            let s = if ScaleType::ALL.contains(&f.scale) { s } else { s.abs() };
            let s = f.scale.round(s) * e.unit;
            if !s.is_finite() || s == 0.0 {
                continue;
            }
            for &z in &zeros {
                for level in Level::available() {
                    e.codec.decode(e, level, &u, s, z, &mut w);
                    for (&i, &w) in codes.iter().zip(&w) {
                        let want = match z {
                            Zero::None => e.number(i) * s,
                            Zero::Int(z) => (e.value(i) - i32::from(z)) as f32 * s,
                            Zero::Float(z) => (i as f32).mul_add(s, -(s * z)),
                        };
                        assert_eq!(w.to_bits(), want.to_bits(), "{f} code {i} scale {s} zero {z:?} {level:?}");
                    }
                    // The quantiser's own lowest code, and the lowest legal one.
                    let worst = e.codec.encode(e, level, &w, s, z, 0, &mut back);
                    assert_eq!((&back, worst), (&u, 0.0), "{f} scale {s} zero {z:?} {level:?}");
                    let lowest = usize::from(e.lowest).min(w.len());
                    e.codec.encode(e, level, &w[lowest..], s, z, e.lowest, &mut back[lowest * e.code_bytes()..]);
                    assert_eq!(back, u);
                }
            }
        }
    }
}

/// The power of two of a block, from logarithms of exact powers.
fn shared(f: &Format, absmax: f32) -> f32 {
    let e = f.element;
    let (a, top) = (f64::from(absmax), f64::from(e.top() * e.unit));
    let floor = |v: f64| (-1200..1200).rev().map(|p| 2f64.powi(p)).find(|p| *p <= v).unwrap();
    let emax = floor(top);
    let x = match f.mode {
        ScaleMode::Floor => floor(a) / emax,
        ScaleMode::Ceil => {
            if floor(a) == a {
                a / emax
            } else {
                2.0 * floor(a) / emax
            }
        }
        ScaleMode::Rceil => (-200..200).map(|p| 2f64.powi(p)).find(|p| top * p >= a).unwrap(),
        ScaleMode::Even => {
            let step = floor(a) / 2f64.powi(e.mantissa.unwrap() as i32);
            floor((a / step + 0.5).floor() * step) / emax
        }
    };
    x.clamp(2f64.powi(-127), 2f64.powi(127)) as f32
}

/// The nearest code of a table by looking at every value.
fn nearest(e: &Element, number: &dyn Fn(u8) -> f32, t: f32) -> u8 {
    if t < 0.0 && (0..e.levels).all(|u| number(u as u8) >= 0.0) {
        // In f64 the distances to 0 and to the least of 2^-62 may be equal.
        return (0..e.levels).map(|u| u as u8).find(|&u| number(u) == 0.0).unwrap();
    }
    let distance = |u: u8| (f64::from(t) - f64::from(number(u))).abs();
    let finite = (0..e.levels).map(|u| u as u8).filter(|&u| number(u).is_finite());
    let least = finite.clone().map(distance).fold(f64::INFINITY, f64::min);
    let best: Vec<u8> = finite.filter(|&u| distance(u) == least).collect();
    // Of the zeros the one with the sign of t; half-way the rule of the family.
    let preferred = best.iter().copied().find(|&u| {
        let v = number(u);
        let lower = best.iter().all(|&o| number(o) >= v);
        if v == 0.0 && best.iter().all(|&o| number(o) == 0.0) {
            v.is_sign_negative() == t.is_sign_negative()
        } else if v == 0.0 && number(u).is_sign_negative() != t.is_sign_negative() && best.len() > 2 {
            false
        } else if e.name == "fp4_bnb" {
            best.iter().all(|&o| number(o).abs() >= v.abs())
        } else if matches!(e.name, "nf4" | "nf3" | "af4" | "dyn8" | "udyn8") || e.learned() > 0 {
            lower
        } else {
            u % 2 == 0
        }
    });
    if best.len() == 1 {
        best[0]
    } else {
        preferred.unwrap_or(best[0])
    }
}

/// The `rtn` rule of each family, one value at a time.
fn rule(q: &QView, top: f32, w: &[f32]) -> (f32, i32, Vec<i32>) {
    let (f, tensor, e) = (&q.format, q.tensor(), q.format.element);
    let number = |u: u8| if q.table.is_empty() { e.number(u) } else { q.table[usize::from(u)] };
    let n = w.len();
    let own = w.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let absmax = if e.shared { top } else { own };
    let family = e.name.trim_end_matches(|c: char| c.is_ascii_digit());
    let levels = (1i32 << e.bits) - 1;
    let mean = || (w.iter().map(|v| f64::from(v.abs())).sum::<f64>() / n as f64) as f32;
    let low = w.iter().fold(0.0f32, |m, v| m.min(*v));
    let high = w.iter().fold(0.0f32, |m, v| m.max(*v));
    let raw = match family {
        _ if !e.is_linear() => absmax / e.top(),
        "int" => absmax / (levels / 2) as f32,
        "uint" => (high - low) / levels as f32,
        "bipolar" if e.bits > 1 => absmax / levels as f32,
        _ => mean(),
    };
    let mut s = match f.scale {
        ScaleType::E8M0 if absmax > 0.0 => shared(f, absmax),
        ScaleType::E8M0 => 1.0,
        ScaleType::E4M3 => {
            let t = raw / tensor;
            let distance = |u: &u8| (f64::from(e4m3(*u)) - f64::from(t)).abs();
            let order = |a: &u8, b: &u8| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2)));
            e4m3((0..127u8).min_by(order).unwrap())
        }
        kind => kind.round(raw),
    };
    if s == 0.0 {
        s = f.scale.smallest();
    }
    if absmax == 0.0 && family != "bipolar" && e.learned() == 0 {
        s = 1.0;
    }
    let stored = s * e.unit;
    s = stored * tensor;
    let z = if family == "uint" { (-low / s).round_ties_even().clamp(0.0, levels as f32) as i32 } else { 0 };
    let value = |w: f32| {
        let t = w / s;
        match family {
            _ if !e.is_linear() => i32::from(nearest(e, &number, t)),
            "int" | "bfp" | "dfp" | "mxint" => (t.round_ties_even() as i32).clamp(-(levels / 2), levels / 2),
            "uint" => (t.round_ties_even() as i32).saturating_add(z).clamp(0, levels),
            "ternary" => (t.round_ties_even() as i32).clamp(-1, 1),
            _ => (t.floor() as i32 | 1).clamp(-levels, levels),
        }
    };
    (stored, z, w.iter().map(|&w| value(w)).collect())
}

fn check_rule(f: Format, x: &[f32], rows: usize, cols: usize) {
    if f.element.span() > 1 {
        return; // No rule of one value: see the tests of the search.
    }
    let q = rtn(x, rows, cols, f);
    let v = q.tensor.view();
    QView::new(f, rows, cols, v.codes, v.scales, v.zeros).unwrap();
    let mut got = vec![0; rows * cols];
    v.codes_into(&mut got, 1).unwrap();
    let decoded = q.tensor.dequantize(2).unwrap();
    let top = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    // A learned table need not hold 0, so nothing but a tiny scale says that all is 0.
    let scaled = f.has_tensor_scale() && (top > 0.0 || f.element.learned() > 0);
    let tensor = if scaled { (top / (448.0 * f.element.top())).max(f32::MIN_POSITIVE) } else { 1.0 };
    assert_eq!(v.tensor(), tensor, "{f}");
    let len = f.group_len(cols);
    for n in 0..rows {
        for (g, w) in x[n * cols..(n + 1) * cols].chunks(len).enumerate() {
            let table = v.row_table(n);
            let (s, z, want) = rule(&QView { table, ..v }, top, w);
            assert_eq!(v.scale(n, g), s, "{f} row {n} group {g}");
            if let Zero::Int(got) = v.zero(n, g) {
                assert_eq!(i32::from(got), z, "{f} row {n} group {g}");
            }
            let at = n * cols + g * len;
            let codes: Vec<i32> = got[at..at + w.len()].iter().map(|&c| i32::from(c)).collect();
            assert_eq!(codes, want, "{f} row {n} group {g}");
            let bound = f64::from(q.bounds[n * f.groups(cols) + g]);
            let mut worst = 0.0f64;
            for (i, (&w, &d)) in w.iter().zip(&decoded[at..]).enumerate() {
                let number = match (f.element.is_linear(), table) {
                    (true, _) => (want[i] - z) as f32,
                    (_, []) => f.element.number(want[i] as u8),
                    (_, table) => table[want[i] as usize],
                };
                assert_eq!(d.to_bits(), (number * (s * v.tensor())).to_bits());
                worst = worst.max((f64::from(w) - f64::from(d)).abs());
            }
            assert!(worst <= bound && bound <= worst * (1.0 + 1e-6) + 1e-44, "{f}: {worst} {bound}");
        }
    }
}

#[test]
fn rtn_follows_the_rule() {
    for f in formats() {
        for (rows, cols) in [(3, 1), (2, 7), (1, 16), (3, 45), (2, 300)] {
            check_rule(f, &noise(rows * cols, cols as u32), rows, cols);
        }
    }
}

#[test]
fn ties_and_signs_follow_the_rule() {
    for f in formats() {
        // Steps of a quarter around every boundary; the extremes make the scale exactly 1 for one scale per row.
        let (lo, hi) = f.element.values();
        let mut x: Vec<f32> = (lo * 4..=hi * 4).map(|t| t as f32 / 4.0).collect();
        if !f.element.is_linear() {
            let mut values: Vec<f32> =
                (0..f.element.levels).map(|u| f.element.number(u)).filter(|v| v.is_finite()).collect();
            values.sort_by(f32::total_cmp);
            x = values.windows(2).flat_map(|p| [p[0], f32::midpoint(p[0], p[1]), p[1]]).collect();
            x = x
                .iter()
                .flat_map(|v| [v.next_down(), *v, v.next_up()])
                .filter(|v| v.abs() <= f.element.top())
                .collect();
        }
        x.extend([0.0, -0.0, f32::from_bits(1), -f32::from_bits(1)]);
        check_rule(f, &x, 1, x.len());
    }
}

#[test]
fn adversarial_groups_follow_the_rule() {
    let tiny = f32::from_bits(1);
    let groups: Vec<Vec<f32>> = vec![
        vec![0.0; 40],
        vec![-0.0; 9],
        vec![tiny; 9],
        vec![tiny, -tiny, 0.0],
        vec![1e-42; 17],
        vec![1e-9, -1e-9, 0.0],
        vec![3.0; 33],
        vec![-3.0; 33],
        vec![1e-7, 1.0, -6e4],
        vec![1e4, -1e-30, 0.0, 1e4],
        vec![f32::MIN_POSITIVE, 0.0],
    ];
    for f in formats() {
        for x in &groups {
            check_rule(f, x, 1, x.len());
        }
    }
}

#[test]
fn overflow_and_non_finite_values_are_errors_with_a_place() {
    for f in formats() {
        // Tasks before the one that meets them do their work, which of a search is long.
        let (rows, bad_row) = if f.element.span() > 1 { (3, 1) } else { (240, 161) };
        for (bad, says) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            let mut x = noise(rows * 300, 3);
            x[bad_row * 300 + 217] = bad;
            x[(rows - 1) * 300] = bad;
            let got = quantize(&MatRef::from_f32(&x, rows, 300), &f, Method::Rtn, 3);
            if f.element.nan {
                let w = got.unwrap().tensor.dequantize(1).unwrap();
                let len = f.group_len(300);
                for (i, v) in w.iter().enumerate() {
                    let (n, k) = (i / 300, i % 300);
                    let poisoned = (n == bad_row && k / len == 217 / len) || (n == rows - 1 && k / len == 0);
                    assert_eq!(v.is_nan(), poisoned, "{f} row {n} column {k}");
                }
                continue;
            }
            let e = got.unwrap_err();
            assert_eq!(e, Error::Value(format!("{says} at row {bad_row}, column 217 is not finite")));
        }
        let mut x = noise(2 * 30, 3);
        x[59] = f32::MAX;
        let got = quantize(&MatRef::from_f32(&x, 2, 30), &f, Method::Rtn, 1);
        let mean = matches!(f.element.name, "ternary" | "bipolar1");
        let overflows = f.scale == ScaleType::F16 || (f.scale == ScaleType::BF16 && f.element.top() == 1.0 && !mean);
        if overflows {
            assert!(got.unwrap_err().to_string().contains("row 1, group"), "{f}");
        } else {
            // The outermost code stays finite.
            let q = got.unwrap();
            assert!(q.tensor.dequantize(1).unwrap().iter().all(|w| w.is_finite()), "{f}");
            assert!(q.bounds.iter().all(|b| b.is_finite()));
        }
    }
    let x = [f32::MAX, -f32::MAX];
    let f = Format::parse("uint4").unwrap();
    assert!(quantize(&MatRef::from_f32(&x, 1, 2), &f, Method::Rtn, 1).is_err());
}

#[test]
fn empty_shapes_give_empty_tensors() {
    for f in formats() {
        for (rows, cols) in [(0, 0), (0, 5), (5, 0)] {
            let q = rtn(&[], rows, cols, f);
            assert_eq!((q.tensor.codes.len(), q.bounds.len()), (0, 0));
            assert_eq!(q.tensor.dequantize(1).unwrap(), vec![0.0f32; 0]);
            let v = q.tensor.view();
            QView::new(f, rows, cols, v.codes, v.scales, v.zeros).unwrap();
        }
    }
}

#[test]
fn quantising_the_decoded_matrix_gives_the_same_tensor() {
    for f in formats() {
        let name = f.element.name;
        let searched = f.element.span() > 1 || f.element.learned() > 0;
        let not = searched
            || name.starts_with("uint")
            || name.starts_with("log")
            || matches!(name, "bipolar1" | "ternary" | "dyn8" | "udyn8" | "nvfp4");
        if not || f.mode != ScaleMode::Floor {
            continue;
        }
        for exponent in [-60, -8, 0, 3, 60] {
            if f.scale == ScaleType::F16 && !(-8..=3).contains(&exponent) {
                continue;
            }
            let x: Vec<f32> = noise(70 * 150, 11).iter().map(|v| v * 2.0_f32.powi(exponent)).collect();
            let q = rtn(&x, 70, 150, f).tensor;
            if f.scale == ScaleType::F16 && q.scales.to_f32().iter().any(|s| *s < 6.2e-5) {
                continue;
            }
            let again = rtn(&q.dequantize(2).unwrap(), 70, 150, f);
            assert_eq!(again.tensor, q, "{f} 2^{exponent}");
            assert!(again.bounds.iter().all(|&b| b == 0.0));
        }
    }
}

#[test]
fn mse_is_never_worse_and_usually_better() {
    for f in formats() {
        let (rows, cols) = (16, 256);
        let mut x = noise(rows * cols, 5);
        x[7] = 9.0;
        let m = MatRef::from_f32(&x, rows, cols);
        let a = quantize(&m, &f, Method::Rtn, 1).unwrap();
        let b = quantize(&m, &f, Method::Mse, 2).unwrap();
        let (da, db) = (a.tensor.dequantize(1).unwrap(), b.tensor.dequantize(1).unwrap());
        let len = f.group_len(cols);
        for n in 0..rows {
            for k in (0..cols).step_by(len) {
                let r = n * cols + k..n * cols + (k + len).min(cols);
                let (ea, eb) =
                    (square_error(&x[r.clone()], &da[r.clone()]), square_error(&x[r.clone()], &db[r.clone()]));
                assert!(eb <= ea, "{f} row {n} column {k}: {eb} > {ea}");
                let bound = f64::from(b.bounds[n * f.groups(cols) + k / len]);
                assert!(x[r.clone()].iter().zip(&db[r]).all(|(x, y)| (f64::from(*x) - f64::from(*y)).abs() <= bound));
            }
        }
        if f.element.bits <= 4 && f.element.is_linear() && f.element.name != "bipolar1" && f.group.is_none() {
            let (ea, eb) = (square_error(&x, &da), square_error(&x, &db));
            assert!(eb < 0.9 * ea, "{f}: {eb} against {ea}");
        }
    }
}

#[test]
fn levels_and_threads_give_the_same_bytes() {
    let (rows, cols) = (130, 531);
    let x = noise(rows * cols, 8);
    let m = MatRef::from_f32(&x, rows, cols);
    for f in formats() {
        // Tables and blocks have one loop each, whatever the scales and groups.
        let plain = f.element.is_linear() && f.element.group.is_none();
        if f.element.span() > 1 || !plain && (f.scale != f.element.scales[0] || !matches!(f.group, Some(13 | 16 | 32)))
        {
            continue;
        }
        for method in [Method::Rtn, Method::Mse] {
            let want = quantize(&m, &f, method, 1).unwrap();
            for level in Level::available() {
                for threads in [1, 2, 7] {
                    let mut got = want.clone();
                    got.tensor.codes.fill(0xff);
                    got.bounds.fill(-1.0);
                    let mut none = [];
                    let dest = Dest {
                        codes: &mut got.tensor.codes,
                        scales: match &mut got.tensor.scales {
                            Scales::F32(v) => ScalesMut::F32(v),
                            Scales::F16(v) => ScalesMut::F16(v),
                            Scales::BF16(v) => ScalesMut::BF16(v),
                            Scales::E8M0(v) => ScalesMut::E8M0(v),
                            Scales::E4M3(v) => ScalesMut::E4M3(v),
                            Scales::I8(v) => ScalesMut::I8(v),
                        },
                        zeros: match &mut got.tensor.zeros {
                            Zeros::Int(z) => z,
                            _ => &mut none,
                        },
                        bounds: &mut got.bounds,
                        outer: &mut got.tensor.outer,
                        table: &mut got.tensor.table,
                    };
                    quantize_at(level, &m, &f, method, None, threads, None, dest).unwrap();
                    assert_eq!(got, want, "{f} {method:?} {level:?} {threads} threads");
                }
            }
        }
    }
}

#[test]
fn any_strides_and_types_quantise_as_their_f32_values() {
    let f = Format::parse("int5_g32").unwrap();
    let x = noise(20 * 70, 2);
    let want = rtn(&x, 20, 70, f);
    let wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    // SAFETY: the strides stay in `wide`.
    let m = unsafe { MatRef::from_raw(wide.as_ptr().cast(), Scalar::F64, 20, 70, 70 * 8, 8) };
    assert_eq!(quantize(&m, &f, Method::Rtn, 2).unwrap(), want);
    // Reversed, misaligned, transposed in memory.
    let mut bytes = vec![0u8; 20 * 70 * 4 + 1];
    for n in 0..20 {
        for k in 0..70 {
            let at = 1 + ((69 - k) * 20 + n) * 4;
            bytes[at..at + 4].copy_from_slice(&x[n * 70 + k].to_le_bytes());
        }
    }
    // SAFETY: element (n, k) starts at 1 + ((69-k)*20 + n)*4.
    let m = unsafe { MatRef::from_raw(bytes.as_ptr().add(1 + 69 * 80), Scalar::F32, 20, 70, 4, -80) };
    assert_eq!(quantize(&m, &f, Method::Rtn, 1).unwrap(), want);
}

#[test]
fn bad_parts_are_refused() {
    let f = Format::parse("int4_g8_sf32").unwrap();
    let s = [1.0f32; 4];
    let ok = |codes: &[u8], s: &[f32], z: ZerosRef| QView::new(f, 2, 9, codes, ScalesRef::F32(s), z).map(|_| ());
    ok(&[0; 10], &s, ZerosRef::None).unwrap();
    let value = |r: nibblas_core::Result<()>, says: &str| match r {
        Err(Error::Value(t)) => assert!(t.contains(says), "{t}"),
        other => panic!("{says}: {other:?}"),
    };
    assert!(matches!(ok(&[0; 9], &s, ZerosRef::None), Err(Error::Shape(_))));
    assert!(matches!(ok(&[0; 10], &s[..3], ZerosRef::None), Err(Error::Shape(_))));
    value(ok(&[0; 10], &[1.0, 1.0, f32::NAN, 1.0], ZerosRef::None), "row 1, group 0");
    value(ok(&[0; 10], &s, ZerosRef::Int(&[0; 4])), "no zero points");
    value(ok(&[0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0], &s, ZerosRef::None), "row 0 of codes has padding");
    value(
        QView::new(f, 2, 9, &[0; 10], ScalesRef::F16(&[0; 4]), ZerosRef::None).map(|_| ()),
        "has f32 scales, not f16",
    );
    let u = Format::parse("uint4_g8_sf32").unwrap();
    let zeros = |z: ZerosRef| QView::new(u, 2, 9, &[0; 10], ScalesRef::F32(&s), z).map(|_| ());
    zeros(ZerosRef::Int(&[15; 4])).unwrap();
    zeros(ZerosRef::Float(&[-3.5; 4])).unwrap();
    value(zeros(ZerosRef::None), "needs zero points");
    value(zeros(ZerosRef::Int(&[0, 0, 0, 16])), "row 1, group 1 is above 15");
    value(zeros(ZerosRef::Float(&[0.0, f32::INFINITY, 0.0, 0.0])), "row 0, group 1");
    assert!(matches!(zeros(ZerosRef::Int(&[0; 3])), Err(Error::Shape(_))));
    let t = Format::parse("ternary").unwrap();
    let mut codes = vec![0x55u8; 1000];
    codes[700] = 0x75;
    value(
        QView::new(t, 2, 2000, &codes, ScalesRef::F32(&s[..2]), ZerosRef::None).map(|_| ()),
        "no code 3: row 1, column 802",
    );
    let huge = QView::new(f, usize::MAX / 2, usize::MAX / 2, &[], ScalesRef::F32(&[]), ZerosRef::None);
    assert!(matches!(huge, Err(Error::Shape(_))));
    let huge = QView::new(f, 0, usize::MAX, &[], ScalesRef::F32(&[]), ZerosRef::None);
    assert!(matches!(huge, Err(Error::Shape(_))));
}

#[test]
fn values_round_trip_and_bad_ones_are_named() {
    for f in formats() {
        let e = f.element;
        let (rows, cols) = (3, 37);
        let values: Vec<i16> =
            (0..rows * cols).map(|i| e.value((i * 7919 % e.levels as usize) as u32) as i16).collect();
        let count = rows * f.groups(cols);
        let zeros = if e.name.starts_with("uint") { Zeros::Int(vec![1; count]) } else { Zeros::None };
        let scales = scales_of(f.scale, &vec![0.5; count]);
        let q = QTensor::from_values(f, rows, cols, &values, scales.clone(), zeros.clone()).unwrap();
        let mut back = vec![0; rows * cols];
        q.view().codes_into(&mut back, 2).unwrap();
        assert_eq!(back, values, "{f}");
        for (n, k) in [(0, 0), (2, 36), (1, 17)] {
            assert_eq!(e.value(q.view().code(n, k)), i32::from(values[n * cols + k]));
            let mut part = vec![0.0; cols - k];
            q.view().dequantize_row(n, k, &mut part);
            let all = q.dequantize(1).unwrap();
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
            assert!(part.iter().zip(&all[n * cols + k..]).all(same), "{f}");
        }
        if e.bits == 16 {
            continue; // Every int16 is a code.
        }
        let mut bad = values.clone();
        bad[41] = e.values().1 as i16 + 1;
        bad[50] = i16::MIN;
        let err = QTensor::from_values(f, rows, cols, &bad, scales, zeros).unwrap_err();
        assert!(err.to_string().contains(&format!("code {} at row 1, column 4", bad[41])), "{err}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_finite_matrix_follows_the_rule(
        pick in 0usize..10_000,
        rows in 0usize..5,
        cols in 0usize..300,
        seed: u32,
        exponent in -30i32..12,
        spikes in proptest::collection::vec((any::<u16>(), -3i32..4), 0..4),
    ) {
        let all = formats();
        let f = all[pick % all.len()];
        let mut x: Vec<f32> = noise(rows * cols, seed).iter().map(|v| v * 2.0_f32.powi(exponent)).collect();
        for (at, power) in spikes {
            if !x.is_empty() {
                let at = at as usize % x.len();
                x[at] *= 2.0_f32.powi(power);
            }
        }
        if cols > 0 {
            // Sums in another order may round the mean differently, so mean rules are checked on their own tests.
            if !matches!(f.element.name, "ternary" | "bipolar1") {
                check_rule(f, &x, rows, cols);
            }
        }
    }

    #[test]
    fn any_name_parses_or_fails_cleanly(name in "(int|uint|bipolar|ternary)?[0-9]{0,2}(_[gs][a-z0-9]{0,5}){0,3}") {
        if let Ok(f) = Format::parse(&name) {
            prop_assert_eq!(Format::parse(&f.to_string()).unwrap(), f);
        }
    }
}

#[test]
fn quantising_stops_when_its_poll_says_so() {
    let (n, k) = (4096, 4096);
    // One row repeated, so that the case is large without the memory.
    let row = noise(k, 1);
    // SAFETY: each row is the same `k` floats.
    let x = unsafe { MatRef::from_raw(row.as_ptr().cast(), Scalar::F32, n, k, 0, 4) };
    let f = Format::parse("int4_g128").unwrap();
    let (mut codes, mut scales) = (vec![0; n * f.row_bytes(k)], vec![0; n * f.groups(k)]);
    let mut run = |answer: bool| {
        codes.fill(0x5a);
        let dest = Dest {
            codes: &mut codes,
            scales: ScalesMut::F16(&mut scales),
            zeros: &mut [],
            bounds: &mut [],
            outer: &mut [],
            table: &mut [],
        };
        let done = quantize_polled(&x, &f, Method::Mse, None, 1, &|| answer, dest);
        (done, codes[codes.len() - k / 2..].iter().all(|&c| c == 0x5a))
    };
    assert_eq!(run(true), (Err(Error::Interrupted), true));
    assert_eq!(run(false), (Ok(()), false));
}

/// The elements that have two-level formats, with groups of several lengths.
fn two_level() -> Vec<Format> {
    let with = |e, g| Format::with(e, Some(g), Some(ScaleType::I8)).unwrap();
    let elements = table().filter(|e| e.scales.contains(&ScaleType::I8));
    elements.flat_map(|e| [8, 13, 32, 128].map(|g| with(e, g))).collect()
}

#[test]
fn two_level_names() {
    assert_eq!(two_level().len(), 4 * 7);
    for f in two_level() {
        assert_eq!(f.to_string(), format!("{}_g{}_si8", f.element.name, f.group.unwrap()));
        assert_eq!(Format::parse(&f.to_string()).unwrap(), f);
    }
    for bad in ["int4_si8", "int8_g32_si8", "nf4_g32_si8", "bipolar2_g32_si8", "int4_g32_si4"] {
        assert!(matches!(Format::parse(bad), Err(Error::Format(_))), "{bad}");
    }
}

/// The rules as `format/int.rs` and `ternary.rs` state them, in f64 where they leave the order of operations open.
#[test]
fn two_level_quantising_follows_the_rule() {
    for f in two_level() {
        let (e, rows, cols, len) = (f.element, 5, 150, f.group.unwrap() as usize);
        let mut x = noise(rows * cols, 11);
        x[cols..2 * cols].fill(0.0);
        x[2 * cols + 7] = 60.0;
        let q = rtn(&x, rows, cols, f).tensor;
        let (Scales::I8(inner), steps) = (&q.scales, (e.levels - 1) as f32) else { panic!("{f}") };
        let signed = (e.levels / 2) as f32;
        let (top, reach) = match e.name {
            "ternary" => (127.0, 0.0),
            _ if e.name.starts_with("int") => ((128.0 / signed).floor(), 0.0),
            _ => ((2.0 * (127.0 * steps / (steps + 1.0)).floor() / steps).round_ties_even(), {
                (127.0 * steps / (steps + 1.0)).floor()
            }),
        };
        for n in 0..rows {
            let row = &x[n * cols..(n + 1) * cols];
            let absmax = |w: &[f32]| w.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let asked = |w: &[f32]| {
                let (low, high) = w.iter().fold((0.0f32, 0.0f32), |(l, h), v| (l.min(*v), h.max(*v)));
                match e.name {
                    "ternary" => (w.iter().map(|v| f64::from(v.abs())).sum::<f64>() / w.len() as f64) as f32,
                    _ if reach > 0.0 => (high - low) / steps,
                    _ => absmax(w) / (signed - 1.0),
                }
            };
            let outer =
                if reach > 0.0 { absmax(row) / reach } else { row.chunks(len).map(asked).fold(0.0, f32::max) / top };
            assert_eq!(q.outer[n], outer.max(f32::MIN_POSITIVE), "{f} row {n}");
            for (g, w) in row.chunks(len).enumerate() {
                let t = f32::from(inner[n * f.groups(cols) + g]);
                let want = (asked(w) / q.outer[n]).round_ties_even().clamp(1.0, top);
                assert_eq!(t, if absmax(w) == 0.0 { 1.0 } else { want }, "{f} row {n} group {g}");
                let s = t * q.outer[n];
                for (i, &v) in w.iter().enumerate() {
                    let k = g * len + i;
                    let d = q.view().code(n, k);
                    let zero = match q.view().zero(n, g) {
                        Zero::Int(z) => i32::from(z),
                        _ => -e.value(0u8),
                    };
                    let (lo, hi) = (f32::from(e.lowest), steps);
                    let u = ((v / s).round_ties_even() + zero as f32).clamp(lo, hi);
                    assert_eq!(f32::from(d), u, "{f} ({n}, {k})");
                }
            }
        }
        let w = q.dequantize(1).unwrap();
        let again = quantize(&MatRef::from_f32(&w, rows, cols), &f, Method::Mse, 1).unwrap().tensor;
        let first = quantize(&MatRef::from_f32(&x, rows, cols), &f, Method::Mse, 1).unwrap().tensor;
        let error = |q: &QTensor, x: &[f32]| square_error(x, &q.dequantize(1).unwrap());
        assert!(error(&first, &x) <= error(&q, &x) * 1.000_001, "{f}");
        assert!(error(&again, &w) <= error(&rtn(&w, rows, cols, f).tensor, &w) * 1.000_001, "{f}");
    }
}

/// The protective range: whatever the range of a group within its row, no value that rtn emits leaves int8.
#[test]
fn two_level_values_are_bytes() {
    for e in table().filter(|e| e.scales.contains(&ScaleType::I8)) {
        let f = Format::with(e, Some(256), Some(ScaleType::I8)).unwrap();
        let reach = 127 * (e.levels as i32 - 1) / e.levels as i32;
        for method in [Method::Rtn, Method::Mse] {
            for low in 0..=reach {
                // One row: groups from -low to every high, each followed by the row's largest magnitude alone.
                let mut x = Vec::new();
                for high in 0..=reach {
                    x.extend((0..256).map(|i| ((i * (low + high)) as f32 / 255.0 - low as f32).round()));
                }
                x.extend([0.0; 255]);
                x.push(reach as f32);
                let q = quantize(&MatRef::from_f32(&x, 1, x.len()), &f, method, 1).unwrap().tensor;
                let Scales::I8(inner) = &q.scales else { panic!("{f}") };
                for (k, _) in x.iter().enumerate() {
                    let zero = match q.view().zero(0, k / 256) {
                        Zero::Int(z) => i32::from(z),
                        _ => 0,
                    };
                    let v = (e.value(q.view().code(0, k)) - zero) * i32::from(inner[k / 256]);
                    assert!((-128..=127).contains(&v), "{f} -{low}..{}: {v}", k / 256);
                }
                q.view().with_outer(&q.outer).unwrap();
                QView::new(f, 1, x.len(), &q.codes, q.scales.view(), q.zeros.view()).unwrap();
            }
        }
    }
}

#[test]
fn two_level_parts_are_checked() {
    let f = Format::parse("int4_g8_si8").unwrap();
    let make = |values: &[i16], t: &[u8]| QTensor::from_values(f, 1, 8, values, Scales::I8(t.to_vec()), Zeros::None);
    make(&[-8; 8], &[16]).unwrap();
    make(&[7; 8], &[17]).unwrap();
    for (values, t) in [([-8; 8], 17), ([7; 8], 18), ([0; 8], 0)] {
        assert!(matches!(make(&values, &[t]), Err(Error::Value(_))), "{t}");
    }
    let q = make(&[1; 8], &[1]).unwrap();
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(q.view().with_outer(&[bad]), Err(Error::Value(_))));
    }
    assert!(matches!(q.view().with_outer(&[]), Err(Error::Shape(_))));
    let u = Format::parse("uint4_g8_si8").unwrap();
    let zeros = Zeros::Float(vec![1.0]);
    let float = QTensor::from_values(u, 1, 8, &[1; 8], Scales::I8(vec![1]), zeros);
    assert!(matches!(float, Err(Error::Value(_))));
}
