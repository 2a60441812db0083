//! Sessions, block pool and prefix cache against models that are as simple as can be, under random operations.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lmserve::kv::{BlockPool, BlockTable};
use lmserve::request::SessionId;
use lmserve::session::{
    Commit, SessionKey, SessionStore, SessionUsage, Start, StoreLimits, Turn, TurnHistory,
};
use lmserve::text::Tail;
use proptest::prelude::*;

/// What clients do to a store; ids and tenants are few, so that they meet.
#[derive(Debug, Clone)]
enum Act {
    Begin(SessionKey, u8),
    /// The running turn of a session ends with so many tokens more, and is held for so long; or the session ends.
    Commit(SessionKey, usize, bool, Option<u64>),
    Rollback(SessionKey),
    /// The running turn leaves the session's first turns, and forgets the others.
    Rewind(SessionKey, usize),
    Wait(u64),
    Cap(u32, usize),
    /// An idle session is held for so long.
    Hold(SessionKey, u64),
}

fn key() -> impl Strategy<Value = SessionKey> {
    (0_u32..2, 0_i64..4).prop_map(|(tenant, id)| {
        let name = SessionId::Name(format!("name {id}").into());
        let id = if id < 2 { id.into() } else { name };
        SessionKey::new(tenant, id)
    })
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (key(), 0_u8..4).prop_map(|(key, start)| Act::Begin(key, start)),
        4 => (key(), 0_usize..5, prop::bool::weighted(0.1), prop::option::weighted(0.3, 1_u64..80))
            .prop_map(|(key, n, end, hold)| Act::Commit(key, n, end, hold)),
        1 => (key(), 0_u64..80).prop_map(|(key, hold)| Act::Hold(key, hold)),
        1 => key().prop_map(Act::Rollback),
        1 => (key(), 0_usize..4).prop_map(|(key, turns)| Act::Rewind(key, turns)),
        1 => (0_u64..60).prop_map(Act::Wait),
        1 => (0_u32..2, 1_usize..4).prop_map(|(tenant, cap)| Act::Cap(tenant, cap)),
    ]
}

#[derive(Debug, Clone, Default)]
struct Known {
    tokens: Vec<u32>,
    ends: Vec<usize>,
    running: Option<(u64, bool)>,
    used: (u64, usize),
    hold_until: u64,
}

/// The store as a list to search through.
#[derive(Debug)]
struct Naive {
    sessions: BTreeMap<SessionKey, Known>,
    evicted: BTreeSet<SessionKey>,
    limits: StoreLimits,
    caps: BTreeMap<u32, usize>,
    commits: usize,
    /// When the store last looked at the clock.
    seen: u64,
}

impl Naive {
    fn evict(&mut self, which: impl Fn(&SessionKey) -> bool, most: usize) {
        while self.sessions.keys().filter(|key| which(key)).count() > most {
            let idle = self.sessions.iter();
            let idle = idle.filter(|(key, s)| which(key) && s.running.is_none());
            let seen = self.seen;
            // What is held goes after all else, and what is held the shortest first.
            let order = |s: &Known| {
                let held = s.hold_until > seen;
                if held {
                    (1, s.hold_until)
                } else {
                    (0, s.used.1 as u64)
                }
            };
            let Some((_, key)) = idle.map(|(key, s)| (order(s), key.clone())).min() else {
                return;
            };
            self.sessions.remove(&key);
            self.evicted.insert(key);
        }
    }

    fn enforce(&mut self, tenant: u32) {
        if let Some(&cap) = self.caps.get(&tenant) {
            self.evict(|key| key.tenant == tenant, cap);
        }
        self.evict(|_| true, self.limits.max_sessions);
    }

    fn expire(&mut self, now_ms: u64) {
        self.seen = self.seen.max(now_ms);
        let (ttl, seen) = (self.limits.ttl_ms, self.seen);
        let old = |s: &Known| {
            ttl > 0 && s.hold_until <= seen && s.running.is_none() && s.used.0 + ttl <= now_ms
        };
        let gone: Vec<_> = self
            .sessions
            .iter()
            .filter(|(_, s)| old(s))
            .map(|(k, _)| k.clone())
            .collect();
        for key in gone {
            self.sessions.remove(&key);
            self.evicted.insert(key);
        }
    }

