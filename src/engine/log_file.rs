//! The folder of a session log. Only one server at a time may have it.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::session::LogStorage;

pub(super) const LOG: &str = "sessions.log";
const NEW_LOG: &str = "sessions.log.new";
const KEPT: &str = "sessions.log.damaged";
const SUSPECT: &str = "sessions.log.suspect";
const LOCK: &str = "lock";
/// Bytes of a new log that may wait for their fsync. With fewer, the end of a rewrite waits less.
const UNSYNCED_BYTES: u64 = 32 << 20;
/// Bytes of a damaged log that are copied at once.
const COPY_BYTES: usize = 1 << 20;

/// How long to wait for the lock. A process that was killed holds its lock until the kernel has cleaned up, and a forked child
/// holds its parent's lock until it runs its program.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// A log on disk. Only its owner may read it, because it contains conversations.
#[derive(Debug)]
pub struct LogFile {
    folder: PathBuf,
    directory: File,
    log: File,
    new: Option<File>,
    unsynced: u64,
    /// Locked while the log is open.
    lock: File,
}

/// What is at the path where a file was opened.
enum Place {
    Ours,
    Gone,
    Other(&'static str),
}

impl LogFile {
    /// Opens the log in `folder`, and creates the folder if needed.
    ///
    /// # Errors
    /// `session_dir_in_use` (400) while another server has it; `session_dir_unusable` (400) if it cannot be created or opened.
    pub fn open(folder: &Path) -> Result<Self> {
        let unusable = |e: io::Error| {
            let message = format!("--session-dir {} cannot be used: {e}", folder.display());
            Error::new(Kind::Invalid, "session_dir_unusable", message)
        };
        make(folder).map_err(unusable)?;
        let lock = lock(folder)
            .map_err(unusable)?
            .ok_or_else(|| in_use(folder))?;
        match fs::remove_file(folder.join(NEW_LOG)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(unusable(e)),
            _ => {}
        }
        let log = open_regular(&folder.join(LOG)).map_err(unusable)?;
        let directory = File::open(folder).map_err(unusable)?;
        // Without this fsync, a crash of the machine may lose the log's name.
        directory.sync_all().map_err(unusable)?;
        Ok(Self {
            folder: folder.to_owned(),
            directory,
            log,
            new: None,
            unsynced: 0,
            lock,
        })
    }

    fn new_file(&mut self) -> io::Result<&mut File> {
        let none = || io::Error::other("no rewrite is under way");
        self.new.as_mut().ok_or_else(none)
    }

    /// Fails if the path no longer leads to the open log: a file without a name is lost when the process ends.
    fn check_place(&self) -> io::Result<()> {
        let path = self.folder.join(LOG);
        match place(&path, &self.log)? {
            Place::Ours => Ok(()),
            Place::Gone => Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{} was deleted or moved away", path.display()),
            )),
            Place::Other(what) => Err(other_in_place(&path, what)),
        }
    }

    /// Creates and locks the folder again if it is gone.
    fn make_place(&mut self) -> io::Result<()> {
        make(&self.folder)?;
        if !matches!(place(&self.folder.join(LOCK), &self.lock)?, Place::Ours) {
            let taken = || io::Error::other(in_use(&self.folder).message);
            self.lock = lock(&self.folder)?.ok_or_else(taken)?;
        }
        self.directory = File::open(&self.folder)?;
        Ok(())
    }

    fn copy(
        &self,
        parts: &[Range<u64>],
        mut take: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let log = File::open(self.folder.join(LOG))?;
        let mut buffer = vec![0; COPY_BYTES];
        for part in parts {
            let mut at = part.start;
            while at < part.end {
                let most = buffer.len().min((part.end - at) as usize);
                log.read_exact_at(&mut buffer[..most], at)?;
                take(&buffer[..most])?;
                at += most as u64;
            }
        }
        Ok(())
    }
}

fn in_use(folder: &Path) -> Error {
    let message = format!(
        "--session-dir {} is in use by another running server; each server needs its own folder",
        folder.display()
    );
    Error::new(Kind::Invalid, "session_dir_in_use", message)
}

