//! One unit of attention's work: some tokens of one sequence, with one key-value head and the query heads that share it.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::super::memory::{Aligned, SharedSlice};
use super::super::simd::{Kernel, MAX_ROWS, Simd};
use super::block::{
    Ahead, Convert, Mix, SUM_LANES, Scores, Softmax, SumWeights, TILE, TILE_PAGES, Weigh,
};
use super::cache::{Element, Half, HeadPage, KvType, KvView, PAGE};
use super::distances::Distances;

/// Number of keys of a split. Every split is computed separately, and the splits are merged in order, so the result does not depend
/// on the threads.
pub(super) const SPLIT: usize = 256;
/// Maximum number of rows (one for each query head of a token) for which keys and values are read as stored. For more rows, they
/// are converted first.
pub(super) const NARROW_ROWS: usize = 2 * MAX_ROWS;

/// The blocks of a sequence's tokens.
#[derive(Clone, Copy)]
pub struct Sequence<'a> {
    /// Its block ids.
    pub table: &'a [i32],
    /// Tokens of a block, a multiple of [`PAGE`].
    pub block_size: usize,
}

impl Sequence<'_> {
    /// The page that holds `position`.
    #[inline]
    fn page(&self, position: usize) -> usize {
        let block = self.table[position / self.block_size] as usize;
        (block * self.block_size + position % self.block_size) / PAGE
    }
}

/// The tokens of one sequence with one key-value head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unit {
    /// The sequence's index in the step.
    pub(super) sequence: usize,
    /// Index of the part of a key-value head's query heads, counted over all key-value heads.
    pub(super) part: usize,
    /// The first token among the step's.
    pub(super) first_token: usize,
    /// Its position in the sequence.
    pub(super) first_position: usize,
    pub(super) tokens: usize,
    /// Number of keys that its last token sees.
    pub(super) context: usize,
    /// The position of its first tile: a multiple of [`TILE`].
    pub(super) first_key: usize,
    /// The splits to compute.
    pub(super) first_split: usize,
    pub(super) splits: usize,
    /// Index of the partial result for these splits, if they are not all.
    pub(super) partial: Option<usize>,
}

impl Unit {
    /// The position of the first tile of split `split`.
    fn start(&self, split: usize) -> usize {
        self.first_key.max(split * SPLIT)
    }
}

/// A thread's buffers.
pub(super) struct UnitScratch {
    floats: Aligned<f32>,
    softmax: Vec<Softmax>,
    totals: Vec<Softmax>,
}

impl UnitScratch {
    /// Buffers for units of at most `rows` rows.
    pub(super) fn new(rows: usize, head_dim: usize, width: usize) -> Self {
        let row = head_dim + 2 * width + SUM_LANES;
        let floats = rows * row + MAX_ROWS * TILE + TILE * (head_dim + width);
        Self {
            floats: Aligned::zeroed(floats),
            softmax: vec![Softmax::EMPTY; rows],
            totals: vec![Softmax::EMPTY; rows],
        }
    }
}

/// The state that all units of a layer share.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a> {
    pub(super) cache: KvView<'a>,
    /// Query heads of a part.
    pub(super) group: usize,
    /// Parts of a key-value head.
    pub(super) parts: usize,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) window: Option<usize>,
    pub(super) causal: bool,
    /// One for each query head.
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) distances: Option<&'a Distances>,
    /// Rows of `stride`, each beginning with `heads * head_dim` queries.
    pub(super) queries: SharedSlice<'a, f32>,
    pub(super) stride: usize,
    /// Rows of `heads * head_dim`.
    pub(super) out: SharedSlice<'a, f32>,
    pub(super) partials: SharedSlice<'a, f32>,
}

impl Layer<'_> {
    /// Number of elements of a partial result of `rows` rows: their sums, followed by the softmax of each.
    pub(super) fn partial_len(&self, rows: usize) -> usize {
        rows * (self.cache.shape().width() + 2)
    }

    /// The place of row `row` of a unit in rows of `stride`.
    pub(super) fn at(&self, unit: &Unit, row: usize, stride: usize) -> Range<usize> {
        let head_dim = self.cache.shape().head_dim;
        let (token, head) = (row / self.group, row % self.group);
        let start =
            (unit.first_token + token) * stride + (unit.part * self.group + head) * head_dim;
        start..start + head_dim
    }

    /// Writes the means of row `row` of a unit.
    pub(super) fn finish(&self, unit: &Unit, row: usize, sums: &[f32], softmax: Softmax) {
        // SAFETY: every unit has rows and heads of its own.
        let to = unsafe { self.out.get_mut(self.at(unit, row, self.out_stride())) };
        let head = unit.part * self.group + row % self.group;
        let inverse = softmax.inverse(self.sinks.map(|sinks| sinks[head] * LOG2_E));
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = sum * inverse;
        }
    }

    /// Elements of a row of `out`.
    pub(super) fn out_stride(&self) -> usize {
        let shape = self.cache.shape();
        shape.kv_heads * self.parts * self.group * shape.head_dim
    }
}

