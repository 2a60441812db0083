//! Experts: feed-forward networks, of which a router chooses a few for each row.
//!
//! A step's rows are grouped by expert, so that the weights of each chosen expert are read once, and those of the others not at
//! all. The outputs of a row's experts are added in the order of its choice, so a row's result has the same bits whatever other
//! rows the step has.

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
