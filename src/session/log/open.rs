//! Opens a log: reads what it has, keeps what is damaged beside it, and begins or mends the file.

use std::collections::HashMap;
use std::io;

use super::append::Chain;
use super::fault::LogFault;
use super::replay::{Header, Name, Replay};
use super::{
    Fingerprint, LogOptions, LogStorage, Loss, Restored, SessionLog, TenantTag, scan, tag,
};
use crate::error::{Error, Kind, Result};
use crate::session::state::SessionKey;
use crate::session::store::{SessionStore, StoreLimits};

/// The numbers of tenants whose keys the server does not know (any more) go down from here.
const FIRST_STRANGER: u32 = u32::MAX;

impl<S: LogStorage> SessionLog<S> {
    /// Opens a log, or begins one, and fills a store with its sessions. What is damaged is kept in a file beside it, and the log
    /// is written anew without it.
    ///
    /// # Errors
    /// `session_log_mismatch` (400) for a log of another model; `invalid_session_log` (400) for what is no log, or has lost its
    /// header; `session_log_unreadable` (500) where the file cannot be read, cut or kept.
    pub fn open(
        mut storage: S,
        options: LogOptions,
        limits: StoreLimits,
        now_ms: u64,
    ) -> Result<(Self, SessionStore, Restored)> {
        let mut replay = read(&mut storage)?;
        check_header(replay.header.as_ref(), &options)?;
        let mut restored = describe(&replay);
        let known = options.tenants.iter().map(|(n, name)| (*n, tag(name)));
        let marker = replay.header.as_ref().and_then(|header| header.marker);
        let suspect = storage.is_marked_suspect().map_err(|e| unreadable(&e))?;
        let mut log = Self {
            storage,
            tags: known.collect(),
            marker: marker.unwrap_or(options.marker),
            options,
            chain: Chain::default(),
            len: replay.end - (replay.torn.end - replay.torn.start),
            synced: 0,
            rewrite: None,
            fault: suspect.then(LogFault::left_behind),
            suspect,
        };
        if replay.header.is_none() {
            log.begin().map_err(|e| unreadable(&e))?;
        } else {
            restored.kept = log.keep(&replay).map_err(|e| unreadable(&e))?;
        }
        let numbers = log.number_tenants(&replay);
        for (loss, missing) in restored.losses.iter_mut().zip(replay.losses()) {
            let number = numbers[&missing.name.0];
            loss.tenant = Some(number).filter(|n| log.options.tenants.iter().any(|(k, _)| k == n));
        }
        let store = log.fill(&mut replay, &numbers, limits, now_ms);
        (restored.sessions, restored.tokens) = (store.len(), store.tokens());
        let old_version = replay.header.is_some() && marker.is_none();
        if old_version || replay.is_damaged() || suspect {
            let next = |last, limit| store.states_after(last, limit);
            let rewritten = log.rewrite_all(next, || store.tombstones());
            // What is damaged may stay where it is; the old version's records go with none of this one's.
            if let Err(e) = rewritten.as_ref()
                && old_version
            {
                return Err(unreadable(e));
            }
        }
        if !log.suspect {
            log.sync()?;
        }
        Ok((log, store, restored))
    }

    /// Says what a log has, and changes nothing.
    ///
    /// # Errors
    /// `invalid_session_log` (400) for what is no log, or has lost its header; `session_log_unreadable` (500).
    pub fn check(storage: &mut S) -> Result<Restored> {
        let mut replay = read(storage)?;
        let mut restored = describe(&replay);
        let (sessions, _) = replay.take_sessions();
        restored.sessions = sessions.len();
        restored.turns = sessions.iter().map(|(_, _, s)| s.turns.len()).sum();
        restored.tokens = sessions.iter().map(|(_, _, s)| s.tokens.len()).sum();
        Ok(restored)
    }

    fn begin(&mut self) -> io::Result<()> {
        let head = self.head();
        self.storage.truncate(0)?;
        self.storage.append(&head)?;
        self.len = head.len() as u64;
        Ok(())
    }

