//! Computes what new messages append to a live conversation. A template can only render whole conversations.

use serde_json::{Map, Value, json};

use super::{ChatTemplate, Ending};
use crate::error::{Error, Kind, Result};
use crate::text::formats::{Arguments, Shape, ToolFormat, pieces};

/// The state at the end of a live conversation's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// Within the assistant's last message, which was generated. The text that closes it comes next.
    OpenAssistant,
    /// After a message that is closed.
    Closed,
}

impl ChatTemplate {
    /// Renders what `messages` append to a conversation that is live already.
    ///
    /// The text is taken from a render of a short stand-in conversation that ends with an assistant's message, followed
    /// by `messages`: whatever the template writes after the former. Where `messages` begin with what tools gave, that message
    /// calls them: `called` are the names of the functions that the live conversation's last answer calls, as far as they are
    /// known.
    ///
    /// # Errors
    /// `invalid_messages` (400) says what the template refuses about the messages.
    pub fn render_continued(
        &self,
        tail: Tail,
        messages: &[Value],
        called: &[String],
        tools: Option<&[Value]>,
        ending: Ending,
        kwargs: &Map<String, Value>,
    ) -> Result<String> {
        let mark = mark_for(messages, tools, kwargs);
        if tail == Tail::OpenAssistant
            && let Some(appended) = self.after_calls(&mark, messages, called, tools, ending, kwargs)
        {
            return Ok(appended);
        }
        let mut whole = stand_in(&mark);
        whole.extend_from_slice(messages);
        let text = self.render(&whole, tools, ending, kwargs)?;
        let appended = after(&text, &mark)?;
        if tail == Tail::OpenAssistant {
            return Ok(appended.to_owned());
        }
        Ok(self.strip_closing(appended, tools, kwargs)?.to_owned())
    }

