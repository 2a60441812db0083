//! Weights of a model that come from a file of packed weights, or go into one.

use std::path::Path;

use super::file::Packed;
use super::reader::PackedFile;
use super::writer::PackedWriter;
use crate::cpu::heads::HeadsWeight;
use crate::cpu::linear::Linear;
use crate::cpu::model::{Model, Weight};
use crate::error::{Error, Result};

impl Model {
    /// Takes the weights that are loaded from now on from the file at `path`, where it has them. `check`: all its bytes are compared
    /// with their checksums first.
    ///
    /// # Errors
    /// Why it must not be used; weights are packed then.
    pub fn read_packed(
        &mut self,
        path: &Path,
        key: &str,
        check: bool,
    ) -> std::result::Result<(), String> {
        let pool = check.then_some(&self.pool);
        self.packed = Packed::Read(PackedFile::open(path, key, self.isa(), pool)?);
        Ok(())
    }

    /// Writes the weights that are [kept](Self::keep) from now on to the file at `path`; see [`PackedWriter::new`].
    ///
    /// # Errors
    /// Those of the system.
    pub fn write_packed(&mut self, path: &Path, maps: bool) -> std::io::Result<()> {
        self.packed = Packed::Write(PackedWriter::new(path, self.isa(), maps)?);
        Ok(())
    }

    /// Ends reading or writing. Gives the size in bytes of a file that was written, and is complete now.
    ///
    /// # Errors
    /// Those of the system.
    pub fn end_packed(&mut self, key: &str) -> std::io::Result<Option<u64>> {
        match std::mem::take(&mut self.packed) {
            Packed::Write(writer) => writer.finish(key).map(Some),
            Packed::Read(_) | Packed::None => Ok(None),
        }
    }

    /// Bytes written so far.
    pub fn packed_bytes(&self) -> u64 {
        match &self.packed {
            Packed::Write(writer) => writer.bytes(),
            Packed::Read(_) | Packed::None => 0,
        }
    }

    fn stored(&self, label: &str, wanted: bool) -> Option<Vec<Linear>> {
        match &self.packed {
            Packed::Read(file) => file.layers(label, wanted),
            Packed::Write(_) | Packed::None => None,
        }
    }

    /// The number of the linear layer that the file has under this label; `None`: it has none, and the layer must be packed.
    pub fn map_linear(&mut self, label: &str) -> Option<usize> {
        let parts = self.stored(label, true)?;
        self.weights.push(Weight::Linear(parts));
        Some(self.weights.len() - 1)
    }

    /// The same for matrices of heads.
    pub fn map_heads(&mut self, label: &str) -> Option<usize> {
        let heads = HeadsWeight::of(self.stored(label, true)?)?;
        self.weights.push(Weight::Heads(heads));
        Some(self.weights.len() - 1)
    }

    /// Takes all experts of a layer from the file, and says whether it has them under this label. A step reads those that are chosen, and
    /// no others take memory.
    ///
    /// # Errors
    /// `invalid_value` if `weight` is not the experts of a layer.
    pub fn map_experts(&mut self, weight: usize, label: &str, gated: bool) -> Result<bool> {
        let Some(layers) = self.stored(label, false) else {
            return Ok(false);
        };
        Ok(self.experts_mut(weight)?.take(layers, gated))
    }

    /// Writes a weight to the file under a label, if one is written.
    ///
    /// # Errors
    /// `invalid_value` if `weight` is none that is packed.
    pub fn keep(&mut self, weight: usize, label: &str) -> Result<()> {
        let Packed::Write(writer) = &mut self.packed else {
            return Ok(());
        };
        let mut layers: Vec<&mut Linear> = match self.weights.get_mut(weight) {
            Some(Weight::Linear(parts)) => parts.iter_mut().collect(),
            Some(Weight::Heads(heads)) => heads.linears_mut().collect(),
            Some(Weight::Experts(experts)) => experts.linears_mut().collect(),
            _ => {
                let message = format!("weight {weight} is none that is packed");
                return Err(Error::invalid("model", message));
            }
        };
        writer.write(label, &mut layers);
        Ok(())
    }
}
