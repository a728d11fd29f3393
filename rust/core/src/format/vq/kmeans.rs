//! The codebook of a matrix, by weighted k-means over a sample of its vectors in steps of their scales.
//!
//! The error that counts is that of the weights: a value counts as the square of its scale, times the importance of its
//! column. Seeds are drawn by the error that those before leave (k-means++), from a fixed sequence instead of a random one;
//! then every entry becomes the mean of the vectors that are nearest to it, until that hardly helps. A second codebook is
//! found in the same way, from what the first leaves of the vectors, and then both move in turn. Nothing depends
//! on threads or levels: the nearest entries are found side by side, sums are made in the order of the sample.
use super::{nearest, nearest_pair, Codebook, Shape, LONGEST, REACH};
use crate::format::lanes::{per_level, tree, LANES};
use crate::format::{lanes, Format, Level};
use crate::qtensor::{parallel, zeros_vec};
use crate::{Error, MatRef, Result};

/// Vectors of the sample for each entry, at most: one in so many is what an entry loses by knowing only those.
const PER_ENTRY: usize = 64;
/// Vectors that seeds are drawn from, at most: each draw looks at all of them.
const SEEDED: usize = 1 << 15;
/// Vectors of the sample whose errors are summed together.
const BLOCK: usize = 256;
/// Rounds at most.
const ROUNDS: usize = 100;
/// The rounds end when one takes less than this part off the error.
const LITTLE: f64 = 1.0 / 1024.0;

/// Whether to stop.
type Poll<'a> = Option<&'a (dyn Fn() -> bool + Sync)>;

/// Vectors in steps of their scales, `[len][count]`; those after the last have no weight.
pub(super) struct Sample {
    count: usize,
    values: Vec<f32>,
    /// How much values count within their vector; 0 where a vector is short.
    weights: Vec<f32>,
    /// How much vectors count.
    mass: Vec<f64>,
    /// Their lengths.
    lens: Vec<u8>,
}

