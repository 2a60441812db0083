//! Converts a valid submission into tokens: template, tokenizer, lengths. This is a pure function. It runs on the preparing pool,
//! never on an event loop.

use super::answer::{answer_format, answer_grammar};
use super::config::Limits;
use super::encode::{check_embedded, check_vocabulary, encode};
use super::lane_turn::OpenLaneTurn;
use super::said_answer::SaidAnswer;
use super::thoughts::ThoughtLimit;
use crate::error::{Error, Kind, Result};
use crate::guided::{Grammar, Matcher};
use crate::request::{Input, Submission};
use crate::session::{Turn, TurnBefore, TurnHistory};
use crate::text::{ChatTemplate, PIECE_BYTES, Tail, Tokenizer, Watch};
use crate::wire::answer::AnswerFormat;

/// A request as tokens.
#[derive(Debug)]
pub struct Prepared {
    /// History and input.
    pub prompt: Vec<u32>,
    /// Number of leading tokens of `prompt` that are the session's history.
    pub history_tokens: usize,
    /// Number of input tokens of this turn.
    pub input_tokens: usize,
    /// Maximum number of tokens to generate.
    pub max_tokens: usize,
    /// The session's turns that are kept, with their offsets in `prompt`.
    pub turns: Vec<Turn>,
    /// Number of leading tokens that are the system prompt.
    pub system_tokens: usize,
    /// Lengths of `prompt` after which another prompt may continue, if the model needs a snapshot of its state there.
    pub borders: Vec<usize>,
    /// Whether the assistant's message is open after the input.
    pub tail: Tail,
    /// The prompt to echo, if the request asks for it.
    pub echo: Option<Echo>,
    /// One matcher per choice, if the answer follows a grammar. Set once the grammar is compiled.
    pub matchers: Vec<Matcher>,
    /// The grammar of the answer, until it is compiled.
    pub grammar: Option<Grammar>,
    /// How the answer is parsed.
    pub answer: AnswerFormat,
    /// Special tokens that are markers in the answer, and so part of its text.
    pub markers: Vec<u32>,
    /// The limit of thinking tokens.
    pub thoughts: Option<ThoughtLimit>,
    /// The turn of its lane.
    pub lane: Option<OpenLaneTurn>,
    /// The stored answer, if the request repeats a committed turn.
    pub said: Option<SaidAnswer>,
}

impl Prepared {
    /// Turns this into a request that repeats the turn after `before`, whatever history it was prepared with. It is not committed,
    /// and its input is not charged again.
    pub(super) fn saying_again(self, before: TurnBefore, limits: Limits) -> Self {
        let room = limits.context_length.saturating_sub(before.prompt.len());
        Self {
            max_tokens: self.max_tokens.min(room),
            history_tokens: before.history_tokens,
            input_tokens: 0,
            turns: Vec::new(),
            said: Some(SaidAnswer::new(before.output, limits.vocab_size)),
            prompt: before.prompt,
            borders: Vec::new(),
            lane: None,
            ..self
        }
    }
}

/// A prompt that is written before its output.
#[derive(Debug, PartialEq, Eq)]
pub struct Echo {
    /// The given text, or the text of the given token ids.
    pub text: String,
    /// Number of leading tokens of the prompt that the tokenizer adds and that are not in the text.
    pub added: usize,
}

/// Renders and tokenizes a submission, and checks that history, input and output fit into the context. A text that cannot fit is
/// refused before it is tokenized, or as soon as too many of its tokens are known. `wanted` is called before each piece of a long
/// text; its error ends the work.
///
/// # Errors
/// 400: the template refuses the messages, a token is outside the vocabulary, the prompt is empty, or `context_length_exceeded`.
/// Those of `wanted`.
pub fn prepare(
    submission: &Submission,
    base: TurnHistory,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
    limits: Limits,
    wanted: &dyn Fn() -> Result<()>,
) -> Result<Prepared> {
    check_token_ids(submission, limits.vocab_size)?;
    let mut base = base;
    let first = base.turns.is_empty();
    let requested = submission.stopping.max_tokens.map(|n| n as usize);
    let on_overflow = submission.on_overflow;
    // Dropping turns makes room for the input, but the input alone must still fit into the context.
    let kept = if on_overflow.drops_turns() {
        0
    } else {
        base.history.len()
    };
    let room = limits.context_length.saturating_sub(kept);
    let watch = |tokens| {
        wanted()?;
        if tokens > room {
            return Err(overflow(
                submission,
                limits.context_length,
                kept,
                tokens,
                true,
            ));
        }
        Ok(())
    };
    let encode =
        |base: &TurnHistory| encode(submission, base, first, tokenizer, template, limits, &watch);
    let mut encoded = encode(&base)?;
    if on_overflow.drops_turns() && !first {
        // A request without an output limit, or with one that may be lowered, needs room for one token at least.
        let output = requested.filter(|_| !on_overflow.truncates()).unwrap_or(1);
        let limit = limits
            .context_length
            .saturating_sub(encoded.input.len() + output);
        drop_oldest_turns(&mut base, limit);
        if base.turns.is_empty() && base.tail == Tail::OpenAssistant {
            // The dropped turns contained the answer that the input would close.
            base.tail = Tail::Closed;
            encoded = encode(&base)?;
        }
    }
    check_embedded(submission, &encoded.input, tokenizer, limits.vocab_size)?;
    let echo = echo(submission, &encoded.input, tokenizer, &watch)?;
    let TurnHistory {
        history: mut prompt,
        turns,
        system_tokens,
        ..
    } = base;
    let system_tokens = if first {
        encoded.system_tokens
    } else {
        system_tokens
    };
    let (history_tokens, input_tokens) = (prompt.len(), encoded.input.len());
    prompt.extend_from_slice(&encoded.input);
    if prompt.is_empty() {
        return Err(Error::invalid(
            "prompt",
            "the prompt has no tokens; at least one is needed",
        ));
    }
    let room = limits.context_length.checked_sub(prompt.len());
    let max_tokens = match (requested, room) {
        (Some(n), Some(room)) if n <= room => n,
        (None, Some(room)) if room > 0 => submission
            .stopping
            .default_max_tokens
            .map_or(room, |n| room.min(n as usize)),
        (Some(_), Some(room)) if on_overflow.truncates() && room > 0 => room,
        _ => {
            return Err(overflow(
                submission,
                limits.context_length,
                history_tokens,
                input_tokens,
                false,
            ));
        }
    };
    let thoughts = ThoughtLimit::of(submission, encoded.thinking, tokenizer, limits.vocab_size)?;
    let (answer, markers) = answer_format(submission, encoded.thinking, tokenizer, template);
    let grammar = answer_grammar(submission, encoded.thinking, template).grammar(tokenizer)?;
    Ok(Prepared {
        prompt,
        history_tokens,
        input_tokens,
        max_tokens,
        turns,
        system_tokens,
        borders: encoded.borders,
        tail: encoded.tail,
        echo,
        matchers: Vec::new(),
        grammar,
        answer,
        markers,
        thoughts,
        lane: None,
        said: None,
    })
}

