//! The arithmetic of attention for a few query rows and a tile of keys. A row's result does not depend on the rows beside it: each
//! of its sums adds the same numbers in the same order, whichever kernel computes it.
#![allow(
    clippy::needless_range_loop,
    reason = "loops over indices are unrolled into registers; those over iterators need not be"
)]

use super::super::simd::{Kernel, Simd, exp2, tanh};
use super::cache::{Element, PAGE};

/// Number of keys of a tile.
pub(super) const TILE: usize = 64;
/// Number of pages of a tile.
pub(super) const TILE_PAGES: usize = TILE / PAGE;
const LINE_BYTES: usize = 64;

/// The keys or values of the next pages, which are prefetched while a kernel processes the current ones: no processor can predict
/// where the next page is.
#[derive(Clone, Copy)]
pub(super) struct Ahead(pub(super) [*const u8; TILE_PAGES]);

impl Ahead {
    /// Prefetches [`PAGE`] elements of each page, others in every step.
    #[inline(always)]
    fn fetch<S: Simd, E: Element>(self, s: S, step: usize) {
        let mut i = 0;
        while i < TILE_PAGES * PAGE * size_of::<E>() / LINE_BYTES {
            let line = step * size_of::<E>() + i;
            let page = self.0[line % TILE_PAGES];
            s.prefetch(page.wrapping_add(line / TILE_PAGES * LINE_BYTES));
            i += 1;
        }
    }
}

/// Computes the scores of R query rows for a tile of keys: `out[r][c]` is the product of row r of `queries` and key c.
///
/// `queries` must hold R rows of `depth`, each page `depth` rows of [`PAGE`] elements, `stride` elements apart, and `out` R rows
/// of [`TILE`].
pub(super) struct Scores<E, const R: usize> {
    pub(super) queries: *const f32,
    pub(super) depth: usize,
    /// Pages of transposed keys.
    pub(super) keys: [*const E; TILE_PAGES],
    pub(super) stride: usize,
    pub(super) out: *mut f32,
    pub(super) ahead: Option<Ahead>,
}

impl<E: Element, const R: usize> Kernel for Scores<E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut first = 0;
        while first < TILE {
            // SAFETY: what the type says of its pointers.
            unsafe {
                if S::COLUMNS == 4 {
                    self.columns::<S, 4>(s, first);
                } else {
                    self.columns::<S, 2>(s, first);
                }
            }
            first += S::COLUMNS * S::LANES;
        }
    }
}

impl<E: Element, const R: usize> Scores<E, R> {
    #[inline(always)]
    unsafe fn columns<S: Simd, const N: usize>(&self, s: S, first: usize) {
        // SAFETY: what the type says of its pointers; a page holds whole vectors.
        unsafe {
            let mut columns = [self.keys[0]; N];
            for j in 0..N {
                let column = first + j * S::LANES;
                columns[j] = self.keys[column / PAGE].add(column % PAGE);
            }
            let mut sums = [[s.splat(0.0); N]; R];
            let mut loaded = [s.splat(0.0); N];
            let mut k = 0;
            while k < self.depth {
                if let Some(ahead) = self.ahead
                    && first == 0
                {
                    ahead.fetch::<S, E>(s, k);
                }
                for j in 0..N {
                    loaded[j] = E::load(s, columns[j].add(k * self.stride));
                }
                for r in 0..R {
                    let query = s.splat(*self.queries.add(r * self.depth + k));
                    for j in 0..N {
                        sums[r][j] = s.mul_add(query, loaded[j], sums[r][j]);
                    }
                }
                k += 1;
            }
            for r in 0..R {
                for j in 0..N {
                    s.store(self.out.add(r * TILE + first + j * S::LANES), sums[r][j]);
                }
            }
        }
    }
}

/// Adds weighted values to R rows of `width`: `sums[r] = sums[r] * rescale[r] + weights[r] · values`.
///
/// `weights` must hold R rows of [`TILE`], `sums` R rows of `width`, a multiple of 16, and the pages rows of `width`, `count` of
/// them in all, which take part.
pub(super) struct Mix<E, const R: usize> {
    pub(super) weights: *const f32,
    pub(super) values: [*const E; TILE_PAGES],
    pub(super) count: usize,
    pub(super) rescale: [f32; R],
    pub(super) sums: *mut f32,
    pub(super) width: usize,
    pub(super) ahead: Option<Ahead>,
}

impl<E: Element, const R: usize> Kernel for Mix<E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut first = 0;
        // SAFETY: what the type says of its pointers.
        unsafe {
            if S::COLUMNS == 4 {
                while first + 4 * S::LANES <= self.width {
                    self.columns::<S, 4>(s, first);
                    first += 4 * S::LANES;
                }
            } else {
                while first + 2 * S::LANES <= self.width {
                    self.columns::<S, 2>(s, first);
                    first += 2 * S::LANES;
                }
            }
            while first < self.width {
                self.columns::<S, 1>(s, first);
                first += S::LANES;
            }
        }
    }
}

