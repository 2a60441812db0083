use std::ops::Range;

use super::super::pool::Pool;
use super::super::simd::{Kernel, Simd};
use super::*;

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const BLOCK: usize = 32;
const LONGEST: usize = 700;

/// A sequence with all its queries, keys and values, `[tokens][heads][head_dim]`, in shuffled blocks.
struct Case {
    head_dim: usize,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    table: Vec<i32>,
}

/// The variants of a layer's attention.
#[derive(Debug, Clone, Copy, Default)]
struct Kind {
    window: Option<usize>,
    softcap: Option<f32>,
    sinks: Option<[f32; HEADS]>,
    /// Whether tokens also see later tokens.
    whole: bool,
    /// Whether values are added to scores by distance.
    distances: bool,
}

/// The value that a head adds to the score of a key at this distance after the query.
fn addend(head: usize, distance: i64) -> f32 {
    ((31 * head as i64 + distance).rem_euclid(17) - 8) as f32 / 4.0
}

const KINDS: [Kind; 4] = [
    Kind {
        window: None,
        softcap: None,
        sinks: None,
        whole: false,
        distances: false,
    },
    Kind {
        window: Some(100),
        softcap: None,
        sinks: None,
        whole: false,
        distances: false,
    },
    Kind {
        window: Some(1),
        softcap: Some(2.0),
        sinks: None,
        whole: false,
        distances: false,
    },
    Kind {
        window: Some(300),
        softcap: Some(5.0),
        sinks: Some([3.0, -2.0, 0.5, 40.0, -200.0, 1.0]),
        whole: false,
        distances: false,
    },
];

/// Pseudorandom numbers in [-1, 1).
fn noise(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

impl Case {
    fn new(seed: u32, head_dim: usize, blocks: impl Iterator<Item = i32>) -> Self {
        let scaled = |seed, heads, by: f32| -> Vec<f32> {
            let values = noise(seed, LONGEST * heads * head_dim);
            values.iter().map(|x| x * by).collect()
        };
        Self {
            head_dim,
            queries: scaled(seed, HEADS, 3.0),
            keys: scaled(seed + 1, KV_HEADS, 2.0),
            values: scaled(seed + 2, KV_HEADS, 5.0),
            table: blocks.take(LONGEST.div_ceil(BLOCK)).collect(),
        }
    }

    fn sequence(&self) -> Sequence<'_> {
        Sequence {
            table: &self.table,
            block_size: BLOCK,
        }
    }

    /// The expected result of token `position`, computed naively.
    fn expected(&self, position: usize, kind: &Kind) -> Vec<f64> {
        self.expected_up_to(position, position, kind)
    }

    /// The same for a token that sees the keys up to `last`.
    fn expected_up_to(&self, position: usize, last: usize, kind: &Kind) -> Vec<f64> {
        let d = self.head_dim;
        let mut out = Vec::new();
        for head in 0..HEADS {
            let kv = head / (HEADS / KV_HEADS);
            let row = |all: &[f32], at: usize| -> Vec<f64> {
                let start = (at * KV_HEADS + kv) * d;
                all[start..start + d]
                    .iter()
                    .map(|&x| f64::from(x))
                    .collect()
            };
            let query = &self.queries[(position * HEADS + head) * d..][..d];
            let first = kind
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window));
            let weights: Vec<f64> = (first..=last)
                .map(|at| {
                    let key = row(&self.keys, at);
                    let score: f64 = key.iter().zip(query).map(|(k, &q)| k * f64::from(q)).sum();
                    let score = score / (d as f64).sqrt();
                    let capped = |cap: f64| (score / cap).tanh() * cap;
                    let score = kind.softcap.map_or(score, |cap| capped(f64::from(cap)));
                    let distance = at as i64 - position as i64;
                    let added = if kind.distances {
                        f64::from(addend(head, distance))
                    } else {
                        0.0
                    };
                    (score + added).exp()
                })
                .collect();
            let sink = kind.sinks.map_or(0.0, |sinks| f64::from(sinks[head]).exp());
            let total = weights.iter().sum::<f64>() + sink;
            let mut mean = vec![0.0; d];
            for (at, weight) in weights.iter().enumerate() {
                for (mean, v) in mean.iter_mut().zip(row(&self.values, first + at)) {
                    *mean += weight / total * v;
                }
            }
            out.extend(mean);
        }
        out
    }
}

