//! Samples without a full sort: each filter is a threshold, found among the few largest logits.
//!
//! `python/lmserve/model/sampler.py` defines what is sampled, and this must agree with it. Rows are independent of each other. The
//! only randomness is a row's `uniform`.
#![allow(
    clippy::inline_always,
    reason = "what is not inlined is compiled without the instructions it is made for"
)]

use super::isa::Isa;
use super::memory::SharedSlice;
use super::pool::Team;
use super::simd::{Kernel, Simd, all_finite, dispatch, exp};

/// Maximum number of alternatives that are reported for a token.
pub const MAX_TOP: usize = 20;
/// Logits down to this far below the largest one (after the temperature) are examined first. They hold most of the mass of any
/// distribution.
const FIRST_DEPTH: f32 = 8.0;
/// The token of a row whose logits are not finite.
pub const NO_TOKEN: i32 = -1;
/// Number of elements that are summed at once to draw a token.
const BLOCK: usize = 256;

/// The parameters of a step's sampled rows, one entry for each row; see `StepBuffers` of `lmserve/model/interface.py`.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct SampleRows<'a> {
    pub temperature: &'a [f32],
    pub top_k: &'a [i32],
    pub top_p: &'a [f32],
    pub min_p: &'a [f32],
    pub repetition_penalty: &'a [f32],
    pub presence_penalty: &'a [f32],
    pub frequency_penalty: &'a [f32],
    pub uniform: &'a [f32],
    pub logprobs: &'a [i32],
}

/// Biases and penalised tokens of rows. Row `r` has the entries `start[r]..start[r + 1]`.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct LogitEdits {
    pub bias_start: Vec<i32>,
    pub bias_token: Vec<i32>,
    pub bias_value: Vec<f32>,
    pub seen_start: Vec<i32>,
    pub seen_token: Vec<i32>,
    pub seen_count: Vec<i32>,
}

/// The outputs of each row. `top_*` have [`MAX_TOP`] columns.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Sampled<'a> {
    pub tokens: SharedSlice<'a, i32>,
    pub logprobs: SharedSlice<'a, f32>,
    pub top_ids: SharedSlice<'a, i32>,
    pub top_logprobs: SharedSlice<'a, f32>,
}

/// Masks of the tokens that rows may sample, computed while the model runs.
pub trait TokenMasks: Sync {
    /// The rows with a mask, in ascending order.
    fn rows(&self) -> &[usize];
    /// Waits for the masks: `ceil(vocab / 32)` words for each of the rows. A set bit allows a token, the lowest bit first.
    fn wait(&self) -> &[u32];
}

/// The arguments of [`Sampling::sample`].
#[derive(Clone, Copy)]
pub struct Sampling<'a> {
    /// The instruction set to use.
    pub isa: Isa,
    /// Number of columns of the logits.
    pub vocab: usize,
    /// Parameters.
    pub rows: SampleRows<'a>,
    /// Biases and penalties, if a row has any.
    pub edits: Option<&'a LogitEdits>,
    /// Masks, if a row has one.
    pub masks: Option<&'a dyn TokenMasks>,
    /// The outputs.
    pub out: Sampled<'a>,
}

