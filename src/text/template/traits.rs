//! What a chat template says of its model beside its text: whether it shows tools, how the model calls them, whether it thinks.

use serde_json::{Map, Value, json};

use super::{ChatTemplate, Ending};
use crate::error::{Error, Result};

/// How a model writes calls of functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// Hermes, Qwen: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.
    Hermes,
    /// Llama 3: a bare `{"name": ..., "parameters": ...}`, or one after `<|python_tag|>`.
    Llama3,
    /// Mistral: `[TOOL_CALLS]` and a list of such objects, or names with `[ARGS]`.
    Mistral,
}

/// Whether an answer begins with thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thinking {
    /// The prompt has opened them.
    Open,
    /// The answer may open them.
    Maybe,
}

/// What is found out once, when the template is compiled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Traits {
    knows_tools: bool,
    tool_format: ToolFormat,
    thinks: bool,
}

impl Traits {
    pub(super) const UNKNOWN: Self = Self {
        knows_tools: false,
        tool_format: ToolFormat::Hermes,
        thinks: false,
    };
}

impl ChatTemplate {
    pub(super) fn find_traits(&self, source: &str) -> Traits {
        let has = |word| source.contains(word);
        let tool_format = if has("<tool_call>") {
            ToolFormat::Hermes
        } else if has("[TOOL_CALLS]") {
            ToolFormat::Mistral
        } else if has("<|python_tag|>") || has("ipython") {
            ToolFormat::Llama3
        } else {
            ToolFormat::Hermes
        };
        let mark = "XTOOLX";
        let function = json!({"name": mark, "description": mark, "parameters": {"type": "object", "properties": {}}});
        let tools = [json!({"type": "function", "function": function})];
        let messages = [json!({"role": "user", "content": "X"})];
        let shown = self.render(&messages, Some(&tools), Ending::Answer, &Map::new());
        Traits {
            knows_tools: shown.is_ok_and(|text| text.contains(mark)),
            tool_format,
            thinks: has("<think>") || has("</think>"),
        }
    }

    /// The same template with another way to read answers. `tools`: `auto`, `hermes`, `llama3` or `mistral`; `reasoning`:
    /// `auto`, `none` or `think`.
    ///
    /// # Errors
    /// `invalid_value` names the words that are allowed.
    pub fn with_parsers(mut self, tools: &str, reasoning: &str) -> Result<Self> {
        match tools {
            "auto" => {}
            "hermes" => self.traits.tool_format = ToolFormat::Hermes,
            "llama3" => self.traits.tool_format = ToolFormat::Llama3,
            "mistral" => self.traits.tool_format = ToolFormat::Mistral,
            _ => {
                let message = format!(
                    "tool_parser must be auto, hermes, llama3 or mistral, but {tools:?} was given"
                );
                return Err(Error::invalid("tool_parser", message));
            }
        }
        match reasoning {
            "auto" => {}
            "none" => self.traits.thinks = false,
            "think" => self.traits.thinks = true,
            _ => {
                let message = format!(
                    "reasoning_parser must be auto, none or think, but {reasoning:?} was given"
                );
                return Err(Error::invalid("reasoning_parser", message));
            }
        }
        Ok(self)
    }

    /// Whether it writes descriptions of tools into the prompt.
    pub const fn knows_tools(&self) -> bool {
        self.traits.knows_tools
    }

    /// How its model writes calls.
    pub const fn tool_format(&self) -> ToolFormat {
        self.traits.tool_format
    }

    /// Whether the answer to a rendered `prompt` begins with thoughts.
    pub fn thinking(&self, prompt: &str, ending: Ending) -> Option<Thinking> {
        let prompt = prompt.trim_end();
        if !self.traits.thinks || ending == Ending::Closed {
            None
        } else if prompt.ends_with("<think>") {
            Some(Thinking::Open)
        } else if ending == Ending::OpenMessage || prompt.ends_with("</think>") {
            None
        } else {
            Some(Thinking::Maybe)
        }
    }
}

/// Messages for a template that knows nothing of tools: these are described in the system's words where `described`, calls
/// are written as Hermes does, and what the tools gave is the user's.
pub fn without_tools(messages: &[Value], tools: &[Value], described: bool) -> Vec<Value> {
    let mut plain: Vec<Value> = Vec::with_capacity(messages.len() + 1);
    for message in messages {
        let text = |key: &str| message.get(key).and_then(Value::as_str).unwrap_or_default();
        if text("role") == "tool" {
            let given = format!("<tool_response>\n{}\n</tool_response>", text("content"));
            match plain.last_mut() {
                Some(last) if last.get("tool").is_some() => {
                    let before = last["content"].as_str().unwrap_or_default();
                    last["content"] = format!("{before}\n{given}").into();
                }
                _ => plain.push(json!({"role": "user", "content": given, "tool": true})),
            }
            continue;
        }
        let mut message = message.clone();
        if let Some(calls) = message.get("tool_calls").and_then(Value::as_array) {
            let call = |call: &Value| {
                let function = &call["function"];
                let call = json!({"name": function["name"], "arguments": function["arguments"]});
                format!("<tool_call>\n{call}\n</tool_call>")
            };
            let words = Some(text("content").to_owned()).filter(|words| !words.is_empty());
            let parts: Vec<String> = words.into_iter().chain(calls.iter().map(call)).collect();
            message["content"] = parts.join("\n").into();
            if let Some(object) = message.as_object_mut() {
                object.remove("tool_calls");
            }
        }
        plain.push(message);
    }
    for message in &mut plain {
        if let Some(object) = message.as_object_mut() {
            object.remove("tool");
        }
    }
    if described && !tools.is_empty() {
        describe(&mut plain, tools);
    }
    plain
}

fn describe(messages: &mut Vec<Value>, tools: &[Value]) {
    let lines: Vec<String> = tools.iter().map(Value::to_string).collect();
    let text = format!(
        "You can call functions. Each is described here by one JSON object in a line:\n<tools>\n{}\n</tools>\n\
         To call one, write its name and its arguments as a JSON object between two markers, and wait for what it gives:\n\
         <tool_call>\n{{\"name\": \"its name\", \"arguments\": {{}}}}\n</tool_call>",
        lines.join("\n")
    );
    match messages.first_mut() {
        Some(first) if first["role"] == "system" => {
            let before = first["content"].as_str().unwrap_or_default();
            first["content"] = format!("{before}\n\n{text}").into();
        }
        _ => messages.insert(0, json!({"role": "system", "content": text})),
    }
}
