//! What is new of an answer, as its route reads it.

use super::answer::Piece;
use super::blocks::Change;

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
