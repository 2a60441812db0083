//! Writes what was packed.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use crate::cpu::isa::Isa;
use crate::cpu::linear::Linear;
use crate::cpu::memory::{LINE_BYTES, MAPPING_ALIGNMENT, Mapping};

use super::table::{CHUNK, Group, HEADER_BYTES, Layer, Table, encode};

const BUFFER_BYTES: usize = 1 << 20;

/// A file of packed weights that is being written.
pub struct PackedWriter {
    file: BufWriter<File>,
    end: u64,
    groups: Vec<Group>,
    isa: Isa,
    /// Whether weights are mapped from the file once they are in it, so that they take no other memory.
    maps: bool,
    /// What went wrong first; nothing is written after it.
    failure: Option<io::Error>,
}

impl PackedWriter {
    /// Writes to the file at `path`, which is there, is nobody else's and is empty. `maps`: what was written is mapped in place of what
    /// was packed.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new(path: &Path, isa: Isa, maps: bool) -> io::Result<Self> {
        // What is mapped is read through the same descriptor.
        let file = File::options().read(true).write(true).open(path)?;
        let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
        file.write_all(&[0; HEADER_BYTES as usize])?;
        Ok(Self {
            file,
            end: HEADER_BYTES,
            groups: Vec::new(),
            isa,
            maps,
            failure: None,
        })
    }

    /// Bytes so far.
    pub const fn bytes(&self) -> u64 {
        self.end
    }

    /// Writes the layers of a weight. A failure is told at the end, for the weights do as well without the file.
    pub(super) fn write(&mut self, label: &str, layers: &mut [&mut Linear]) {
        if self.failure.is_none()
            && let Err(error) = self.try_write(label, layers)
        {
            self.failure = Some(error);
        }
    }

    fn try_write(&mut self, label: &str, layers: &mut [&mut Linear]) -> io::Result<()> {
        self.pad(self.end.next_multiple_of(MAPPING_ALIGNMENT))?;
        let offset = self.end;
        let mut written = Vec::with_capacity(layers.len());
        let mut sums = Checksums::default();
        for layer in &*layers {
            written.push(Layer {
                shape: layer.packed_shape(),
                offset: self.end,
            });
            for array in layer.arrays() {
                self.put(array, &mut sums)?;
                let padding = array.len().next_multiple_of(LINE_BYTES) - array.len();
                self.put(&[0; LINE_BYTES][..padding], &mut sums)?;
            }
        }
        let bytes = self.end - offset;
        if self.maps {
            self.file.flush()?;
            let map = Arc::new(Mapping::new(self.file.get_ref(), offset, bytes as usize)?);
            for (layer, written) in layers.iter_mut().zip(&written) {
                let at = (written.offset - offset) as usize;
                **layer = Linear::mapped(self.isa, written.shape, &map, at)
                    .ok_or_else(|| io::Error::other("what was written is not there"))?;
            }
        }
        self.groups.push(Group {
            label: label.to_owned(),
            offset,
            bytes,
            layers: written,
            checksums: sums.finish(),
        });
        Ok(())
    }

    fn put(&mut self, bytes: &[u8], sums: &mut Checksums) -> io::Result<()> {
        sums.add(bytes);
        self.file.write_all(bytes)?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self, end: u64) -> io::Result<()> {
        // Skipped bytes are zeros that take no room.
        self.file.seek(SeekFrom::Start(end))?;
        self.end = end;
        Ok(())
    }

    /// Completes the file, whose weights were made of what `key` says; gives its size in bytes.
    ///
    /// # Errors
    /// Those of the system, here or when a weight was written.
    pub fn finish(mut self, key: &str) -> io::Result<u64> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let table = Table {
            key: key.to_owned(),
            groups: std::mem::take(&mut self.groups),
        };
        let (header, bytes) = encode(&table, self.end)?;
        self.file.write_all(&bytes)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&header)?;
        self.file.flush()?;
        Ok(self.end + bytes.len() as u64)
    }
}

/// The checksums of a group as it is written.
#[derive(Default)]
struct Checksums {
    done: Vec<u32>,
    current: crc32fast::Hasher,
    /// Bytes in the current chunk.
    len: usize,
}

impl Checksums {
    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK - self.len));
            self.current.update(now);
            self.len += now.len();
            if self.len == CHUNK {
                self.next();
            }
            bytes = later;
        }
    }

    fn next(&mut self) {
        self.done.push(std::mem::take(&mut self.current).finalize());
        self.len = 0;
    }

    fn finish(mut self) -> Vec<u32> {
        if self.len > 0 {
            self.next();
        }
        self.done
    }
}
