//! The border to a disk: whoever implements [`Files`] keeps bytes under names.

use std::io;

/// A file as a folder lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// Its name in the folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// When it was used last; only the order counts.
    pub used: u64,
}

/// A folder of files that a server has to itself. Errors are those of the disk; whoever calls takes each for a miss.
#[allow(clippy::missing_errors_doc)]
pub trait Files: Send + Sync {
    /// All files.
    fn list(&self) -> io::Result<Vec<StoredFile>>;
    /// A file's bytes.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Writes the parts, one after another, to a file of that name: all of them, or no such file.
    fn write(&self, name: &str, parts: &[&[u8]]) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Notes that a file was used now, for whoever lists it after a restart.
    fn touch(&self, name: &str) -> io::Result<()>;
}
