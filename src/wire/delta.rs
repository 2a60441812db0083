//! What a step says of a choice: new text, tokens and their log-probabilities.

/// Tokens of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Everything the model saw: history and input.
    pub prompt_tokens: usize,
    /// Of these, the session's history.
    pub history_tokens: usize,
    /// Of the prompt, what was not computed again.
    pub cached_tokens: usize,
    /// Generated.
    pub completion_tokens: usize,
}

/// A token with its log-probability and the most likely alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Its id.
    pub token: u32,
    /// The token's bytes; not always whole characters.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability; the first token of a prompt has none.
    pub logprob: Option<f32>,
    /// The most likely tokens, best first.
    pub top: Vec<Alternative>,
    /// Characters of the text that begin in it.
    pub chars: usize,
}

/// Characters that begin in `bytes`.
pub(super) fn chars(bytes: &[u8]) -> usize {
    const CONTINUATION: std::ops::RangeInclusive<u8> = 0x80..=0xbf;
    let begins = |byte: &&u8| !CONTINUATION.contains(*byte);
    bytes.iter().filter(begins).count()
}

impl TokenLogprob {
    /// A token that is in the text.
    pub fn new(token: u32, bytes: Vec<u8>, logprob: Option<f32>, top: Vec<Alternative>) -> Self {
        Self {
            token,
            chars: chars(&bytes),
            bytes,
            logprob,
            top,
        }
    }

    /// About what it takes on the wire.
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
    /// New text; empty while characters or stop strings are incomplete.
    pub text: String,
    /// Generated tokens so far.
    pub tokens: usize,
    /// Log-probabilities of the new tokens, where asked for; those of an echoed prompt come first.
    pub logprobs: Vec<TokenLogprob>,
    /// Log-probabilities of the prompt's tokens, where they are reported by themselves.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// The stop string that ended it.
    pub stop_string: Option<String>,
    /// Ids of the new tokens, where asked for.
    pub token_ids: Vec<u32>,
}
