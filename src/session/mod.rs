//! Conversations that live on the server: token-exact, transactional.

mod store;

pub use store::{Base, Commit, SessionInfo, SessionKey, SessionStore, StoreLimits, Tail, Turn};
