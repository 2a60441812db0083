//! Elementwise operations on rows of activations.
#![allow(
    clippy::inline_always,
    reason = "what is not inlined is compiled without the instructions it is made for"
)]

use super::attention::KvView;
use super::simd::{Kernel, Simd, tanh};

/// A norm's weights, as wide as what it norms.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// The factor of each element.
    pub weight: &'a [f32],
    /// Added to each element after that.
    pub bias: Option<&'a [f32]>,
    /// Added to the mean of squares.
    pub eps: f32,
    /// Whether the mean is subtracted first. If so, it is a layer norm; otherwise, an RMS norm.
    pub centered: bool,
}

impl Norm<'_> {
    /// The weights of one part of a row, if each of several parts has weights of its own. Only a norm of one part has a bias.
    #[must_use]
    pub fn part(&self, index: usize, width: usize) -> Self {
        let weight = &self.weight[index * width..(index + 1) * width];
        Self { weight, ..*self }
    }

    /// `out` = the norm of `x`. Both have the same length.
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: &[f32], out: &mut [f32]) {
        if self.centered {
            let mean = sum(s, x) / x.len() as f32;
            for (out, x) in out.iter_mut().zip(x) {
                *out = x - mean;
            }
            let scale = inverse_rms(s, out, self.eps);
            for (out, weight) in out.iter_mut().zip(self.weight) {
                *out = *out * scale * weight;
            }
        } else {
            let scale = inverse_rms(s, x, self.eps);
            let each = out.iter_mut().zip(x).zip(self.weight);
            for ((out, x), weight) in each {
                *out = x * scale * weight;
            }
        }
        if let Some(bias) = self.bias {
            for (out, bias) in out.iter_mut().zip(bias) {
                *out += bias;
            }
        }
    }

    /// Applies an RMS norm in place.
    #[inline(always)]
    pub(super) fn apply_to<S: Simd>(&self, s: S, x: &mut [f32]) {
        let scale = inverse_rms(s, x, self.eps);
        for (x, weight) in x.iter_mut().zip(self.weight) {
            *x = *x * scale * weight;
        }
    }
}

/// `out` = the norm of `x`.
pub(super) struct NormRow<'a> {
    pub(super) x: &'a [f32],
    pub(super) norm: Norm<'a>,
    pub(super) out: &'a mut [f32],
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.norm.apply(s, self.x, self.out);
    }
}

/// `residual += x * scale`.
pub(super) struct AddRow<'a> {
    pub(super) x: &'a [f32],
    pub(super) scale: f32,
    pub(super) residual: &'a mut [f32],
}

impl Kernel for AddRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (residual, x) in self.residual.iter_mut().zip(self.x) {
            *residual += x * self.scale;
        }
    }
}

/// `residual += x * scale`, and the norm of the sum to `out`.
pub(super) struct AddNormRow<'a> {
    pub(super) x: &'a [f32],
    pub(super) scale: f32,
    pub(super) residual: &'a mut [f32],
    pub(super) norm: Norm<'a>,
    pub(super) out: &'a mut [f32],
}

impl Kernel for AddNormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let add = AddRow {
            x: self.x,
            scale: self.scale,
            residual: self.residual,
        };
        add.run(s);
        self.norm.apply(s, self.residual, self.out);
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

#[inline(always)]
fn sum<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut total = s.splat(0.0);
    let mut vectors = x.chunks_exact(S::LANES);
    for vector in &mut vectors {
        // SAFETY: the chunk is one vector.
        total = s.add(total, unsafe { s.load(vector.as_ptr()) });
    }
    s.sum(total) + vectors.remainder().iter().sum::<f32>()
}

