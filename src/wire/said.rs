//! The new part of an answer, in the form that its route reads.

use super::answer::Piece;
use super::blocks::Change;

/// How a route reads the text of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// Plain text.
    Text,
    /// Thoughts, words and calls, as far as the answer may have them.
    Pieces,
    /// The same, as a list of blocks with a beginning and an end.
    Blocks,
}

/// The new part of an answer.
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

    /// The new words of an answer that is not parsed.
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
