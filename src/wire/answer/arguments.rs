//! Arguments behind a function's name, as they come.

use super::fate::Fate;
use super::loose::LooseValue;
use super::pairs::{Marks, Pairs};
use super::value::{Step, Value};
use crate::request::Types;
use crate::text::formats::Arguments;

/// Arguments while they are read. What they say is the text of a JSON object.
#[derive(Debug)]
pub(super) enum Reader {
    Json { value: Value, begun: bool },
    Pairs(Box<Pairs>),
    Loose(Box<LooseValue>),
}

impl Reader {
    /// `parameters`: those of the function that is called, where it is known.
    pub(super) fn new(format: &'static Arguments, parameters: Vec<(String, Types)>) -> Self {
        match format {
            Arguments::Json => Self::Json {
                value: Value::default(),
                begun: false,
            },
            &Arguments::Pairs {
                key_open,
                key_close,
                value_close,
                typed,
            } => {
                let marks = Marks {
                    key_open,
                    key_close,
                    value_close,
                    typed,
                };
                Self::Pairs(Box::new(Pairs::new(marks, parameters)))
            }
            Arguments::Loose(loose) => Self::Loose(Box::new(LooseValue::new(loose, parameters))),
        }
    }

    /// Reads a character, and appends what it says to `out`.
    pub(super) fn push(&mut self, c: char, out: &mut String) -> Fate {
        match self {
            Self::Json { value, begun } => {
                if !*begun {
                    match c {
                        _ if c.is_whitespace() => return Fate::Open,
                        '{' => *begun = true,
                        _ => {
                            out.push_str("{}");
                            return Fate::Left(c.to_string());
                        }
                    }
                }
                out.push(c);
                match value.step(c) {
                    Step::Inside => Fate::Open,
                    Step::Last | Step::Behind => Fate::Ended,
                }
            }
            Self::Pairs(pairs) => pairs.push(c, out),
            Self::Loose(loose) => loose.push(c, out),
        }
    }

    /// The answer has ended within them.
    pub(super) fn flush(&mut self, out: &mut String) {
        match self {
            Self::Json { begun: false, .. } => out.push_str("{}"),
            Self::Json { .. } => {}
            Self::Pairs(pairs) => pairs.flush(out),
            Self::Loose(loose) => loose.flush(out),
        }
    }
}
