//! Vectors of f32 for kernels that are written once and compiled for each set of instructions.
//!
//! A [`Kernel`] is generic over [`Simd`]; [`dispatch`] runs it with the vectors of an [`Isa`]. Everything that a kernel calls is
//! `#[inline(always)]`, so that it ends up in a function that has the instructions enabled. Hot loops are plain ones over
//! indices: what iterators and closures call is inlined only if the compiler likes to, and is a call for every vector if not.
#![allow(
    clippy::inline_always,
    reason = "what is not inlined is compiled without the instructions it is made for"
)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use super::Isa;

/// A vector of f32 and what kernels do with it. A value of the type proves that the processor has the instructions.
///
/// Where a method takes a pointer, [`Simd::LANES`] elements from there on must be valid, of any alignment.
#[allow(clippy::missing_safety_doc, reason = "the one condition stands above")]
pub(super) trait Simd: Copy {
    /// The vector.
    type V: Copy;
    /// f32 in a vector.
    const LANES: usize;
    /// Vectors side by side in a block of a matrix product, so that it fits the registers; see [`MAX_ROWS`].
    const COLUMNS: usize;

    /// Runs a kernel in a function that has the instructions enabled.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, x: f32) -> Self::V;
    unsafe fn load(self, from: *const f32) -> Self::V;
    unsafe fn store(self, to: *mut f32, v: Self::V);
    /// Half-precision numbers, converted.
    unsafe fn load_f16(self, from: *const u16) -> Self::V;
    /// Integers, converted.
    unsafe fn load_i8(self, from: *const i8) -> Self::V;
    /// Converts to half precision, rounding to nearest.
    unsafe fn store_f16(self, to: *mut u16, v: Self::V);
    /// Fetches the cache line of any address, soon to be read, if the processor likes to.
    fn prefetch(self, at: *const u8);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c; fused where the processor can.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; b where one of them is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; b where one of them is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer.
    fn round(self, v: Self::V) -> Self::V;
    /// 2^v of integers from -127 (which gives 0) to 128 (infinity).
    fn pow2(self, v: Self::V) -> Self::V;
    /// The sum of all lanes, always in the same order.
    fn sum(self, v: Self::V) -> f32;
    /// The largest lane.
    fn max_lane(self, v: Self::V) -> f32;
    /// Bit i is set where lane i of a is at least that of b.
    fn at_least(self, a: Self::V, b: Self::V) -> u32;
}

/// Rows of the largest block of a matrix product: with [`Simd::COLUMNS`] they fit the registers.
pub(super) const MAX_ROWS: usize = 6;

/// A computation on vectors of any kind.
pub(super) trait Kernel {
    /// What it gives.
    type Output;

    /// Computes it; implementations are `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs a kernel with the vectors of `isa`, which must be one of [`Isa::available`].
pub(super) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an available ISA has its instructions.
        Isa::Avx512 => unsafe { avx512::Avx512::assume() }.vectorize(kernel),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 | Isa::Avx2Vnni => unsafe { avx2::Avx2::assume() }.vectorize(kernel),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot => neon::Neon.vectorize(kernel),
        _ => portable::Portable.vectorize(kernel),
    }
}

/// Whether all values are finite.
pub(super) fn all_finite(isa: Isa, values: &[f32]) -> bool {
    dispatch(isa, AllFinite(values))
}

struct AllFinite<'a>(&'a [f32]);

impl Kernel for AllFinite<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        // 0 times a finite number is 0, and times any other it is none.
        let zero = s.splat(0.0);
        let mut sum = [zero; 4];
        let mut chunks = self.0.chunks_exact(4 * S::LANES);
        for chunk in &mut chunks {
            for (i, sum) in sum.iter_mut().enumerate() {
                // SAFETY: the chunk is four vectors.
                *sum = s.mul_add(
                    unsafe { s.load(chunk.as_ptr().add(i * S::LANES)) },
                    zero,
                    *sum,
                );
            }
        }
        let sum = s.sum(s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3])));
        sum == 0.0 && chunks.remainder().iter().all(|x| x.is_finite())
    }
}

