//! The folder of a disk tier. Only one server at a time may have it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::log_file::{lock, make};
use crate::error::{Error, Kind, Result};
use crate::tier::{Files, StoredFile};

/// The suffix of a file while it is written.
const NEW: &str = ".new";

/// Files on disk. Only their owner may read them, because they derive from conversations.
#[derive(Debug)]
pub struct TierFolder {
    folder: PathBuf,
    /// Locked while the folder is open.
    _lock: File,
}

impl TierFolder {
    /// Opens `folder`, and creates it if needed. Errors name `flag`.
    ///
    /// # Errors
    /// `kv_disk_in_use` (400) while another server has it; `kv_disk_unusable` (400) if it cannot be created, locked or written.
    pub fn open(folder: &Path, flag: &str) -> Result<Self> {
        let unusable = |e: io::Error| {
            let message = format!("{flag} {} cannot be used: {e}", folder.display());
            Error::new(Kind::Invalid, "kv_disk_unusable", message)
        };
        make(folder).map_err(unusable)?;
        let lock = lock(folder).map_err(unusable)?.ok_or_else(|| {
            let message = format!(
                "{flag} {} belongs to another server that runs; each needs one of its own",
                folder.display()
            );
            Error::new(Kind::Invalid, "kv_disk_in_use", message)
        })?;
        let opened = Self {
            folder: folder.to_owned(),
            _lock: lock,
        };
        opened.write("probe", &[]).map_err(unusable)?;
        opened.remove("probe").map_err(unusable)?;
        for file in opened.list().map_err(unusable)? {
            if file.name.ends_with(NEW) {
                opened.remove(&file.name).map_err(unusable)?;
            }
        }
        Ok(opened)
    }
}

impl Files for TierFolder {
    fn list(&self) -> io::Result<Vec<StoredFile>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let (Ok(name), metadata) = (entry.file_name().into_string(), entry.metadata()?) else {
                continue;
            };
            if metadata.is_file() {
                let used = metadata.modified()?.duration_since(UNIX_EPOCH);
                files.push(StoredFile {
                    name,
                    bytes: metadata.len(),
                    used: used.map_or(0, |used| used.as_nanos() as u64),
                });
            }
        }
        Ok(files)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut options = OpenOptions::new();
        // The file may be a FIFO, and opening one would block.
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let mut file = options.open(self.folder.join(name))?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, name: &str, parts: &[&[u8]]) -> io::Result<()> {
        let new = self.folder.join(format!("{name}{NEW}"));
        let write = || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&new)?;
            parts.iter().try_for_each(|part| file.write_all(part))?;
            // No fsync: the checksum finds files that a crash of the machine left incomplete.
            fs::rename(&new, self.folder.join(name))
        };
        write().inspect_err(|_| {
            // The rest of the file takes room on a disk that may be full.
            let _ = fs::remove_file(&new);
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.folder.join(name))
    }

    fn touch(&self, name: &str) -> io::Result<()> {
        let file = OpenOptions::new()
            .append(true)
            .open(self.folder.join(name))?;
        file.set_modified(SystemTime::now())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::tier::{Digest, Payload, Store, StoreLimits};

    /// A folder of this test alone, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("lmserve-{name}-{}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn open(scratch: &Scratch) -> Store {
        let files = TierFolder::open(&scratch.0, "--kv-disk").unwrap();
        let limits = StoreLimits {
            disk: 10_000,
            ..StoreLimits::default()
        };
        Store::open(limits, Some(Box::new(files)))
    }

    #[test]
    fn files_outlive_the_server_and_torn_ones_are_misses() {
        let scratch = Scratch::new("tier-folder");
        let key = |at: u32| Digest::root(&[]).block(&[at]).block_key();
        let content = |at: u32| Payload::new(vec![at as u8; 1000]);
        let store = open(&scratch);
        for at in 0..3 {
            store.write(&key(at), &content(at));
        }
        let error = TierFolder::open(&scratch.0, "--kv-disk").unwrap_err();
        assert_eq!(error.code, "kv_disk_in_use");
        drop(store);
        let path = |at| scratch.0.join(key(at).file_name());
        let mode = fs::metadata(path(0)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(
            scratch.0.join(format!("{}{NEW}", key(9).file_name())),
            "torn",
        )
        .unwrap();
        OpenOptions::new()
            .write(true)
            .open(path(1))
            .unwrap()
            .set_len(500)
            .unwrap();
        let store = open(&scratch);
        assert_eq!(store.stats().disk.entries, 3);
        let read = [0, 1, 2].map(|at| store.read(&key(at)));
        assert_eq!(read, [Some(content(0)), None, Some(content(2))]);
        assert!(!path(1).exists());
        assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 3);
    }

    #[test]
    fn the_file_that_was_read_last_goes_last_after_a_restart() {
        let scratch = Scratch::new("tier-order");
        let key = |at: u32| Digest::root(&[]).block(&[at]).block_key();
        let store = open(&scratch);
        for at in 0..9 {
            store.write(&key(at), &Payload::new(vec![0; 1000]));
            let file = File::options()
                .append(true)
                .open(scratch.0.join(key(at).file_name()));
            let written = UNIX_EPOCH + std::time::Duration::from_secs(u64::from(at));
            file.unwrap().set_modified(written).unwrap();
        }
        assert!(store.read(&key(0)).is_some());
        drop(store);
        let store = open(&scratch);
        store.write(&key(9), &Payload::new(vec![0; 1000]));
        let held: Vec<u32> = (0..10).filter(|&at| store.holds(&key(at))).collect();
        assert_eq!(held, [0, 2, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn what_is_no_folder_is_refused_with_its_name() {
        let scratch = Scratch::new("tier-no-folder");
        fs::create_dir(&scratch.0).unwrap();
        let file = scratch.0.join("file");
        fs::write(&file, "").unwrap();
        let error = TierFolder::open(&file, "--kv-disk").unwrap_err();
        assert_eq!((error.kind.status(), error.code), (400, "kv_disk_unusable"));
        assert!(
            error.message.starts_with("--kv-disk /"),
            "{}",
            error.message
        );
    }
}
