//! The engine's settings, what it must know of its model, and its statistics.

use std::sync::Arc;
use std::time::Duration;

use super::tiers::TierConfig;
use crate::kv::{StateCounts, StateStats, WindowCounts};
use crate::sched::{self, PolicyKind, SchedulerConfig, Speculation};
use crate::session::{LaneLimits, StoreLimits};
use crate::tenant::Tenant;
use crate::text::{ChatTemplate, Tokenizer};
use crate::tier::StoreStats;

/// The engine's settings.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Sizes of the scheduler.
    pub scheduler: SchedulerConfig,
    /// The order in which requests run.
    pub policy: PolicyKind,
    /// Speculative decoding. Absent: a step computes one token of each sequence.
    pub speculation: Option<Speculation>,
    /// Number of slots for recurrent states. 0: the model has no recurrent layers.
    pub state_slots: usize,
    /// The engine takes a snapshot of the state at each multiple of this many tokens.
    pub state_every: usize,
    /// KV blocks.
    pub num_blocks: usize,
    /// The blocks of layers with a sliding window, if the model has such layers.
    pub windows: Option<WindowSizes>,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Keep and share the KV of known prefixes.
    pub prefix_cache: bool,
    /// One prefix cache for all tenants.
    pub share_prefix_cache: bool,
    /// Tiers below the model's memory. They need the prefix cache.
    pub tiers: Option<TierConfig>,
    /// How many sessions are kept.
    pub sessions: StoreLimits,
    /// How many lanes are kept.
    pub lanes: LaneLimits,
    /// Tenants with limits. All others have none.
    pub tenants: Vec<Tenant>,
    /// If work waits and no step ends for this long, the engine counts as stalled.
    pub stall: Duration,
}

/// The blocks of layers with a sliding window.
#[derive(Debug, Clone, Copy)]
pub struct WindowSizes {
    /// Number of tokens that a token sees, including itself.
    pub window: usize,
    /// Blocks for these layers.
    pub num_blocks: usize,
}

/// Limits of a request's length.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum number of tokens of a sequence, prompt and output together.
    pub context_length: usize,
    /// Token ids are below this number.
    pub vocab_size: usize,
    /// Whether another prompt can continue only where the state, or the window's keys and values, were kept: at the borders of
    /// turns and messages.
    pub keeps_borders: bool,
}

/// What the engine must know of the model.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// Absent: requests and replies have token ids only.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Absent: requests cannot have messages.
    pub template: Option<Arc<ChatTemplate>>,
    /// Tokens that end an answer.
    pub eos_tokens: Vec<u32>,
    /// Rows of the logits.
    pub vocab_size: usize,
    /// Length of an embedding.
    pub embedding_size: usize,
    /// Maximum number of tokens of one input to embed.
    pub max_embed_len: usize,
    /// Whether it generates text.
    pub can_generate: bool,
    /// Whether it computes embeddings.
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
    /// For a model with recurrent layers.
    pub states: StateCounts,
    pub snapshots: StateStats,
    /// For a model with layers that have a sliding window.
    pub windows: WindowCounts,
    /// The tiers below the model's memory.
    pub tiers: StoreStats,
    pub failed_steps: u64,
    pub open_requests: usize,
    pub sessions: usize,
    pub lanes: usize,
    /// Bytes of the session log; 0 without one.
    pub log_bytes: u64,
    /// Number of its writes, fsyncs and rewrites that failed.
    pub log_failures: u64,
    pub log_rewrites: u64,
    /// Whether it cannot be written now.
    pub log_faulty: bool,
    /// Panics that were caught in this process.
    pub panics: u64,
    /// Whether the engine is working; see [`super::Engine::check_health`].
    pub healthy: bool,
    /// How long work has waited for a step.
    pub stalled_ms: u64,
}
