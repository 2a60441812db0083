//! The clock of sessions.

use std::sync::LazyLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970, by a clock that never goes back: the system's time at the first call, plus the time since then. If
/// somebody sets the system's clock, sessions must not expire early or late.
pub(super) fn now_ms() -> u64 {
    static START: LazyLock<(Instant, u64)> = LazyLock::new(|| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        (
            Instant::now(),
            since.map_or(0, |since| since.as_millis() as u64),
        )
    });
    START.1 + START.0.elapsed().as_millis() as u64
}
