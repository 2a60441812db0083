//! The folder of a session log: one server's at a time.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::session::LogStorage;

const LOG: &str = "sessions.log";
const NEW_LOG: &str = "sessions.log.new";
const LOCK: &str = "lock";
/// Bytes of a new log that may be on their way to the disk, so that its end has not to wait for all of it.
const UNSYNCED_BYTES: u64 = 32 << 20;

/// A log on disk. Nobody but its owner may read what was said.
#[derive(Debug)]
pub struct LogFile {
    folder: PathBuf,
    directory: File,
    log: File,
    new: Option<File>,
    unsynced: u64,
    /// Locked for as long as it is open.
    _lock: File,
}

impl LogFile {
    /// Opens the log in `folder`, which is made where there is none.
    ///
    /// # Errors
    /// `session_dir_in_use` (400) while another server has it; `session_dir_unusable` (400) where it cannot be made or opened.
    pub fn open(folder: &Path) -> Result<Self> {
        let unusable = |e: io::Error| {
            let message = format!("--session-dir {} cannot be used: {e}", folder.display());
            Error::new(Kind::Invalid, "session_dir_unusable", message)
        };
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(folder).map_err(unusable)?;
        let lock = lock(folder).map_err(unusable)?.ok_or_else(|| {
            let message = format!(
                "--session-dir {} belongs to another server that runs; each needs one of its own",
                folder.display()
            );
            Error::new(Kind::Invalid, "session_dir_in_use", message)
        })?;
        match fs::remove_file(folder.join(NEW_LOG)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(unusable(e)),
            _ => {}
        }
        let log = appending().open(folder.join(LOG)).map_err(unusable)?;
        let directory = File::open(folder).map_err(unusable)?;
        // The log's own name is to outlive the machine, too.
        directory.sync_all().map_err(unusable)?;
        Ok(Self {
            folder: folder.to_owned(),
            directory,
            log,
            new: None,
            unsynced: 0,
            _lock: lock,
        })
    }

    fn new_file(&mut self) -> io::Result<&mut File> {
        let none = || io::Error::other("no rewrite is under way");
        self.new.as_mut().ok_or_else(none)
    }
}

fn appending() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600);
    options
}

/// The folder's lock file, locked until it is closed; None while another process has it.
fn lock(folder: &Path) -> io::Result<Option<File>> {
    let file = appending().open(folder.join(LOCK))?;
    // SAFETY: the descriptor is open, and flock touches no memory.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(Some(file));
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        return Ok(None);
    }
    Err(error)
}

impl LogStorage for LogFile {
    fn reader(&mut self) -> io::Result<Box<dyn Read + '_>> {
        let file = File::open(self.folder.join(LOG))?;
        Ok(Box::new(BufReader::new(file)))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.log.write_all(bytes)
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.log.set_len(len)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.log.sync_data()
    }

    fn begin_rewrite(&mut self) -> io::Result<()> {
        let file = appending().open(self.folder.join(NEW_LOG))?;
        file.set_len(0)?;
        self.new = Some(file);
        self.unsynced = 0;
        Ok(())
    }

    fn append_rewrite(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.new_file()?.write_all(bytes)?;
        self.unsynced += bytes.len() as u64;
        if self.unsynced > UNSYNCED_BYTES {
            self.unsynced = 0;
            self.new_file()?.sync_data()?;
        }
        Ok(())
    }

    fn finish_rewrite(&mut self) -> io::Result<()> {
        self.new_file()?.sync_all()?;
        fs::rename(self.folder.join(NEW_LOG), self.folder.join(LOG))?;
        if let Some(new) = self.new.take() {
            self.log = new;
        }
        // The new log is in place, whatever the disk says of the folder: what is appended goes there.
        drop(self.directory.sync_all());
        Ok(())
    }
}
