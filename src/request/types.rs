//! The parameters of functions: which JSON types they may have.

use serde_json::Value;

/// The JSON types that a schema may allow, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Types(u8);

/// References within references: a schema that goes further is not looked into.
const MAX_DEPTH: usize = 8;

impl Types {
    /// Any value.
    pub const ANY: Self = Self(0b11_1111);
    const NONE: Self = Self(0);
    const STRING: Self = Self(1);
    const NUMBER: Self = Self(2);
    const BOOLEAN: Self = Self(4);
    const NULL: Self = Self(8);
    const OBJECT: Self = Self(16);
    const ARRAY: Self = Self(32);

    /// What `schema` allows, a part of `root`.
    pub fn of(schema: &Value, root: &Value) -> Self {
        Self::within(schema, root, 0)
    }

    fn within(schema: &Value, root: &Value, depth: usize) -> Self {
        let Some(object) = schema.as_object().filter(|_| depth < MAX_DEPTH) else {
            return Self::ANY;
        };
        let mut types = Self::ANY;
        if let Some(reference) = object.get("$ref").and_then(Value::as_str)
            && let Some(target) = reference.strip_prefix('#').and_then(|at| root.pointer(at))
        {
            types = types.and(Self::within(target, root, depth + 1));
        }
        match object.get("type") {
            Some(Value::String(name)) => types = types.and(Self::named(name)),
            Some(Value::Array(names)) => {
                let names = names.iter().filter_map(Value::as_str);
                types = types.and(names.fold(Self::NONE, |all, name| all.or(Self::named(name))));
            }
            _ => {}
        }
        if let Some(Value::Array(values)) = object.get("enum") {
            types = types.and(
                values
                    .iter()
                    .fold(Self::NONE, |all, value| all.or(Self::kind(value))),
            );
        }
        if let Some(value) = object.get("const") {
            types = types.and(Self::kind(value));
        }
        for union in ["anyOf", "oneOf"] {
            if let Some(Value::Array(schemas)) = object.get(union) {
                let each = schemas
                    .iter()
                    .map(|schema| Self::within(schema, root, depth + 1));
                types = types.and(each.fold(Self::NONE, Self::or));
            }
        }
        if let Some(Value::Array(schemas)) = object.get("allOf") {
            let each = schemas
                .iter()
                .map(|schema| Self::within(schema, root, depth + 1));
            types = each.fold(types, Self::and);
        }
        types
    }

    fn named(name: &str) -> Self {
        match name {
            "string" => Self::STRING,
            "number" | "integer" => Self::NUMBER,
            "boolean" => Self::BOOLEAN,
            "null" => Self::NULL,
            "object" => Self::OBJECT,
            "array" => Self::ARRAY,
            _ => Self::ANY,
        }
    }

    const fn kind(value: &Value) -> Self {
        match value {
            Value::String(_) => Self::STRING,
            Value::Number(_) => Self::NUMBER,
            Value::Bool(_) => Self::BOOLEAN,
            Value::Null => Self::NULL,
            Value::Object(_) => Self::OBJECT,
            Value::Array(_) => Self::ARRAY,
        }
    }

    const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Texts alone.
    pub const fn only_text(self) -> bool {
        self.0 == Self::STRING.0
    }

    /// Regular expressions of the values beside texts that these types have, as JSON writes them; none where lists or objects
    /// are among them.
    pub fn words(self) -> Option<Vec<&'static str>> {
        if self.and(Self::OBJECT.or(Self::ARRAY)).0 != 0 {
            return None;
        }
        let kinds = [
            (Self::NULL, "null"),
            (Self::BOOLEAN, "true|false"),
            (Self::NUMBER, r"-?(0|[1-9][0-9]*)(\.[0-9]+)?"),
        ];
        let there = kinds.into_iter().filter(|&(kind, _)| self.and(kind).0 != 0);
        Some(there.map(|(_, word)| word).collect())
    }

    /// Texts, and perhaps others.
    pub const fn may_be_text(self) -> bool {
        self.0 & Self::STRING.0 != 0
    }

    /// The JSON of a value that was written as a bare text: what the schema allows, if the text can be read as that, or the
    /// text itself.
    pub fn json(self, text: &str) -> String {
        let trimmed = text.trim();
        let word = match trimmed {
            "True" => "true",
            "False" => "false",
            "None" => "null",
            _ => trimmed,
        };
        if !self.only_text()
            && let Ok(parsed) = serde_json::from_str::<Value>(word)
            && self.and(Self::kind(&parsed)).0 != 0
            // A text in quotes where texts are bare: the quotes are the text's own.
            && !(parsed.is_string() && self.may_be_text())
        {
            return word.to_owned();
        }
        Value::from(text).to_string()
    }
}

/// A function that an answer may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Its parameters, and what they may be.
    pub parameters: Vec<(String, Types)>,
}

impl Function {
    /// `schema`: of its parameters together.
    pub fn new(name: &str, schema: Option<&Value>) -> Self {
        let properties = schema
            .and_then(|schema| schema.get("properties"))
            .and_then(Value::as_object);
        let parameters = properties.into_iter().flatten().map(|(name, property)| {
            let root = schema.unwrap_or(&Value::Null);
            (name.clone(), Types::of(property, root))
        });
        Self {
            name: name.to_owned(),
            parameters: parameters.collect(),
        }
    }
}

/// What the parameter of that name may be.
pub fn types_of(parameters: &[(String, Types)], name: &str) -> Types {
    parameters
        .iter()
        .find(|(known, _)| known == name)
        .map_or(Types::ANY, |&(_, types)| types)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_bare_text_is_what_its_schema_allows() {
        let root = json!({"$defs": {"n": {"type": ["integer", "null"]}}});
        let json = |schema: Value, text: &str| Types::of(&schema, &root).json(text);
        assert_eq!(json(json!({"type": "string"}), "5"), r#""5""#);
        assert_eq!(json(json!({"type": "integer"}), " 5\n"), "5");
        assert_eq!(json(json!({"$ref": "#/$defs/n"}), "null"), "null");
        assert_eq!(json(json!({"type": "boolean"}), "True"), "true");
        assert_eq!(json(json!({"type": "integer"}), "five"), r#""five""#);
        assert_eq!(json(json!({"type": ["string", "null"]}), "5"), r#""5""#);
        assert_eq!(
            json(
                json!({"anyOf": [{"type": "string"}, {"type": "object"}]}),
                "{\"a\": 1}"
            ),
            "{\"a\": 1}"
        );
        assert_eq!(json(json!({}), "\"a\""), r#""\"a\"""#);
        assert_eq!(json(json!({}), "{\"a\""), r#""{\"a\"""#);
        assert_eq!(json(json!({"enum": ["1", "2"]}), "1"), r#""1""#);
        assert_eq!(json(json!({"enum": [1, 2]}), "1"), "1");
    }
}
