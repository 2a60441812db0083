//! What lies below the model's memory: blocks of keys and values, and states, in host memory and on disk.
//!
//! Content is found by a SHA-256 of all its tokens, which begins with what model, settings and tenant they belong to. So another
//! model's, or another tenant's, is never found. Each tier holds so many bytes, and gives up first what was used least recently. A
//! copy that is missing or damaged is a miss, and never an error: what it held is computed again.

mod entry;
mod files;
mod key;
mod shelf;
mod stats;
mod store;
#[cfg(test)]
mod tests;

pub use files::{Files, StoredFile};
pub use key::{Digest, Key, Kind};
pub use stats::{StoreStats, TierStats};
pub use store::{Store, StoreLimits};

use std::sync::Arc;

/// Bytes of one block or state.
pub type Payload = Arc<Vec<u8>>;
