//! The nearest entry of a codebook.
//!
//! Long codebooks are sorted into leaves of a tree, each of which knows the box that its entries lie in: most leaves are
//! farther than an entry that is known already. Differences, squares and sums are rounded monotonously, so that the distance
//! of a box, computed as those of entries are, is never above the distance of an entry in it: what is found is what
//! looking at every entry finds, the first of equals.
use super::{Codebook, LANES, LONGEST};
use crate::qtensor::zeros_vec;
use crate::Result;

/// Entries of a leaf.
const LEAF: usize = 64;
/// Codebooks of fewer entries are looked at whole.
const LONG: usize = 1024;
/// Leaves of the longest codebook.
const LEAVES: usize = (1 << 12) / LEAF;

/// The entries of a codebook in leaves.
#[derive(Debug, Clone)]
pub(super) struct Leaves {
    /// The entry at each place; within a leaf they ascend.
    order: Vec<u32>,
    /// Values by place, `[len][entries]`.
    columns: Vec<f32>,
    /// Least and largest values of the leaves, `[len][leaves]`.
    low: Vec<f32>,
    high: Vec<f32>,
}

impl Leaves {
    /// Those of `entries` entries of `len` values, a power of two, if they are many.
    pub(super) fn new(table: &[f32], len: usize, entries: usize) -> Result<Option<Self>> {
        if !(LONG..=LEAF * LEAVES).contains(&entries) {
            return Ok(None);
        }
        let mut order = zeros_vec::<u32>(entries)?;
        order.iter_mut().enumerate().for_each(|(i, o)| *o = i as u32);
        split(table, len, &mut order);
        let leaves = entries / LEAF;
        let mut own = Self {
            order,
            columns: zeros_vec(entries * len)?,
            low: zeros_vec(leaves * len)?,
            high: zeros_vec(leaves * len)?,
        };
        for j in 0..len {
            let column = &mut own.columns[j * entries..][..entries];
            column.iter_mut().zip(&own.order).for_each(|(c, i)| *c = table[*i as usize * len + j]);
            for (b, leaf) in column.chunks_exact(LEAF).enumerate() {
                own.low[j * leaves + b] = leaf.iter().copied().fold(f32::INFINITY, f32::min);
                own.high[j * leaves + b] = leaf.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            }
        }
        Ok(Some(own))
    }

    /// As [`nearest`], of all entries.
    #[inline(always)]
    fn nearest(&self, x: &[f32], weights: &[f32]) -> (usize, f32) {
        let leaves = self.order.len() / LEAF;
        let mut bounds = [f32::INFINITY; LEAVES];
        for (b, bounds) in bounds[..leaves].as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let mut d = [0.0f32; LANES];
            for (j, (x, w)) in x.iter().zip(weights).enumerate() {
                let at = j * leaves + b * LANES;
                let (low, high) = (&self.low[at..][..LANES], &self.high[at..][..LANES]);
                for l in 0..LANES {
                    let (below, above) = (low[l] - x, x - high[l]);
                    let t = if below > above { below } else { above };
                    let t = if t > 0.0 { t } else { 0.0 };
                    d[l] += w * (t * t);
                }
            }
            *bounds = d;
        }
        let mut first = 0;
        for b in 1..leaves {
            first = if bounds[b] < bounds[first] { b } else { first };
        }
        let mut best = (usize::MAX, f32::INFINITY);
        self.look(first, x, weights, &mut best);
        for b in 0..leaves {
            if bounds[b] <= best.1 && b != first {
                self.look(b, x, weights, &mut best);
            }
        }
        best
    }

    /// Looks at the entries of a leaf for one that is nearer, or as near and before.
    #[inline(always)]
    fn look(&self, leaf: usize, x: &[f32], weights: &[f32], best: &mut (usize, f32)) {
        let entries = self.order.len();
        let mut d = [0.0f32; LEAF];
        for (j, (x, w)) in x.iter().zip(weights).enumerate() {
            let values = &self.columns[j * entries + leaf * LEAF..][..LEAF];
            for l in 0..LEAF {
                let t = x - values[l];
                d[l] += w * (t * t);
            }
        }
        let mut least = [f32::INFINITY; LANES];
        for part in d.as_chunks::<LANES>().0 {
            for l in 0..LANES {
                least[l] = if part[l] < least[l] { part[l] } else { least[l] };
            }
        }
        let least = least.into_iter().fold(f32::INFINITY, |m, v| if v < m { v } else { m });
        if least <= best.1 {
            // Squares of large numbers may be infinite: then any entry is as good.
            let at = d.iter().position(|v| *v == least).unwrap_or(0);
            let entry = self.order[leaf * LEAF + at] as usize;
            if least < best.1 || entry < best.0 {
                *best = (entry, least);
            }
        }
    }
}

