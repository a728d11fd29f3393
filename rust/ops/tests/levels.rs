//! Every operator on every instruction-set level, against scalar code: the same bits, for lengths with every kind of tail
//! and for any number of threads.
use nibblas_core::isa::Isa;
use nibblas_core::{Format, QTensor, Scales, ZeroKind, Zeros};
use nibblas_ops::approx::lmul::{self, Model};
use nibblas_ops::approx::{shift, shift_add};
use nibblas_ops::intops::gelu::{apply, Function};
use nibblas_ops::intops::requant::{requantize, Rounding};
use nibblas_ops::intops::scale::Dyadic;
use nibblas_ops::intops::{add, norm, softmax, sqrt};
use nibblas_ops::{Exec, Ints, IntsMut};
use std::fmt::Debug;

/// Numbers of a fixed sequence, in the high bits first.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 32) as u32
    }

    /// Whole numbers of every magnitude up to `bits` bits.
    fn ints(&mut self, n: usize, bits: u32) -> Vec<i32> {
        let mut v: Vec<i32> = (0..n).map(|_| self.next() as i32 >> (32 - bits + self.next() % bits.max(1))).collect();
        let ends = [i32::MIN >> (32 - bits), i32::MAX >> (32 - bits), 0];
        v.iter_mut().zip(ends).for_each(|(v, e)| *v = e);
        v
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as i32 as f32 / 2f32.powi(30)).collect()
    }
}

const LENGTHS: [usize; 8] = [0, 1, 15, 16, 17, 1000, 1031, 40_000];

/// Calls `f` on every level, with several threads on each, and compares what it returns.
fn same<T: PartialEq + Debug>(what: &str, f: impl Fn(&Exec) -> T) {
    let want = f(&Exec { isa: Isa::Scalar, threads: 1, poll: None });
    for isa in Isa::ALL.into_iter().filter(|i| i.is_available()) {
        for threads in [1, 3] {
            assert!(f(&Exec { isa, threads, poll: None }) == want, "{what} differs on {isa} with {threads} threads");
        }
    }
}

/// A result of each type.
fn each_type(what: &str, len: usize, f: impl Fn(&Exec, IntsMut)) {
    same(&format!("{what} to int8"), |e| {
        let mut y = vec![0i8; len];
        f(e, IntsMut::I8(&mut y));
        y
    });
    same(&format!("{what} to uint8"), |e| {
        let mut y = vec![0u8; len];
        f(e, IntsMut::U8(&mut y));
        y
    });
    same(&format!("{what} to int16"), |e| {
        let mut y = vec![0i16; len];
        f(e, IntsMut::I16(&mut y));
        y
    });
    same(&format!("{what} to uint16"), |e| {
        let mut y = vec![0u16; len];
        f(e, IntsMut::U16(&mut y));
        y
    });
    same(&format!("{what} to int32"), |e| {
        let mut y = vec![0i32; len];
        f(e, IntsMut::I32(&mut y));
        y
    });
}

#[test]
fn functions() {
    let mut draw = Draw(1);
    for n in LENGTHS {
        let x = draw.ints(n, 32);
        for function in [Function::Gelu, Function::Silu, Function::Sigmoid, Function::Exp] {
            for (scale, out) in
                [(1e-9, 1e-9), (2e-4, 2e-4), (2e-4, 3e-3), (0.02, 1e-6), (0.4, 0.1), (7.0, 7.0), (1e-11, 1e-11)]
            {
                each_type(&format!("{function:?} {scale} {out} of {n}"), n, |e, y| {
                    // Scales too far apart are an error, before anything is written.
                    let _ = apply(e, function, Ints::I32(&x), scale, out, y);
                });
            }
        }
        let bytes: Vec<i8> = x.iter().map(|&v| v as i8).collect();
        each_type("GELU of bytes", n, |e, y| apply(e, Function::Gelu, Ints::I8(&bytes), 0.03, 0.03, y).unwrap());
    }
}

#[test]
fn rescaling_and_sums() {
    let mut draw = Draw(2);
    for n in LENGTHS {
        let (a, b) = (draw.ints(n, 32), draw.ints(n, 20));
        for rounding in [Rounding::Single, Rounding::Gemmlowp, Rounding::Float] {
            for shift in [-31, -3, 0, 7, 31] {
                let factor = [Dyadic { multiplier: 1_382_566_725, shift }];
                each_type(&format!("{rounding:?} {shift} of {n}"), n, |e, y| {
                    requantize(e, Ints::I32(&a), &factor, 1, -5, rounding, y).unwrap();
                });
            }
            let channels: Vec<_> = (0..5).map(|i| Dyadic { multiplier: (1 << 30) + 77 * i, shift: i - 1 }).collect();
            let whole = n / 5 * 5;
            each_type("rescaling by channel", whole, |e, y| {
                requantize(e, Ints::I32(&a[..whole]), &channels, 1, 3, rounding, y).unwrap();
            });
        }
        for each in [false, true] {
            each_type("a sum", n, |e, y| {
                add::add(e, Ints::I32(&a), 0.1, Ints::I32(&b), 0.3, 0.7, each, y).unwrap();
            });
        }
        let (u, v): (Vec<u32>, Vec<u64>) = a.iter().map(|&v| (v as u32, (v as u64) << 17 | 0x3039)).unzip();
        same("roots", |e| {
            let (mut r, mut s) = (vec![0; n], vec![0; n]);
            sqrt::sqrt32(e, &u, &mut r).unwrap();
            sqrt::sqrt64(e, &v, &mut s).unwrap();
            (r, s)
        });
    }
}

