//! What attention of a small model (SmolLM2-135M's heads) costs: rates of multiply-adds and of bytes of the cache read.
//! `cargo bench --no-default-features --bench cpu_attention [THREADS]`.
#![allow(missing_docs)]

use std::time::{Duration, Instant};

use lmserve::cpu::attention::{
    Attention, AttentionShape, KvCache, KvShape, KvType, LayerAttention, PAGE, SeqSpan, Sequence,
};
use lmserve::cpu::row_ops::RopeAndCache;
use lmserve::cpu::{Isa, Pool, SharedSlice};

const HEADS: usize = 9;
const SHAPE: KvShape = KvShape {
    dtype: KvType::F16,
    kv_heads: 3,
    head_dim: 64,
};
/// Layers that take turns, as in a step.
const LAYERS: usize = 30;
const SPAN: Duration = Duration::from_millis(300);
/// Tokens that are written to the cache at once.
const WRITTEN: usize = 256;

/// Sequences, new tokens of each, and the context of each with them.
const STEPS: [(usize, usize, usize); 8] = [
    (1, 1, 200),
    (8, 1, 200),
    (64, 1, 200),
    (1, 1, 4000),
    (8, 1, 4000),
    (1, 512, 512),
    (1, 512, 4000),
    (1, 20, 2000),
];

fn main() {
    let threads = std::env::args().find_map(|argument| argument.parse().ok());
    let pool = Pool::new(threads.unwrap_or(2));
    println!("sequences  tokens  context  kv    us/layer  GFLOP/s   GB/s");
    for isa in Isa::available().into_iter().rev() {
        println!("{}, {} threads", isa.name(), pool.size());
        for dtype in [KvType::F16, KvType::I8] {
            for step in STEPS {
                measure(&pool, isa, KvShape { dtype, ..SHAPE }, step);
            }
        }
    }
}

fn random(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Writes all slots of the cache: memory that was never written is one page of zeros, however much of it is read.
fn fill(pool: &Pool, isa: Isa, cache: &mut KvCache, slots: usize) {
    let shape = cache.view().layer(0).shape();
    let width = (HEADS + 2 * shape.kv_heads) * shape.head_dim;
    let mut qkv = random(WRITTEN * width);
    let qkv = SharedSlice::new(&mut qkv);
    let (cos, sin) = (vec![1.0; shape.head_dim / 2], vec![0.0; shape.head_dim / 2]);
    let cache = cache.view();
    pool.run(&|team| {
        for layer in 0..LAYERS {
            for first in (0..slots).step_by(WRITTEN) {
                let slots: Vec<i32> = (first..slots.min(first + WRITTEN))
                    .map(|slot| slot as i32)
                    .collect();
                let rope = RopeAndCache {
                    heads: HEADS,
                    angles: Some((&cos, &sin)),
                    query_scales: None,
                    q_norm: None,
                    k_norm: None,
                    v_norm: None,
                    cache: cache.layer(layer),
                };
                // SAFETY: nobody else has the buffers, and the slots differ.
                unsafe { rope.run(team, isa, (qkv, width), &[0; WRITTEN], &slots) };
            }
        }
    });
}

fn measure(
    pool: &Pool,
    isa: Isa,
    shape: KvShape,
    (sequences, tokens, context): (usize, usize, usize),
) {
    let pages = context.div_ceil(PAGE);
    let tables: Vec<Vec<i32>> = (0..sequences)
        .map(|s| (0..pages).map(|p| (p * sequences + s) as i32).collect())
        .collect();
    let spans: Vec<SeqSpan> = tables
        .iter()
        .enumerate()
        .map(|(s, table)| {
            let sequence = Sequence {
                table,
                block_size: PAGE,
            };
            SeqSpan {
                sequence,
                window: sequence,
                first_token: s * tokens,
                tokens,
                context,
            }
        })
        .collect();
    let mut cache = KvCache::new(&[shape; LAYERS], pages * sequences);
    let width = HEADS * shape.head_dim;
    fill(pool, isa, &mut cache, pages * sequences * PAGE);
    let mut queries = random(sequences * tokens * width);
    let mut out = vec![0.0; queries.len()];
    let shapes = [AttentionShape {
        kv: shape,
        heads: HEADS,
        parts: 1,
        window: None,
        causal: true,
    }];
    let mut attention = Attention::new(isa, &shapes, pool.size());
    let step = attention.begin(&spans);
    let (view, queries, out) = (
        cache.view(),
        SharedSlice::new(&mut queries),
        SharedSlice::new(&mut out),
    );
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < SPAN || best.is_infinite() {
        let begin = Instant::now();
        pool.run(&|team| {
            for layer in 0..LAYERS {
                let layer = LayerAttention {
                    shape: 0,
                    cache: view.layer(layer),
                    windowed: false,
                    scale: (shape.head_dim as f32).sqrt().recip(),
                    softcap: None,
                    sinks: None,
                    distances: None,
                    queries,
                    stride: width,
                };
                // SAFETY: nobody else has the buffers.
                unsafe { step.attend(team, layer, out) };
            }
        });
        best = best.min(begin.elapsed().as_secs_f64() / LAYERS as f64);
    }
    let seen: usize = (context - tokens + 1..=context).sum();
    let operations = (4 * sequences * seen * width) as f64;
    let bytes = (sequences * pages * shape.page_bytes()) as f64;
    println!(
        "{sequences:9} {tokens:7} {context:8}  {:4} {:9.1} {:8.1} {:6.1}",
        format!("{:?}", shape.dtype),
        best * 1e6,
        operations / best / 1e9,
        bytes / best / 1e9
    );
}
