//! The state of arguments while they are parsed.

/// The state of arguments after a character.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// More is to come.
    Open,
    /// They have ended.
    Ended,
    /// They have ended before these characters.
    Left(String),
}
