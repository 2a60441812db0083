//! How models write thoughts and calls of functions: one description a format, as data. The parser of answers, the grammar of
//! enforced calls and the detection by a chat template are all made from it.
//!
//! In all texts white space is as models write it; who reads an answer takes any in its place.

mod thoughts;
mod tools;

pub use thoughts::{THINK, THOUGHT_FORMATS};
pub use tools::{HERMES, TOOL_FORMATS};

/// How a model writes calls of functions.
#[derive(Debug, PartialEq, Eq)]
pub struct ToolFormat {
    /// What `--tool-parser` calls it.
    pub name: &'static str,
    /// A chat template is of such a model where it has all texts of one of these sets.
    pub templates: &'static [&'static [&'static str]],
    /// Before the first call of an answer.
    pub open: &'static str,
    /// After the last one.
    pub close: &'static str,
    /// Before each call.
    pub call_open: &'static str,
    /// After each call.
    pub call_close: &'static str,
    /// Between two calls.
    pub between: &'static str,
    /// Other texts that begin calls in the answers of such models.
    pub also: &'static [&'static str],
    /// The calls stand in the brackets of a list.
    pub list: bool,
    /// An answer may begin with a call of a function that there is, without anything before it.
    pub bare: bool,
    /// How name and arguments are written. Grammars write the first; all are read.
    pub shapes: &'static [Shape],
    /// Texts among these that are single tokens in some vocabularies.
    pub tokens: &'static [&'static str],
    /// Ids of calls have nine characters, as its templates want.
    pub short_ids: bool,
    /// Every part of an answer is a message with a header.
    pub messages: Option<&'static Messages>,
}

/// How a call says what it calls, and with what.
#[derive(Debug, PartialEq, Eq)]
pub enum Shape {
    /// A JSON object: `{"<name>": ..., "<arguments>": {...}}`.
    Object {
        /// The key of a number in quotes, which comes first.
        number: Option<&'static str>,
        /// The key of the name.
        name: &'static str,
        /// The key of the arguments.
        arguments: &'static str,
    },
    /// The name, then the arguments.
    Named {
        /// Before the name.
        before: &'static str,
        /// The name is followed by this and a number, which is no part of it.
        number: Option<&'static str>,
        /// A remark may follow the name; this begins it.
        remark: Option<&'static str>,
        /// After the name.
        after: &'static str,
        /// What follows.
        arguments: Arguments,
    },
}

/// How arguments are written.
#[derive(Debug, PartialEq, Eq)]
pub enum Arguments {
    /// A JSON object.
    Json,
    /// Each by itself, between marks. A text stands there as it is, all else as JSON.
    Pairs {
        /// Before a key.
        key_open: &'static str,
        /// Between a key and its value.
        key_close: &'static str,
        /// After a value.
        value_close: &'static str,
        /// Follows the key, and then `true` where the value is a text, or `false`.
        typed: Option<&'static str>,
    },
    /// An object whose keys have no quotes.
    Loose(Loose),
}

/// JSON, but for its quotes and words.
#[derive(Debug, PartialEq, Eq)]
pub struct Loose {
    /// Begins the arguments.
    pub open: char,
    /// Ends them.
    pub close: char,
    /// Between an argument's name and its value.
    pub equals: char,
    /// Around texts. Nothing is escaped within a mark that is longer than a character.
    pub quote: &'static str,
    /// `True`, `False` and `None`.
    pub python: bool,
    /// Keys come in alphabetical order.
    pub sorted: bool,
    /// Between two values.
    pub comma: &'static str,
}

/// Parts of an answer that each have a header.
#[derive(Debug, PartialEq, Eq)]
pub struct Messages {
    /// Begins a header.
    pub start: &'static str,
    /// Ends the header.
    pub body: &'static str,
    /// Each of these ends a message.
    pub ends: &'static [&'static str],
    /// In a header: a function's name follows.
    pub to: &'static str,
    /// In a header: the message is a thought.
    pub thoughts: Option<&'static str>,
    /// A header that is this alone, or has no name, is of words.
    pub words: &'static str,
    /// A header that was not begun begins with one of these.
    pub headers: &'static [&'static str],
}

