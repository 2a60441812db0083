//! Any bytes as a session log: it opens or is refused, never panics, and what was damaged is gone once it is open.
#![no_main]

use std::io::{self, Cursor, Read};
use std::ops::Range;

use libfuzzer_sys::fuzz_target;
use lmserve::session::{LogOptions, LogStorage, Restored, SessionLog, StoreLimits};

#[derive(Debug, Default)]
struct Memory {
    log: Vec<u8>,
    new: Vec<u8>,
}

impl LogStorage for Memory {
    fn reader(&mut self) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(Cursor::new(&self.log)))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.log.extend_from_slice(bytes);
        Ok(())
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.log.truncate(len as usize);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn keep(&mut self, _: &[Range<u64>]) -> io::Result<String> {
        Ok(String::new())
    }

    fn begin_rewrite(&mut self) -> io::Result<()> {
        self.new.clear();
        Ok(())
    }

    fn append_rewrite(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.new.extend_from_slice(bytes);
        Ok(())
    }

    fn finish_rewrite(&mut self) -> io::Result<()> {
        self.log = std::mem::take(&mut self.new);
        Ok(())
    }

    fn sync_place(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn mark_suspect(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn is_marked_suspect(&mut self) -> io::Result<bool> {
        Ok(false)
    }
}

const MARKER: [u8; 8] = *b"\x05marker!";

fn open(log: Vec<u8>) -> Option<(SessionLog<Memory>, usize, Restored)> {
    let mut options = LogOptions::new([0; 32], "fuzz");
    options.marker = MARKER;
    let memory = Memory {
        log,
        ..Memory::default()
    };
    let opened = SessionLog::open(memory, options, StoreLimits::default(), 1);
    let (log, store, restored) = opened.ok()?;
    Some((log, store.tokens(), restored))
}

// A checksum that fits is too much to ask of chance: the input is a list of bodies, each framed as the log does it.
fn framed(data: &[u8]) -> Vec<u8> {
    let Some((empty, ..)) = open(Vec::new()) else {
        return Vec::new();
    };
    let mut log = empty.into_storage().log;
    let mut rest = data;
    let mut seq = 0_u64;
    while let [kind, follows, turns, length, more @ ..] = rest {
        let (body, more) = more.split_at(more.len().min(usize::from(*length)));
        rest = more;
        seq += 1;
        let start = log.len();
        log.extend_from_slice(&MARKER);
        log.extend_from_slice(&seq.to_le_bytes());
        log.extend_from_slice(&u64::from(*follows).to_le_bytes());
        log.extend_from_slice(&[b"HPDN"[usize::from(kind % 4)], 1, 0]);
        log.extend_from_slice(&[0; 16]);
        log.push(b'0' + kind / 4 % 10);
        log.extend_from_slice(&u32::from(*turns).to_le_bytes());
        log.extend_from_slice(&(body.len() as u32).to_le_bytes());
        let head = !crc32(!0, &log[start..]);
        log.extend_from_slice(&head.to_le_bytes());
        log.extend_from_slice(body);
        log.extend_from_slice(&(!crc32(!head, body)).to_le_bytes());
    }
    log
}

// The register of a CRC-32, without the last inversion.
fn crc32(register: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(register, |crc, &byte| {
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
        let (_, again, restored) = open(log.into_storage().log).expect("it opened before");
        assert!(restored.is_whole());
        assert_eq!((again, restored.torn), (tokens, 0));
    }
});
