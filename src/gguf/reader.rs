//! Little-endian values from a source of known length.

use std::io::{BufReader, Read};

use super::invalid;
use crate::error::Result;

const BUFFER_BYTES: usize = 1 << 20;

/// Reads a file's header and keeps count, so that no length in it is believed before the file has room for it.
pub(super) struct Reader<R> {
    source: BufReader<R>,
    position: u64,
    /// Bytes of the file.
    len: u64,
    /// Bytes that may be read.
    limit: u64,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(source: R, len: u64, limit: u64) -> Self {
        Self {
            source: BufReader::with_capacity(BUFFER_BYTES, source),
            position: 0,
            len,
            limit,
        }
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Refuses `count` items of at least `size` bytes if the file cannot hold them.
    pub(super) fn check_room(&self, count: u64, size: u64) -> Result<()> {
        let needed = count.checked_mul(size);
        let left = self.len.saturating_sub(self.position);
        if needed.is_none_or(|needed| needed > left) {
            return Err(invalid(format!(
                "it announces {count} items of {size} bytes, but only {left} bytes follow"
            )));
        }
        if needed.is_some_and(|needed| needed > self.limit.saturating_sub(self.position)) {
            return Err(invalid(format!(
                "its header has more than {} bytes",
                self.limit
            )));
        }
        Ok(())
    }

    pub(super) fn bytes(&mut self, count: u64) -> Result<Vec<u8>> {
        self.check_room(count, 1)?;
        let mut bytes = vec![0; count as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.check_room(N as u64, 1)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.source
            .read_exact(bytes)
            .map_err(|e| invalid(format!("at byte {}: {e}", self.position)))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn string(&mut self) -> Result<String> {
        let start = self.position;
        let len = self.u64()?;
        String::from_utf8(self.bytes(len)?)
            .map_err(|_| invalid(format!("the text at byte {start} is not UTF-8")))
    }

    pub(super) fn numbers<T, const N: usize>(
        &mut self,
        count: u64,
        from: fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        self.check_room(count, N as u64)?;
        let bytes = self.bytes(count * N as u64)?;
        Ok(bytes
            .as_chunks::<N>()
            .0
            .iter()
            .map(|&chunk| from(chunk))
            .collect())
    }
}
