//! A disk in memory. It takes less than it is given, loses what was not synced, forgets what it could not sync, and flips bits.

use std::io::{self, Cursor, Read};
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::random::Random;
use super::report::Faults;
use crate::session::LogStorage;

/// What outlives a server.
#[derive(Debug, Default)]
pub(super) struct Disk {
    log: Vec<u8>,
    /// Leading bytes that outlive a loss of power.
    synced: usize,
    /// What lies behind these bytes was forgotten by an fsync that failed: no later one makes it safe.
    forgotten_from: Option<usize>,
    new: Option<Vec<u8>>,
    /// The log that a rewrite has replaced, and its safe bytes, until the place of the new one is safe.
    old: Option<(Vec<u8>, usize)>,
    /// A server has left word that it could not trust the log.
    suspect: bool,
    /// Times that the log was replaced.
    pub(super) replaced: u64,
    /// The next write fails behind so many bytes.
    pub(super) full_after: Option<usize>,
    /// The next append panics behind so many bytes, and before the last.
    pub(super) panics_after: Option<usize>,
    /// So many fsyncs fail.
    pub(super) failing_syncs: usize,
    /// What went wrong so far.
    pub(super) faults: Faults,
}

impl Disk {
    pub(super) fn log(&self) -> &[u8] {
        &self.log
    }

    /// Nothing goes wrong any more.
    pub(super) fn calm(&mut self) {
        (self.full_after, self.panics_after, self.failing_syncs) = (None, None, 0);
    }

    /// The process died. What it was writing may be there in part.
    pub(super) fn tear(&mut self, random: &mut Random) {
        if random.once_in(2) {
            let garbage = random.range(1, 40);
            let zeros = random.once_in(3);
            let byte = |random: &mut Random| if zeros { 0 } else { random.next() as u8 };
            self.log.extend((0..garbage).map(|_| byte(random)));
            self.faults.torn_ends += 1;
        }
    }

    /// The machine lost its power: the log ends somewhere behind what is safe of it, and where the place of a new one is not safe, it
    /// may be the old one. Returns whether it is that one, and where it ends.
    pub(super) fn lose_power(&mut self, random: &mut Random) -> (bool, usize) {
        self.faults.power_losses += 1;
        // What was left in word only is gone as well.
        self.suspect = false;
        let old = self.old.take().filter(|_| random.once_in(2));
        let comes_back = old.is_some();
        if let Some((log, synced)) = old {
            (self.log, self.synced) = (log, synced);
        }
        self.forgotten_from = None;
        let end = random.range(self.synced, self.log.len());
        self.log.truncate(end);
        (comes_back, end)
    }

    /// Flips a bit of the log.
    pub(super) fn flip(&mut self, bit: usize) {
        self.faults.flipped_bits += 1;
        self.log[bit / 8] ^= 1 << (bit % 8);
    }

    /// Writes to the log, or to the new one.
    fn write(&mut self, to_new: bool, bytes: &[u8]) -> io::Result<()> {
        let none = || io::Error::other("no rewrite is under way");
        let file = if to_new {
            self.new.as_mut().ok_or_else(none)?
        } else {
            &mut self.log
        };
        let Some(room) = self.full_after.take() else {
            file.extend_from_slice(bytes);
            return Ok(());
        };
        file.extend_from_slice(&bytes[..room.min(bytes.len())]);
        self.faults.full_disks += 1;
        Err(io::Error::from(io::ErrorKind::StorageFull))
    }

    fn fsync(&mut self) -> io::Result<()> {
        if self.failing_syncs == 0 {
            return Ok(());
        }
        self.failing_syncs -= 1;
        self.faults.failed_syncs += 1;
        Err(io::Error::other("the device does not answer"))
    }
}

/// The disk as a server's log uses it.
#[derive(Debug, Clone, Default)]
pub(super) struct MemoryFile(Arc<Mutex<Disk>>);

impl MemoryFile {
    pub(super) fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogStorage for MemoryFile {
    fn reader(&mut self) -> io::Result<Box<dyn Read + '_>> {
        let mut disk = self.disk();
        // A server makes the place of its log safe before it reads it.
        (disk.new, disk.old) = (None, None);
        Ok(Box::new(Cursor::new(disk.log.clone())))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.disk();
        if let Some(most) = disk.panics_after.take() {
            let part = most.min(bytes.len().saturating_sub(1));
            disk.log.extend_from_slice(&bytes[..part]);
            disk.faults.log_panics += 1;
            // Without a word from the panic hook.
            resume_unwind(Box::new("a panic while the log was written"));
        }
        disk.write(false, bytes)
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        let mut disk = self.disk();
        let len = len as usize;
        disk.log.truncate(len);
        disk.synced = disk.synced.min(len);
        disk.forgotten_from = disk.forgotten_from.filter(|&from| from < len);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.disk();
        if let Err(e) = disk.fsync() {
            let synced = disk.synced;
            disk.forgotten_from.get_or_insert(synced);
            return Err(e);
        }
        disk.synced = disk.forgotten_from.unwrap_or(disk.log.len());
        Ok(())
    }

    fn keep(&mut self, _: &[Range<u64>]) -> io::Result<String> {
        Ok("kept".into())
    }

    fn begin_rewrite(&mut self) -> io::Result<()> {
        self.disk().new = Some(Vec::new());
        Ok(())
    }

    fn append_rewrite(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.disk().write(true, bytes)
    }

    fn finish_rewrite(&mut self) -> io::Result<()> {
        let mut disk = self.disk();
        disk.fsync()?;
        let none = || io::Error::other("no rewrite is under way");
        let new = disk.new.take().ok_or_else(none)?;
        let synced = std::mem::replace(&mut disk.synced, new.len());
        let log = std::mem::replace(&mut disk.log, new);
        disk.old.get_or_insert((log, synced));
        disk.forgotten_from = None;
        disk.replaced += 1;
        Ok(())
    }

    fn sync_place(&mut self) -> io::Result<()> {
        let mut disk = self.disk();
        disk.fsync()?;
        disk.old = None;
        Ok(())
    }

    fn mark_suspect(&mut self, suspect: bool) -> io::Result<()> {
        self.disk().suspect = suspect;
        Ok(())
    }

    fn is_marked_suspect(&mut self) -> io::Result<bool> {
        Ok(self.disk().suspect)
    }
}
