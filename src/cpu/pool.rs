//! The one pool of threads that computes: a job runs on all of its threads at once, in lockstep.
//!
//! [`Pool::run`] calls the job once on each thread (the caller is thread 0) with a [`Team`], through which the threads share
//! work and wait for each other. Every thread must go through the same sequence of [`Team::for_chunks`] and
//! [`Team::barrier`]. Threads that wait look for some tens of microseconds, most of them letting others run, and then sleep, so
//! an idle pool uses no CPU.
//!
//! ```
//! use lmserve::cpu::{Pool, SharedSlice};
//!
//! let pool = Pool::new(2);
//! let mut squares = vec![0; 1000];
//! let shared = SharedSlice::new(&mut squares);
//! pool.run(&|team| {
//!     team.for_chunks(1000, 64, |range| {
//!         // SAFETY: chunks are disjoint.
//!         let part = unsafe { shared.get_mut(range.clone()) };
//!         for (square, i) in part.iter_mut().zip(range) {
//!             *square = i * i;
//!         }
//!     });
//! });
//! assert_eq!(squares[999], 998_001);
//! ```

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

type Job<'a> = &'a (dyn Fn(&Team) + Sync + 'a);

/// How long a waiting thread spins. If others need its processor, one of them may be the thread that it waits for.
const SPIN: Duration = Duration::from_micros(5);
/// How long it then polls and yields before it sleeps: several times the cost of a wake-up.
const LOOK: Duration = Duration::from_micros(50);
/// Number of pauses between two reads of the clock.
const PAUSES: u32 = 64;

/// A fixed number of threads for jobs that run in lockstep.
pub struct Pool {
    shared: Arc<Common>,
    /// Held while a job runs. Only one job runs at a time.
    running: Mutex<()>,
    threads: Vec<JoinHandle<()>>,
}

/// A job's view of the threads that run it.
pub struct Team<'a> {
    common: &'a Common,
    index: usize,
}

struct Common {
    size: usize,
    /// Opens when a job or the end of the pool begins.
    start: Gate,
    /// The running job, on the stack of `run`; null ends the pool.
    job: AtomicPtr<Job<'static>>,
    /// Opens when all threads have arrived.
    barrier: Gate,
    arrived: AtomicUsize,
    /// The first item of `for_chunks` that no thread has taken; 0 after a barrier.
    next: AtomicUsize,
    /// Whether a thread has panicked, so that nobody waits for it.
    broken: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Number of threads still in the job. `run` waits until it is 0.
    inside: AtomicUsize,
    finished: Gate,
}

/// Unwinds a thread that waited for a thread that panicked.
struct Abandoned;

