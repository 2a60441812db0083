//! Which file a model has to do with.

use super::reader::PackedFile;
use super::writer::PackedWriter;

/// The file that a model's weights are read from or written to.
#[derive(Default)]
pub(in crate::cpu) enum Packed {
    #[default]
    None,
    Read(PackedFile),
    Write(PackedWriter),
}