/// e^x, to 2 units in the last place; below -87.7 it is 0, also for -infinity.
///
/// The polynomial is that of Cephes' `expf`.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.min(s.splat(88.8), s.max(s.splat(-88.0), x));
    let power = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let rest = s.mul_add(power, s.splat(-0.693_359_4), x);
    let rest = s.mul_add(power, s.splat(2.121_944_4e-4), rest);
    let sum = s.mul_add(s.splat(1.987_569_1e-4), rest, s.splat(1.398_199_9e-3));
    let sum = s.mul_add(sum, rest, s.splat(8.333_452e-3));
    let sum = s.mul_add(sum, rest, s.splat(4.166_579_6e-2));
    let sum = s.mul_add(sum, rest, s.splat(1.666_666_5e-1));
    let sum = s.mul_add(sum, rest, s.splat(0.5));
    let y = s.mul_add(sum, s.mul(rest, rest), s.add(rest, s.splat(1.0)));
    s.mul(y, s.pow2(power))
}

/// 2^x of at most 127, to 2 units in the last place; below -126.5 it is 0, also for -infinity.
///
/// The polynomial is that of Cephes' `exp2f`.
#[inline(always)]
pub(super) fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(s.splat(-127.0), x);
    let power = s.round(x);
    let rest = s.sub(x, power);
    let sum = s.mul_add(s.splat(1.535_336_2e-4), rest, s.splat(1.339_887_4e-3));
    let sum = s.mul_add(sum, rest, s.splat(9.618_437e-3));
    let sum = s.mul_add(sum, rest, s.splat(5.550_332_5e-2));
    let sum = s.mul_add(sum, rest, s.splat(2.402_264_8e-1));
    let sum = s.mul_add(sum, rest, s.splat(std::f32::consts::LN_2));
    s.mul(s.mul_add(sum, rest, s.splat(1.0)), s.pow2(power))
}

