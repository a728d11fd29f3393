//! From float scales to integers, once per call: the only floats of the folder, beside `rounding = float`.
#![allow(clippy::float_arithmetic)]
use crate::{Error, Result};

/// A positive scale as an integer and a shift: `multiplier * 2^-31 * 2^-shift`, the multiplier in `[2^30, 2^31)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dyadic {
    /// Q31.
    pub multiplier: i32,
    /// To the right where positive.
    pub shift: i32,
}

/// `value = m * 2^e` with m in `[1, 2)`, of a positive finite number.
fn split(value: f64) -> (f64, i32) {
    let bits = value.to_bits();
    let field = (bits >> 52) as i32;
    if field == 0 {
        // A subnormal number, made normal.
        let (m, e) = split(value * 2f64.powi(64));
        return (m, e - 64);
    }
    (f64::from_bits(bits & ((1 << 52) - 1) | (1023 << 52)), field - 1023)
}

/// `m * 2^-shift` nearest to a non-negative value, with m below `2^bits` and, but for 0, at least `2^(bits-1)`.
pub(crate) fn encode(value: f64, bits: u32) -> (u64, i32) {
    if value <= 0.0 {
        return (0, 0);
    }
    let (m, e) = split(value);
    let digits = bits as i32 - 1;
    let whole = (m * 2f64.powi(digits) + 0.5).floor() as u64;
    if whole >> bits != 0 {
        (whole >> 1, digits - e - 1)
    } else {
        (whole, digits - e)
    }
}

/// A scale, or what is wrong with it.
pub(crate) fn positive(name: &str, value: f64) -> Result<f64> {
    if value.is_finite() && value > 0.0 {
        Ok(value)
    } else {
        Err(Error::Value(format!("{name} must be positive and finite, got {value}")))
    }
}

impl Dyadic {
    /// The nearest dyadic number, halves up.
    ///
    /// # Errors
    /// [`Error::Value`] for scales that are not positive and finite, or outside `[2^-32, 2^31)`.
    pub fn new(scale: f64) -> Result<Self> {
        let (m, shift) = encode(positive("scale", scale)?, 31);
        let shift = shift - 31;
        if !(-31..=31).contains(&shift) {
            let what = if shift > 0 { "underflows" } else { "overflows" };
            return Err(Error::Value(format!(
                "scale {scale:e} {what} the dyadic encoding: expected 2^-32 <= scale < 2^31"
            )));
        }
        Ok(Self { multiplier: m as i32, shift })
    }
}

/// A ratio that integers are multiplied by, the result with fraction bits: `x * ratio * 2^fraction = (x * m) >> shift`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ratio {
    pub m: i32,
    pub shift: u32,
}

impl Ratio {
    /// # Errors
    /// [`Error::Value`] where a 32-bit integer times the ratio would leave 62 bits.
    pub fn new(name: &str, value: f64, fraction: u32) -> Result<Self> {
        let (m, shift) = encode(value * 2f64.powi(fraction as i32), 31);
        if value.is_nan() || value.is_infinite() || shift < 0 {
            return Err(Error::Value(format!("{name} {value:e} is too large for integers of 32 bits")));
        }
        // Past 62 every product is 0.
        Ok(if shift > 62 { Self { m: 0, shift: 0 } } else { Self { m: m as i32, shift: shift as u32 } })
    }
}

/// Takes a non-negative integer to fixed point: `(d * m) >> shift` is `d * scale * 2^fraction` in 32 bits, and
/// everything above `limit` is beyond them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reach {
    pub m: u32,
    pub shift: u32,
    pub limit: u32,
}

impl Reach {
    pub fn new(scale: f64, fraction: u32) -> Self {
        let step = scale * 2f64.powi(fraction as i32);
        let limit = if step > 0.0 { ((2f64.powi(32) - 2.0) / step).floor() } else { f64::MAX };
        let limit = if limit >= u32::MAX as f64 { u32::MAX } else { limit as u32 };
        let (m, shift) = encode(step, 32);
        if !(0..=63).contains(&shift) {
            // Steps so large that only 0 is within reach, or so small that nothing leaves 0.
            return Self { m: 0, shift: 0, limit };
        }
        Self { m: m as u32, shift: shift as u32, limit }
    }
}

/// The parameters of a normalisation as integers: `y = (xhat * gain + bias) >> shift`, xhat with `fraction` bits.
#[derive(Debug, Clone)]
pub(crate) struct Affine {
    pub gain: Vec<i32>,
    pub bias: Vec<i64>,
    pub shift: u32,
}