impl Pool {
    /// A pool of `threads` threads (at least 1). The caller of `run` is one of them.
    ///
    /// # Panics
    /// If the system refuses a thread.
    pub fn new(threads: usize) -> Self {
        let size = threads.max(1);
        let shared = Arc::new(Common {
            size,
            start: Gate::default(),
            job: AtomicPtr::default(),
            barrier: Gate::default(),
            arrived: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            panic: Mutex::default(),
            inside: AtomicUsize::new(0),
            finished: Gate::default(),
        });
        let threads = (1..size)
            .map(|index| {
                let common = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("cpu-{index}"))
                    .spawn(move || work(&common, index))
                    .expect("the system has a thread to spare")
            })
            .collect();
        Self {
            shared,
            running: Mutex::new(()),
            threads,
        }
    }

    /// Number of threads that run a job.
    pub fn size(&self) -> usize {
        self.shared.size
    }

    /// Calls `job` on every thread, and returns when all have finished. Jobs of several callers run one after the other. A job must
    /// not run another job on the same pool.
    ///
    /// # Panics
    /// If the job panics on any thread, with the first thread's panic. The pool stays usable.
    pub fn run(&self, job: Job) {
        let _one_at_a_time = lock(&self.running);
        let common = &*self.shared;
        let at: *const Job = &raw const job;
        common.arrived.store(0, Ordering::Relaxed);
        common.next.store(0, Ordering::Relaxed);
        common.broken.store(false, Ordering::Relaxed);
        common.inside.store(common.size - 1, Ordering::Relaxed);
        common
            .job
            .store(at.cast::<Job<'static>>().cast_mut(), Ordering::Relaxed);
        let finished = common.finished.now();
        common.start.open();
        common.take_part(job, 0);
        if common.size > 1 {
            common.finished.wait(finished);
        }
        if let Some(panic) = lock(&common.panic).take() {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared
            .job
            .store(std::ptr::null_mut(), Ordering::Relaxed);
        self.shared.start.open();
        for thread in self.threads.drain(..) {
            // A worker's panics are caught within it.
            let _ = thread.join();
        }
    }
}

impl Team<'_> {
    /// The index of this thread, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Number of threads.
    pub fn size(&self) -> usize {
        self.common.size
    }

    /// Waits until every thread has arrived. All threads then see what each has written before.
    pub fn barrier(&self) {
        let common = self.common;
        if common.size == 1 {
            common.next.store(0, Ordering::Relaxed);
            return;
        }
        let now = common.barrier.now();
        // A job that is marked broken later opens the gate after `now`.
        if common.broken.load(Ordering::Acquire) {
            resume_unwind(Box::new(Abandoned));
        }
        if common.arrived.fetch_add(1, Ordering::AcqRel) + 1 == common.size {
            common.arrived.store(0, Ordering::Relaxed);
            common.next.store(0, Ordering::Relaxed);
            common.barrier.open();
        } else {
            common.barrier.wait(now);
        }
        if common.broken.load(Ordering::Acquire) {
            resume_unwind(Box::new(Abandoned));
        }
    }

    /// Calls `f` with chunks of `0..n` of `chunk` items (the last may be shorter) until none is left. Each chunk goes to the next
    /// free thread. Waits for all threads as [`Team::barrier`] does.
    pub fn for_chunks(&self, n: usize, chunk: usize, mut f: impl FnMut(Range<usize>)) {
        let chunk = chunk.max(1);
        loop {
            let start = self.common.next.fetch_add(chunk, Ordering::Relaxed);
            if start >= n {
                break;
            }
            f(start..n.min(start + chunk));
        }
        self.barrier();
    }

    /// This thread's share of `0..n`, in whole multiples of `unit` except at the end. It is the same in every call.
    pub fn share(&self, n: usize, unit: usize) -> Range<usize> {
        let units = n.div_ceil(unit.max(1));
        let at = |index: usize| n.min(units * index / self.size() * unit.max(1));
        at(self.index)..at(self.index + 1)
    }
}

impl Common {
    fn take_part(&self, job: Job, index: usize) {
        let team = Team {
            common: self,
            index,
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(&team))) {
            if !panic.is::<Abandoned>() {
                lock(&self.panic).get_or_insert(panic);
            }
            self.broken.store(true, Ordering::Release);
            self.barrier.open();
        }
    }
}

fn work(common: &Common, index: usize) {
    let mut seen = 0;
    loop {
        seen = common.start.wait(seen);
        let job = common.job.load(Ordering::Relaxed);
        if job.is_null() {
            return;
        }
        // SAFETY: `run` keeps the job alive until this thread has left it below, and the gate ordered the write before.
        common.take_part(unsafe { *job }, index);
        if common.inside.fetch_sub(1, Ordering::AcqRel) == 1 {
            common.finished.open();
        }
    }
}

/// Lets waiting threads continue each time that it is opened.
#[derive(Default)]
struct Gate {
    opened: AtomicUsize,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

impl Gate {
    /// How often it was opened. Read this before the step that leads to the next opening.
    fn now(&self) -> usize {
        self.opened.load(Ordering::Acquire)
    }

    fn open(&self) {
        // In a single order with `sleepers`: either this thread sees the sleeper, or the sleeper sees the open gate.
        self.opened.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _order = lock(&self.sleep);
            self.wake.notify_all();
        }
    }

    /// Waits until it was opened more than `seen` times. Returns the new count.
    fn wait(&self, seen: usize) -> usize {
        let mut start = None;
        loop {
            for _ in 0..PAUSES {
                let now = self.now();
                if now != seen {
                    return now;
                }
                std::hint::spin_loop();
            }
            let waited = start.get_or_insert_with(Instant::now).elapsed();
            if waited > LOOK {
                return self.sleep(seen);
            }
            if waited > SPIN {
                std::thread::yield_now();
            }
        }
    }

