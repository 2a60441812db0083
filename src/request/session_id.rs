//! What a session is called.

use std::fmt;
use std::sync::Arc;

use serde::de::{Deserializer, Error as _, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::error::{Error, Result};

/// Longest name, in characters.
pub const MAX_NAME_CHARS: usize = 128;
/// What begins a name in a log, where numbers stand beside names.
const NAME_SIGN: char = '"';

/// A session's id within its tenant. A number and its decimal digits are one id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SessionId {
    /// Clients' numbers are 0 and above. Those below -1 are the server's own: no client can name them.
    Number(i64),
    /// Any other text of 1 to [`MAX_NAME_CHARS`] characters without control characters.
    Name(Arc<str>),
}

impl SessionId {
    /// The least of all ids.
    pub const FIRST: Self = Self::Number(i64::MIN);
    /// The least id that a client can give.
    pub const FIRST_OF_CLIENTS: Self = Self::Number(0);

    /// The id that a client means by `text`.
    ///
    /// # Errors
    /// `invalid_value` (400) names the limit, and what was given.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse = |message: String| Err(Error::invalid("session_id", message));
        let length = text.chars().count();
        if length == 0 || length > MAX_NAME_CHARS {
            return refuse(format!(
                "a session's id has 1 to {MAX_NAME_CHARS} characters, but {length} were given"
            ));
        }
        if let Some(control) = text.chars().find(|c| c.is_control()) {
            return refuse(format!(
                "a session's id has no control characters, but U+{:04X} was given",
                u32::from(control)
            ));
        }
        if text == "-1" {
            return refuse("-1 stands for no session".to_owned());
        }
        Ok(Self::of(text))
    }

    /// The id of a text within the bounds.
    fn of(text: &str) -> Self {
        match text.parse() {
            // Not "+7", "007" or "-5": a number has one decimal string.
            Ok(number) if number >= 0 && i64::to_string(&number) == text => Self::Number(number),
            _ => Self::Name(text.into()),
        }
    }

    /// As a log has it.
    pub fn to_log(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Name(name) => format!("{NAME_SIGN}{name}"),
        }
    }

    /// The id that a log has as `text`; None where no log of this format does.
    pub fn from_log(text: &str) -> Option<Self> {
        match text.strip_prefix(NAME_SIGN) {
            None => text.parse().ok().map(Self::Number),
            Some(name) => Self::parse(name)
                .ok()
                .filter(|id| matches!(id, Self::Name(_))),
        }
    }
}

impl From<i64> for SessionId {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl Serialize for SessionId {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Number(number) => serializer.serialize_i64(*number),
            Self::Name(name) => serializer.serialize_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for SessionId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Id;

        impl Visitor<'_> for Id {
            type Value = SessionId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a session's id, an integer or a string")
            }

            fn visit_i64<E>(self, number: i64) -> std::result::Result<SessionId, E> {
                Ok(number.into())
            }

            fn visit_u64<E: serde::de::Error>(
                self,
                number: u64,
            ) -> std::result::Result<SessionId, E> {
                i64::try_from(number)
                    .map(SessionId::Number)
                    .map_err(E::custom)
            }

            fn visit_str<E: serde::de::Error>(
                self,
                text: &str,
            ) -> std::result::Result<SessionId, E> {
                SessionId::parse(text).map_err(|error| E::custom(error.message))
            }
        }

        deserializer.deserialize_any(Id).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_and_its_digits_are_one_id_and_other_texts_are_names() {
        for number in [0, 7, i64::MAX] {
            let id = SessionId::parse(&number.to_string()).unwrap();
            assert_eq!(id, SessionId::Number(number));
        }
        for name in ["007", "+7", "-5", "7 ", "9223372036854775808", "é/x", "\"7"] {
            assert_eq!(
                SessionId::parse(name).unwrap(),
                SessionId::Name(name.into())
            );
        }
    }

    #[test]
    fn what_is_no_id_is_refused_with_the_limit() {
        let long = "é".repeat(129);
        for (text, words) in [
            ("", "1 to 128 characters, but 0"),
            (long.as_str(), "but 129 were given"),
            ("a\nb", "U+000A"),
            ("a\u{85}", "U+0085"),
            ("-1", "no session"),
        ] {
            let error = SessionId::parse(text).unwrap_err();
            assert_eq!(error.kind.status(), 400);
            assert!(error.message.contains(words), "{}", error.message);
        }
        assert!(SessionId::parse(&"é".repeat(128)).is_ok());
    }

    #[test]
    fn a_log_tells_names_from_the_servers_own_numbers() {
        let ids = [
            SessionId::Number(-5),
            SessionId::Number(7),
            SessionId::Name("-5".into()),
            SessionId::Name("\"".into()),
        ];
        for id in ids {
            assert_eq!(SessionId::from_log(&id.to_log()), Some(id));
        }
        for text in ["", "x", "\"7", "\"", "\"a\u{1}"] {
            assert_eq!(SessionId::from_log(text), None, "{text:?}");
        }
    }

    #[test]
    fn json_has_numbers_and_strings() {
        let ids: Vec<SessionId> = serde_json::from_str(r#"[7, "7", -3, "ada"]"#).unwrap();
        assert_eq!(ids[0], ids[1]);
        assert_eq!(serde_json::to_string(&ids).unwrap(), r#"[7,7,-3,"ada"]"#);
        for json in ["18446744073709551615", "1.5", "\"\"", "null"] {
            assert!(serde_json::from_str::<SessionId>(json).is_err(), "{json}");
        }
    }
}
