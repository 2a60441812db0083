//! The core of lmserve. It tokenizes, schedules continuous batches and keeps sessions; a model loop computes the steps.
//!
//! A module imports only modules of the layers to its left: `error, panics, request, tenant <- cpu, text <- guided, tier, kv <- sched,
//! session, wire <- engine <- bindings`. Everything but `bindings` compiles without pyo3 (`cargo check --no-default-features`). Only
//! `engine`, and the kernels' pool in `cpu`, own threads.

pub mod cpu;
pub mod engine;
pub mod error;
pub mod gguf;
pub mod guided;
pub mod kv;
pub mod panics;
pub mod request;
pub mod sched;
pub mod session;
pub mod sim;
pub mod tenant;
pub mod text;
pub mod tier;
pub mod wire;

#[cfg(feature = "python")]
mod bindings;
