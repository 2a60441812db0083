//! Clients that have their conversations themselves, as agents do.

use super::config::TENANTS;
use super::lane_book::LaneName;
use super::vocabulary::Message;
use crate::session::{LaneKey, SessionKey};

/// Agents of each tenant.
const AGENTS: usize = 4;
/// Names of lanes that those of a tenant have: with fewer than the limit, none of its lanes may be dropped.
pub(super) const NAMES: [usize; TENANTS] = [2, 4];

/// A client with a conversation.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) name: LaneName,
    pub(super) said: Vec<Message>,
    /// The session of its last response, which has all that was said.
    pub(super) tip: Option<SessionKey>,
    pub(super) running: Option<Running>,
}

#[derive(Debug)]
pub(super) struct Running {
    pub(super) request: u64,
    pub(super) session: Option<SessionKey>,
    /// Messages before those that it asks with.
    pub(super) before: usize,
}

/// What a request with messages says.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) name: LaneName,
    /// The whole conversation.
    pub(super) messages: Vec<Message>,
    /// The messages before those that the request has.
    pub(super) left_out: usize,
}

impl Agent {
    pub(super) fn all() -> Vec<Self> {
        let agents = (0..TENANTS).flat_map(|tenant| (0..AGENTS).map(move |at| (tenant, at)));
        let agent = |(tenant, at): (usize, usize)| Self {
            name: (
                LaneKey {
                    tenant: tenant as u32,
                    // Of both tenants the same names.
                    name: format!("lane {}", at % NAMES[tenant]).into(),
                    adapter: 0,
                },
                at / 2 % 2,
            ),
            said: Vec::new(),
            tip: None,
            running: None,
        };
        agents.map(agent).collect()
    }
}
