//! The wire formats of replies: one file per route, behind one trait.

use super::choice::Choice;
use super::head::Head;
use super::said::{Reads, Said};
use crate::error::Error;
use crate::sched::FinishReason;

/// The bytes of one route's replies. Each method appends to `out`.
pub(super) trait WireFormat: std::fmt::Debug + Sync {
    /// The route's name in submissions.
    fn name(&self) -> &'static str;

    /// How answers are parsed.
    fn reads(&self) -> Reads {
        Reads::Text
    }

    /// Begins a stream with this many choices. Most routes write nothing here.
    fn opening(&self, _out: &mut Vec<u8>, _head: &mut Head, _choices: usize) {}

    /// Continues choice `index` of a stream. There is new text.
    fn more(&self, out: &mut Vec<u8>, head: &mut Head, index: usize, choice: &Choice, said: &Said);

    /// Ends choice `index` of a stream. The new text may be empty.
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
