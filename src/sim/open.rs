//! What a request that has not ended must come to, by its tokens alone.

use super::check::{Check, ensure};
use super::lane_book::OpenLane;
use super::next_token;
use super::toy::nearest;
use super::vocabulary::{END_TOKEN, Guide, VOCAB_SIZE};
use crate::engine::Abort;
use crate::request::{SessionRef, StopParams};
use crate::sched::FinishReason;
use crate::session::SessionKey;
use crate::text::Tokenizer;
use crate::wire::Usage;

/// One answer of an admitted request.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) tokens: Vec<u32>,
    pub(super) text: String,
    /// Of the tokens, those that the client was told of.
    pub(super) told: usize,
    pub(super) ended: bool,
}

/// What is wrong with a request that the model cannot compute to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A step that holds it fails.
    FailsSteps,
    /// Its logits are not finite.
    NotFinite,
    /// Whoever prepares it panics.
    Panics,
}

impl Fault {
    pub(super) const fn code(self) -> &'static str {
        match self {
            Self::FailsSteps | Self::Panics => "internal_error",
            Self::NotFinite => "numerical_error",
        }
    }
}

/// A request that was submitted and has not ended.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) prompt: Vec<u32>,
    pub(super) history_tokens: usize,
    pub(super) max_tokens: usize,
    pub(super) stopping: StopParams,
    pub(super) guide: Option<Guide>,
    pub(super) session: Option<(SessionKey, SessionRef)>,
    /// Where the turns that it builds on end.
    pub(super) turns: Vec<usize>,
    pub(super) answers: Vec<Answer>,
    pub(super) aborted: Option<Abort>,
    /// The core knows of it.
    pub(super) admitted: bool,
    pub(super) fault: Option<Fault>,
    /// Where its turn is kept if it goes well.
    pub(super) lane: Option<OpenLane>,
}

impl Open {
    /// The token that the model must give next.
    pub(super) fn expected(&self, choice: usize) -> u32 {
        let tokens = &self.answers[choice].tokens;
        let context = [&self.prompt[..], tokens].concat();
        let token = next_token(&context, VOCAB_SIZE as usize);
        let Some(guide) = &self.guide else {
            return token;
        };
        let ends = &self.stopping.stop_token_ids;
        let held_off = tokens.len() < self.stopping.min_tokens as usize;
        nearest(token, VOCAB_SIZE as usize, |token| {
            guide.allows(token, tokens.len(), ends, held_off)
        })
    }

    fn is_stop_token(&self, token: u32) -> bool {
        // The end of a grammar is no end that a client can have ignored.
        self.stopping.stop_token_ids.contains(&token)
            || (token == END_TOKEN && (self.guide.is_some() || !self.stopping.ignore_eos))
    }

    /// Whether an answer of so many tokens has all that its grammar allows.
    fn is_complete(&self, tokens: usize) -> bool {
        self.guide.is_some_and(|guide| guide.most == tokens)
    }

    /// All tokens once the only answer has ended, without the one that ends it.
    pub(super) fn kept_tokens(&self, reason: FinishReason) -> Vec<u32> {
        let answer = &self.answers[0].tokens;
        let held_off = answer.len() <= self.stopping.min_tokens as usize;
        let ends =
            |&token: &u32| reason == FinishReason::Stop && !held_off && self.is_stop_token(token);
        let end = answer.len() - usize::from(answer.last().is_some_and(ends));
        [&self.prompt[..], &answer[..end]].concat()
    }

    /// Whether a stop string cut the only answer.
    pub(super) fn is_cut(&self, reason: FinishReason, tokenizer: &Tokenizer) -> bool {
        let tokens = self.kept_tokens(reason);
        let answer = &tokens[self.prompt.len()..];
        let text = tokenizer.decode(answer, self.stopping.skip_special_tokens);
        self.first_stop(&text).is_some()
    }

    fn first_stop(&self, text: &str) -> Option<(usize, usize)> {
        let found = self.stopping.stop.iter();
        found
            .filter_map(|stop| text.find(stop).map(|at| (at, stop.len())))
            .min()
    }

    /// Whether an answer has had its last token.
    pub(super) fn has_ended(&self, choice: usize, tokenizer: &Tokenizer) -> bool {
        let tokens = &self.answers[choice].tokens;
        let Some((&last, before)) = tokens.split_last() else {
            return false;
        };
        if tokens.len() == self.max_tokens || self.is_complete(tokens.len()) {
            return true;
        }
        if before.len() >= self.stopping.min_tokens as usize && self.is_stop_token(last) {
            return true;
        }
        let text = tokenizer.decode(tokens, self.stopping.skip_special_tokens);
        self.first_stop(&text).is_some()
    }

    /// Holds an answer that just ended to what its tokens alone say.
    pub(super) fn check_end(
        &self,
        choice: usize,
        reason: FinishReason,
        usage: Usage,
        tokenizer: &Tokenizer,
    ) -> Check {
        let answer = &self.answers[choice];
        let count = answer.tokens.len();
        let expected = Usage {
            prompt_tokens: self.prompt.len(),
            history_tokens: self.history_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: count,
        };
        ensure(usage == expected, || format!("{usage:?}, not {expected:?}"))?;
        ensure(usage.cached_tokens < self.prompt.len(), || {
            format!("all is cached: {usage:?}")
        })?;
        let stops_at = |at: usize| {
            at >= self.stopping.min_tokens as usize && self.is_stop_token(answer.tokens[at])
        };
        ensure(!(0..count.saturating_sub(1)).any(stops_at), || {
            "ran past a stop token".into()
        })?;
        let by_token = count > 0 && stops_at(count - 1);
        let skip = self.stopping.skip_special_tokens;
        let decode = |end: usize| tokenizer.decode(&answer.tokens[..end], skip);
        let mut text = decode(if by_token { count - 1 } else { count });
        if count > 0 {
            ensure(self.first_stop(&decode(count - 1)).is_none(), || {
                "ran past a stop string".into()
            })?;
        }
        let by_text = self.first_stop(&text);
        if let Some((at, len)) = by_text {
            text.truncate(at + if self.stopping.include_stop { len } else { 0 });
        }
        ensure(answer.text == text, || {
            format!("the text is {:?}, not {text:?}", answer.text)
        })?;
        let by_itself = by_token || by_text.is_some() || self.is_complete(count);
        let expected = match reason {
            FinishReason::Abort => self.aborted.is_some() && !by_itself,
            FinishReason::Stop => by_itself,
            FinishReason::Length => count == self.max_tokens && !by_itself,
        };
        ensure(expected && count <= self.max_tokens, || {
            format!(
                "ended by {reason:?} after {count} of {} tokens",
                self.max_tokens
            )
        })
    }
}
