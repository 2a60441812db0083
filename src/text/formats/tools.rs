//! The formats of calls. Each is based on the chat template of a model that writes it, and on the parsers of the same name in vLLM,
//! `SGLang` and llama.cpp.

mod loose;
mod named;
mod objects;
mod pairs;

use self::loose::{GEMMA4, LFM2, PYTHONIC};
pub(super) use self::named::HARMONY_MESSAGES;
use self::named::{
    DEEPSEEK_V3, DEEPSEEK_V31, FUNCTIONARY_V31, FUNCTIONARY_V32, HARMONY, KIMI_K2, MISTRAL_ARGS,
};
pub use self::objects::HERMES;
use self::objects::{COMMAND, GRANITE, LLAMA3, MINIMAX_M1, MISTRAL, PHI4};
use self::pairs::{DEEPSEEK_V4, DEEPSEEK_V32, GLM, GLM_LINES, MINIMAX_M2, QWEN3_CODER};
use super::{Arguments, Shape, ToolFormat};

/// All formats of calls. If a template matches several, the first is used: formats with markers of their own come before those that
/// share markers with others.
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

/// Formats that cannot be detected by a template. Their name must be given.
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

const MISTRAL_NAMED: Shape = Shape::Named {
    before: "",
    number: None,
    remark: Some("[CALL_ID]"),
    after: "[ARGS]",
    arguments: Arguments::Json,
};
