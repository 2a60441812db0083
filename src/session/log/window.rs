//! A file read from its beginning to its end, with a look at what comes next.

use std::io::{self, Read};

const CHUNK: usize = 64 << 10;

/// What is ahead in a file.
pub(super) struct Window<R> {
    reader: R,
    buffer: Vec<u8>,
    /// Where in the buffer the next byte is.
    start: usize,
    offset: u64,
    ended: bool,
}

impl<R: Read> Window<R> {
    pub(super) const fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: Vec::new(),
            start: 0,
            offset: 0,
            ended: false,
        }
    }

    /// Bytes that were skipped so far.
    pub(super) const fn offset(&self) -> u64 {
        self.offset
    }

    /// What comes next: at least `len` bytes, fewer at the file's end alone.
    ///
    /// # Errors
    /// Those of the reader.
    pub(super) fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
        while self.buffer.len() - self.start < len && !self.ended {
            if self.start > CHUNK.max(self.buffer.len() / 2) {
                self.buffer.drain(..self.start);
                self.start = 0;
            }
            let missing = len - (self.buffer.len() - self.start);
            let before = self.buffer.len();
            let limit = missing.max(CHUNK) as u64;
            // What is read is paid for by the file, whatever length a damaged record claims.
            (&mut self.reader)
                .take(limit)
                .read_to_end(&mut self.buffer)?;
            self.ended = self.buffer.len() - before < limit as usize;
        }
        Ok(&self.buffer[self.start..])
    }

    /// Skips bytes that were peeked at.
    pub(super) fn skip(&mut self, len: usize) {
        let len = len.min(self.buffer.len() - self.start);
        self.start += len;
        self.offset += len as u64;
    }
}
