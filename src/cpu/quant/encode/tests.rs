//! What is written is read again, and how near it is.

use super::*;
use crate::cpu::quant::{IntRow, near_normal};

const ENCODED: [(BlockType, f64); 6] = [
    // The largest error of normal weights, as a part of their sum of squares.
    (BlockType::Q8_0, 3e-5),
    (BlockType::Q4_1, 0.0052),
    (BlockType::Q5_1, 0.0013),
    (BlockType::Q4_K, 0.0060),
    (BlockType::Q5_K, 0.0015),
    (BlockType::Q6_K, 0.0005),
];

fn there_and_back(block: BlockType, row: &[f32]) -> Vec<f32> {
    let (mut bytes, mut read) = (Vec::new(), IntRow::default());
    block.encode(row, &mut bytes);
    assert_eq!(bytes.len(), row.len() / block.elements() * block.bytes());
    block.decode(&bytes, &mut read);
    read.dequantize(block.code())
}

fn squares(row: &[f32]) -> f64 {
    row.iter().map(|x| f64::from(*x).powi(2)).sum()
}

#[test]
fn what_is_read_is_near_to_what_was_written() {
    let row = near_normal(7, 32 * SUPER);
    for (block, most) in ENCODED {
        let off: Vec<f32> = there_and_back(block, &row)
            .iter()
            .zip(&row)
            .map(|(a, b)| a - b)
            .collect();
        let part = squares(&off) / squares(&row);
        assert!(part < most, "{block:?} {part}");
    }
}

#[test]
fn what_a_type_can_say_is_said() {
    let steps = |i: usize, n: usize| (i * 7 % n) as f32;
    let row: Vec<f32> = (0..SUPER).map(|i| 0.25 * steps(i, 16) - 1.5).collect();
    assert_eq!(there_and_back(BlockType::Q4_1, &row), row);
    let finer: Vec<f32> = (0..SUPER).map(|i| 0.25 * steps(i, 32) - 3.0).collect();
    let level = |i: usize| {
        if i.is_multiple_of(SMALL) {
            0.0
        } else {
            steps(i, 64)
        }
    };
    let finest: Vec<f32> = (0..SUPER).map(|i| 0.5 * (level(i) - 32.0)).collect();
    for (block, row) in [
        (BlockType::Q4_K, &row),
        (BlockType::Q5_K, &finer),
        (BlockType::Q6_K, &finest),
    ] {
        for (x, expected) in there_and_back(block, row).iter().zip(row) {
            // Factors have eleven bits.
            assert!(
                (x - expected).abs() <= expected.abs() / 1024.0,
                "{block:?} {x} {expected}"
            );
        }
    }
}

#[test]
fn constants_zeros_and_extremes_are_kept() {
    for (block, _) in ENCODED {
        for value in [0.0, 0.75, -2.0, 1e-30, 3e4] {
            let read = there_and_back(block, &[value; SUPER]);
            for x in read {
                assert!(
                    (x - value).abs() <= 0.01 * value.abs().max(1e-6),
                    "{block:?} {value} {x}"
                );
            }
        }
        let mut one = [0.0; SUPER];
        one[100] = -5.0;
        let read = there_and_back(block, &one);
        assert!((read[100] + 5.0).abs() < 0.05, "{block:?} {}", read[100]);
        assert!(read.iter().filter(|x| x.abs() > 0.05).count() == 1);
    }
}