impl Sample {
    /// Vectors of all parts of the matrix, `most` at most; none of groups of zeros, or that are not finite, to be found
    /// later.
    fn draw(level: Level, x: &MatRef, format: &Format, len: usize, weights: &[f32], most: usize) -> Result<Self> {
        let (e, group) = (format.element, format.group_len(x.cols));
        let (whole, rest) = (x.cols / group, x.cols % group);
        let per_row = whole * group.div_ceil(len) + rest.div_ceil(len);
        let all = per_row * x.rows;
        let most = most.min(all);
        let count = most.next_multiple_of(BLOCK);
        let mut s = Self {
            count,
            values: zeros_vec(len * count)?,
            weights: zeros_vec(len * count)?,
            mass: zeros_vec(count)?,
            lens: zeros_vec(count)?,
        };
        // One vector of each of `most` equal stretches, anywhere in it: an even step might meet the same columns again.
        let start = |i: usize| (i as u128 * all as u128 / most as u128) as usize;
        let place = |i: usize| {
            let any = (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
            start(i) + any as usize % (start(i + 1) - start(i))
        };
        let mut row = zeros_vec::<f32>(x.cols)?;
        let (mut picked, mut kept, mut at) = (0, 0, 0);
        for n in 0..x.rows {
            x.read_row(n, 0, &mut row);
            for (g, part) in row.chunks(group).enumerate() {
                let first = at;
                at += part.len().div_ceil(len);
                if picked == most || place(picked) >= at {
                    continue;
                }
                let bits = lanes::absmax_bits(level, part);
                let known = (1..0x7f80_0000).contains(&bits);
                let fit = known.then(|| e.codec.fit(e, level, part, f32::from_bits(bits)).scale);
                let scale = fit.and_then(|s| format.round_scale(s).ok());
                while picked < most && place(picked) < at {
                    let k = (place(picked) - first) * len;
                    picked += 1;
                    let Some(scale) = scale else { continue };
                    let vector = &part[k..part.len().min(k + len)];
                    for (j, v) in vector.iter().enumerate() {
                        s.values[j * count + kept] = v / scale;
                        s.weights[j * count + kept] = weights[g * group + k + j];
                    }
                    s.mass[kept] = f64::from(scale) * f64::from(scale);
                    s.lens[kept] = vector.len() as u8;
                    kept += 1;
                }
            }
        }
        // Heavy and light differ by the squares of all powers of two that floats have: sums must not overflow.
        let top = s.mass.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        s.mass.iter_mut().for_each(|m| *m /= top);
        Ok(s)
    }

    /// Values, how much they count, and how many they are.
    #[inline(always)]
    fn vector(&self, i: usize) -> ([f32; LONGEST], [f32; LONGEST], usize) {
        let (mut x, mut w, n) = ([0.0; LONGEST], [0.0; LONGEST], usize::from(self.lens[i]));
        for j in 0..n {
            (x[j], w[j]) = (self.values[j * self.count + i], self.weights[j * self.count + i]);
        }
        (x, w, n)
    }

    /// Moves entries to the weighted means of the values of the vectors that chose them; an entry that none chose stays.
    fn means(
        &self,
        book: &mut [f32],
        len: usize,
        entry: impl Fn(usize) -> usize,
        value: impl Fn(usize, usize) -> f32,
    ) -> Result<()> {
        let (mut sums, mut shares) = (zeros_vec::<f64>(book.len())?, zeros_vec::<f64>(book.len())?);
        for (i, mass) in self.mass.iter().enumerate() {
            for j in 0..usize::from(self.lens[i]) {
                let (at, share) = (entry(i) * len + j, mass * f64::from(self.weights[j * self.count + i]));
                sums[at] += share * f64::from(value(i, j));
                shares[at] += share;
            }
        }
        for (v, (sum, share)) in book.iter_mut().zip(sums.iter().zip(&shares)) {
            if *share > 0.0 {
                *v = ((sum / share) as f32).clamp(-REACH, REACH);
            }
        }
        Ok(())
    }
}

/// A codebook of one or two.
#[derive(Clone, Copy)]
pub(super) enum Which {
    First,
    Second,
}

impl Which {
    /// Its first entry in the table, and how many of its entries `n` weights of a vector may have.
    fn range(self, shape: Shape, n: usize) -> (usize, usize) {
        match self {
            Self::First => (0, shape.limits(n).0),
            Self::Second => (1 << shape.first(), shape.limits(n).1),
        }
    }
}

/// Learns the codebook of a matrix, `[entries][len]`; `weights` is how much each column counts, at most 1.
pub(crate) fn learn(
    level: Level,
    x: &MatRef,
    format: &Format,
    shape: Shape,
    weights: &[f32],
    threads: usize,
    poll: Poll,
) -> Result<Vec<f32>> {
    let len = shape.len;
    let draw = |most: usize| Sample::draw(level, x, format, len, weights, most);
    let mut sample = draw(PER_ENTRY * shape.entries())?;
    let mut table = zeros_vec(shape.entries() * len)?;
    let first = &mut table[..len << shape.first()];
    if sample.count > SEEDED {
        seeds(level, &draw(SEEDED)?, first, len, poll)?;
    } else {
        seeds(level, &sample, first, len, poll)?;
    }
    let nearest = refine(level, &sample, shape, Which::First, &mut table, threads, poll)?;
    if shape.second > 0 {
        let mut values = zeros_vec(sample.values.len())?;
        values.copy_from_slice(&sample.values);
        for (i, (entry, _)) in nearest.into_iter().enumerate() {
            for j in 0..usize::from(sample.lens[i]) {
                sample.values[j * sample.count + i] -= table[usize::from(entry) * len + j];
            }
        }
        seeds(level, &sample, &mut table[len << shape.first()..], len, poll)?;
        refine(level, &sample, shape, Which::Second, &mut table, threads, poll)?;
        sample.values = values;
        together(level, &sample, shape, &mut table, threads, poll)?;
    }
    Ok(table)
}

/// Refines one of the codebooks in a table; returns the nearest entries of all vectors by number in it.
fn refine(
    level: Level,
    sample: &Sample,
    shape: Shape,
    which: Which,
    table: &mut [f32],
    threads: usize,
    poll: Poll,
) -> Result<Vec<(u16, f32)>> {
    let len = shape.len;
    let (from, entries) = which.range(shape, len);
    let mut found = zeros_vec::<(u16, f32)>(sample.count)?;
    let mut before = f64::INFINITY;
    for _ in 0..ROUNDS {
        let book = Codebook::new(shape, table)?;
        let find = |found: &mut [(u16, f32)], b: usize| assign(level, &book, which, sample, b * BLOCK, found);
        parallel(threads, found.chunks_mut(BLOCK).collect(), poll, |b, part| find(part, b))?;
        let error = found.iter().zip(&sample.mass).map(|((_, d), mass)| mass * f64::from(*d)).sum::<f64>();
        if error >= before * (1.0 - LITTLE) {
            break;
        }
        before = error;
        let own = &mut table[from * len..(from + entries) * len];
        sample.means(own, len, |i| found[i].0.into(), |i, j| sample.values[j * sample.count + i])?;
    }
    Ok(found)
}

/// Refines both codebooks of a table for the sums that vectors choose.
fn together(level: Level, sample: &Sample, shape: Shape, table: &mut [f32], threads: usize, poll: Poll) -> Result<()> {
    let len = shape.len;
    let mut found = zeros_vec::<(u16, u16, f32)>(sample.count)?;
    let mut before = f64::INFINITY;
    for _ in 0..ROUNDS {
        let book = Codebook::new(shape, table)?;
        let find = |found: &mut [(u16, u16, f32)], b: usize| assign_pairs(level, &book, sample, b * BLOCK, found);
        parallel(threads, found.chunks_mut(BLOCK).collect(), poll, |b, part| find(part, b))?;
        let error = found.iter().zip(&sample.mass).map(|((.., d), mass)| mass * f64::from(*d)).sum::<f64>();
        if error >= before * (1.0 - LITTLE) {
            break;
        }
        before = error;
        let (first, second) = table.split_at_mut(len << shape.first());
        let value = |i: usize, j: usize| sample.values[j * sample.count + i];
        let of = |book: &[f32], i: u16, j: usize| book[usize::from(i) * len + j];
        sample.means(first, len, |i| found[i].0.into(), |i, j| value(i, j) - of(second, found[i].1, j))?;
        sample.means(second, len, |i| found[i].1.into(), |i, j| value(i, j) - of(first, found[i].0, j))?;
    }
    Ok(())
}

/// The best pairs of entries for some vectors of the sample, and the distances.
#[inline(always)]
fn assign_pairs_body(book: &Codebook, sample: &Sample, first: usize, found: &mut [(u16, u16, f32)]) {
    for (i, found) in found.iter_mut().enumerate() {
        let (x, w, n) = sample.vector(first + i);
        let (a, b, distance) = nearest_pair(book, &x[..n], &w[..n]);
        *found = (a as u16, b as u16, distance);
    }
}
per_level! {
    /// See [`assign_pairs_body`].
    assign_pairs = assign_pairs_body(book: &Codebook, sample: &Sample, first: usize, found: &mut [(u16, u16, f32)]) -> ()
}

/// The nearest entries of some vectors of the sample, and the distances.
#[inline(always)]
fn assign_body(book: &Codebook, which: Which, sample: &Sample, first: usize, found: &mut [(u16, f32)]) {
    for (i, found) in found.iter_mut().enumerate() {
        let (x, w, n) = sample.vector(first + i);
        let (from, limit) = which.range(book.shape, n);
        let (entry, distance) = nearest(book, from, limit, &x[..n], &w[..n]);
        *found = (entry as u16, distance);
    }
}
per_level! {
    /// See [`assign_body`].
    assign = assign_body(book: &Codebook, which: Which, sample: &Sample, first: usize, found: &mut [(u16, f32)]) -> ()
}

/// The first codebook: 0, and vectors of the sample, each drawn by the error that those before leave.
fn seeds(level: Level, sample: &Sample, table: &mut [f32], len: usize, poll: Poll) -> Result<()> {
    let mut near = zeros_vec::<f32>(sample.count)?;
    near.fill(f32::INFINITY);
    let mut sums = zeros_vec::<f64>(sample.count / BLOCK)?;
    for i in 1..table.len() / len {
        approach(level, sample, &table[(i - 1) * len..i * len], &mut near, &mut sums);
        let total: f64 = sums.iter().sum();
        if i % 64 == 0 && poll.is_some_and(|stop| stop()) {
            return Err(Error::Interrupted);
        }
        if total == 0.0 {
            // Every vector is an entry.
            break;
        }
        // Multiples of the golden section fill the range evenly, however many they are.
        let mut want = total * (i as f64 * 0.618_033_988_749_894_9).fract();
        let block = sums.iter().position(|s| {
            want -= s;
            want < 0.0
        });
        let block = block.unwrap_or(sums.len() - 1);
        want += sums[block];
        let share = |t: usize| sample.mass[t] * f64::from(near[t]);
        let mut within = (block * BLOCK..(block + 1) * BLOCK).filter(|&t| share(t) > 0.0).peekable();
        let mut at = within.peek().copied().unwrap_or(0);
        for t in within {
            at = t;
            want -= share(t);
            if want < 0.0 {
                break;
            }
        }
        for j in 0..len {
            table[i * len + j] = sample.values[j * sample.count + at];
        }
    }
    Ok(())
}

/// Lowers the squares of distances to those from one more entry, and sums them in blocks, each as much as it counts.
#[inline(always)]
fn approach_body(sample: &Sample, entry: &[f32], near: &mut [f32], sums: &mut [f64]) {
    for (b, (near, total)) in near.as_chunks_mut::<BLOCK>().0.iter_mut().zip(sums).enumerate() {
        let mut d = [0.0f32; BLOCK];
        for (j, v) in entry.iter().enumerate() {
            let at = j * sample.count + b * BLOCK;
            let (x, w) = (&sample.values[at..][..BLOCK], &sample.weights[at..][..BLOCK]);
            for i in 0..BLOCK {
                let t = x[i] - v;
                d[i] += w[i] * (t * t);
            }
        }
        for i in 0..BLOCK {
            near[i] = if d[i] < near[i] { d[i] } else { near[i] };
        }
        let mut sum = [0.0; LANES];
        let mass = &sample.mass[b * BLOCK..][..BLOCK];
        for (near, mass) in near.as_chunks::<LANES>().0.iter().zip(mass.as_chunks::<LANES>().0) {
            for l in 0..LANES {
                sum[l] += f64::from(near[l]) * mass[l];
            }
        }
        *total = tree(sum);
    }
}
per_level! {
    /// See [`approach_body`].
    approach = approach_body(sample: &Sample, entry: &[f32], near: &mut [f32], sums: &mut [f64]) -> ()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ValueMap;

    fn learned(name: &str, x: &[f32], rows: usize, weights: Option<&[f32]>) -> Vec<f32> {
        let format = Format::parse(name).unwrap();
        let cols = x.len() / rows;
        let ones = vec![1.0; cols];
        let ValueMap::Vectors(shape) = format.element.map else { panic!("{name}") };
        let learn = |level, threads| {
            let m = MatRef::from_f32(x, rows, cols);
            learn(level, &m, &format, shape, weights.unwrap_or(&ones), threads, None).unwrap()
        };
        let table = learn(Level::detect(), 1);
        for level in Level::available() {
            assert_eq!(learn(level, 3), table, "{name} {level:?}");
        }
        table
    }

    fn noise(n: usize) -> Vec<f32> {
        let any = |i: u32| i.wrapping_mul(0x9E37_79B1) ^ (i.wrapping_mul(0x85EB_CA6B) >> 13);
        (0..n as u32).map(|i| (0..4).map(|j| any(4 * i + j) as f32 / 4_294_967_296.0 - 0.5).sum()).collect()
    }

    #[test]
    fn few_vectors_are_learned_exactly() {
        // Each of the same squares, so that the rows have one scale, 1.
        let own = [[1.0, 1.0, 1.0, -1.0], [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, -2.0, 0.0], [-1.0, -1.0, 1.0, 1.0]];
        let x: Vec<f32> = (0..4000).flat_map(|i| own[(i * i + i / 7) % 4]).collect();
        let table = learned("vq2", &x, 10, None);
        for v in own {
            assert!(table.chunks(4).any(|e| e == v), "{v:?}");
        }
        assert!(learned("vq2", &[0.0; 40], 2, None).iter().all(|v| *v == 0.0));
        assert!(learned("vq2", &[], 1, None).iter().all(|v| *v == 0.0));
        assert!(learned("vq1", &[f32::NAN, 1.0, f32::INFINITY, 2.0], 2, None).iter().all(|v| *v == 0.0));
    }

    #[test]
    fn entries_are_weighted_means_of_what_is_nearest() {
        for (name, rows, cols) in
            [("vq1", 40, 800), ("vq2", 30, 1000), ("vq4", 16, 512), ("vq2", 500, 7), ("vq2", 900, 1)]
        {
            let x = noise(rows * cols);
            let weights: Vec<f32> = (0..cols).map(|k| [1.0, 0.25, 0.5][k % 3]).collect();
            let table = learned(name, &x, rows, Some(&weights));
            let (f, e) = (Format::parse(name).unwrap(), Format::parse(name).unwrap().element);
            let len = e.span();
            let (mut sums, mut shares) = (vec![0.0; table.len()], vec![0.0; table.len()]);
            let (mut error, mut least) = (0.0, 0.0);
            let mut all = Vec::new();
            for row in x.chunks(cols) {
                let rms = (row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / cols as f64).sqrt() as f32;
                let s = f.round_scale(rms.max(row.iter().fold(0.0, |m: f32, v| m.max(v.abs())) / 16.0)).unwrap();
                for (v, w) in row.chunks(len).zip(weights.chunks(len)) {
                    let v: Vec<f64> = v.iter().map(|v| f64::from(*v / s)).collect();
                    let limit = 1usize << (usize::from(e.bits) * v.len());
                    let far = |i: usize| {
                        let entry = &table[i * len..][..v.len()];
                        let part = |j: usize| f64::from(w[j]) * (v[j] - f64::from(entry[j])).powi(2);
                        (0..v.len()).map(part).sum::<f64>()
                    };
                    let i = (0..limit).min_by(|&a, &b| far(a).total_cmp(&far(b))).unwrap();
                    error += f64::from(s).powi(2) * far(i);
                    for j in 0..v.len() {
                        let share = f64::from(s).powi(2) * f64::from(w[j]);
                        sums[i * len + j] += share * v[j];
                        shares[i * len + j] += share;
                        all.push((i * len + j, share, v[j]));
                    }
                }
            }
            // The means may take little off the error that the rounds have left.
            for (at, share, v) in all {
                least += share * (v - sums[at] / shares[at]).powi(2);
            }
            assert!(least <= error * 1.000_001 && least >= error * (1.0 - 3.0 * LITTLE), "{name}: {error} {least}");
        }
    }
}