#[test]
fn rows() {
    let mut draw = Draw(3);
    for (rows, cols) in [(0, 5), (3, 1), (4, 2), (5, 17), (3, 64), (2, 1031), (40, 513)] {
        let mut x = draw.ints(rows * cols, 24);
        // A row of one value, and one with a single hot value.
        if rows > 2 {
            x[cols..2 * cols].fill(-7);
            x[2 * cols..3 * cols].fill(0);
            x[2 * cols] = 1 << 20;
        }
        let (w, b) = (draw.floats(cols), draw.floats(cols));
        for scale in [1e-6, 1e-3, 0.5] {
            each_type(&format!("softmax of {rows} x {cols}"), rows * cols, |e, y| {
                softmax::softmax(e, Ints::I32(&x), cols, scale, y).unwrap();
            });
            for eps in [0.0, 1e-5] {
                each_type(&format!("layer norm of {rows} x {cols}"), rows * cols, |e, y| {
                    norm::layer_norm(e, Ints::I32(&x), scale, &w, Some(&b), eps, 0.01, y).unwrap();
                });
                each_type(&format!("RMS norm of {rows} x {cols}"), rows * cols, |e, y| {
                    norm::rms_norm(e, Ints::I32(&x), scale, &w, eps, 0.01, y).unwrap();
                });
                same("RMS norm with codes", |e| {
                    let (mut y, mut scales) = (vec![0i8; rows * cols], vec![[0; 2]; rows]);
                    norm::rms_norm_codes(e, Ints::I32(&x), scale, &w, eps, &mut y, &mut scales).unwrap();
                    (y, scales)
                });
            }
        }
    }
}

/// Weights of random codes with scales of one to four.
fn weights(format: &str, rows: usize, cols: usize, draw: &mut Draw) -> QTensor {
    let format = Format::parse(format).unwrap();
    let e = format.element;
    let codes: Vec<i16> = (0..rows * cols).map(|_| e.value(draw.next() % e.levels) as i16).collect();
    let groups = rows * format.groups(cols);
    let scales = Scales::F32((0..groups).map(|_| 1.0 + (draw.next() % 1000) as f32 / 333.0).collect());
    let zeros = if e.zero == ZeroKind::PerGroup {
        Zeros::Int((0..groups).map(|_| (draw.next() % e.levels) as u8).collect())
    } else {
        Zeros::None
    };
    QTensor::from_values(format, rows, cols, &codes, scales, zeros).unwrap()
}

#[test]
fn products_by_shifts() {
    let mut draw = Draw(4);
    for (m, n, k) in [(1, 70, 129), (3, 5, 40), (5, 64, 300), (2, 1, 1), (2, 3, 0)] {
        let a: Vec<i8> = draw.ints(m * k, 8).iter().map(|&v| v as i8).collect();
        let f: Vec<f32> = draw.floats(m * k);
        for format in ["int4_g32_sf32", "uint4_g24_sf32", "int8_sf32", "bipolar3_g32_sf32", "ternary_sf32"] {
            let w = weights(format, n, k, &mut draw);
            same(format, |e| {
                let (mut y, mut z) = (vec![0f32; m * n], vec![0f32; m * n]);
                shift_add::matmul_int8(e, &a, &w.view(), None, &mut y).unwrap();
                shift_add::matmul_half(e, &f, &w.view(), None, &mut z).unwrap();
                (y, z)
            });
        }
        for format in ["pow2_4_g32_sf32", "pow2_5_sf32", "pow2_6_sf32", "bipolar1_sf32"] {
            let w = weights(format, n, k, &mut draw);
            same(format, |e| {
                let (mut y, mut z) = (vec![0f32; m * n], vec![0f32; m * n]);
                shift::matmul_int8(e, &a, &w.view(), None, &mut y).unwrap();
                shift::matmul_half(e, &f, &w.view(), None, &mut z).unwrap();
                (y, z)
            });
        }
    }
}

#[test]
fn products_by_bit_patterns() {
    let mut draw = Draw(5);
    let model = Model { offset: 0x3f78_0000, smallest: 0x0080_0000, largest: 0x7f7f_ffff, beyond: 0x7f80_0000 };
    for n in LENGTHS {
        // Every bit pattern: NaN, infinity and subnormal numbers among them.
        let (a, b): (Vec<u32>, Vec<u32>) = (0..n).map(|_| (draw.next(), draw.next())).unzip();
        same("L-Mul", |e| {
            let mut y = vec![0; n];
            lmul::lmul(e, model, &a, &b, &mut y).unwrap();
            y
        });
    }
    for (m, n, k) in [(1, 300, 33), (7, 17, 65), (4, 1, 3), (2, 3, 0)] {
        let bits = |v: Vec<f32>| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let (a, b) = (bits(draw.floats(m * k)), bits(draw.floats(k * n)));
        same("an L-Mul product", |e| {
            let mut y = vec![0f32; m * n];
            lmul::matmul(e, model, &a, &b, n, k, &mut y).unwrap();
            y
        });
    }
}