/// Rotates the queries and keys of one token's `qkv` (q | k | v) in place, and stores key and value in the cache.
///
/// A norm is as wide as a head, or as all heads together. It is applied before the rotation.
pub(super) struct RopeAndCache<'a> {
    /// If it contains only queries, nothing is stored.
    pub(super) qkv: &'a mut [f32],
    pub(super) heads: usize,
    /// Cos and sin of the token's position, `[head_dim / 2]` each. `None`: no rotation.
    pub(super) angles: Option<(&'a [f32], &'a [f32])>,
    /// The factor of the queries.
    pub(super) query_scale: Option<f32>,
    pub(super) q_norm: Option<Norm<'a>>,
    pub(super) k_norm: Option<Norm<'a>>,
    pub(super) v_norm: Option<Norm<'a>>,
    pub(super) cache: KvView<'a>,
    pub(super) slot: usize,
    /// The slot of the next token, if there is one.
    pub(super) next_slot: Option<usize>,
}

impl Kernel for RopeAndCache<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let shape = self.cache.shape();
        let (q, kv) = self.qkv.split_at_mut(self.heads * shape.head_dim);
        prepare(s, q, shape.head_dim, self.q_norm, self.angles);
        if let Some(scale) = self.query_scale {
            for q in q {
                *q *= scale;
            }
        }
        if kv.is_empty() {
            return;
        }
        if let Some(slot) = self.next_slot {
            self.cache.prefetch(s, slot);
        }
        let (k, v) = kv.split_at_mut(shape.kv_heads * shape.head_dim);
        prepare(s, k, shape.head_dim, self.k_norm, self.angles);
        if self.v_norm.is_some() {
            prepare(s, v, shape.head_dim, self.v_norm, None);
        }
        let each = k
            .chunks_exact(shape.head_dim)
            .zip(v.chunks_exact(shape.head_dim));
        for (index, (key, value)) in each.enumerate() {
            // SAFETY: every token of a step has a slot of its own.
            unsafe { self.cache.write(s, self.slot, index, key, value) };
        }
    }
}

/// Applies norm and rotation to heads.
#[inline(always)]
fn prepare<S: Simd>(
    s: S,
    heads: &mut [f32],
    head_dim: usize,
    norm: Option<Norm>,
    angles: Option<(&[f32], &[f32])>,
) {
    let whole = norm.filter(|norm| norm.weight.len() == heads.len());
    if let Some(norm) = whole {
        norm.apply_to(s, heads);
    }
    for head in heads.chunks_exact_mut(head_dim) {
        if let (Some(norm), None) = (norm, whole) {
            norm.apply_to(s, head);
        }
        if let Some((cos, sin)) = angles {
            rotate(s, head, cos, sin);
        }
    }
}

/// Rotates a head's pairs of elements, which are half a head apart.
#[inline(always)]
pub(super) fn rotate<S: Simd>(s: S, head: &mut [f32], cos: &[f32], sin: &[f32]) {
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

/// Replaces each number of `x` by `cap * tanh(x / cap)`.
pub(super) struct Cap<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) cap: f32,
}