impl Sampling<'_> {
    /// Samples every row of `logits [rows, vocab]`, and changes those of rows with a temperature, a bias, a penalty or a mask.
    ///
    /// Every thread of the team calls it; it ends with a barrier.
    ///
    /// # Safety
    /// Until it returns on all threads, nobody else may touch `logits` and the outputs.
    ///
    /// # Panics
    /// If an array is too small, or an extra names a token outside the vocabulary.
    pub unsafe fn sample(&self, team: &Team, logits: SharedSlice<f32>) {
        let mut scratch = Vec::new();
        team.for_chunks(self.rows.temperature.len(), 1, |range| {
            for row in range {
                // SAFETY: each row is one thread's.
                let values = unsafe { logits.get_mut(row * self.vocab..(row + 1) * self.vocab) };
                self.sample_row(row, values, &mut scratch);
            }
        });
    }

    fn sample_row(&self, row: usize, logits: &mut [f32], scratch: &mut Vec<u32>) {
        if !all_finite(self.isa, logits) {
            // SAFETY: each row is one thread's.
            unsafe { self.out.tokens.get_mut(row..row + 1)[0] = NO_TOKEN };
            return;
        }
        // Log-probabilities are those of the raw logits, which are changed below.
        let raw = (self.rows.logprobs[row] >= 0).then(|| logits.to_vec());
        if let Some(edits) = self.edits {
            edits.apply(logits, &self.rows, row);
        }
        if let Some(masks) = self.masks {
            apply_mask(masks, row, logits);
        }
        let token = if self.rows.temperature[row] == 0.0 {
            argmax(self.isa, logits)
        } else {
            let filter = Filter {
                top_k: self.rows.top_k[row].max(0) as usize,
                top_p: self.rows.top_p[row],
                min_p: self.rows.min_p[row],
            };
            scale(self.isa, logits, self.rows.temperature[row]);
            let threshold = filter.threshold(self.isa, logits, scratch);
            draw(self.isa, logits, threshold, self.rows.uniform[row], scratch)
        };
        // SAFETY: each row is one thread's.
        unsafe {
            self.out.tokens.get_mut(row..row + 1)[0] = token as i32;
            if let Some(raw) = raw {
                self.write_logprobs(row, &raw, token, scratch);
            }
        }
    }

    /// # Safety
    /// Nobody else may touch the row's outputs.
    unsafe fn write_logprobs(&self, row: usize, raw: &[f32], token: usize, scratch: &mut Vec<u32>) {
        let largest = dispatch(self.isa, Largest(raw));
        let total: f64 = raw.iter().map(|&x| f64::from(x - largest).exp()).sum();
        let logprob = |token: usize| (f64::from(raw[token] - largest) - total.ln()) as f32;
        let columns = row * MAX_TOP..(row + 1) * MAX_TOP;
        // SAFETY: the caller's promise.
        let (own, ids, logprobs) = unsafe {
            (
                &mut self.out.logprobs.get_mut(row..row + 1)[0],
                self.out.top_ids.get_mut(columns.clone()),
                self.out.top_logprobs.get_mut(columns),
            )
        };
        *own = logprob(token);
        if self.rows.logprobs[row] == 0 {
            return;
        }
        ids.fill(0);
        logprobs.fill(f32::NEG_INFINITY);
        most_likely(self.isa, raw, MAX_TOP.min(raw.len()), largest, scratch);
        for ((&mut ref mut id, &mut ref mut p), &top) in ids.iter_mut().zip(logprobs).zip(&*scratch)
        {
            (*id, *p) = (top as i32, logprob(top as usize));
        }
    }
}

impl LogitEdits {
    fn apply(&self, logits: &mut [f32], rows: &SampleRows, row: usize) {
        let range = |start: &[i32]| start[row] as usize..start[row + 1] as usize;
        let repetition = rows.repetition_penalty[row];
        for at in range(&self.seen_start) {
            let (value, count) = (
                &mut logits[self.seen_token[at] as usize],
                self.seen_count[at],
            );
            *value = if *value > 0.0 {
                *value / repetition
            } else {
                *value * repetition
            };
            *value -= count as f32 * rows.frequency_penalty[row];
            if count > 0 {
                *value -= rows.presence_penalty[row];
            }
        }
        for at in range(&self.bias_start) {
            logits[self.bias_token[at] as usize] += self.bias_value[at];
        }
    }
}

fn apply_mask(masks: &dyn TokenMasks, row: usize, logits: &mut [f32]) {
    let Ok(at) = masks.rows().binary_search(&row) else {
        return;
    };
    let words = logits.len().div_ceil(32);
    let mask = &masks.wait()[at * words..(at + 1) * words];
    for (values, word) in logits.chunks_mut(32).zip(mask) {
        for (bit, value) in values.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *value = f32::NEG_INFINITY;
            }
        }
    }
}