/// Computes one unit.
pub(super) struct Attend<'a> {
    pub(super) layer: Layer<'a>,
    pub(super) unit: Unit,
    pub(super) sequence: Sequence<'a>,
    /// The unit that the thread will probably compute next.
    pub(super) next: Option<(Unit, Sequence<'a>)>,
    pub(super) scratch: &'a mut UnitScratch,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.layer.cache.shape().dtype {
            KvType::F32 => self.attend::<S, f32>(s),
            KvType::F16 => self.attend::<S, Half>(s),
            KvType::I8 => self.attend::<S, i8>(s),
        }
    }
}

/// The buffers of a unit's rows.
struct Rows<'a> {
    queries: &'a [f32],
    sums: &'a mut [f32],
    scores: &'a mut [f32],
    /// Running sums of the weights of each row.
    weights: &'a mut [f32],
    softmax: &'a mut [Softmax],
    head_dim: usize,
    width: usize,
    /// The position of row 0. Every `group` rows, the next position begins.
    first_position: usize,
    group: usize,
    /// Number of keys.
    context: usize,
    /// Number of keys that a row sees up to its position, and after it.
    window: (usize, usize),
    softcap: Option<f32>,
    /// With the index of row 0's head.
    distances: Option<(&'a Distances, usize)>,
}

/// The pages of one tile, as stored.
struct Tile {
    pages: [HeadPage; TILE_PAGES],
    /// The position of its first key.
    start: usize,
}

impl Tile {
    /// The first tile that `unit` reads.
    fn first(layer: &Layer, unit: &Unit, sequence: &Sequence) -> Self {
        Self::new(layer, unit, sequence, unit.start(unit.first_split))
    }

    /// The tile of `unit` that begins at position `start`.
    #[inline]
    fn new(layer: &Layer, unit: &Unit, sequence: &Sequence, start: usize) -> Self {
        let last = unit.context - 1;
        let page = |p: usize| {
            // Beyond the context any page can be used: its results are not seen.
            let position = last.min(start + p * PAGE);
            layer
                .cache
                .head(sequence.page(position), unit.part / layer.parts)
        };
        Self {
            pages: [page(0), page(1), page(2), page(3)],
            start,
        }
    }
}

