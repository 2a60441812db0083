//! Numbers out of the bytes of a block.

use crate::cpu::half::f16_to_f32;

/// The half-precision number at byte `at`.
pub(super) fn half(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// The low halves of all bytes, then the high ones.
pub(super) fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    let low = bytes.iter().map(|b| b & 0x0f);
    low.chain(bytes.iter().map(|b| b >> 4))
}
