//! Products with floats, with AVX2.

use std::arch::x86_64::*;

use super::super::floats::float_kernel;
use super::{LANES, store};

float_kernel! {
    features: "avx2,fma,f16c",
    vector: __m256, lanes: LANES, tiles at once: 1,
    zero: _mm256_setzero_ps(),
    broadcast: |x| _mm256_set1_ps(x),
    load f32: |from: *const u8| _mm256_loadu_ps(from.cast()),
    load f16: |from: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
    load bf16: |from: *const u8| {
        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    },
    multiply_add: |w, x, sum| _mm256_fmadd_ps(w, x, sum),
    store: store,
}
