//! What a file of packed weights says of itself.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use serde::{Deserialize, Serialize};

use crate::cpu::linear::PackedShape;

/// Raised whenever the layout of packed weights, or how floats are rounded to them, changes.
const VERSION: u32 = 2;
const MAGIC: [u8; 8] = *b"lmservpk";
pub(super) const HEADER_BYTES: u64 = 64;
/// Bytes that share a checksum.
pub(super) const CHUNK: usize = 4 << 20;
/// Longest table that is read: that of a million experts.
const MAX_TABLE_BYTES: u64 = 256 << 20;

/// One layer of a group.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Layer {
    pub(super) shape: PackedShape,
    /// From the start of the file.
    pub(super) offset: u64,
}

/// The layers of one weight.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Group {
    pub(super) label: String,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) layers: Vec<Layer>,
    /// CRC-32 of each [`CHUNK`] of its bytes.
    pub(super) checksums: Vec<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Table {
    /// What the file was made of, as its owner tells it from others.
    pub(super) key: String,
    pub(super) groups: Vec<Group>,
}

/// The header and the table's bytes.
pub(super) fn encode(table: &Table, at: u64) -> io::Result<([u8; HEADER_BYTES as usize], Vec<u8>)> {
    let bytes = serde_json::to_vec(table)?;
    let mut header = [0; HEADER_BYTES as usize];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_ne_bytes());
    header[12..16].copy_from_slice(&crc32fast::hash(&bytes).to_ne_bytes());
    header[16..24].copy_from_slice(&at.to_ne_bytes());
    header[24..32].copy_from_slice(&(bytes.len() as u64).to_ne_bytes());
    Ok((header, bytes))
}

/// The table of a file, and where it begins.
///
/// # Errors
/// What of the file is not as it must be.
pub(super) fn read(file: &mut File) -> Result<(Table, u64), String> {
    let unreadable = |error: io::Error| format!("it cannot be read: {error}");
    let len = file.metadata().map_err(unreadable)?.len();
    let mut header = [0; HEADER_BYTES as usize];
    file.read_exact(&mut header)
        .map_err(|_| format!("it has {len} bytes, and no whole header"))?;
    if header[..8] != MAGIC {
        return Err("it is no file of packed weights".to_owned());
    }
    let version = u32::from_ne_bytes(array(&header[8..12]));
    if version != VERSION {
        return Err(format!("it has version {version}, and not {VERSION}"));
    }
    let checksum = u32::from_ne_bytes(array(&header[12..16]));
    let at = u64::from_ne_bytes(array(&header[16..24]));
    let count = u64::from_ne_bytes(array(&header[24..32]));
    if at < HEADER_BYTES || at.checked_add(count) != Some(len) || count > MAX_TABLE_BYTES {
        return Err(format!(
            "it is cut off, or its header is damaged: it has {len} bytes"
        ));
    }
    let mut bytes = vec![0; count as usize];
    file.seek(SeekFrom::Start(at)).map_err(unreadable)?;
    file.read_exact(&mut bytes).map_err(unreadable)?;
    if crc32fast::hash(&bytes) != checksum {
        return Err("its table is damaged".to_owned());
    }
    let table = serde_json::from_slice(&bytes).map_err(|e| format!("its table is damaged: {e}"))?;
    Ok((table, at))
}

/// # Panics
/// If there are not `N` bytes.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("as many bytes as the number has")
}
