//! Calls that are JSON objects with a name and arguments.

use super::{MISTRAL_NAMED, NONE, OBJECT, OBJECT_OF_PARAMETERS};
use crate::text::formats::{Shape, ToolFormat};

/// Hermes, Qwen 2.5 and 3, Granite 4, Phi with Hermes' template: one JSON object between two tags.
pub const HERMES: ToolFormat = ToolFormat {
    name: "hermes",
    templates: &[&["<tool_call>"]],
    call_open: "<tool_call>\n",
    call_close: "\n</tool_call>",
    between: "\n",
    shapes: &[OBJECT],
    tokens: &["<tool_call>", "</tool_call>"],
    ..NONE
};

/// Llama 3.1 and later.
pub const LLAMA3: ToolFormat = ToolFormat {
    name: "llama3",
    templates: &[&["<|python_tag|>"], &["ipython"]],
    between: "; ",
    also: &["<|python_tag|>"],
    bare: true,
    shapes: &[OBJECT_OF_PARAMETERS],
    tokens: &["<|python_tag|>"],
    ..NONE
};

/// Mistral up to Nemo: a list of JSON objects.
pub const MISTRAL: ToolFormat = ToolFormat {
    name: "mistral",
    templates: &[&["[TOOL_CALLS]"]],
    open: "[TOOL_CALLS]",
    between: ", ",
    list: true,
    shapes: &[OBJECT, MISTRAL_NAMED],
    tokens: &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    short_ids: true,
    ..NONE
};

/// Granite 3: a list of JSON objects.
pub const GRANITE: ToolFormat = ToolFormat {
    name: "granite",
    templates: &[&["<|tool_call|>", "available_tools"]],
    open: "<|tool_call|>",
    between: ", ",
    also: &["<tool_call>"],
    list: true,
    shapes: &[OBJECT],
    tokens: &["<|tool_call|>"],
    ..NONE
};

/// Phi 4 mini: the same, and its other mark (`phi4_mini_json` of vLLM). Its template shows neither.
pub const PHI4: ToolFormat = ToolFormat {
    name: "phi4",
    templates: &[&["<|tool|>", "<|/tool|>"]],
    open: "<|tool_call|>",
    close: "<|/tool_call|>",
    between: ", ",
    also: &["functools"],
    list: true,
    shapes: &[OBJECT],
    tokens: &["<|tool_call|>", "<|/tool_call|>"],
    ..NONE
};

/// `MiniMax` M1: JSON objects in lines.
pub const MINIMAX_M1: ToolFormat = ToolFormat {
    name: "minimax_m1",
    templates: &[&["<tool_calls>", "</tool_calls>"]],
    open: "<tool_calls>\n",
    close: "\n</tool_calls>",
    between: "\n",
    shapes: &[OBJECT],
    ..NONE
};

/// Command R7B, Command A and North: numbered JSON objects in a list.
pub const COMMAND: ToolFormat = ToolFormat {
    name: "command",
    templates: &[&["<|START_ACTION|>"]],
    open: "<|START_ACTION|>[\n    ",
    close: "\n]<|END_ACTION|>",
    between: ",\n    ",
    shapes: &[Shape::Object {
        number: Some("tool_call_id"),
        name: "tool_name",
        arguments: "parameters",
    }],
    tokens: &["<|START_ACTION|>", "<|END_ACTION|>"],
    ..NONE
};
