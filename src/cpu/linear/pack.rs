//! From stored matrices to packed layers, on all threads and without a copy in between.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::cpu::half::{bf16_to_f32, f16_to_f32};
use crate::cpu::isa::Isa;
use crate::cpu::memory::Aligned;
use crate::cpu::pool::Pool;
use crate::cpu::quant::{BlockType, Code, IntRow, round_int4, round_int8};
use crate::error::{Error, Result};

use super::floats::{FloatTiles, FloatWeights};
use super::integers::{IntTiles, IntWeights};
use super::{Format, Linear, TILE, Weights};

/// Tiles that a thread packs at a time.
const PIECE: usize = 16;

/// How floats are stored, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// 32 bits.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
}

/// How a matrix is stored, and how it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Blocks of a GGUF type, which are kept without loss.
    Blocks(BlockType),
    /// Floats, and the format that they are kept in, rounded where it is narrower.
    Floats(FloatType, Format),
}

/// A stored matrix `[rows, columns]`, row after row.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// What the bytes are.
    pub stored: Stored,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Values.
    pub bytes: &'a [u8],
    /// One number for each output.
    pub bias: Option<&'a [f32]>,
}

impl Matrix<'_> {
    /// # Errors
    /// `invalid_value` if the bytes are not those of the shape, or not as many biases are given as rows.
    fn check(&self) -> Result<()> {
        let (rows, columns, given) = (self.rows, self.columns, self.bytes.len());
        let (whole, kind) = match self.stored {
            Stored::Blocks(block) => {
                let kind = format!("{block:?}");
                (columns.is_multiple_of(block.elements()), kind)
            }
            Stored::Floats(float, _) => (true, format!("{float:?}")),
        };
        let needed = rows * self.row_bytes();
        if !whole || given != needed {
            return Err(Error::invalid(
                "model",
                format!(
                    "a {kind} weight of shape [{rows}, {columns}] has {needed} bytes in whole blocks, but {given} bytes were given"
                ),
            ));
        }
        if let Some(bias) = self.bias
            && bias.len() != rows
        {
            return Err(Error::invalid(
                "model",
                format!(
                    "a linear layer of {rows} outputs takes as many biases, but {} were given",
                    bias.len()
                ),
            ));
        }
        Ok(())
    }

    fn row_bytes(&self) -> usize {
        match self.stored {
            Stored::Blocks(block) => self.columns / block.elements() * block.bytes(),
            Stored::Floats(FloatType::F32, _) => 4 * self.columns,
            Stored::Floats(_, _) => 2 * self.columns,
        }
    }

    /// Whether this and `next` can be one layer, whose outputs are those of both.
    fn joins(&self, next: &Self) -> bool {
        self.rows.is_multiple_of(TILE)
            && self.columns == next.columns
            && self.stored.kept() == next.stored.kept()
            && self.bias.is_some() == next.bias.is_some()
    }

    fn floats(&self, float: FloatType, row: usize, out: &mut Vec<f32>) {
        let bytes = &self.bytes[row * self.row_bytes()..][..self.row_bytes()];
        out.clear();
        match float {
            FloatType::F32 => {
                out.extend(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)));
            }
            FloatType::F16 => {
                let halves = bytes.as_chunks().0.iter();
                out.extend(halves.map(|&b| f16_to_f32(u16::from_le_bytes(b))));
            }
            FloatType::Bf16 => {
                let halves = bytes.as_chunks().0.iter();
                out.extend(halves.map(|&b| bf16_to_f32(u16::from_le_bytes(b))));
            }
        }
    }
}

/// How weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kept {
    Integers(Code),
    Floats(Format),
}

impl Stored {
    pub(super) fn kept(self) -> Kept {
        match self {
            Self::Blocks(block) => Kept::Integers(block.code()),
            Self::Floats(_, format) => format.code().map_or(Kept::Floats(format), Kept::Integers),
        }
    }
}

/// Some tiles of a layer, which one thread packs.
enum Piece<'a> {
    Integers(IntTiles<'a>),
    Floats(FloatTiles<'a>),
}

/// What a thread takes rows apart in.
#[derive(Default)]
struct Scratch {
    floats: Vec<f32>,
    integers: IntRow,
}

impl Piece<'_> {
    /// Packs a row of a matrix as this piece's row `at`.
    fn set_row(&mut self, at: usize, matrix: &Matrix, row: usize, scratch: &mut Scratch) {
        let Scratch { floats, integers } = scratch;
        match matrix.stored {
            Stored::Blocks(block) => {
                let bytes = &matrix.bytes[row * matrix.row_bytes()..][..matrix.row_bytes()];
                block.decode(bytes, integers);
            }
            Stored::Floats(float, format) => {
                matrix.floats(float, row, floats);
                match format {
                    Format::Int8 => round_int8(floats, integers),
                    Format::Int4 => round_int4(floats, integers),
                    Format::F32 | Format::F16 | Format::Bf16 => {}
                }
            }
        }
        match self {
            Self::Integers(tiles) => tiles.set_row(at, integers),
            Self::Floats(tiles) => tiles.set_row(at, floats),
        }
    }
}

