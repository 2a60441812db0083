//! The arithmetic of attention on a few query rows and a tile of keys. What a row gets does not depend on the rows beside it:
//! each of its sums runs over the same numbers in the same order, whichever kernel computes it.

use super::super::simd::{Simd, exp};
use super::cache::{Element, PAGE};

/// Keys of a tile.
pub(super) const TILE: usize = 64;
/// Pages of a tile.
pub(super) const TILE_PAGES: usize = TILE / PAGE;

/// Scores of R query rows with a tile of keys: `out[r][c]` is the product of row r of `queries` with key c.
///
/// `keys[p]` is the transposed page p of the tile, whose rows lie `stride` elements apart.
///
/// # Safety
/// `queries` must hold R rows of `depth`, each page `depth` rows of [`PAGE`] elements, and `out` R rows of [`TILE`].
#[inline(always)]
pub(super) unsafe fn scores<S: Simd, E: Element, const R: usize>(
    s: S,
    queries: *const f32,
    depth: usize,
    keys: [*const E; TILE_PAGES],
    stride: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if S::COLUMNS == 4 {
            score_columns::<S, E, R, 4>(s, queries, depth, keys, stride, out);
        } else {
            score_columns::<S, E, R, 2>(s, queries, depth, keys, stride, out);
        }
    }
}

#[inline(always)]
unsafe fn score_columns<S: Simd, E: Element, const R: usize, const N: usize>(
    s: S,
    queries: *const f32,
    depth: usize,
    keys: [*const E; TILE_PAGES],
    stride: usize,
    out: *mut f32,
) {
    for first in (0..TILE).step_by(N * S::LANES) {
        // SAFETY: the caller's promise; a page holds whole vectors.
        unsafe {
            let columns: [*const E; N] = std::array::from_fn(|j| {
                let column = first + j * S::LANES;
                keys[column / PAGE].add(column % PAGE)
            });
            let mut sums = [[s.splat(0.0); N]; R];
            for k in 0..depth {
                let loaded: [S::V; N] =
                    std::array::from_fn(|j| E::load(s, columns[j].add(k * stride)));
                for (r, row) in sums.iter_mut().enumerate() {
                    let q = s.splat(*queries.add(r * depth + k));
                    for (sum, &key) in row.iter_mut().zip(&loaded) {
                        *sum = s.mul_add(q, key, *sum);
                    }
                }
            }
            for (r, row) in sums.iter().enumerate() {
                for (j, &sum) in row.iter().enumerate() {
                    s.store(out.add(r * TILE + first + j * S::LANES), sum);
                }
            }
        }
    }
}

/// Adds weighted values to R rows of `width`: `sums[r] = sums[r] * rescale[r] + weights[r] · values`.
///
/// `values[p]` is page p of the tile, rows of `width`; `count` of the tile's values take part.
///
/// # Safety
/// `weights` must hold R rows of [`TILE`], `sums` R rows of `width`, a multiple of 16, and the pages `count` rows in all.
#[inline(always)]
pub(super) unsafe fn mix<S: Simd, E: Element, const R: usize>(
    s: S,
    weights: *const f32,
    values: [*const E; TILE_PAGES],
    count: usize,
    rescale: &[f32; R],
    sums: *mut f32,
    width: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut first = 0;
        if S::COLUMNS == 4 {
            while first + 4 * S::LANES <= width {
                mix_columns::<S, E, R, 4>(s, weights, values, count, rescale, sums, width, first);
                first += 4 * S::LANES;
            }
        }
        while first + 2 * S::LANES <= width {
            mix_columns::<S, E, R, 2>(s, weights, values, count, rescale, sums, width, first);
            first += 2 * S::LANES;
        }
        while first < width {
            mix_columns::<S, E, R, 1>(s, weights, values, count, rescale, sums, width, first);
            first += S::LANES;
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn mix_columns<S: Simd, E: Element, const R: usize, const N: usize>(
    s: S,
    weights: *const f32,
    values: [*const E; TILE_PAGES],
    count: usize,
    rescale: &[f32; R],
    sums: *mut f32,
    width: usize,
    first: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut total: [[S::V; N]; R] = std::array::from_fn(|r| {
            std::array::from_fn(|j| {
                let sum = s.load(sums.add(r * width + first + j * S::LANES));
                s.mul(sum, s.splat(rescale[r]))
            })
        });
        for (p, page) in values.iter().enumerate() {
            for k in 0..PAGE.min(count.saturating_sub(p * PAGE)) {
                let row = page.add(k * width + first);
                let loaded: [S::V; N] = std::array::from_fn(|j| E::load(s, row.add(j * S::LANES)));
                for (r, row) in total.iter_mut().enumerate() {
                    let weight = s.splat(*weights.add(r * TILE + p * PAGE + k));
                    for (sum, &value) in row.iter_mut().zip(&loaded) {
                        *sum = s.mul_add(weight, value, *sum);
                    }
                }
            }
        }
        for (r, row) in total.iter().enumerate() {
            for (j, &sum) in row.iter().enumerate() {
                s.store(sums.add(r * width + first + j * S::LANES), sum);
            }
        }
    }
}

/// One row's running softmax: the largest score so far, and the sum of the weights relative to it.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
    pub(super) largest: f32,
    pub(super) sum: f32,
}

impl Softmax {
    /// Of no keys.
    pub(super) const EMPTY: Self = Self {
        largest: f32::NEG_INFINITY,
        sum: 0.0,
    };

    /// Makes weights of the first `seen` scores of a tile, at least one, and zeros of the others; gives what earlier sums are
    /// to be multiplied by.
    #[inline(always)]
    pub(super) fn weigh<S: Simd>(&mut self, s: S, row: &mut [f32; TILE], seen: usize) -> f32 {
        row[seen..].fill(f32::NEG_INFINITY);
        let at = row.as_mut_ptr();
        // SAFETY: a tile holds whole vectors.
        unsafe {
            let mut largest = s.load(at);
            for i in (S::LANES..TILE).step_by(S::LANES) {
                largest = s.max(largest, s.load(at.add(i)));
            }
            let largest = self.largest.max(s.max_lane(largest));
            let base = s.splat(largest);
            let mut sum = s.splat(0.0);
            for i in (0..TILE).step_by(S::LANES) {
                let weight = exp(s, s.sub(s.load(at.add(i)), base));
                s.store(at.add(i), weight);
                sum = s.add(sum, weight);
            }
            let rescale = (self.largest - largest).exp();
            self.sum = self.sum * rescale + s.sum(sum);
            self.largest = largest;
            rescale
        }
    }

    /// Takes in the softmax of further keys; gives what the sums so far and the further ones are to be multiplied by.
    pub(super) fn merge(&mut self, further: Self) -> (f32, f32) {
        if further.sum == 0.0 {
            return (1.0, 0.0);
        }
        let largest = self.largest.max(further.largest);
        let scales = (
            (self.largest - largest).exp(),
            (further.largest - largest).exp(),
        );
        self.sum = self.sum * scales.0 + further.sum * scales.1;
        self.largest = largest;
        scales
    }
}
