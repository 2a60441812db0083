//! Calls in a notation that is close to JSON: calls of Python, objects without quotes around their keys.

use super::{NONE, OBJECT_OF_PARAMETERS};
use crate::text::formats::{Arguments, Loose, Shape, ToolFormat};

/// Llama 4 (its template, which asks for objects, and `tool_chat_template_llama4_pythonic` of vLLM): Python's calls in a list.
pub const PYTHONIC: ToolFormat = ToolFormat {
    name: "pythonic",
    templates: &[&["<|python_start|>"], &["[func_name1(param"]],
    between: ", ",
    also: &["<|python_start|>"],
    list: true,
    bare: true,
    shapes: &[PYTHON, OBJECT_OF_PARAMETERS],
    tokens: &["<|python_start|>", "<|python_end|>"],
    ..NONE
};

const PYTHON: Shape = Shape::Named {
    before: "",
    number: None,
    remark: None,
    after: "",
    arguments: Arguments::Loose(Loose {
        open: '(',
        close: ')',
        equals: '=',
        quote: "\"",
        python: true,
        sorted: false,
        comma: ", ",
    }),
};

/// LFM 2 and 2.5 (their templates): Python's calls between two tags.
pub const LFM2: ToolFormat = ToolFormat {
    name: "lfm2",
    templates: &[
        &["<|tool_call_start|>"],
        &["<|tool_list_start|>"],
        &["List of tools: ["],
    ],
    open: "<|tool_call_start|>",
    close: "<|tool_call_end|>",
    between: ", ",
    list: true,
    shapes: &[PYTHON],
    tokens: &["<|tool_call_start|>", "<|tool_call_end|>"],
    ..NONE
};

/// Gemma 4: an object without quotes around its keys.
pub const GEMMA4: ToolFormat = ToolFormat {
    name: "gemma4",
    templates: &[&["<|tool_call>call:"]],
    call_open: "<|tool_call>call:",
    call_close: "<tool_call|>",
    shapes: &[Shape::Named {
        before: "",
        number: None,
        remark: None,
        after: "",
        arguments: Arguments::Loose(Loose {
            open: '{',
            close: '}',
            equals: ':',
            quote: "<|\"|>",
            python: false,
            sorted: true,
            comma: ",",
        }),
    }],
    tokens: &["<|tool_call>", "<tool_call|>", "<|\"|>"],
    ..NONE
};
