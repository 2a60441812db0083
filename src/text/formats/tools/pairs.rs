//! Calls with each argument between tags of its own.

use super::{HERMES, NONE, OBJECT};
use crate::text::formats::{Arguments, Shape, ToolFormat};

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
