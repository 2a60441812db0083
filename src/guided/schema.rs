//! Rewrites a JSON schema for `llguidance`: anchors become pointers, and look-ahead at the beginning of a `pattern` becomes
//! additional patterns.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::lookahead::LookAhead;

/// Where an answer may have white space between the tokens of JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Spacing {
    /// Nowhere.
    #[default]
    Compact,
    /// One space after each `,` and `:` within a value, as Python's `json.dumps` and chat templates write it.
    Spaced,
    /// Everywhere, up to a limit.
    Free,
}

/// White space between tokens, if it is free: nothing, a space, or a line break with indentation. Without a limit, a model with
/// nothing left to say writes white space forever.
const WHITESPACE: &str = r" |\n[ \t]{0,32}";

/// The schema for `llguidance`. `strict`: a keyword that cannot be enforced is an error.
pub(super) fn prepared(schema: &Value, strict: bool, spacing: Spacing) -> Value {
    let mut schema = match schema {
        Value::Object(_) => schema.clone(),
        _ => Value::Object(Map::new()),
    };
    let mut anchors = HashMap::new();
    find_anchors(&schema, &mut String::from("#"), &mut anchors);
    rewrite(&mut schema, &anchors);
    let separator = |text: &str| match spacing {
        Spacing::Spaced => format!("{text} "),
        Spacing::Compact | Spacing::Free => text.to_owned(),
    };
    let free = spacing == Spacing::Free;
    schema["x-guidance"] = json!({
        "whitespace_flexible": free,
        "whitespace_pattern": free.then_some(WHITESPACE),
        "item_separator": separator(","),
        "key_separator": separator(":"),
        "lenient": !strict,
    });
    schema
}

fn find_anchors(schema: &Value, at: &mut String, anchors: &mut HashMap<String, String>) {
    let before = at.len();
    let mut within = |key: &str, value: &Value| {
        at.push('/');
        at.push_str(&key.replace('~', "~0").replace('/', "~1"));
        find_anchors(value, at, anchors);
        at.truncate(before);
    };
    match schema {
        Value::Object(object) => {
            for (key, value) in object {
                within(key, value);
            }
            if let Some(Value::String(name)) = object.get("$anchor") {
                anchors.insert(format!("#{name}"), at.clone());
            }
        }
        Value::Array(items) => {
            for (place, value) in items.iter().enumerate() {
                within(&place.to_string(), value);
            }
        }
        _ => {}
    }
}

/// Keywords whose value is data. Names within it are not keywords.
const DATA: [&str; 4] = ["enum", "const", "default", "examples"];
/// Keywords whose value has a schema for each of its names. These names are not keywords.
const BY_NAME: [&str; 5] = [
    "properties",
    "patternProperties",
    "$defs",
    "definitions",
    "dependentSchemas",
];

fn rewrite(schema: &mut Value, anchors: &HashMap<String, String>) {
    let object = match schema {
        Value::Object(object) => object,
        Value::Array(items) => {
            for item in items {
                rewrite(item, anchors);
            }
            return;
        }
        _ => return,
    };
    for (key, value) in object.iter_mut() {
        if BY_NAME.contains(&key.as_str()) {
            if let Value::Object(schemas) = value {
                schemas
                    .values_mut()
                    .for_each(|schema| rewrite(schema, anchors));
            }
        } else if !DATA.contains(&key.as_str()) {
            rewrite(value, anchors);
        }
    }
    if let Some(Value::String(target)) = object.get_mut("$ref")
        && let Some(pointer) = anchors.get(target)
    {
        target.clone_from(pointer);
    }
    let Some(Value::String(pattern)) = object.get("pattern") else {
        return;
    };
    // A schema cannot express negative look-ahead. The compiler will refuse it.
    let Some(LookAhead {
        with,
        without,
        rest,
    }) = LookAhead::split(pattern).filter(|split| split.without.is_empty())
    else {
        return;
    };
    debug_assert!(without.is_empty());
    object.insert("pattern".to_owned(), rest.into());
    let others = with.into_iter().map(|ahead| {
        let pattern = format!("^(?:{ahead})");
        json!({"type": "string", "pattern": pattern})
    });
    if let Value::Array(all) = object.entry("allOf").or_insert_with(|| json!([])) {
        all.extend(others);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_become_pointers_but_not_within_data() {
        let schema = json!({
            "properties": {"a": {"$ref": "#x/y"}, "b": {"$ref": "#/$defs/n"}, "$ref": {"$ref": "#t"}},
            "enum": [{"$ref": "#t"}],
            "$defs": {"n/m": {"$anchor": "t"}, "n": {"items": [{"$anchor": "x/y"}]}},
        });
        let schema = prepared(&schema, true, Spacing::Compact);
        assert_eq!(schema["properties"]["a"]["$ref"], "#/$defs/n/items/0");
        assert_eq!(schema["properties"]["b"]["$ref"], "#/$defs/n");
        assert_eq!(schema["properties"]["$ref"]["$ref"], "#/$defs/n~1m");
        assert_eq!(schema["enum"][0]["$ref"], "#t");
    }

    #[test]
    fn look_ahead_becomes_patterns_of_their_own() {
        let schema = json!({"pattern": r"^(?=.*\d)(?=.*[a-z]).{2,4}$"});
        let schema = prepared(&schema, true, Spacing::Compact);
        assert_eq!(schema["pattern"], "^.{2,4}$");
        assert_eq!(schema["allOf"][0]["pattern"], r"^(?:.*\d)");
        assert_eq!(schema["allOf"][1]["pattern"], "^(?:.*[a-z])");
        let kept = json!({"pattern": "^(?!a)b$"});
        assert_eq!(
            prepared(&kept, true, Spacing::Compact)["pattern"],
            "^(?!a)b$"
        );
    }
}
