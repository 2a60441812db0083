//! Cores of their own for the threads of a pool that has one for each core.
//!
//! Threads that go through a job in lockstep need a core each. The system does not know that: where a further thread runs for
//! a moment (the HTTP server's, say), it puts two of the pool's on one core, which then wait for each other at every barrier until
//! it thinks better of it.

/// Core numbers, one for each thread of a pool.
pub(super) struct Cores(Vec<usize>);

/// The cores that a thread may use, until it may use those that it could before.
#[must_use]
pub(super) struct Bound {
    #[cfg(target_os = "linux")]
    before: Option<libc::cpu_set_t>,
}

impl Cores {
    /// The cores that this thread may use, if they are exactly `threads` and more than one.
    pub(super) fn one_each(threads: usize) -> Option<Self> {
        let cores = usable();
        (threads > 1 && cores.len() == threads).then_some(Self(cores))
    }

    /// Keeps the calling thread on the core of thread `index`; where the system refuses, it runs as before.
    #[cfg(target_os = "linux")]
    pub(super) fn bind(&self, index: usize) -> Bound {
        let before = current();
        let mut set = none();
        // SAFETY: the number is one that the system gave, and so within the set.
        unsafe { libc::CPU_SET(self.0[index], &mut set) };
        set_current(&set);
        Bound { before }
    }

    /// Other systems are left to place threads.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn bind(&self, _index: usize) -> Bound {
        Bound {}
    }
}

#[cfg(target_os = "linux")]
impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            set_current(before);
        }
    }
}

#[cfg(target_os = "linux")]
fn none() -> libc::cpu_set_t {
    // SAFETY: a set is an array of bits.
    unsafe { std::mem::zeroed() }
}

/// The calling thread's cores; `None` where there are more than a set has room for.
#[cfg(target_os = "linux")]
fn current() -> Option<libc::cpu_set_t> {
    let mut set = none();
    // SAFETY: the set is valid for writing.
    let outcome = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    (outcome == 0).then_some(set)
}

#[cfg(target_os = "linux")]
fn set_current(set: &libc::cpu_set_t) {
    // SAFETY: the set is valid.
    unsafe { libc::sched_setaffinity(0, size_of_val(set), set) };
}

#[cfg(target_os = "linux")]
fn usable() -> Vec<usize> {
    let Some(set) = current() else {
        return Vec::new();
    };
    let held = |&core: &usize| {
        // SAFETY: the number lies within the set.
        unsafe { libc::CPU_ISSET(core, &set) }
    };
    (0..libc::CPU_SETSIZE as usize).filter(held).collect()
}

#[cfg(not(target_os = "linux"))]
fn usable() -> Vec<usize> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_stays_on_its_core_until_it_is_let_go() {
        let all = usable();
        assert!(Cores::one_each(all.len() + 1).is_none());
        let cores = Cores(all.clone());
        for (index, &core) in all.iter().enumerate() {
            let bound = cores.bind(index);
            assert_eq!(usable(), [core]);
            drop(bound);
            assert_eq!(usable(), all);
        }
    }
}
