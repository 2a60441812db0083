//! Files of packed weights: what packing made, written once, and mapped by every later start.
//!
//! ```text
//! header   64 bytes: "lmservpk", version (u32), CRC-32 of the table (u32), where the table begins and its length (u64 each)
//! groups   each from a multiple of 64 KiB on: the layers of one weight, one after the other
//! table    JSON, up to the end of the file: what the file was made of, and for each group its layers and checksums
//! ```
//!
//! Numbers are in the machine's own order, and so is the version, which another machine then does not know. A file that is not whole,
//! or is another version's or another model's, is refused, and whoever finds that packs anew.

mod file;
mod reader;
mod table;
mod weights;
mod writer;

pub(super) use file::Packed;
pub use reader::{PackedFile, made_of};
pub use writer::PackedWriter;

#[cfg(test)]
mod tests;
