//! The continuous-batching scheduler: a pure state machine that says what the next step computes.
//!
//! There is no prefill phase and no decode phase: every sequence has `tokens - computed` tokens to compute, and a step divides
//! one token budget among the sequences (after vLLM V1's unified scheduler).

mod below;
mod commit;
mod config;
mod cost;
mod draft;
mod forecast;
mod grant;
mod lower;
mod plan;
mod policy;
mod queue;
mod retry;
mod sampling;
mod scheduler;
mod sequence;
mod snapshots;
mod speculation;
mod step;
mod transfers;

pub use commit::{Finished, NO_TOKEN, StepTokens};
pub use config::{ENTRY_TOKENS, SchedulerConfig, Speculation};
pub use policy::{Policy, PolicyKind};
pub use sampling::{SeenTokens, mix_seed, uniform};
pub use scheduler::{Scheduler, Stats};
pub use sequence::{FinishReason, NewSequence, Sequence};
pub use step::{Scheduled, Step};
pub use transfers::{Load, Save, Transfers};
