//! Converts a submission's input into tokens: token ids are used as they are, text is tokenized, and messages are rendered by the
//! chat template first.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use super::config::Limits;
use crate::error::{Error, Result};
use crate::request::{Function, Input, Submission, functions};
use crate::session::TurnHistory;
use crate::text::formats::Thoughts;
use crate::text::{ChatTemplate, Ending, PIECE_BYTES, Tail, Tokenizer, Watch, without_notes};
use crate::wire::answer::{AnswerFormat, AnswerParser, Piece};

/// The tokens of a request's input, and what the template says about them.
pub(super) struct Encoded {
    pub(super) input: Vec<u32>,
    pub(super) tail: Tail,
    pub(super) system_tokens: usize,
    /// For a model with recurrent layers: lengths of the first input after which another input may continue.
    pub(super) borders: Vec<usize>,
    pub(super) thinking: Option<Thoughts>,
}

/// Renders and tokenizes the input of `submission`. The input follows `base`, or is the first of its session (`first`). `watch` is
/// called as tokens come.
///
/// # Errors
/// 400: the template refuses the messages, a token is outside the vocabulary, or the model has no tokenizer or template. Those of
/// `watch`.
pub(super) fn encode(
    submission: &Submission,
    base: &TurnHistory,
    first: bool,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
    limits: Limits,
    watch: &Watch<'_>,
) -> Result<Encoded> {
    let plain = |input| Encoded {
        input,
        tail: Tail::Closed,
        system_tokens: 0,
        borders: Vec::new(),
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
        Input::Text { text } => Ok(plain(encode_raw(text_tokenizer()?, text, first, watch)?)),
        Input::Turn { text } => {
            let Some(template) = template else {
                return Ok(plain(encode_raw(text_tokenizer()?, text, first, watch)?));
            };
            let nothing_new = text.is_empty() && !first;
            if nothing_new && (base.tail == Tail::OpenAssistant || !generates) {
                // The open answer continues without anything before the text.
                return Ok(Encoded {
                    input: Vec::new(),
                    tail: base.tail,
                    system_tokens: 0,
                    borders: Vec::new(),
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
                (in_session, limits.keeps_borders),
                text_tokenizer()?,
                template,
                &messages,
                None,
                ending,
                &Map::new(),
                watch,
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
                    "messages must have at least one message, but none was given",
                ));
            }
            let ending = match (*continue_final_message, *add_generation_prompt) {
                (true, _) => Ending::OpenMessage,
                (false, answer) if answer.unwrap_or(generates) => Ending::Answer,
                _ => Ending::Closed,
            };
            let (messages, tools) = for_template(template, messages, tools.as_deref(), first);
            render(
                base,
                first,
                (in_session, limits.keeps_borders),
                text_tokenizer()?,
                template,
                &messages,
                tools,
                ending,
                template_kwargs,
                watch,
            )
        }
    }
}

/// The messages as the template gets them, and the tools if the template shows them. `first`: the messages begin the conversation.
fn for_template<'a>(
    template: &ChatTemplate,
    messages: &'a [Value],
    mut tools: Option<&'a [Value]>,
    first: bool,
) -> (Cow<'a, [Value]>, Option<&'a [Value]>) {
    let mut messages = Cow::Borrowed(messages);
    if !template.knows_tools() {
        let given = tools.take().unwrap_or_default();
        messages = template.without_tools(&messages, given, first).into();
    }
    let is_note =
        |(at, message): (usize, &Value)| message["role"] == "system" && !(first && at == 0);
    if !template.knows_notes() && messages.iter().enumerate().any(is_note) {
        messages = without_notes(&messages, first).into();
    }
    (messages, tools)
}

/// Text without a template. The first text of a session gets the model's special tokens; a later one gets none.
fn encode_raw(
    tokenizer: &Tokenizer,
    text: &str,
    first: bool,
    watch: &Watch<'_>,
) -> Result<Vec<u32>> {
    if first {
        tokenizer.encode_watched(text, true, PIECE_BYTES, watch)
    } else {
        tokenizer.encode_continued_watched(text, PIECE_BYTES, watch)
    }
}

