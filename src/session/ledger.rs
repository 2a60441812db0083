//! What a session remembers of its turns beside their tokens: what they used, and how likely what they sampled was.

use std::ops::Add;
use std::sync::Arc;

/// What turns have used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionUsage {
    /// Tokens that the model saw: history and input of every turn.
    pub prompt_tokens: u64,
    /// Of these, the ones that were not computed again.
    pub cached_tokens: u64,
    /// Tokens that were generated, those that end answers included.
    pub generated_tokens: u64,
    /// Milliseconds from the turns' arrivals to their ends.
    pub time_ms: u64,
}

impl SessionUsage {
    /// Bytes in a log.
    pub(super) const BYTES: usize = 4 * 8;

    /// Tokens of prompts that were computed.
    pub const fn computed_tokens(&self) -> u64 {
        self.prompt_tokens.saturating_sub(self.cached_tokens)
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let numbers = [
            self.prompt_tokens,
            self.cached_tokens,
            self.generated_tokens,
            self.time_ms,
        ];
        for number in numbers {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }

    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (numbers, rest) = bytes.as_chunks::<8>();
        let [prompt, cached, generated, time] = *<&[[u8; 8]; 4]>::try_from(numbers).ok()?;
        rest.is_empty().then(|| Self {
            prompt_tokens: u64::from_le_bytes(prompt),
            cached_tokens: u64::from_le_bytes(cached),
            generated_tokens: u64::from_le_bytes(generated),
            time_ms: u64::from_le_bytes(time),
        })
    }
}

impl Add for SessionUsage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            cached_tokens: self.cached_tokens + other.cached_tokens,
            generated_tokens: self.generated_tokens + other.generated_tokens,
            time_ms: self.time_ms + other.time_ms,
        }
    }
}

/// Log-probabilities of a turn's sampled tokens, bit for bit. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logprobs(Arc<[u32]>);

impl Logprobs {
    /// Of one value for each token.
    pub fn new(values: impl IntoIterator<Item = f32>) -> Self {
        Self(values.into_iter().map(f32::to_bits).collect())
    }

    /// The values.
    pub fn values(&self) -> impl ExactSizeIterator<Item = f32> {
        self.0.iter().map(|&bits| f32::from_bits(bits))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        for bits in &*self.0 {
            out.extend_from_slice(&bits.to_le_bytes());
        }
    }

    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (values, rest) = bytes.as_chunks::<4>();
        let bits = values.iter().map(|&value| u32::from_le_bytes(value));
        rest.is_empty().then(|| Self(bits.collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_come_back_from_their_bytes_and_from_no_others() {
        let usage = SessionUsage {
            prompt_tokens: 1,
            cached_tokens: 2,
            generated_tokens: u64::MAX,
            time_ms: 4,
        };
        let mut bytes = Vec::new();
        usage.write(&mut bytes);
        assert_eq!(bytes.len(), SessionUsage::BYTES);
        assert_eq!(SessionUsage::parse(&bytes), Some(usage));
        assert_eq!(SessionUsage::parse(&bytes[1..]), None);
        let logprobs = Logprobs::new([-0.0, f32::NEG_INFINITY, -1.5e-42]);
        let mut bytes = Vec::new();
        logprobs.write(&mut bytes);
        assert_eq!(Logprobs::parse(&bytes), Some(logprobs));
        assert_eq!(Logprobs::parse(&bytes[1..]), None);
    }
}