    /// The text that the template writes after the calls of an answer, if `messages` begin with the calls' results. `None` if they
    /// do not, or if the template does not show calls in its format.
    fn after_calls(
        &self,
        mark: &str,
        messages: &[Value],
        called: &[String],
        tools: Option<&[Value]>,
        ending: Ending,
        kwargs: &Map<String, Value>,
    ) -> Option<String> {
        let results = messages
            .iter()
            .take_while(|message| message["role"] == "tool")
            .count();
        if results == 0 || !self.knows_tools() {
            return None;
        }
        let given = |message: &Value, key: &str| {
            message.get(key).and_then(Value::as_str).map(str::to_owned)
        };
        // There must be as many calls as results, because some templates wait for all of them.
        let count = called.len().max(results);
        let mut calls = Vec::with_capacity(count);
        let mut messages = messages.to_vec();
        for at in 0..count {
            let message = messages.get(at).filter(|_| at < results);
            let id = message.and_then(|message| given(message, "tool_call_id"));
            let id = id.unwrap_or_else(|| format!("call{at:05}"));
            let name = called.get(at).cloned();
            let name = name.or_else(|| message.and_then(|message| given(message, "name")));
            let name = name.unwrap_or_else(|| "function".to_owned());
            if let Some(Value::Object(message)) = messages.get_mut(at).filter(|_| at < results) {
                message
                    .entry("name")
                    .or_insert_with(|| name.as_str().into());
                message
                    .entry("tool_call_id")
                    .or_insert_with(|| id.as_str().into());
            }
            let arguments = if at + 1 == count {
                json!({"x": mark})
            } else {
                json!({})
            };
            calls.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}));
        }
        // Some templates render arguments given as an object, others only arguments given as JSON text.
        let as_texts: Vec<Value> = calls
            .iter()
            .map(|call| {
                let mut call = call.clone();
                call["function"]["arguments"] = call["function"]["arguments"].to_string().into();
                call
            })
            .collect();
        [calls, as_texts].into_iter().find_map(|calls| {
            let mut whole = vec![json!({"role": "user", "content": "X"})];
            whole.push(json!({"role": "assistant", "content": "", "tool_calls": calls}));
            whole.extend_from_slice(&messages);
            let text = self.render(&whole, tools, ending, kwargs).ok()?;
            let (_, behind) = text.split_once(mark)?;
            Some(behind[calls_end(self.tool_format(), behind)?..].to_owned())
        })
    }

    /// The text before the first user turn, which stays when the oldest turns are dropped. `None` if the template does not separate
    /// it, as templates that put the system prompt into the user's first message do.
    pub fn system_prefix(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        kwargs: &Map<String, Value>,
    ) -> Option<String> {
        let mark = mark_for(messages, tools, kwargs);
        let role = |message: &Value| {
            message
                .get("role")
                .and_then(Value::as_str)
                .map(str::to_owned)
        };
        let system = messages.iter().take_while(|&message| {
            matches!(role(message).as_deref(), Some("system" | "developer"))
        });
        let mut whole: Vec<Value> = system.cloned().collect();
        whole.push(json!({"role": "user", "content": mark}));
        // If the template refuses these few messages, it has no separate system prompt.
        let text = self.render(&whole, tools, Ending::Closed, kwargs).ok()?;
        let header = self.user_header(kwargs).ok()??;
        let (before, _) = text.split_once(&mark)?;
        before.strip_suffix(header.as_str()).map(str::to_owned)
    }

    /// The text that the template writes between the end of an answer and the user's next message.
    fn user_header(&self, kwargs: &Map<String, Value>) -> Result<Option<String>> {
        let mark = mark_for(&[], None, kwargs);
        let next = format!("{mark}B");
        let mut whole = stand_in(&format!("{mark}A"));
        whole.push(json!({"role": "user", "content": next}));
        let text = self.render(&whole, None, Ending::Closed, kwargs)?;
        let between = after(&text, &format!("{mark}A"))?
            .split_once(&next)
            .map(|(between, _)| between);
        between
            .map(|between| self.strip_closing(between, None, kwargs).map(str::to_owned))
            .transpose()
    }

    /// `text` without the text at its beginning that closes an assistant's message.
    fn strip_closing<'a>(
        &self,
        text: &'a str,
        tools: Option<&[Value]>,
        kwargs: &Map<String, Value>,
    ) -> Result<&'a str> {
        let mark = mark_for(&[], tools, kwargs);
        let alone = self.render_raw(&stand_in(&mark), tools, false, kwargs)?;
        let closing = after(&alone, &mark)?;
        if let Some(rest) = text.strip_prefix(closing) {
            return Ok(rest);
        }
        // Some templates close the last message differently from all others. The common beginning of both, up to the last whole
        // marker or line, closes the message.
        let common = &text[..common_prefix(text, closing)];
        let end = common.rfind(['>', ']', '\n']).map_or(0, |at| at + 1);
        Ok(&text[end..])
    }

    /// Renders a conversation whose last message stays open.
    pub(super) fn render_open(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        kwargs: &Map<String, Value>,
    ) -> Result<String> {
        let mark = mark_for(messages, tools, kwargs);
        let refuse = |reason: &str| {
            Err(
                Error::new(Kind::Invalid, "invalid_messages", reason.to_owned())
                    .with_param("messages"),
            )
        };
        let Some((last, earlier)) = messages.split_last() else {
            return refuse("there is no message to continue");
        };
        let Some(content) = last.get("content").and_then(Value::as_str) else {
            return refuse("the message to continue must have a text as its content");
        };
        let mut whole = earlier.to_vec();
        let mut last = last.clone();
        // The space at the end shows whether a template trims the content.
        last["content"] = format!("{content}{mark} ").into();
        whole.push(last);
        let text = self.render_raw(&whole, tools, false, kwargs)?;
        let Some(at) = text.rfind(&mark) else {
            return refuse("the chat template does not show the message to continue");
        };
        let open = &text[..at];
        let trimmed = !text[at + mark.len()..].starts_with(' ');
        Ok(if trimmed { open.trim_end() } else { open }.to_owned())
    }
}

/// The position, after an argument of the last call, at which the model itself would end the calls.
fn calls_end(format: &ToolFormat, behind: &str) -> Option<usize> {
    let last = pieces(format.call_close, format.tokens)
        .chain(pieces(format.close, format.tokens))
        .last();
    if let Some(last) = last {
        return behind.find(last).map(|at| at + last.len());
    }
    if format.list {
        return behind.find(']').map(|at| at + 1);
    }
    let close = match format.shapes.first()? {
        Shape::Named {
            arguments: Arguments::Loose(loose),
            ..
        } => loose.close,
        _ => '}',
    };
    // All brackets that are open within the call.
    let first = behind.find(close)?;
    let rest = behind[first..].trim_start_matches(close);
    Some(behind.len() - rest.len())
}

/// A conversation that ends with an assistant's message.
fn stand_in(answer: &str) -> Vec<Value> {
    vec![
        json!({"role": "user", "content": "X"}),
        json!({"role": "assistant", "content": answer}),
    ]
}

/// A word that does not occur in the rendered text.
fn mark_for(messages: &[Value], tools: Option<&[Value]>, kwargs: &Map<String, Value>) -> String {
    let occurs = |mark: &str| {
        messages
            .iter()
            .chain(tools.unwrap_or_default())
            .chain(kwargs.values())
            .any(|value| contains(value, mark))
    };
    let mut mark = "XANSWERX".to_owned();
    while occurs(&mark) {
        mark.push('X');
    }
    mark
}

