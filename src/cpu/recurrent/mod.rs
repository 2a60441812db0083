//! Layers that keep a recurrent state of each sequence in place of keys and values.
//!
//! A state is read from one slot and written to another, which may be the same. What a sequence gets is the same to the bit
//! however its tokens are cut into steps, and whatever else is in a step.
#![allow(
    clippy::inline_always,
    reason = "what is not inlined is compiled without the instructions it is made for"
)]

mod conv;
mod lanes;
mod record;
mod run;
mod scan;
mod state;
#[cfg(test)]
mod tests;

pub use conv::ConvGate;
pub use scan::ScanRule;
pub use state::{RecurrentShape, StateCache, StateSpan, StateStep, StateView};

pub(super) use conv::ConvWeight;
pub(super) use scan::ScanWeight;
pub(super) use state::spans;
