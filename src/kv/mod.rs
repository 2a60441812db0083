//! The bookkeeping of paged KV memory: which blocks are free, which are owned, and which are cached for which tokens. The bytes are in
//! the model loop.

mod below;
mod chain;
mod contents;
mod known;
mod lru;
mod pool;
mod restore;
mod retention;
mod shelves;
mod slots;
mod state;
mod table;
mod table_state;
mod table_window;
mod window;
mod window_blocks;

pub use chain::Owner;
pub use contents::Place;
pub use pool::{BlockPool, Counts};
pub use restore::Loads;
pub use slots::StateSlots;
pub use state::{StateCounts, StatePool, StateStats};
pub use table::BlockTable;
pub use window_blocks::{TableWindow, WindowCounts};
