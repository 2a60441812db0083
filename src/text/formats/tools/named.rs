//! Calls that are a name, a mark, and arguments as a JSON object.

use super::{MISTRAL, MISTRAL_NAMED, NONE, OBJECT};
use crate::text::formats::{Arguments, Messages, Shape, ToolFormat};

/// Mistral Small 3.2, Magistral, Devstral, Ministral 3: names with `[ARGS]`.
pub const MISTRAL_ARGS: ToolFormat = ToolFormat {
    name: "mistral_args",
    templates: &[&["[TOOL_CALLS]", "[ARGS]"]],
    call_open: "[TOOL_CALLS]",
    shapes: &[MISTRAL_NAMED, OBJECT],
    tokens: MISTRAL.tokens,
    short_ids: true,
    ..NONE
};

/// `DeepSeek` V3 and R1: arguments in a block of code.
pub const DEEPSEEK_V3: ToolFormat = ToolFormat {
    name: "deepseek_v3",
    templates: &[&["<｜tool▁calls▁begin｜>", "```json"]],
    open: "<｜tool▁calls▁begin｜>",
    close: "<｜tool▁calls▁end｜>",
    call_open: "<｜tool▁call▁begin｜>",
    call_close: "\n```<｜tool▁call▁end｜>",
    between: "\n",
    shapes: &[Shape::Named {
        before: "function<｜tool▁sep｜>",
        number: None,
        remark: None,
        after: "\n```json\n",
        arguments: Arguments::Json,
    }],
    tokens: DEEPSEEK_TOKENS,
    ..NONE
};

const DEEPSEEK_TOKENS: &[&str] = &[
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
];

/// `DeepSeek` V3.1: name and arguments beside each other.
pub const DEEPSEEK_V31: ToolFormat = ToolFormat {
    name: "deepseek_v31",
    templates: &[&["<｜tool▁calls▁begin｜>"]],
    open: "<｜tool▁calls▁begin｜>",
    close: "<｜tool▁calls▁end｜>",
    call_open: "<｜tool▁call▁begin｜>",
    call_close: "<｜tool▁call▁end｜>",
    shapes: &[Shape::Named {
        before: "",
        number: None,
        remark: None,
        after: "<｜tool▁sep｜>",
        arguments: Arguments::Json,
    }],
    tokens: DEEPSEEK_TOKENS,
    ..NONE
};

/// Kimi K2: names with a number.
pub const KIMI_K2: ToolFormat = ToolFormat {
    name: "kimi_k2",
    templates: &[&["<|tool_calls_section_begin|>"]],
    open: "<|tool_calls_section_begin|>",
    close: "<|tool_calls_section_end|>",
    call_open: "<|tool_call_begin|>",
    call_close: "<|tool_call_end|>",
    shapes: &[Shape::Named {
        before: "functions.",
        number: Some(":"),
        remark: None,
        after: "<|tool_call_argument_begin|>",
        arguments: Arguments::Json,
    }],
    tokens: &[
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
    ],
    ..NONE
};

/// Functionary 3.1: names in a tag.
pub const FUNCTIONARY_V31: ToolFormat = ToolFormat {
    name: "functionary_v31",
    templates: &[
        &["<function=", "</function>"],
        &["<{start_tag}={function_name}>"],
    ],
    call_close: "</function>",
    shapes: &[Shape::Named {
        before: "<function=",
        number: None,
        remark: None,
        after: ">",
        arguments: Arguments::Json,
    }],
    ..NONE
};

/// Functionary 3.2: a message for each recipient.
pub const FUNCTIONARY_V32: ToolFormat = ToolFormat {
    name: "functionary_v32",
    templates: &[&[">>>all\\n"], &[">>>${recipient}"]],
    between: ">>>",
    shapes: &[Shape::Named {
        before: "",
        number: None,
        remark: None,
        after: "\n",
        arguments: Arguments::Json,
    }],
    messages: Some(&Messages {
        start: ">>>",
        body: "\n",
        ends: &[],
        to: "",
        thoughts: None,
        words: "all",
        headers: &[],
    }),
    ..NONE
};

/// gpt-oss (`OpenAI`'s harmony response format, "Receiving tool calls").
pub const HARMONY: ToolFormat = ToolFormat {
    name: "harmony",
    templates: &[&["<|channel|>", "<|message|>", "<|start|>"]],
    call_open: "<|channel|>commentary to=",
    shapes: &[Shape::Named {
        before: "functions.",
        number: None,
        remark: None,
        after: " <|constrain|>json<|message|>",
        arguments: Arguments::Json,
    }],
    tokens: &[
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|start|>",
        "<|call|>",
        "<|return|>",
        "<|constrain|>",
    ],
    messages: Some(&HARMONY_MESSAGES),
    ..NONE
};

/// The headers of harmony: a channel, and perhaps a recipient.
pub(in crate::text::formats) const HARMONY_MESSAGES: Messages = Messages {
    start: "<|start|>",
    body: "<|message|>",
    ends: &["<|end|>", "<|call|>", "<|return|>"],
    to: "to=functions.",
    thoughts: Some("<|channel|>analysis"),
    words: "",
    headers: &[
        "<|channel|>",
        "to=",
        "<|constrain|>",
        "<|message|>",
        "assistant",
    ],
};
