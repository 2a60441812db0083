//! The products with floats, written once for the vectors of every instruction set.

/// What a weight is, for constants of kernels.
pub(super) const F32: u8 = 0;
pub(super) const F16: u8 = 1;
pub(super) const BF16: u8 = 2;

/// Defines `floats`, which multiplies the rows of a task with its tiles. The arguments name what differs between instruction
/// sets: the vector of `$lanes` numbers and what loads and combines it, and how many tiles are multiplied at once.
macro_rules! float_kernel {
    (
        features: $features:literal,
        vector: $vector:ty, lanes: $lanes:expr, tiles at once: $columns:literal,
        zero: $zero:expr,
        broadcast: $broadcast:expr,
        load f32: $load_f32:expr,
        load f16: $load_f16:expr,
        load bf16: $load_bf16:expr,
        multiply_add: $multiply_add:expr,
        store: $store:path $(,)?
    ) => {
        /// # Safety
        /// As for [`integers`].
        pub(in crate::cpu::linear) unsafe fn floats(
            task: &crate::cpu::linear::floats::Task,
            tiles: std::ops::Range<usize>,
            rows: std::ops::Range<usize>,
        ) {
            use crate::cpu::linear::Format;
            use crate::cpu::linear::floats::Data;
            use crate::cpu::linear::kernels::floats::{BF16, F16, F32};

            // SAFETY: the caller's promise.
            unsafe {
                match (&task.weights.data, task.weights.format) {
                    (Data::Full(data), _) => {
                        float_strips::<F32>(task, data.as_ptr().cast(), tiles, rows);
                    }
                    (Data::Half(data), Format::Bf16) => {
                        float_strips::<BF16>(task, data.as_ptr().cast(), tiles, rows);
                    }
                    (Data::Half(data), _) => {
                        float_strips::<F16>(task, data.as_ptr().cast(), tiles, rows);
                    }
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn float_strips<const KIND: u8>(
            task: &crate::cpu::linear::floats::Task,
            data: *const u8,
            tiles: std::ops::Range<usize>,
            rows: std::ops::Range<usize>,
        ) {
            use crate::cpu::linear::kernels::by_rows;

            let mut tile = tiles.start;
            while tile < tiles.end {
                // SAFETY: the caller's promise.
                unsafe {
                    if tiles.end - tile >= $columns {
                        by_rows!(float_strip::<KIND>(task, data, tile) by $columns, rows);
                        tile += $columns;
                    } else {
                        by_rows!(float_strip::<KIND>(task, data, tile) by 1, rows);
                        tile += 1;
                    }
                }
            }
        }

        /// Rows `row` to `row + R` in the tiles `tile` to `tile + C`.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn float_strip<const KIND: u8, const R: usize, const C: usize>(
            task: &crate::cpu::linear::floats::Task,
            data: *const u8,
            tile: usize,
            row: usize,
        ) {
            use crate::cpu::linear::TILE;
            use crate::cpu::linear::kernels::floats::{F16, F32};

            /// Vectors of a tile.
            const PARTS: usize = TILE / $lanes;
            let size = if KIND == F32 { 4 } else { 2 };
            let stride = task.cols * TILE * size;
            // SAFETY: all reads lie within the task's buffers, all writes within its tiles and rows.
            unsafe {
                let mut sums = [[[$zero; PARTS]; C]; R];
                let mut data = data.add(tile * stride);
                let x = task.x.add(row * task.cols);
                for k in 0..task.cols {
                    let mut w = [[$zero; PARTS]; C];
                    for c in 0..C {
                        for part in 0..PARTS {
                            let from = data.add(c * stride + part * $lanes * size);
                            w[c][part] = match KIND {
                                F32 => $load_f32(from),
                                F16 => $load_f16(from),
                                _ => $load_bf16(from),
                            };
                        }
                    }
                    for r in 0..R {
                        let x: $vector = $broadcast(*x.add(r * task.cols + k));
                        for c in 0..C {
                            for part in 0..PARTS {
                                sums[r][c][part] = $multiply_add(w[c][part], x, sums[r][c][part]);
                            }
                        }
                    }
                    data = data.add(TILE * size);
                }
                for r in 0..R {
                    for c in 0..C {
                        $store(&task.output, row + r, tile + c, sums[r][c]);
                    }
                }
            }
        }
    };
}

pub(super) use float_kernel;