/// Sorts entries into halves along the column in which they differ most, down to leaves.
fn split(table: &[f32], len: usize, order: &mut [u32]) {
    if order.len() <= LEAF {
        order.sort_unstable();
        return;
    }
    let value = |i: u32, j: usize| table[i as usize * len + j];
    let spread = |j: usize| {
        let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
        for &i in order.iter() {
            (low, high) = (low.min(value(i, j)), high.max(value(i, j)));
        }
        high - low
    };
    let widest = (0..len).max_by(|&a, &b| spread(a).total_cmp(&spread(b))).unwrap_or(0);
    let half = order.len() / 2;
    order.select_nth_unstable_by(half, |&a, &b| value(a, widest).total_cmp(&value(b, widest)).then(a.cmp(&b)));
    let (low, high) = order.split_at_mut(half);
    split(table, len, low);
    split(table, len, high);
}

/// Which of `limit` entries from `from` on is nearest to a vector, the first of equals, and the weighted square of the
/// distance. Lanes are entries.
#[inline(always)]
pub(super) fn nearest(book: &Codebook, from: usize, limit: usize, x: &[f32], weights: &[f32]) -> (usize, f32) {
    if let Some(leaves) = book.leaves.as_ref().filter(|l| from == 0 && limit == l.order.len()) {
        return leaves.nearest(x, weights);
    }
    let entries = book.shape.entries();
    let (mut least, mut at) = ([f32::INFINITY; LANES], [0u32; LANES]);
    for base in (0..limit).step_by(LANES) {
        let mut d = [0.0f32; LANES];
        for (j, (x, w)) in x.iter().zip(weights).enumerate() {
            let values = &book.columns[j * entries + from + base..][..LANES];
            for l in 0..LANES {
                let t = x - values[l];
                d[l] += w * (t * t);
            }
        }
        for l in 0..LANES {
            at[l] = if d[l] < least[l] { base as u32 } else { at[l] };
            least[l] = if d[l] < least[l] { d[l] } else { least[l] };
        }
    }
    // A short vector may have fewer entries than there are lanes.
    let mut best = (0, f32::INFINITY);
    for l in 0..LANES.min(limit) {
        let i = at[l] as usize + l;
        if least[l] < best.1 || (least[l] == best.1 && i < best.0) {
            best = (i, least[l]);
        }
    }
    best
}

/// First entries from which the search for a pair goes on.
const FEW: usize = 8;

