//! Tokenizes the inputs of an embedding request, within the model's limits.

use super::embed::{Cut, EmbedInput, EmbedSubmission, Truncation};
use super::embed_fields::FieldNames;
use crate::error::{Error, Result};
use crate::text::{PIECE_BYTES, Tokenizer};

/// Converts the inputs of an embedding request into tokens.
pub(super) struct EmbedTokens<'a> {
    /// Absent: inputs must be token ids.
    pub(super) tokenizer: Option<&'a Tokenizer>,
    /// Maximum number of tokens of an input.
    pub(super) max_len: usize,
    /// Token ids are below this number.
    pub(super) vocab_size: usize,
    pub(super) fields: &'a FieldNames,
    /// Called before each text, and before each piece of a long one. An error ends the work.
    pub(super) wanted: &'a dyn Fn() -> Result<()>,
}

impl EmbedTokens<'_> {
    /// Token ids of each input. A text that is too long is cut if the request allows it. Otherwise it is refused before it is
    /// tokenized, or as soon as too many of its tokens are known.
    ///
    /// # Errors
    /// `invalid_value` or `context_length_exceeded` (400) names the input at fault. Those of `wanted`.
    pub(super) fn of(&self, submission: &EmbedSubmission) -> Result<Vec<Vec<u32>>> {
        let inputs = submission.inputs.iter().enumerate();
        let most = submission.document_tokens;
        inputs
            .map(|(at, input)| {
                let ids = match submission.truncation {
                    None => self.whole(at, input, most)?,
                    Some(truncation) => self.truncated(at, input, truncation, most)?,
                };
                self.check(at, &ids)?;
                Ok(ids)
            })
            .collect()
    }

    fn whole(&self, at: usize, input: &EmbedInput, most: Option<usize>) -> Result<Vec<u32>> {
        match input {
            EmbedInput::Ids(ids) => Ok(ids.clone()),
            EmbedInput::Text(text) => self.text(at, text, true, self.max_len),
            EmbedInput::Document(text) => {
                let ids = self.document(at, text, self.max_len, most)?;
                self.tokenizer()?.with_special(&ids, None)
            }
            EmbedInput::Pair(first, second) => {
                let first = self.text(at, first, false, self.max_len)?;
                let second = self.document(at, second, self.max_len, most)?;
                self.tokenizer()?.with_special(&first, Some(&second))
            }
            EmbedInput::Framed(before, text, after) => {
                let before = self.text(at, before, false, self.max_len)?;
                let text = self.document(at, text, self.max_len, most)?;
                let after = self.text(at, after, false, self.max_len)?;
                Ok([before, text, after].concat())
            }
        }
    }

    fn truncated(
        &self,
        at: usize,
        input: &EmbedInput,
        Truncation { to, cut }: Truncation,
        most: Option<usize>,
    ) -> Result<Vec<u32>> {
        let limit = to.unwrap_or(self.max_len).min(self.max_len);
        let room = |taken: usize| {
            let room = limit.checked_sub(taken).filter(|&room| room > 0);
            room.ok_or_else(|| {
                let least = taken + 1;
                self.fields.truncation_error(
                    at,
                    &format!("an input can be truncated to {least} tokens or more, but "),
                    &format!(" was to be truncated to {limit}"),
                )
            })
        };
        match input {
            EmbedInput::Ids(ids) => Ok(shortened(ids.clone(), room(0)?, cut)),
            EmbedInput::Text(text) | EmbedInput::Document(text) => {
                let tokenizer = self.tokenizer()?;
                let room = room(tokenizer.special_tokens(false)?)?;
                let most = most.filter(|_| matches!(input, EmbedInput::Document(_)));
                let ids = self.document(at, text, usize::MAX, most)?;
                tokenizer.with_special(&shortened(ids, room, cut), None)
            }
            EmbedInput::Pair(first, second) => {
                let tokenizer = self.tokenizer()?;
                let special = tokenizer.special_tokens(true)?;
                let first = self.text(at, first, false, self.max_len)?;
                let room = room(special + first.len())?;
                let second = self.document(at, second, usize::MAX, most)?;
                tokenizer.with_special(&first, Some(&shortened(second, room, cut)))
            }
            EmbedInput::Framed(before, text, after) => {
                let before = self.text(at, before, false, self.max_len)?;
                let after = self.text(at, after, false, self.max_len)?;
                let room = room(before.len() + after.len())?;
                let text = self.document(at, text, usize::MAX, most)?;
                let text = shortened(text, room, cut);
                Ok([before, text, after].concat())
            }
        }
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.ok_or_else(|| {
            self.fields
                .inputs_error("must be token ids: this model has no tokenizer")
        })
    }

    /// Tokens of a document without special tokens. It may have at most `longest`, or is cut to `most`.
    fn document(
        &self,
        at: usize,
        text: &str,
        longest: usize,
        most: Option<usize>,
    ) -> Result<Vec<u32>> {
        let Some(most) = most else {
            return self.text(at, text, false, longest);
        };
        let ids = self.text(at, text, false, usize::MAX)?;
        Ok(shortened(ids, most, Cut::End))
    }

    fn text(&self, at: usize, text: &str, special: bool, most: usize) -> Result<Vec<u32>> {
        let watch = |tokens: usize| {
            (self.wanted)()?;
            if tokens > most {
                return Err(self.too_long(at, &format!("at least {tokens}")));
            }
            Ok(())
        };
        self.tokenizer()?
            .encode_watched(text, special, PIECE_BYTES, &watch)
    }

    fn check(&self, at: usize, ids: &[u32]) -> Result<()> {
        let vocab_size = self.vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            let bounds = format!("token ids must lie in [0, {vocab_size}), but ");
            return Err(self.fields.input_error(at, &bounds, &format!(" has {id}")));
        }
        if ids.is_empty() {
            let message = " has no tokens; at least one is needed";
            return Err(self.fields.input_error(at, "", message));
        }
        if ids.len() > self.max_len {
            return Err(self.too_long(at, &ids.len().to_string()));
        }
        Ok(())
    }

    fn too_long(&self, at: usize, tokens: &str) -> Error {
        let max_len = self.max_len;
        let limit = format!("an input may have at most {max_len} tokens, but ");
        let error = self
            .fields
            .input_error(at, &limit, &format!(" has {tokens}"));
        Error {
            code: "context_length_exceeded",
            ..error.with_detail("context_length", max_len)
        }
    }
}

fn shortened(mut ids: Vec<u32>, most: usize, cut: Cut) -> Vec<u32> {
    match cut {
        Cut::End => ids.truncate(most),
        Cut::Start => drop(ids.drain(..ids.len().saturating_sub(most))),
    }
    ids
}
