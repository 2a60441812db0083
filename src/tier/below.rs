//! The border to whoever keeps what the model's memory gives up.

use std::fmt::Debug;

use super::Payload;
use super::key::Key;

/// The tiers as a scheduler sees them. Nothing here waits for a disk.
pub trait Below: Debug + Send {
    /// Whether a content is held, as far as anybody knows before it is read.
    fn holds(&self, key: &Key) -> bool;

    /// Whether a content that the model's memory has and keeps is to be written down, for the time after a restart. One that is
    /// written down already counts as used.
    fn wants(&self, key: &Key) -> bool;

    /// Whether a content that the model's memory gives up is to be kept.
    fn wants_evicted(&self, key: &Key) -> bool;

    /// Whether so much waits to be written that what can wait should.
    fn is_busy(&self) -> bool;

    /// Begins to read contents, in this order.
    fn fetch(&mut self, ticket: u64, keys: Vec<Key>);

    /// What was read since the last call: tickets, each with as many of its contents as could be read, from the first one on.
    fn fetched(&mut self) -> Vec<(u64, Vec<Payload>)>;

    /// Takes a content in; `evicted`: the model's memory has it no more.
    fn save(&mut self, key: Key, payload: Payload, evicted: bool);
}
