//! Properties of a chat template: whether it shows tools, in which format the model writes calls, and whether it thinks.

use serde_json::{Map, Value, json};

use super::{ChatTemplate, Ending};
use crate::error::{Error, Result};
use crate::text::formats::{
    HERMES, THOUGHT_FORMATS, TOOL_FORMATS, Thinking, ThoughtFormat, Thoughts, ToolFormat,
};

/// The properties, found when the template is compiled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Traits {
    knows_tools: bool,
    /// Whether it shows tools only as text in a member of the system message.
    tools_in_system: bool,
    tools: &'static ToolFormat,
    thoughts: Option<&'static ThoughtFormat>,
    /// Whether a system message may follow other messages.
    notes: bool,
}

impl Traits {
    pub(super) const UNKNOWN: Self = Self {
        knows_tools: false,
        tools_in_system: false,
        tools: &HERMES,
        thoughts: None,
        notes: false,
    };
}

impl ChatTemplate {
    pub(super) fn find_traits(&self, source: &str) -> Traits {
        let mark = "XTOOLX";
        let function = json!({"name": mark, "description": mark, "parameters": {"type": "object", "properties": {}}});
        let tools = [json!({"type": "function", "function": function})];
        let messages = [json!({"role": "user", "content": "X"})];
        let shown = self.render(&messages, Some(&tools), Ending::Answer, &Map::new());
        let knows_tools = shown.is_ok_and(|text| text.contains(mark));
        let system = [
            json!({"role": "system", "content": "X", "tools": mark}),
            json!({"role": "user", "content": "X"}),
        ];
        let shown = self.render(&system, None, Ending::Answer, &Map::new());
        let tools_in_system = !knows_tools && shown.is_ok_and(|text| text.contains(mark));
        // If the template does not show tools, they are described in Hermes' format, whatever the model was trained on.
        let tools = ToolFormat::of_template(source).filter(|_| knows_tools || tools_in_system);
        Traits {
            knows_tools,
            tools_in_system,
            tools: tools.unwrap_or(&HERMES),
            thoughts: ThoughtFormat::of_template(source),
            notes: self.shows_notes(),
        }
    }

    /// Whether a system message between others is rendered at its place, wherever that is.
    fn shows_notes(&self) -> bool {
        let (user, note) = (("user", "XUSERX"), ("system", "XNOTEX"));
        let shown = |said: &[(&str, &str)]| {
            let messages: Vec<Value> = said
                .iter()
                .map(|(role, content)| json!({"role": role, "content": content}))
                .collect();
            let text = self.render(&messages, None, Ending::Answer, &Map::new());
            let Ok(mut rest) = text.as_deref() else {
                return false;
            };
            said.iter().all(|(_, content)| {
                rest.split_once(content)
                    .inspect(|(_, after)| rest = after)
                    .is_some()
            })
        };
        // Templates that require alternating roles distinguish only the user's role from all others.
        shown(&[user, note, user]) && shown(&[user, ("assistant", "XANSWERX"), note, user])
    }

    /// The same template with other parsers for answers. `tools`: `auto` or the name of a format of calls; `reasoning`: `auto`,
    /// `none` or the name of a format of thoughts.
    ///
    /// # Errors
    /// `invalid_value` lists the allowed names.
    pub fn with_parsers(mut self, tools: &str, reasoning: &str) -> Result<Self> {
        if tools != "auto" {
            self.traits.tools = ToolFormat::named(tools).ok_or_else(|| {
                let names = TOOL_FORMATS.iter().map(|format| format.name);
                unknown("tool_parser", &["auto"], names, tools)
            })?;
        }
        self.traits.thoughts = match reasoning {
            "auto" => self.traits.thoughts,
            "none" => None,
            name => Some(ThoughtFormat::named(name).ok_or_else(|| {
                let names = THOUGHT_FORMATS.iter().map(|format| format.name);
                unknown("reasoning_parser", &["auto", "none"], names, name)
            })?),
        };
        Ok(self)
    }

    /// Whether it writes descriptions of tools into the prompt.
    pub const fn knows_tools(&self) -> bool {
        self.traits.knows_tools
    }

    /// Converts messages for this template if it does not support tools. `described`: the messages begin the conversation.
    pub fn without_tools(
        &self,
        messages: &[Value],
        tools: &[Value],
        described: bool,
    ) -> Vec<Value> {
        if self.traits.tools_in_system {
            with_system_tools(self.traits.tools, messages, tools, described)
        } else {
            without_tools(messages, tools, described)
        }
    }