impl Attend<'_> {
    /// Not inlined, so that only the small kernels are compiled with the instruction set. The compiler handles a large function
    /// badly.
    #[inline(never)]
    #[allow(
        clippy::too_many_lines,
        reason = "the memory of a unit is laid out and used in one place"
    )]
    fn attend<S: Simd, E: Element>(self, s: S) {
        let Self {
            layer,
            unit,
            sequence,
            next,
            scratch,
        } = self;
        let shape = layer.cache.shape();
        let (head_dim, width) = (shape.head_dim, shape.width());
        let count = unit.tokens * layer.group;
        let (queries, rest) = scratch.floats.split_at_mut(count * head_dim);
        let (sums, rest) = rest.split_at_mut(count * width);
        let (totals, rest) = rest.split_at_mut(count * width);
        let (weights, rest) = rest.split_at_mut(count * SUM_LANES);
        let (score_rows, rest) = rest.split_at_mut(MAX_ROWS * TILE);
        let (key_tile, value_tile) = rest.split_at_mut(TILE * head_dim);
        // Weights are powers of 2.
        let (scale, softcap) = match layer.softcap {
            Some(cap) => (layer.scale / cap, Some(cap * LOG2_E)),
            None => (layer.scale * LOG2_E, None),
        };
        for (row, packed) in queries.chunks_exact_mut(head_dim).enumerate() {
            // SAFETY: queries are only read in this phase.
            let query = unsafe { layer.queries.get(layer.at(&unit, row, layer.stride)) };
            for (to, from) in packed.iter_mut().zip(query) {
                *to = from * scale;
            }
        }
        let mut rows = Rows {
            queries,
            sums,
            scores: score_rows,
            weights,
            softmax: &mut scratch.softmax[..count],
            head_dim,
            width,
            first_position: unit.first_position,
            group: layer.group,
            context: unit.context,
            window: match (layer.window, layer.causal) {
                (window, true) => (window.unwrap_or(usize::MAX), 0),
                (Some(window), false) => (window, window - 1),
                (None, false) => (usize::MAX, usize::MAX),
            },
            softcap,
            distances: layer
                .distances
                .map(|distances| (distances, unit.part * layer.group)),
        };
        let total_softmax = &mut scratch.totals[..count];
        if unit.splits > 1 {
            totals.fill(0.0);
            total_softmax.fill(Softmax::EMPTY);
        }
        let context = unit.context;
        let last = context.min((unit.first_split + unit.splits) * SPLIT);
        let mut tile = Tile::first(&layer, &unit, &sequence);
        for split in unit.first_split..unit.first_split + unit.splits {
            rows.sums.fill(0.0);
            rows.weights.fill(0.0);
            rows.softmax.fill(Softmax::EMPTY);
            let end = context.min((split + 1) * SPLIT);
            for start in (unit.start(split)..end).step_by(TILE) {
                let ahead = if start + TILE < last {
                    Some(Tile::new(&layer, &unit, &sequence, start + TILE))
                } else {
                    next.map(|(unit, sequence)| Tile::first(&layer, &unit, &sequence))
                };
                if count <= NARROW_ROWS {
                    rows.add_tile::<S, E>(s, &tile, ahead.as_ref(), shape.dtype);
                } else {
                    rows.add_converted_tile::<S, E>(s, &tile, key_tile, value_tile, shape.dtype);
                }
                if let Some(ahead) = ahead {
                    tile = ahead;
                }
            }
            s.vectorize(SumWeights {
                softmax: rows.softmax,
                sums: rows.weights,
            });
            if unit.splits > 1 {
                for (row, total) in total_softmax.iter_mut().enumerate() {
                    let part = row * width..(row + 1) * width;
                    let (ours, theirs) = total.merge(rows.softmax[row]);
                    merge_sums(&mut totals[part.clone()], &rows.sums[part], ours, theirs);
                }
            }
        }
        let (sums, softmax): (&[f32], &[Softmax]) = if unit.splits > 1 {
            (totals, total_softmax)
        } else {
            (rows.sums, rows.softmax)
        };
        if let Some(partial) = unit.partial {
            // SAFETY: every unit has its own partial result.
            let to = unsafe {
                layer
                    .partials
                    .get_mut(partial..partial + layer.partial_len(count))
            };
            let (to_sums, to_softmax) = to.split_at_mut(sums.len());
            to_sums.copy_from_slice(sums);
            for (to, softmax) in to_softmax.chunks_exact_mut(2).zip(softmax) {
                to.copy_from_slice(&[softmax.base, softmax.sum]);
            }
            return;
        }
        for (row, softmax) in softmax.iter().enumerate() {
            layer.finish(&unit, row, &sums[row * width..], *softmax);
        }
    }
}

/// Adds the sums of a further split. The factors come from [`Softmax::merge`].
pub(super) fn merge_sums(total: &mut [f32], further: &[f32], ours: f32, theirs: f32) {
    for (total, further) in total.iter_mut().zip(further) {
        *total = *total * ours + further * theirs;
    }
}

