//! Sizes of an engine, what it must know of its model, and what it says of itself.

use std::sync::Arc;
use std::time::Duration;

use super::tiers::TierConfig;
use crate::kv::{StateCounts, StateStats, WindowCounts};
use crate::sched::{self, PolicyKind, SchedulerConfig, Speculation};
use crate::session::{LaneLimits, StoreLimits};
use crate::tenant::Tenant;
use crate::text::{ChatTemplate, Tokenizer};
use crate::tier::StoreStats;

/// Sizes of an engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Sizes of the scheduler.
    pub scheduler: SchedulerConfig,
    /// Who goes first.
    pub policy: PolicyKind,
    /// Absent: every step gives a sequence one token.
    pub speculation: Option<Speculation>,
    /// Recurrent states that there is room for; 0: the model has none.
    pub state_slots: usize,
    /// A snapshot of the state is taken at each multiple of that many tokens.
    pub state_every: usize,
    /// KV blocks.
    pub num_blocks: usize,
    /// Blocks for layers that see only so many last tokens, of a model that has such layers.
    pub windows: Option<WindowSizes>,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Keep and share the KV of known prefixes.
    pub prefix_cache: bool,
    /// One prefix cache for all tenants.
    pub share_prefix_cache: bool,
    /// What lies below the model's memory; it needs the prefix cache.
    pub tiers: Option<TierConfig>,
    /// How many sessions are kept.
    pub sessions: StoreLimits,
    /// How many lanes are kept.
    pub lanes: LaneLimits,
    /// Who may do what; others may do everything.
    pub tenants: Vec<Tenant>,
    /// Without a step for so long, while work waits, the engine counts as stalled.
    pub stall: Duration,
}

/// The blocks of layers with a window.
#[derive(Debug, Clone, Copy)]
pub struct WindowSizes {
    /// Tokens that a token sees, itself included.
    pub window: usize,
    /// Blocks for these layers.
    pub num_blocks: usize,
}

/// What bounds a request's length.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most tokens of a sequence, prompt and output.
    pub context_length: usize,
    /// Token ids lie below.
    pub vocab_size: usize,
    /// What the model has computed of a prompt can only be taken up again at its borders: a recurrent state, or the keys and values
    /// that a window shows.
    pub keeps_borders: bool,
}

/// What the engine must know of the model.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// Absent: only token ids go in, and no text comes out.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Absent: no conversations.
    pub template: Option<Arc<ChatTemplate>>,
    /// Tokens that end an answer.
    pub eos_tokens: Vec<u32>,
    /// Rows of the logits.
    pub vocab_size: usize,
    /// Length of an embedding.
    pub embedding_size: usize,
    /// Most tokens of one input to embed.
    pub max_embed_len: usize,
    /// Generates text.
    pub can_generate: bool,
    /// Embeds.
    pub can_embed: bool,
}

/// The state of an engine at its last step.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct Stats {
    pub scheduler: sched::Stats,
    pub free_blocks: usize,
    pub owned_blocks: usize,
    pub cached_blocks: usize,
    pub evictions: u64,
    /// Of a model with recurrent layers.
    pub states: StateCounts,
    pub snapshots: StateStats,
    /// Of a model with layers that have a window.
    pub windows: WindowCounts,
    /// Below the model's memory.
    pub tiers: StoreStats,
    pub failed_steps: u64,
    pub open_requests: usize,
    pub sessions: usize,
    pub lanes: usize,
    /// Bytes of the session log; 0 without one.
    pub log_bytes: u64,
    /// Writes, fsyncs and rewrites of it that failed.
    pub log_failures: u64,
    pub log_rewrites: u64,
    /// Nothing can be written to it now.
    pub log_faulty: bool,
    /// Panics that were caught in this process.
    pub panics: u64,
    /// It does its work; see [`super::Engine::check_health`].
    pub healthy: bool,
    /// How long work has waited for a step.
    pub stalled_ms: u64,
}
