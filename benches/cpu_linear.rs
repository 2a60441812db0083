//! How close the linear layers of a small model (SmolLM2-135M's shapes) come to what this machine can do: the bandwidth of its
//! memory and cache, and the rate of its integer dot products. `cargo bench --no-default-features --bench cpu_linear [-- THREADS ISA]`.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lmserve::cpu::{Aligned, FloatType, Format, Isa, Linear, Matrix, Pool, SharedSlice, Stored};

const SHAPES: [(&str, usize, usize); 5] = [
    ("qkv", 960, 576),
    ("o", 576, 576),
    ("gate_up", 3072, 576),
    ("down", 576, 1536),
    ("head", 49152, 576),
];
const ROWS: [usize; 5] = [1, 8, 32, 64, 512];
/// Layers of a shape that take turns, so that one row finds weights where a step finds them.
const COPIES_BYTES: usize = 96 << 20;
const SPAN: Duration = Duration::from_millis(60);

/// Seconds of the fastest of many calls.
fn fastest(mut call: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < SPAN {
        let begin = Instant::now();
        call();
        best = best.min(begin.elapsed().as_secs_f64());
    }
    best
}

/// Bytes a second that all threads together read, each its own part of `bytes`.
fn bandwidth(pool: &Pool, isa: Isa, bytes: usize) -> f64 {
    let mut data = Aligned::<i32>::lasting(bytes / 4);
    data.fill(1);
    let time = fastest(|| {
        pool.run(&|team| {
            let part = &data[team.share(data.len(), 1024)];
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the instruction set is there.
                Isa::Avx512 => unsafe { read512(part) },
                _ => read(part),
            }
        });
    });
    bytes as f64 / time
}

#[inline]
fn read(values: &[i32]) {
    let mut sums = [0i32; 128];
    for line in values.as_chunks::<128>().0 {
        for (sum, value) in sums.iter_mut().zip(line) {
            *sum ^= value;
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn read512(values: &[i32]) {
    read(values);
}

/// Operations a second (two for each product) of integer dot products without memory.
fn dot_products(pool: &Pool, isa: Isa) -> Option<f64> {
    const STEPS: usize = 100_000;
    let per_step: fn(usize) -> usize = match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => |steps| {
            // SAFETY: the instruction set is there.
            unsafe { vnni512(steps) }
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2Vnni => |steps| {
            // SAFETY: the instruction set is there.
            unsafe { vnni256(steps) }
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => |steps| {
            // SAFETY: the instruction set is there.
            unsafe { multiply_and_add256(steps) }
        },
        _ => return None,
    };
    let products = Mutex::new(0);
    let time = fastest(|| {
        *products.lock().unwrap() = 0;
        pool.run(&|_| {
            let done = per_step(STEPS);
            *products.lock().unwrap() += done;
        });
    });
    let products = *products.lock().unwrap();
    Some(2.0 * products as f64 / time)
}

/// Independent chains of dot products and sums.
const CHAINS: usize = 12;

/// Chains of `vpdpbusd`; returns how many products that were.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn vnni512(steps: usize) -> usize {
    use std::arch::x86_64::{_mm512_dpbusd_epi32, _mm512_set1_epi8, _mm512_setzero_si512};
    let (a, b) = (
        black_box(_mm512_set1_epi8(3)),
        black_box(_mm512_set1_epi8(5)),
    );
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    black_box(sums);
    steps * CHAINS * 64
}

/// The same for half as long registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn vnni256(steps: usize) -> usize {
    use std::arch::x86_64::{_mm256_dpbusd_avx_epi32, _mm256_set1_epi8, _mm256_setzero_si256};
    let (a, b) = (
        black_box(_mm256_set1_epi8(3)),
        black_box(_mm256_set1_epi8(5)),
    );
    let mut sums = [_mm256_setzero_si256(); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
        }
    }
    black_box(sums);
    steps * CHAINS * 32
}

/// The same without that instruction: `vpmaddubsw`, `vpmaddwd` and `vpaddd`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn multiply_and_add256(steps: usize) -> usize {
    use std::arch::x86_64::{
        _mm256_add_epi32, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8,
        _mm256_set1_epi16, _mm256_setzero_si256, _mm256_xor_si256,
    };
    let ones = black_box(_mm256_set1_epi16(1));
    let b = black_box(_mm256_set1_epi8(5));
    let a = black_box(_mm256_set1_epi8(3));
    let mut sums = [_mm256_setzero_si256(); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            // What each product begins with differs, so that none is computed once for all.
            let products =
                _mm256_madd_epi16(_mm256_maddubs_epi16(a, _mm256_xor_si256(b, *sum)), ones);
            *sum = _mm256_add_epi32(*sum, products);
        }
    }
    black_box(sums);
    steps * CHAINS * 32
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

fn main() {
    let threads = std::env::args().find_map(|argument| argument.parse().ok());
    let threads = threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    let isa = std::env::args().find_map(|argument| {
        let mut available = Isa::available().into_iter();
        available.find(|isa| isa.name() == argument)
    });
    let isa = isa.unwrap_or_else(Isa::detect);
    let pool = Pool::new(threads);
    let memory = bandwidth(&pool, isa, 512 << 20);
    let cache = bandwidth(&pool, isa, 12 << 20);
    let peak = dot_products(&pool, isa);
    println!(
        "{threads} threads, {}: memory {:.1} GB/s, 12 MB {:.1} GB/s, dot products {:.0} GOP/s",
        isa.name(),
        memory / 1e9,
        cache / 1e9,
        peak.unwrap_or(f64::NAN) / 1e9
    );
    println!("format  shape    rows       us    GB/s  of memory   GOP/s  of peak");
    for format in [Format::Int4, Format::Int8, Format::F32] {
        for (name, out, cols) in SHAPES {
            let weights = random(out * cols);
            let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
            let matrix = Matrix {
                stored: Stored::Floats(FloatType::F32, format),
                rows: out,
                columns: cols,
                bytes: &bytes,
                bias: None,
            };
            let layer = Linear::pack(isa, &pool, &[matrix]).unwrap().remove(0);
            let copies = (COPIES_BYTES / layer.bytes()).clamp(1, 1000);
            let layers = vec![layer; copies];
            for rows in ROWS {
                if name == "head" && rows > 64 {
                    continue;
                }
                let x = random(rows * cols);
                let mut y = Aligned::<f32>::zeroed(rows * out);
                let mut scratch = Aligned::<u8>::zeroed(layers[0].scratch_bytes(rows));
                let (y, scratch) = (SharedSlice::new(&mut y), SharedSlice::new(&mut scratch));
                let x = SharedSlice::read_only(&x);
                let time = fastest(|| {
                    pool.run(&|team| {
                        for layer in &layers {
                            // SAFETY: nobody else has the buffers.
                            unsafe { layer.forward(team, x, rows, y, scratch) };
                        }
                    });
                }) / layers.len() as f64;
                let (bytes, ops) = (layers[0].bytes() as f64, 2.0 * (rows * out * cols) as f64);
                println!(
                    "{:6}  {name:7} {rows:5} {:8.1} {:7.1} {:9.0}% {:7.0} {:7.0}%",
                    format!("{format:?}"),
                    time * 1e6,
                    bytes / time / 1e9,
                    100.0 * bytes / time / memory,
                    ops / time / 1e9,
                    100.0 * ops / time / peak.unwrap_or(f64::NAN),
                );
            }
        }
    }
}
