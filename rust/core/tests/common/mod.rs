//! Operands for tests of kernels.
use nibblas_core::quantize::{quantize, Method};
use nibblas_core::{Format, MatRef, QTensor, ScaleType, Scales, Zeros};

/// `w` in a format. Where codes take a long search, which has its own tests, they come from the bits of `w` instead.
pub fn quantised(f: &Format, w: &[f32], n: usize, k: usize) -> QTensor {
    if f.element.span() == 1 {
        return quantize(&MatRef::from_f32(w, n, k), f, Method::Rtn, 1).unwrap().tensor;
    }
    let code = |v: &f32| (v.to_bits().wrapping_mul(0x9E37_79B1) >> (32 - u32::from(f.element.bits))) as i16;
    // Powers of two, which every type holds.
    let exponents = (0..n * f.groups(k)).map(|i| (i % 5) as u16);
    let scales = match f.scale {
        ScaleType::F32 => Scales::F32(exponents.map(|e| 2f32.powi(-i32::from(e))).collect()),
        ScaleType::F16 => Scales::F16(exponents.map(|e| (15 - e) << 10).collect()),
        ScaleType::BF16 => Scales::BF16(exponents.map(|e| (127 - e) << 7).collect()),
        ScaleType::E8M0 => Scales::E8M0(exponents.map(|e| 127 - e as u8).collect()),
        ScaleType::E4M3 => Scales::E4M3(exponents.map(|e| (7 - e as u8) << 3).collect()),
        ScaleType::I8 => Scales::I8(exponents.map(|e| 1 << e).collect()),
    };
    QTensor::from_values(*f, n, k, &w.iter().map(code).collect::<Vec<_>>(), scales, Zeros::None).unwrap()
}
