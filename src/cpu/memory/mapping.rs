//! Files that are mapped into memory to be read.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;

/// Where a mapping may begin in a file: a multiple of every page size.
pub(in crate::cpu) const MAPPING_ALIGNMENT: u64 = 64 << 10;

/// A part of a file, mapped for as long as this lives.
///
/// Its pages are the system's own copy of the file: processes that map it share them, and the system drops them where memory is short
/// and reads them again. So nobody may change the file meanwhile: what was read would change, and where the file was cut, reading ends
/// the process with SIGBUS. Files of packed weights are written under another name and renamed, never written again, and replaced
/// by renaming too, which leaves the old file whole until its last mapping is gone.
pub(in crate::cpu) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it is memory that nobody writes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes from `offset` on, which the file must have.
    ///
    /// # Errors
    /// Those of the system; `Unsupported` where files are not mapped here.
    #[cfg(unix)]
    pub(in crate::cpu) fn new(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        use std::os::fd::AsRawFd;

        let end = (len as u64).checked_add(offset);
        if len == 0
            || !offset.is_multiple_of(MAPPING_ALIGNMENT)
            || end.is_none_or(|end| end > file.metadata().map_or(0, |found| found.len()))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a new mapping touches no memory of others; the system checks the descriptor and the offset.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::Other)?;
        Ok(Self { start, len })
    }

    /// Maps nothing.
    ///
    /// # Errors
    /// `Unsupported`, always.
    #[cfg(not(unix))]
    pub(in crate::cpu) fn new(_: &File, _: u64, _: usize) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Where the bytes in `range` lie; `None`: it has no such bytes.
    pub(super) fn at(&self, range: &Range<usize>) -> Option<NonNull<u8>> {
        if range.start > range.end || range.end > self.len {
            return None;
        }
        // SAFETY: the range lies within the mapping.
        Some(unsafe { self.start.add(range.start) })
    }

    /// Has the system read the bytes in `range` now, and enter their pages into this process's tables, where it can. They must
    /// begin where a mapping may.
    pub(in crate::cpu) fn populate(&self, range: &Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Some(start) = self.at(range)
            && range.start.is_multiple_of(MAPPING_ALIGNMENT as usize)
            && !cfg!(miri)
        {
            // A refusal leaves each page to be read when it is used.
            // SAFETY: the range lies within the mapping, and its pages are only read.
            unsafe { libc::madvise(start.as_ptr().cast(), range.len(), libc::MADV_POPULATE_READ) };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's, and whatever reads it keeps it.
        #[cfg(unix)]
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.len);
        }
    }
}
