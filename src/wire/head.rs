//! The state that all frames of a reply share.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::delta::Usage;
use crate::request::{CallForm, CallMember, UsageChunks};

/// The state that all frames of a reply share.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) model: String,
    pub(super) created: i64,
    pub(super) usage_chunks: UsageChunks,
    pub(super) logprobs: bool,
    pub(super) prompt_logprobs: bool,
    /// The prompt's token ids, once they are known, if the reply has ids.
    pub(super) prompt_ids: Option<Vec<u32>>,
    /// Whether log-probabilities name tokens by their ids.
    pub(super) tokens_as_ids: bool,
    pub(super) first_choice: usize,
    /// The usage so far.
    pub(super) usage: Usage,
    /// Number of events written so far.
    pub(super) events: usize,
    pub(super) envelope: Map<String, Value>,
    pub(super) call_forms: HashMap<String, CallForm>,
    pub(super) call_member: CallMember,
    /// Messages for the client, as sentences.
    pub(super) warnings: Vec<String>,
}
