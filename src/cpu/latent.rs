//! The keys and values of latent attention: one latent for all heads of a token, followed by rotated elements.
#![allow(
    clippy::inline_always,
    reason = "what is not inlined is compiled without the instructions it is made for"
)]

use super::attention::KvView;
use super::elementwise::{Norm, rotate};
use super::isa::Isa;
use super::memory::SharedSlice;
use super::pool::Team;
use super::simd::{Kernel, Simd, dispatch};

/// Rotates and stores the keys and values of one layer.
#[derive(Clone, Copy)]
pub(super) struct LatentCache<'a> {
    /// Width of the latent. The elements after it are rotated.
    pub(super) rank: usize,
    /// Tables of cos and sin, `[positions, rotated / 2]` each.
    pub(super) angles: Option<(&'a [f32], &'a [f32])>,
    /// Factors of the queries by position.
    pub(super) query_scales: Option<&'a [f32]>,
    /// The norm of the latent.
    pub(super) norm: Norm<'a>,
    /// The cache of the latents, which are key and value at once.
    pub(super) cache: KvView<'a>,
}

impl LatentCache<'_> {
    /// Rotates the last elements of each head of `q` `[tokens, q_width]` and of `kv` `[tokens, head_dim]` in place, applies the
    /// norm to the latents of `kv`, and stores `kv`.
    ///
    /// # Safety
    /// Slots must differ. Until it returns on all threads, nobody else may touch `q` and `kv`, nor these slots of the cache.
    pub(super) unsafe fn run(
        &self,
        team: &Team,
        isa: Isa,
        (q, q_width): (SharedSlice<f32>, usize),
        kv: SharedSlice<f32>,
        (positions, slots): (&[i32], &[i32]),
    ) {
        let width = self.cache.shape().head_dim;
        let half = (width - self.rank) / 2;
        let chunk = (slots.len() / (4 * team.size())).clamp(1, 16);
        team.for_chunks(slots.len(), chunk, |range| {
            for row in range {
                let position = positions[row] as usize;
                let at = position * half..(position + 1) * half;
                let one = LatentRow {
                    rank: self.rank,
                    // SAFETY: each row is one thread's.
                    q: unsafe { q.get_mut(row * q_width..(row + 1) * q_width) },
                    // SAFETY: as above.
                    kv: unsafe { kv.get_mut(row * width..(row + 1) * width) },
                    angles: self.angles.map(|(cos, sin)| (&cos[at.clone()], &sin[at])),
                    query_scale: self.query_scales.map(|scales| scales[position]),
                    norm: self.norm,
                    cache: self.cache,
                    slot: slots[row] as usize,
                };
                dispatch(isa, one);
            }
        });
    }
}

/// One token.
struct LatentRow<'a> {
    rank: usize,
    q: &'a mut [f32],
    kv: &'a mut [f32],
    angles: Option<(&'a [f32], &'a [f32])>,
    query_scale: Option<f32>,
    norm: Norm<'a>,
    cache: KvView<'a>,
    slot: usize,
}

impl Kernel for LatentRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (latent, rotated) = self.kv.split_at_mut(self.rank);
        self.norm.apply_to(s, latent);
        if let Some((cos, sin)) = self.angles {
            rotate(s, rotated, cos, sin);
            for head in self.q.chunks_exact_mut(self.cache.shape().head_dim) {
                rotate(s, &mut head[self.rank..], cos, sin);
            }
        }
        if let Some(scale) = self.query_scale {
            for q in self.q {
                *q *= scale;
            }
        }
        // SAFETY: every token of a step has a slot of its own.
        unsafe { self.cache.write(s, self.slot, 0, self.kv, self.kv) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention::{KvCache, KvShape, KvType};
    use super::super::pool::Pool;
    use super::*;

    #[test]
    fn latents_are_normed_and_what_follows_is_rotated() {
        const RANK: usize = 24;
        const WIDTH: usize = 32;
        let shape = KvShape {
            dtype: KvType::F32,
            kv_heads: 1,
            head_dim: WIDTH,
        };
        let waves = |len: usize, step: f32| -> Vec<f32> {
            (0..len).map(|i| (i as f32 * step).sin()).collect()
        };
        let (cos, sin) = (waves(12, 0.3), waves(12, 0.9));
        let weight = waves(RANK, 1.7);
        let norm = Norm {
            weight: &weight,
            bias: None,
            eps: 1e-6,
            centered: false,
        };
        for isa in Isa::available() {
            let mut cache = KvCache::new(&[shape], 1);
            let (mut q, mut kv) = (waves(2 * 2 * WIDTH, 0.2), waves(2 * WIDTH, 0.5));
            let given = (q.clone(), kv.clone());
            let layer = LatentCache {
                rank: RANK,
                angles: Some((&cos, &sin)),
                query_scales: None,
                norm,
                cache: cache.view().layer(0),
            };
            let (q_rows, kv_rows) = (SharedSlice::new(&mut q), SharedSlice::new(&mut kv));
            // SAFETY: nobody else has the buffers.
            Pool::new(2).run(&|team| unsafe {
                layer.run(team, isa, (q_rows, 2 * WIDTH), kv_rows, (&[2, 0], &[5, 3]));
            });
            for (row, (position, slot)) in [(2, 5), (0, 3)].into_iter().enumerate() {
                let turned = |x: &[f32]| -> Vec<f32> {
                    let (cos, sin) = (&cos[position * 4..][..4], &sin[position * 4..][..4]);
                    let low = (0..4).map(|i| x[i] * cos[i] - x[i + 4] * sin[i]);
                    let high = (0..4).map(|i| x[i + 4] * cos[i] + x[i] * sin[i]);
                    low.chain(high).collect()
                };
                let near = |found: &[f32], expected: &[f32]| {
                    found
                        .iter()
                        .zip(expected)
                        .all(|(a, b)| (a - b).abs() < 1e-5)
                };
                for head in 0..2 {
                    let at = (2 * row + head) * WIDTH;
                    assert_eq!(q[at..at + RANK], given.0[at..at + RANK]);
                    assert!(near(&q[at + RANK..], &turned(&given.0[at + RANK..])));
                }
                let own = &given.1[row * WIDTH..(row + 1) * WIDTH];
                let mean = own[..RANK].iter().map(|x| x * x).sum::<f32>() / RANK as f32;
                let scale = 1.0 / (mean + 1e-6).sqrt();
                let mut expected: Vec<f32> = own[..RANK]
                    .iter()
                    .zip(&weight)
                    .map(|(x, w)| x * scale * w)
                    .collect();
                expected.extend(turned(&own[RANK..]));
                let (key, value) = cache.view().layer(0).page_rows(slot, 0);
                assert!(
                    near(&key, &expected) && near(&value, &expected),
                    "{}",
                    isa.name()
                );
            }
        }
    }
}