#[allow(clippy::too_many_arguments)]
fn render(
    base: &TurnHistory,
    first: bool,
    (in_session, keeps_borders): (bool, bool),
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Value],
    tools: Option<&[Value]>,
    ending: Ending,
    kwargs: &Map<String, Value>,
    watch: &Watch<'_>,
) -> Result<Encoded> {
    let tail = if ending == Ending::Closed {
        Tail::Closed
    } else {
        Tail::OpenAssistant
    };
    if !first {
        let called = called(base, messages, tools, tokenizer, template);
        let text =
            template.render_continued(base.tail, messages, &called, tools, ending, kwargs)?;
        return Ok(Encoded {
            input: tokenizer.encode_rendered(&text, true, PIECE_BYTES, watch)?,
            tail,
            system_tokens: 0,
            borders: Vec::new(),
            thinking: template.thinking(&text, ending),
        });
    }
    let text = template.render(messages, tools, ending, kwargs)?;
    let input = tokenizer.encode_rendered(&text, false, PIECE_BYTES, watch)?;
    let mut system_tokens = 0;
    if (in_session || keeps_borders)
        && let Some(prefix) = template.system_prefix(messages, tools, kwargs)
    {
        let prefix = tokenizer.encode_rendered(&prefix, false, PIECE_BYTES, watch)?;
        // If the prompt's end is not between two tokens, the system prompt cannot be kept by itself.
        if input.starts_with(&prefix) {
            system_tokens = prefix.len();
        }
    }
    let mut borders = Vec::new();
    if keeps_borders {
        borders.push(system_tokens);
        if !in_session && ending == Ending::Answer {
            borders.extend(end_of_messages(
                tokenizer, template, messages, tools, kwargs, &text, &input,
            ));
        }
    }
    Ok(Encoded {
        input,
        tail,
        system_tokens,
        borders,
        thinking: template.thinking(&text, ending),
    })
}

/// Number of tokens of `input`, the tokens of `text`, that come before the header of the answer. If a client sends its whole
/// conversation, its next request begins with these tokens, whatever it makes of the answer.
fn end_of_messages(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Value],
    tools: Option<&[Value]>,
    kwargs: &Map<String, Value>,
    text: &str,
    input: &[u32],
) -> Option<usize> {
    let closed = template
        .render(messages, tools, Ending::Closed, kwargs)
        .ok()?;
    let header = text.strip_prefix(&closed)?;
    let header = tokenizer
        .encode_rendered(header, true, PIECE_BYTES, &|_| Ok(()))
        .ok()?;
    input.strip_suffix(header.as_slice()).map(<[u32]>::len)
}

/// Refuses a text with tokens that the model has no embedding for. The tokenizer of a fine-tuned model may have more tokens than
/// the checkpoint has rows.
pub(super) fn check_embedded(
    submission: &Submission,
    ids: &[u32],
    tokenizer: Option<&Tokenizer>,
    vocab_size: usize,
) -> Result<()> {
    let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) else {
        return Ok(());
    };
    let param = match &submission.input {
        Input::Messages { .. } => "messages",
        Input::Text { .. } | Input::Turn { .. } | Input::Tokens { .. } => "prompt",
    };
    let bytes = tokenizer.and_then(|tokenizer| tokenizer.token_bytes(id));
    let text = String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
    Err(Error::invalid(
        param,
        format!(
            "the model has embeddings for the token ids in [0, {vocab_size}), but the text has the token {text:?} with \
             the id {id}"
        ),
    ))
}

/// The names of the functions that a session's last answer calls, if `messages` begin with their results.
fn called(
    base: &TurnHistory,
    messages: &[Value],
    tools: Option<&[Value]>,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
) -> Vec<String> {
    let answered = messages
        .first()
        .is_some_and(|message| message["role"] == "tool");
    let Some(turn) = base.turns.last().filter(|_| answered) else {
        return Vec::new();
    };
    let begin = turn.start + turn.input_tokens;
    let answer = base.history.get(begin..turn.end()).unwrap_or_default();
    let functions = functions(tools.unwrap_or_default());
    let format = AnswerFormat {
        // Nobody knows any more how the answer began. Thoughts that the prompt opened end as usual.
        thinking: None,
        tools: Some((
            template.tool_format(),
            functions
                .map(|(name, schema, _)| Function::new(name, schema))
                .collect(),
        )),
        one_call: false,
    };
    let pieces = AnswerParser::new(&format)
        .map(|mut parser| parser.push(&tokenizer.decode(answer, false), true))
        .unwrap_or_default();
    let names = pieces.into_iter().filter_map(|piece| match piece {
        Piece::Call { name, .. } => Some(name),
        _ => None,
    });
    names.collect()
}

/// Refuses ids outside the vocabulary.
pub(super) fn check_vocabulary(
    param: &str,
    ids: impl IntoIterator<Item = u32>,
    vocab_size: usize,
) -> Result<()> {
    match ids.into_iter().find(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => Err(Error::invalid(
            param,
            format!("token ids of {param} must lie in [0, {vocab_size}), but {id} was given"),
        )),
    }
}
