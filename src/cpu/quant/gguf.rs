//! The block types of ggml that are taken apart into integers, scales and minima without loss.
//!
//! Layouts: `ggml-common.h` and `ggml-quants.c` of <https://github.com/ggml-org/ggml>.

use super::bits::{half, nibbles};
use super::gguf_small;
use super::{Code, IntRow, Table};

/// A block type whose weights become integers as they are.
///
/// All are exact, where scales of `MXFP4` are such as half precision has. Integers of 3 and 5 bits take 6, and ternary ones 4.
/// Scales of the `K` types stay nested: 4, 6 or 8 bits for each group, and half-precision factors for 256 weights.
///
/// `IQ2` is no type of files: 256 indices of four bits into [`Table::Iq2`], 16 scales, and their half-precision factor, which the
/// types of files that are called `IQ2` become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, non_camel_case_types)]
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
    Q3_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    NVFP4,
    TQ1_0,
    TQ2_0,
    Q2_K,
    IQ2,
}

impl BlockType {
    /// The type that GGUF files call `name`, such as `Q4_K`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "Q4_0" => Self::Q4_0,
            "Q4_1" => Self::Q4_1,
            "Q5_0" => Self::Q5_0,
            "Q5_1" => Self::Q5_1,
            "Q8_0" => Self::Q8_0,
            "Q4_K" => Self::Q4_K,
            "Q5_K" => Self::Q5_K,
            "Q6_K" => Self::Q6_K,
            "Q3_K" => Self::Q3_K,
            "IQ4_NL" => Self::IQ4_NL,
            "IQ4_XS" => Self::IQ4_XS,
            "MXFP4" => Self::MXFP4,
            "NVFP4" => Self::NVFP4,
            "TQ1_0" => Self::TQ1_0,
            "TQ2_0" => Self::TQ2_0,
            "Q2_K" => Self::Q2_K,
            "IQ2" => Self::IQ2,
            _ => return None,
        })
    }

    /// Weights in a block.
    pub const fn elements(self) -> usize {
        match self {
            Self::Q4_K
            | Self::Q5_K
            | Self::Q6_K
            | Self::Q3_K
            | Self::IQ4_XS
            | Self::TQ1_0
            | Self::TQ2_0
            | Self::Q2_K
            | Self::IQ2 => 256,
            Self::NVFP4 => 64,
            _ => 32,
        }
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Q4_0 | Self::IQ4_NL => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
            Self::Q3_K => 110,
            Self::IQ4_XS => 136,
            Self::MXFP4 => 17,
            Self::NVFP4 => 36,
            Self::TQ1_0 => 54,
            Self::TQ2_0 => 66,
            Self::Q2_K => 84,
            Self::IQ2 => 146,
        }
    }

    /// How its integers stand for weights.
    pub const fn code(self) -> Code {
        let (bits, group, nested, min) = match self {
            Self::Q4_0 | Self::TQ1_0 | Self::TQ2_0 | Self::IQ4_NL | Self::MXFP4 => {
                (4, 32, false, false)
            }
            Self::Q4_1 => (4, 32, false, true),
            Self::Q5_0 => (6, 32, false, false),
            Self::Q5_1 => (6, 32, false, true),
            Self::Q8_0 => (8, 32, false, false),
            Self::IQ4_XS => (4, 32, true, false),
            Self::Q4_K => (4, 32, true, true),
            Self::Q5_K => (6, 32, true, true),
            Self::Q6_K | Self::Q3_K => (6, 16, true, false),
            Self::NVFP4 => (4, 16, false, false),
            Self::IQ2 => (4, 16, true, false),
            Self::Q2_K => (2, 16, true, true),
        };
        let table = match self {
            Self::IQ4_NL | Self::IQ4_XS => Some(Table::Iq4),
            Self::MXFP4 | Self::NVFP4 => Some(Table::E2m1),
            Self::IQ2 => Some(Table::Iq2),
            _ => None,
        };
        Code {
            bits,
            group,
            nested,
            min,
            table,
        }
    }

    /// Takes the blocks of one row apart, into `row` in place of what was there.
    pub fn decode(self, blocks: &[u8], row: &mut IntRow) {
        row.clear();
        for block in blocks.chunks_exact(self.bytes()) {
            match self {
                Self::Q4_0 => {
                    row.scales.push(half(block, 0));
                    row.q.extend(nibbles(&block[2..]));
                }
                Self::Q4_1 => {
                    row.scales.push(half(block, 0));
                    row.mins.push(half(block, 2));
                    row.q.extend(nibbles(&block[4..]));
                }
                Self::Q5_0 => {
                    row.scales.push(half(block, 0));
                    // From the middle 16 of five bits to the middle 32 of six.
                    row.q.extend(five_bits(&block[2..]).map(|q| q + (32 - 16)));
                }
                Self::Q5_1 => {
                    row.scales.push(half(block, 0));
                    row.mins.push(half(block, 2));
                    row.q.extend(five_bits(&block[4..]));
                }
                Self::Q8_0 => {
                    row.scales.push(half(block, 0));
                    row.q.extend(block[2..].iter().map(|q| q ^ 0x80));
                }
                Self::Q4_K => {
                    k_scales(block, row);
                    row.q.extend(block[16..].chunks_exact(32).flat_map(nibbles));
                }
                Self::Q5_K => {
                    k_scales(block, row);
                    let (high, low) = block[16..].split_at(32);
                    for (pair, low) in low.chunks_exact(32).enumerate() {
                        for (i, q) in nibbles(low).enumerate() {
                            let bit = high[i % 32] >> (2 * pair + i / 32) & 1;
                            row.q.push(q | bit << 4);
                        }
                    }
                }
                Self::Q6_K => six_bits(block, row),
                Self::Q3_K => gguf_small::three_bits(block, row),
                Self::IQ4_NL => gguf_small::table(block, row),
                Self::IQ4_XS => gguf_small::nested_table(block, row),
                Self::MXFP4 => gguf_small::exponents(block, row),
                Self::NVFP4 => gguf_small::small_floats(block, row),
                Self::TQ1_0 => gguf_small::powers_of_three(block, row),
                Self::TQ2_0 => gguf_small::ternary(block, row),
                Self::Q2_K => gguf_small::two_bits(block, row),
                Self::IQ2 => gguf_small::signed_magnitudes(block, row),
            }
        }
    }
}