impl<E: Element, const R: usize> Mix<E, R> {
    #[inline(always)]
    unsafe fn columns<S: Simd, const N: usize>(&self, s: S, first: usize) {
        // SAFETY: what the type says of its pointers.
        unsafe {
            let mut total = [[s.splat(0.0); N]; R];
            let mut loaded = [s.splat(0.0); N];
            for r in 0..R {
                for j in 0..N {
                    let sum = s.load(self.sums.add(r * self.width + first + j * S::LANES));
                    total[r][j] = s.mul(sum, s.splat(self.rescale[r]));
                }
            }
            let mut start = 0;
            while start < self.count {
                let page = self.values[start / PAGE].add(first);
                let rows = if self.count - start < PAGE {
                    self.count - start
                } else {
                    PAGE
                };
                let mut k = 0;
                while k < rows {
                    if let Some(ahead) = self.ahead
                        && first.is_multiple_of(TILE)
                    {
                        ahead.fetch::<S, E>(s, first + start + k);
                    }
                    for j in 0..N {
                        loaded[j] = E::load(s, page.add(k * self.width + j * S::LANES));
                    }
                    for r in 0..R {
                        let weight = s.splat(*self.weights.add(r * TILE + start + k));
                        for j in 0..N {
                            total[r][j] = s.mul_add(weight, loaded[j], total[r][j]);
                        }
                    }
                    k += 1;
                }
                start += PAGE;
            }
            if let Some(ahead) = self.ahead
                && first.is_multiple_of(TILE)
            {
                let mut k = self.count;
                while k < TILE {
                    ahead.fetch::<S, E>(s, first + k);
                    k += 1;
                }
            }
            for r in 0..R {
                for j in 0..N {
                    s.store(
                        self.sums.add(r * self.width + first + j * S::LANES),
                        total[r][j],
                    );
                }
            }
        }
    }
}

/// The running softmax of one row: the base score of its weights, and their sum. A weight is 2 to the power of its score minus the
/// base.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
    pub(super) base: f32,
    pub(super) sum: f32,
}

impl Softmax {
    /// The softmax over no keys.
    pub(super) const EMPTY: Self = Self {
        base: f32::NEG_INFINITY,
        sum: 0.0,
    };

    /// Merges the softmax over further keys. Returns the factors for the sums so far and for the further ones.
    pub(super) fn merge(&mut self, further: Self) -> (f32, f32) {
        if further.sum == 0.0 {
            return (1.0, 0.0);
        }
        let base = self.base.max(further.base);
        let scales = ((self.base - base).exp2(), (further.base - base).exp2());
        self.sum = self.sum * scales.0 + further.sum * scales.1;
        self.base = base;
        scales
    }
}

impl Softmax {
    /// The factor that turns weighted sums into means. `sink` is one more score, without a value.
    pub(super) fn inverse(self, sink: Option<f32>) -> f32 {
        let Some(sink) = sink else {
            return 1.0 / self.sum;
        };
        let base = self.base.max(sink);
        let scale = (self.base - base).exp2();
        scale / (self.sum * scale + (sink - base).exp2())
    }
}

/// How far a score may exceed a row's base before the base is raised. 2 to this power, and sums of such numbers, do not overflow.
const SLACK: f32 = 24.0;

/// Converts the scores of R rows to weights: 2 to the power of each score minus the row's base. The base is the largest score of
/// the row's first tile, and is raised only if a score is far larger. Returns the factors for earlier sums.
pub(super) struct Weigh<'a, const R: usize> {
    pub(super) softmax: &'a mut [Softmax; R],
    /// R times [`SUM_LANES`] running sums of weights.
    pub(super) sums: *mut f32,
    /// R rows of [`TILE`].
    pub(super) scores: *mut f32,
    /// The range of keys that each row sees. The weights of all other keys are zero.
    pub(super) seen: [(usize, usize); R],
    /// If set, a score is this times the tanh of the given score.
    pub(super) softcap: Option<f32>,
    /// Added to each row's scores: [`TILE`] numbers for each row.
    pub(super) distances: Option<[*const f32; R]>,
    /// Factors of each page's scores, and of its weights after that: [`PAGE`] each.
    pub(super) scales: Option<[(*const f32, *const f32); TILE_PAGES]>,
}

/// Number of running sums of a row's weights, one for each lane of a vector.
pub(super) const SUM_LANES: usize = 16;

impl<const R: usize> Kernel for Weigh<'_, R> {
    type Output = [f32; R];

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> [f32; R] {
        let mut rescale = [1.0; R];
        for r in 0..R {
            // SAFETY: what the type says of its pointers; a tile holds whole vectors.
            unsafe { rescale[r] = self.row(s, r) };
        }
        rescale
    }
}

