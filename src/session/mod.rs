//! Conversations that live on the server: token-exact, transactional.

mod idle;
mod state;
mod store;

pub use state::{Base, Commit, SessionKey, SessionState, Turn};
pub use store::{SessionInfo, SessionStore, Start, StoreLimits, session_busy};
