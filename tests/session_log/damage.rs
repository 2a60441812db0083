//! Damage in the middle of a log costs what the damaged records said, and no more.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// States without the mark of what was lost behind them.
fn unmarked(states: BTreeMap<SessionKey, SessionState>) -> BTreeMap<SessionKey, SessionState> {
    let mut states = states;
    for state in states.values_mut() {
        state.lost_turn = 0;
    }
    states
}

/// Every state that a session was in.
fn moments<'a>(states: &'a [Moment], key: &SessionKey) -> Vec<&'a SessionState> {
    states.iter().filter_map(|(_, at)| at.get(key)).collect()
}

fn lost(server: &Server<Memory>) -> BTreeSet<SessionKey> {
    let losses = server.restored.losses.iter();
    losses
        .map(|l| SessionKey::new(l.tenant.unwrap(), l.id.clone()))
        .collect()
}

#[test]
fn a_session_with_a_hole_is_read_only_at_its_last_good_turn() {
    let mut server = Server::open(Memory::default(), options(&[(0, 0)])).unwrap();
    let mut ends = Vec::new();
    for round in 0..5 {
        server.turn(key(0, 1), Start::Create, &[round, 7], false);
        ends.push(server.log.storage().log.len());
        server.turn(key(0, 2), Start::Create, &[round, 8], false);
    }
    let other = server.states()[&key(0, 2)].clone();
    let mut log = server.log.into_storage().log;
    log[ends[2] - 5] ^= 4;
    let mut server = Server::open(
        Memory {
            log,
            ..Memory::default()
        },
        options(&[(0, 0)]),
    )
    .unwrap();
    let expected = Loss {
        tenant: Some(0),
        id: id(1),
        kept_turns: 2,
        last_turn: 5,
    };
    assert_eq!(server.restored.losses, [expected]);
    assert_eq!(server.restored.unnamed, 0);
    let states = server.states();
    assert_eq!(states[&key(0, 2)], other);
    assert_eq!(*states[&key(0, 1)].tokens, [0, 7, 1, 7]);

    // It stays so, and says so, until it is taken back to what is there.
    for reopened in [false, true] {
        if reopened {
            let storage = server.log.into_storage();
            server = Server::open(storage, options(&[(0, 0)])).unwrap();
            assert!(server.restored.is_whole());
        }
        let mut store = server.store.lock().unwrap();
        for start in [Start::Continue, Start::Create] {
            let error = store.begin(&key(0, 1), 99, start, 9).unwrap_err();
            assert_eq!(error.code, "session_damaged");
            assert!(error.message.contains("after turn 2 (up to turn 5)"));
            assert_eq!(error.details["turns"], 2);
        }
        assert_eq!(store.info(&key(0, 1)).unwrap().lost_turn, 5);
    }
    let begun = TurnGuard::begin(&server.store, key(0, 1), 99, Start::Mend, 9);
    let (lease, base) = begun.unwrap();
    let rewound = base.after_turns(Some(2)).unwrap();
    let turn = lease.finish(rewound).prepare(9).unwrap();
    server.log.append(&[turn.change()], false).unwrap();
    turn.settle();
    server.turn(key(0, 1), Start::Continue, &[4, 4], false);
    let expected = server.states();
    let storage = server.log.into_storage();
    let server = Server::open(storage, options(&[(0, 0)])).unwrap();
    assert_eq!(server.states(), expected);
    assert_eq!(*expected[&key(0, 1)].tokens, [0, 7, 1, 7, 4, 4]);
}

#[test]
fn a_session_whose_only_record_is_damaged_is_lost_and_said_to_be() {
    let mut server = Server::open(Memory::default(), options(&[(0, 0)])).unwrap();
    let mut begin = 0;
    for id in 0..3 {
        if id == 1 {
            begin = server.log.storage().log.len();
        }
        server.turn(key(0, id), Start::Create, &[1, 2, 3], false);
    }
    let mut log = server.log.into_storage().log;
    // Its id.
    log[begin + 43] ^= 2;
    let memory = Memory {
        log,
        ..Memory::default()
    };
    let server = Server::open(memory, options(&[(0, 0)])).unwrap();
    assert_eq!(server.restored.losses[0].id, id(1));
    assert_eq!(server.restored.sessions, 2);
    let storage = server.log.into_storage();
    let server = Server::open(storage, options(&[(0, 0)])).unwrap();
    let mut store = server.store.lock().unwrap();
    for start in [Start::Continue, Start::Create] {
        let error = store.begin(&key(0, 1), 99, start, 9).unwrap_err();
        assert_eq!(error.code, "session_lost");
    }
    store.begin(&key(0, 1), 99, Start::Fresh, 9).unwrap();
}

