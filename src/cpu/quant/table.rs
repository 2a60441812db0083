//! What indices of four bits stand for.

use serde::{Deserialize, Serialize};

/// A table of 16 integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Table {
    /// That of `IQ4_NL` and `IQ4_XS`.
    Iq4,
    /// Twice the floats with two bits of exponent and one of mantissa (E2M1), of `MXFP4` and `NVFP4`.
    E2m1,
    /// Eight times the magnitudes of the `IQ2` types, with both signs; the last are not used.
    Iq2,
}

impl Table {
    /// What each index stands for.
    pub const fn values(self) -> &'static [i8; 16] {
        match self {
            Self::Iq4 => &[
                -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
            ],
            Self::E2m1 => &[0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12],
            Self::Iq2 => &[-43, -25, -8, 8, 25, 43, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    /// The same as bytes around 128.
    pub(in crate::cpu) fn bytes(self) -> [u8; 16] {
        self.values().map(|value| value as u8 ^ 0x80)
    }
}
