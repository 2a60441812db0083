//! JSON values as template variables.

use minijinja::Value as Variable;
use serde_json::{Number, Value};

use super::made::Made;

/// Names that clients use for a message's reasoning. Templates read the first or the second.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

pub(super) fn from_json(value: &Value) -> Variable {
    with_depth(value).0
}

pub(super) fn from_list(items: &[Value]) -> Variable {
    list(items.iter().map(with_depth)).0
}

/// Converts messages. Each has its reasoning under the names that templates read, as `transformers` does it.
pub(super) fn from_messages(messages: &[Value]) -> Variable {
    list(messages.iter().map(from_message)).0
}

/// A value, and how deeply it is nested.
fn with_depth(value: &Value) -> (Variable, usize) {
    match value {
        Value::Null => (Variable::from(()), 0),
        Value::Bool(flag) => (Variable::from(*flag), 0),
        Value::Number(number) => (from_number(number), 0),
        Value::String(text) => (Variable::from(text.as_str()), 0),
        Value::Array(items) => list(items.iter().map(with_depth)),
        Value::Object(object) => {
            let mut deepest = 0;
            let pairs = object.iter().map(|(key, value)| {
                let (value, depth) = with_depth(value);
                deepest = deepest.max(depth);
                (key.as_str(), value)
            });
            let mapping = Variable::from_pairs(pairs);
            (Made::with_depth(mapping, deepest + 1), deepest + 1)
        }
    }
}

fn list(items: impl Iterator<Item = (Variable, usize)>) -> (Variable, usize) {
    let mut deepest = 0;
    let items = items.map(|(item, depth)| {
        deepest = deepest.max(depth);
        item
    });
    let items: Vec<Variable> = items.collect();
    let list = Made::with_depth(Variable::from(items), deepest + 1);
    (list, deepest + 1)
}

fn from_message(message: &Value) -> (Variable, usize) {
    let Value::Object(object) = message else {
        return with_depth(message);
    };
    let reasoning = REASONING_FIELDS
        .iter()
        .filter_map(|&name| object.get(name))
        .find(|value| !value.is_null());
    let Some(reasoning) = reasoning else {
        return with_depth(message);
    };
    let mut object = object.clone();
    object
        .entry("thinking")
        .or_insert_with(|| reasoning.clone());
    object.insert("reasoning_content".to_owned(), reasoning.clone());
    with_depth(&Value::Object(object))
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
