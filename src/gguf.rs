//! The header of a GGUF file (versions 2 and 3): its metadata and where its tensors lie.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Files come from anywhere, so nothing is allocated for
//! a length that the file states before the file is known to have that much.

mod reader;
mod tensor_type;

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};
use reader::Reader;
pub use tensor_type::TensorType;

/// Longest header that is read, in bytes. A vocabulary of a million tokens takes about 50 MB.
const MAX_HEADER_BYTES: u64 = 256 << 20;
/// Most keys, tensors and texts of an array: a hundred times what is known, and memory that any machine has.
const MAX_KEYS: u64 = 65_536;
const MAX_TENSORS: u64 = 1 << 18;
const MAX_STRINGS: u64 = 1 << 24;
/// Deepest nesting of arrays.
const MAX_ARRAY_DEPTH: u32 = 4;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// One value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Metadata {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Either float.
    Float(f64),
    /// A flag.
    Bool(bool),
    /// A text.
    String(String),
    /// Many values of one type.
    Array(Array),
}

/// Many values of one type, in the width that they have in the file.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Where one tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Such as `blk.0.attn_q.weight`.
    pub name: String,
    /// How its elements are stored.
    pub tensor_type: TensorType,
    /// Elements along each dimension, the slowest first (rows before columns), as NumPy has it.
    pub shape: Vec<u64>,
    /// In bytes, from [`GgufFile::data_offset`].
    pub offset: u64,
    /// Size in bytes.
    pub bytes: u64,
}

/// The header of one file.
#[derive(Debug, Clone, Default)]
pub struct GgufFile {
    metadata: Vec<(String, Metadata)>,
    keys: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    data_offset: u64,
}

impl GgufFile {
    /// Reads the header of the file at `path`.
    ///
    /// # Errors
    /// `invalid_value` if it cannot be read, or breaks the format.
    pub fn open(path: &Path) -> Result<Self> {
        let refuse = |e: std::io::Error| {
            Error::invalid("model", format!("{} cannot be read: {e}", path.display()))
        };
        // A FIFO would be waited for.
        if !std::fs::metadata(path).map_err(refuse)?.is_file() {
            return Err(Error::invalid(
                "model",
                format!("{} is not a regular file", path.display()),
            ));
        }
        let file = File::open(path).map_err(refuse)?;
        let len = file.metadata().map_err(refuse)?.len();
        Self::read(file, len).map_err(|mut error| {
            error.message = format!("{}: {}", path.display(), error.message);
            error
        })
    }

    /// Reads the header of a file of `len` bytes from its beginning.
    ///
    /// # Errors
    /// `invalid_value` if it breaks the format.
    pub fn read(source: impl Read, len: u64) -> Result<Self> {
        let mut reader = Reader::new(source, len, MAX_HEADER_BYTES);
        if reader.bytes(4)? != b"GGUF" {
            return Err(invalid("it does not begin with GGUF"));
        }
        match reader.u32()? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(invalid("it is big-endian"));
            }
            version => {
                return Err(invalid(format!(
                    "versions 2 and 3 are supported, but it has version {version}"
                )));
            }
        }
        let (num_tensors, num_keys) = (reader.u64()?, reader.u64()?);
        check_count("keys", num_keys, MAX_KEYS)?;
        check_count("tensors", num_tensors, MAX_TENSORS)?;
        let mut file = Self::default();
        for _ in 0..num_keys {
            let key = reader.string()?;
            let value = read_value(&mut reader).map_err(|e| within(&key, e))?;
            if file.keys.insert(key.clone(), file.metadata.len()).is_some() {
                return Err(invalid(format!("the key {key} occurs twice")));
            }
            file.metadata.push((key, value));
        }
        let alignment = file.alignment()?;
        let mut names = std::collections::HashSet::new();
        for _ in 0..num_tensors {
            let tensor = read_tensor(&mut reader)?;
            if !names.insert(tensor.name.clone()) {
                return Err(invalid(format!("the tensor {} occurs twice", tensor.name)));
            }
            file.tensors.push(tensor);
        }
        file.data_offset = reader.position().next_multiple_of(alignment);
        for tensor in &file.tensors {
            let end = tensor
                .offset
                .checked_add(tensor.bytes)
                .and_then(|end| end.checked_add(file.data_offset));
            if tensor.offset % alignment != 0 || end.is_none_or(|end| end > len) {
                let TensorInfo {
                    name,
                    offset,
                    bytes,
                    ..
                } = tensor;
                let message = format!(
                    "the tensor {name} ({bytes} bytes at {offset}) does not lie within its {len} bytes"
                );
                return Err(invalid(message));
            }
        }
        Ok(file)
    }

    /// All metadata, in the order of the file.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Metadata)> {
        self.metadata
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Metadata> {
        self.keys.get(key).map(|&at| &self.metadata[at].1)
    }

    /// The value of `key`, if it is a text.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Metadata::String(text) => Some(text),
            _ => None,
        }
    }

    /// The value of `key`, if it is an integer from 0.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Metadata::Unsigned(n) => Some(*n),
            Metadata::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// The value of `key`, if it is a flag.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Metadata::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// The value of `key`, if it is an array.
    pub fn array(&self, key: &str) -> Option<&Array> {
        match self.get(key)? {
            Metadata::Array(array) => Some(array),
            _ => None,
        }
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Where the tensors' data begins in the file, in bytes.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    fn alignment(&self) -> Result<u64> {
        match self.unsigned("general.alignment") {
            None => Ok(DEFAULT_ALIGNMENT),
            Some(alignment) if alignment.is_power_of_two() && alignment <= 1 << 20 => Ok(alignment),
            Some(alignment) => Err(invalid(format!(
                "general.alignment must be a power of two, but {alignment} was given"
            ))),
        }
    }
}

