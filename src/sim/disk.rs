//! A file in memory that takes less than it is given, loses what was not synced, and ends in the middle of a record.

use std::io::{self, Cursor, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::random::Random;
use crate::session::LogStorage;

/// What outlives a server.
#[derive(Debug, Default)]
pub(super) struct Disk {
    log: Vec<u8>,
    synced: usize,
    new: Option<Vec<u8>>,
    /// The next write fails behind so many bytes.
    pub(super) full_after: Option<usize>,
}

impl Disk {
    /// The process died. What it was writing may be there in part.
    pub(super) fn tear(&mut self, random: &mut Random) {
        self.full_after = None;
        if random.once_in(2) {
            let garbage = random.range(1, 40);
            let zeros = random.once_in(3);
            let byte = |random: &mut Random| if zeros { 0 } else { random.next() as u8 };
            self.log.extend((0..garbage).map(|_| byte(random)));
        }
    }

    /// The machine lost its power: the log ends somewhere behind what was synced. Returns where.
    pub(super) fn lose_power(&mut self, random: &mut Random) -> u64 {
        self.full_after = None;
        let end = random.range(self.synced, self.log.len());
        self.log.truncate(end);
        end as u64
    }

    fn write(log: &mut Vec<u8>, full_after: &mut Option<usize>, bytes: &[u8]) -> io::Result<()> {
        let Some(room) = full_after.take() else {
            log.extend_from_slice(bytes);
            return Ok(());
        };
        log.extend_from_slice(&bytes[..room.min(bytes.len())]);
        Err(io::Error::from(io::ErrorKind::StorageFull))
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
        disk.new = None;
        Ok(Box::new(Cursor::new(disk.log.clone())))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let disk = &mut *self.disk();
        Disk::write(&mut disk.log, &mut disk.full_after, bytes)
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        let mut disk = self.disk();
        disk.log.truncate(len as usize);
        disk.synced = disk.synced.min(len as usize);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.disk();
        disk.synced = disk.log.len();
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
        let disk = &mut *self.disk();
        let none = || io::Error::other("no rewrite is under way");
        Disk::write(
            disk.new.as_mut().ok_or_else(none)?,
            &mut disk.full_after,
            bytes,
        )
    }

    fn finish_rewrite(&mut self) -> io::Result<()> {
        let mut disk = self.disk();
        let none = || io::Error::other("no rewrite is under way");
        disk.log = disk.new.take().ok_or_else(none)?;
        disk.synced = disk.log.len();
        Ok(())
    }

    fn sync_place(&mut self) -> io::Result<()> {
        Ok(())
    }
}
