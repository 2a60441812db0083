//! Recurrences over a matrix for each head: the gated delta rule (Yang et al. 2024) and Mamba-2 (Dao and Gu 2024).
//!
//! Columns of a matrix do not depend on one another. So a thread takes some of a head's, keeps them near it while it goes through all
//! tokens of a sequence, and the order of the sums is always the same.

use std::ops::Range;

use super::super::memory::SharedSlice;
use super::super::simd::{Kernel, Simd};
use super::state::RecurrentShape;

/// Columns that a thread takes at once.
pub(super) const COLUMNS: usize = 64;
/// Most rows of a matrix.
pub(super) const MAX_ROWS: usize = 256;
/// Added to the square of the length that a query or key is divided by.
const EPS: f32 = 1e-6;

/// What a recurrence does with its matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScanRule {
    /// The gated delta rule; rows are q | k | v, the gates b | a. Queries and keys are divided by their lengths.
    Delta {
        /// Head h of the values goes with head h % n of the n keys; otherwise each key head has the next few.
        tiled: bool,
    },
    /// Mamba-2; rows are x | b | c, the gates dt.
    Mamba,
}

/// The numbers of each head.
pub(in super::super) struct ScanWeight {
    /// Negative: what a state decays by is e to this times the time step.
    pub(super) decay: Vec<f32>,
    /// Added to the time step before its softplus.
    pub(super) bias: Vec<f32>,
    /// What of its input is added to the output.
    pub(super) skip: Option<Vec<f32>>,
    /// Bounds of the time step.
    pub(super) limits: (f32, f32),
}

impl ScanWeight {
    pub(in super::super) fn bytes(&self) -> usize {
        let skip = self.skip.as_ref().map_or(0, Vec::len);
        (self.decay.len() + self.bias.len() + skip) * size_of::<f32>()
    }

    fn step(&self, head: usize, given: f32) -> f32 {
        let (least, most) = self.limits;
        softplus(given + self.bias[head]).clamp(least, most)
    }
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// Rows of numbers, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct TokenRows<'a> {
    pub(super) values: SharedSlice<'a, f32>,
    pub(super) stride: usize,
}

impl TokenRows<'_> {
    /// # Safety
    /// Nobody may write the row.
    unsafe fn row(&self, token: usize) -> &[f32] {
        // SAFETY: the caller's promise.
        unsafe {
            self.values
                .get(token * self.stride..(token + 1) * self.stride)
        }
    }
}

/// The recurrence of one head in some columns over one sequence's tokens; it leaves the state behind them.
pub(super) struct ScanTokens<'a> {
    pub(super) rule: ScanRule,
    pub(super) weight: &'a ScanWeight,
    pub(super) shape: RecurrentShape,
    /// Heads of keys and queries.
    pub(super) groups: usize,
    pub(super) head: usize,
    /// Of the head's columns, at most [`COLUMNS`].
    pub(super) columns: Range<usize>,
    pub(super) x: TokenRows<'a>,
    pub(super) gates: TokenRows<'a>,
    pub(super) tokens: usize,
    /// The head's matrix, `[rows][columns]`; `None`: zeros.
    pub(super) from: Option<SharedSlice<'a, f32>>,
    /// May be the same memory.
    pub(super) to: SharedSlice<'a, f32>,
    /// Rows of all heads' columns.
    pub(super) out: SharedSlice<'a, f32>,
}

/// Some columns of a row of a matrix.
#[derive(Clone)]
#[repr(align(64))]
struct BlockRow([f32; COLUMNS]);

/// Some columns of all rows of a matrix.
struct Block(Vec<BlockRow>);

/// One token as a head sees it.
struct Token {
    query: [f32; MAX_ROWS],
    key: [f32; MAX_ROWS],
    value: [f32; COLUMNS],
    decay: f32,
    /// How much of what the key leads to is replaced.
    beta: f32,
    skip: f32,
}

impl ScanTokens<'_> {
    const fn group(&self) -> usize {
        match self.rule {
            ScanRule::Delta { tiled: true } => self.head % self.groups,
            _ => self.head / (self.shape.heads / self.groups),
        }
    }

    #[inline(always)]
    fn read<S: Simd>(&self, s: S, token: usize, to: &mut Token) {
        let (rows, groups, group) = (self.shape.rows, self.groups, self.group());
        let inner = self.shape.heads * self.shape.columns;
        // SAFETY: the rows were written before the last barrier.
        let (x, gates) = unsafe { (self.x.row(token), self.gates.row(token)) };
        let values = self.head * self.shape.columns + self.columns.start;
        let values = values..values + self.columns.len();
        match self.rule {
            ScanRule::Delta { .. } => {
                let (queries, rest) = x.split_at(groups * rows);
                let own = group * rows..(group + 1) * rows;
                let scale = 1.0 / (rows as f32).sqrt();
                unit(s, &queries[own.clone()], scale, &mut to.query[..rows]);
                unit(s, &rest[own], 1.0, &mut to.key[..rows]);
                to.value[..values.len()].copy_from_slice(&rest[groups * rows..][values]);
                let step = self
                    .weight
                    .step(self.head, gates[self.shape.heads + self.head]);
                to.decay = (self.weight.decay[self.head] * step).exp();
                to.beta = 1.0 / (1.0 + (-gates[self.head]).exp());
            }
            ScanRule::Mamba => {
                let (inputs, rest) = x.split_at(inner);
                let own = group * rows..(group + 1) * rows;
                to.key[..rows].copy_from_slice(&rest[own.clone()]);
                to.query[..rows].copy_from_slice(&rest[groups * rows..][own]);
                to.value[..values.len()].copy_from_slice(&inputs[values]);
                let step = self.weight.step(self.head, gates[self.head]);
                to.decay = (self.weight.decay[self.head] * step).exp();
                to.beta = step;
                to.skip = self
                    .weight
                    .skip
                    .as_ref()
                    .map_or(0.0, |skip| skip[self.head]);
            }
        }
    }
}

