use std::io::{self, Read};
use std::ops::Range;
use std::thread::JoinHandle;

use super::super::test_turns::turn;
use super::*;
use crate::session::{SessionKey, StoreLimits};

/// A disk with faults, and a list of the calls.
#[derive(Debug, Default)]
struct Disk {
    log: Vec<u8>,
    new: Vec<u8>,
    full: bool,
    /// Whether the next append panics.
    panics: bool,
    /// Number of fsyncs that will fail.
    failing_syncs: usize,
    suspect: bool,
    calls: Vec<&'static str>,
}

#[derive(Clone, Default)]
struct Handle(Arc<Mutex<Disk>>);

impl Handle {
    fn disk(&self) -> std::sync::MutexGuard<'_, Disk> {
        lock(&self.0)
    }

    fn sync_disk(&self, call: &'static str) -> io::Result<()> {
        let mut disk = self.disk();
        disk.calls.push(call);
        if disk.failing_syncs > 0 {
            disk.failing_syncs -= 1;
            return Err(io::Error::other("Input/output error"));
        }
        Ok(())
    }
}

impl Disk {
    fn take(&mut self, call: &'static str) -> io::Result<()> {
        self.calls.push(call);
        if self.full {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        Ok(())
    }
}

impl LogStorage for Handle {
    fn reader(&mut self) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(io::Cursor::new(self.disk().log.clone())))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.disk();
        assert!(!std::mem::take(&mut disk.panics), "out of luck");
        disk.take("append")?;
        disk.log.extend_from_slice(bytes);
        Ok(())
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.disk().log.truncate(len as usize);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_disk("sync")
    }

    fn keep(&mut self, _: &[Range<u64>]) -> io::Result<String> {
        Ok(String::new())
    }

    fn begin_rewrite(&mut self) -> io::Result<()> {
        let mut disk = self.disk();
        disk.new.clear();
        disk.take("begin_rewrite")
    }

    fn append_rewrite(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.disk();
        disk.new.extend_from_slice(bytes);
        disk.take("append_rewrite")
    }

    fn finish_rewrite(&mut self) -> io::Result<()> {
        self.sync_disk("finish_rewrite")?;
        let mut disk = self.disk();
        disk.log = std::mem::take(&mut disk.new);
        Ok(())
    }

    fn sync_place(&mut self) -> io::Result<()> {
        self.sync_disk("sync_place")
    }

    fn mark_suspect(&mut self, suspect: bool) -> io::Result<()> {
        self.disk().suspect = suspect;
        Ok(())
    }

    fn is_marked_suspect(&mut self) -> io::Result<bool> {
        Ok(self.disk().suspect)
    }
}

struct Running {
    disk: Handle,
    store: Arc<Mutex<SessionStore>>,
    counters: Arc<LogCounters>,
    sender: Option<LogSender>,
    thread: Option<JoinHandle<()>>,
    requests: u64,
}

fn key(id: i64) -> SessionKey {
    SessionKey::new(0, id)
}

impl Running {
    fn start(fsync: Fsync, limits: StoreLimits, heal_again: Duration) -> Self {
        let disk = Handle::default();
        let options = LogOptions::new([0; 32], "toy");
        let (log, store, _) = SessionLog::open(disk.clone(), options, limits, 1).unwrap();
        let store = Arc::new(Mutex::new(store));
        let counters = Arc::new(LogCounters::default());
        let (mut writer, sender) = LogWriter::new(
            log,
            Arc::clone(&store),
            Arc::new(Wake::new().unwrap()),
            fsync,
            Arc::clone(&counters),
        );
        writer.heal_again = heal_again;
        disk.disk().calls.clear();
        Self {
            disk,
            store,
            counters,
            sender: Some(sender),
            thread: Some(std::thread::spawn(move || writer.run())),
            requests: 0,
        }
    }

    fn turn(&mut self, id: i64) -> Result<()> {
        self.requests += 1;
        let turn = turn(&self.store, key(id), self.requests);
        self.sender.as_ref().unwrap().write(turn)
    }

    fn turns(&self, id: i64) -> usize {
        lock(&self.store).state(&key(id)).unwrap().turns.len()
    }

    fn wait_until_well(&self) {
        while self.counters.fault().is_some() {
            std::thread::yield_now();
        }
    }

    /// Stops the writer, and returns the sessions in its log.
    fn stop(mut self) -> SessionStore {
        drop(self.sender.take());
        self.thread.take().unwrap().join().unwrap();
        let options = LogOptions::new([0; 32], "toy");
        let (_, store, restored) =
            SessionLog::open(self.disk.clone(), options, StoreLimits::default(), 1).unwrap();
        assert!(restored.is_whole());
        store
    }
}

const SOON: Duration = Duration::from_millis(1);
const NEVER: Duration = Duration::from_secs(3600);

