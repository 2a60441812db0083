//! The formats of calls. Each was read off the chat template of a model that writes it, and the parsers of vLLM, `SGLang` and
//! llama.cpp of the same name.

use super::{Arguments, Loose, Messages, Shape, ToolFormat};

/// All formats of calls. Of several that a template shows, the first is taken: those with marks of their own come before those
/// that share marks with others.
pub const TOOL_FORMATS: [&ToolFormat; 23] = [
    &HARMONY,
    &GEMMA4,
    &DEEPSEEK_V32,
    &DEEPSEEK_V4,
    &DEEPSEEK_V3,
    &DEEPSEEK_V31,
    &KIMI_K2,
    &COMMAND,
    &MINIMAX_M2,
    &MINIMAX_M1,
    &GLM,
    &GLM_LINES,
    &QWEN3_CODER,
    &LFM2,
    &FUNCTIONARY_V32,
    &FUNCTIONARY_V31,
    &MISTRAL_ARGS,
    &GRANITE,
    &PHI4,
    &HERMES,
    &MISTRAL,
    &PYTHONIC,
    &LLAMA3,
];

/// Formats that a template does not show, and whose name has to be given.
const NOWHERE: &[&[&str]] = &[];

const NONE: ToolFormat = ToolFormat {
    name: "",
    templates: NOWHERE,
    open: "",
    close: "",
    call_open: "",
    call_close: "",
    between: "",
    also: &[],
    list: false,
    bare: false,
    shapes: &[],
    tokens: &[],
    short_ids: false,
    messages: None,
};

const OBJECT: Shape = Shape::Object {
    number: None,
    name: "name",
    arguments: "arguments",
};

const OBJECT_OF_PARAMETERS: Shape = Shape::Object {
    number: None,
    name: "name",
    arguments: "parameters",
};

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

const MISTRAL_NAMED: Shape = Shape::Named {
    before: "",
    number: None,
    remark: Some("[CALL_ID]"),
    after: "[ARGS]",
    arguments: Arguments::Json,
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

/// Qwen 3 Coder, Qwen 3.5, Nemotron 3 Nano, Step 3.5: arguments between tags.
pub const QWEN3_CODER: ToolFormat = ToolFormat {
    name: "qwen3_coder",
    templates: &[&["<tool_call>", "<function=", "<parameter="]],
    call_open: "<tool_call>\n",
    call_close: "</function>\n</tool_call>",
    between: "\n",
    shapes: &[
        Shape::Named {
            before: "<function=",
            number: None,
            remark: None,
            after: ">\n",
            arguments: Arguments::Pairs {
                key_open: "<parameter=",
                key_close: ">\n",
                value_close: "\n</parameter>\n",
                typed: None,
            },
        },
        OBJECT,
    ],
    tokens: HERMES.tokens,
    ..NONE
};

const GLM_PAIRS: Arguments = Arguments::Pairs {
    key_open: "<arg_key>",
    key_close: "</arg_key><arg_value>",
    value_close: "</arg_value>",
    typed: None,
};

const GLM_TOKENS: &[&str] = &[
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
];

/// GLM 4.7 and later: keys and values between tags, without lines.
pub const GLM: ToolFormat = ToolFormat {
    name: "glm47",
    templates: &[&["<tool_call>", "</arg_key><arg_value>"]],
    call_open: "<tool_call>",
    call_close: "</tool_call>",
    shapes: &[Shape::Named {
        before: "",
        number: None,
        remark: None,
        after: "",
        arguments: GLM_PAIRS,
    }],
    tokens: GLM_TOKENS,
    ..NONE
};

/// GLM 4.5 and 4.6: the same, in lines.
pub const GLM_LINES: ToolFormat = ToolFormat {
    name: "glm",
    templates: &[&["<tool_call>", "<arg_key>"]],
    call_open: "<tool_call>",
    call_close: "</tool_call>",
    between: "\n",
    shapes: &[Shape::Named {
        before: "",
        number: None,
        remark: None,
        after: "\n",
        arguments: Arguments::Pairs {
            key_open: "<arg_key>",
            key_close: "</arg_key>\n<arg_value>",
            value_close: "</arg_value>\n",
            typed: None,
        },
    }],
    tokens: GLM_TOKENS,
    ..NONE
};

/// `MiniMax` M2.
pub const MINIMAX_M2: ToolFormat = ToolFormat {
    name: "minimax_m2",
    templates: &[&["<minimax:tool_call>"]],
    open: "<minimax:tool_call>\n",
    close: "</minimax:tool_call>",
    call_close: "</invoke>\n",
    shapes: &[Shape::Named {
        before: "<invoke name=\"",
        number: None,
        remark: None,
        after: "\">\n",
        arguments: Arguments::Pairs {
            key_open: "<parameter name=\"",
            key_close: "\">",
            value_close: "</parameter>\n",
            typed: None,
        },
    }],
    tokens: &["<minimax:tool_call>", "</minimax:tool_call>"],
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

/// `DeepSeek` V3.2: "DSML".
pub const DEEPSEEK_V32: ToolFormat = ToolFormat {
    name: "deepseek_v32",
    templates: &[
        &["dsml_token", "function_calls"],
        &["<｜DSML｜function_calls>"],
    ],
    open: "<｜DSML｜function_calls>\n",
    close: "</｜DSML｜function_calls>",
    call_close: "</｜DSML｜invoke>\n",
    shapes: &[Shape::Named {
        before: "<｜DSML｜invoke name=\"",
        number: None,
        remark: None,
        after: "\">\n",
        arguments: Arguments::Pairs {
            key_open: "<｜DSML｜parameter name=\"",
            key_close: "\">",
            value_close: "</｜DSML｜parameter>\n",
            typed: Some("\" string=\""),
        },
    }],
    tokens: &["｜DSML｜"],
    ..NONE
};

/// `DeepSeek` V4: the same between other marks.
pub const DEEPSEEK_V4: ToolFormat = ToolFormat {
    name: "deepseek_v4",
    templates: &[&["dsml_token", "tool_calls>"], &["<｜DSML｜tool_calls>"]],
    open: "<｜DSML｜tool_calls>\n",
    close: "</｜DSML｜tool_calls>",
    ..DEEPSEEK_V32
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
pub(super) const HARMONY_MESSAGES: Messages = Messages {
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
