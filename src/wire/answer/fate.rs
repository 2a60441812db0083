//! What becomes of arguments as they are read.

/// What has become of arguments with a character.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// More is to come.
    Open,
    /// They have ended.
    Ended,
    /// They have ended before these characters.
    Left(String),
}
