//! Converts events into the bytes of replies (frames, server-sent events, whole replies), and provides the mailbox from which each
//! stream reads.

pub mod answer;
mod blocks;
mod chat;
mod chat_answer;
mod chat_pieces;
mod choice;
mod chunk;
mod completions;
mod custom;
mod delta;
mod format;
mod generate;
mod head;
mod interactive;
mod json;
mod mailbox;
mod messages;
mod prompt;
mod reply;
mod response_calls;
mod responses;
mod routes;
mod said;
mod token_ids;

pub use delta::{Alternative, Delta, TokenLogprob, Usage};
pub use mailbox::{Mailbox, Poll, ReadLimits, Wake};
pub use reply::Reply;
pub use routes::reads;
pub use said::Reads;
