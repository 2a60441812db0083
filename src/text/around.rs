//! Adds the special tokens that a model expects around a text, or around two texts that it compares.

use tokenizers::{Encoding, PostProcessor, Token};

use super::tokenizer::{Tokenizer, guarded, not_tokenized};
use crate::error::Result;

impl Tokenizer {
    /// The tokens of a text, or of two, with the special tokens that the model expects around them.
    ///
    /// # Errors
    /// `invalid_value` if the tokenizer's rules for them are malformed.
    pub fn with_special(&self, first: &[u32], second: Option<&[u32]>) -> Result<Vec<u32>> {
        let encoding = |ids: &[u32]| {
            let token = |&id: &u32| Token {
                id,
                value: self.inner.id_to_token(id).unwrap_or_default(),
                offsets: (0, 0),
            };
            Encoding::from_tokens(ids.iter().map(token).collect(), 0)
        };
        let whole = guarded(|| {
            let (first, second) = (encoding(first), second.map(encoding));
            self.inner.post_process(first, second, true)
        });
        Ok(whole.map_err(not_tokenized)?.get_ids().to_vec())
    }

    /// Number of tokens that [`with_special`](Self::with_special) adds.
    ///
    /// # Errors
    /// As [`with_special`](Self::with_special).
    pub fn special_tokens(&self, pair: bool) -> Result<usize> {
        let added = guarded(|| {
            let processor = self.inner.get_post_processor();
            Ok(processor.map_or(0, |processor| processor.added_tokens(pair)))
        });
        added.map_err(not_tokenized)
    }
}
