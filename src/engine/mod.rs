//! The running server behind any front: requests are prepared on a small pool, one thread owns the scheduler and drives the
//! model through [`Executor`], and finished bytes wait in each stream's mailbox.

mod admission;
mod answer;
mod choice;
mod clock;
mod config;
mod core;
mod embed;
mod encode;
mod events;
mod executor;
mod grammars;
mod guide;
mod handle;
mod health;
mod inbox;
mod locks;
mod log_check;
mod log_file;
mod log_writer;
mod masking;
mod metrics;
mod pool;
mod prepare;
mod sessions;
mod shared;
mod stream;
mod thoughts;
mod token_sink;
mod turn_guard;
mod worker;

pub use self::core::Core;
pub use admission::RequestRecord;
pub use config::{EngineConfig, Limits, ModelSpec, Stats};
pub use embed::{EmbedSubmission, Encoding};
pub use events::{Abort, Events, request_of, sequence_id};
pub use executor::{Executor, StepOutput};
pub use grammars::Grammars;
pub use handle::Engine;
pub use log_check::{check_log, repair_log};
pub use log_file::LogFile;
pub use log_writer::{DurableSessions, Fsync, OpenLog};
pub use prepare::{Prepared, prepare};
pub use sessions::TranscriptTurn;
pub use stream::Stream;
pub use turn_guard::{FinishedTurn, PreparedTurn, TurnGuard};
