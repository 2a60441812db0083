//! Groups the rows of a step by expert, and divides the work on them into units.

use std::ops::Range;

/// Number of rows that are quantized and multiplied together.
pub(super) const BLOCK: usize = 4;
/// Maximum number of rows of a unit: the kernels read a strip of weights once for all of them.
const ROWS: usize = 64;
/// Number of tiles of a strip.
const TILES: usize = 3;
/// Number of units for each thread: enough that other threads can take over the work of one that was delayed.
const UNITS: usize = 8;

/// The rows of one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) expert: usize,
    /// Index of the first of its pairs, in the order by expert.
    pub(super) first: usize,
    pub(super) rows: usize,
    /// Number of rows of the groups before it, each padded to whole blocks of quantized rows.
    pub(super) padded: usize,
}

/// Some rows of a group, to be multiplied by one matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) group: usize,
    /// Index of the matrix among those that read the same rows.
    pub(super) matrix: usize,
    pub(super) tiles: Range<usize>,
    pub(super) rows: Range<usize>,
}

/// The pairs of a row and an expert, ordered by expert and then by row. Every thread computes them for itself, because that takes
/// less time than waiting for another thread.
#[derive(Debug, Default)]
pub(super) struct Grouping {
    pub(super) groups: Vec<Group>,
    /// The pair at each index of the order: its row times `top_k`, plus its index in the row's choice.
    pub(super) pairs: Vec<u32>,
    /// The index of each pair.
    pub(super) places: Vec<u32>,
    /// For each block of rows, its group and its first row in the group.
    pub(super) blocks: Vec<(u32, u32)>,
    pub(super) units: Vec<Unit>,
    ends: Vec<u32>,
}

/// Number of rows whose records these quantized rows take.
const fn padded_rows(rows: usize) -> usize {
    if rows == 1 {
        1
    } else {
        rows.next_multiple_of(BLOCK)
    }
}

/// The maximum number of padded rows and of groups for `pairs` pairs and this number of experts.
pub(super) fn most(pairs: usize, experts: usize) -> (usize, usize) {
    let groups = pairs.min(experts);
    (pairs + (BLOCK - 1) * groups, groups)
}

impl Grouping {
    /// Groups `rows` rows. `expert(row, j)` is the j-th expert of a row.
    pub(super) fn group(
        &mut self,
        experts: usize,
        (rows, top_k): (usize, usize),
        expert: impl Fn(usize, usize) -> usize,
    ) {
        let count = rows * top_k;
        self.ends.clear();
        self.ends.resize(experts, 0);
        for pair in 0..count {
            self.ends[expert(pair / top_k, pair % top_k)] += 1;
        }
        self.groups.clear();
        self.blocks.clear();
        let (mut first, mut padded) = (0, 0);
        for (expert, end) in self.ends.iter_mut().enumerate() {
            let rows = *end as usize;
            // From here on, the index of the next pair.
            *end = first as u32;
            if rows > 0 {
                let group = self.groups.len() as u32;
                let starts = (0..rows).step_by(BLOCK);
                self.blocks.extend(starts.map(|row| (group, row as u32)));
                self.groups.push(Group {
                    expert,
                    first,
                    rows,
                    padded,
                });
                padded += padded_rows(rows);
            }
            first += rows;
        }
        self.pairs.resize(count, 0);
        self.places.resize(count, 0);
        for pair in 0..count {
            let end = &mut self.ends[expert(pair / top_k, pair % top_k)];
            self.pairs[*end as usize] = pair as u32;
            self.places[pair] = *end;
            *end += 1;
        }
    }

    /// Divides the products of each group's rows and `matrices` matrices of `tiles` tiles into units of similar cost.
    pub(super) fn cut(&mut self, matrices: usize, tiles: usize, threads: usize) {
        let blocks = self.blocks.len().max(1);
        let target = (matrices * tiles * blocks).div_ceil(UNITS * threads);
        self.units.clear();
        for (at, group) in self.groups.iter().enumerate() {
            let rows = group.rows.min(ROWS);
            let step = target.div_ceil(rows.div_ceil(BLOCK));
            let step = if group.rows == 1 {
                step
            } else {
                step.next_multiple_of(TILES)
            };
            for matrix in 0..matrices {
                for first_row in (0..group.rows).step_by(ROWS) {
                    for first in (0..tiles).step_by(step) {
                        self.units.push(Unit {
                            group: at,
                            matrix,
                            tiles: first..tiles.min(first + step),
                            rows: first_row..group.rows.min(first_row + ROWS),
                        });
                    }
                }
            }
        }
    }
}
