//! Storage below the model's memory: blocks of keys and values, and states, in host memory and on disk.
//!
//! Content is found by a SHA-256 of all its tokens, prefixed by their model, settings and tenant. So content of another model or another
//! tenant is never found. Each tier has a limit of bytes, and evicts the least recently used content first. A missing or damaged copy is
//! a miss and never an error: the content is computed again.

mod below;
mod entry;
mod files;
mod key;
mod shelf;
mod stats;
mod store;
#[cfg(test)]
mod tests;

pub use below::Below;
pub use files::{Files, StoredFile};
pub use key::{Digest, Key, Kind};
pub use stats::{StoreStats, TierStats};
pub use store::{Store, StoreLimits};

use std::sync::Arc;

/// Bytes of one block or state.
pub type Payload = Arc<Vec<u8>>;
