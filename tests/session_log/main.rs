//! The session log: what it brings back, whatever its file has been through, and what it refuses.

mod damage;
mod files;
mod first_version;

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use lmserve::engine::TurnGuard;
use lmserve::error::Error;
use lmserve::request::{SessionId, TurnKey};
use lmserve::session::{
    Change, Commit, LogOptions, LogStorage, Logprobs, Loss, Restored, SessionKey, SessionLog,
    SessionState, SessionStore, SessionUsage, Start, StoreLimits, Turn,
};
use lmserve::text::Tail;

#[derive(Debug, Clone, Default)]
struct Memory {
    log: Vec<u8>,
    new: Vec<u8>,
    kept: Vec<u8>,
}

impl LogStorage for Memory {
    fn reader(&mut self) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(Cursor::new(&self.log)))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.log.extend_from_slice(bytes);
        Ok(())
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.log.truncate(len as usize);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn keep(&mut self, parts: &[Range<u64>]) -> io::Result<String> {
        for part in parts {
            self.kept
                .extend_from_slice(&self.log[part.start as usize..part.end as usize]);
        }
        Ok("kept".into())
    }

    fn begin_rewrite(&mut self) -> io::Result<()> {
        self.new.clear();
        Ok(())
    }

    fn append_rewrite(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.new.extend_from_slice(bytes);
        Ok(())
    }

    fn finish_rewrite(&mut self) -> io::Result<()> {
        self.log = std::mem::take(&mut self.new);
        Ok(())
    }

    fn sync_place(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn mark_suspect(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn is_marked_suspect(&mut self) -> io::Result<bool> {
        Ok(false)
    }
}

const MARKER: [u8; 8] = *b"\x05marker!";

/// The second session of each tenant has a name, the others have numbers.
fn id(number: i64) -> SessionId {
    match number {
        2 => SessionId::Name("ada/é".into()),
        _ => SessionId::Number(number),
    }
}

fn key(tenant: u32, number: i64) -> SessionKey {
    SessionKey::new(tenant, id(number))
}

fn options(tenants: &[(u32, u8)]) -> LogOptions {
    let mut options = LogOptions::new([1; 32], "toy");
    options.tenants = tenants
        .iter()
        .map(|&(number, name)| (number, [name; 32]))
        .collect();
    options.min_garbage = 0;
    options.marker = MARKER;
    options
}

/// A log with the store it fills.
struct Server<S> {
    log: SessionLog<S>,
    store: Arc<Mutex<SessionStore>>,
    restored: Restored,
    requests: u64,
}

impl<S: LogStorage> Server<S> {
    fn open(storage: S, options: LogOptions) -> Result<Self, Error> {
        let (log, store, restored) =
            SessionLog::open(storage, options, StoreLimits::default(), 1000)?;
        Ok(Self {
            log,
            store: Arc::new(Mutex::new(store)),
            restored,
            requests: 0,
        })
    }

    /// A turn of as many input and output tokens; or the session's end.
    fn turn(&mut self, key: SessionKey, start: Start, tokens: &[u32], end: bool) {
        self.requests += 1;
        let now = self.requests;
        let begun = TurnGuard::begin(&self.store, key, self.requests, start, now);
        let (lease, base) = begun.unwrap();
        let mut turns = base.turns;
        turns.push(Turn {
            start: base.history.len(),
            input_tokens: 1,
            output_tokens: tokens.len() - 1,
            tail: if tokens.len().is_multiple_of(2) {
                Tail::Closed
            } else {
                Tail::OpenAssistant
            },
            // Some turns are scored.
            logprobs: tokens
                .len()
                .is_multiple_of(3)
                .then(|| Logprobs::new(tokens[1..].iter().map(|&token| token as f32 / -8.0))),
            // And some have a name.
            key: tokens
                .len()
                .is_multiple_of(4)
                .then(|| TurnKey::new([tokens[0] as u8; TurnKey::BYTES])),
        });
        let commit = Commit {
            tokens: [&base.history, tokens].concat(),
            turns,
            seed: 5,
            system_tokens: 1,
            adapter: None,
            end,
            usage: SessionUsage {
                prompt_tokens: base.history.len() as u64 + 1,
                cached_tokens: base.history.len() as u64,
                generated_tokens: tokens.len() as u64,
                time_ms: now,
            },
            hold_ms: None,
            created_ms: None,
        };
        let turn = lease.finish(commit).prepare(now).unwrap();
        let evicted = self.store.lock().unwrap().evicted();
        let changes: Vec<_> = evicted.iter().map(Change::Evict).collect();
        self.log.append(&changes, false).unwrap();
        let written = evicted.len();
        self.store.lock().unwrap().evictions_written(written);
        self.log.append(&[turn.change()], false).unwrap();
        turn.settle();
    }

    fn states(&self) -> BTreeMap<SessionKey, SessionState> {
        let store = self.store.lock().unwrap();
        store.states_after(None, usize::MAX).into_iter().collect()
    }
}

/// Length of a log, and what it says.
type Moment = (usize, BTreeMap<SessionKey, SessionState>);

/// A log of a few sessions of two tenants, and the states after each of its records.
fn written() -> (Vec<u8>, Vec<Moment>) {
    let mut server = Server::open(Memory::default(), options(&[(0, 0), (1, 1)])).unwrap();
    let mut states = vec![(server.log.storage().log.len(), server.states())];
    for round in 0..12_u32 {
        let session = key(round % 2, i64::from(round % 3));
        let start = if round == 7 {
            Start::Fresh
        } else {
            Start::Create
        };
        let tokens: Vec<u32> = (0..=round).collect();
        server.turn(session, start, &tokens, round == 9);
        states.push((server.log.storage().log.len(), server.states()));
    }
    (server.log.into_storage().log, states)
}

fn reopen(log: Vec<u8>) -> Result<Server<Memory>, Error> {
    let memory = Memory {
        log,
        ..Memory::default()
    };
    Server::open(memory, options(&[(0, 0), (1, 1)]))
}

#[test]
fn every_cut_brings_back_the_last_whole_record() {
    let (log, states) = written();
    let head = states[0].0;
    for end in head..=log.len() {
        let server = reopen(log[..end].to_vec()).unwrap();
        let (good, expected) = states.iter().rev().find(|(len, _)| *len <= end).unwrap();
        assert_eq!(server.restored.torn as usize, end - *good, "cut at {end}");
        assert!(server.restored.is_whole());
        assert_eq!(&server.states(), expected, "cut at {end}");
        let storage = server.log.storage();
        assert_eq!(storage.log, log[..*good]);
        assert_eq!(storage.kept, log[*good..end]);
    }
}

#[test]
fn a_log_cut_within_its_head_begins_anew_and_a_head_is_there_twice() {
    let (log, states) = written();
    let head = states[0].0;
    let copy = (head - 8) / 2;
    for end in 0..head {
        let server = reopen(log[..end].to_vec()).unwrap();
        assert_eq!(server.restored.sessions, 0);
        let len = if end < 8 + copy { head } else { 8 + copy };
        assert_eq!(server.log.storage().log, log[..len]);
    }
    let long = [&log[..], &[0; 2048]].concat();
    for at in [0, 20, 20 + copy] {
        let mut damaged = long.clone();
        damaged[at] ^= 1;
        let server = reopen(damaged).unwrap();
        assert_eq!(server.states(), states.last().unwrap().1);
    }
    let mut damaged = long;
    damaged[20] ^= 1;
    damaged[20 + copy] ^= 1;
    let error = reopen(damaged).err().unwrap();
    assert_eq!(error.code, "invalid_session_log");
}

#[test]
fn a_log_of_another_model_is_refused_and_left_as_it_is() {
    let (log, _) = written();
    let mut other = options(&[(0, 0)]);
    other.fingerprint = [2; 32];
    other.model = "other".into();
    let memory = Memory {
        log: log.clone(),
        ..Memory::default()
    };
    let error = Server::open(memory, other).err().unwrap();
    assert_eq!(error.code, "session_log_mismatch");
    for word in ["toy (01010101)", "other (02020202)", "--session-dir"] {
        assert!(error.message.contains(word), "{}", error.message);
    }
    assert_eq!(reopen(log).unwrap().restored.torn, 0);
}

#[test]
fn sessions_belong_to_names_and_not_to_numbers() {
    let mut server = Server::open(Memory::default(), options(&[(1, 10), (2, 20)])).unwrap();
    server.turn(key(1, 7), Start::Create, &[1, 2], false);
    server.turn(key(2, 7), Start::Create, &[3, 4], false);
    let expected = server.states();
    let storage = server.log.into_storage();

    // The first key is gone, the second has its number, and a new one has the second's.
    let mut server = Server::open(storage, options(&[(1, 20), (2, 30)])).unwrap();
    let states = server.states();
    assert_eq!(states[&key(1, 7)], expected[&key(2, 7)]);
    assert!(!states.contains_key(&key(2, 7)));
    assert_eq!(states.len(), 2);
    server.turn(key(2, 7), Start::Create, &[5, 6], false);
    rewrite(&mut server);
    let storage = server.log.into_storage();

    // The first key is back, and so is what it had.
    let server = Server::open(storage, options(&[(5, 10), (6, 20), (7, 30)])).unwrap();
    let states = server.states();
    assert_eq!(states[&key(5, 7)], expected[&key(1, 7)]);
    assert_eq!(states[&key(6, 7)], expected[&key(2, 7)]);
    assert_eq!(*states[&key(7, 7)].tokens, [5, 6]);
}

fn rewrite(server: &mut Server<Memory>) {
    server.log.begin_rewrite().unwrap();
    let store = Arc::clone(&server.store);
    while server.log.is_rewriting() {
        let next = |last| store.lock().unwrap().states_after(last, 1);
        let evicted = || store.lock().unwrap().tombstones();
        server.log.rewrite_some(next, evicted).unwrap();
    }
}

#[test]
fn a_rewritten_log_says_the_same_in_fewer_bytes() {
    let (log, _) = written();
    let mut server = reopen(log.clone()).unwrap();
    for _ in 0..20 {
        server.turn(key(0, 0), Start::Fresh, &[9; 30], false);
    }
    let live = server.store.lock().unwrap().log_bytes();
    assert!(server.log.wants_rewrite(live));
    let (before, long) = (server.states(), server.log.len());
    server.log.begin_rewrite().unwrap();
    let store = Arc::clone(&server.store);
    let mut rounds = 0;
    while server.log.is_rewriting() {
        // Turns go on: of sessions that were copied already, and of those that were not.
        rounds += 1;
        server.turn(
            key(rounds % 2, i64::from(rounds % 3)),
            Start::Create,
            &[7, 8],
            false,
        );
        let next = |last| store.lock().unwrap().states_after(last, 1);
        let evicted = || store.lock().unwrap().tombstones();
        server.log.rewrite_some(next, evicted).unwrap();
    }
    assert!(rounds as usize > before.len());
    assert!(server.log.len() < long);
    assert!(!server.log.wants_rewrite(store.lock().unwrap().log_bytes()));
    let expected = server.states();
    let server = reopen(server.log.into_storage().log).unwrap();
    assert_eq!(server.states(), expected);
}

#[test]
fn an_evicted_session_stays_evicted() {
    let limits = StoreLimits {
        max_sessions: 2,
        ttl_ms: 0,
    };
    let (log, store, restored) =
        SessionLog::open(Memory::default(), options(&[(0, 0)]), limits, 1).unwrap();
    let store = Arc::new(Mutex::new(store));
    let mut server = Server {
        log,
        store,
        restored,
        requests: 0,
    };
    for id in 0..4 {
        server.turn(key(0, id), Start::Create, &[1, 2], false);
    }
    for rewritten in [false, true] {
        if rewritten {
            rewrite(&mut server);
        }
        let storage = server.log.storage().clone();
        let (_, mut store, _) = SessionLog::open(storage, options(&[(0, 0)]), limits, 9).unwrap();
        for (at, start) in [(0, Start::Continue), (0, Start::Create), (1, Start::Create)] {
            let error = store.begin(&key(0, at), 1, start, 9).unwrap_err();
            assert_eq!(error.code, "session_expired");
        }
        let error = store.begin(&key(0, 9), 1, Start::Continue, 9).unwrap_err();
        assert_eq!(error.code, "session_not_found");
        assert_eq!(store.len(), 2);
    }
}
