//! A model that costs nothing, and a simulator around it: the real scheduler, sessions, stop strings and replies on a virtual
//! clock, under everything that clients and machines do to a server.
//! [`capacity`] puts a trace on them instead and says what it comes to.

mod agents;
mod batches;
pub mod capacity;
mod check;
mod clients;
mod config;
mod conversations;
mod crashes;
mod disk;
mod frames;
mod invariants;
mod journal;
mod kept;
mod lane_book;
mod lanes;
mod ledger;
mod open;
mod random;
mod reader;
mod records;
mod report;
mod simulation;
mod step;
mod tiers;
mod toy;
mod transfers;
mod verbs;
mod vocabulary;
mod world;

pub use report::{Counters, Faults, Report};
pub use simulation::simulate;
pub use toy::{ToyModel, next_token};