    fn begin(
        &mut self,
        key: &SessionKey,
        request: u64,
        start: Start,
        now_ms: u64,
    ) -> Result<Known, &'static str> {
        self.expire(now_ms);
        let fresh = match (self.sessions.get(key), start) {
            (Some(session), _) if session.running.is_some() => return Err("session_busy"),
            (Some(_), Start::New) => return Err("session_exists"),
            (Some(_), start) => start == Start::Fresh,
            (None, Start::Fresh | Start::New) => true,
            (None, _) if self.evicted.contains(key) => return Err("session_expired"),
            (None, Start::Continue | Start::Mend) => return Err("session_not_found"),
            (None, Start::Create) => true,
        };
        let session = self.sessions.entry(key.clone()).or_default();
        session.running = Some((request, fresh));
        let base = if fresh {
            Known::default()
        } else {
            session.clone()
        };
        self.enforce(key.tenant);
        Ok(base)
    }

    fn settle(
        &mut self,
        key: &SessionKey,
        after: Option<(Vec<u32>, Vec<usize>)>,
        now_ms: u64,
        hold_ms: Option<u64>,
    ) {
        self.evicted.remove(key);
        self.sessions.remove(key);
        if let Some((tokens, ends)) = after {
            self.commits += 1;
            let session = Known {
                tokens,
                ends,
                running: None,
                used: (now_ms, self.commits),
                hold_until: hold_ms.map_or(0, |hold_ms| now_ms + hold_ms),
            };
            self.sessions.insert(key.clone(), session);
            self.enforce(key.tenant);
        }
    }

    fn roll_back(&mut self, key: &SessionKey) {
        if let Some(session) = self.sessions.get_mut(key) {
            session.running = None;
            if session.ends.is_empty() {
                self.sessions.remove(key);
            }
        }
        self.enforce(key.tenant);
    }
}

fn check(store: &SessionStore, naive: &Naive) -> Result<(), TestCaseError> {
    let found: Vec<_> = [0, 1]
        .into_iter()
        .flat_map(|tenant| store.list(tenant, None, 99))
        .collect();
    let found: Vec<_> = found
        .iter()
        .map(|i| (i.key.clone(), i.tokens, i.turns, i.busy))
        .collect();
    let expected = naive.sessions.iter();
    let expected: Vec<_> = expected
        .map(|(key, s)| {
            (
                key.clone(),
                s.tokens.len(),
                s.ends.len(),
                s.running.is_some(),
            )
        })
        .collect();
    prop_assert_eq!(found, expected);
    for (key, session) in &naive.sessions {
        let state = store.state(key).unwrap();
        prop_assert_eq!(&*state.tokens, &session.tokens[..]);
        prop_assert!(
            state
                .turns
                .iter()
                .map(Turn::end)
                .eq(session.ends.iter().copied())
        );
    }
    prop_assert_eq!(
        store.tokens(),
        naive
            .sessions
            .values()
            .map(|s| s.tokens.len())
            .sum::<usize>()
    );
    for tenant in 0..2 {
        let count = naive
            .sessions
            .keys()
            .filter(|key| key.tenant == tenant)
            .count();
        prop_assert_eq!(store.count_of(tenant), count);
    }
    Ok(())
}

/// A turn of one token in a session that is begun anew.
fn put(store: &mut SessionStore, key: &SessionKey, request: u64, now_ms: u64) {
    store.begin(key, request, Start::Fresh, now_ms).unwrap();
    let commit = Commit {
        tokens: vec![1],
        turns: vec![Turn {
            start: 0,
            input_tokens: 1,
            output_tokens: 0,
            tail: Tail::Closed,
            logprobs: None,
            key: None,
        }],
        seed: 0,
        system_tokens: 0,
        adapter: None,
        end: false,
        usage: SessionUsage::default(),
        hold_ms: None,
        created_ms: None,
    };
    store.commit(key, request, commit, now_ms);
}

#[test]
fn a_clock_that_is_set_back_evicts_no_newer_session() {
    let key = |tenant, id: i64| SessionKey::new(tenant, id);
    let mut store = SessionStore::new(StoreLimits {
        max_sessions: 3,
        ttl_ms: 0,
    });
    for (id, now_ms) in [(0, 5000), (1, 6000), (2, 40), (3, 50)] {
        put(&mut store, &key(0, id), 10 + id as u64, now_ms);
    }
    let ids = |store: &SessionStore, tenant| -> Vec<String> {
        let page = store.list(tenant, None, 9);
        page.iter().map(|info| info.key.id.to_string()).collect()
    };
    assert_eq!(ids(&store, 0), ["1", "2", "3"]);
    // Used again, the oldest is the newest.
    put(&mut store, &key(0, 1), 20, 30);
    store.set_tenant_cap(0, 2);
    assert_eq!(ids(&store, 0), ["1", "3"]);
    put(&mut store, &key(1, 7), 30, 20);
    put(&mut store, &key(1, 8), 31, 10);
    assert_eq!(ids(&store, 0), ["1"]);
    assert_eq!(ids(&store, 1), ["7", "8"]);
}

