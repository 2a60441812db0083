//! The running server behind any front: requests are prepared on a small pool, one thread owns the scheduler and drives the
//! model through [`Executor`], and finished bytes wait in each stream's mailbox.

mod answer;
mod choice;
mod config;
mod core;
mod embed;
mod encode;
mod executor;
mod grammars;
mod guide;
mod handle;
mod health;
mod lease;
mod log_check;
mod log_file;
mod log_writer;
mod masking;
mod metrics;
mod open;
mod pool;
mod prepare;
mod sessions;
mod shared;
mod stream;
mod texts;
mod thoughts;
mod worker;

pub use self::core::{Abort, Core, Events, request_of, sequence_id};
pub use config::{EngineConfig, Model, Stats};
pub use embed::{EmbedSubmission, Encoding};
pub use executor::{Executor, StepOutput};
pub use grammars::Grammars;
pub use handle::Engine;
pub use lease::{FinishedTurn, PreparedTurn, TurnLease};
pub use log_check::{check_log, repair_log};
pub use log_file::LogFile;
pub use log_writer::{DurableSessions, Fsync, OpenLog};
pub use open::RequestRecord;
pub use prepare::{Limits, Prepared, prepare};
pub use sessions::TranscriptTurn;
pub use stream::Stream;
