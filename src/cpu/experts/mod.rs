//! Experts: feed-forward networks of which each row passes a few, which its router chooses.
//!
//! A step's rows are grouped by expert, so that the weights of each that is chosen are read once, and those of the others not at
//! all. What a row's experts give is added in the order of its choice: its result has the same bits whatever other rows there are.

mod choice;
mod forward;
mod groups;
mod router;
mod stages;
#[cfg(test)]
mod tests;
mod weights;

pub use choice::{ExpertNumbers, Router};
pub(super) use router::RouterWeight;
pub(super) use stages::{ExpertMemory, ExpertScratch};
pub use weights::ExpertMatrices;
pub(super) use weights::ExpertsWeight;
