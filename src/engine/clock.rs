//! The time of sessions.

use std::sync::LazyLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970 by a clock that never goes back: the system's clock when this is first asked, and the time since then.
/// A clock that is set back or forward must neither age a session nor keep it young.
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
