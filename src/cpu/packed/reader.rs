//! Reads and checks what was written.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::cpu::isa::Isa;
use crate::cpu::linear::Linear;
use crate::cpu::memory::{LINE_BYTES, MAPPING_ALIGNMENT, Mapping};
use crate::cpu::pool::Pool;

use super::table::{self, CHUNK, Group};

/// A whole file of packed weights, mapped.
pub struct PackedFile {
    map: Arc<Mapping>,
    groups: HashMap<String, Group>,
    isa: Isa,
    checked: bool,
}

/// What the file at `path` was made of, by its header and table alone.
///
/// # Errors
/// Why it is no whole file of packed weights.
pub fn made_of(path: &Path) -> Result<String, String> {
    Ok(table::read(&mut open(path)?)?.0.key)
}

fn open(path: &Path) -> Result<File, String> {
    File::open(path).map_err(|error| format!("it cannot be opened: {error}"))
}

impl PackedFile {
    /// Maps the file at `path`, if it was made of what `key` says. With a pool, all its bytes are read and compared with their
    /// checksums, on all threads; without one, only those of header and table.
    ///
    /// # Errors
    /// Why it must not be used.
    pub fn open(path: &Path, key: &str, isa: Isa, pool: Option<&Pool>) -> Result<Self, String> {
        let mut file = open(path)?;
        let (table, end) = table::read(&mut file)?;
        if table.key != key {
            return Err("it was made of other weights, or for another version".to_owned());
        }
        if !table.groups.iter().all(|group| fits(group, end)) {
            return Err("its table is damaged".to_owned());
        }
        if let Some(pool) = pool {
            check(&file, &table.groups, pool)?;
        }
        let map = Mapping::new(&file, 0, end as usize)
            .map_err(|error| format!("it cannot be mapped: {error}"))?;
        let groups = table.groups.into_iter();
        Ok(Self {
            map: Arc::new(map),
            groups: groups.map(|group| (group.label.clone(), group)).collect(),
            isa,
            checked: pool.is_some(),
        })
    }

    /// The layers of a weight, mapped. `wanted`: whether all of them are read in every step, so that their pages had better be there.
    pub(super) fn layers(&self, label: &str, wanted: bool) -> Option<Vec<Linear>> {
        let group = self.groups.get(label)?;
        if wanted && self.checked {
            let start = group.offset as usize;
            self.map.populate(&(start..start + group.bytes as usize));
        }
        let each = group.layers.iter();
        each.map(|layer| Linear::mapped(self.isa, layer.shape, &self.map, layer.offset as usize))
            .collect()
    }
}

/// Whether a group and its layers lie before `end`, where layers may.
fn fits(group: &Group, end: u64) -> bool {
    let Some(group_end) = group.offset.checked_add(group.bytes) else {
        return false;
    };
    let inside = |layer: &table::Layer| {
        let bytes = layer.shape.bytes().map(|bytes| bytes as u64);
        let last = bytes.and_then(|bytes| layer.offset.checked_add(bytes));
        layer.offset >= group.offset
            && layer.offset.is_multiple_of(LINE_BYTES as u64)
            && last.is_some_and(|last| last <= group_end)
    };
    group_end <= end
        && group.offset.is_multiple_of(MAPPING_ALIGNMENT)
        && group.checksums.len() as u64 == group.bytes.div_ceil(CHUNK as u64)
        && group.layers.iter().all(inside)
}

/// Compares all bytes with their checksums. They are read, and not mapped: what nobody uses enters no process's memory.
fn check(file: &File, groups: &[Group], pool: &Pool) -> Result<(), String> {
    let chunks: Vec<(u64, usize, u32)> = groups
        .iter()
        .flat_map(|group| {
            let each = group.checksums.iter().enumerate();
            each.map(|(at, &sum)| {
                let before = (at * CHUNK) as u64;
                let len = (group.bytes - before).min(CHUNK as u64) as usize;
                (group.offset + before, len, sum)
            })
        })
        .collect();
    let damaged = AtomicBool::new(false);
    let failure = Mutex::new(None);
    pool.run(&|team| {
        let mut buffer = vec![0; PIECE];
        team.for_chunks(chunks.len(), 1, |range| {
            for &(offset, len, expected) in &chunks[range] {
                if damaged.load(Ordering::Relaxed) {
                    continue;
                }
                let found = checksum(file, offset, len, &mut buffer);
                if found.as_ref().is_ok_and(|&found| found == expected) {
                    continue;
                }
                damaged.store(true, Ordering::Relaxed);
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(match found {
                    Ok(_) => format!("bytes from {offset} on are damaged"),
                    Err(error) => format!("it cannot be read: {error}"),
                });
            }
        });
    });
    let failure = failure.into_inner();
    failure
        .unwrap_or_else(PoisonError::into_inner)
        .map_or(Ok(()), Err)
}

/// Bytes that are read at a time, which a cache holds.
const PIECE: usize = 256 << 10;

fn checksum(file: &File, mut offset: u64, len: usize, buffer: &mut [u8]) -> io::Result<u32> {
    let mut sum = crc32fast::Hasher::new();
    let mut left = len;
    while left > 0 {
        let piece = &mut buffer[..left.min(PIECE)];
        read_at(file, piece, offset)?;
        sum.update(piece);
        offset += piece.len() as u64;
        left -= piece.len();
    }
    Ok(sum.finalize())
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(not(unix))]
fn read_at(_: &File, _: &mut [u8], _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
