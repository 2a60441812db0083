//! Logs of the first version of the format are read, even damaged ones, and written anew.

use proptest::prelude::*;

use super::damage::crc32;
use super::*;

/// A record as the first version had them.
fn framed(log: &mut Vec<u8>, payload: &[u8]) {
    log.extend((payload.len() as u32).to_le_bytes());
    log.extend((!crc32(!0, payload)).to_le_bytes());
    log.extend(payload);
}

fn head(tenants: &[u8]) -> Vec<u8> {
    let mut log = b"lmsess1\n".to_vec();
    framed(&mut log, &[b"H", &[1; 32][..], b"toy"].concat());
    for &tenant in tenants {
        framed(&mut log, &[&b"T"[..], &[tenant; 32]].concat());
    }
    log
}

/// One turn of two tokens behind `kept` turns like it.
fn put(log: &mut Vec<u8>, tenant: u32, id: i64, kept: u32, tokens: [u32; 2]) {
    let mut payload = b"P".to_vec();
    payload.extend(tenant.to_le_bytes());
    payload.extend(id.to_le_bytes());
    for number in [5_u64, 1, 9 - u64::from(kept)] {
        payload.extend(number.to_le_bytes());
    }
    for count in [1, kept, kept * 2, 1, 1, 1] {
        payload.extend(count.to_le_bytes());
    }
    payload.push(0);
    for token in tokens {
        payload.extend(token.to_le_bytes());
    }
    framed(log, &payload);
}

fn open(log: Vec<u8>) -> Server<Memory> {
    let memory = Memory {
        log,
        ..Memory::default()
    };
    Server::open(memory, options(&[(0, 0), (1, 1)])).unwrap()
}

fn two_hundred() -> Vec<u8> {
    let mut log = head(&[0]);
    for id in 0..200 {
        put(&mut log, 0, id, 0, [id as u32, 7]);
    }
    log
}

#[test]
fn a_log_of_the_first_version_is_written_anew() {
    let mut log = head(&[0, 1]);
    put(&mut log, 0, 3, 0, [1, 2]);
    put(&mut log, 1, 3, 0, [3, 4]);
    put(&mut log, 0, 3, 1, [5, 6]);
    let evicted = [&b"D"[..], &0_u32.to_le_bytes(), &9_i64.to_le_bytes(), &[1]].concat();
    framed(&mut log, &evicted);
    log.extend(b"torn");
    let server = open(log);
    assert_eq!(server.restored.version, 1);
    assert!(server.restored.is_whole());
    assert_eq!((server.restored.torn, server.restored.turns), (4, 3));
    let storage = server.log.storage();
    assert!(storage.log.starts_with(b"lmsess2\n"));
    assert_eq!(storage.kept, b"torn");
    let states = server.states();
    assert_eq!(*states[&key(0, 3)].tokens, [1, 2, 5, 6]);
    assert_eq!(*states[&key(1, 3)].tokens, [3, 4]);
    let server = open(server.log.into_storage().log);
    assert_eq!((server.restored.version, server.states()), (2, states));
    let mut store = server.store.lock().unwrap();
    let error = store.begin(&key(0, 9), 1, Start::Create, 9).unwrap_err();
    assert_eq!(error.code, "session_expired");
}

#[test]
fn one_bit_of_two_hundred_sessions_costs_one() {
    let mut log = two_hundred();
    log[2000] ^= 1;
    let server = open(log);
    assert_eq!(server.restored.sessions, 199);
    let [loss] = &server.restored.losses[..] else {
        panic!("{:?}", server.restored);
    };
    assert_eq!((loss.kept_turns, loss.last_turn), (0, 1));
    assert!(
        !server
            .states()
            .contains_key(&SessionKey::new(0, loss.id.clone()))
    );
    assert_eq!(server.restored.unnamed, 0);
}

#[test]
fn a_session_with_a_hole_goes_no_further() {
    let mut log = head(&[0]);
    put(&mut log, 0, 1, 0, [1, 2]);
    put(&mut log, 0, 1, 1, [3, 4]);
    let at = log.len() - 3;
    put(&mut log, 0, 1, 2, [5, 6]);
    put(&mut log, 0, 2, 0, [7, 8]);
    log[at] ^= 8;
    let server = open(log);
    let states = server.states();
    assert_eq!(*states[&key(0, 1)].tokens, [1, 2]);
    assert_eq!(states[&key(0, 1)].lost_turn, 3);
    assert_eq!(states[&SessionKey::new(0, 2)].lost_turn, 0);
}

#[test]
fn sessions_of_a_tenant_whose_name_may_be_lost_are_nobodys() {
    let mut log = head(&[0]);
    put(&mut log, 0, 1, 0, [1, 2]);
    let begin = log.len();
    framed(&mut log, &[&b"T"[..], &[1; 32]].concat());
    // Two bits, so that they cannot be flipped back.
    log[begin + 12] ^= 3;
    framed(&mut log, &[&b"T"[..], &[2; 32]].concat());
    put(&mut log, 1, 5, 0, [3, 4]);
    put(&mut log, 2, 6, 0, [5, 6]);
    let server = open(log);
    let states = server.states();
    assert_eq!(states.keys().cloned().collect::<Vec<_>>(), [key(0, 1)]);
    assert_eq!(server.restored.unnamed, 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_flipped_bit_costs_one_session_at_most(bit in any::<prop::sample::Index>()) {
        let mut log = two_hundred();
        let begin = head(&[]).len();
        let bit = begin * 8 + bit.index((log.len() - begin) * 8);
        log[bit / 8] ^= 1 << (bit % 8);
        let server = open(log);
        let states = server.states();
        prop_assert!(states.len() >= 199, "{:?}", server.restored);
        for (key, state) in &states {
            prop_assert_eq!(key, &SessionKey::new(0, i64::from(state.tokens[0])));
            prop_assert_eq!(&state.tokens[1..], &[7]);
        }
        prop_assert!(!server.restored.is_whole());
        prop_assert_eq!(server.restored.unnamed, 0);
        prop_assert_eq!(states.len() + server.restored.losses.len(), 200);
    }
}
