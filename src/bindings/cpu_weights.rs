//! Stored weights, as Python gives them, and what they take once they are packed.

use std::path::PathBuf;

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;

use super::cpu_arrays::{entries, values};
use crate::cpu::linear::packed_bytes;
use crate::cpu::packed::made_of;
use crate::cpu::{BlockType, FloatType, Format, Matrix, Pool, Stored, encode_all};
use crate::error::{Error, Result};

/// The largest number of half precision.
const HALF_MAX: f32 = 65504.0;

/// How a type is stored and kept: GGUF's blocks as they are, unless they are to be rounded.
fn storage(dtype: &str, quantize: Option<&str>) -> Result<Stored> {
    if quantize.is_none()
        && let Some(block) = BlockType::from_name(dtype)
    {
        return Ok(Stored::Blocks(block));
    }
    let float = match dtype {
        "F16" => FloatType::F16,
        "BF16" => FloatType::Bf16,
        _ => FloatType::F32,
    };
    let format = match (quantize, dtype) {
        (Some("q8"), _) => Format::Int8,
        (Some("q4"), _) => Format::Int4,
        (Some("none"), _) | (None, "F32") => Format::F32,
        (None, "F16") => Format::F16,
        (None, "BF16") => Format::Bf16,
        _ => {
            let given = quantize.unwrap_or(dtype);
            return Err(Error::invalid(
                "quantize",
                format!("weights are kept as q8, q4 or none, but {given} was given"),
            ));
        }
    };
    Ok(Stored::Floats(float, format))
}

/// Bytes of a packed linear layer of this shape.
#[pyfunction]
pub(super) fn cpu_linear_bytes(
    stored: &str,
    quantize: Option<&str>,
    rows: usize,
    columns: usize,
) -> Result<usize> {
    Ok(packed_bytes(storage(stored, quantize)?, rows, columns))
}

/// Float weights as blocks of a GGUF type.
#[pyfunction]
pub(super) fn encode_blocks(
    py: Python<'_>,
    dtype: &str,
    weights: &Bound<'_, PyAny>,
    threads: usize,
) -> PyResult<Vec<u8>> {
    let Some(block) = BlockType::from_name(dtype).filter(|block| block.is_encoded()) else {
        let message =
            format!("weights become Q8_0, Q4_1, Q5_1, Q4_K, Q5_K or Q6_K, but {dtype} was given");
        return Err(Error::invalid("dtype", message).into());
    };
    let weights = PyBuffer::<f32>::get(weights)?;
    let count = weights.item_count();
    if !weights.is_c_contiguous() || !count.is_multiple_of(block.elements()) {
        let elements = block.elements();
        let message = format!("{dtype} has blocks of {elements} weights, but {count} were given");
        return Err(Error::invalid("weights", message).into());
    }
    // SAFETY: as its docstring asks, nobody writes the array meanwhile.
    let values = unsafe { entries(&weights, count) }?;
    // A factor of a block has half precision.
    if let Some(value) = values
        .iter()
        .find(|value| value.is_nan() || value.abs() > HALF_MAX)
    {
        let message = format!("weights must lie in [-{HALF_MAX}, {HALF_MAX}], but one is {value}");
        return Err(Error::invalid("weights", message).into());
    }
    Ok(py.detach(|| encode_all(block, values, &Pool::new(threads))))
}

/// What the file of packed weights at `path` was made of; None: there is no whole one.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)]
pub(super) fn packed_made_of(path: PathBuf) -> Option<String> {
    made_of(&path).ok()
}

/// (type, bytes, rows, columns, bias) of a stored weight.
pub(super) type GivenPart<'py> = (
    String,
    Bound<'py, PyAny>,
    usize,
    usize,
    Option<Bound<'py, PyAny>>,
);

/// The same, its arrays taken.
pub(super) struct StoredPart {
    stored: Stored,
    rows: usize,
    columns: usize,
    bytes: PyBuffer<u8>,
    bias: Option<Vec<f32>>,
}

impl StoredPart {
    pub(super) fn new(
        (dtype, bytes, rows, columns, bias): GivenPart,
        quantize: Option<&str>,
    ) -> PyResult<Self> {
        let bytes = PyBuffer::get(&bytes)?;
        if !bytes.is_c_contiguous() {
            return Err(Error::invalid("model", "a weight must lie in one piece").into());
        }
        Ok(Self {
            stored: storage(&dtype, quantize)?,
            rows,
            columns,
            bytes,
            bias: bias.as_ref().map(values).transpose()?,
        })
    }

    pub(super) fn matrix(&self) -> Result<Matrix<'_>> {
        Ok(Matrix {
            stored: self.stored,
            rows: self.rows,
            columns: self.columns,
            // SAFETY: nobody writes a weight while it is loaded.
            bytes: unsafe { entries(&self.bytes, self.bytes.item_count())? },
            bias: self.bias.as_deref(),
        })
    }
}
