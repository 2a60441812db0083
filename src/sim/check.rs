//! What must hold.

/// Nothing, or what does not hold.
pub(super) type Check = Result<(), String>;

pub(super) fn ensure(holds: bool, what: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(what()) }
}
