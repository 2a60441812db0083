//! Host memory, and a folder below it.

use std::fmt::{self, Debug};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Payload;
use super::entry::{HEAD_BYTES, head, payload};
use super::files::Files;
use super::key::{Key, Kind};
use super::shelf::Shelf;
use super::stats::StoreStats;

/// Bytes that the tiers hold; 0: none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreLimits {
    /// Blocks in host memory.
    pub host_blocks: u64,
    /// States in host memory.
    pub host_states: u64,
    /// Both on disk.
    pub disk: u64,
}

#[derive(Debug)]
struct Shelves {
    blocks: Shelf<Payload>,
    states: Shelf<Payload>,
    disk: Shelf<()>,
    stats: StoreStats,
}

impl Shelves {
    const fn host(&mut self, kind: Kind) -> &mut Shelf<Payload> {
        match kind {
            Kind::Block => &mut self.blocks,
            Kind::State => &mut self.states,
        }
    }
}

/// The tiers below the model's memory. What reads or writes files waits for the disk, and says so; all else returns at once.
pub struct Store {
    files: Option<Box<dyn Files>>,
    shelves: Mutex<Shelves>,
}

impl Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Store {
    /// The tiers, with what `files` hold of an earlier run. Waits for the disk.
    pub fn open(limits: StoreLimits, files: Option<Box<dyn Files>>) -> Self {
        let mut shelves = Shelves {
            blocks: Shelf::new(limits.host_blocks),
            states: Shelf::new(limits.host_states),
            disk: Shelf::new(limits.disk),
            stats: StoreStats::default(),
        };
        let listed = files.as_ref().map(|files| files.list()).transpose();
        let mut listed = listed.unwrap_or_else(|_| {
            shelves.stats.disk.failures += 1;
            None
        });
        if let Some(listed) = &mut listed {
            listed.sort_by_key(|file| file.used);
        }
        let mut given_up = Vec::new();
        for file in listed.into_iter().flatten() {
            let Some(key) = Key::of_file(&file.name) else {
                continue;
            };
            if shelves.disk.fits(file.bytes) {
                given_up.extend(shelves.disk.insert(key, (), file.bytes));
            } else {
                given_up.push((key, ()));
            }
        }
        let store = Self {
            files,
            shelves: Mutex::new(shelves),
        };
        store.remove_files(&given_up);
        store
    }

    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        // Every critical section leaves the shelves whole before anything that could panic.
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a disk.
    pub fn has_disk(&self) -> bool {
        self.files.is_some()
    }

    /// Whether contents of a kind go to host memory.
    pub fn has_host(&self, kind: Kind) -> bool {
        self.shelves().host(kind).fits(1)
    }

    /// What the tiers hold, and counters.
    pub fn stats(&self) -> StoreStats {
        let shelves = self.shelves();
        let mut stats = shelves.stats;
        stats.host.entries = (shelves.blocks.len() + shelves.states.len()) as u64;
        stats.host.bytes = shelves.blocks.bytes() + shelves.states.bytes();
        stats.disk.entries = shelves.disk.len() as u64;
        stats.disk.bytes = shelves.disk.bytes();
        stats
    }

    /// Whether some tier holds a content, as far as anybody knows before it is read.
    pub fn holds(&self, key: &Key) -> bool {
        let mut shelves = self.shelves();
        shelves.host(key.kind).contains(key) || shelves.disk.contains(key)
    }

    /// Whether the disk holds a content, which is then the one that was used last.
    pub fn use_on_disk(&self, key: &Key) -> bool {
        self.shelves().disk.get(key).is_some()
    }

    /// A content, if it lies in host memory.
    pub fn read_host(&self, key: &Key) -> Option<Payload> {
        let mut shelves = self.shelves();
        let payload = shelves.host(key.kind).get(key).cloned()?;
        shelves.stats.host.hits += 1;
        shelves.stats.host.read_bytes += payload.len() as u64;
        Some(payload)
    }