/// The tangens hyperbolicus, to 2e-7.
#[inline(always)]
pub(super) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let rest = s.div(s.splat(2.0), s.add(one, exp(s, s.add(x, x))));
    s.sub(one, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::half::{f16_to_f32, f32_to_f16};

    /// Applies `exp` to whole vectors.
    struct Exp<'a>(&'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk is one vector.
                unsafe { s.store(chunk.as_mut_ptr(), exp(s, s.load(chunk.as_ptr()))) };
            }
        }
    }

    #[test]
    fn exp_is_near_the_exact_one_and_ends_in_zero_and_infinity() {
        for isa in Isa::available() {
            let given: Vec<f32> = (0..4096).map(|i| (i as f32 - 2048.0) * 0.042).collect();
            let mut found = given.clone();
            dispatch(isa, Exp(&mut found));
            for (&x, &y) in given.iter().zip(&found) {
                let exact = f64::from(x).exp();
                let error = ((f64::from(y) - exact) / exact).abs();
                assert!(error < 3e-7, "{}: exp({x}) is {y}", isa.name());
            }
            let mut ends = [0.0_f32; 16];
            ends[..5].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -87.9, 89.0, f32::NAN]);
            dispatch(isa, Exp(&mut ends));
            assert_eq!(&ends[..4], &[0.0, 0.0, 0.0, f32::INFINITY]);
            assert!(ends[4].is_nan());
            assert!(ends[5..].iter().all(|&y| (y - 1.0).abs() < f32::EPSILON));
        }
    }

    /// Applies `exp2` to whole vectors.
    struct Exp2<'a>(&'a mut [f32]);

    impl Kernel for Exp2<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk is one vector.
                unsafe { s.store(chunk.as_mut_ptr(), exp2(s, s.load(chunk.as_ptr()))) };
            }
        }
    }

    #[test]
    fn exp2_is_near_the_exact_one_and_ends_in_zero() {
        for isa in Isa::available() {
            let given: Vec<f32> = (0..4096).map(|i| (i as f32 - 2076.0) * 0.061).collect();
            let mut found = given.clone();
            dispatch(isa, Exp2(&mut found));
            for (&x, &y) in given.iter().zip(&found).filter(|(x, _)| **x > -126.0) {
                let exact = f64::from(x).exp2();
                let error = ((f64::from(y) - exact) / exact).abs();
                assert!(error < 3e-7, "{}: exp2({x}) is {y}", isa.name());
            }
            let mut ends = [0.0_f32; 16];
            ends[..4].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -126.6, f32::NAN]);
            dispatch(isa, Exp2(&mut ends));
            assert_eq!(&ends[..3], &[0.0; 3]);
            assert!(ends[3].is_nan());
            assert!(ends[4..].iter().all(|&y| (y - 1.0).abs() < f32::EPSILON));
        }
    }

    /// Every operation once, on the first vector of `a` and `b`.
    struct Operations<'a>(&'a [f32], &'a [f32]);

    impl Kernel for Operations<'_> {
        type Output = Vec<Vec<f32>>;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<Vec<f32>> {
            let halves: Vec<u16> = self.0.iter().map(|&x| f32_to_f16(x)).collect();
            let bytes: Vec<i8> = self.0.iter().map(|&x| (x * 10.0) as i8).collect();
            let mut stored = vec![0; S::LANES];
            // SAFETY: all slices hold at least one vector.
            unsafe {
                let (a, b) = (s.load(self.0.as_ptr()), s.load(self.1.as_ptr()));
                s.store_f16(stored.as_mut_ptr(), a);
                let vectors = [
                    s.add(a, b),
                    s.sub(a, b),
                    s.mul(a, b),
                    s.div(a, b),
                    s.mul_add(a, b, s.splat(2.0)),
                    s.max(a, b),
                    s.min(a, b),
                    s.round(a),
                    s.pow2(s.round(a)),
                    s.load_f16(halves.as_ptr()),
                    s.load_i8(bytes.as_ptr()),
                ];
                let mut found: Vec<Vec<f32>> = vectors
                    .iter()
                    .map(|&v| {
                        let mut lanes = vec![0.0; S::LANES];
                        s.store(lanes.as_mut_ptr(), v);
                        lanes
                    })
                    .collect();
                found.push(stored.iter().map(|&bits| f16_to_f32(bits)).collect());
                found.push(vec![s.sum(a), s.max_lane(a)]);
                found.push(
                    (0..S::LANES)
                        .map(|lane| (s.at_least(a, b) >> lane & 1) as f32)
                        .collect(),
                );
                found
            }
        }
    }

    #[test]
    fn every_operation_gives_what_its_name_says() {
        let a: Vec<f32> = (0..16)
            .map(|i| ((i * 37 % 16) as f32 - 7.6) * 1.31)
            .collect();
        let b: Vec<f32> = (0..16).map(|i| (i as f32 - 7.3) * 1.1).collect();
        for isa in Isa::available() {
            let found = dispatch(isa, Operations(&a, &b));
            let lanes = found[0].len();
            let expect = |f: &dyn Fn(f32, f32) -> f32| -> Vec<f32> {
                a[..lanes].iter().zip(&b).map(|(&x, &y)| f(x, y)).collect()
            };
            let expected = [
                expect(&|x, y| x + y),
                expect(&|x, y| x - y),
                expect(&|x, y| x * y),
                expect(&|x, y| x / y),
                expect(&|x, y| x * y + 2.0),
                expect(&f32::max),
                expect(&f32::min),
                expect(&|x, _| x.round_ties_even()),
                expect(&|x, _| x.round_ties_even().exp2()),
                expect(&|x, _| f16_to_f32(f32_to_f16(x))),
                expect(&|x, _| f32::from((x * 10.0) as i8)),
                expect(&|x, _| f16_to_f32(f32_to_f16(x))),
                vec![
                    a[..lanes].iter().sum(),
                    a[..lanes].iter().copied().fold(f32::MIN, f32::max),
                ],
                expect(&|x, y| f32::from(u8::from(x >= y))),
            ];
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                for (x, y) in found.iter().zip(expected) {
                    let close = (x - y).abs() <= 1e-5 * y.abs().max(1.0);
                    assert!(close, "{}: operation {index} gives {x} for {y}", isa.name());
                }
            }
        }
    }
}
