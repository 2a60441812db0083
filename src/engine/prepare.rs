//! From a valid submission to tokens: template, tokenizer, lengths. A pure function; it runs on the preparing pool, never on
//! an event loop.

use serde_json::{Map, Value, json};

use crate::error::{Error, Kind, Result};
use crate::guided::{AnswerGrammar, Calls, Grammar, Matcher};
use crate::output::answer::AnswerFormat;
use crate::request::{Input, OnOverflow, Route, Submission, ToolChoice, functions};
use crate::session::{Base, Turn};
use crate::text::{ChatTemplate, Ending, Tail, Thinking, Tokenizer, without_tools};

/// What bounds a request's length.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most tokens of a sequence, prompt and output.
    pub context_length: usize,
    /// Token ids lie below.
    pub vocab_size: usize,
}

/// A request in tokens.
#[derive(Debug)]
pub struct Prepared {
    /// History and input.
    pub prompt: Vec<u32>,
    /// Leading tokens of `prompt` that are the session's history.
    pub history_tokens: usize,
    /// Tokens this turn brings in.
    pub input_tokens: usize,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// The turns that are kept of the session, at their place in `prompt`.
    pub turns: Vec<Turn>,
    /// Leading tokens that are the system prompt.
    pub system_tokens: usize,
    /// Whether the assistant's message is open after the input.
    pub tail: Tail,
    /// The prompt as it is echoed, where that is asked for.
    pub echo: Option<Echo>,
    /// Where it follows a grammar: one for each choice. Filled in once the grammar is compiled.
    pub matchers: Vec<Matcher>,
    /// The grammar that it follows, until it is compiled.
    pub grammar: Option<Grammar>,
    /// What the answer is made of.
    pub answer: AnswerFormat,
    /// Special tokens that are markers in the answer, and so part of its text.
    pub markers: Vec<u32>,
}

/// A prompt that is written before its output.
#[derive(Debug, PartialEq, Eq)]
pub struct Echo {
    /// The text as it was given, or that of the token ids.
    pub text: String,
    /// Leading tokens of the prompt that are not in the text: the tokenizer adds them.
    pub added: usize,
}

struct Encoded {
    input: Vec<u32>,
    tail: Tail,
    system_tokens: usize,
    thinking: Option<Thinking>,
}

/// Renders, tokenizes and fits a submission onto the history it builds on.
///
/// # Errors
/// 400: a template's refusal, a token outside the vocabulary, an empty prompt, `context_length_exceeded`.
pub fn prepare(
    submission: &Submission,
    base: Base,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
    limits: Limits,
) -> Result<Prepared> {
    check_token_ids(submission, limits.vocab_size)?;
    let mut base = base;
    let first = base.turns.is_empty();
    let mut encoded = encode(submission, &base, first, tokenizer, template, limits)?;
    let requested = submission.stopping.max_tokens.map(|n| n as usize);
    if submission.on_overflow == OnOverflow::DropOldestTurns && !first {
        // A request without a limit of its own must at least have room for one token.
        let limit = limits
            .context_length
            .saturating_sub(encoded.input.len() + requested.unwrap_or(1));
        drop_oldest_turns(&mut base, limit);
        if base.turns.is_empty() && base.tail == Tail::OpenAssistant {
            // The answer that the input would have closed is gone.
            base.tail = Tail::Closed;
            encoded = encode(submission, &base, first, tokenizer, template, limits)?;
        }
    }
    let echo = echo(submission, &encoded.input, tokenizer)?;
    let Base {
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
        (None, Some(room)) if room > 0 => room,
        (Some(_), Some(room))
            if submission.on_overflow == OnOverflow::TruncateOutput && room > 0 =>
        {
            room
        }
        _ => {
            return Err(overflow(
                limits.context_length,
                history_tokens,
                input_tokens,
                requested,
            ));
        }
    };
    let (answer, markers) = answer_format(submission, encoded.thinking, tokenizer, template);
    let grammar = answer_grammar(submission, encoded.thinking, template).grammar(tokenizer);
    Ok(Prepared {
        prompt,
        history_tokens,
        input_tokens,
        max_tokens,
        turns,
        system_tokens,
        tail: encoded.tail,
        echo,
        matchers: Vec::new(),
        grammar,
        answer,
        markers,
    })
}

