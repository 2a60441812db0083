//! A model that costs nothing, to prove the scheduler, the sessions and the engine with.

mod toy;

pub use toy::{ToyModel, next_token};
