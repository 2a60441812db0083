//! Any bytes as a session log: it opens or is refused, never panics, and what it cut off is gone for good.
#![no_main]

use std::io::{self, Cursor, Read};

use libfuzzer_sys::fuzz_target;
use lmserve::session::{LogOptions, LogStorage, SessionLog, StoreLimits};

#[derive(Debug)]
struct Memory(Vec<u8>);

impl LogStorage for Memory {
    fn reader(&mut self) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(Cursor::new(&self.0)))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.0.truncate(len as usize);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn begin_rewrite(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn append_rewrite(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn finish_rewrite(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open(bytes: Vec<u8>) -> Option<(SessionLog<Memory>, usize, u64)> {
    let options = LogOptions::new([0; 32], "fuzz");
    let opened = SessionLog::open(Memory(bytes), options, StoreLimits::default(), 1);
    let (log, store, restored) = opened.ok()?;
    Some((log, store.tokens(), restored.torn))
}

// A checksum that fits is too much to ask of chance: the input is a list of payloads, each framed as the log does it.
fn framed(data: &[u8]) -> Vec<u8> {
    let Some((empty, ..)) = open(Vec::new()) else {
        return Vec::new();
    };
    let mut log = empty.into_storage().0;
    let mut rest = data;
    while let Some((&length, more)) = rest.split_first() {
        let (payload, more) = more.split_at(more.len().min(length as usize));
        log.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        log.extend_from_slice(&crc32(payload).to_le_bytes());
        log.extend_from_slice(payload);
        rest = more;
    }
    log
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

fuzz_target!(|data: &[u8]| {
    for bytes in [data.to_vec(), framed(data)] {
        let Some((log, tokens, _)) = open(bytes) else {
            continue;
        };
        let (_, again, torn) = open(log.into_storage().0).expect("it opened before");
        assert_eq!((again, torn), (tokens, 0));
    }
});