impl Kernel for Cap<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (cap, inverse) = (s.splat(self.cap), s.splat(1.0 / self.cap));
        let mut vectors = self.x.chunks_exact_mut(S::LANES);
        for vector in &mut vectors {
            // SAFETY: the chunk is one vector.
            unsafe {
                let x = s.mul(s.load(vector.as_ptr()), inverse);
                s.store(vector.as_mut_ptr(), s.mul(cap, tanh(s, x)));
            }
        }
        let rest = vectors.into_remainder();
        let mut tail = [0.0; 16];
        tail[..rest.len()].copy_from_slice(rest);
        // SAFETY: a tail has room for a vector.
        unsafe {
            let x = s.mul(s.load(tail.as_ptr()), inverse);
            s.store(tail.as_mut_ptr(), s.mul(cap, tanh(s, x)));
        }
        rest.copy_from_slice(&tail[..rest.len()]);
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
    fn norms_of_any_width() {
        for isa in Isa::available() {
            for width in [1, 8, 31, 48, 576] {
                let (x, weight, mut residual) =
                    (waves(width, 0.1), waves(width, 2.0), waves(width, 5.0));
                let norm = |eps| Norm {
                    weight: &weight,
                    bias: None,
                    eps,
                    centered: false,
                };
                let mut out = vec![f32::NAN; width];
                let row = NormRow {
                    x: &x,
                    norm: norm(1e-5),
                    out: &mut out,
                };
                dispatch(isa, row);
                assert_near(&out, exact_norm(&x, &weight, 1e-5), isa);
                let sum: Vec<f32> = x.iter().zip(&residual).map(|(a, b)| a + b * 0.5).collect();
                let mut total = x.clone();
                let row = AddNormRow {
                    x: &residual,
                    scale: 0.5,
                    residual: &mut total,
                    norm: norm(0.5),
                    out: &mut out,
                };
                dispatch(isa, row);
                assert_eq!(total, sum);
                assert_near(&out, exact_norm(&sum, &weight, 0.5), isa);
                let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
                let centered: Vec<f32> = x.iter().map(|&x| (f64::from(x) - mean) as f32).collect();
                let bias = residual.clone();
                let row = NormRow {
                    x: &x,
                    norm: Norm {
                        bias: Some(&bias),
                        centered: true,
                        ..norm(0.1)
                    },
                    out: &mut residual,
                };
                dispatch(isa, row);
                let expected = exact_norm(&centered, &weight, 0.1);
                let expected = expected.iter().zip(&bias).map(|(x, b)| x + f64::from(*b));
                assert_near(&residual, expected, isa);
            }
        }
    }

    #[test]
    fn a_norm_as_wide_as_all_heads_and_values_and_queries_alone() {
        const HEAD: usize = 16;
        let shape = KvShape {
            dtype: KvType::F32,
            kv_heads: 2,
            head_dim: HEAD,
        };
        let (q_weight, k_weight, ones) = (waves(4 * HEAD, 1.0), waves(2 * HEAD, 2.0), [1.0; HEAD]);
        for isa in Isa::available() {
            let mut cache = KvCache::new(&[shape], 1);
            let norm = |weight| {
                Some(Norm {
                    weight,
                    bias: None,
                    eps: 1e-6,
                    centered: false,
                })
            };
            let given = waves(8 * HEAD, 0.4);
            let mut qkv = given.clone();
            let store = |qkv: &mut [f32], cache: &mut KvCache| {
                let row = RopeAndCache {
                    qkv,
                    heads: 4,
                    angles: None,
                    query_scale: Some(3.0),
                    q_norm: norm(&q_weight),
                    k_norm: norm(&k_weight),
                    v_norm: norm(&ones),
                    cache: cache.view().layer(0),
                    slot: 2,
                    next_slot: None,
                };
                dispatch(isa, row);
            };
            store(&mut qkv, &mut cache);
            let q = exact_norm(&given[..4 * HEAD], &q_weight, 1e-6);
            assert_near(&qkv, q.iter().map(|x| x * 3.0), isa);
            let (key, value) = cache.view().layer(0).page_rows(2, 1);
            let k = exact_norm(&given[4 * HEAD..6 * HEAD], &k_weight, 1e-6);
            assert_near(&key, k[HEAD..].iter().copied(), isa);
            assert_near(&value, exact_norm(&given[7 * HEAD..], &ones, 1e-6), isa);
            let mut alone = given[..4 * HEAD].to_vec();
            let mut untouched = KvCache::new(&[shape], 1);
            store(&mut alone, &mut untouched);
            assert_eq!(alone, qkv[..4 * HEAD]);
            let stored = untouched.view().layer(0).page_rows(2, 1);
            assert_eq!(stored, (vec![0.0; HEAD], vec![0.0; HEAD]));
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
        let norm = Norm {
            weight: &weight,
            bias: None,
            eps: 1e-6,
            centered: false,
        };
        for isa in Isa::available() {
            let mut cache = KvCache::new(&[shape], 2);
            let given = waves(4 * HEAD, 0.9);
            let mut qkv = given.clone();
            dispatch(
                isa,
                RopeAndCache {
                    qkv: &mut qkv,
                    heads: 2,
                    angles: Some((&cos, &sin)),
                    query_scale: None,
                    q_norm: Some(norm),
                    k_norm: None,
                    v_norm: None,
                    cache: cache.view().layer(0),
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
            let page = cache.view().layer(0).page_rows(17, 0);
            assert_eq!(
                page,
                (qkv[2 * HEAD..3 * HEAD].to_vec(), given[3 * HEAD..].to_vec())
            );
        }
    }
}
