//! The wire form of `POST /generate`: ASCII JSON objects, each followed by one NUL byte when streamed.

use serde_json::Value;

use super::choice::Choice;
use super::delta::Usage;
use super::format::WireFormat;
use super::head::Head;
use super::json::{push_ascii, write_bytes};
use super::said::Said;
use crate::error::Error;
use crate::sched::FinishReason;

fn open(out: &mut Vec<u8>, text: &str, tokens: usize) {
    out.extend_from_slice(b"{\"text\": ");
    push_ascii(out, text);
    write_bytes(
        out,
        format_args!(", \"tokens\": {tokens}, \"finish_reason\": "),
    );
}

fn push_usage(out: &mut Vec<u8>, usage: &Usage) {
    let Usage {
        prompt_tokens,
        history_tokens,
        cached_tokens,
        completion_tokens,
    } = usage;
    write_bytes(
        out,
        format_args!(
            ", \"usage\": {{\"prompt_tokens\": {prompt_tokens}, \"history_tokens\": {history_tokens}, \
             \"cached_tokens\": {cached_tokens}, \"completion_tokens\": {completion_tokens}}}"
        ),
    );
}

fn last(out: &mut Vec<u8>, text: &str, tokens: usize, reason: &str, head: &Head) {
    open(out, text, tokens);
    write_bytes(out, format_args!("\"{reason}\""));
    push_usage(out, &head.usage);
    push_warnings(out, &head.warnings);
    out.push(b'}');
}

fn push_warnings(out: &mut Vec<u8>, warnings: &[String]) {
    if !warnings.is_empty() {
        out.extend_from_slice(b", \"warnings\": ");
        push_value(out, &Value::from(warnings));
    }
}

/// `POST /generate`.
#[derive(Debug)]
pub(super) struct Generate;

impl WireFormat for Generate {
    fn name(&self) -> &'static str {
        "generate"
    }

    fn more(&self, out: &mut Vec<u8>, _: &mut Head, _: usize, choice: &Choice, said: &Said) {
        open(out, said.text(), choice.tokens);
        out.extend_from_slice(b"null}\0");
    }

    fn last(
        &self,
        out: &mut Vec<u8>,
        head: &mut Head,
        _: usize,
        choice: &Choice,
        said: &Said,
        reason: FinishReason,
    ) {
        last(out, said.text(), choice.tokens, reason.as_str(), head);
        out.push(0);
    }

    fn whole(&self, out: &mut Vec<u8>, head: &Head, choices: &[Choice]) {
        let choice = &choices[0];
        let reason = choice.finish.map_or("abort", FinishReason::as_str);
        last(out, &choice.text, choice.tokens, reason, head);
    }

    fn error(&self, out: &mut Vec<u8>, head: &mut Head, choices: &[Choice], error: &Error) {
        open(out, "", choices[0].tokens);
        out.extend_from_slice(b"\"error\"");
        push_usage(out, &head.usage);
        push_warnings(out, &head.warnings);
        out.extend_from_slice(b", \"error\": ");
        push_value(out, &Value::Object(error.to_json()));
        out.extend_from_slice(b"}\0");
    }
}

fn push_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::String(text) => push_ascii(out, text),
        Value::Object(map) => {
            out.push(b'{');
            for (at, (key, value)) in map.iter().enumerate() {
                if at > 0 {
                    out.extend_from_slice(b", ");
                }
                push_ascii(out, key);
                out.extend_from_slice(b": ");
                push_value(out, value);
            }
            out.push(b'}');
        }
        Value::Array(items) => {
            out.push(b'[');
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    out.extend_from_slice(b", ");
                }
                push_value(out, item);
            }
            out.push(b']');
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {
            write_bytes(out, format_args!("{value}"));
        }
    }
}