#[test]
fn a_full_disk_leaves_the_session_as_it_was_and_is_tried_again() {
    let mut running = Running::start(Fsync::Always, StoreLimits::default(), SOON);
    running.turn(1).unwrap();
    running.disk.disk().full = true;
    let error = running.turn(1).unwrap_err();
    assert_eq!((error.kind.status(), error.code), (507, "storage_full"));
    assert!(error.message.contains("session log"), "{error}");
    let idle = lock(&running.store).running_request(&key(1)).is_none();
    assert_eq!((running.turns(1), idle), (1, true));
    assert!(running.counters.fault().unwrap().full);
    assert!(running.counters.failures.load(Ordering::Relaxed) >= 1);
    running.disk.disk().full = false;
    // Without a turn in between.
    running.wait_until_well();
    running.turn(1).unwrap();
    let store = running.stop();
    assert_eq!(store.state(&key(1)).unwrap().turns.len(), 2);
}

#[test]
fn a_panic_fails_the_turn_and_the_thread_lives_on() {
    let mut running = Running::start(Fsync::Always, StoreLimits::default(), SOON);
    running.turn(1).unwrap();
    running.disk.disk().panics = true;
    let error = running.turn(1).unwrap_err();
    assert!(error.kind.status() >= 500, "{error}");
    let idle = lock(&running.store).running_request(&key(1)).is_none();
    assert_eq!((running.turns(1), idle), (1, true));
    running.turn(1).unwrap();
    let store = running.stop();
    assert_eq!(store.state(&key(1)).unwrap().turns.len(), 2);
}

#[test]
fn after_a_failed_fsync_the_log_is_written_anew_before_anything_is_appended() {
    for fsync in [Fsync::Always, Fsync::Never] {
        let mut running = Running::start(fsync, StoreLimits::default(), NEVER);
        running.turn(1).unwrap();
        running.disk.disk().failing_syncs = 1;
        if fsync == Fsync::Always {
            running.turn(1).unwrap();
            let calls = std::mem::take(&mut running.disk.disk().calls);
            let expected = [
                "append",
                "sync",
                "append",
                "sync", // the first turn, and the fsync that fails
                "begin_rewrite",
                "append_rewrite",
                "append_rewrite",
                "append_rewrite",
                "finish_rewrite",
                "sync_place",
                "append",
                "sync",
            ];
            assert_eq!(calls, expected);
        }
        assert!(running.counters.fault().is_none());
        let turns = running.turns(1);
        // A log ends properly even if its last fsync fails.
        let store = running.stop();
        assert_eq!(store.state(&key(1)).unwrap().turns.len(), turns);
    }
}

#[test]
fn a_disk_that_cannot_be_trusted_is_refused_until_it_can() {
    let mut running = Running::start(Fsync::Always, StoreLimits::default(), NEVER);
    running.turn(1).unwrap();
    // The turn's fsync, and that of the log that is rewritten.
    running.disk.disk().failing_syncs = 2;
    let error = running.turn(1).unwrap_err();
    assert_eq!((error.kind.status(), error.code), (503, "storage_failed"));
    running.disk.disk().calls.clear();
    let error = running.turn(2).unwrap_err();
    assert_eq!(error.code, "storage_failed");
    assert!(running.disk.disk().calls.is_empty());
    assert_eq!(running.turns(1), 1);
    assert!(!running.counters.fault().unwrap().full);
    // A server that starts now must rewrite the log: no later fsync writes what the failed one could not.
    assert!(running.disk.disk().suspect);
    let disk = running.disk.clone();
    running.stop();
    let calls = std::mem::take(&mut disk.disk().calls);
    assert!(
        calls.ends_with(&["finish_rewrite", "sync_place"]),
        "{calls:?}"
    );
    assert!(!disk.disk().suspect);
}

#[test]
fn a_disk_that_failed_is_well_again_by_itself() {
    let mut running = Running::start(Fsync::Interval, StoreLimits::default(), SOON);
    running.turn(1).unwrap();
    running.disk.disk().failing_syncs = 5;
    // The fsync comes after a while and fails, as the first rewrites do.
    while running.disk.disk().failing_syncs > 0 {
        std::thread::yield_now();
    }
    running.wait_until_well();
    running.turn(1).unwrap();
    let store = running.stop();
    assert_eq!(store.state(&key(1)).unwrap().turns.len(), 2);
}

#[test]
fn evictions_wait_until_their_record_is_written() {
    let limits = StoreLimits {
        max_sessions: 1,
        ttl_ms: 0,
    };
    let mut running = Running::start(Fsync::Always, limits, NEVER);
    running.turn(1).unwrap();
    running.disk.disk().full = true;
    // The first turn of another session evicts one, and is then refused.
    running.turn(2).unwrap_err();
    assert_eq!(lock(&running.store).evicted(), [key(1)]);
    running.disk.disk().full = false;
    running.turn(3).unwrap();
    assert!(lock(&running.store).evicted().is_empty());
    let store = running.stop();
    assert_eq!(store.state(&key(1)).unwrap_err().code, "session_expired");
    assert_eq!(store.len(), 1);
}

#[test]
fn a_writer_that_is_gone_tells_so() {
    let store = Arc::new(Mutex::new(SessionStore::new(StoreLimits::default())));
    let (sender, receiver) = channel();
    drop(receiver);
    let turn = turn(&store, key(1), 1);
    let error = LogSender(sender).write(turn).unwrap_err();
    assert_eq!(error.kind.status(), 503);
    assert!(lock(&store).is_empty());
}