fn contains(value: &Value, mark: &str) -> bool {
    match value {
        Value::String(text) => text.contains(mark),
        Value::Array(items) => items.iter().any(|item| contains(item, mark)),
        Value::Object(object) => object
            .iter()
            .any(|(key, value)| key.contains(mark) || contains(value, mark)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn after<'a>(text: &'a str, mark: &str) -> Result<&'a str> {
    text.split_once(mark).map(|(_, after)| after).ok_or_else(|| {
        let message = "the chat template does not show the assistant's messages, so a conversation cannot be continued";
        Error::new(Kind::Invalid, "invalid_template", message)
    })
}

/// Length in bytes of the longest common prefix that ends between characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars()
        .zip(b.chars())
        .take_while(|(a, b)| a == b)
        .map(|(c, _)| c.len_utf8())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nHi<|im_end|>\n{% endif %}\
        {{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn template(source: &str) -> ChatTemplate {
        let special = json!({"bos_token": "<s>", "eos_token": "</s>"});
        ChatTemplate::new(source, special.as_object().unwrap()).unwrap()
    }

    fn message(role: &str, content: &str) -> Value {
        json!({"role": role, "content": content})
    }

    fn continued(
        template: &ChatTemplate,
        tail: Tail,
        messages: &[Value],
        ending: Ending,
    ) -> String {
        template
            .render_continued(tail, messages, &[], None, ending, &Map::new())
            .unwrap()
    }

    #[test]
    fn a_new_turn_closes_the_open_answer_first() {
        let template = template(CHATML);
        let turn = "<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n";
        let messages = [message("user", "B")];
        assert_eq!(
            continued(&template, Tail::Closed, &messages, Ending::Answer),
            turn
        );
        assert_eq!(
            continued(&template, Tail::OpenAssistant, &messages, Ending::Answer),
            format!("<|im_end|>\n{turn}")
        );
        assert_eq!(
            continued(&template, Tail::OpenAssistant, &[], Ending::Closed),
            "<|im_end|>\n"
        );
        assert_eq!(continued(&template, Tail::Closed, &[], Ending::Closed), "");
        assert_eq!(
            continued(&template, Tail::Closed, &[], Ending::Answer),
            "<|im_start|>assistant\n"
        );
    }

    #[test]
    fn an_end_token_after_the_whole_conversation_is_no_part_of_a_message() {
        let source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}\
            {% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}";
        let messages = [message("user", "B")];
        let text = continued(&template(source), Tail::Closed, &messages, Ending::Answer);
        assert_eq!(text, "<|user|>\nB<|end|>\n<|assistant|>\n");
    }

    #[test]
    fn words_of_the_client_are_never_taken_for_the_mark() {
        let messages = [message("user", "XANSWERX XANSWERXX")];
        let text = continued(&template(CHATML), Tail::Closed, &messages, Ending::Closed);
        assert_eq!(text, "<|im_start|>user\nXANSWERX XANSWERXX<|im_end|>\n");
    }

    #[test]
    fn an_open_message_has_no_end() {
        let template = template(CHATML);
        let messages = [message("user", "A"), message("assistant", "The answer is ")];
        let text = template
            .render(&messages, None, Ending::OpenMessage, &Map::new())
            .unwrap();
        assert!(
            text.ends_with("<|im_start|>assistant\nThe answer is "),
            "{text}"
        );
        let error = template
            .render(&[], None, Ending::OpenMessage, &Map::new())
            .unwrap_err();
        assert_eq!(error.kind, Kind::Invalid);
    }

    #[test]
    fn the_system_prefix_ends_before_the_first_user_turn() {
        let chatml = template(CHATML);
        let messages = [
            message("system", "Be brief."),
            message("user", "A"),
            message("user", "B"),
        ];
        let prefix = chatml.system_prefix(&messages, None, &Map::new());
        assert_eq!(
            prefix.as_deref(),
            Some("<|im_start|>system\nBe brief.<|im_end|>\n")
        );
        let prefix = chatml.system_prefix(&messages[1..], None, &Map::new());
        assert_eq!(
            prefix.as_deref(),
            Some("<|im_start|>system\nHi<|im_end|>\n")
        );
        let merged = "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% set ns = m.content %}{% endif %}\
            {% if m.role == 'user' %}[INST] {{ messages[0].content if loop.previtem and loop.previtem.role == 'system' else '' }}\
            {{ m.content }} [/INST]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}";
        assert_eq!(
            template(merged).system_prefix(&messages, None, &Map::new()),
            None
        );
    }
}
