//! From events to finished wire bytes: frames, server-sent events, whole replies, and the mailbox each stream reads from.

mod chat;
mod completions;
mod generate;
mod json;
mod mailbox;
mod prompt;
mod reply;

pub use mailbox::{Mailbox, Poll, Wake};
pub use reply::{Alternative, Delta, Reply, TokenLogprob, Usage};