    /// Takes a content into host memory. Returns what that gave up for it, or the content itself where it does not fit: it goes to
    /// the disk, if there is one.
    pub fn put_host(&self, key: Key, payload: Payload) -> Vec<(Key, Payload)> {
        let mut shelves = self.shelves();
        let bytes = payload.len() as u64;
        if !shelves.host(key.kind).fits(bytes) {
            return vec![(key, payload)];
        }
        let given_up = shelves.host(key.kind).insert(key, payload, bytes);
        shelves.stats.host.written_bytes += bytes;
        shelves.stats.host.evictions += given_up.len() as u64;
        given_up
    }

    /// Whether a content that the model's memory has and keeps is to be written to the disk. One that is there counts as used.
    pub fn wants(&self, key: &Key) -> bool {
        self.has_disk() && !self.use_on_disk(key)
    }

    /// Whether a content that the model's memory gives up is to be kept.
    pub fn wants_evicted(&self, key: &Key) -> bool {
        (self.has_disk() || self.has_host(key.kind)) && !self.holds(key)
    }

    /// Takes a content that was copied out of the model's memory; one that was `evicted` goes to host memory first. Returns what is
    /// to be written to the disk.
    pub fn keep(&self, key: Key, payload: Payload, evicted: bool) -> Vec<(Key, Payload)> {
        let mut written = if evicted {
            self.put_host(key, payload)
        } else {
            vec![(key, payload)]
        };
        written.retain(|(key, _)| self.wants(key));
        written
    }

    /// Counts a content that nobody had the time to write.
    pub fn count_skipped(&self) {
        self.shelves().stats.disk.skipped += 1;
    }

    /// A content from wherever it lies. What turns out to be damaged is removed. Waits for the disk.
    pub fn read(&self, key: &Key) -> Option<Payload> {
        if let Some(payload) = self.read_host(key) {
            return Some(payload);
        }
        if !self.use_on_disk(key) {
            return None;
        }
        let files = self.files.as_ref()?;
        let name = key.file_name();
        let read = files.read(&name).ok();
        let Some(content) = read.and_then(|file| payload(key, file)) else {
            self.shelves().stats.disk.failures += 1;
            self.forget(key);
            return None;
        };
        // What cannot be touched is only taken for older than it is after a restart.
        let touched = files.touch(&name);
        let mut shelves = self.shelves();
        shelves.stats.disk.failures += u64::from(touched.is_err());
        shelves.stats.disk.hits += 1;
        shelves.stats.disk.read_bytes += content.len() as u64;
        Some(Payload::new(content))
    }

    /// Writes a content to the disk, unless it is there. Waits for the disk.
    pub fn write(&self, key: &Key, payload: &Payload) {
        let Some(files) = &self.files else {
            return;
        };
        let bytes = (HEAD_BYTES + payload.len()) as u64;
        let given_up = {
            let mut shelves = self.shelves();
            if !shelves.disk.fits(bytes) || shelves.disk.get(key).is_some() {
                return;
            }
            shelves.disk.make_room(bytes)
        };
        self.shelves().stats.disk.evictions += given_up.len() as u64;
        self.remove_files(&given_up);
        let written = files.write(&key.file_name(), &[&head(key, payload), payload]);
        let mut shelves = self.shelves();
        if written.is_ok() {
            shelves.disk.insert(*key, (), bytes);
            shelves.stats.disk.written_bytes += bytes;
        } else {
            shelves.stats.disk.failures += 1;
        }
    }

    /// Takes a damaged content out of all tiers. Waits for the disk.
    pub fn forget(&self, key: &Key) {
        let mut shelves = self.shelves();
        shelves.host(key.kind).remove(key);
        let on_disk = shelves.disk.remove(key).is_some();
        drop(shelves);
        if on_disk {
            self.remove_files(&[(*key, ())]);
        }
    }

    fn remove_files(&self, keys: &[(Key, ())]) {
        let Some(files) = &self.files else {
            return;
        };
        let failed = keys
            .iter()
            .filter(|(key, ())| files.remove(&key.file_name()).is_err());
        let failed = failed.count() as u64;
        self.shelves().stats.disk.failures += failed;
    }
}