/// `out` = `x` divided by its length, times `scale`.
#[inline(always)]
fn unit<S: Simd>(s: S, x: &[f32], scale: f32, out: &mut [f32]) {
    let mut sum = s.splat(0.0);
    let mut vectors = x.chunks_exact(S::LANES);
    for vector in &mut vectors {
        // SAFETY: the chunk is one vector.
        let vector = unsafe { s.load(vector.as_ptr()) };
        sum = s.mul_add(vector, vector, sum);
    }
    let rest: f32 = vectors.remainder().iter().map(|x| x * x).sum();
    let factor = scale / (s.sum(sum) + rest + EPS).sqrt();
    for (out, x) in out.iter_mut().zip(x) {
        *out = x * factor;
    }
}

/// Vectors of a block's row: at most that many are used.
const MOST: usize = COLUMNS / 4;

impl Block {
    /// What the rows come to that are multiplied by these factors and added.
    ///
    /// # Safety
    /// There must be as many rows as factors.
    #[inline(always)]
    unsafe fn product<S: Simd>(&self, s: S, factors: &[f32]) -> [S::V; MOST] {
        let mut sums = [s.splat(0.0); MOST];
        let mut row = 0;
        while row < factors.len() {
            let factor = s.splat(factors[row]);
            let mut at = 0;
            while at < COLUMNS / S::LANES {
                // SAFETY: the caller's promise.
                unsafe {
                    let place = self.0.as_ptr().add(row).cast::<f32>();
                    let x = s.load(place.add(at * S::LANES));
                    sums[at] = s.mul_add(x, factor, sums[at]);
                }
                at += 1;
            }
            row += 1;
        }
        sums
    }

    /// Lets all decay, adds `key * value`, and gives the product with the query.
    ///
    /// # Safety
    /// As in [`Self::product`].
    #[inline(always)]
    unsafe fn advance<S: Simd>(
        &mut self,
        s: S,
        decay: f32,
        (key, value): (&[f32], &[S::V; MOST]),
        query: &[f32],
    ) -> [S::V; MOST] {
        let (decay, mut sums) = (s.splat(decay), [s.splat(0.0); MOST]);
        let mut row = 0;
        while row < key.len() {
            let (k, q) = (s.splat(key[row]), s.splat(query[row]));
            let mut at = 0;
            while at < COLUMNS / S::LANES {
                // SAFETY: the caller's promise.
                unsafe {
                    let place = self.0.as_mut_ptr().add(row).cast::<f32>();
                    let place = place.add(at * S::LANES);
                    let x = s.mul_add(k, value[at], s.mul(s.load(place), decay));
                    s.store(place, x);
                    sums[at] = s.mul_add(q, x, sums[at]);
                }
                at += 1;
            }
            row += 1;
        }
        sums
    }
}

impl Kernel for ScanTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (rows, width) = (self.shape.rows, self.columns.len());
        let own = |row: usize| {
            let start = row * self.shape.columns + self.columns.start;
            start..start + width
        };
        let mut block = Block(vec![BlockRow([0.0; COLUMNS]); rows]);
        if let Some(from) = self.from {
            for (row, kept) in block.0.iter_mut().enumerate() {
                // SAFETY: nobody else touches these columns of the state.
                kept.0[..width].copy_from_slice(unsafe { from.get(own(row)) });
            }
        }
        let mut token = Token {
            query: [0.0; MAX_ROWS],
            key: [0.0; MAX_ROWS],
            value: [0.0; COLUMNS],
            decay: 0.0,
            beta: 0.0,
            skip: 0.0,
        };
        let all = self.shape.heads * self.shape.columns;
        for at in 0..self.tokens {
            self.read(s, at, &mut token);
            let (key, query) = (&token.key[..rows], &token.query[..rows]);
            let mut value = [s.splat(0.0); MOST];
            let mut out = [0.0_f32; COLUMNS];
            // SAFETY: the block has these rows, values and outputs the columns of a block.
            unsafe {
                let known = match self.rule {
                    ScanRule::Delta { .. } => block.product(s, key),
                    ScanRule::Mamba => value,
                };
                let (decay, beta) = (s.splat(token.decay), s.splat(token.beta));
                for (vector, value) in value.iter_mut().enumerate().take(COLUMNS / S::LANES) {
                    let given = s.load(token.value.as_ptr().add(vector * S::LANES));
                    *value = s.mul(beta, s.sub(given, s.mul(known[vector], decay)));
                }
                let sums = block.advance(s, token.decay, (key, &value), query);
                let skip = s.splat(token.skip);
                for (vector, sum) in sums.into_iter().enumerate().take(COLUMNS / S::LANES) {
                    let given = s.load(token.value.as_ptr().add(vector * S::LANES));
                    let sum = s.mul_add(skip, given, sum);
                    s.store(out.as_mut_ptr().add(vector * S::LANES), sum);
                }
            }
            let place = at * all + self.head * self.shape.columns + self.columns.start;
            // SAFETY: these outputs are this thread's.
            unsafe { self.out.get_mut(place..place + width) }.copy_from_slice(&out[..width]);
        }
        for (row, kept) in block.0.iter().enumerate() {
            // SAFETY: as above.
            unsafe { self.to.get_mut(own(row)) }.copy_from_slice(&kept.0[..width]);
        }
    }
}