struct Write<'a>(KvView<'a>, &'a Case, usize);

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(cache, case, position) = self;
        let d = case.head_dim;
        let slot = case.table[position / BLOCK] as usize * BLOCK + position % BLOCK;
        for head in 0..KV_HEADS {
            let at = (position * KV_HEADS + head) * d..(position * KV_HEADS + head + 1) * d;
            // SAFETY: only this thread runs.
            unsafe { cache.write(s, slot, head, &case.keys[at.clone()], &case.values[at]) };
        }
    }
}

fn shape(dtype: KvType, head_dim: usize) -> KvShape {
    KvShape {
        dtype,
        kv_heads: KV_HEADS,
        head_dim,
    }
}

/// Two sequences with interleaved blocks, written to layer 1 of a cache of two layers.
fn cases(isa: Isa, dtype: KvType, head_dim: usize) -> (Vec<Case>, KvCache) {
    let blocks = LONGEST.div_ceil(BLOCK) as i32;
    let cases = vec![
        Case::new(1, head_dim, (0..blocks).rev().map(|b| 2 * b)),
        Case::new(100, head_dim, (0..blocks).map(|b| 2 * b + 1)),
    ];
    let pages = 2 * blocks as usize * BLOCK / PAGE;
    let mut cache = KvCache::new(&[shape(dtype, head_dim); 2], pages);
    for case in &cases {
        for position in 0..LONGEST {
            dispatch(isa, Write(cache.view().layer(1), case, position));
        }
    }
    (cases, cache)
}

/// The results of the tokens `from..to` of some cases, computed in one step, one for each case. The query heads of a key-value head
/// are divided into `heads_in` parts.
fn attend(
    isa: Isa,
    (threads, heads_in): (usize, usize),
    cache: &mut KvCache,
    kind: &Kind,
    parts: &[(&Case, Range<usize>)],
) -> Vec<Vec<f32>> {
    let shape = cache.view().layer(1).shape();
    let head_dim = shape.head_dim;
    let width = HEADS * head_dim;
    let stride = width + 5;
    let total: usize = parts.iter().map(|(_, tokens)| tokens.len()).sum();
    let mut queries = vec![f32::NAN; total * stride];
    let mut spans = Vec::new();
    let mut row = 0;
    for (case, tokens) in parts {
        spans.push(SeqSpan {
            sequence: case.sequence(),
            window: case.sequence(),
            first_token: row,
            tokens: tokens.len(),
            context: tokens.end,
        });
        for position in tokens.clone() {
            queries[row * stride..][..width]
                .copy_from_slice(&case.queries[position * width..][..width]);
            row += 1;
        }
    }
    let mut out = vec![f32::NAN; total * width];
    let shapes = [AttentionShape {
        kv: shape,
        heads: HEADS,
        parts: heads_in,
        window: kind.window,
        causal: !kind.whole,
    }];
    let reach = LONGEST as i64 - 1;
    let addends: Vec<f32> = (0..HEADS)
        .flat_map(|head| (-reach..=reach).map(move |distance| addend(head, distance)))
        .collect();
    let distances = Distances::new(&addends, HEADS).expect("an odd number for each head");
    let mut attention = Attention::new(isa, &shapes, threads);
    let step = attention.begin(&spans);
    let layer = LayerAttention {
        shape: 0,
        cache: cache.view().layer(1),
        windowed: false,
        scale: (head_dim as f32).sqrt().recip(),
        softcap: kind.softcap,
        sinks: kind.sinks.as_ref().map(<[f32; HEADS]>::as_slice),
        distances: kind.distances.then_some(&distances),
        queries: SharedSlice::new(&mut queries),
        stride,
    };
    let shared = SharedSlice::new(&mut out);
    // SAFETY: nobody else has the buffers.
    Pool::new(threads).run(&|team| unsafe { step.attend(team, layer, shared) });
    let mut found = Vec::new();
    for (_, tokens) in parts {
        let rest = out.split_off(tokens.len() * width);
        found.push(std::mem::replace(&mut out, rest));
    }
    found
}