    #[cold]
    fn sleep(&self, seen: usize) -> usize {
        let mut guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let now = loop {
            let now = self.opened.load(Ordering::SeqCst);
            if now != seen {
                break now;
            }
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        now
    }
}

/// A panic elsewhere leaves nothing inconsistent under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::memory::SharedSlice;

    fn panic_text(run: impl FnOnce()) -> String {
        let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
        panic.downcast_ref::<&str>().map_or_else(
            || panic.downcast_ref::<String>().unwrap().clone(),
            |text| (*text).to_owned(),
        )
    }

    #[test]
    fn chunks_cover_everything_once() {
        for size in [1, 2, 3, 5] {
            let pool = Pool::new(size);
            for (n, chunk) in [(0, 1), (1, 1), (7, 3), (100, 0), (1000, 64), (5, 100)] {
                let mut counts = vec![0u8; n];
                let shared = SharedSlice::new(&mut counts);
                pool.run(&|team| {
                    for _ in 0..3 {
                        team.for_chunks(n, chunk, |range| {
                            assert!(range.len() <= chunk.max(1) && !range.is_empty());
                            // SAFETY: the chunks are disjoint.
                            for count in unsafe { shared.get_mut(range) } {
                                *count += 1;
                            }
                        });
                    }
                });
                assert_eq!(counts, vec![3; n], "{size} threads, {n} by {chunk}");
            }
        }
    }

    #[test]
    fn shares_cover_everything_once_and_begin_at_units() {
        let pool = Pool::new(3);
        for (n, unit) in [(0, 4), (1, 4), (10, 4), (100, 16), (7, 0)] {
            let ranges = Mutex::new(Vec::new());
            pool.run(&|team| lock(&ranges).push(team.share(n, unit)));
            let mut ranges = ranges.into_inner().unwrap();
            ranges.sort_by_key(|range| (range.start, range.end));
            assert_eq!((ranges[0].start, ranges[2].end), (0, n));
            for pair in ranges.windows(2) {
                assert_eq!(pair[0].end, pair[1].start);
                assert!(pair[1].is_empty() || pair[1].start.is_multiple_of(unit.max(1)));
            }
        }
    }

    #[test]
    fn a_barrier_separates_what_was_written_from_what_is_read() {
        let pool = Pool::new(4);
        let mut slots = vec![0usize; 4];
        let shared = SharedSlice::new(&mut slots);
        pool.run(&|team| {
            for round in 1..=2000 {
                let me = team.index();
                // SAFETY: each thread writes its own slot, and reads the others' between two barriers.
                unsafe { shared.get_mut(me..me + 1)[0] = round };
                team.barrier();
                assert_eq!(unsafe { shared.get(0..4) }, [round; 4]);
                team.barrier();
            }
        });
    }

    #[test]
    fn a_panic_on_any_thread_comes_out_of_run_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        for culprit in 0..3 {
            let text = panic_text(|| {
                pool.run(&|team| {
                    team.barrier();
                    assert_ne!(team.index(), culprit, "thread {culprit} fails");
                    team.barrier();
                    unreachable!("nobody passes a barrier that one thread never reaches");
                });
            });
            assert!(text.contains(&format!("thread {culprit} fails")), "{text}");
            let count = AtomicUsize::new(0);
            pool.run(&|team| {
                team.barrier();
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 3);
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(2);
        let (inside, total) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(&|_| {
                            assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                            total.fetch_add(1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 600);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn idle_threads_use_no_cpu_and_wake_again() {
        let pool = Pool::new(2);
        let time = Mutex::new(Duration::ZERO);
        let worker_time = || {
            pool.run(&|team| {
                if team.index() == 1 {
                    *lock(&time) = thread_time();
                }
            });
            *lock(&time)
        };
        let before = worker_time();
        std::thread::sleep(Duration::from_millis(100));
        let used = worker_time().saturating_sub(before);
        // Spinning through all of it would be 100 ms of this thread's own time.
        assert!(used < Duration::from_millis(50), "{used:?}");
    }

    #[cfg(target_os = "linux")]
    fn thread_time() -> Duration {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `time` is valid for writing.
        let outcome = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
        assert_eq!(outcome, 0);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }
}