impl Affine {
    /// # Errors
    /// [`Error::Value`] for parameters that are not finite, or an output scale too small for them.
    pub fn new(gain: &[f32], bias: Option<&[f32]>, out: f64, fraction: u32) -> Result<Self> {
        let finite = gain.iter().chain(bias.unwrap_or(&[])).all(|v| v.is_finite());
        if !finite {
            return Err(Error::Value("weight and bias must be finite".into()));
        }
        let top = |v: &[f32]| v.iter().fold(0.0f64, |a, &b| a.max(f64::from(b).abs())) / out;
        let exponent = |v: f64| if v > 0.0 { split(v).1 + 1 } else { -64 };
        let by_gain = fraction as i32 + 30 - exponent(top(gain));
        let by_bias = 61 - bias.map_or(-64, |b| exponent(top(b)));
        let shift = by_gain.min(by_bias).min(60);
        if shift < 1 {
            return Err(Error::Value(format!("out_scale {out:e} is too small for the weight and bias")));
        }
        let unit = 2f64.powi(shift - fraction as i32) / out;
        let gain = gain.iter().map(|&g| (f64::from(g) * unit).round() as i32).collect::<Vec<_>>();
        let unit = 2f64.powi(shift) / out;
        let bias = match bias {
            Some(b) => b.iter().map(|&b| (f64::from(b) * unit).round() as i64).collect(),
            None => vec![0; gain.len()],
        };
        Ok(Self { gain, bias, shift: shift as u32 })
    }
}

/// `a / b * 2^exponent`.
pub(crate) fn quotient(a: f64, b: f64, exponent: i32) -> f64 {
    a / b * 2f64.powi(exponent)
}

pub(crate) const LN_2: f64 = std::f64::consts::LN_2;

/// `a / b^2`.
pub(crate) fn square_ratio(a: f64, b: f64) -> f64 {
    a / b / b
}

/// Parameters of the published operators, floored as there.
#[allow(clippy::approx_constant)]
pub(crate) mod published {
    fn floor(v: f64) -> i64 {
        v.floor() as i64
    }

    /// `a (x + b/a) x + c`: range reduction, linear and constant term.
    pub fn ibert_exp(scale: f64) -> [i64; 3] {
        let (a, b, c) = (0.35815147, 0.96963238, 1.0);
        [floor(-0.6931 / scale), floor(b / a / scale), floor(c / a / (scale * scale))]
    }

    /// Range reduction; the fraction has no other parameter.
    pub fn ivit_exp(scale: f64) -> [i64; 3] {
        [floor(-1.0 / scale), 0, 0]
    }

    /// The scale at which I-ViT's GELU takes its sigmoid.
    pub fn ivit_sigmoid(scale: f64) -> f64 {
        1.702 * scale
    }

    /// The scale that [`ibert_erf`] gives its result, negative as published.
    pub fn ibert_erf_scale(scale: f64) -> f64 {
        let s = scale / 1.4142;
        -0.2888 * s * s * 2f64.powi(14)
    }

    /// Offset and constant of `a (x + b)^2 + 1`, and 1 in the scale of the result.
    pub fn ibert_erf(scale: f64) -> [i64; 3] {
        let s = scale / 1.4142;
        [floor(-1.769 / s), floor(1.0 / -0.2888 / (s * s)), floor(1.0 / ibert_erf_scale(scale))]
    }
}

/// Parameters of GELU in 32 bits, for results of 8.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Short {
    /// The magnitude at which the bump has ended.
    pub end: i32,
    /// `((a >> coarse) * place) >> place_shift` is the place on the polynomial in Q15.
    pub coarse: u32,
    pub place: i32,
    pub place_shift: u32,
    /// An input that saturates the output, whatever the bump.
    pub top: i32,
    /// `((x >> line_coarse) * line - bump * unit) >> shift` is the result.
    pub line_coarse: u32,
    pub line: i32,
    pub unit: i32,
    pub shift: u32,
}

