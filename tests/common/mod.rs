//! What several test crates share; each takes what it needs.
#![allow(dead_code)]

pub mod no_events;
pub mod toy_engine;
pub mod toy_sequences;