impl Linear {
    /// Packs matrices side by side, on all threads of the pool. They become one layer, whose outputs are those of all, one after
    /// the other; or one each where they differ in inputs, in how they are kept or in the presence of a bias, or where one before
    /// the last has outputs that are no multiple of 16.
    ///
    /// # Errors
    /// `invalid_value` if a matrix does not have the bytes of its shape, or not as many biases as rows.
    pub fn pack(isa: Isa, pool: &Pool, parts: &[Matrix]) -> Result<Vec<Self>> {
        parts.iter().try_for_each(Matrix::check)?;
        if parts.windows(2).all(|pair| pair[0].joins(&pair[1])) {
            return Ok(parts
                .first()
                .map(|_| Self::pack_joined(isa, pool, parts))
                .into_iter()
                .collect());
        }
        let each = parts.chunks(1);
        Ok(each
            .map(|part| Self::pack_joined(isa, pool, part))
            .collect())
    }

    /// Packs each matrix as a layer of its own, on one thread of the pool.
    ///
    /// # Errors
    /// As [`Self::pack`].
    pub fn pack_each(isa: Isa, pool: &Pool, matrices: &[Matrix]) -> Result<Vec<Self>> {
        matrices.iter().try_for_each(Matrix::check)?;
        let packed: Vec<Mutex<Option<Self>>> = matrices.iter().map(|_| Mutex::default()).collect();
        pool.run(&|team| {
            let mut scratch = Scratch::default();
            team.for_chunks(matrices.len(), 1, |range| {
                for at in range {
                    let parts = &matrices[at..=at];
                    let mut layer = Self::zeroed(isa, parts);
                    for (at, mut piece) in layer.pieces().into_iter().enumerate() {
                        fill(at, &mut piece, parts, &mut scratch);
                    }
                    let mut place = packed[at].lock().unwrap_or_else(PoisonError::into_inner);
                    *place = Some(layer);
                }
            });
        });
        let layers = packed.into_iter().filter_map(|layer| {
            let layer = layer.into_inner();
            layer.unwrap_or_else(PoisonError::into_inner)
        });
        Ok(layers.collect())
    }

    fn pack_joined(isa: Isa, pool: &Pool, parts: &[Matrix]) -> Self {
        let mut layer = Self::zeroed(isa, parts);
        let pieces: Vec<_> = layer.pieces().into_iter().map(Mutex::new).collect();
        pool.run(&|team| {
            let mut scratch = Scratch::default();
            team.for_chunks(pieces.len(), 1, |range| {
                for at in range {
                    let mut piece = pieces[at].lock().unwrap_or_else(PoisonError::into_inner);
                    fill(at, &mut piece, parts, &mut scratch);
                }
            });
        });
        drop(pieces);
        layer
    }

    /// The layer of joined parts, its weights still all zero.
    fn zeroed(isa: Isa, parts: &[Matrix]) -> Self {
        let out_features = parts.iter().map(|part| part.rows).sum();
        let in_features = parts[0].columns;
        let weights = match parts[0].stored.kept() {
            Kept::Integers(code) => {
                Weights::Int(IntWeights::zeroed(code, out_features, in_features))
            }
            Kept::Floats(format) => {
                Weights::Float(FloatWeights::zeroed(format, out_features, in_features))
            }
        };
        let biases: Vec<f32> = parts
            .iter()
            .flat_map(|part| part.bias.unwrap_or_default())
            .copied()
            .collect();
        let bias = (!biases.is_empty()).then(|| {
            let mut padded = Aligned::zeroed(out_features.next_multiple_of(TILE));
            padded[..out_features].copy_from_slice(&biases);
            padded
        });
        Self {
            isa,
            out_features,
            in_features,
            weights,
            bias,
        }
    }

    fn pieces(&mut self) -> Vec<Piece<'_>> {
        match &mut self.weights {
            Weights::Int(weights) => weights.pieces(PIECE).map(Piece::Integers).collect(),
            Weights::Float(weights) => weights.pieces(PIECE).map(Piece::Floats).collect(),
        }
    }
}

/// Packs the rows of piece `at` of joined parts.
fn fill(at: usize, piece: &mut Piece, parts: &[Matrix], scratch: &mut Scratch) {
    let (first, last) = (at * PIECE * TILE, (at + 1) * PIECE * TILE);
    let mut begin = 0;
    for part in parts {
        let end = begin + part.rows;
        for row in first.max(begin)..last.min(end) {
            piece.set_row(row - first, part, row - begin, scratch);
        }
        begin = end;
    }
}
