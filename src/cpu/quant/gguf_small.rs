//! Blocks of weights with fewer than four bits, and with four bits that index a table of values.

use super::IntRow;
use super::bits::{half, nibbles};

/// Exponents (of half a power of two, from -128) that half precision has: from its least to its largest.
const EXPONENTS: std::ops::RangeInclusive<u8> = 104..=143;

/// 256 integers of three bits around 4 with a 6-bit scale around 32 for each 16: 32 bytes with the third bits, 64 with the others,
/// 12 with the scales, and their half-precision factor.
pub(super) fn three_bits(block: &[u8], row: &mut IntRow) {
    let (high, rest) = block.split_at(32);
    let (low, packed) = rest.split_at(64);
    for part in 0..2 {
        for quarter in 0..4 {
            for i in 0..32 {
                let low = low[part * 32 + i] >> (2 * quarter) & 3;
                let high = high[i] >> (4 * part + quarter) & 1;
                // From the middle 4 of three bits to the middle 32 of six.
                row.q.push((low | high << 2) + (32 - 4));
            }
        }
    }
    row.factors.push([half(block, 108), 0.0]);
    for i in 0..16 {
        let low = packed[i % 8] >> (i / 8 * 4) & 0x0f;
        let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        row.scales.push(f32::from(low | high << 4) - 32.0);
    }
}

/// 32 indices into the table after a half-precision scale.
pub(super) fn table(block: &[u8], row: &mut IntRow) {
    row.scales.push(half(block, 0));
    row.q.extend(nibbles(&block[2..]));
}

/// 256 of them, with a 6-bit scale around 32 for each 32: two bytes with their upper bits, four with the others.
pub(super) fn nested_table(block: &[u8], row: &mut IntRow) {
    row.factors.push([half(block, 0), 0.0]);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for i in 0..8 {
        let low = block[4 + i / 2] >> (i % 2 * 4) & 0x0f;
        let high = (high >> (2 * i) & 3) as u8;
        row.scales.push(f32::from(low | high << 4) - 32.0);
    }
    row.q.extend(block[8..].chunks_exact(16).flat_map(nibbles));
}

/// 256 indices, 16 scales below 128, and their half-precision factor.
pub(super) fn signed_magnitudes(block: &[u8], row: &mut IntRow) {
    row.q
        .extend(block[..128].chunks_exact(16).flat_map(nibbles));
    row.scales
        .extend(block[128..144].iter().map(|&s| f32::from(s)));
    row.factors.push([half(block, 144), 0.0]);
}

/// 256 integers of two bits, four to a byte, with a scale and a minimum of four bits for each 16 before them, and half-precision
/// factors of both behind them.
pub(super) fn two_bits(block: &[u8], row: &mut IntRow) {
    for &both in &block[..16] {
        row.scales.push(f32::from(both & 0x0f));
        row.mins.push(f32::from(both >> 4));
    }
    for bytes in block[16..80].chunks_exact(32) {
        for shift in [0, 2, 4, 6] {
            row.q.extend(bytes.iter().map(|b| b >> shift & 3));
        }
    }
    row.factors.push([half(block, 80), -half(block, 82)]);
}

/// 32 floats of four bits after an exponent.
pub(super) fn exponents(block: &[u8], row: &mut IntRow) {
    let exponent = block[0].clamp(*EXPONENTS.start(), *EXPONENTS.end());
    row.scales.push(2.0_f32.powi(i32::from(exponent) - 128));
    row.q.extend(nibbles(&block[1..]));
}

/// Four times 16 of them, after as many scales: floats of four bits of exponent and three of mantissa, without a sign.
pub(super) fn small_floats(block: &[u8], row: &mut IntRow) {
    let (scales, floats) = block.split_at(4);
    for &scale in scales {
        let (exponent, mantissa) = (scale >> 3 & 0x0f, f32::from(scale & 7));
        let value = match (scale, exponent) {
            (0x7f, _) => 0.0,
            (_, 0) => mantissa * 2.0_f32.powi(-9),
            _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(i32::from(exponent) - 7),
        };
        row.scales.push(value / 2.0);
    }
    row.q.extend(floats.chunks_exact(8).flat_map(nibbles));
}

/// 256 times -1, 0 or 1, five to a byte as the digits of a fraction in base 3 but for the last 16, before a half-precision scale.
pub(super) fn powers_of_three(block: &[u8], row: &mut IntRow) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    row.scales.extend([half(block, 52); 8]);
    let (first, rest) = block[..52].split_at(32);
    let (second, last) = rest.split_at(16);
    for (bytes, powers) in [
        (first, &POWERS[..]),
        (second, &POWERS[..]),
        (last, &POWERS[..4]),
    ] {
        for &power in powers {
            let digit = |b: &u8| ((u16::from(b.wrapping_mul(power)) * 3) >> 8) as u8;
            // From the middle 1 to the middle 8 of four bits.
            row.q.extend(bytes.iter().map(|b| digit(b) + (8 - 1)));
        }
    }
}

/// The same, four to a byte.
pub(super) fn ternary(block: &[u8], row: &mut IntRow) {
    row.scales.extend([half(block, 64); 8]);
    for bytes in block[..64].chunks_exact(32) {
        for shift in [0, 2, 4, 6] {
            let digits = bytes.iter().map(|b| (b >> shift & 3) + (8 - 1));
            row.q.extend(digits);
        }
    }
}
