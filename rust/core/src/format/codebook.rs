//! Codebooks of fixed values, the largest of magnitude 1.
//!
//! * `nf4`, `nf3`: quantiles of the normal distribution, over the last. With `d = (1/32 + 1/30)/2`, `2^(b-1)` of the
//!   probabilities run evenly from `d` to 1/2, and `2^(b-1) + 1` from 1/2 to `1 - d`, 1/2 being in both.
//! * `af4`: the values of abnormal float for groups of 64.
//! * `fp4_bnb`: a sign and eight magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4, in the order of the codes.
//! * `dyn8`, `udyn8`: decades `10^-6` to 1, each cut into `2^i` (unsigned: `2^(i+1)`) equal intervals of 0.1 to 1 whose
//!   midpoints are values, with 0 and 1. `dyn8` has no -1.
//!
//! rtn: `s = absmax`, the nearest value of `w/s`; a tie goes to the lower value, of `fp4_bnb` to the smaller magnitude.
use super::{Book, Codec, Element, Fit, Level, ScaleType, Tie, FLOAT, INTEGER};
use std::sync::LazyLock;

#[derive(Debug)]
struct Codebook;

impl Codec for Codebook {
    fn fit(&self, _: &Element, _: Level, _: &[f32], absmax: f32) -> Fit {
        Fit { scale: absmax, low: 0.0 }
    }

    fn shrinks(&self, e: &Element) -> &'static [f32] {
        match e.bits {
            3 => &[0.58, 0.64, 0.70, 0.76, 0.82, 0.86, 0.90, 0.94, 0.97],
            4 => &[0.66, 0.71, 0.76, 0.80, 0.84, 0.88, 0.92, 0.96],
            _ => &[0.84, 0.88, 0.91, 0.94, 0.96, 0.98, 0.99],
        }
    }
}

const NF4_VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

const NF3_VALUES: [f32; 8] = [-1.0, -0.478_629_08, -0.217_141_78, 0.0, 0.160_930_14, 0.337_915_12, 0.562_616_9, 1.0];

const AF4_VALUES: [f32; 16] = [
    -1.0,
    -0.694_410_1,
    -0.512_437_4,
    -0.373_695_1,
    -0.256_075_53,
    -0.149_824_78,
    -0.049_348_12,
    0.0,
    0.042_731_64,
    0.129_344_83,
    0.219_612_74,
    0.316_756_66,
    0.425_638_8,
    0.554_962_34,
    0.724_248_65,
    1.0,
];

static NF4: LazyLock<Book> = LazyLock::new(|| Book::new(&NF4_VALUES, Tie::Down));
static NF3: LazyLock<Book> = LazyLock::new(|| Book::new(&NF3_VALUES, Tie::Down));
static AF4: LazyLock<Book> = LazyLock::new(|| Book::new(&AF4_VALUES, Tie::Down));
static FP4_BNB: LazyLock<Book> = LazyLock::new(|| {
    let twelfths = [0.0f32, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let values: Vec<f32> = twelfths.iter().map(|v| v / 12.0).chain(twelfths.iter().map(|v| -v / 12.0)).collect();
    Book::new(&values, Tie::Inward)
});
static DYN8: LazyLock<Book> = LazyLock::new(|| Book::new(&dynamic(true), Tie::Down));
static UDYN8: LazyLock<Book> = LazyLock::new(|| Book::new(&dynamic(false), Tie::Down));

/// The dynamic map, ascending.
fn dynamic(signed: bool) -> Vec<f32> {
    let mut all = vec![0.0f64, 1.0];
    for decade in 0..7i32 {
        let count = 1 << (decade + i32::from(!signed));
        let bound = |j: i32| 0.1 + 0.9 * f64::from(j) / f64::from(count);
        for j in 0..count {
            let v = f64::midpoint(bound(j), bound(j + 1)) / 10f64.powi(6 - decade);
            all.push(v);
            if signed {
                all.push(-v);
            }
        }
    }
    all.sort_by(f64::total_cmp);
    all.into_iter().map(|v| v as f32).collect()
}

const fn row(
    name: &'static str,
    bits: u8,
    book: &'static LazyLock<Book>,
    computes: &'static [&'static str],
) -> Element {
    Element { scales: &ScaleType::NESTED, ..Element::table(name, bits, book, computes, &Codebook) }
}

/// `nf4` to `udyn8`.
pub static ROWS: [Element; 6] = [
    row("nf4", 4, &NF4, INTEGER),
    row("nf3", 3, &NF3, INTEGER),
    row("af4", 4, &AF4, INTEGER),
    row("fp4_bnb", 4, &FP4_BNB, INTEGER),
    row("dyn8", 8, &DYN8, FLOAT),
    row("udyn8", 8, &UDYN8, FLOAT),
];
