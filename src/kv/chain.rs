//! Identifies cached chains of blocks.

/// Identifies one cached chain of full blocks; never reused.
pub(super) type ChainId = u64;

/// The first id of a cached chain. Smaller ids are the owners' roots.
pub(super) const FIRST_CHAIN: ChainId = 1 << 48;

/// The tenant and the adapter that tokens were computed for. Cached blocks are found only by the same owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Owner {
    /// The API key's number; 0: no key.
    pub tenant: u32,
    /// The number of the adapter, at most [`Owner::MOST_ADAPTERS`]; 0: none.
    pub adapter: u32,
}

impl Owner {
    /// The largest number of an adapter.
    pub const MOST_ADAPTERS: u32 = (1 << 16) - 1;

    pub(super) const fn root(self, shared: bool) -> ChainId {
        let tenant = if shared { 0 } else { self.tenant as ChainId };
        (self.adapter as ChainId) << 32 | tenant
    }
}

impl From<u32> for Owner {
    fn from(tenant: u32) -> Self {
        Self { tenant, adapter: 0 }
    }
}
