//! Operations on rows of activations that are no matrix products.
#![allow(
    clippy::inline_always,
    reason = "what is not inlined is compiled without the instructions it is made for"
)]

use super::attention::KvView;
use super::simd::{Kernel, Simd, exp};

/// `out = x * rsqrt(mean(x^2) + eps) * weight`; all of one length.
pub(super) struct RmsNorm<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
    pub(super) out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let scale = inverse_rms(s, self.x, self.eps);
        let each = self.out.iter_mut().zip(self.x).zip(self.weight);
        for ((out, x), weight) in each {
            *out = x * scale * weight;
        }
    }
}

/// `residual += x`, and the RMS norm of the sum to `out`.
pub(super) struct AddRmsNorm<'a> {
    pub(super) x: &'a [f32],
    pub(super) residual: &'a mut [f32],
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
    pub(super) out: &'a mut [f32],
}

impl Kernel for AddRmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (residual, x) in self.residual.iter_mut().zip(self.x) {
            *residual += x;
        }
        let norm = RmsNorm {
            x: self.residual,
            weight: self.weight,
            eps: self.eps,
            out: self.out,
        };
        norm.run(s);
    }
}

#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut sums = [s.splat(0.0); 2];
    let mut pairs = x.chunks_exact(2 * S::LANES);
    for pair in &mut pairs {
        // SAFETY: the chunk is two vectors.
        let (a, b) = unsafe { (s.load(pair.as_ptr()), s.load(pair.as_ptr().add(S::LANES))) };
        sums = [s.mul_add(a, a, sums[0]), s.mul_add(b, b, sums[1])];
    }
    let rest: f32 = pairs.remainder().iter().map(|x| x * x).sum();
    let mean = (s.sum(s.add(sums[0], sums[1])) + rest) / x.len() as f32;
    1.0 / (mean + eps).sqrt()
}

/// `out = silu(gate) * up` of `gate_up`, which is twice as long: gate | up.
pub(super) struct SiluMul<'a> {
    pub(super) gate_up: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (gate, up) = self.gate_up.split_at(self.out.len());
        assert_eq!(up.len(), self.out.len());
        let whole = self.out.len() / S::LANES * S::LANES;
        let mut i = 0;
        while i < whole {
            // SAFETY: the vectors lie within the slices, which are of one length.
            unsafe {
                let (g, u) = (s.load(gate.as_ptr().add(i)), s.load(up.as_ptr().add(i)));
                s.store(self.out.as_mut_ptr().add(i), silu_mul(s, g, u));
            }
            i += S::LANES;
        }
        let mut tail = [[0.0; 16]; 2];
        let rest = self.out.len() - whole;
        tail[0][..rest].copy_from_slice(&gate[whole..]);
        tail[1][..rest].copy_from_slice(&up[whole..]);
        // SAFETY: a tail has room for a vector.
        unsafe {
            let product = silu_mul(s, s.load(tail[0].as_ptr()), s.load(tail[1].as_ptr()));
            s.store(tail[0].as_mut_ptr(), product);
        }
        self.out[whole..].copy_from_slice(&tail[0][..rest]);
    }
}

#[inline(always)]
fn silu_mul<S: Simd>(s: S, gate: S::V, up: S::V) -> S::V {
    let one = s.splat(1.0);
    let sigmoid = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), gate))));
    s.mul(s.mul(gate, sigmoid), up)
}

/// A head's norm before it is rotated (Qwen3).
#[derive(Clone, Copy)]
pub(super) struct HeadNorm<'a> {
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
}

/// Rotates the queries and keys of one token's `qkv` (q | k | v) in place, and stores key and value in the cache.
pub(super) struct RopeAndCache<'a> {
    pub(super) qkv: &'a mut [f32],
    pub(super) heads: usize,
    /// Of the token's position, `[head_dim / 2]`.
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
    pub(super) q_norm: Option<HeadNorm<'a>>,
    pub(super) k_norm: Option<HeadNorm<'a>>,
    pub(super) cache: KvView<'a>,
    pub(super) layer: usize,
    pub(super) slot: usize,
    /// The slot of the token that comes next, if one does.
    pub(super) next_slot: Option<usize>,
}