/// The most likely token, the lowest id among equals. 0 if there is no number.
pub(super) fn argmax(isa: Isa, logits: &[f32]) -> usize {
    let largest = dispatch(isa, Largest(logits));
    logits.iter().position(|&x| x >= largest).unwrap_or(0)
}

/// Restricts the distribution to the tokens that may be drawn.
struct Filter {
    top_k: usize,
    top_p: f32,
    min_p: f32,
}

impl Filter {
    /// The smallest of the `scaled` logits (the largest is 0) that is kept.
    fn threshold(&self, isa: Isa, scaled: &[f32], scratch: &mut Vec<u32>) -> f32 {
        let mut least = self.min_p.ln();
        let limited = (1..scaled.len()).contains(&self.top_k);
        if limited {
            most_likely(isa, scaled, self.top_k, 0.0, scratch);
            least = least.max(scaled[scratch[self.top_k - 1] as usize]);
            if self.top_p < 1.0 {
                // Tokens equal to the last one are kept too, and count.
                let limit = scaled[scratch[self.top_k - 1] as usize];
                let equals = scaled
                    .iter()
                    .filter(|&&x| x.to_bits() == limit.to_bits())
                    .count();
                let listed = scratch
                    .iter()
                    .filter(|&&i| scaled[i as usize].to_bits() == limit.to_bits());
                let more = equals - listed.count();
                let mut total: f64 = scratch.iter().map(|&i| weight(scaled[i as usize])).sum();
                total += more as f64 * weight(limit);
                least = least.max(self.share(scaled, scratch, total).unwrap_or(limit));
            }
        } else if self.top_p < 1.0 {
            let total = dispatch(isa, Weights(scaled));
            let mut depth = FIRST_DEPTH;
            loop {
                collect(isa, scaled, -depth, scratch);
                sort(scaled, scratch);
                if let Some(cut) = self.share(scaled, scratch, total) {
                    return least.max(cut);
                }
                if depth > 1e3 {
                    return least;
                }
                depth *= 2.0;
            }
        }
        least
    }

    /// The value at which the sorted `tokens` reach `top_p` of `total`.
    fn share(&self, scaled: &[f32], tokens: &[u32], total: f64) -> Option<f32> {
        let wanted = f64::from(self.top_p) * total;
        let mut mass = 0.0;
        tokens
            .iter()
            .map(|&token| scaled[token as usize])
            .find(|&x| {
                mass += weight(x);
                mass >= wanted
            })
    }
}

fn weight(scaled: f32) -> f64 {
    f64::from(scaled).exp()
}

/// Leaves the `count` largest in `found`, the largest first, and lower ids first among equals. `largest` is the largest of all.
fn most_likely(isa: Isa, logits: &[f32], count: usize, largest: f32, found: &mut Vec<u32>) {
    let mut depth = FIRST_DEPTH;
    loop {
        collect(isa, logits, largest - depth, found);
        if found.len() >= count || depth > 1e6 {
            break;
        }
        depth *= 2.0;
    }
    if found.len() < count {
        // Forbidden tokens are the least likely.
        found.clear();
        found.extend(0..logits.len() as u32);
    }
    let order = |&a: &u32, &b: &u32| {
        let (x, y) = (logits[a as usize], logits[b as usize]);
        y.total_cmp(&x).then(a.cmp(&b))
    };
    if found.len() > count {
        found.select_nth_unstable_by(count - 1, order);
        found.truncate(count);
    }
    found.sort_unstable_by(order);
}

fn sort(logits: &[f32], tokens: &mut [u32]) {
    tokens.sort_unstable_by(|&a, &b| {
        logits[b as usize]
            .total_cmp(&logits[a as usize])
            .then(a.cmp(&b))
    });
}

/// Leaves the tokens whose logits are at least `least` in `found`, in the order of their ids.
fn collect(isa: Isa, logits: &[f32], least: f32, found: &mut Vec<u32>) {
    found.clear();
    dispatch(
        isa,
        AtLeast {
            logits,
            least,
            found,
        },
    );
}