/// How a model writes thoughts.
#[derive(Debug, PartialEq, Eq)]
pub struct ThoughtFormat {
    /// What `--reasoning-parser` calls it.
    pub name: &'static str,
    /// A chat template is of such a model where it has all texts of one of these sets.
    pub templates: &'static [&'static [&'static str]],
    /// Before the thoughts.
    pub open: &'static str,
    /// After them.
    pub close: &'static str,
    /// Before the words of the answer.
    pub answer: &'static str,
    /// Texts around the words of the answer that are no part of it.
    pub around: &'static [&'static str],
    /// Every part of an answer is a message with a header.
    pub messages: Option<&'static Messages>,
    /// Texts among these that are single tokens in some vocabularies.
    pub tokens: &'static [&'static str],
}

/// Whether an answer begins with thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thinking {
    /// The prompt has opened them.
    Open,
    /// The answer may open them.
    Maybe,
}

/// An answer's thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thoughts {
    /// How they are written.
    pub format: &'static ThoughtFormat,
    /// Whether the answer begins with them.
    pub begin: Thinking,
}

impl Thoughts {
    /// Thoughts between `<think>` and `</think>`.
    pub const fn think(begin: Thinking) -> Self {
        Self {
            format: &THINK,
            begin,
        }
    }
}

/// The texts of `marks`, one in a line, without the white space around them.
pub fn lines(marks: &str) -> impl Iterator<Item = &str> {
    marks
        .split('\n')
        .map(str::trim)
        .filter(|mark| !mark.is_empty())
}

/// The texts of `marks` that stand by themselves: one in a line, and each of `tokens`, unless it is the inside of a mark.
pub fn pieces<'a>(marks: &'a str, tokens: &[&str]) -> impl Iterator<Item = &'a str> {
    let mut found = Vec::new();
    for mut line in lines(marks) {
        while let Some((at, token)) = tokens
            .iter()
            .filter(|token| token.starts_with(['<', '[']))
            .filter_map(|token| line.find(token).map(|at| (at, token)))
            .min_by_key(|&(at, _)| at)
        {
            found.push(&line[..at]);
            found.push(&line[at..at + token.len()]);
            line = &line[at + token.len()..];
        }
        found.push(line);
    }
    found
        .into_iter()
        .map(str::trim)
        .filter(|piece| !piece.is_empty())
}

impl ToolFormat {
    /// The format of that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        TOOL_FORMATS
            .iter()
            .copied()
            .find(|format| format.name == name)
    }

    /// The format that a chat template shows.
    pub fn of_template(source: &str) -> Option<&'static Self> {
        let shows = |format: &&Self| has_one_of(source, format.templates);
        TOOL_FORMATS.iter().copied().find(shows)
    }

    /// What begins calls among the words of an answer, longest first.
    pub fn openings(&self) -> Vec<&'static str> {
        let first = pieces(self.open, self.tokens)
            .chain(pieces(self.call_open, self.tokens))
            .next()
            .into_iter();
        let named = self.shapes.iter().filter_map(|shape| match shape {
            Shape::Named { before, .. } if self.open.is_empty() => lines(before).next(),
            _ => None,
        });
        let mut openings: Vec<&'static str> = first
            .chain(named)
            .chain(self.also.iter().copied())
            .collect();
        openings.sort_by_key(|mark| std::cmp::Reverse(mark.len()));
        openings.dedup();
        openings
    }
}

impl ThoughtFormat {
    /// The format of that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        THOUGHT_FORMATS
            .iter()
            .copied()
            .find(|format| format.name == name)
    }

    /// The format that a chat template shows.
    pub fn of_template(source: &str) -> Option<&'static Self> {
        let shows = |format: &&Self| has_one_of(source, format.templates);
        THOUGHT_FORMATS.iter().copied().find(shows)
    }
}

fn has_one_of(source: &str, sets: &[&[&str]]) -> bool {
    sets.iter()
        .any(|texts| texts.iter().all(|text| source.contains(text)))
}