fn assert_near(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    for (x, y) in found.iter().zip(expected) {
        assert!((f64::from(*x) - y).abs() < tolerance, "{what}: {x} for {y}");
    }
}

#[test]
fn every_kernel_gives_what_attention_is() {
    for isa in Isa::available() {
        for (dtype, tolerance) in [(KvType::F32, 2e-5), (KvType::F16, 1e-2), (KvType::I8, 1e-1)] {
            for (head_dim, kind) in [8, 64, 80]
                .into_iter()
                .zip(KINDS.into_iter().cycle())
                .chain([(16, KINDS[1]), (16, KINDS[2]), (16, KINDS[3])])
            {
                let (cases, mut cache) = cases(isa, dtype, head_dim);
                let what = format!("{} {dtype:?} {head_dim} {kind:?}", isa.name());
                for tokens in [0..1, 0..40, 255..256, 256..257, 600..603, 639..700] {
                    let parts = [(&cases[0], tokens.clone()), (&cases[1], 30..31)];
                    let found = attend(isa, (2, 1), &mut cache, &kind, &parts);
                    let width = HEADS * head_dim;
                    for (row, position) in tokens.enumerate() {
                        let expected = cases[0].expected(position, &kind);
                        assert_near(&found[0][row * width..], &expected, tolerance, &what);
                    }
                    assert_near(&found[1], &cases[1].expected(30, &kind), tolerance, &what);
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_to_the_bit_however_the_step_is_cut() {
    for isa in Isa::available() {
        for dtype in [KvType::F32, KvType::F16, KvType::I8] {
            let (cases, mut cache) = cases(isa, dtype, 64);
            for kind in &KINDS {
                let all = [(&cases[0], 0..LONGEST)];
                let whole = attend(isa, (1, 1), &mut cache, kind, &all).remove(0);
                let width = HEADS * 64;
                for tokens in [0..1, 5..6, 299..300, 699..700, 520..524, 100..170, 60..700] {
                    let parts = [(&cases[1], 650..653), (&cases[0], tokens.clone())];
                    for heads_in in [1, HEADS / KV_HEADS] {
                        let cut = (3, heads_in);
                        let found = attend(isa, cut, &mut cache, kind, &parts).remove(1);
                        let same = whole[tokens.start * width..tokens.end * width] == found;
                        assert!(same, "{} {dtype:?} {kind:?} {tokens:?}", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn tokens_of_a_whole_text_see_what_follows_them_alone_and_beside_others() {
    let kinds = [
        (None, false),
        (Some(1), false),
        (Some(65), false),
        (Some(300), true),
        (None, true),
    ];
    for isa in Isa::available() {
        for (head_dim, (window, distances)) in [8, 32, 64, 16, 32].into_iter().zip(kinds) {
            let kind = Kind {
                whole: true,
                window,
                distances,
                ..Kind::default()
            };
            let (cases, mut cache) = cases(isa, KvType::F32, head_dim);
            for len in [1, 2, 15, 64, 255, 256, 257, 700] {
                let what = format!("{} {kind:?} {len}", isa.name());
                let alone = attend(isa, (1, 1), &mut cache, &kind, &[(&cases[0], 0..len)]);
                let parts = [(&cases[1], 0..30), (&cases[0], 0..len)];
                let packed = attend(isa, (3, 1), &mut cache, &kind, &parts);
                assert!(alone[0] == packed[1], "{what}");
                let width = HEADS * head_dim;
                for position in [0, len / 2, len - 1] {
                    let last = window.map_or(len, |window| position + window).min(len) - 1;
                    let expected = cases[0].expected_up_to(position, last, &kind);
                    let found = &alone[0][position * width..][..width];
                    assert_near(found, &expected, 2e-5, &what);
                }
            }
        }
    }
}

#[test]
fn addends_by_distance_are_an_odd_number_for_each_head() {
    for (values, heads) in [(0, 1), (4, 2), (7, 2), (3, 0)] {
        assert!(
            Distances::new(&vec![0.0; values], heads).is_err(),
            "{values} {heads}"
        );
    }
    let distances = Distances::new(&[0.0; 14], 2).expect("7 for each");
    assert_eq!((distances.heads(), distances.most()), (2, 4));
}

#[test]
fn a_plan_covers_every_token_once_and_gives_threads_work() {
    let table = vec![0; 100];
    let sequence = Sequence {
        table: &table,
        block_size: BLOCK,
    };
    let span = |first_token, tokens, context| SeqSpan {
        sequence,
        window: sequence,
        first_token,
        tokens,
        context,
    };
    let spans = [span(0, 1, 200), span(1, 300, 900), span(301, 2, 1000)];
    let shape = |window| AttentionShape {
        kv: shape(KvType::F16, 64),
        heads: 3 * KV_HEADS,
        parts: 1,
        window,
        causal: true,
    };
    let whole = plan(&spans, shape(None), 2);
    let mut covered = vec![[0; KV_HEADS]; 303];
    for unit in &whole.units {
        for token in &mut covered[unit.first_token..][..unit.tokens] {
            token[unit.part] += unit.splits;
        }
        assert_eq!(unit.partial.is_some(), unit.sequence == 2);
    }
    assert_eq!(covered[0], [1; KV_HEADS]);
    for (token, splits) in covered[1..301].iter().enumerate() {
        assert!(splits[0] >= (601 + token).div_ceil(SPLIT), "{token}");
    }
    assert_eq!(covered[302], [4; KV_HEADS]);
    assert_eq!(whole.merges.len(), KV_HEADS);
    assert_eq!(whole.partial_len, KV_HEADS * 4 * 6 * (64 + 2));
    // With a window, no tile is read that no token sees.
    for unit in plan(&spans, shape(Some(100)), 2).units {
        let seen = (unit.first_position + 1).saturating_sub(100);
        assert!(unit.first_key <= seen && seen < unit.first_key + TILE);
        assert!(unit.splits <= 2);
    }
}

#[test]
fn heads_that_share_a_key_are_cut_into_parts_of_few() {
    let parts = [1, 6, 12, 16, 20, 64, 128, 13].map(AttentionShape::parts_of);
    assert_eq!(parts, [1, 1, 1, 2, 2, 8, 16, 13]);
}

#[test]
fn too_large_a_value_is_stored_as_the_largest_half() {
    struct One<'a>(KvView<'a>);
    impl Kernel for One<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            // SAFETY: only this thread runs.
            unsafe { self.0.write(s, 3, 1, &[1e6; 16], &[-1e6; 16]) };
        }
    }
    let mut cache = KvCache::new(&[shape(KvType::F16, 16)], 1);
    for isa in Isa::available() {
        let view = cache.view().layer(0);
        dispatch(isa, One(view));
        let page = view.head(0, 1);
        // SAFETY: both lie within the page.
        unsafe {
            assert_eq!(page.keys::<u16>().add(5 * PAGE + 3).read(), 0x7bff);
            assert_eq!(page.values::<u16>().add(3 * 16 + 5).read(), 0xfbff);
        }
    }
}
