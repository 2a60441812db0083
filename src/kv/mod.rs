//! Paged KV memory as books: which block is free, owned by whom, or cached for which tokens. The bytes live in the model loop.

mod lru;
mod pool;
mod table;

pub use pool::{BlockPool, Counts};
pub use table::BlockTable;