/// Subtracts the largest logit, and divides by the temperature.
fn scale(isa: Isa, logits: &mut [f32], temperature: f32) {
    // Finite even if every token is forbidden. Such a row then gives an arbitrary token instead of NaN.
    let largest = dispatch(isa, Largest(logits)).max(f32::MIN);
    for x in logits {
        *x = (*x - largest) / temperature;
    }
}

/// The first token, in the order of ids, at which the mass of the kept tokens exceeds `uniform` of the total.
fn draw(isa: Isa, scaled: &[f32], threshold: f32, uniform: f32, kept: &mut Vec<u32>) -> usize {
    if threshold > f32::NEG_INFINITY {
        collect(isa, scaled, threshold, kept);
        let total: f64 = kept
            .iter()
            .map(|&token| weight(scaled[token as usize]))
            .sum();
        let target = f64::from(uniform) * total;
        let mut mass = 0.0;
        let found = kept.iter().find(|&&token| {
            mass += weight(scaled[token as usize]);
            mass > target
        });
        return found
            .or(kept.last())
            .map_or(scaled.len() - 1, |&token| token as usize);
    }
    let sums: Vec<f64> = scaled
        .chunks(BLOCK)
        .map(|block| dispatch(isa, Weights(block)))
        .collect();
    let target = f64::from(uniform) * sums.iter().sum::<f64>();
    let mut mass = 0.0;
    for (at, sum) in sums.iter().enumerate() {
        if mass + sum > target {
            let first = at * BLOCK;
            let block = &scaled[first..scaled.len().min(first + BLOCK)];
            let found = block.iter().position(|&x| {
                mass += weight(x);
                mass > target
            });
            // The block's sum was rounded differently. This is its last token with any mass.
            let last = block.iter().rposition(|&x| weight(x) > 0.0);
            return first + found.or(last).unwrap_or(0);
        }
        mass += sum;
    }
    scaled.len() - 1
}

/// The largest number; the lowest float if there is none.
struct Largest<'a>(&'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut most = [s.splat(f32::NEG_INFINITY); 4];
        let mut chunks = self.0.chunks_exact(4 * S::LANES);
        for chunk in &mut chunks {
            for (i, most) in most.iter_mut().enumerate() {
                // SAFETY: the chunk is four vectors.
                *most = s.max(unsafe { s.load(chunk.as_ptr().add(i * S::LANES)) }, *most);
            }
        }
        let most = s.max(s.max(most[0], most[1]), s.max(most[2], most[3]));
        let rest = chunks.remainder().iter().copied();
        rest.fold(s.max_lane(most), f32::max)
    }
}

/// The sum of e^x.
struct Weights<'a>(&'a [f32]);

impl Kernel for Weights<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let mut total = 0.0;
        for block in self.0.chunks(BLOCK) {
            let mut sum = s.splat(0.0);
            let mut chunks = block.chunks_exact(S::LANES);
            for chunk in &mut chunks {
                // SAFETY: the chunk is one vector.
                sum = s.add(sum, exp(s, unsafe { s.load(chunk.as_ptr()) }));
            }
            total += f64::from(s.sum(sum));
            total += chunks.remainder().iter().map(|&x| weight(x)).sum::<f64>();
        }
        total
    }
}

struct AtLeast<'a> {
    logits: &'a [f32],
    least: f32,
    found: &'a mut Vec<u32>,
}

impl Kernel for AtLeast<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let least = s.splat(self.least);
        let mut chunks = self.logits.chunks_exact(S::LANES);
        let mut first = 0;
        for chunk in &mut chunks {
            // SAFETY: the chunk is one vector.
            let mut bits = s.at_least(unsafe { s.load(chunk.as_ptr()) }, least);
            while bits != 0 {
                self.found.push(first + bits.trailing_zeros());
                bits &= bits - 1;
            }
            first += S::LANES as u32;
        }
        let rest = chunks.remainder().iter().zip(first..);
        self.found.extend(
            rest.filter(|(x, _)| **x >= self.least)
                .map(|(_, token)| token),
        );
    }
}
