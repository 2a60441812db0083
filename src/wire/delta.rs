//! The result of a step for one choice: new text, tokens and their log-probabilities.

/// Numbers of tokens of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt: history and input.
    pub prompt_tokens: usize,
    /// Tokens of the session's history in the prompt.
    pub history_tokens: usize,
    /// Tokens of the prompt that were not computed again.
    pub cached_tokens: usize,
    /// Generated tokens.
    pub completion_tokens: usize,
}

/// A token with its log-probability and the most likely alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Its id.
    pub token: u32,
    /// The token's bytes, which may end within a character.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability. The first token of a prompt has none.
    pub logprob: Option<f32>,
    /// The most likely tokens, most likely first.
    pub top: Vec<Alternative>,
    /// Number of characters of the text that begin in it.
    pub chars: usize,
}

/// Number of characters that begin in `bytes`.
pub(super) fn chars(bytes: &[u8]) -> usize {
    const CONTINUATION: std::ops::RangeInclusive<u8> = 0x80..=0xbf;
    let begins = |byte: &&u8| !CONTINUATION.contains(*byte);
    bytes.iter().filter(begins).count()
}

impl TokenLogprob {
    /// A token of the text.
    pub fn new(token: u32, bytes: Vec<u8>, logprob: Option<f32>, top: Vec<Alternative>) -> Self {
        Self {
            token,
            chars: chars(&bytes),
            bytes,
            logprob,
            top,
        }
    }

    /// Approximate size on the wire.
    pub(super) fn wire_bytes(&self) -> usize {
        const NUMBERS: usize = 48;
        let others = self.top.iter().map(|other| NUMBERS + other.bytes.len());
        NUMBERS + self.bytes.len() + others.sum::<usize>()
    }
}

/// An alternative to a token.
#[derive(Debug, Clone, PartialEq)]
pub struct Alternative {
    /// Its id.
    pub token: u32,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// What one step added to a choice.
#[derive(Debug, Default)]
pub struct Delta {
    /// New text. Empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// Number of generated tokens so far.
    pub tokens: usize,
    /// Log-probabilities of the new tokens, if requested. Those of an echoed prompt come first.
    pub logprobs: Vec<TokenLogprob>,
    /// Log-probabilities of the prompt's tokens, if they are reported separately.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// The stop string that ended the text.
    pub stop_string: Option<String>,
    /// Ids of the new tokens, if requested.
    pub token_ids: Vec<u32>,
}
