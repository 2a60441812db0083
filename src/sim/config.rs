//! What a simulated server is like.

use super::random::Random;
use crate::sched::{PolicyKind, SchedulerConfig, Speculation};
use crate::session::{self, LaneLimits};
use crate::tier::StoreLimits;
use crate::wire::ReadLimits;

/// Tenants whose clients talk to a server.
pub(super) const TENANTS: usize = 2;

/// Sizes of a world and how unruly it is, drawn anew for each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Config {
    pub(super) scheduler: SchedulerConfig,
    pub(super) policy: PolicyKind,
    pub(super) speculation: Option<Speculation>,
    /// The model guesses a token ahead.
    pub(super) guesses: bool,
    /// Slots of a model with recurrent layers, and the distance between two snapshots.
    pub(super) states: Option<(usize, usize)>,
    /// Tokens that layers with a window see, and how many more window blocks there are than one sequence may need.
    pub(super) windows: Option<(usize, usize)>,
    /// Of a server with tiers below the model's memory.
    pub(super) tiers: Option<StoreLimits>,
    pub(super) num_blocks: usize,
    pub(super) block_size: usize,
    pub(super) prefix_cache: bool,
    pub(super) sessions: session::StoreLimits,
    pub(super) lanes: LaneLimits,
    pub(super) reading: ReadLimits,
    /// Clients act in one step of that many.
    pub(super) calm: usize,
    /// Most submissions of one step.
    pub(super) arrivals: usize,
    /// One step in that many fails.
    pub(super) fault: usize,
    /// One request in that many has something about it that the model cannot compute.
    pub(super) faulty: usize,
    /// One step in that many is the server's last.
    pub(super) kill: usize,
    /// Turns are written to a log, which outlives the server.
    pub(super) durable: bool,
    /// A log that cannot be written is tried again in one step of that many.
    pub(super) patience: usize,
}

impl Config {
    pub(super) fn draw(random: &mut Random) -> Self {
        let max_batch = random.range(1, 6);
        let states = random
            .once_in(2)
            .then(|| (random.range(1, 12), random.range(4, 40)));
        let windows = (states.is_none() && random.once_in(2))
            .then(|| (random.range(1, 40), random.range(0, 12)));
        let prefix_cache = !random.once_in(8);
        let tiers =
            (prefix_cache && windows.is_none() && !random.once_in(3)).then(|| StoreLimits {
                host_blocks: [0, 300, 3000][random.range(0, 2)],
                host_states: [0, 100, 1000][random.range(0, 2)],
                disk: [0, 4000, 40_000][random.range(0, 2)],
            });
        Self {
            windows,
            tiers,
            scheduler: SchedulerConfig {
                max_batch,
                max_batch_tokens: max_batch + random.range(16, 40),
                max_model_len: random.range(24, 120),
                max_queue: random.range(1, 12),
            },
            policy: [PolicyKind::Fair, PolicyKind::Fair, PolicyKind::FirstCome][random.range(0, 2)],
            states,
            speculation: (!random.once_in(3)).then(|| Speculation {
                max_draft: random.range(0, 9),
                max_rows: random.range(1, 24),
                row_cost: [0.0, 0.01, 0.2][random.range(0, 2)],
            }),
            guesses: !random.once_in(3),
            num_blocks: random.range(8, 64),
            block_size: random.range(1, 6),
            prefix_cache,
            sessions: session::StoreLimits {
                max_sessions: random.range(3, 16),
                ttl_ms: [0, 2000, 20_000][random.range(0, 2)],
            },
            lanes: if random.once_in(2) {
                LaneLimits {
                    lanes: random.range(1, 3),
                    branches: usize::MAX,
                    bytes: usize::MAX,
                }
            } else {
                LaneLimits {
                    lanes: random.range(1, 10),
                    branches: [1, 3, usize::MAX][random.range(0, 2)],
                    bytes: [1000, 5000, usize::MAX][random.range(0, 2)],
                }
            },
            reading: ReadLimits {
                merge_above: random.range(0, 400),
                most: random.range(50, 1000),
            },
            calm: random.range(1, 4),
            arrivals: random.range(1, 3),
            fault: random.range(20, 200),
            faulty: random.range(10, 100),
            kill: random.range(100, 1000),
            durable: !random.once_in(3),
            patience: [2, 10, 100][random.range(0, 2)],
        }
    }
}
