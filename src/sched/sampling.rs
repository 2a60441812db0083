//! Randomness and token statistics of sampling. They are pure functions, so that a seed reproduces everything.

use std::collections::HashMap;

/// `SplitMix64`'s finalizer (Steele, Lea and Flood 2014): a bijection of 64 bits that scatters neighbours.
const fn scatter(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The random number in [0, 1) that chooses the token at `position` of a sequence with `seed`. It depends on nothing else, so a
/// request gets the same tokens whatever else is in the batch.
pub fn uniform(seed: u64, position: u64) -> f32 {
    let bits =
        scatter(seed.wrapping_add(position.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    // An f32 below 1 has 24 bits.
    (bits >> 40) as f32 / (1_u32 << 24) as f32
}

/// The seed of choice `index` of a request with `seed`; choice 0 keeps it.
pub const fn mix_seed(seed: u64, index: u32) -> u64 {
    if index == 0 {
        seed
    } else {
        scatter(seed ^ ((index as u64) << 32))
    }
}

/// The distinct tokens of a sequence with their numbers of occurrences in the output, in order of first occurrence.
#[derive(Debug, Clone, Default)]
pub struct SeenTokens {
    at: HashMap<u32, usize>,
    tokens: Vec<i32>,
    counts: Vec<i32>,
}

impl SeenTokens {
    /// Notes the tokens of a prompt, which count as seen but not as output.
    pub fn from_prompt(prompt: &[u32]) -> Self {
        let mut seen = Self::default();
        for &token in prompt {
            seen.note(token, 0);
        }
        seen
    }

    fn note(&mut self, token: u32, count: i32) {
        let at = *self.at.entry(token).or_insert_with(|| {
            self.tokens.push(token as i32);
            self.counts.push(0);
            self.tokens.len() - 1
        });
        self.counts[at] += count;
    }

    /// Notes one token of the output.
    pub fn push(&mut self, token: u32) {
        self.note(token, 1);
    }

    /// Appends the distinct tokens and their occurrences in the output, with `more` at its end.
    pub(super) fn append_with(&self, more: &[u32], tokens: &mut Vec<i32>, counts: &mut Vec<i32>) {
        let first = tokens.len();
        tokens.extend_from_slice(&self.tokens);
        counts.extend_from_slice(&self.counts);
        let new = tokens.len();
        for &token in more {
            let known = self.at.get(&token).map(|at| first + at);
            let at = known.or_else(|| (new..tokens.len()).find(|&at| tokens[at] == token as i32));
            if let Some(at) = at {
                counts[at] += 1;
            } else {
                tokens.push(token as i32);
                counts.push(1);
            }
        }
    }

    /// Distinct tokens.
    pub fn tokens(&self) -> &[i32] {
        &self.tokens
    }

    /// Occurrences in the output, aligned with [`Self::tokens`].
    pub fn counts(&self) -> &[i32] {
        &self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_is_a_function_of_seed_and_position_and_spreads_evenly() {
        assert!((uniform(7, 3) - uniform(7, 3)).abs() < f32::EPSILON);
        let mut buckets = [0_u32; 16];
        for position in 0..16_000 {
            let u = uniform(1, position);
            assert!((0.0..1.0).contains(&u));
            buckets[(u * 16.0) as usize] += 1;
        }
        assert!(
            buckets.iter().all(|&n| (850..1150).contains(&n)),
            "{buckets:?}"
        );
    }

    #[test]
    fn choices_have_seeds_of_their_own() {
        assert_eq!(mix_seed(5, 0), 5);
        assert_ne!(mix_seed(5, 1), mix_seed(5, 2));
    }

    #[test]
    fn seen_tokens_count_the_output_alone() {
        let mut seen = SeenTokens::from_prompt(&[4, 9, 4]);
        seen.push(9);
        seen.push(9);
        seen.push(2);
        assert_eq!(seen.tokens(), [4, 9, 2]);
        assert_eq!(seen.counts(), [0, 2, 1]);
    }

    #[test]
    fn seen_tokens_with_more_are_those_of_the_longer_output() {
        let mut seen = SeenTokens::from_prompt(&[4, 9, 4]);
        seen.push(9);
        let more = [4, 7, 9, 7, 3];
        let (mut tokens, mut counts) = (vec![1], vec![1]);
        seen.append_with(&more, &mut tokens, &mut counts);
        for token in more {
            seen.push(token);
        }
        assert_eq!(tokens[1..], *seen.tokens());
        assert_eq!(counts[1..], *seen.counts());
    }
}
