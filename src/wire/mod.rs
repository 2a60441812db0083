//! From events to finished wire bytes: frames, server-sent events, whole replies, and the mailbox each stream reads from.

pub mod answer;
mod blocks;
mod chat;
mod chat_answer;
mod completions;
mod format;
mod generate;
mod interactive;
mod json;
mod mailbox;
mod messages;
mod prompt;
mod reply;
mod response_calls;
mod responses;

pub use format::{Reads, reads};
pub use mailbox::{Mailbox, Poll, ReadLimits, Wake};
pub use reply::{Alternative, Delta, Reply, TokenLogprob, Usage};
