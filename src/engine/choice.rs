//! One choice of a request while it runs: its text so far, its scores, its session's turn.

use std::sync::Arc;

use super::guide::Guide;
use super::lane_turn::OpenLaneTurn;
use super::prepare::Echo;
use super::said_answer::SaidAnswer;
use super::thoughts::ThoughtBudget;
use super::turn_guard::{FinishedTurn, TurnGuard};
use crate::guided::MaskRow;
use crate::kv::Owner;
use crate::request::{OnDisconnect, Retention, Submission, TurnKey};
use crate::sched::{FinishReason, Sequence};
use crate::session::{AdapterDigest, Commit, Logprobs, SessionUsage, Turn};
use crate::text::{Detokenizer, StopMatcher, Tail};
use crate::wire::{Delta, TokenLogprob, Usage};

/// A session's turn while it runs.
#[derive(Debug)]
pub(super) struct OpenTurn {
    pub(super) lease: TurnGuard,
    pub(super) turns: Vec<Turn>,
    pub(super) system_tokens: usize,
    pub(super) end: bool,
    pub(super) on_disconnect: OnDisconnect,
    pub(super) owner: Owner,
    pub(super) adapter: Option<AdapterDigest>,
    pub(super) retention: Option<Retention>,
    pub(super) key: Option<TurnKey>,
}

/// Who gets the log-probabilities of a prompt, and with how many alternatives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scoring {
    echo: Option<u32>,
    report: Option<u32>,
    /// Number of leading prompt tokens that are not part of the echoed text.
    added: usize,
}

impl Scoring {
    pub(super) fn of(submission: &Submission, echo: Option<&Echo>) -> Self {
        Self {
            added: echo.map_or(0, |echo| echo.added),
            echo: submission.sampling.logprobs.filter(|_| submission.echo),
            report: submission.prompt_logprobs,
        }
    }

    /// Adds a prompt token to the next delta.
    pub(super) fn push(&mut self, delta: &mut Delta, mut token: TokenLogprob) {
        if self.added > 0 {
            self.added -= 1;
            token.chars = 0;
        }
        for (alternatives, list) in [
            (self.echo, &mut delta.logprobs),
            (self.report, &mut delta.prompt_logprobs),
        ] {
            if let Some(k) = alternatives {
                let mut token = token.clone();
                token.top.truncate(k as usize);
                list.push(token);
            }
        }
    }
}

/// One choice of a request while it runs.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) detokenizer: Detokenizer,
    pub(super) matcher: StopMatcher,
    pub(super) tokens: usize,
    pub(super) delta: Delta,
    pub(super) prompt_tokens: usize,
    pub(super) history_tokens: usize,
    pub(super) seed: u64,
    pub(super) tail: Tail,
    pub(super) wants_logprobs: bool,
    pub(super) wants_ids: bool,
    /// Log-probabilities of its tokens so far, if its session stores them.
    pub(super) logprobs: Option<Vec<f32>>,
    pub(super) scoring: Scoring,
    pub(super) guide: Option<Guide>,
    pub(super) thoughts: Option<ThoughtBudget>,
    /// Special tokens that are part of the text.
    pub(super) markers: Arc<[u32]>,
    pub(super) turn: Option<OpenTurn>,
    pub(super) lane: Option<OpenLaneTurn>,
    /// The stored answer that it repeats, and the token that ends it.
    pub(super) said: Option<(SaidAnswer, Option<u32>)>,
}

impl Choice {
    /// The mask of its row in a step, if something restricts the next token.
    pub(super) fn mask_row(&self, row: usize) -> Option<MaskRow> {
        if let Some((said, end)) = &self.said {
            return said.mask_row(row, self.tokens, *end);
        }
        let thoughts = self.thoughts.as_ref();
        let forced = thoughts.and_then(|thoughts| thoughts.mask_row(row));
        // Wherever thoughts are allowed, the grammar also allows their end.
        forced.or_else(|| Some(self.guide.as_ref()?.mask_row(row, self.tokens)))
    }
}

/// The tokens of a sequence that has ended, without the token that ended the answer: the next turn writes that token itself.
pub(super) fn kept_tokens(sequence: &Sequence, reason: FinishReason) -> &[u32] {
    let tokens = sequence.tokens();
    let ends = reason == FinishReason::Stop && sequence.ended_by_token();
    &tokens[..tokens.len() - usize::from(ends)]
}

/// The log-probabilities of a turn's output, if every token has one.
fn logprobs_of(choice: &Choice, output_tokens: usize) -> Option<Logprobs> {
    let scored = choice.logprobs.as_ref()?.get(..output_tokens)?;
    Some(Logprobs::new(scored.iter().copied()))
}

pub(super) fn finished_turn(
    turn: OpenTurn,
    choice: &Choice,
    sequence: &Sequence,
    reason: FinishReason,
    usage: Usage,
) -> FinishedTurn {
    let tokens = kept_tokens(sequence, reason).to_vec();
    let mut turns = turn.turns;
    // If a session has no turns, its kept tokens are the system prompt. They belong to the first turn.
    let start = if turns.is_empty() {
        0
    } else {
        choice.history_tokens
    };
    if tokens.len() > start {
        turns.push(Turn {
            start,
            input_tokens: choice.prompt_tokens - start,
            output_tokens: tokens.len() - choice.prompt_tokens,
            tail: choice.tail,
            logprobs: logprobs_of(choice, tokens.len() - choice.prompt_tokens),
            key: turn.key,
        });
    }
    let commit = Commit {
        tokens,
        turns,
        seed: choice.seed,
        system_tokens: turn.system_tokens,
        adapter: turn.adapter,
        end: turn.end,
        usage: SessionUsage {
            prompt_tokens: usage.prompt_tokens as u64,
            cached_tokens: usage.cached_tokens as u64,
            generated_tokens: usage.completion_tokens as u64,
            // The engine's thread knows when the request arrived, and sets it.
            time_ms: 0,
        },
        hold_ms: match turn.retention {
            Some(Retention::Hold { ms }) => Some(ms),
            Some(Retention::GiveUp) | None => None,
        },
        created_ms: None,
    };
    FinishedTurn {
        lease: turn.lease,
        commit,
    }
}
