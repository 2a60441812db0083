use super::*;
use crate::cpu::memory::Aligned;
use crate::cpu::pool::Pool;
use crate::cpu::quant::{BlockType, GROUP};
use crate::error::Result;

/// The types of blocks that are multiplied as they are stored.
pub(in crate::cpu) const BLOCKS: [BlockType; 17] = [
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q8_0,
    BlockType::Q4_K,
    BlockType::Q5_K,
    BlockType::Q6_K,
    BlockType::Q3_K,
    BlockType::IQ4_NL,
    BlockType::IQ4_XS,
    BlockType::MXFP4,
    BlockType::NVFP4,
    BlockType::TQ1_0,
    BlockType::TQ2_0,
    BlockType::Q2_K,
    BlockType::IQ2,
];

/// Numbers between -1 and 1, the same for the same seed.
fn noise(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Blocks with random integers and sane scales.
fn blocks(block: BlockType, elements: usize) -> Vec<u8> {
    let count = elements / block.elements();
    let mut bytes: Vec<u8> = noise(5, count * block.bytes())
        .iter()
        .map(|x| (x * 128.0) as i8 as u8)
        .collect();
    for (i, one) in bytes.chunks_exact_mut(block.bytes()).enumerate() {
        let scale = f32_to_f16(0.01 + 0.001 * (i % 7) as f32).to_le_bytes();
        let at = match block {
            BlockType::Q6_K => 208,
            BlockType::Q3_K => 108,
            BlockType::TQ1_0 => 52,
            BlockType::TQ2_0 => 64,
            BlockType::Q2_K => 80,
            BlockType::IQ2 => 144,
            _ => 0,
        };
        match block {
            BlockType::MXFP4 => one[0] = 118 + (i % 5) as u8,
            BlockType::NVFP4 => one[..4].fill(0x28 + (i % 7) as u8),
            _ => one[at..at + 2].copy_from_slice(&scale),
        }
        if block == BlockType::IQ2 {
            for scale in &mut one[128..144] {
                *scale &= 0x7f;
            }
        }
        if block.code().min {
            one[at + 2..at + 4]
                .copy_from_slice(&f32_to_f16(-0.05 + 0.01 * (i % 5) as f32).to_le_bytes());
        }
    }
    bytes
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn one(isa: Isa, matrix: Matrix) -> Result<Linear> {
    Linear::pack(isa, &Pool::new(2), &[matrix]).map(|mut layers| layers.remove(0))
}

fn float(isa: Isa, format: Format, out: usize, cols: usize, bias: bool) -> Linear {
    let bytes = little_endian(&noise(1, out * cols));
    let bias = bias.then(|| noise(2, out));
    let matrix = Matrix {
        stored: Stored::Floats(FloatType::F32, format),
        rows: out,
        columns: cols,
        bytes: &bytes,
        bias: bias.as_deref(),
    };
    one(isa, matrix).unwrap()
}

fn gguf(
    isa: Isa,
    block: BlockType,
    (rows, columns): (usize, usize),
    bytes: &[u8],
) -> Result<Linear> {
    let matrix = Matrix {
        stored: Stored::Blocks(block),
        rows,
        columns,
        bytes,
        bias: None,
    };
    one(isa, matrix)
}

/// Layers of all codes and formats, of whole and broken tiles and groups.
fn layers(isa: Isa) -> Vec<(String, Linear)> {
    let mut layers = Vec::new();
    for format in [
        Format::F32,
        Format::F16,
        Format::Bf16,
        Format::Int8,
        Format::Int4,
    ] {
        for (out, cols, bias) in [
            (96, 64, false),
            (37, 70, true),
            (1, 1, true),
            (130, 256, true),
        ] {
            let name = format!("{format:?} {out}x{cols}");
            layers.push((name, float(isa, format, out, cols, bias)));
        }
    }
    for block in BLOCKS {
        let shape = (70, 512);
        let bytes = blocks(block, shape.0 * shape.1);
        let layer = gguf(isa, block, shape, &bytes).unwrap();
        layers.push((format!("{block:?}"), layer));
    }
    layers
}

fn forward(pool: &Pool, layer: &Linear, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / layer.in_features();
    let mut y = vec![f32::NAN; rows * layer.out_features()];
    let mut scratch = Aligned::zeroed(layer.scratch_bytes(rows));
    let (y_shared, scratch) = (SharedSlice::new(&mut y), SharedSlice::new(&mut scratch));
    let x = SharedSlice::read_only(x);
    // SAFETY: nobody else has the buffers.
    pool.run(&|team| unsafe { layer.forward(team, x, rows, y_shared, scratch) });
    y
}

/// The result in f64 for rows of activations, and the largest error that 8-bit activations and f32 sums may cause.
fn expected(layer: &Linear, x: &[f32]) -> Vec<(f64, f64)> {
    let (out, cols) = (layer.out_features(), layer.in_features());
    let mut weights = vec![0.0; out * cols];
    for (row, weights) in weights.chunks_mut(cols).enumerate() {
        layer.dequantize_row(row, weights);
    }
    let mut results = Vec::new();
    for x in x.chunks(cols) {
        for (o, w) in weights.chunks(cols).enumerate() {
            let (mut sum, mut bound) = (0.0, 0.0);
            for (w, x) in w.chunks(GROUP).zip(x.chunks(GROUP)) {
                let high = x.iter().fold(0.0, |max: f32, &x| max.max(x));
                let low = x.iter().fold(0.0, |min: f32, &x| min.min(x));
                let scale = (high - low) / 254.0;
                for (&w, &x) in w.iter().zip(x) {
                    sum += f64::from(w) * f64::from(x);
                    bound += f64::from(w.abs() * x.abs()) * 1e-6;
                    if layer.is_quantized() {
                        bound += f64::from(w.abs() * scale) * 0.501;
                    }
                }
            }
            let bias = layer.bias.as_ref().map_or(0.0, |bias| bias[o]);
            results.push((sum + f64::from(bias), bound + 1e-6));
        }
    }
    results
}

#[test]
fn every_format_on_every_instruction_set_is_as_exact_as_its_activations() {
    let pool = Pool::new(2);
    for isa in Isa::available() {
        for (name, layer) in layers(isa) {
            for rows in [1, 2, 3, 4, 5, 7, 66] {
                // Every second row is on one side of zero.
                let cols = layer.in_features();
                let mut x = noise(3, rows * cols);
                for row in x.chunks_mut(cols).step_by(2) {
                    for x in row {
                        *x += 1.25;
                    }
                }
                let y = forward(&pool, &layer, &x);
                for (i, (&y, (sum, bound))) in y.iter().zip(expected(&layer, &x)).enumerate() {
                    let error = (f64::from(y) - sum).abs();
                    assert!(
                        error <= bound,
                        "{} {name}, {rows} rows, at {i}: {y} is not within {bound} of {sum}",
                        isa.name()
                    );
                }
            }
        }
    }
}

/// With activations that are integers already, 8 bits lose nothing, and all instruction sets differ only in rounding f32 sums.
#[test]
fn every_instruction_set_gives_what_the_portable_one_gives() {
    let pool = Pool::new(2);
    let portable = layers(Isa::Portable);
    for isa in Isa::available() {
        for ((name, layer), (_, reference)) in layers(isa).iter().zip(&portable) {
            for rows in [1, 6] {
                let x: Vec<f32> = noise(4, rows * layer.in_features())
                    .chunks(GROUP)
                    .flat_map(|group| {
                        // Steps of 1 from -27 to 227.
                        let mut group: Vec<f32> =
                            group.iter().map(|x| (x * 127.0).trunc() + 100.0).collect();
                        group[0] = 227.0;
                        if let Some(least) = group.get_mut(1) {
                            *least = -27.0;
                        }
                        group
                    })
                    .collect();
                let sums = forward(&pool, reference, &x);
                let magnitude = sums.iter().fold(0.0, |max: f32, y| max.max(y.abs()));
                for (&y, &sum) in forward(&pool, layer, &x).iter().zip(&sums) {
                    let error = (y - sum).abs();
                    assert!(
                        error <= magnitude * 2e-6,
                        "{} {name}: {y} {sum}",
                        isa.name()
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    let pools = [Pool::new(1), Pool::new(3)];
    for isa in Isa::available() {
        for (name, layer) in layers(isa) {
            let (rows, cols, out) = (70, layer.in_features(), layer.out_features());
            let x = noise(6, rows * cols);
            let all = forward(&pools[1], &layer, &x);
            for (first, count) in [(0, 1), (69, 1), (3, 2), (5, 3), (1, 4), (10, 21)] {
                let some = forward(&pools[0], &layer, &x[first * cols..(first + count) * cols]);
                let same = some
                    .iter()
                    .zip(&all[first * out..])
                    .all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(
                    same,
                    "{} {name}: rows {first} to {}",
                    isa.name(),
                    first + count
                );
            }
        }
    }
}

#[test]
fn matrices_side_by_side_are_one_layer_where_they_fit_together() {
    let pool = Pool::new(2);
    let isa = Isa::detect();
    let bytes = little_endian(&noise(1, 600 * 64));
    let biases = noise(2, 600);
    let matrix = |format, first: usize, rows: usize, bias: bool| Matrix {
        stored: Stored::Floats(FloatType::F32, format),
        rows,
        columns: 64,
        bytes: &bytes[first * 256..(first + rows) * 256],
        bias: bias.then(|| &biases[first..first + rows]),
    };
    let x = noise(7, 2 * 64);
    for format in [Format::F32, Format::Bf16, Format::Int4] {
        let parts = [
            matrix(format, 0, 32, true),
            matrix(format, 32, 528, true),
            matrix(format, 560, 20, true),
        ];
        let layers = Linear::pack(isa, &pool, &parts).unwrap();
        assert_eq!(layers.len(), 1);
        assert_eq!(
            (layers[0].out_features(), layers[0].in_features()),
            (580, 64)
        );
        let y = forward(&pool, &layers[0], &x);
        let each = parts.map(|part| forward(&pool, &one(isa, part).unwrap(), &x));
        let row = |row: usize| {
            let each = each
                .each_ref()
                .map(|y| &y[row * y.len() / 2..(row + 1) * y.len() / 2]);
            each.concat()
        };
        assert_eq!(y, [row(0), row(1)].concat(), "{format:?}");
    }
    let narrow = Matrix {
        columns: 32,
        ..matrix(Format::Int4, 0, 64, false)
    };
    let unlike = [
        vec![
            matrix(Format::Int4, 0, 20, false),
            matrix(Format::Int4, 0, 32, false),
        ],
        vec![
            matrix(Format::Int4, 0, 32, false),
            matrix(Format::Int8, 0, 32, false),
        ],
        vec![
            matrix(Format::F32, 0, 32, false),
            matrix(Format::F32, 0, 32, true),
        ],
        vec![
            matrix(Format::Int4, 0, 32, false),
            Matrix {
                bytes: &narrow.bytes[..64 * 32 * 4],
                ..narrow
            },
        ],
        vec![],
    ];
    for parts in unlike {
        let layers = Linear::pack(isa, &pool, &parts).unwrap();
        assert_eq!(layers.len(), parts.len());
        for (layer, part) in layers.iter().zip(&parts) {
            assert_eq!(layer.out_features(), part.rows);
        }
    }
}

#[test]
fn floats_are_read_from_every_type() {
    let pool = Pool::new(1);
    // Exact in 16 bits of either kind.
    let values: Vec<f32> = (0..16 * 8).map(|i| (i % 13) as f32 - 6.0).collect();
    let half = |f: fn(f32) -> u16| -> Vec<u8> {
        values
            .iter()
            .flat_map(|&value| f(value).to_le_bytes())
            .collect()
    };
    let x = noise(9, 8);
    let results = [
        (FloatType::F32, little_endian(&values)),
        (FloatType::F16, half(f32_to_f16)),
        (FloatType::Bf16, half(f32_to_bf16)),
    ]
    .map(|(float, bytes)| {
        let matrix = Matrix {
            stored: Stored::Floats(float, Format::F32),
            rows: 16,
            columns: 8,
            bytes: &bytes,
            bias: None,
        };
        forward(&pool, &one(Isa::Portable, matrix).unwrap(), &x)
    });
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
    let expected: f32 = values[..8].iter().zip(&x).map(|(w, x)| w * x).sum();
    assert!((results[0][0] - expected).abs() < 1e-5);
}

#[test]
fn several_layers_read_rows_that_any_thread_has_quantized() {
    let pool = Pool::new(2);
    let isa = Isa::detect();
    let layer = float(isa, Format::Int8, 48, 96, false);
    let x = noise(8, 5 * 96);
    let mut scratch = Aligned::zeroed(QuantizedRows::bytes(5, 96));
    let rows = QuantizedRows::new(SharedSlice::new(&mut scratch), 5, 96);
    let mut results = [vec![0.0; 5 * 48], vec![0.0; 5 * 48]];
    let outputs = results.each_mut().map(|y| SharedSlice::new(y));
    pool.run(&|team| {
        team.for_chunks(5, 1, |range| {
            for row in range {
                // SAFETY: the rows are disjoint.
                unsafe { rows.set_rows(isa, row..row + 1, &x[row * 96..(row + 1) * 96]) };
            }
        });
        for y in outputs {
            // SAFETY: the rows are written, and each result is this layer's alone.
            unsafe { layer.forward_quantized(team, &rows, y) };
        }
    });
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], forward(&pool, &layer, &x));
}

#[test]
fn wrong_sizes_are_refused_with_their_numbers() {
    let isa = Isa::Portable;
    let message = |result: Result<Linear>| result.err().unwrap().message;
    let matrix = Matrix {
        stored: Stored::Floats(FloatType::F32, Format::F32),
        rows: 4,
        columns: 4,
        bytes: &[0; 48],
        bias: None,
    };
    assert_eq!(
        message(one(isa, matrix)),
        "a F32 weight of shape [4, 4] has 64 bytes in whole blocks, but 48 bytes were given"
    );
    let biased = Matrix {
        columns: 3,
        bias: Some(&[0.0; 3]),
        ..matrix
    };
    assert_eq!(
        message(one(isa, biased)),
        "a linear layer of 4 outputs takes as many biases, but 3 were given"
    );
    assert_eq!(
        message(gguf(isa, BlockType::Q4_1, (1, 64), &[0; 39])),
        "a Q4_1 weight of shape [1, 64] has 40 bytes in whole blocks, but 39 bytes were given"
    );
    assert!(gguf(isa, BlockType::Q4_K, (2, 128), &[0; 144]).is_err());
}

#[test]
fn packed_bytes_are_those_of_the_packed_layer() {
    for format in [
        Format::F32,
        Format::F16,
        Format::Bf16,
        Format::Int8,
        Format::Int4,
    ] {
        let stored = Stored::Floats(FloatType::F32, format);
        let linear = float(Isa::Portable, format, 40, 64, false);
        assert_eq!(packed_bytes(stored, 40, 64), linear.bytes(), "{format:?}");
    }
    for (at, block) in BLOCKS.into_iter().enumerate() {
        let bytes = blocks(block, 40 * 512);
        let linear = gguf(Isa::Portable, block, (40, 512), &bytes).unwrap();
        let expected = packed_bytes(Stored::Blocks(block), 40, 512);
        assert_eq!(linear.bytes(), expected, "{block:?}");
        // What follows Q6_K takes the layout of another type.
        if at > 7 {
            continue;
        }
        // In whole tiles: what the file takes, but for the sixth bit of five and 8 bits for 6-bit scales.
        let sixth = usize::from(block.code().bits == 6 && block != BlockType::Q6_K);
        let scales = 4 * usize::from(block.code().nested && block.code().min);
        let blocks = 48 * 512 / block.elements();
        assert_eq!(
            expected,
            blocks * (block.bytes() + sixth * block.elements() / 8 + scales),
            "{block:?}"
        );
    }
}