fn echo(
    submission: &Submission,
    prompt: &[u32],
    tokenizer: Option<&Tokenizer>,
) -> Result<Option<Echo>> {
    let Some(tokenizer) = tokenizer.filter(|_| submission.echo) else {
        return Ok(None);
    };
    Ok(match &submission.input {
        Input::Text { text } => {
            let bare = tokenizer.encode(text, false)?;
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

/// Markers of thoughts and calls that are special tokens in some vocabularies.
const MARKERS: [&str; 7] = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
];

fn tools_of(submission: &Submission) -> &[Value] {
    match &submission.input {
        Input::Messages {
            tools: Some(tools), ..
        } => tools,
        _ => &[],
    }
}

/// What to look for in the answer, and the special tokens that are part of it.
fn answer_format(
    submission: &Submission,
    thinking: Option<Thinking>,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
) -> (AnswerFormat, Vec<u32>) {
    if !matches!(
        submission.route,
        Route::Chat | Route::Responses | Route::Messages
    ) {
        return (AnswerFormat::default(), Vec::new());
    }
    let tools = submission
        .tool_choice
        .as_ref()
        .zip(template)
        .map(|(_, template)| {
            let names = functions(tools_of(submission)).map(|(name, _, _)| name.to_owned());
            (template.tool_format(), names.collect())
        });
    let answer = AnswerFormat {
        thinking,
        tools,
        one_call: !submission.parallel_tool_calls,
    };
    let special = |marker: &&str| {
        let id = tokenizer?.token_to_id(marker)?;
        tokenizer?.is_special(id).then_some(id)
    };
    let markers = if answer.thinking.is_some() || answer.tools.is_some() {
        MARKERS.iter().filter_map(special).collect()
    } else {
        Vec::new()
    };
    (answer, markers)
}

/// The grammar that the answer must follow.
fn answer_grammar<'a>(
    submission: &'a Submission,
    thinking: Option<Thinking>,
    template: Option<&ChatTemplate>,
) -> AnswerGrammar<'a> {
    let guide = submission.guide.as_ref();
    let choice = submission.tool_choice.as_ref().zip(template);
    let named = |name: &str| match choice {
        Some((ToolChoice::Function { name: only }, _)) => only == name,
        _ => true,
    };
    let must_call = matches!(choice, Some((choice, _)) if *choice != ToolChoice::Auto);
    let calls = choice
        .filter(|_| must_call || guide.is_some())
        .map(|(choice, template)| Calls {
            format: template.tool_format(),
            functions: functions(tools_of(submission))
                .filter(|(name, _, _)| named(name))
                .collect(),
            several: submission.parallel_tool_calls
                && !matches!(choice, ToolChoice::Function { .. }),
        });
    let guide = guide.filter(|_| !must_call);
    AnswerGrammar {
        thinking: thinking.filter(|_| guide.is_some() || calls.is_some()),
        guide: guide.map(|guide| (guide, submission.guide_param.as_str())),
        calls,
    }
}

/// The ids that reach the sampler: one outside the logits would fail the whole batch's step.
fn check_token_ids(submission: &Submission, vocab_size: usize) -> Result<()> {
    let biased = submission.sampling.logit_bias.iter().map(|&(id, _)| id);
    check_vocabulary("logit_bias", biased, vocab_size)?;
    let stops = submission.stopping.stop_token_ids.iter().copied();
    check_vocabulary("stop_token_ids", stops, vocab_size)
}

fn check_vocabulary(
    param: &str,
    ids: impl IntoIterator<Item = u32>,
    vocab_size: usize,
) -> Result<()> {
    match ids.into_iter().find(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(Error::invalid(
            param,
            format!("token ids of {param} lie in [0, {vocab_size}), but {id} was given"),
        )),
    }
}

fn overflow(
    context_length: usize,
    history_tokens: usize,
    input_tokens: usize,
    requested: Option<usize>,
) -> Error {
    let output = requested.map_or_else(
        || "at least 1 of output".to_owned(),
        |n| format!("{n} of output"),
    );
    let message = format!(
        "the context holds {context_length} tokens, but {history_tokens} of history + {input_tokens} of input + {output} \
         were given"
    );
    Error::new(Kind::Invalid, "context_length_exceeded", message)
        .with_detail("context_length", context_length)
        .with_detail("history_tokens", history_tokens)
        .with_detail("input_tokens", input_tokens)
        .with_detail("requested_tokens", requested)
}

/// Cuts whole turns out, oldest first and after the system prompt, until at most `limit` tokens are left or no turn is.
fn drop_oldest_turns(base: &mut Base, limit: usize) {
    let Base {
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

fn encode(
    submission: &Submission,
    base: &Base,
    first: bool,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
    limits: Limits,
) -> Result<Encoded> {
    let plain = |input| Encoded {
        input,
        tail: Tail::Closed,
        system_tokens: 0,
        thinking: None,
    };
    let text_tokenizer = || {
        tokenizer
            .ok_or_else(|| Error::invalid("prompt", "this model has no tokenizer; send token ids"))
    };
    let in_session = submission.session.is_some();
    let generates = submission.stopping.max_tokens != Some(0);
    match &submission.input {
        Input::Tokens { ids } => {
            check_vocabulary("prompt", ids.iter().copied(), limits.vocab_size)?;
            Ok(plain(ids.clone()))
        }
        Input::Text { text } => Ok(plain(encode_raw(text_tokenizer()?, text, first)?)),
        Input::Turn { text } => {
            let Some(template) = template else {
                return Ok(plain(encode_raw(text_tokenizer()?, text, first)?));
            };
            let nothing_new = text.is_empty() && !first;
            if nothing_new && (base.tail == Tail::OpenAssistant || !generates) {
                // The open answer is continued as it stands.
                return Ok(Encoded {
                    input: Vec::new(),
                    tail: base.tail,
                    system_tokens: 0,
                    thinking: None,
                });
            }
            let messages = if nothing_new {
                Vec::new()
            } else {
                vec![json!({"role": "user", "content": text})]
            };
            let ending = if generates {
                Ending::Answer
            } else {
                Ending::Closed
            };
            render(
                base,
                first,
                in_session,
                text_tokenizer()?,
                template,
                &messages,
                None,
                ending,
                &Map::new(),
            )
        }
        Input::Messages {
            messages,
            tools,
            template_kwargs,
            continue_final_message,
            add_generation_prompt,
        } => {
            let template = template.ok_or_else(|| {
                Error::invalid("messages", "this model has no chat template; send a prompt to /v1/completions or /generate")
            })?;
            if messages.is_empty() {
                return Err(Error::invalid(
                    "messages",
                    "messages must hold at least one message, but none was given",
                ));
            }
            let ending = match (*continue_final_message, *add_generation_prompt) {
                (true, _) => Ending::OpenMessage,
                (false, answer) if answer.unwrap_or(generates) => Ending::Answer,
                _ => Ending::Closed,
            };
            let mut tools = tools.as_deref();
            let plain;
            let mut messages = messages.as_slice();
            if !template.knows_tools() {
                plain = without_tools(messages, tools.unwrap_or_default(), first);
                (messages, tools) = (&plain, None);
            }
            render(
                base,
                first,
                in_session,
                text_tokenizer()?,
                template,
                messages,
                tools,
                ending,
                template_kwargs,
            )
        }
    }
}

/// Text without a template: the first of a session gets the model's special tokens, what follows goes on as it stands.
fn encode_raw(tokenizer: &Tokenizer, text: &str, first: bool) -> Result<Vec<u32>> {
    if first {
        tokenizer.encode(text, true)
    } else {
        tokenizer.encode_continued(text)
    }
}

#[allow(clippy::too_many_arguments)]
fn render(
    base: &Base,
    first: bool,
    in_session: bool,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Value],
    tools: Option<&[Value]>,
    ending: Ending,
    kwargs: &Map<String, Value>,
) -> Result<Encoded> {
    let tail = if ending == Ending::Closed {
        Tail::Closed
    } else {
        Tail::OpenAssistant
    };
    if !first {
        let text = template.render_continued(base.tail, messages, tools, ending, kwargs)?;
        return Ok(Encoded {
            input: tokenizer.encode_continued(&text)?,
            tail,
            system_tokens: 0,
            thinking: template.thinking(&text, ending),
        });
    }
    let text = template.render(messages, tools, ending, kwargs)?;
    let input = tokenizer.encode(&text, false)?;
    let mut system_tokens = 0;
    if in_session && let Some(prefix) = template.system_prefix(messages, tools, kwargs) {
        let prefix = tokenizer.encode(&prefix, false)?;
        // Where the border does not fall between two tokens, the system prompt cannot be kept apart.
        if input.starts_with(&prefix) {
            system_tokens = prefix.len();
        }
    }
    Ok(Encoded {
        input,
        tail,
        system_tokens,
        thinking: template.thinking(&text, ending),
    })
}