impl<const R: usize> Weigh<'_, R> {
    #[inline(always)]
    unsafe fn row<S: Simd>(&mut self, s: S, r: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe {
            let (at, sums) = (self.scores.add(r * TILE), self.sums.add(r * SUM_LANES));
            let (from, to) = self.seen[r];
            if from >= to {
                let mut i = 0;
                while i < TILE {
                    s.store(at.add(i), s.splat(0.0));
                    i += S::LANES;
                }
                return 1.0;
            }
            if let Some(pages) = &self.scales {
                scale(s, at, |page| pages[page].0);
            }
            if let Some(cap) = self.softcap {
                let cap = s.splat(cap);
                let mut i = 0;
                while i < TILE {
                    s.store(at.add(i), s.mul(cap, tanh(s, s.load(at.add(i)))));
                    i += S::LANES;
                }
            }
            if let Some(rows) = &self.distances {
                let mut i = 0;
                while i < TILE {
                    let sum = s.add(s.load(at.add(i)), s.load(rows[r].add(i)));
                    s.store(at.add(i), sum);
                    i += S::LANES;
                }
            }
            let mut i = 0;
            while i < from {
                *at.add(i) = f32::NEG_INFINITY;
                i += 1;
            }
            let mut i = to;
            while i < TILE {
                *at.add(i) = f32::NEG_INFINITY;
                i += 1;
            }
            let softmax = &mut self.softmax[r];
            let limit = s.splat(softmax.base + SLACK);
            let mut beyond = 0;
            let mut i = 0;
            while i < TILE {
                beyond |= s.at_least(s.load(at.add(i)), limit);
                i += S::LANES;
            }
            let mut sum = s.load(sums);
            let mut rescale = 1.0;
            if beyond != 0 {
                let mut largest = s.load(at);
                let mut i = S::LANES;
                while i < TILE {
                    largest = s.max(largest, s.load(at.add(i)));
                    i += S::LANES;
                }
                let largest = s.max_lane(largest);
                rescale = (softmax.base - largest).exp2();
                softmax.base = largest;
                sum = s.mul(sum, s.splat(rescale));
            }
            let base = s.splat(softmax.base);
            let mut i = 0;
            while i < TILE {
                let weight = exp2(s, s.sub(s.load(at.add(i)), base));
                s.store(at.add(i), weight);
                sum = s.add(sum, weight);
                i += S::LANES;
            }
            s.store(sums, sum);
            if let Some(pages) = &self.scales {
                scale(s, at, |page| pages[page].1);
            }
            rescale
        }
    }
}

/// Multiplies a tile's row by the scales of its pages.
#[inline(always)]
unsafe fn scale<S: Simd>(s: S, row: *mut f32, scales: impl Fn(usize) -> *const f32) {
    let mut i = 0;
    while i < TILE {
        // SAFETY: a tile holds whole vectors, and a page's scales too.
        unsafe {
            let scale = s.load(scales(i / PAGE).add(i % PAGE));
            s.store(row.add(i), s.mul(s.load(row.add(i)), scale));
        }
        i += S::LANES;
    }
}

/// Adds up the running sums of each row's weights, which are [`SUM_LANES`] apart.
pub(super) struct SumWeights<'a> {
    pub(super) softmax: &'a mut [Softmax],
    pub(super) sums: &'a [f32],
}

impl Kernel for SumWeights<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.sums.as_chunks::<SUM_LANES>().0;
        for (softmax, sums) in self.softmax.iter_mut().zip(rows) {
            // SAFETY: a row has room for a vector.
            softmax.sum = s.sum(unsafe { s.load(sums.as_ptr()) });
        }
    }
}

/// Converts a page that all rows read: keys to rows [`TILE`] apart, values to rows of `width`.
pub(super) struct Convert<E> {
    pub(super) keys: *const E,
    pub(super) key_tile: *mut f32,
    pub(super) head_dim: usize,
    pub(super) values: *const E,
    pub(super) value_tile: *mut f32,
    pub(super) width: usize,
}

impl<E: Element> Kernel for Convert<E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: a page has `head_dim` rows of keys and PAGE rows of values, and the tiles have room for them.
        unsafe {
            let mut k = 0;
            while k < self.head_dim {
                let mut i = 0;
                while i < PAGE {
                    let v = E::load(s, self.keys.add(k * PAGE + i));
                    s.store(self.key_tile.add(k * TILE + i), v);
                    i += S::LANES;
                }
                k += 1;
            }
            let mut i = 0;
            while i < PAGE * self.width {
                s.store(self.value_tile.add(i), E::load(s, self.values.add(i)));
                i += S::LANES;
            }
        }
    }
}