    /// Keeps what is no whole record in a file of its own, and cuts off an end that was written in part.
    fn keep(&mut self, replay: &Replay) -> io::Result<Option<String>> {
        let torn = Some(replay.torn.clone()).filter(|torn| !torn.is_empty());
        let parts: Vec<_> = replay.damaged.iter().cloned().chain(torn.clone()).collect();
        if parts.is_empty() {
            return Ok(None);
        }
        let kept = self.storage.keep(&parts)?;
        if let Some(torn) = torn {
            self.storage.truncate(torn.start)?;
        }
        Ok(Some(kept))
    }

    fn number_tenants(&mut self, replay: &Replay) -> HashMap<TenantTag, u32> {
        let known = self.tags.iter();
        let mut numbers: HashMap<TenantTag, u32> = known.map(|(&n, &tag)| (tag, n)).collect();
        let mut stranger = FIRST_STRANGER;
        for tag in replay.tenants() {
            numbers.entry(tag).or_insert_with(|| {
                let number = stranger;
                self.tags.insert(number, tag);
                stranger -= 1;
                number
            });
        }
        numbers
    }

    fn fill(
        &mut self,
        replay: &mut Replay,
        numbers: &HashMap<TenantTag, u32>,
        limits: StoreLimits,
        now_ms: u64,
    ) -> SessionStore {
        let key = |(tenant, id): Name| SessionKey::new(numbers[&tenant], id);
        let mut store = SessionStore::new(limits);
        store.note_evictions();
        let (sessions, gone) = replay.take_sessions();
        for (name, why) in gone {
            store.restore_gone(key(name), why);
        }
        self.chain.seq = replay.seq;
        // The first version did not say in which order sessions were used, but when.
        let mut sessions: Vec<_> = sessions
            .into_iter()
            .map(|(n, s, t)| (key(n), s, t))
            .collect();
        sessions.sort_by_key(|(_, _, state)| (state.used_order, state.used_ms));
        for (key, seq, state) in sessions {
            self.chain.last.insert(key.clone(), seq);
            store.restore(key, state, now_ms);
        }
        store.enforce(now_ms);
        store
    }
}

fn read<S: LogStorage>(storage: &mut S) -> Result<Replay> {
    let read = storage.reader().and_then(scan::read);
    read.map_err(|e| match e.kind() {
        io::ErrorKind::InvalidData => invalid(&e),
        _ => unreadable(&e),
    })
}

fn describe(replay: &Replay) -> Restored {
    let losses = replay.losses().into_iter().map(|missing| Loss {
        tenant: None,
        id: missing.name.1.clone(),
        kept_turns: missing.kept_turns as usize,
        last_turn: missing.last_turn as usize,
    });
    let header = replay.header.as_ref();
    Restored {
        version: header.map_or(2, |header| if header.marker.is_some() { 2 } else { 1 }),
        bytes: replay.good,
        torn: replay.torn.end - replay.torn.start,
        damaged: replay
            .damaged
            .iter()
            .map(|part| part.end - part.start)
            .sum(),
        losses: losses.collect(),
        unnamed: replay.unnamed(),
        model: header.map(|header| (header.fingerprint, header.model.clone())),
        turns: replay.turns(),
        ..Restored::default()
    }
}

fn check_header(header: Option<&Header>, options: &LogOptions) -> Result<()> {
    let Some(header) = header.filter(|header| header.fingerprint != options.fingerprint) else {
        return Ok(());
    };
    let message = format!(
        "the session log belongs to another model, tokenizer or chat template: it was written with {} ({}), and {} ({}) is \
         served; give another --session-dir, or move the log away",
        header.model,
        short(&header.fingerprint),
        options.model,
        short(&options.fingerprint)
    );
    Err(Error::new(Kind::Invalid, "session_log_mismatch", message))
}

fn short(fingerprint: &Fingerprint) -> String {
    let [a, b, c, d, ..] = *fingerprint;
    format!("{:08x}", u32::from_be_bytes([a, b, c, d]))
}

fn invalid(why: &dyn std::fmt::Display) -> Error {
    let message = format!("the session log cannot be used: {why}; give another --session-dir");
    Error::new(Kind::Invalid, "invalid_session_log", message)
}

fn unreadable(why: &dyn std::fmt::Display) -> Error {
    let message = format!("the session log cannot be read: {why}");
    Error::new(Kind::Internal, "session_log_unreadable", message)
}
