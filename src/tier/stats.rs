//! What tiers have done since the start.

/// One tier: what it holds, and counters since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Contents that it holds.
    pub entries: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// Contents that were read from it.
    pub hits: u64,
    /// Bytes that were read from it.
    pub read_bytes: u64,
    /// Bytes that were written to it.
    pub written_bytes: u64,
    /// Contents that it gave up for others.
    pub evictions: u64,
    /// Reads, writes and deletions that failed, and contents that were found damaged.
    pub failures: u64,
    /// Contents that were not written because too many others waited.
    pub skipped: u64,
}

/// Both tiers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Host memory.
    pub host: TierStats,
    /// Disk.
    pub disk: TierStats,
}
