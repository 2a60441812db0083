//! The rows of a step by the experts that they go to, and the work on them cut into units.

use std::ops::Range;

/// Rows that are quantized, and multiplied, side by side.
pub(super) const BLOCK: usize = 4;
/// Rows of a unit of work at most: the kernels read a strip of weights once for all of them.
const ROWS: usize = 64;
/// Tiles of a strip.
const TILES: usize = 3;
/// Units for each thread: enough for those that others hold up to leave work to the rest.
const UNITS: usize = 8;

/// The rows that go to one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) expert: usize,
    /// The first of its pairs, in their order by expert.
    pub(super) first: usize,
    pub(super) rows: usize,
    /// Rows of the groups before it, each filled up to whole blocks of quantized rows.
    pub(super) padded: usize,
}

/// Some rows of a group with one matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) group: usize,
    /// Which of the matrices that read the same rows.
    pub(super) matrix: usize,
    pub(super) tiles: Range<usize>,
    pub(super) rows: Range<usize>,
}

/// Pairs of a row and an expert, in the order of the experts and, for each, of the rows. Every thread has one of its own, all the
/// same: it costs less than to wait for one that another thread makes.
#[derive(Debug, Default)]
pub(super) struct Grouping {
    pub(super) groups: Vec<Group>,
    /// For each place in the order, the pair: its row times `top_k` plus its place in the row's choice.
    pub(super) pairs: Vec<u32>,
    /// The place of each pair.
    pub(super) places: Vec<u32>,
    /// Of each block of rows, its group and the first of its rows in the group.
    pub(super) blocks: Vec<(u32, u32)>,
    pub(super) units: Vec<Unit>,
    ends: Vec<u32>,
}

/// Rows that the records of so many quantized rows take.
const fn padded_rows(rows: usize) -> usize {
    if rows == 1 {
        1
    } else {
        rows.next_multiple_of(BLOCK)
    }
}

/// At most so many rows, with padding, and groups come of `pairs` pairs with so many experts.
pub(super) fn most(pairs: usize, experts: usize) -> (usize, usize) {
    let groups = pairs.min(experts);
    (pairs + (BLOCK - 1) * groups, groups)
}

impl Grouping {
    /// Groups `rows` rows, of which `expert(row, j)` is the expert of the j-th place.
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
            // From here on the place of the next pair.
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

    /// Cuts the product of each group's rows with `matrices` matrices of `tiles` tiles, into units of like cost.
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