#[test]
fn a_log_without_a_record_loses_none_to_a_bit_of_its_header() {
    let begun = Server::open(Memory::default(), options(&[(0, 0)])).unwrap();
    let log = begun.log.into_storage().log;
    for bit in 0..log.len() * 8 {
        let mut log = log.clone();
        log[bit / 8] ^= 1 << (bit % 8);
        let server = reopen(log).unwrap();
        assert!(server.restored.losses.is_empty() && server.restored.unnamed == 0);
        assert!(server.restored.damaged > 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// One bit costs one session its turns from one on, at most, and which those are is told.
    #[test]
    fn a_flipped_bit_costs_one_record(bit in any::<prop::sample::Index>()) {
        let (mut log, states) = written();
        let last = &states.last().unwrap().1;
        let bit = bit.index(log.len() * 8);
        log[bit / 8] ^= 1 << (bit % 8);
        let server = reopen(log.clone()).unwrap();
        let (found, lost) = (server.states(), lost(&server));
        prop_assert_eq!(server.restored.unnamed, 0);
        prop_assert!(lost.len() <= 1);
        let keys: BTreeSet<_> = found.keys().chain(last.keys()).cloned().collect();
        for key in keys {
            if !lost.contains(&key) {
                prop_assert_eq!(found.get(&key), last.get(&key));
            }
        }
        // What is damaged is kept, and gone from the log.
        let storage = server.log.storage();
        let bad = server.restored.damaged + server.restored.torn;
        prop_assert_eq!(storage.kept.len() as u64, bad);
        prop_assert!(bad > 0);
        let again = reopen(storage.log.clone()).unwrap();
        prop_assert!(again.restored.is_whole());
        prop_assert_eq!(again.restored.torn, 0);
        prop_assert_eq!(again.states(), found);
    }

    /// Whatever happens to the file behind its head, it opens, every session is as it once was, and then stays so.
    #[test]
    fn a_mutated_log_brings_back_what_once_was(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0_u8..5, any::<u8>()), 1..6),
    ) {
        let (mut log, states) = written();
        let head = states[0].0;
        for (at, kind, byte) in edits {
            if log.len() == head {
                break;
            }
            let at = head + at.index(log.len() - head);
            match kind {
                0 => log[at] = byte,
                1 => log[at] ^= 1 << (byte % 8),
                2 => log.truncate(at),
                3 => log.insert(at, byte),
                _ => {
                    log.drain(at..log.len().min(at + byte as usize));
                }
            }
        }
        let server = reopen(log.clone()).unwrap();
        let found = server.states();
        for (key, state) in &unmarked(found.clone()) {
            prop_assert!(moments(&states, key).contains(&state));
        }
        let again = reopen(server.log.into_storage().log).unwrap();
        prop_assert!(again.restored.is_whole());
        prop_assert_eq!(again.restored.torn, 0);
        prop_assert_eq!(again.states(), found);
    }

    /// Records that are whole and say nonsense are passed over, and take no memory that they do not pay for.
    #[test]
    fn records_that_nobody_wrote_are_passed_over(
        records in prop::collection::vec(
            (prop::sample::select(b"HPDNX".to_vec()), prop::collection::vec(any::<u8>(), 0..90), 0_u8..3),
            1..6,
        ),
    ) {
        let (mut log, states) = written();
        for (at, (kind, mut body, small)) in records.into_iter().enumerate() {
            if small > 0 {
                // Numbers that are often in range.
                for byte in &mut body {
                    *byte = u8::from(*byte > 250);
                }
            }
            log.extend(framed(20 + at as u64, kind, "0", u32::from(small), &body));
        }
        let server = reopen(log.clone()).unwrap();
        let last = &states.last().unwrap().1;
        let found = server.states();
        for (at, state) in &found {
            prop_assert_eq!(state.turns.last().map(Turn::end), Some(state.tokens.len()));
            if at.id != id(0) {
                prop_assert_eq!(Some(state), last.get(at));
            }
        }
        let again = reopen(server.log.into_storage().log).unwrap();
        prop_assert_eq!(again.restored.torn, 0);
        prop_assert_eq!(again.states(), found);
    }

    /// What was never a log neither opens nor panics, unless it is short enough to be a log's torn beginning.
    #[test]
    fn noise_is_no_log(noise in prop::collection::vec(any::<u8>(), 0..3000)) {
        let (log, _) = written();
        for bytes in [noise.clone(), [&log[..8], &noise].concat()] {
            if let Ok(server) = reopen(bytes) {
                prop_assert!(server.states().is_empty());
            }
        }
    }
}

/// A record as docs/sessions.md describes it.
fn framed(seq: u64, kind: u8, id: &str, turns: u32, body: &[u8]) -> Vec<u8> {
    let mut record = MARKER.to_vec();
    record.extend(seq.to_le_bytes());
    record.extend(0_u64.to_le_bytes());
    record.push(kind);
    record.extend((id.len() as u16).to_le_bytes());
    record.extend([0; 16]);
    record.extend(id.bytes());
    record.extend(turns.to_le_bytes());
    record.extend((body.len() as u32).to_le_bytes());
    let head = !crc32(!0, &record);
    record.extend(head.to_le_bytes());
    record.extend(body);
    record.extend((!crc32(!head, body)).to_le_bytes());
    record
}

/// The register of a CRC-32 behind some bytes, without the last inversion.
pub(super) fn crc32(register: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(register, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