fn other_in_place(path: &Path, what: &str) -> io::Error {
    let message = format!("{} is {what}; move it away", path.display());
    io::Error::other(message)
}

pub(super) fn make(folder: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(folder)
}

fn place(path: &Path, file: &File) -> io::Result<Place> {
    let there = match fs::metadata(path) {
        Ok(there) => there,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Place::Gone),
        Err(e) => return Err(e),
    };
    let ours = file.metadata()?;
    Ok(if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) {
        Place::Ours
    } else {
        Place::Other(irregular(&there).unwrap_or("another file now"))
    })
}

/// What kind of file this is, if not a regular one.
fn irregular(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_file() {
        None
    } else if kind.is_dir() {
        Some("a folder, not a file")
    } else if kind.is_fifo() {
        Some("a FIFO, not a file")
    } else if kind.is_socket() {
        Some("a socket, not a file")
    } else {
        Some("a device, not a file")
    }
}

/// Opens a regular file to append to it, and creates it if needed. Never blocks on a FIFO.
fn open_regular(path: &Path) -> io::Result<File> {
    let check = |metadata: &Metadata| match irregular(metadata) {
        Some(what) => Err(other_in_place(path, what)),
        None => Ok(()),
    };
    match fs::metadata(path) {
        Ok(metadata) => check(&metadata)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600);
    let file = options.custom_flags(libc::O_NONBLOCK).open(path)?;
    check(&file.metadata()?)?;
    Ok(file)
}

/// The folder's lock file, locked until it is closed. None if another process still has the lock after [`LOCK_PATIENCE`].
pub(super) fn lock(folder: &Path) -> io::Result<Option<File>> {
    let file = open_regular(&folder.join(LOCK))?;
    let begin = Instant::now();
    loop {
        // SAFETY: the descriptor is open, and flock touches no memory.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(Some(file));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(error);
        }
        if begin.elapsed() >= LOCK_PATIENCE {
            return Ok(None);
        }
        std::thread::sleep(LOCK_PAUSE);
    }
}

impl LogStorage for LogFile {
    fn reader(&mut self) -> io::Result<Box<dyn Read + '_>> {
        let file = File::open(self.folder.join(LOG))?;
        Ok(Box::new(BufReader::new(file)))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.check_place()?;
        self.log.write_all(bytes)
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.log.set_len(len)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.check_place()?;
        self.log.sync_data()
    }

    fn keep(&mut self, parts: &[Range<u64>]) -> io::Result<String> {
        let mut checksum = crc32fast::Hasher::new();
        self.copy(parts, |bytes| {
            checksum.update(bytes);
            Ok(())
        })?;
        // A server that died during this step may have kept it under this name already.
        let name = format!("{KEPT}-{:08x}", checksum.finalize());
        let path = self.folder.join(&name);
        if !path.exists() {
            let new_path = self.folder.join(format!("{KEPT}.new"));
            let mut new = open_regular(&new_path)?;
            new.set_len(0)?;
            self.copy(parts, |bytes| new.write_all(bytes))?;
            new.sync_all()?;
            fs::rename(new_path, &path)?;
        }
        self.directory.sync_all()?;
        Ok(name)
    }

    fn begin_rewrite(&mut self) -> io::Result<()> {
        let path = self.folder.join(LOG);
        match place(&path, &self.log)? {
            Place::Ours => {}
            Place::Gone => self.make_place()?,
            Place::Other(what) => return Err(other_in_place(&path, what)),
        }
        let file = open_regular(&self.folder.join(NEW_LOG))?;
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
        Ok(())
    }

    fn sync_place(&mut self) -> io::Result<()> {
        self.directory.sync_all()
    }

    fn mark_suspect(&mut self, suspect: bool) -> io::Result<()> {
        let path = self.folder.join(SUSPECT);
        if suspect {
            return open_regular(&path).map(drop);
        }
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    fn is_marked_suspect(&mut self) -> io::Result<bool> {
        self.folder.join(SUSPECT).try_exists()
    }
}
