//! From events to finished wire bytes: frames, server-sent events, whole replies, and the mailbox each stream reads from.

mod chat;
mod completions;
mod generate;
mod json;
mod mailbox;
mod reply;

pub use mailbox::{Mailbox, Poll, Wake};
pub use reply::{Delta, Reply, TokenLogprob, Usage};
