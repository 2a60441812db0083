//! Parses the arguments that follow a function's name, piece by piece.

use super::fate::Fate;
use super::loose::LooseValue;
use super::pairs::{Marks, Pairs};
use super::value::{Step, Value};
use crate::request::Types;
use crate::text::formats::Arguments;

/// A parser of arguments. Its output is the text of a JSON object.
#[derive(Debug)]
pub(super) enum Reader {
    Json { value: Value, begun: bool },
    Pairs(Box<Pairs>),
    Loose(Box<LooseValue>),
}

impl Reader {
    /// `parameters`: those of the called function, if they are known.
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

    /// Reads one character, and appends its output to `out`.
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

    /// Ends the output, because the answer has ended within the arguments.
    pub(super) fn flush(&mut self, out: &mut String) {
        match self {
            Self::Json { begun: false, .. } => out.push_str("{}"),
            Self::Json { .. } => {}
            Self::Pairs(pairs) => pairs.flush(out),
            Self::Loose(loose) => loose.flush(out),
        }
    }
}
