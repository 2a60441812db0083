//! What a route's reply looks like: one file for each, behind one trait.

use super::answer::Piece;
use super::blocks::Change;
use super::reply::{Choice, Head};
use super::{chat, completions, generate, interactive, messages, responses};
use crate::error::{Error, Result};
use crate::sched::FinishReason;

/// All wire forms.
const FORMATS: [&dyn WireFormat; 6] = [
    &generate::Generate,
    &chat::Chat,
    &completions::Completions,
    &responses::Responses,
    &messages::Messages,
    &interactive::Interactive,
];

/// What the text of an answer is read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// Plain text.
    Text,
    /// Thoughts, words and calls, where they are looked for.
    Pieces,
    /// The same, as a list of parts that begin and end.
    Blocks,
}

/// What is new of an answer.
#[derive(Debug)]
pub(super) enum Said {
    Text(String),
    Pieces(Vec<Piece>),
    Changes(Vec<Change>),
}

impl Said {
    pub(super) const fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Pieces(pieces) => pieces.is_empty(),
            Self::Changes(changes) => changes.is_empty(),
        }
    }

    /// New words of an answer that is not taken apart.
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Pieces(_) | Self::Changes(_) => "",
        }
    }

    pub(super) fn pieces(&self) -> &[Piece] {
        match self {
            Self::Pieces(pieces) => pieces,
            Self::Text(_) | Self::Changes(_) => &[],
        }
    }

    pub(super) fn changes(&self) -> &[Change] {
        match self {
            Self::Changes(changes) => changes,
            Self::Text(_) | Self::Pieces(_) => &[],
        }
    }
}

/// The bytes of one route's replies. Each method appends to `out`.
pub(super) trait WireFormat: std::fmt::Debug + Sync {
    /// What the core's submissions call the route.
    fn name(&self) -> &'static str;

    /// What answers are read as.
    fn reads(&self) -> Reads {
        Reads::Text
    }

    /// Begins a stream of so many choices; most routes have nothing to say then.
    fn opening(&self, _out: &mut Vec<u8>, _head: &mut Head, _choices: usize) {}

    /// Goes on with choice `index` of a stream. There is something new.
    fn more(&self, out: &mut Vec<u8>, head: &mut Head, index: usize, choice: &Choice, said: &Said);

    /// Ends choice `index` of a stream; what is new may be empty.
    fn last(
        &self,
        out: &mut Vec<u8>,
        head: &mut Head,
        index: usize,
        choice: &Choice,
        said: &Said,
        reason: FinishReason,
    );

    /// Ends a stream whose choices have ended.
    fn end(&self, _out: &mut Vec<u8>, _head: &Head, _choices: &[Choice]) {}

    /// The reply as one object.
    fn whole(&self, out: &mut Vec<u8>, head: &Head, choices: &[Choice]);

    /// Ends a stream that failed after its first byte.
    fn error(&self, out: &mut Vec<u8>, head: &mut Head, choices: &[Choice], error: &Error);
}

/// The wire form of that name.
fn find(route: &str) -> Option<&'static dyn WireFormat> {
    FORMATS.into_iter().find(|format| format.name() == route)
}

/// The wire form of a route.
///
/// # Errors
/// `invalid_value` (400) names those that there are.
pub(super) fn format_of(route: &str) -> Result<&'static dyn WireFormat> {
    find(route).ok_or_else(|| {
        let names: Vec<&str> = FORMATS.iter().map(|format| format.name()).collect();
        let message = format!(
            "route must be one of {}, but {route:?} was given",
            names.join(", ")
        );
        Error::invalid("route", message)
    })
}

/// What the answers of a route are read as.
pub fn reads(route: &str) -> Reads {
    find(route).map_or(Reads::Text, WireFormat::reads)
}
