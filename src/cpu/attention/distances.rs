//! What is added to scores by how far a key lies from its query, learnt for each head (`MPNet`, T5).

use std::f32::consts::LOG2_E;

use super::block::TILE;
use crate::error::{Error, Result};

/// For each head, an addend for each distance; ready for weights that are powers of 2.
pub struct Distances {
    /// For each head those of keys that lie `1 - most ..= most - 1` after their query, then zeros for the rest of a tile.
    rows: Vec<f32>,
    heads: usize,
    /// Tokens of the longest text that these are for.
    most: usize,
}

impl Distances {
    /// `values [heads][2 * most - 1]`.
    ///
    /// # Errors
    /// `invalid_value` where the values are not as many for each head, or an even number.
    pub fn new(values: &[f32], heads: usize) -> Result<Self> {
        let each = values.len() / heads.max(1);
        if heads == 0 || each * heads != values.len() || each.is_multiple_of(2) {
            return Err(Error::invalid(
                "distances",
                format!(
                    "{} values are not an odd number for each of {heads} heads",
                    values.len()
                ),
            ));
        }
        let mut rows = Vec::with_capacity(heads * (each + TILE));
        for row in values.chunks_exact(each) {
            rows.extend(row.iter().map(|x| x * LOG2_E));
            rows.extend([0.0; TILE]);
        }
        Ok(Self {
            rows,
            heads,
            most: each.div_ceil(2),
        })
    }

    /// For how many heads.
    pub const fn heads(&self) -> usize {
        self.heads
    }

    /// Tokens of the longest text that these are for.
    pub const fn most(&self) -> usize {
        self.most
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.rows)
    }

    /// For a query at `position` and the tile of keys from `start` on, [`TILE`] addends.
    ///
    /// # Panics
    /// If either is not below `most`.
    #[inline]
    pub(super) fn tile(&self, head: usize, position: usize, start: usize) -> *const f32 {
        assert!(position < self.most && start < self.most && head < self.heads);
        let first = head * (2 * self.most - 1 + TILE) + self.most - 1 + start - position;
        self.rows[first..first + TILE].as_ptr()
    }
}
