use std::collections::VecDeque;
use std::thread::JoinHandle;

use super::super::test_turns::turn;
use super::super::turn_guard::{FinishedTurn, TurnGuard};
use std::sync::Mutex;

use super::*;
use crate::error::Kind;
use crate::session::SessionStore;

/// What a store says, and what it was given.
#[derive(Debug, Default)]
struct Place {
    answers: VecDeque<Written>,
    /// The id of each session, and the turns of its record; 0: its end.
    given: Vec<(String, bool, u32)>,
    down: bool,
}

#[derive(Clone, Default)]
struct Handle(Arc<Mutex<Place>>);

impl SharedStore for Handle {
    fn write(&mut self, changes: &[(&SessionKey, Option<StoredRecord>)]) -> Vec<Written> {
        let mut place = lock(&self.0);
        let mut said = Vec::new();
        for (key, record) in changes {
            let (whole, turns) = record.as_ref().map_or((false, 0), |r| (r.whole, r.turns));
            place.given.push((key.id.to_string(), whole, turns));
            said.push(place.answers.pop_front().unwrap_or(Written::Kept));
        }
        said
    }

    fn probe(&mut self) -> Result<(), String> {
        let down = lock(&self.0).down;
        if down { Err("down".to_owned()) } else { Ok(()) }
    }
}

struct Running {
    place: Handle,
    sessions: Arc<Mutex<SessionStore>>,
    counters: Arc<LogCounters>,
    sender: Option<LogSender>,
    thread: Option<JoinHandle<()>>,
    requests: u64,
}

impl Running {
    fn start() -> Self {
        let (place, counters) = (Handle::default(), Arc::<LogCounters>::default());
        let wake = Arc::new(Wake::new().unwrap());
        let (writer, sender) =
            StoreWriter::new(Box::new(place.clone()), wake, Arc::clone(&counters));
        Self {
            place,
            sessions: Arc::default(),
            counters,
            sender: Some(sender),
            thread: Some(std::thread::spawn(move || writer.run())),
            requests: 0,
        }
    }

    fn says(&self, answers: impl IntoIterator<Item = Written>) {
        lock(&self.place.0).answers.extend(answers);
    }

    fn turn(&mut self, id: i64) -> Result<()> {
        self.requests += 1;
        let key = SessionKey::new(0, id);
        self.write(turn(&self.sessions, key, self.requests))
    }

    fn write(&self, turn: FinishedTurn) -> Result<()> {
        self.sender.as_ref().unwrap().write(turn)
    }

    fn turns(&self, id: i64) -> usize {
        let sessions = lock(&self.sessions);
        let state = sessions.state(&SessionKey::new(0, id));
        state.map_or(0, |state| state.turns.len())
    }

    fn given(&self) -> Vec<(String, bool, u32)> {
        lock(&self.place.0).given.clone()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.sender.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

fn named(id: &str, whole: bool, turns: u32) -> (String, bool, u32) {
    (id.to_owned(), whole, turns)
}

#[test]
fn a_turn_is_committed_once_the_store_has_it() {
    let mut running = Running::start();
    running.turn(7).unwrap();
    running.turn(7).unwrap();
    assert_eq!(running.turns(7), 2);
    assert_eq!(running.given(), [named("7", true, 1), named("7", false, 2)]);
    let key = SessionKey::new(0, 7);
    let end = TurnGuard::begin_end(&running.sessions, key, 99, 1);
    running.write(end.unwrap().unwrap()).unwrap();
    assert_eq!(running.given()[2], named("7", false, 0));
}

#[test]
fn a_turn_that_another_server_has_overtaken_is_none() {
    let mut running = Running::start();
    running.turn(7).unwrap();
    running.says([Written::Overtaken]);
    let error = running.turn(7).unwrap_err();
    assert_eq!((error.code, error.kind), ("session_busy", Kind::Conflict));
    assert_eq!(running.turns(7), 1);
    assert_eq!(running.counters.fault(), None);
}

#[test]
fn a_store_that_fails_leaves_the_session_and_heals() {
    let mut running = Running::start();
    running.turn(7).unwrap();
    lock(&running.place.0).down = true;
    running.says([Written::Failed("no route".to_owned())]);
    let error = running.turn(7).unwrap_err();
    assert_eq!(
        (error.code, error.kind),
        ("storage_failed", Kind::Unavailable)
    );
    assert!(
        error
            .message
            .contains("the session store cannot be written: no route")
    );
    assert_eq!(running.turns(7), 1);
    assert!(running.counters.fault().is_some());
    lock(&running.place.0).down = false;
    while running.counters.fault().is_some() {
        std::thread::yield_now();
    }
    running.turn(7).unwrap();
    assert_eq!(running.turns(7), 2);
}

#[test]
fn a_store_may_want_the_whole_session() {
    let mut running = Running::start();
    running.turn(7).unwrap();
    running.says([Written::Whole]);
    running.turn(7).unwrap();
    assert_eq!(
        running.given()[1..],
        [named("7", false, 2), named("7", true, 2)]
    );
    running.says([Written::Whole, Written::Whole]);
    assert_eq!(running.turn(7).unwrap_err().code, "storage_failed");
    assert_eq!(running.turns(7), 2);
}

#[test]
fn the_servers_own_sessions_stay_here() {
    let mut running = Running::start();
    running.turn(-5).unwrap();
    assert_eq!((running.turns(-5), running.given().len()), (1, 0));
}
