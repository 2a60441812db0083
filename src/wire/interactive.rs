//! The wire form of `POST /v1/chat/interactive` (`LMDeploy`, until July 2026): one JSON object a line.

use serde_json::Value;

use super::choice::Choice;
use super::delta::Usage;
use super::format::WireFormat;
use super::head::Head;
use super::json::{push_string, write_bytes};
use super::said::Said;
use crate::error::Error;
use crate::sched::FinishReason;

fn push_object(
    out: &mut Vec<u8>,
    text: &str,
    usage: &Usage,
    reason: Option<&str>,
    error: Option<&Error>,
) {
    let Usage {
        prompt_tokens,
        history_tokens,
        completion_tokens,
        ..
    } = usage;
    let input_tokens = prompt_tokens - history_tokens;
    out.extend_from_slice(b"{\"text\":");
    push_string(out, text);
    write_bytes(
        out,
        format_args!(
            ",\"tokens\":{completion_tokens},\"input_tokens\":{input_tokens},\"history_tokens\":{history_tokens},\
             \"finish_reason\":"
        ),
    );
    match reason {
        Some(reason) => write_bytes(out, format_args!("\"{reason}\"")),
        None => out.extend_from_slice(b"null"),
    }
    if let Some(error) = error {
        let object = Value::Object(error.to_json());
        write_bytes(out, format_args!(",\"error\":{object}"));
    }
    out.push(b'}');
}

/// `POST /v1/chat/interactive`.
#[derive(Debug)]
pub(super) struct Interactive;

impl WireFormat for Interactive {
    fn name(&self) -> &'static str {
        "interactive"
    }

    fn more(&self, out: &mut Vec<u8>, head: &mut Head, _: usize, _: &Choice, said: &Said) {
        push_object(out, said.text(), &head.usage, None, None);
        out.push(b'\n');
    }

    fn last(
        &self,
        out: &mut Vec<u8>,
        head: &mut Head,
        _: usize,
        _: &Choice,
        said: &Said,
        reason: FinishReason,
    ) {
        push_object(out, said.text(), &head.usage, Some(reason.as_str()), None);
        out.push(b'\n');
    }

    fn whole(&self, out: &mut Vec<u8>, head: &Head, choices: &[Choice]) {
        let choice = &choices[0];
        let reason = choice.finish.map_or("abort", FinishReason::as_str);
        push_object(out, &choice.text, &head.usage, Some(reason), None);
    }

    fn error(&self, out: &mut Vec<u8>, head: &mut Head, _: &[Choice], error: &Error) {
        push_object(out, "", &head.usage, Some("error"), Some(error));
        out.push(b'\n');
    }
}