/// The pair of entries of the two codebooks whose sum is nearest to a vector, of those whose first entry is among the
/// nearest by itself; the first of equals. The second entry is by number in its codebook.
#[inline(always)]
pub(super) fn nearest_pair(book: &Codebook, x: &[f32], weights: &[f32]) -> (usize, usize, f32) {
    let (shape, (limit, second)) = (book.shape, book.shape.limits(x.len()));
    let entries = shape.entries();
    let mut few = [(0usize, f32::INFINITY); FEW];
    for base in (0..limit).step_by(LANES) {
        let mut d = [0.0f32; LANES];
        for (j, (x, w)) in x.iter().zip(weights).enumerate() {
            let values = &book.columns[j * entries + base..][..LANES];
            for l in 0..LANES {
                let t = x - values[l];
                d[l] += w * (t * t);
            }
        }
        for (l, d) in d[..LANES.min(limit - base)].iter().enumerate() {
            let mut at = FEW;
            while at > 0 && *d < few[at - 1].1 {
                at -= 1;
            }
            if at < FEW {
                few[at..].rotate_right(1);
                few[at] = (base + l, *d);
            }
        }
    }
    let mut best = (0, 0, f32::INFINITY);
    for &(i, _) in few.iter().take(limit) {
        let mut rest = [0.0; LONGEST];
        let rest = &mut rest[..x.len()];
        let entry = &book.table[i * shape.len..];
        rest.iter_mut().zip(x.iter().zip(entry)).for_each(|(r, (x, v))| *r = x - v);
        let (j, d) = nearest(book, 1 << shape.first(), second, rest, weights);
        if d < best.2 {
            best = (i, j, d);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::super::Shape;
    use super::*;

    #[test]
    fn leaves_hide_no_entry() {
        for (len, bits) in [(4, 3), (6, 2)] {
            let shape = Shape { len, bits, second: 0 };
            let any = |i: u32| i.wrapping_mul(0x9E37_79B1) >> 27;
            // Few values, so that many entries are equally far, some of them the same.
            let table: Vec<f32> = (0..4096 * len as u32).map(|i| any(i) as f32 / 8.0 - 2.0).collect();
            let book = Codebook::new(shape, &table).unwrap();
            let plain = Codebook { leaves: None, ..book.clone() };
            assert!(book.leaves.is_some());
            for t in 0..500u32 {
                let x: Vec<f32> = (0..len as u32).map(|j| any(t * 31 + j) as f32 / 7.0 - 2.5).collect();
                let weights: Vec<f32> = (0..len as u32).map(|j| [1.0, 0.25, 0.0][(t + j) as usize % 3]).collect();
                let w = if t % 2 == 0 { &[1.0; LONGEST][..len] } else { &weights };
                assert_eq!(nearest(&book, 0, 4096, &x, w), nearest(&plain, 0, 4096, &x, w), "{len} {t}");
                // Farther than squares reach.
                let far = vec![3e30; len];
                assert_eq!(nearest(&book, 0, 4096, &far, w).1, nearest(&plain, 0, 4096, &far, w).1);
            }
        }
    }

    #[test]
    fn pairs_are_no_worse_than_one_after_the_other() {
        let shape = Shape { len: 4, bits: 3, second: 4 };
        let any = |i: u32| (i.wrapping_mul(0x9E37_79B1) >> 16) as f32 / 16384.0 - 2.0;
        let table: Vec<f32> = (0..4 * 272).map(any).collect();
        let book = Codebook::new(shape, &table).unwrap();
        let mut better = 0;
        for t in 0..300u32 {
            let x: Vec<f32> = (0..4).map(|j| any(t * 77 + j * 5)).collect();
            for n in 1..=4 {
                let w = &[1.0, 0.5, 0.0, 2.0][..n];
                let far = |i: usize, j: usize| -> f32 {
                    let part = |k: usize| w[k] * (x[k] - table[4 * i + k] - table[4 * (256 + j) + k]).powi(2);
                    (0..n).map(part).sum()
                };
                let (i, j, d) = nearest_pair(&book, &x[..n], w);
                assert!((d - far(i, j)).abs() < 1e-5);
                let limits = shape.limits(n);
                assert!(i < limits.0 && j < limits.1);
                let first = nearest(&book, 0, limits.0, &x[..n], w).0;
                let greedy = (0..limits.1).map(|j| far(first, j)).fold(f32::INFINITY, f32::min);
                assert!(d <= greedy + 1e-5);
                better += usize::from(d < greedy - 1e-3);
                let least = (0..limits.0).flat_map(|i| (0..limits.1).map(move |j| (i, j)));
                let least = least.map(|(i, j)| far(i, j)).fold(f32::INFINITY, f32::min);
                assert!(limits.0 > FEW || (d - least).abs() < 1e-5);
            }
        }
        assert!(better > 100, "{better}");
    }
}
