//! JSON values as template variables.

use minijinja::Value as Variable;
use serde_json::{Number, Value};

/// Names that clients give a message's reasoning; templates read the first, or the second.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

pub(super) fn from_json(value: &Value) -> Variable {
    match value {
        Value::Null => Variable::from(()),
        Value::Bool(flag) => Variable::from(*flag),
        Value::Number(number) => from_number(number),
        Value::String(text) => Variable::from(text.as_str()),
        Value::Array(items) => from_list(items),
        Value::Object(object) => Variable::from_pairs(
            object
                .iter()
                .map(|(key, value)| (key.as_str(), from_json(value))),
        ),
    }
}

pub(super) fn from_list(items: &[Value]) -> Variable {
    items.iter().map(from_json).collect()
}

/// Messages, each with its reasoning under the names that templates read, as `transformers` does it.
pub(super) fn from_messages(messages: &[Value]) -> Variable {
    messages.iter().map(from_message).collect()
}

fn from_message(message: &Value) -> Variable {
    let Value::Object(object) = message else {
        return from_json(message);
    };
    let reasoning = REASONING_FIELDS
        .iter()
        .filter_map(|&name| object.get(name))
        .find(|value| !value.is_null());
    let Some(reasoning) = reasoning else {
        return from_json(message);
    };
    let mut object = object.clone();
    object
        .entry("thinking")
        .or_insert_with(|| reasoning.clone());
    object.insert("reasoning_content".to_owned(), reasoning.clone());
    from_json(&Value::Object(object))
}

fn from_number(number: &Number) -> Variable {
    if let Some(n) = number.as_i64() {
        Variable::from(n)
    } else if let Some(n) = number.as_u64() {
        Variable::from(n)
    } else {
        Variable::from(number.as_f64().unwrap_or(f64::NAN))
    }
}
