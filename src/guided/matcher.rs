//! The state of one answer in its grammar.

use crate::error::{Error, Kind, Result};

/// The state of one sequence in its grammar. It follows the committed tokens, and computes which tokens may come next.
pub struct Matcher {
    inner: llguidance::Matcher,
    vocab_size: usize,
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher")
            .field("stop_reason", &self.inner.stop_reason())
            .finish_non_exhaustive()
    }
}

/// How a failure of the grammar is reported to the client of its request.
fn too_complex(error: &impl std::fmt::Display) -> Error {
    let message = format!(
        "the answer cannot continue within its grammar: {}",
        reason(&error.to_string())
    );
    Error::new(Kind::Invalid, "grammar_too_complex", message)
}

/// The message if no token can come next. The library has none for this case.
const DEAD_END: &str = "no text can follow here; a schema that requires itself endlessly, or whose parts \
    contradict each other, allows no text at all";

/// The library's message without the parser state at its end.
pub(super) fn reason(error: &str) -> &str {
    let end = error.find("\n<").unwrap_or(error.len());
    match error[..end].trim() {
        "NoExtensionBias" => DEAD_END,
        words => words,
    }
}

impl Matcher {
    pub(super) const fn new(inner: llguidance::Matcher, vocab_size: usize) -> Self {
        Self { inner, vocab_size }
    }

    /// An independent copy. It shares nothing, so one sequence cannot slow down or spoil another.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self::new(self.inner.deep_clone(), self.vocab_size)
    }

    /// Number of 32-bit words of a mask.
    pub(super) const fn mask_words(&self) -> usize {
        self.vocab_size.div_ceil(32)
    }

    /// Advances by a committed token. Returns true if the text is complete and nothing can follow.
    ///
    /// # Errors
    /// `grammar_too_complex` (400) if the token is not allowed, or the grammar reaches a limit.
    pub fn consume(&mut self, token: u32) -> Result<bool> {
        self.inner
            .consume_token(token)
            .map_err(|e| too_complex(&e))?;
        Ok(self.inner.is_stopped())
    }

    /// The allowed tokens as bits, 32 per word, least significant first. Where the text may end, `stop_tokens` are allowed too.
    /// `hold_off_stop` forbids these and the model's end tokens as long as another token is allowed.
    ///
    /// # Errors
    /// `grammar_too_complex` (400) if the grammar reaches a limit.
    pub fn mask(
        &mut self,
        end_tokens: &[u32],
        stop_tokens: &[u32],
        hold_off_stop: bool,
    ) -> Result<Vec<u32>> {
        let mask = self
            .inner
            .compute_mask_or_eos()
            .map_err(|e| too_complex(&e))?;
        let mut bits = mask.as_slice().to_vec();
        bits.resize(self.mask_words(), 0);
        let ends = || end_tokens.iter().chain(stop_tokens).copied();
        if hold_off_stop {
            let kept = bits.clone();
            ends().for_each(|token| set(&mut bits, token, false));
            if bits.iter().all(|&word| word == 0) {
                bits = kept;
            }
        } else if end_tokens.iter().any(|&token| get(&bits, token)) {
            ends().for_each(|token| set(&mut bits, token, true));
        }
        Ok(bits)
    }
}

fn get(bits: &[u32], token: u32) -> bool {
    bits.get(token as usize / 32)
        .is_some_and(|word| word >> (token % 32) & 1 == 1)
}

pub(super) fn set(bits: &mut [u32], token: u32, allowed: bool) {
    if let Some(word) = bits.get_mut(token as usize / 32) {
        let bit = 1 << (token % 32);
        *word = if allowed { *word | bit } else { *word & !bit };
    }
}