#[test]
fn a_hold_that_ended_while_a_turn_ran_holds_no_more_after_it_was_rolled_back() {
    let key = |id: i64| SessionKey::new(0, id);
    let mut store = SessionStore::new(StoreLimits::default());
    put(&mut store, &key(0), 10, 5);
    store.hold(&key(0), 20).unwrap();
    store.begin(&key(0), 11, Start::Continue, 30).unwrap();
    put(&mut store, &key(1), 12, 31);
    store.rollback(&key(0), 11);
    store.set_tenant_cap(0, 1);
    let left: Vec<_> = store.list(0, None, 9);
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].key, key(1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_store_is_what_a_list_would_be(
        acts in prop::collection::vec(act(), 1..120),
        max_sessions in 2_usize..7,
        ttl_ms in prop::sample::select(vec![0_u64, 50, 400]),
    ) {
        let limits = StoreLimits { max_sessions, ttl_ms };
        let mut store = SessionStore::new(limits);
        let mut naive = Naive {
            sessions: BTreeMap::new(),
            evicted: BTreeSet::new(),
            limits,
            caps: BTreeMap::new(),
            commits: 0,
            seen: 0,
        };
        // What each running turn builds on, as the store gave it.
        let mut bases: BTreeMap<SessionKey, (u64, TurnHistory)> = BTreeMap::new();
        let mut now = 1;
        for (at, act) in acts.into_iter().enumerate() {
            let request = at as u64;
            now += 1;
            match act {
                Act::Begin(key, start) => {
                    let start = [Start::Continue, Start::Create, Start::Fresh, Start::New][start as usize];
                    let begun = store.begin(&key, request, start, now);
                    match (begun, naive.begin(&key, request, start, now)) {
                        (Ok(base), Ok(known)) => {
                            prop_assert_eq!(&base.history, &known.tokens);
                            bases.insert(key, (request, base));
                        }
                        (Err(error), Err(code)) => prop_assert_eq!(error.code, code),
                        (begun, expected) => prop_assert!(false, "{:?}, not {:?}", begun, expected),
                    }
                }
                Act::Commit(key, count, end, hold_ms) => {
                    let Some((request, base)) = bases.remove(&key) else { continue };
                    let (mut tokens, mut turns) = (base.history, base.turns);
                    if count == 0 && turns.is_empty() {
                        bases.insert(key, (request, TurnHistory { history: tokens, turns, ..TurnHistory::empty() }));
                        continue;
                    }
                    let start = tokens.len();
                    tokens.extend((0..count as u32).map(|n| n + now as u32));
                    if count > 0 {
                        turns.push(Turn { start, input_tokens: count, output_tokens: 0, tail: Tail::Closed, logprobs: None, key: None });
                    }
                    let ends = turns.iter().map(Turn::end).collect();
                    let after = (!end).then(|| (tokens.clone(), ends));
                    let commit = Commit { tokens, turns, seed: 1, system_tokens: 0, adapter: None, end, usage: SessionUsage::default(), hold_ms, created_ms: None };
                    store.commit(&key, request, commit, now);
                    naive.settle(&key, after, now, hold_ms);
                }
                Act::Rollback(key) => {
                    let Some((request, _)) = bases.remove(&key) else { continue };
                    store.rollback(&key, request);
                    naive.roll_back(&key);
                }
                Act::Rewind(key, turns) => {
                    let Some((request, base)) = bases.remove(&key) else { continue };
                    let (history, ends) = (base.history.clone(), base.turns.iter().map(Turn::end).collect::<Vec<_>>());
                    match base.after_turns(Some(turns)) {
                        Ok(commit) => {
                            let ends = ends[..turns].to_vec();
                            let tokens = history[..ends[turns - 1]].to_vec();
                            store.commit(&key, request, commit, now);
                            naive.settle(&key, Some((tokens, ends)), now, None);
                        }
                        Err(error) => {
                            prop_assert!(turns == 0 || turns > ends.len(), "{}", error.message);
                            store.rollback(&key, request);
                            naive.roll_back(&key);
                        }
                    }
                }
                Act::Wait(ms) => {
                    now += ms;
                    store.expire(now);
                    naive.expire(now);
                }
                Act::Hold(key, hold_ms) => {
                    let until = if hold_ms == 0 { 0 } else { now + hold_ms };
                    let held = store.hold(&key, until);
                    prop_assert_eq!(held.is_ok(), naive.sessions.contains_key(&key));
                    if let Some(session) = naive.sessions.get_mut(&key) {
                        session.hold_until = until;
                    }
                }
                Act::Cap(tenant, cap) => {
                    store.set_tenant_cap(tenant, cap);
                    naive.caps.insert(tenant, cap);
                    naive.enforce(tenant);
                }
            }
            check(&store, &naive)?;
        }
    }

    /// Tables of prompts over few words: what is found cached was computed by the same tenant, token for token, and every block
    /// is free, owned or cached.
    #[test]
    fn a_pool_finds_what_was_computed_and_nothing_else(
        prompts in prop::collection::vec(
            (0_u32..2, prop::collection::vec(0_u32..3, 1..24), any::<bool>(), 0_u64..6),
            1..60,
        ),
        num_blocks in 8_usize..30,
        block_size in 1_usize..5,
        shared: bool,
    ) {
        let mut pool = BlockPool::new(num_blocks, block_size, true);
        if shared {
            pool = pool.shared_by_tenants();
        }
        let pool = Arc::new(pool);
        // Every prefix that a tenant has computed and may find, be it cached still or not: whole blocks, and where a table ended.
        let mut computed: BTreeSet<(u32, Vec<u32>)> = BTreeSet::new();
        let mut held: Vec<(BlockTable, Vec<u32>)> = Vec::new();
        for (at, (tenant, tokens, keep, hint)) in prompts.into_iter().enumerate() {
            pool.set_time(at as u64);
            let owner = if shared { 0 } else { tenant };
            let said = tokens.clone();
            let cached = pool.cached_prefix(tenant, &tokens);
            let mut table = BlockTable::from_prefix(&pool, tenant, &tokens);
            let whole = table.capacity();
            prop_assert_eq!(whole + table.take_tail(&tokens), cached);
            for end in (block_size..=cached).step_by(block_size).chain((cached > 0).then_some(cached)) {
                prop_assert!(computed.contains(&(owner, tokens[..end].to_vec())));
            }
            // What one has taken, nobody else finds.
            prop_assert_eq!(pool.cached_prefix(tenant, &tokens), whole);
            if table.grow(tokens.len()) {
                table.register(&tokens, tokens.len());
                let whole = tokens.len() / block_size * block_size;
                for end in (block_size..=whole).step_by(block_size) {
                    computed.insert((owner, tokens[..end].to_vec()));
                }
                // While somebody holds it, it is found.
                prop_assert_eq!(pool.cached_prefix(tenant, &tokens), whole);
                computed.insert((owner, tokens.clone()));
                held.push((table, tokens));
            } else {
                drop(table);
            }
            let leaves = if keep { held.len().saturating_sub(3) } else { held.len() };
            for (table, tokens) in held.drain(..leaves) {
                table.leave_tail(&tokens, tokens.len());
            }
            let before = pool.cached_prefix(tenant, &said);
            match hint {
                0 => pool.hold(tenant, &said, 5),
                1 => {
                    let given_up = pool.give_up(tenant, &said);
                    let after = pool.cached_prefix(tenant, &said);
                    prop_assert!(after <= before && (after < before) == (given_up > 0));
                }
                _ => {}
            }
            let mut references = vec![0; num_blocks];
            for &block in held.iter().flat_map(|(table, _)| table.blocks()) {
                references[block as usize] += 1;
            }
            prop_assert_eq!(pool.references(), references.clone());
            let counts = pool.counts();
            prop_assert_eq!(counts.owned, references.iter().filter(|&&count| count > 0).count());
            prop_assert_eq!(counts.free + counts.owned + counts.cached, num_blocks);
        }
        drop(held);
        prop_assert_eq!(pool.counts().owned, 0);
        // What is held makes room, too.
        let mut all = BlockTable::from_prefix(&pool, 0, &[]);
        prop_assert!(all.grow(num_blocks * block_size));
    }
}
