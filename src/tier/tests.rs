//! The store over a disk that does everything that disks do.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use super::*;

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, (Vec<u8>, u64)>,
    uses: u64,
    /// Bytes that fit; absent: all.
    room: Option<usize>,
    broken: bool,
}

/// A disk in memory, and the hand that spoils it.
#[derive(Debug, Default, Clone)]
struct FakeDisk(Arc<Mutex<State>>);

impl FakeDisk {
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.0.lock().unwrap())
    }

    fn working<T>(&self, work: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        self.with(|state| {
            if state.broken {
                return Err(io::Error::other("the disk is gone"));
            }
            work(state)
        })
    }
}

impl Files for FakeDisk {
    fn list(&self) -> io::Result<Vec<StoredFile>> {
        self.working(|state| {
            let files = state.files.iter();
            let file = |(name, (bytes, used)): (&String, &(Vec<u8>, u64))| StoredFile {
                name: name.clone(),
                bytes: bytes.len() as u64,
                used: *used,
            };
            Ok(files.map(file).collect())
        })
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.working(|state| {
            let file = state.files.get(name);
            Ok(file.ok_or(io::ErrorKind::NotFound)?.0.clone())
        })
    }

    fn write(&self, name: &str, parts: &[&[u8]]) -> io::Result<()> {
        self.working(|state| {
            let bytes = parts.concat();
            let held: usize = state.files.values().map(|(file, _)| file.len()).sum();
            if state.room.is_some_and(|room| held + bytes.len() > room) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            state.uses += 1;
            state.files.insert(name.to_owned(), (bytes, state.uses));
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.working(|state| {
            state.files.remove(name).ok_or(io::ErrorKind::NotFound)?;
            Ok(())
        })
    }

    fn touch(&self, name: &str) -> io::Result<()> {
        self.working(|state| {
            state.uses += 1;
            let uses = state.uses;
            state.files.get_mut(name).ok_or(io::ErrorKind::NotFound)?.1 = uses;
            Ok(())
        })
    }
}

const FILE: u64 = 64 + 100;

fn key(at: u32) -> Key {
    Digest::root(&[]).block(&[at]).block_key()
}

fn content(at: u32) -> Payload {
    Arc::new(vec![at as u8; 100])
}

/// A disk of so many contents, and the store over it.
fn on_disk(contents: u64) -> (FakeDisk, Store) {
    let disk = FakeDisk::default();
    let store = reopened(&disk, contents);
    (disk, store)
}

fn reopened(disk: &FakeDisk, contents: u64) -> Store {
    let limits = StoreLimits {
        disk: contents * FILE,
        ..StoreLimits::default()
    };
    Store::open(limits, Some(Box::new(disk.clone())))
}

fn held(store: &Store) -> Vec<u32> {
    (0..10).filter(|&at| store.holds(&key(at))).collect()
}

#[test]
fn what_was_written_is_read_after_a_restart_and_the_oldest_goes_first() {
    let (disk, store) = on_disk(3);
    for at in 0..3 {
        store.write(&key(at), &content(at));
    }
    assert_eq!(store.read(&key(0)), Some(content(0)));
    assert_eq!(store.stats().disk.bytes, 3 * FILE);
    let store = reopened(&disk, 3);
    store.write(&key(3), &content(3));
    assert_eq!(held(&store), [0, 2, 3]);
    assert_eq!(disk.with(|state| state.files.len()), 3);
    for at in [0, 2, 3] {
        assert_eq!(store.read(&key(at)), Some(content(at)));
    }
    assert_eq!(store.read(&key(1)), None);
    let stats = store.stats().disk;
    assert_eq!((stats.hits, stats.read_bytes), (3, 300));
    assert_eq!((stats.evictions, stats.failures), (1, 0));
    // A smaller bound holds for what is there, too.
    assert_eq!(held(&reopened(&disk, 1)).len(), 1);
    assert_eq!(disk.with(|state| state.files.len()), 1);
    assert_eq!(reopened(&disk, 0).stats().disk.entries, 0);
    assert_eq!(disk.with(|state| state.files.len()), 0);
}

#[test]
fn a_damaged_file_is_a_miss_and_is_removed() {
    type Damage = fn(&mut Vec<u8>);
    let damages: [Damage; 4] = [
        |file| file[100] ^= 4,
        |file| file[20] ^= 1,
        |file| file.truncate(80),
        Vec::clear,
    ];
    for damage in damages {
        let (disk, store) = on_disk(3);
        store.write(&key(0), &content(0));
        store.write(&key(1), &content(1));
        let name = key(0).file_name();
        disk.with(|state| damage(&mut state.files.get_mut(&name).unwrap().0));
        assert_eq!(store.read(&key(0)), None);
        assert_eq!(held(&store), [1]);
        assert!(!disk.with(|state| state.files.contains_key(&name)));
        assert_eq!(store.stats().disk.failures, 1);
        // It may be written again.
        store.write(&key(0), &content(0));
        assert_eq!(store.read(&key(0)), Some(content(0)));
    }
}

#[test]
fn anothers_content_under_a_name_is_a_miss() {
    let (disk, store) = on_disk(3);
    store.write(&key(0), &content(0));
    store.write(&key(1), &content(1));
    disk.with(|state| {
        let other = state.files[&key(1).file_name()].clone();
        state.files.insert(key(0).file_name(), other);
    });
    assert_eq!(store.read(&key(0)), None);
    assert_eq!(store.read(&key(1)), Some(content(1)));
}

#[test]
fn a_file_that_somebody_removed_is_a_miss() {
    let (disk, store) = on_disk(3);
    store.write(&key(0), &content(0));
    disk.with(|state| state.files.clear());
    assert!(store.holds(&key(0)));
    assert_eq!(store.read(&key(0)), None);
    assert!(!store.holds(&key(0)));
}

#[test]
fn a_full_disk_takes_nothing_more_and_loses_nothing() {
    let (disk, store) = on_disk(5);
    disk.with(|state| state.room = Some(2 * FILE as usize));
    for at in 0..4 {
        store.write(&key(at), &content(at));
    }
    assert_eq!(held(&store), [0, 1]);
    assert_eq!(store.stats().disk.failures, 2);
    disk.with(|state| state.room = None);
    store.write(&key(2), &content(2));
    assert_eq!(held(&store), [0, 1, 2]);
}

#[test]
fn a_disk_that_is_gone_is_a_miss_for_all() {
    let (disk, store) = on_disk(3);
    store.write(&key(0), &content(0));
    disk.with(|state| state.broken = true);
    assert_eq!(store.read(&key(0)), None);
    store.write(&key(1), &content(1));
    assert!(held(&store).is_empty());
    let store = reopened(&disk, 3);
    assert_eq!((held(&store), store.stats().disk.failures), (vec![], 1));
    disk.with(|state| state.broken = false);
    store.write(&key(2), &content(2));
    assert_eq!(store.read(&key(2)), Some(content(2)));
}

#[test]
fn host_memory_keeps_blocks_and_states_apart_and_says_what_it_gives_up() {
    let limits = StoreLimits {
        host_blocks: 200,
        host_states: 100,
        disk: 0,
    };
    let store = Store::open(limits, None);
    let state = |at: u32| Digest::root(&[]).state_key(&[at]);
    assert!(store.has_host(Kind::Block) && store.has_host(Kind::State) && !store.has_disk());
    assert_eq!(store.put_host(key(0), content(0)), []);
    assert_eq!(store.put_host(key(1), content(1)), []);
    assert_eq!(store.put_host(state(2), content(2)), []);
    assert_eq!(store.read(&key(0)), Some(content(0)));
    assert_eq!(store.put_host(key(3), content(3)), [(key(1), content(1))]);
    assert_eq!(
        store.put_host(state(4), content(4)),
        [(state(2), content(2))]
    );
    let large = Arc::new(vec![0; 101]);
    assert_eq!(
        store.put_host(state(5), Arc::clone(&large)),
        [(state(5), large)]
    );
    assert_eq!(held(&store), [0, 3]);
    assert_eq!(store.read_host(&state(4)), Some(content(4)));
    let stats = store.stats().host;
    assert_eq!((stats.entries, stats.bytes), (3, 300));
    assert_eq!((stats.hits, stats.evictions, stats.failures), (2, 2, 0));
    store.forget(&key(0));
    assert_eq!(held(&store), [3]);
}