impl Array {
    /// How many values it has.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(items) => items.len(),
            Self::I8(items) => items.len(),
            Self::U16(items) => items.len(),
            Self::I16(items) => items.len(),
            Self::U32(items) => items.len(),
            Self::I32(items) => items.len(),
            Self::F32(items) => items.len(),
            Self::Bool(items) => items.len(),
            Self::String(items) => items.len(),
            Self::Array(items) => items.len(),
            Self::U64(items) => items.len(),
            Self::I64(items) => items.len(),
            Self::F64(items) => items.len(),
        }
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn invalid(message: impl AsRef<str>) -> Error {
    Error::invalid(
        "model",
        format!("not a valid GGUF file: {}", message.as_ref()),
    )
}

fn check_count(what: &str, count: u64, most: u64) -> Result<()> {
    if count > most {
        return Err(invalid(format!(
            "it may have at most {most} {what}, but it announces {count}"
        )));
    }
    Ok(())
}

fn within(key: &str, mut error: Error) -> Error {
    error.message = format!("{} (in {key})", error.message);
    error
}

fn read_value<R: Read>(reader: &mut Reader<R>) -> Result<Metadata> {
    Ok(match reader.u32()? {
        0 => Metadata::Unsigned(reader.array::<1>()?[0].into()),
        1 => Metadata::Signed(i8::from_le_bytes(reader.array()?).into()),
        2 => Metadata::Unsigned(u16::from_le_bytes(reader.array()?).into()),
        3 => Metadata::Signed(i16::from_le_bytes(reader.array()?).into()),
        4 => Metadata::Unsigned(reader.u32()?.into()),
        5 => Metadata::Signed(i32::from_le_bytes(reader.array()?).into()),
        6 => Metadata::Float(f32::from_le_bytes(reader.array()?).into()),
        7 => Metadata::Bool(flag(reader.array::<1>()?[0])?),
        8 => Metadata::String(reader.string()?),
        9 => Metadata::Array(read_array(reader, MAX_ARRAY_DEPTH)?),
        10 => Metadata::Unsigned(reader.u64()?),
        11 => Metadata::Signed(i64::from_le_bytes(reader.array()?)),
        12 => Metadata::Float(f64::from_le_bytes(reader.array()?)),
        other => return Err(invalid(format!("there is no value type {other}"))),
    })
}

fn read_array<R: Read>(reader: &mut Reader<R>, depth: u32) -> Result<Array> {
    let item_type = reader.u32()?;
    let len = reader.u64()?;
    Ok(match item_type {
        0 => Array::U8(reader.numbers(len, u8::from_le_bytes)?),
        1 => Array::I8(reader.numbers(len, i8::from_le_bytes)?),
        2 => Array::U16(reader.numbers(len, u16::from_le_bytes)?),
        3 => Array::I16(reader.numbers(len, i16::from_le_bytes)?),
        4 => Array::U32(reader.numbers(len, u32::from_le_bytes)?),
        5 => Array::I32(reader.numbers(len, i32::from_le_bytes)?),
        6 => Array::F32(reader.numbers(len, f32::from_le_bytes)?),
        7 => Array::Bool(
            reader
                .numbers(len, u8::from_le_bytes)?
                .into_iter()
                .map(flag)
                .collect::<Result<_>>()?,
        ),
        8 => {
            reader.check_room(len, 8)?;
            check_count("texts in an array", len, MAX_STRINGS)?;
            Array::String((0..len).map(|_| reader.string()).collect::<Result<_>>()?)
        }
        9 if depth > 1 => {
            reader.check_room(len, 12)?;
            Array::Array(
                (0..len)
                    .map(|_| read_array(reader, depth - 1))
                    .collect::<Result<_>>()?,
            )
        }
        9 => {
            return Err(invalid(format!(
                "arrays are nested deeper than {MAX_ARRAY_DEPTH}"
            )));
        }
        10 => Array::U64(reader.numbers(len, u64::from_le_bytes)?),
        11 => Array::I64(reader.numbers(len, i64::from_le_bytes)?),
        12 => Array::F64(reader.numbers(len, f64::from_le_bytes)?),
        other => return Err(invalid(format!("there is no value type {other}"))),
    })
}

fn flag(byte: u8) -> Result<bool> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(invalid(format!(
            "a flag must be 0 or 1, but {other} was given"
        ))),
    }
}

fn read_tensor<R: Read>(reader: &mut Reader<R>) -> Result<TensorInfo> {
    let name = reader.string()?;
    let dimensions = reader.u32()?;
    if dimensions > MAX_DIMENSIONS {
        let message = format!(
            "a tensor may have at most {MAX_DIMENSIONS} dimensions, but {name} has {dimensions}"
        );
        return Err(invalid(message));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        shape.push(reader.u64()?);
    }
    let tensor_type = reader.u32()?;
    let tensor_type = TensorType::from_code(tensor_type).ok_or_else(|| {
        invalid(format!(
            "the tensor {name} has the unknown type {tensor_type}"
        ))
    })?;
    // The file has the fastest dimension first.
    let row = shape.first().copied().unwrap_or(1);
    let bytes = tensor_type.row_bytes(row).and_then(|bytes| {
        shape
            .iter()
            .skip(1)
            .try_fold(bytes, |bytes, &n| bytes.checked_mul(n))
    });
    let bytes = bytes.ok_or_else(|| {
        invalid(format!(
            "the tensor {name} of shape {shape:?} has no size in type {}",
            tensor_type.name()
        ))
    })?;
    shape.reverse();
    Ok(TensorInfo {
        name,
        tensor_type,
        shape,
        offset: reader.u64()?,
        bytes,
    })
}
