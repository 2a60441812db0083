//! Tiers on the virtual clock: the real store over a disk that is slow, full, gone or lies, and what outlives a server.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::random::Random;
use crate::tier::{Below, Digest, Files, Key, Payload, Store, StoreLimits, StoredFile};

/// Most plans until a content is read, or written.
const SLOW: usize = 40;

/// What outlives a server.
#[derive(Debug, Default)]
pub(super) struct Drive {
    pub(super) files: BTreeMap<String, (Vec<u8>, u64)>,
    uses: u64,
    /// Bytes that fit.
    pub(super) room: usize,
    /// Nothing works.
    pub(super) gone: bool,
}

/// The drive as a server's store uses it.
#[derive(Debug, Clone, Default)]
pub(super) struct TierDrive(Arc<Mutex<Drive>>);

impl TierDrive {
    pub(super) fn drive(&self) -> MutexGuard<'_, Drive> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn working(&self) -> io::Result<MutexGuard<'_, Drive>> {
        let drive = self.drive();
        if drive.gone {
            return Err(io::Error::other("the device does not answer"));
        }
        Ok(drive)
    }
}

impl Files for TierDrive {
    fn list(&self) -> io::Result<Vec<StoredFile>> {
        let drive = self.working()?;
        let files = drive.files.iter();
        let file = |(name, (bytes, used)): (&String, &(Vec<u8>, u64))| StoredFile {
            name: name.clone(),
            bytes: bytes.len() as u64,
            used: *used,
        };
        Ok(files.map(file).collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let drive = self.working()?;
        let file = drive.files.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(file.0.clone())
    }

    fn write(&self, name: &str, parts: &[&[u8]]) -> io::Result<()> {
        let mut drive = self.working()?;
        let bytes = parts.concat();
        let held: usize = drive.files.values().map(|(file, _)| file.len()).sum();
        if held + bytes.len() > drive.room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        drive.uses += 1;
        let uses = drive.uses;
        drive.files.insert(name.to_owned(), (bytes, uses));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut drive = self.working()?;
        drive.files.remove(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(())
    }

    fn touch(&self, name: &str) -> io::Result<()> {
        let mut drive = self.working()?;
        drive.uses += 1;
        let uses = drive.uses;
        drive.files.get_mut(name).ok_or(io::ErrorKind::NotFound)?.1 = uses;
        Ok(())
    }
}

/// The tiers of one server. Each plan is a moment.
#[derive(Debug)]
struct SimTiers {
    store: Arc<Store>,
    random: Random,
    reads: VecDeque<(u64, Vec<Key>, usize)>,
    /// What waits to be written is gone with the server.
    writes: VecDeque<(Key, Payload, usize)>,
}

impl Below for SimTiers {
    fn holds(&self, key: &Key) -> bool {
        self.store.holds(key)
    }

    fn wants(&self, key: &Key) -> bool {
        self.store.wants(key)
    }

    fn wants_evicted(&self, key: &Key) -> bool {
        self.store.wants_evicted(key)
    }

    fn is_busy(&self) -> bool {
        self.writes.len() > 30
    }

    fn fetch(&mut self, ticket: u64, keys: Vec<Key>) {
        let moments = self.random.range(0, SLOW);
        self.reads.push_back((ticket, keys, moments));
    }

    fn fetched(&mut self) -> Vec<(u64, Vec<Payload>)> {
        let mut done = Vec::new();
        for (ticket, keys, left) in &mut self.reads {
            if *left == 0 {
                let read = keys.iter().map_while(|key| self.store.read(key));
                done.push((*ticket, read.collect()));
            }
            *left = left.wrapping_sub(1);
        }
        self.reads.retain(|&(.., left)| left <= SLOW);
        if let Some((key, payload, left)) = self.writes.front_mut() {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.store.write(key, payload);
                self.writes.pop_front();
            }
        }
        done
    }

    fn save(&mut self, key: Key, payload: Payload, evicted: bool) {
        let moments = self.random.range(0, 3);
        let written = self.store.keep(key, payload, evicted).into_iter();
        self.writes
            .extend(written.map(|(key, payload)| (key, payload, moments)));
    }
}

/// The tiers of a server that starts, on a drive that may have something.
pub(super) fn start(
    limits: StoreLimits,
    drive: &TierDrive,
    random: &mut Random,
) -> (Arc<Store>, Box<dyn Below>) {
    let files: Option<Box<dyn Files>> = (limits.disk > 0).then(|| Box::new(drive.clone()) as _);
    let store = Arc::new(Store::open(limits, files));
    let tiers = SimTiers {
        store: Arc::clone(&store),
        random: Random::new(random.next()),
        reads: VecDeque::new(),
        writes: VecDeque::new(),
    };
    (store, Box::new(tiers))
}

/// What the names of a tenant's contents begin with.
pub(super) fn root(tenant: u32) -> Digest {
    Digest::root(&[&tenant.to_le_bytes()])
}
