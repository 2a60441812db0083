//! Functions that an answer may call.

use serde::Deserialize;
use serde_json::Value;

use super::guide::check_bytes;
use super::{Input, Submission, check_count};
use crate::error::{Error, Result};

/// Most functions of a request.
pub const MAX_TOOLS: usize = 128;

/// Whether an answer calls functions.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToolChoice {
    /// As the model likes.
    Auto,
    /// It is one call or more.
    Required,
    /// It is one call of one function.
    Function {
        /// The function's name.
        name: String,
    },
}

/// The member of a chat completion's message that has the calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallMember {
    /// All of them.
    #[default]
    ToolCalls,
    /// One, as before there were tools.
    FunctionCall,
}

/// How the reply reports calls of a function.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallForm {
    /// The client's name for it.
    pub name: String,
    /// The namespace that it belongs to.
    #[serde(default)]
    pub namespace: Option<String>,
    /// It is a custom tool: the reply reports its one argument, `input`, as text.
    #[serde(default)]
    pub custom: bool,
}

/// The functions that `tools` describe: name, schema of the parameters, and whether that is strict.
pub fn functions(tools: &[Value]) -> impl Iterator<Item = (&str, Option<&Value>, bool)> {
    tools.iter().map(|tool| {
        let function = &tool["function"];
        let parameters = function.get("parameters").filter(|value| !value.is_null());
        let name = function["name"].as_str().unwrap_or_default();
        (name, parameters, function["strict"].as_bool() == Some(true))
    })
}

pub(super) fn check_tools(submission: &Submission) -> Result<()> {
    let Some(choice) = &submission.tool_choice else {
        return Ok(());
    };
    let tools = match &submission.input {
        Input::Messages {
            tools: Some(tools), ..
        } => tools.as_slice(),
        _ => &[],
    };
    check_count("tools", tools.len(), MAX_TOOLS)?;
    if tools.is_empty() {
        return Err(Error::invalid(
            "tool_choice",
            "tool_choice needs at least one tool, but none was given",
        ));
    }
    check_bytes(
        "tools",
        tools.iter().map(|tool| tool.to_string().len()).sum(),
    )?;
    for (at, (name, _, _)) in functions(tools).enumerate() {
        if functions(tools).take(at).any(|(other, _, _)| other == name) {
            let message =
                format!("functions must have different names, but {name:?} was given twice");
            return Err(Error::invalid("tools", message));
        }
    }
    match choice {
        ToolChoice::Function { name } if functions(tools).all(|(known, _, _)| known != name) => {
            let message = format!("tool_choice must name one of the tools, but {name:?} was given");
            Err(Error::invalid("tool_choice", message))
        }
        _ => Ok(()),
    }
}
