//! The threads of the tiers below the model's memory. One reads and one writes, so that the engine's thread never waits for a disk.

use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::locks::lock;
use super::pool::spawn;
use super::tier_folder::TierFolder;
use crate::error::Result;
use crate::panics::contain;
use crate::session::TenantName;
use crate::tier::{Below, Digest, Files, Key, Kind, Payload, Store, StoreLimits};

/// Bytes that may wait to be written. Contents beyond that are dropped and recomputed when needed.
const MAX_QUEUED: usize = 256 << 20;
/// Maximum number of bytes that are copied during one step.
const COPIED_AT_ONCE: usize = 16 << 20;
/// The version of a content's layout. It changes with the layout of a block or a state.
const LAYOUT: &[u8] = b"1";

/// What lies below the model's memory.
#[derive(Debug, Clone)]
pub struct TierConfig {
    /// Sizes of the tiers in bytes.
    pub limits: StoreLimits,
    /// The folder of the disk tier, and the flag that named it.
    pub disk: Option<(PathBuf, String)>,
    /// Everything that decides what tokens mean and how numbers are stored.
    pub fingerprint: Vec<u8>,
    /// Each tenant's number and name.
    pub tenants: Vec<(u32, TenantName)>,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Bytes of a state; 0 if the model has none.
    pub state_bytes: usize,
}

impl TierConfig {
    /// What each tenant's keys begin with.
    pub(super) fn roots(&self, block_size: usize, shared: bool) -> HashMap<u32, Digest> {
        let version = env!("CARGO_PKG_VERSION").as_bytes();
        let sizes = [block_size, self.block_bytes, self.state_bytes].map(usize::to_le_bytes);
        let root = |tenant: &[u8]| {
            let model = &self.fingerprint;
            Digest::root(&[LAYOUT, version, model, sizes.as_flattened(), tenant])
        };
        if shared {
            return HashMap::from([(0, root(b"shared"))]);
        }
        let tenants = self.tenants.iter();
        tenants
            .map(|&(number, name)| (number, root(&name)))
            .collect()
    }

    /// Number of contents of ended sequences that are copied during one step.
    pub(super) const fn saves_at_once(&self) -> usize {
        let each = self.block_bytes + self.state_bytes;
        match COPIED_AT_ONCE.checked_div(each) {
            Some(count) => count,
            None => 1,
        }
    }

    /// Opens the tiers. Blocks on the disk.
    ///
    /// # Errors
    /// Those of [`TierFolder::open`].
    pub(super) fn open(&self) -> Result<Store> {
        let files = match &self.disk {
            None => None,
            Some((folder, flag)) => {
                let files: Box<dyn Files> = Box::new(TierFolder::open(folder, flag)?);
                Some(files)
            }
        };
        Ok(Store::open(self.limits, files))
    }
}

/// Called when a read has finished, or writes are possible again.
pub(super) type Nudge = Arc<dyn Fn() + Send + Sync>;

/// Finished reads, each with its ticket.
type Read = Arc<Mutex<Vec<(u64, Vec<Payload>)>>>;

/// The tiers as the engine's thread uses them.
pub(super) struct Tiers {
    store: Arc<Store>,
    reads: Sender<(u64, Vec<Key>)>,
    writes: Sender<(Key, Payload)>,
    done: Read,
    queued: Arc<AtomicUsize>,
}

impl Debug for Tiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tiers")
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}

impl Tiers {
    /// Starts the threads. They end once the tiers are dropped and everything is written.
    pub(super) fn start(
        store: &Arc<Store>,
        (block_bytes, state_bytes): (usize, usize),
        nudge: &Nudge,
    ) -> Result<(Self, Vec<JoinHandle<()>>)> {
        let (reads, to_read) = channel();
        let (writes, to_write) = channel();
        let tiers = Self {
            store: Arc::clone(store),
            reads,
            writes,
            done: Read::default(),
            queued: Arc::default(),
        };
        let reader = Reader {
            store: Arc::clone(store),
            done: Arc::clone(&tiers.done),
            nudge: Arc::clone(nudge),
            block_bytes,
            state_bytes,
        };
        let writer = Writer {
            store: Arc::clone(store),
            queued: Arc::clone(&tiers.queued),
            nudge: Arc::clone(nudge),
        };
        let threads = vec![
            spawn("lmserve-tier-read", move || reader.run(&to_read))?,
            spawn("lmserve-tier-write", move || writer.run(&to_write))?,
        ];
        Ok((tiers, threads))
    }

    fn write_later(&self, key: Key, payload: Payload) {
        let bytes = payload.len();
        if self.queued.load(Ordering::Acquire) + bytes > MAX_QUEUED {
            return self.store.count_skipped();
        }
        self.queued.fetch_add(bytes, Ordering::AcqRel);
        // The thread ends only with the engine.
        drop(self.writes.send((key, payload)));
    }
}

impl Below for Tiers {
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
        self.queued.load(Ordering::Acquire) > MAX_QUEUED / 2
    }

    fn fetch(&mut self, ticket: u64, keys: Vec<Key>) {
        drop(self.reads.send((ticket, keys)));
    }

    fn fetched(&mut self) -> Vec<(u64, Vec<Payload>)> {
        std::mem::take(&mut *lock(&self.done))
    }

    fn save(&mut self, key: Key, payload: Payload, evicted: bool) {
        for (key, payload) in self.store.keep(key, payload, evicted) {
            self.write_later(key, payload);
        }
    }
}

struct Reader {
    store: Arc<Store>,
    done: Read,
    nudge: Nudge,
    block_bytes: usize,
    state_bytes: usize,
}

impl Reader {
    fn run(&self, jobs: &Receiver<(u64, Vec<Key>)>) {
        while let Ok((ticket, keys)) = jobs.recv() {
            // Somebody waits for this ticket, even if the read panics.
            let read = contain("a read of a tier", || {
                keys.iter().map_while(|key| self.read(key)).collect()
            });
            lock(&self.done).push((ticket, read.unwrap_or_default()));
            (self.nudge)();
        }
    }

    /// Reads a content, if it has this model's size.
    fn read(&self, key: &Key) -> Option<Payload> {
        let payload = self.store.read(key)?;
        let whole = match key.kind {
            Kind::Block => payload.len() == self.block_bytes,
            Kind::State => [0, self.block_bytes]
                .iter()
                .any(|tail| payload.len() == self.state_bytes + tail),
        };
        if !whole {
            self.store.forget(key);
            return None;
        }
        Some(payload)
    }
}

struct Writer {
    store: Arc<Store>,
    queued: Arc<AtomicUsize>,
    nudge: Nudge,
}

impl Writer {
    fn run(&self, jobs: &Receiver<(Key, Payload)>) {
        while let Ok((key, payload)) = jobs.recv() {
            let bytes = payload.len();
            drop(contain("a write to a tier", || {
                self.store.write(&key, &payload);
            }));
            let before = self.queued.fetch_sub(bytes, Ordering::AcqRel);
            if before > MAX_QUEUED / 2 && before - bytes <= MAX_QUEUED / 2 {
                (self.nudge)();
            }
        }
    }
}
