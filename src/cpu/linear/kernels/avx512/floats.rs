//! Products with floats, with AVX-512.

use std::arch::x86_64::*;

use super::super::floats::float_kernel;
use super::store;

float_kernel! {
    features: "avx512f,avx512bw,avx512dq,avx512vl",
    vector: __m512, lanes: 16, tiles at once: 3,
    zero: _mm512_setzero_ps(),
    broadcast: |x| _mm512_set1_ps(x),
    load f32: |from: *const u8| _mm512_loadu_ps(from.cast()),
    load f16: |from: *const u8| _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
    load bf16: |from: *const u8| {
        let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    },
    multiply_add: |w, x, sum| _mm512_fmadd_ps(w, x, sum),
    store: store,
}
