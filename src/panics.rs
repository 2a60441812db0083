//! A panic is confined to the job in which it happens: the job fails, its thread continues, and a counter counts it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// A counter of the whole process, because one thread may serve several engines.
static CAUGHT: AtomicU64 = AtomicU64::new(0);

/// Runs a job that may panic. What it borrows must be consistent, or dropped, afterwards.
///
/// # Errors
/// `internal_error` if it panicked.
pub fn contain<T>(job: &str, work: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        CAUGHT.fetch_add(1, Ordering::Relaxed);
        Error::internal(format!("{job} panicked: {}", words(&*panic)))
    })
}

/// Panics that were caught since the process began.
pub fn caught() -> u64 {
    CAUGHT.load(Ordering::Relaxed)
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("it gave no reason")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_and_is_counted() {
        let before = caught();
        let error = contain("a test", || panic!("out of {}", "luck")).unwrap_err();
        assert_eq!(error.message, "a test panicked: out of luck");
        assert_eq!(contain("a test", || 7), Ok(7));
        assert!(caught() > before);
    }
}