impl Kernel for RopeAndCache<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if let Some(slot) = self.next_slot {
            self.cache.prefetch(s, self.layer, slot);
        }
        let shape = self.cache.shape();
        let (q, kv) = self.qkv.split_at_mut(self.heads * shape.head_dim);
        let (k, v) = kv.split_at_mut(shape.kv_heads * shape.head_dim);
        for head in q.chunks_exact_mut(shape.head_dim) {
            rotate(s, head, self.q_norm, self.cos, self.sin);
        }
        let each = k
            .chunks_exact_mut(shape.head_dim)
            .zip(v.chunks_exact(shape.head_dim));
        for (index, (key, value)) in each.enumerate() {
            rotate(s, key, self.k_norm, self.cos, self.sin);
            // SAFETY: every token of a step has a slot of its own.
            unsafe {
                self.cache
                    .write(s, self.layer, self.slot, index, key, value);
            }
        }
    }
}

#[inline(always)]
fn rotate<S: Simd>(s: S, head: &mut [f32], norm: Option<HeadNorm>, cos: &[f32], sin: &[f32]) {
    if let Some(norm) = norm {
        let scale = inverse_rms(s, head, norm.eps);
        for (x, weight) in head.iter_mut().zip(norm.weight) {
            *x = *x * scale * weight;
        }
    }
    let half = cos.len();
    assert!(head.len() == 2 * half && sin.len() == half);
    let (low, high) = head.split_at_mut(half);
    let whole = half / S::LANES * S::LANES;
    let mut i = 0;
    while i < whole {
        // SAFETY: the vectors lie within the slices, which are of one length.
        unsafe {
            let (low, high) = (low.as_mut_ptr().add(i), high.as_mut_ptr().add(i));
            let (a, b) = (s.load(low), s.load(high));
            let (cos, sin) = (s.load(cos.as_ptr().add(i)), s.load(sin.as_ptr().add(i)));
            s.store(low, s.sub(s.mul(a, cos), s.mul(b, sin)));
            s.store(high, s.add(s.mul(b, cos), s.mul(a, sin)));
        }
        i += S::LANES;
    }
    for i in whole..half {
        let (a, b) = (low[i], high[i]);
        low[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[i] + a * sin[i];
    }
}

/// `out`: the mean of the rows of `x`, each as long as `out`, divided by its length (not below 1e-12).
pub(super) fn pool_mean(x: &[f32], out: &mut [f32]) {
    let rows = x.len() / out.len();
    out.fill(0.0);
    for row in x.chunks_exact(out.len()) {
        for (sum, x) in out.iter_mut().zip(row) {
            *sum += x;
        }
    }
    let length: f64 = out
        .iter()
        .map(|&sum| (f64::from(sum) / rows as f64).powi(2))
        .sum();
    let scale = 1.0 / (rows as f64 * length.sqrt().max(1e-12));
    for x in out {
        *x = (f64::from(*x) * scale) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::super::Isa;
    use super::super::attention::{KvCache, KvShape, KvType};
    use super::super::simd::dispatch;
    use super::*;

    fn waves(len: usize, phase: f32) -> Vec<f32> {
        (0..len)
            .map(|i| (i as f32 * 0.7 + phase).sin() * 4.0)
            .collect()
    }

    fn assert_near(found: &[f32], expected: impl IntoIterator<Item = f64>, isa: Isa) {
        for (i, (x, y)) in found.iter().zip(expected).enumerate() {
            let close = (f64::from(*x) - y).abs() < 2e-6 * y.abs().max(1.0);
            assert!(close, "{}: {x} for {y} at {i}", isa.name());
        }
    }

    fn exact_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
        let wide = |x: &f32| f64::from(*x);
        let mean = x.iter().map(|x| wide(x).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        x.iter()
            .zip(weight)
            .map(|(x, w)| wide(x) * scale * wide(w))
            .collect()
    }

    #[test]
    fn norms_and_silu_of_any_width() {
        for isa in Isa::available() {
            for width in [1, 8, 31, 48, 576] {
                let (x, weight, mut residual) =
                    (waves(width, 0.1), waves(width, 2.0), waves(width, 5.0));
                let mut out = vec![f32::NAN; width];
                dispatch(
                    isa,
                    RmsNorm {
                        x: &x,
                        weight: &weight,
                        eps: 1e-5,
                        out: &mut out,
                    },
                );
                assert_near(&out, exact_norm(&x, &weight, 1e-5), isa);
                let sum: Vec<f32> = x.iter().zip(&residual).map(|(a, b)| a + b).collect();
                dispatch(
                    isa,
                    AddRmsNorm {
                        x: &x,
                        residual: &mut residual,
                        weight: &weight,
                        eps: 0.5,
                        out: &mut out,
                    },
                );
                assert_eq!(residual, sum);
                assert_near(&out, exact_norm(&sum, &weight, 0.5), isa);
                let mut gate_up = waves(2 * width, 1.0);
                gate_up[0] = -100.0;
                dispatch(
                    isa,
                    SiluMul {
                        gate_up: &gate_up,
                        out: &mut out,
                    },
                );
                let expected = (0..width).map(|i| {
                    let (g, u) = (f64::from(gate_up[i]), f64::from(gate_up[width + i]));
                    g / (1.0 + (-g).exp()) * u
                });
                assert_near(&out, expected, isa);
            }
        }
    }

    #[test]
    fn pairs_half_a_head_apart_are_rotated_after_the_norm() {
        const HEAD: usize = 20;
        let shape = KvShape {
            dtype: KvType::F32,
            kv_heads: 1,
            head_dim: HEAD,
        };
        let angles = waves(HEAD / 2, 0.3);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let weight = waves(HEAD, 3.0);
        let norm = HeadNorm {
            weight: &weight,
            eps: 1e-6,
        };
        for isa in Isa::available() {
            let mut cache = KvCache::new(shape, 1, 2);
            let given = waves(4 * HEAD, 0.9);
            let mut qkv = given.clone();
            dispatch(
                isa,
                RopeAndCache {
                    qkv: &mut qkv,
                    heads: 2,
                    cos: &cos,
                    sin: &sin,
                    q_norm: Some(norm),
                    k_norm: None,
                    cache: cache.view(),
                    layer: 0,
                    slot: 17,
                    next_slot: Some(18),
                },
            );
            for head in 0..3 {
                let raw = &given[head * HEAD..(head + 1) * HEAD];
                let normed = if head < 2 {
                    exact_norm(raw, &weight, 1e-6)
                } else {
                    raw.iter().map(|&x| f64::from(x)).collect()
                };
                let half = HEAD / 2;
                let expected = (0..HEAD).map(|i| {
                    let pair = i % half;
                    let (c, s) = (f64::from(cos[pair]), f64::from(sin[pair]));
                    if i < half {
                        normed[i] * c - normed[i + half] * s
                    } else {
                        normed[i] * c + normed[i - half] * s
                    }
                });
                assert_near(&qkv[head * HEAD..], expected, isa);
            }
            assert_eq!(qkv[3 * HEAD..], given[3 * HEAD..]);
            let page = cache.view().page_rows(0, 17, 0);
            assert_eq!(
                page,
                (qkv[2 * HEAD..3 * HEAD].to_vec(), given[3 * HEAD..].to_vec())
            );
        }
    }

    #[test]
    fn a_pooled_mean_has_length_1_and_zeros_stay_zeros() {
        let mut out = [0.0; 2];
        pool_mean(&[1.0, 2.0, 5.0, 6.0], &mut out);
        assert!((out[0] - 0.6).abs() < 1e-6 && (out[1] - 0.8).abs() < 1e-6);
        pool_mean(&[0.0; 4], &mut out);
        assert!(out.iter().all(|&x| x == 0.0));
    }
}