fn echo(
    submission: &Submission,
    prompt: &[u32],
    tokenizer: Option<&Tokenizer>,
    watch: &Watch<'_>,
) -> Result<Option<Echo>> {
    let Some(tokenizer) = tokenizer.filter(|_| submission.echo) else {
        return Ok(None);
    };
    Ok(match &submission.input {
        Input::Text { text } => {
            let bare = tokenizer.encode_watched(text, false, PIECE_BYTES, watch)?;
            Some(Echo {
                text: text.clone(),
                added: if prompt.ends_with(&bare) {
                    prompt.len() - bare.len()
                } else {
                    0
                },
            })
        }
        Input::Tokens { ids } => Some(Echo {
            text: tokenizer.decode(ids, false),
            added: 0,
        }),
        Input::Turn { .. } | Input::Messages { .. } => None,
    })
}

/// Checks the ids that reach the sampler. An id outside the logits would fail the step of the whole batch.
fn check_token_ids(submission: &Submission, vocab_size: usize) -> Result<()> {
    let biased = submission.sampling.logit_bias.iter().map(|&(id, _)| id);
    check_vocabulary("logit_bias", biased, vocab_size)?;
    let stops = submission.stopping.stop_token_ids.iter().copied();
    check_vocabulary("stop_token_ids", stops, vocab_size)
}

/// `cut_short`: the input was not tokenized to its end, or not at all because its bytes show that it is too long.
fn overflow(
    submission: &Submission,
    context_length: usize,
    history_tokens: usize,
    input_tokens: usize,
    cut_short: bool,
) -> Error {
    let requested = submission.stopping.max_tokens;
    let at_least = if cut_short { "at least " } else { "" };
    let message = if submission.on_overflow.truncates() {
        // Agents look for these words of Anthropic's and OpenAI's APIs, and then shorten their conversation.
        let most = context_length - usize::from(requested != Some(0));
        format!(
            "prompt is too long: {at_least}{} tokens > {most} maximum \
             (this model's maximum context length is {context_length} tokens, the answer's included)",
            history_tokens + input_tokens
        )
    } else {
        let output = requested.map_or_else(
            || "at least 1 of output".to_owned(),
            |n| format!("{n} of output"),
        );
        format!(
            "the context holds {context_length} tokens, but {history_tokens} of history + {at_least}{input_tokens} of input \
             + {output} were given"
        )
    };
    Error::new(Kind::Invalid, "context_length_exceeded", message)
        .with_detail("context_length", context_length)
        .with_detail("history_tokens", history_tokens)
        .with_detail("input_tokens", input_tokens)
        .with_detail("requested_tokens", requested)
}

/// Removes whole turns after the system prompt, the oldest first, until at most `limit` tokens or no turns are left.
fn drop_oldest_turns(base: &mut TurnHistory, limit: usize) {
    let TurnHistory {
        history,
        turns,
        system_tokens,
        ..
    } = base;
    let kept = (*system_tokens).min(history.len());
    let (mut dropped, mut cut) = (0, kept);
    while dropped < turns.len() && kept + (history.len() - cut) > limit {
        dropped += 1;
        cut = turns.get(dropped).map_or(history.len(), |turn| turn.start);
    }
    if dropped == 0 {
        return;
    }
    let removed = cut - kept;
    history.drain(kept..cut);
    turns.drain(..dropped);
    for turn in turns.iter_mut() {
        turn.start -= removed;
    }
    if let Some(first) = turns.first_mut() {
        // The first turn owns the system prompt.
        first.input_tokens += first.start;
        first.start = 0;
    }
}
