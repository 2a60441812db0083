//! Mutexes that stay usable when a thread panics while it holds one.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`. What the mutexes of the engine hold is whole between any two statements, so a panic elsewhere is no reason to
/// refuse it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
