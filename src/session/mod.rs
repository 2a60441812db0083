//! Sessions, the conversations that the server keeps: token-exact, transactional, durable.

mod idle;
mod lanes;
mod ledger;
mod log;
mod state;
mod store;

pub use lanes::{
    Known, LaneKey, LaneLimits, LaneTurn, LaneView, Lanes, NewTurn, Setting, ToldAnswer, written,
};
pub use ledger::{Logprobs, SessionUsage};
pub use log::{
    Change, Fingerprint, LogFault, LogOptions, LogStorage, Loss, NO_TENANT, Restored, SessionLog,
    StoredRecord, TenantName, stored_session,
};
pub use state::{
    AdapterDigest, Commit, Gone, Outcome, SessionKey, SessionState, Turn, TurnBefore, TurnHistory,
};
pub use store::{
    SessionInfo, SessionStore, Start, StoreLimits, session_busy, session_damaged, session_overtaken,
};