impl Short {
    /// `None` where 32 bits would show: results of more than 8 bits, steps below 2^-9, inputs too coarse or too fine.
    pub fn new(scale: f64, out: f64, digits: u32, end: f64) -> Option<Self> {
        let last = (end / scale).ceil();
        // Values that 15 bits of the magnitude tell apart, and an end that int32 holds.
        if digits > 8 || out < 2f64.powi(-9) || !(16.0..1e9).contains(&last) {
            return None;
        }
        let bits = |v: f64| split(v).1 as u32 + 1;
        let coarse = bits(last).saturating_sub(15);
        let (place, place_shift) = encode(scale / end * 2f64.powi(15 + coarse as i32), 15);
        let top = (((2f64.powi(digits as i32) + 1.0) * out + 0.2) / scale).ceil().min(f64::from(i32::MAX));
        let line_coarse = bits(top).saturating_sub(15);
        // Both products and their difference within 31 bits.
        let ratio = scale / out * 2f64.powi(line_coarse as i32);
        let unit = 2f64.powi(-16) / out;
        let shift = (30 - bits(top * scale / out + 1.0) as i32).min(15 - split(unit).1).min(24);
        if !(0..=30).contains(&place_shift) || shift < 1 {
            return None;
        }
        let line = (ratio * 2f64.powi(shift)).round() as i32;
        Some(Self {
            end: last as i32,
            coarse,
            place: place as i32,
            place_shift: place_shift as u32,
            top: top as i32,
            line_coarse,
            line,
            unit: (unit * 2f64.powi(shift)).round() as i32,
            shift: shift as u32,
        })
    }
}

/// `u Phi(-u)` in cubic pieces for [`super::pieces`], by additions, multiplications and divisions alone: the library's
/// exponential differs between systems.
pub(crate) struct Bump;

impl Bump {
    /// Where the function is below 1.5e-6 and counts as 0.
    const END: f64 = 5.0;

    /// Whether it has ended at a magnitude.
    pub fn ends_before(scale: f64, magnitude: u32) -> bool {
        f64::from(magnitude) * scale >= Self::END
    }

    /// Fraction bits of a result, so that no slope of a piece leaves 15 bits: they are below 0.175, and stand 8 bits lower.
    pub fn fraction(out: f64) -> i32 {
        (split(out * (32000.0 / 0.175)).1 + 8).min(30)
    }

    /// The density and the tail of the normal distribution, within 1e-10 up to 6.
    fn normal(u: f64) -> (f64, f64) {
        const PEAK: f64 = 0.398_942_280_401_432_7;
        // Both are sums over the terms of e^(-u^2/2).
        let (x, mut term, mut exp, mut integral) = (-u * u / 2.0, 1.0, 1.0, 1.0);
        for n in 1..80 {
            let n = f64::from(n);
            term *= x / n;
            exp += term;
            integral += term / (2.0 * n + 1.0);
        }
        (PEAK * exp, 0.5 - PEAK * u * integral)
    }

    /// Constant to cubic coefficient, by powers of `t` in `[-1/2, 1/2)`, of the piece that begins at a code and is
    /// `2^coarse` of them wide; in `2^-fraction` steps of the output, those of `t` in 2^8 of them.
    pub fn piece(scale: f64, out: f64, first: u32, coarse: u32, fraction: i32) -> [i32; 4] {
        let whole = 2f64.powi(fraction) / out;
        let part = whole / 256.0;
        if Self::ends_before(scale, first) {
            return [0; 4];
        }
        if coarse == 0 {
            let u = f64::from(first) * scale;
            return [(u * Self::normal(u).1 * whole).round() as i32, 0, 0, 0];
        }
        let h = f64::from(1u32 << coarse) * scale;
        let u = (f64::from(first) * scale) + h / 2.0;
        let (density, tail) = Self::normal(u);
        let s = u * u;
        // Taylor's coefficients; those of degree 4 and 5 are spread over the lower ones as Chebyshev's polynomials have them.
        let d = density * h * h;
        let c4 = d * h * h * (s * s - 7.0 * s + 4.0) / 24.0;
        let c5 = d * h * h * h * u * (11.0 * s - 18.0 - s * s) / 120.0;
        let c = [
            u * tail - c4 / 128.0,
            h * (tail - u * density) - c5 * 5.0 / 256.0,
            d * (s - 2.0) / 2.0 + c4 / 4.0,
            d * h * u * (4.0 - s) / 6.0 + c5 * 5.0 / 16.0,
        ];
        let [c0, c1, c2, c3] = c;
        [
            (c0 * whole).round() as i32,
            (c1 * part).round() as i32,
            (c2 * part).round() as i32,
            (c3 * part).round() as i32,
        ]
    }
}
