//! Packed layers as the bytes of a file, and back.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cpu::isa::Isa;
use crate::cpu::memory::{Aligned, LINE_BYTES, Mapping};
use crate::cpu::quant::SUPER;

use super::floats::{self, Data, FloatWeights};
use super::integers::{self, IntWeights};
use super::pack::Kept;
use super::{Format, Linear, TILE, Weights};

/// Most outputs and inputs of a layer, so that its bytes can be counted.
const MOST: usize = 1 << 31;

/// What is known of a packed layer, beside its bytes. All instruction sets share its layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::cpu) struct PackedShape {
    pub(in crate::cpu) rows: usize,
    pub(in crate::cpu) columns: usize,
    kept: Kept,
    bias: bool,
}

impl PackedShape {
    /// Bytes of its arrays: integers and their scales, or floats and nothing, and biases. `None` for what no layer is.
    fn arrays(&self) -> Option<[usize; 3]> {
        let (rows, columns) = (self.rows, self.columns);
        if !(1..=MOST).contains(&rows) || !(1..=MOST).contains(&columns) {
            return None;
        }
        let [numbers, scales] = match self.kept {
            Kept::Integers(code)
                if code.is_known() && (!code.nested || columns.is_multiple_of(SUPER)) =>
            {
                integers::array_bytes(code, rows, columns)
            }
            Kept::Floats(Format::F32) => [4 * floats::count(rows, columns), 0],
            Kept::Floats(Format::F16 | Format::Bf16) => [2 * floats::count(rows, columns), 0],
            _ => return None,
        };
        let biases = if self.bias {
            4 * rows.next_multiple_of(TILE)
        } else {
            0
        };
        Some([numbers, scales, biases])
    }

    /// Bytes that its arrays take one after the other, each from a cache line on. `None` for what no layer is.
    pub(in crate::cpu) fn bytes(&self) -> Option<usize> {
        let arrays = self.arrays()?;
        Some(
            arrays
                .iter()
                .map(|bytes| bytes.next_multiple_of(LINE_BYTES))
                .sum(),
        )
    }
}

impl Linear {
    /// What a file that has its [arrays](Self::arrays) must say of it.
    pub(in crate::cpu) fn packed_shape(&self) -> PackedShape {
        PackedShape {
            rows: self.out_features,
            columns: self.in_features,
            kept: match &self.weights {
                Weights::Int(weights) => Kept::Integers(weights.code),
                Weights::Float(weights) => Kept::Floats(weights.format),
            },
            bias: self.bias.is_some(),
        }
    }

    /// The bytes of the arrays in the order of [`PackedShape`].
    pub(in crate::cpu) fn arrays(&self) -> [&[u8]; 3] {
        let bias = self.bias.as_ref().map_or(&[][..], Aligned::bytes);
        match &self.weights {
            Weights::Int(weights) => [weights.q.bytes(), weights.scales.bytes(), bias],
            Weights::Float(weights) => match &weights.data {
                Data::Full(data) => [data.bytes(), &[], bias],
                Data::Half(data) => [data.bytes(), &[], bias],
            },
        }
    }

    /// The layer whose arrays begin at byte `offset` of what is mapped of a file; `None` where they do not lie there, or the shape is
    /// none of a layer. Nothing is read.
    pub(in crate::cpu) fn mapped(
        isa: Isa,
        shape: PackedShape,
        map: &Arc<Mapping>,
        offset: usize,
    ) -> Option<Self> {
        let [numbers, scales, biases] = shape.arrays()?;
        let size = (shape.rows, shape.columns);
        let scales_at = offset.checked_add(numbers.next_multiple_of(LINE_BYTES))?;
        let bias_at = scales_at.checked_add(scales.next_multiple_of(LINE_BYTES))?;
        let weights = match shape.kept {
            Kept::Integers(code) => Weights::Int(IntWeights::of_arrays(
                code,
                size,
                Aligned::mapped(map, offset, numbers)?,
                Aligned::mapped(map, scales_at, scales)?,
            )),
            Kept::Floats(format) => {
                let data = match format {
                    Format::F32 => Data::Full(Aligned::mapped(map, offset, numbers / 4)?),
                    _ => Data::Half(Aligned::mapped(map, offset, numbers / 2)?),
                };
                Weights::Float(FloatWeights::of_data(format, size, data))
            }
        };
        let bias = if shape.bias {
            Some(Aligned::mapped(map, bias_at, biases / 4)?)
        } else {
            None
        };
        Some(Self {
            isa,
            out_features: shape.rows,
            in_features: shape.columns,
            weights,
            bias,
        })
    }
}