impl Rows<'_> {
    /// Reads a tile as it is stored.
    fn add_tile<S: Simd, E: Element>(
        &mut self,
        s: S,
        tile: &Tile,
        ahead: Option<&Tile>,
        dtype: KvType,
    ) {
        let keys = tile.pages.map(HeadPage::keys::<E>);
        let values = tile.pages.map(HeadPage::values::<E>);
        let ahead = ahead.map(|tile| {
            [
                Ahead(tile.pages.map(|page| page.keys::<E>().cast())),
                Ahead(tile.pages.map(|page| page.values::<E>().cast())),
            ]
        });
        self.add(s, tile, (keys, PAGE), values, ahead, dtype);
    }

    /// Converts a tile for all rows to read.
    fn add_converted_tile<S: Simd, E: Element>(
        &mut self,
        s: S,
        tile: &Tile,
        key_tile: &mut [f32],
        value_tile: &mut [f32],
        dtype: KvType,
    ) {
        let width = self.width;
        let (keys, values) = (key_tile.as_mut_ptr(), value_tile.as_mut_ptr());
        // SAFETY: the offsets lie within the tiles.
        let (keys, values) = unsafe {
            (
                std::array::from_fn::<_, TILE_PAGES, _>(|p| keys.add(p * PAGE)),
                std::array::from_fn::<_, TILE_PAGES, _>(|p| values.add(p * PAGE * width)),
            )
        };
        for (p, page) in tile.pages.iter().enumerate() {
            s.vectorize(Convert {
                keys: page.keys::<E>(),
                key_tile: keys[p],
                head_dim: self.head_dim,
                values: page.values::<E>(),
                value_tile: values[p],
                width,
            });
        }
        let (keys, values) = (
            keys.map(<*mut f32>::cast_const),
            values.map(<*mut f32>::cast_const),
        );
        self.add::<S, f32>(s, tile, (keys, TILE), values, None, dtype);
    }

    fn add<S: Simd, E: Element>(
        &mut self,
        s: S,
        tile: &Tile,
        keys: ([*const E; TILE_PAGES], usize),
        values: [*const E; TILE_PAGES],
        ahead: Option<[Ahead; 2]>,
        dtype: KvType,
    ) {
        let count = self.softmax.len();
        let blocks = count.div_ceil(MAX_ROWS);
        for block in 0..blocks {
            // Blocks of nearly equal size, because a small last block would be slow.
            let rows = block * count / blocks..(block + 1) * count / blocks;
            let ahead = ahead.filter(|_| block == 0);
            let (unseen, seen) = (self.seen(rows.start).start, self.seen(rows.end - 1).end);
            if seen <= tile.start || unseen >= tile.start + TILE {
                continue;
            }
            match rows.len() {
                1 => self.add_block::<S, E, 1>(s, rows.start, tile, keys, values, ahead, dtype),
                2 => self.add_block::<S, E, 2>(s, rows.start, tile, keys, values, ahead, dtype),
                3 => self.add_block::<S, E, 3>(s, rows.start, tile, keys, values, ahead, dtype),
                4 => self.add_block::<S, E, 4>(s, rows.start, tile, keys, values, ahead, dtype),
                5 => self.add_block::<S, E, 5>(s, rows.start, tile, keys, values, ahead, dtype),
                _ => self.add_block::<S, E, 6>(s, rows.start, tile, keys, values, ahead, dtype),
            }
        }
    }

    /// The keys that row `row` sees.
    fn seen(&self, row: usize) -> Range<usize> {
        let end = self.first_position + row / self.group + 1;
        let (up_to, after) = self.window;
        end.saturating_sub(up_to)..self.context.min(end.saturating_add(after))
    }

    #[allow(clippy::too_many_arguments)]
    fn add_block<S: Simd, E: Element, const R: usize>(
        &mut self,
        s: S,
        first: usize,
        tile: &Tile,
        (keys, stride): ([*const E; TILE_PAGES], usize),
        values: [*const E; TILE_PAGES],
        ahead: Option<[Ahead; 2]>,
        dtype: KvType,
    ) {
        let (head_dim, width) = (self.head_dim, self.width);
        // R rows from `first` on are in the packed queries and the sums, and the pages are whole.
        s.vectorize(Scores::<E, R> {
            queries: self.queries[first * head_dim..(first + R) * head_dim].as_ptr(),
            depth: head_dim,
            keys,
            stride,
            out: self.scores[..R * TILE].as_mut_ptr(),
            ahead: ahead.map(|[keys, _]| keys),
        });
        let scales = |page: HeadPage| (page.key_scales(), page.value_scales());
        let scales = (dtype == KvType::I8).then(|| tile.pages.map(scales));
        let mut seen = [(0, 0); R];
        for (r, seen) in seen.iter_mut().enumerate() {
            let keys = self.seen(first + r);
            let within = |key: usize| key.saturating_sub(tile.start).min(TILE);
            *seen = (within(keys.start), within(keys.end));
        }
        let distances = self.distances.map(|(distances, head)| {
            std::array::from_fn::<_, R, _>(|r| {
                let (token, own) = ((first + r) / self.group, (first + r) % self.group);
                distances.tile(head + own, self.first_position + token, tile.start)
            })
        });
        let softmax = &mut self.softmax[first..].as_chunks_mut::<R>().0[0];
        let rescale = s.vectorize(Weigh::<R> {
            softmax,
            sums: self.weights[first * SUM_LANES..(first + R) * SUM_LANES].as_mut_ptr(),
            scores: self.scores.as_mut_ptr(),
            seen,
            softcap: self.softcap,
            distances,
            scales,
        });
        s.vectorize(Mix::<E, R> {
            weights: self.scores.as_ptr(),
            values,
            count: seen[R - 1].1,
            rescale,
            sums: self.sums[first * width..(first + R) * width].as_mut_ptr(),
            width,
            ahead: ahead.map(|[_, values]| values),
        });
    }
}