/// Four bytes with the fifth bits of 32 integers, and 16 with the others.
fn five_bits(bytes: &[u8]) -> impl Iterator<Item = u8> {
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let bit = move |i: usize| (high >> i & 1) as u8;
    nibbles(&bytes[4..])
        .enumerate()
        .map(move |(i, q)| q | bit(i) << 4)
}

/// Two half-precision factors and, packed into 12 bytes, eight 6-bit scales and eight 6-bit minima.
fn k_scales(block: &[u8], row: &mut IntRow) {
    row.factors.push([half(block, 0), -half(block, 2)]);
    let packed = &block[4..16];
    for i in 0..8 {
        let (s, m) = if i < 4 {
            (packed[i] & 63, packed[i + 4] & 63)
        } else {
            (
                packed[i + 4] & 0x0f | packed[i - 4] >> 6 << 4,
                packed[i + 4] >> 4 | packed[i] >> 6 << 4,
            )
        };
        row.scales.push(f32::from(s));
        row.mins.push(f32::from(m));
    }
}

/// 256 integers of six bits around 32 with an 8-bit scale for each 16: 128 bytes with the low four bits, 64 with the high two,
/// 16 scales, and their half-precision factor.
fn six_bits(block: &[u8], row: &mut IntRow) {
    let (low, high) = block.split_at(128);
    for part in 0..2 {
        for quarter in 0..4 {
            for i in 0..32 {
                let low = low[part * 64 + quarter % 2 * 32 + i] >> (quarter / 2 * 4) & 0x0f;
                let high = high[part * 32 + i] >> (2 * quarter) & 3;
                row.q.push(low | high << 4);
            }
        }
    }
    row.factors.push([half(block, 208), 0.0]);
    let scales = block[192..208].iter();
    row.scales.extend(scales.map(|&s| f32::from(s as i8)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::half::f32_to_f16;

    /// Two blocks of rising bytes, with the given half-precision numbers in each.
    fn blocks(block: BlockType, halves: &[(usize, f32)]) -> Vec<u8> {
        let bytes = 2 * block.bytes();
        let mut blocks: Vec<u8> = (0..bytes).map(|i| (i * 37 + 11) as u8).collect();
        for one in blocks.chunks_exact_mut(block.bytes()) {
            for &(at, value) in halves {
                one[at..at + 2].copy_from_slice(&f32_to_f16(value).to_le_bytes());
            }
        }
        blocks
    }

    /// What the `gguf` package 0.17 makes of such blocks: the sum of the weights times 1 to 17 in turn, and three of them.
    const KNOWN: [(BlockType, f64, [f32; 3]); 17] = [
        (
            BlockType::Q4_0,
            -6.481_353_759_765_625,
            [0.024_597_168, 0.0, 0.086_090_09],
        ),
        (
            BlockType::Q4_1,
            -2.061_828_613_281_25,
            [-0.049_499_51, 0.048_889_16, -0.000_305_175_78],
        ),
        (
            BlockType::Q5_0,
            6.395_263_671_875,
            [-0.024_597_168, 0.012_298_584, 0.012_298_584],
        ),
        (
            BlockType::Q5_1,
            50.477_722_167_968_75,
            [0.196_472_17, -0.037_200_928, 0.036_590_576],
        ),
        (
            BlockType::Q8_0,
            -43.832_153_320_312_5,
            [1.500_427_2, -0.590_332_03, -1.315_948_5],
        ),
        (
            BlockType::Q4_K,
            2_322.705_139_160_156,
            [-5.033_386, -2.642_578_1, 2.405_639_6],
        ),
        (
            BlockType::Q5_K,
            10_145.669_738_769_53,
            [-5.033_386, -1.904_663_1, 1.71875],
        ),
        (
            BlockType::Q6_K,
            -498.092_651_367_187_5,
            [20.858_398, -0.737_915_04, 24.597_168],
        ),
        (
            BlockType::Q3_K,
            38.703_643_798_828_125,
            [-1.328_247_1, 0.516_540_5, 0.073_791_504],
        ),
        (
            BlockType::IQ4_NL,
            -83.408_996_582_031_25,
            [0.307_464_6, 0.012_298_584, 1.389_74],
        ),
        (
            BlockType::IQ4_XS,
            -3_329.903_106_689_453,
            [-0.012_298_584, -0.196_777_34, 26.860_107],
        ),
        (
            BlockType::MXFP4,
            0.398_437_5,
            [0.023_437_5, 0.023_437_5, -0.007_812_5],
        ),
        (BlockType::NVFP4, -67.723_632_812_5, [0.5, 1.125, 2.25]),
        (
            BlockType::TQ1_0,
            -0.565_734_863_281_25,
            [-0.012_298_584, -0.012_298_584, -0.012_298_584],
        ),
        (
            BlockType::TQ2_0,
            28.729_492_187_5,
            [-0.012_298_584, -0.012_298_584, 0.012_298_584],
        ),
        (
            BlockType::Q2_K,
            -2_401.564_941_406_25,
            [0.0, -0.222_290_04, -0.370_483_4],
        ),
        // Of this one what its description says.
        (
            BlockType::IQ2,
            627.289_276_123_046_9,
            [-5.817_23, 0.0, 42.307_13],
        ),
    ];

    #[test]
    fn blocks_mean_what_other_readers_say() {
        for (block, total, some) in KNOWN {
            let halves: &[(usize, f32)] = match block {
                BlockType::Q4_1 | BlockType::Q5_1 => &[(0, 0.0123), (2, -0.0987)],
                BlockType::Q4_K | BlockType::Q5_K => &[(0, 0.0123), (2, 0.0987)],
                BlockType::Q6_K => &[(208, 0.0123)],
                BlockType::Q3_K => &[(108, 0.0123)],
                BlockType::TQ1_0 => &[(52, 0.0123)],
                BlockType::TQ2_0 => &[(64, 0.0123)],
                BlockType::Q2_K => &[(80, 0.0123), (82, 0.0987)],
                BlockType::IQ2 => &[(144, 0.0123)],
                BlockType::MXFP4 | BlockType::NVFP4 => &[],
                _ => &[(0, 0.0123)],
            };
            let mut row = IntRow::default();
            let mut bytes = blocks(block, halves);
            for one in bytes.chunks_exact_mut(block.bytes()) {
                match block {
                    BlockType::MXFP4 => one[0] = 120,
                    BlockType::NVFP4 => one[..4].copy_from_slice(&[0x28, 0x05, 0x7f, 0x41]),
                    BlockType::IQ2 => one[128..144].iter_mut().for_each(|scale| *scale &= 0x7f),
                    _ => {}
                }
            }
            block.decode(&bytes, &mut row);
            let values = row.dequantize(block.code());
            let n = values.len();
            assert_eq!(n, 2 * block.elements());
            let some_of_it = [values[1], values[n / 2 - 1], values[n - 2]];
            assert_eq!(
                some_of_it.map(f32::to_bits),
                some.map(f32::to_bits),
                "{block:?} {some_of_it:?}"
            );
            let weighted = values
                .iter()
                .enumerate()
                .map(|(i, &v)| f64::from(v) * (i % 17 + 1) as f64);
            let sum: f64 = weighted.sum();
            assert!((sum - total).abs() <= 1e-9 * total.abs(), "{block:?} {sum}");
        }
    }

    #[test]
    fn names_are_those_of_the_files() {
        for (block, ..) in KNOWN {
            assert_eq!(BlockType::from_name(&format!("{block:?}")), Some(block));
        }
        assert_eq!(BlockType::from_name("IQ2_XS"), None);
    }
}
