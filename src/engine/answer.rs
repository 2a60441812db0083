//! How a submission's answer is parsed, and the grammar that it follows.

use std::sync::LazyLock;

use serde_json::{Value, json};

use crate::guided::{AnswerGrammar, Calls, Spacing};
use crate::request::{Function, Input, Submission, ToolChoice, Whitespace, functions};
use crate::text::formats::Thoughts;
use crate::text::{ChatTemplate, Tokenizer};
use crate::wire::answer::AnswerFormat;
use crate::wire::{Reads, reads};

static ANY_OBJECT: LazyLock<Value> = LazyLock::new(|| json!({"type": "object"}));

fn tools_of(submission: &Submission) -> &[Value] {
    match &submission.input {
        Input::Messages {
            tools: Some(tools), ..
        } => tools,
        _ => &[],
    }
}

/// What to parse in the answer, and the special tokens that are part of its text.
pub(super) fn answer_format(
    submission: &Submission,
    thinking: Option<Thoughts>,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
) -> (AnswerFormat, Vec<u32>) {
    if reads(&submission.route) == Reads::Text {
        return (AnswerFormat::default(), Vec::new());
    }
    let tools = submission
        .tool_choice
        .as_ref()
        .zip(template)
        .map(|(_, template)| {
            let functions = functions(tools_of(submission));
            let functions = functions.map(|(name, schema, _)| Function::new(name, schema));
            (template.tool_format(), functions.collect())
        });
    let answer = AnswerFormat {
        thinking,
        tools,
        one_call: !submission.parallel_tool_calls,
    };
    let special = |marker: &str| {
        let id = tokenizer?.token_to_id(marker)?;
        tokenizer?.is_special(id).then_some(id)
    };
    let of_thoughts = answer
        .thinking
        .map_or(&[][..], |thoughts| thoughts.format.tokens);
    let of_calls = answer
        .tools
        .as_ref()
        .map_or(&[][..], |(format, _)| format.tokens);
    let tokens = of_thoughts.iter().chain(of_calls);
    let markers = tokens.filter_map(|marker| special(marker)).collect();
    (answer, markers)
}

/// The grammar that the answer must follow.
pub(super) fn answer_grammar<'a>(
    submission: &'a Submission,
    thinking: Option<Thoughts>,
    template: Option<&ChatTemplate>,
) -> AnswerGrammar<'a> {
    let guide = submission.guide.as_ref();
    let choice = submission.tool_choice.as_ref().zip(template);
    let named = |name: &str| match choice {
        Some((ToolChoice::Function { name: only }, _)) => only == name,
        _ => true,
    };
    let must_call = matches!(choice, Some((choice, _)) if *choice != ToolChoice::Auto);
    let strict = functions(tools_of(submission)).any(|(_, _, strict)| strict);
    let words = guide.is_none() && !must_call;
    // If the model may answer in words, a call's arguments follow their schema only if the client has set `strict`.
    let schema = |(name, schema, strict): (&'a str, Option<&'a Value>, bool)| {
        let any = (words && !strict).then_some(&*ANY_OBJECT);
        (name, any.or(schema), strict)
    };
    // In a format of messages, headers separate words from calls. No grammar enforces headers.
    let parted = |(_, template): &(_, &ChatTemplate)| template.tool_format().messages.is_some();
    let calls = choice
        .filter(|choice| !words || (strict && !parted(choice)))
        .map(|(choice, template)| Calls {
            format: template.tool_format(),
            functions: functions(tools_of(submission))
                .filter(|(name, _, _)| named(name))
                .map(schema)
                .collect(),
            several: submission.parallel_tool_calls
                && !matches!(choice, ToolChoice::Function { .. }),
        });
    let guide = guide.filter(|_| !must_call);
    AnswerGrammar {
        thinking: thinking.filter(|_| guide.is_some() || calls.is_some()),
        guide: guide.map(|guide| (guide, submission.guide_param.as_str())),
        spacing: match submission.guided_whitespace {
            Whitespace::Compact => Spacing::Compact,
            Whitespace::Free => Spacing::Free,
        },
        calls,
        words,
    }
}
