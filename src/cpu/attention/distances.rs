//! Learnt values that are added to scores by the distance between query and key, for each head (`MPNet`, T5).

use std::f32::consts::LOG2_E;

use super::block::TILE;
use crate::error::{Error, Result};

/// For each head, a value for each distance, in units of the exponent of 2.
pub struct Distances {
    /// For each head, the values of keys at the distances `1 - most ..= most - 1` from their query, padded with zeros to a whole
    /// tile.
    rows: Vec<f32>,
    heads: usize,
    /// Number of tokens of the longest text.
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

    /// Number of heads.
    pub const fn heads(&self) -> usize {
        self.heads
    }

    /// Number of tokens of the longest text.
    pub const fn most(&self) -> usize {
        self.most
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.rows)
    }

    /// The [`TILE`] values for a query at `position` and the tile of keys from `start` on.
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