    /// Whether a system message may follow other messages.
    pub const fn knows_notes(&self) -> bool {
        self.traits.notes
    }

    /// Whether its model may think before it answers.
    pub const fn thinks(&self) -> bool {
        self.traits.thoughts.is_some()
    }

    /// The format in which its model writes calls.
    pub const fn tool_format(&self) -> &'static ToolFormat {
        self.traits.tools
    }

    /// The format in which its model writes thoughts.
    pub const fn thought_format(&self) -> Option<&'static ThoughtFormat> {
        self.traits.thoughts
    }

    /// Whether the answer to a rendered `prompt` begins with thoughts.
    pub fn thinking(&self, prompt: &str, ending: Ending) -> Option<Thoughts> {
        let prompt = prompt.trim_end();
        let format = self.traits.thoughts.filter(|_| ending != Ending::Closed)?;
        if prompt.ends_with(format.open.trim()) {
            Some(Thoughts {
                format,
                begin: Thinking::Open,
            })
        } else if ending == Ending::OpenMessage || prompt.ends_with(format.close.trim()) {
            None
        } else {
            Some(Thoughts {
                format,
                begin: Thinking::Maybe,
            })
        }
    }
}

fn unknown(
    param: &str,
    others: &[&str],
    names: impl Iterator<Item = &'static str>,
    given: &str,
) -> Error {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    let words: Vec<&str> = others.iter().copied().chain(names).collect();
    let message = format!(
        "{param} must be one of {}, but {given:?} was given",
        words.join(", ")
    );
    Error::invalid(param, message)
}

/// Converts messages for a template without any support of tools. If `described`, the tools are described in the system message.
/// Calls are written in Hermes' format, and results become messages of the user.
fn without_tools(messages: &[Value], tools: &[Value], described: bool) -> Vec<Value> {
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

/// Converts messages for a template that shows the tools in its system message but supports no calls. Calls are written in
/// `format`, and results become messages of the role that Phi 4 mini has a token for.
fn with_system_tools(
    format: &ToolFormat,
    messages: &[Value],
    tools: &[Value],
    described: bool,
) -> Vec<Value> {
    let listed = |objects: Vec<Value>| Value::from(objects).to_string();
    let mut plain = messages.to_vec();
    for message in &mut plain {
        if message["role"] == "tool" {
            message["role"] = "tool_response".into();
        }
        let calls = message.get("tool_calls").and_then(Value::as_array);
        if let Some(calls) = calls.filter(|calls| !calls.is_empty()) {
            let called = calls.iter().map(|call| {
                let function = &call["function"];
                json!({"name": function["name"], "arguments": function["arguments"]})
            });
            let words = message["content"].as_str().unwrap_or_default();
            let text = format!(
                "{words}{}{}{}",
                format.open,
                listed(called.collect()),
                format.close
            );
            message["content"] = text.into();
        }
    }
    if described && !tools.is_empty() {
        let functions = tools.iter().map(|tool| tool["function"].clone());
        let text = listed(functions.collect());
        match plain.first_mut() {
            Some(first) if first["role"] == "system" => first["tools"] = text.into(),
            _ => plain.insert(0, json!({"role": "system", "content": "", "tools": text})),
        }
    }
    plain
}

/// Converts messages for a template that accepts a system message only at the beginning. Later ones become notes of the user, each
/// joined to a message of the user before or after it. `first`: the list begins the conversation.
pub fn without_notes(messages: &[Value], first: bool) -> Vec<Value> {
    let mut plain: Vec<Value> = Vec::with_capacity(messages.len());
    for (at, message) in messages.iter().enumerate() {
        let mut message = message.clone();
        let note = message["role"] == "system" && !(first && at == 0);
        if note {
            message["role"] = "user".into();
        }
        match plain.last_mut() {
            Some(last)
                if last["role"] == "user"
                    && message["role"] == "user"
                    && (note || messages[at - 1]["role"] == "system") =>
            {
                let text =
                    |message: &Value| message["content"].as_str().unwrap_or_default().to_owned();
                last["content"] = format!("{}\n\n{}", text(last), text(&message)).into();
            }
            _ => plain.push(message),
        }
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
