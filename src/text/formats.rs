//! The formats in which models write thoughts and function calls, each described as data. The parser of answers, the grammar of
//! enforced calls and the detection by chat template all use these descriptions.
//!
//! Their texts have the white space that models write. The parser of answers accepts any white space in its place.

mod thoughts;
mod tools;

pub use thoughts::{THINK, THOUGHT_FORMATS};
pub use tools::{HERMES, TOOL_FORMATS};

/// How a model writes function calls.
#[derive(Debug, PartialEq, Eq)]
pub struct ToolFormat {
    /// Its name for `--tool-parser`.
    pub name: &'static str,
    /// A chat template has this format if it contains all texts of one of these sets.
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
    /// Whether an answer may begin with a call of an existing function without any marker.
    pub bare: bool,
    /// How name and arguments are written. Grammars use the first shape, the parser reads all.
    pub shapes: &'static [Shape],
    /// Those of its texts that are single tokens in some vocabularies.
    pub tokens: &'static [&'static str],
    /// Whether call ids have nine characters, as the model's templates require.
    pub short_ids: bool,
    /// Set if each part of an answer is a message with a header.
    pub messages: Option<&'static Messages>,
}

/// How a call names the function and its arguments.
#[derive(Debug, PartialEq, Eq)]
pub enum Shape {
    /// A JSON object: `{"<name>": ..., "<arguments>": {...}}`.
    Object {
        /// The key of a call number in quotes, which comes first.
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
        /// What follows the name before a call number, which is not part of the name.
        number: Option<&'static str>,
        /// What begins a remark after the name, if there may be one.
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
    /// Each argument separately, between markers. A text is written as it is, any other value as JSON.
    Pairs {
        /// Before a key.
        key_open: &'static str,
        /// Between a key and its value.
        key_close: &'static str,
        /// After a value.
        value_close: &'static str,
        /// What follows the key, before `true` if the value is a text, or `false`.
        typed: Option<&'static str>,
    },
    /// An object whose keys have no quotes.
    Loose(Loose),
}

/// A notation like JSON with other quotation marks and constants.
#[derive(Debug, PartialEq, Eq)]
pub struct Loose {
    /// Begins the arguments.
    pub open: char,
    /// Ends them.
    pub close: char,
    /// Between an argument's name and its value.
    pub equals: char,
    /// The quotation mark around texts. If it is longer than a character, nothing is escaped within it.
    pub quote: &'static str,
    /// Whether constants are `True`, `False` and `None`.
    pub python: bool,
    /// Whether keys are in alphabetical order.
    pub sorted: bool,
    /// Between two values.
    pub comma: &'static str,
}

/// An answer whose parts each have a header.
#[derive(Debug, PartialEq, Eq)]
pub struct Messages {
    /// Begins a header.
    pub start: &'static str,
    /// Ends the header.
    pub body: &'static str,
    /// Each of these ends a message.
    pub ends: &'static [&'static str],
    /// In a header: what precedes a function's name.
    pub to: &'static str,
    /// In a header: what marks a thought.
    pub thoughts: Option<&'static str>,
    /// The header of the answer's words. A header without a function's name also means words.
    pub words: &'static str,
    /// What a header without `start` may begin with.
    pub headers: &'static [&'static str],
}

/// How a model writes thoughts.
#[derive(Debug, PartialEq, Eq)]
pub struct ThoughtFormat {
    /// Its name for `--reasoning-parser`.
    pub name: &'static str,
    /// A chat template has this format if it contains all texts of one of these sets.
    pub templates: &'static [&'static [&'static str]],
    /// Before the thoughts.
    pub open: &'static str,
    /// After them.
    pub close: &'static str,
    /// Before the words of the answer.
    pub answer: &'static str,
    /// Markers around the words of the answer.
    pub around: &'static [&'static str],
    /// Set if each part of an answer is a message with a header.
    pub messages: Option<&'static Messages>,
    /// Those of its texts that are single tokens in some vocabularies.
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

/// The lines of `marks` without the white space around them.
pub fn lines(marks: &str) -> impl Iterator<Item = &str> {
    marks
        .split('\n')
        .map(str::trim)
        .filter(|mark| !mark.is_empty())
}

/// The separate texts of `marks`: its lines, cut at each of `tokens`, unless a token lies inside a marker.
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

    /// The markers that begin calls within the words of an answer, longest first.
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
