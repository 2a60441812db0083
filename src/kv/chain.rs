//! The names of known chains of blocks.

/// Names one cached chain of full blocks; never reused.
pub(super) type ChainId = u64;

/// First chain id that names a block; smaller ones are the tenants' roots.
pub(super) const FIRST_CHAIN: ChainId = 1 << 32;
