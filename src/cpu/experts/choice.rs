//! Routers choose the experts of a row, and the weights of their outputs.

/// How the experts and their weights follow from a row's logits. `s` are the logits, one for each expert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Router {
    /// `p = softmax(s)`; the largest `p`, divided by their sum where `normalized`.
    #[allow(missing_docs)]
    Softmax { normalized: bool },
    /// The largest `s`; their weights are the softmax over these alone.
    SoftmaxOfChosen,
    /// The largest `s`; their weights are `sigmoid(s)`.
    Sigmoid,
    /// `p = sigmoid(s)`. The largest `p + correction` among the experts of the `top_groups` groups whose two largest have the
    /// largest sum; their weights are `p`, divided by their sum plus `tiny` where `normalized`.
    #[allow(missing_docs)]
    CorrectedSigmoid {
        groups: usize,
        top_groups: usize,
        normalized: bool,
        tiny: f32,
    },
    /// `p = softmax(s)`; the largest `p` among the experts of the `top_groups` groups whose largest is largest.
    #[allow(missing_docs)]
    GroupedSoftmax { groups: usize, top_groups: usize },
    /// Repeatedly the largest `s` of the rest. Its weight is its softmax over those of the rest that are less than `2 * jitter`
    /// below it, relative to the larger of its size and theirs (`SparseMixer`, Phi-3.5-MoE).
    #[allow(missing_docs)]
    SparseMixer { jitter: f32 },
}

/// The values of a layer's router for each expert.
#[derive(Debug, Clone, Default)]
pub struct ExpertNumbers {
    /// Added to the scores that choose. Empty: nothing is added.
    pub correction: Vec<f32>,
    /// Factors of the weights. Empty: there are none.
    pub scale: Vec<f32>,
}

impl Router {
    /// Writes the numbers of the chosen experts to the first half of `out`, those that come first in the choice first, and
    /// their weights, times `factor`, to the second. `logits` become scores.
    ///
    /// Of equal scores the first is chosen. Where a score is none, some experts are chosen, and no weight is a number.
    pub(super) fn route(
        self,
        logits: &mut [f32],
        numbers: &ExpertNumbers,
        factor: f32,
        out: &mut [f32],
    ) {
        let (chosen, weights) = out.split_at_mut(out.len() / 2);
        let finite = logits.iter().all(|x| x.is_finite());
        match self {
            Self::Softmax { normalized } => {
                softmax(logits);
                choose(logits, chosen, |_| true);
                gather(logits, chosen, weights);
                if normalized {
                    normalize(weights, 0.0);
                }
            }
            Self::SoftmaxOfChosen => {
                choose(logits, chosen, |_| true);
                gather(logits, chosen, weights);
                softmax(weights);
            }
            Self::Sigmoid => {
                choose(logits, chosen, |_| true);
                gather(logits, chosen, weights);
                sigmoid(weights);
            }
            Self::CorrectedSigmoid {
                groups,
                top_groups,
                normalized,
                tiny,
            } => {
                sigmoid(logits);
                let size = logits.len() / groups;
                let corrected: Vec<f32> = match numbers.correction.as_slice() {
                    [] => logits.to_vec(),
                    correction => logits.iter().zip(correction).map(|(a, b)| a + b).collect(),
                };
                let best = |group: &[f32]| {
                    let mut two = [0.0; 2];
                    let count = size.min(2);
                    choose(group, &mut two[..count], |_| true);
                    two[..count].iter().map(|&i| group[i as usize]).sum()
                };
                let open = best_groups(&corrected, size, top_groups, best);
                choose(&corrected, chosen, |e| open[e / size]);
                gather(logits, chosen, weights);
                if normalized {
                    normalize(weights, tiny);
                }
            }
            Self::GroupedSoftmax { groups, top_groups } => {
                softmax(logits);
                let size = logits.len() / groups;
                let best = |group: &[f32]| group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let open = best_groups(logits, size, top_groups, best);
                choose(logits, chosen, |e| open[e / size]);
                gather(logits, chosen, weights);
            }
            Self::SparseMixer { jitter } => sparse_mixer(logits, jitter, chosen, weights),
        }
        for (weight, &expert) in weights.iter_mut().zip(&*chosen) {
            *weight *= factor;
            if let Some(scale) = numbers.scale.get(expert as usize) {
                *weight *= scale;
            }
            if !finite {
                *weight = f32::NAN;
            }
        }
    }
}

/// Writes the indices of the largest values that are `open` to `out`: the largest first, and of equal ones the first. NaN and
/// values that are not open come last.
fn choose(values: &[f32], out: &mut [f32], open: impl Fn(usize) -> bool) {
    let mut last = (f32::INFINITY, None);
    for place in 0..out.len() {
        let mut best: Option<usize> = None;
        for (i, &value) in values.iter().enumerate() {
            let after = value < last.0 || (value <= last.0 && Some(i) > last.1);
            if after && open(i) && best.is_none_or(|best| value > values[best]) {
                best = Some(i);
            }
        }
        let Some(best) = best else {
            let (before, rest) = out.split_at_mut(place);
            let left = (0..values.len()).filter(|&i| !before.contains(&(i as f32)));
            for (out, i) in rest.iter_mut().zip(left) {
                *out = i as f32;
            }
            return;
        };
        out[place] = best as f32;
        last = (values[best], Some(best));
    }
}

/// Which groups of `size` values are the `count` best.
fn best_groups(
    values: &[f32],
    size: usize,
    count: usize,
    score: impl Fn(&[f32]) -> f32,
) -> Vec<bool> {
    let scores: Vec<f32> = values.chunks_exact(size).map(score).collect();
    let mut open = vec![count >= scores.len(); scores.len()];
    if count < scores.len() {
        let mut chosen = vec![0.0; count];
        choose(&scores, &mut chosen, |_| true);
        for group in chosen {
            open[group as usize] = true;
        }
    }
    open
}

fn gather(values: &[f32], chosen: &[f32], out: &mut [f32]) {
    for (out, &expert) in out.iter_mut().zip(chosen) {
        *out = values[expert as usize];
    }
}

fn softmax(values: &mut [f32]) {
    let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for x in &mut *values {
        *x = (*x - largest).exp();
    }
    normalize(values, 0.0);
}

fn sigmoid(values: &mut [f32]) {
    for x in values {
        *x = 1.0 / (1.0 + (-*x).exp());
    }
}

fn normalize(values: &mut [f32], epsilon: f32) {
    let sum: f32 = values.iter().sum::<f32>() + epsilon;
    for x in values {
        *x /= sum;
    }
}

fn sparse_mixer(logits: &mut [f32], jitter: f32, chosen: &mut [f32], weights: &mut [f32]) {
    for place in 0..chosen.len() {
        let mut one = [0.0];
        choose(logits, &mut one, |i| !chosen[..place].contains(&(i as f32)));
        let best = one[0] as usize;
        chosen[place] = one[0];
        let largest = logits[best];
        let near = |i: usize, s: f32| {
            !chosen[..place].contains(&(i as f32))
                && (largest - s) / s.abs().max(largest.abs()) <= 2.0 * jitter
        };
        let among: f32 = (0..logits.len())
            .filter(|&i| near(i, logits[i]))
            .map(|i| (logits[i] - largest).exp())
            .sum();
        weights[place] = 1.0 / among;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 8] = [0.3, 2.0, -1.0, 1.5, 0.1, 2.5, -0.2, 0.9];

    fn routed(router: Router, numbers: &ExpertNumbers, top_k: usize) -> (Vec<f32>, Vec<f32>) {
        let mut out = vec![0.0; 2 * top_k];
        router.route(&mut LOGITS.clone(), numbers, 2.0, &mut out);
        let weights = out.split_off(top_k);
        (out, weights)
    }

    fn assert_near(found: &[f32], expected: &[f32]) {
        for (x, y) in found.iter().zip(expected) {
            assert!((x - y).abs() < 1e-6, "{found:?} for {expected:?}");
        }
    }

    #[test]
    fn every_router_chooses_and_weights_as_its_formula_says() {
        let none = ExpertNumbers::default();
        let total: f32 = LOGITS.iter().map(|x| x.exp()).sum();
        let p = LOGITS.map(|x| x.exp() / total);
        let sigmoid = LOGITS.map(|x| 1.0 / (1.0 + (-x).exp()));

        let (chosen, weights) = routed(Router::Softmax { normalized: false }, &none, 3);
        assert_eq!(chosen, [5.0, 1.0, 3.0]);
        assert_near(&weights, &[2.0 * p[5], 2.0 * p[1], 2.0 * p[3]]);

        let sum = p[5] + p[1] + p[3];
        let expected = [2.0 * p[5] / sum, 2.0 * p[1] / sum, 2.0 * p[3] / sum];
        let normalized = Router::Softmax { normalized: true };
        for router in [normalized, Router::SoftmaxOfChosen] {
            let (chosen, weights) = routed(router, &none, 3);
            assert_eq!(chosen, [5.0, 1.0, 3.0]);
            assert_near(&weights, &expected);
        }
        let scale = ExpertNumbers {
            scale: (0..8).map(|i| i as f32).collect(),
            ..ExpertNumbers::default()
        };
        let (_, weights) = routed(normalized, &scale, 3);
        let scaled = [5.0 * expected[0], expected[1], 3.0 * expected[2]];
        assert_near(&weights, &scaled);

        let (chosen, weights) = routed(Router::Sigmoid, &none, 2);
        assert_eq!(chosen, [5.0, 1.0]);
        assert_near(&weights, &[2.0 * sigmoid[5], 2.0 * sigmoid[1]]);

        // The sums of the two best of each pair: 0.574 + 0.881, 0.269 + 0.818 + 1, 0.525 + 0.924, 0.45 + 0.711.
        let corrected = |normalized| Router::CorrectedSigmoid {
            groups: 4,
            top_groups: 2,
            normalized,
            tiny: 0.5,
        };
        let numbers = ExpertNumbers {
            correction: vec![0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            ..ExpertNumbers::default()
        };
        let (chosen, weights) = routed(corrected(false), &numbers, 3);
        assert_eq!(chosen, [2.0, 1.0, 3.0]);
        assert_near(
            &weights,
            &[2.0 * sigmoid[2], 2.0 * sigmoid[1], 2.0 * sigmoid[3]],
        );
        let (_, normalized) = routed(corrected(true), &numbers, 3);
        let sum = sigmoid[2] + sigmoid[1] + sigmoid[3] + 0.5;
        assert_near(
            &normalized,
            &weights.iter().map(|w| w / sum).collect::<Vec<_>>(),
        );

        let grouped = Router::GroupedSoftmax {
            groups: 4,
            top_groups: 2,
        };
        let (chosen, weights) = routed(grouped, &none, 3);
        assert_eq!(chosen, [5.0, 1.0, 0.0]);
        assert_near(&weights, &[2.0 * p[5], 2.0 * p[1], 2.0 * p[0]]);
    }

    #[test]
    fn a_sparse_mixer_weighs_an_expert_against_those_that_are_near_it() {
        let mixer = Router::SparseMixer { jitter: 0.15 };
        let (chosen, weights) = routed(mixer, &ExpertNumbers::default(), 2);
        assert_eq!(chosen, [5.0, 1.0]);
        // (2.5 - 2) / 2.5 is not above 0.3, (2.5 - 1.5) / 2.5 is; then (2 - 1.5) / 2 is not.
        let first = 1.0 / (1.0 + (-0.5f32).exp());
        let second = 1.0 / (1.0 + (-0.5f32).exp());
        assert_near(&weights, &[2.0 * first, 2.0 * second]);
    }

    #[test]
    fn of_equal_scores_the_first_is_chosen_and_scores_that_are_none_choose_something() {
        let mut out = [0.0; 6];
        let none = ExpertNumbers::default();
        let router = Router::SoftmaxOfChosen;
        router.route(&mut [1.0, 2.0, -0.0, 2.0, 0.0], &none, 1.0, &mut out);
        assert_eq!(out[..3], [1.0, 3.0, 0.0]);
        let mut all = [0.0; 10];
        router.route(&mut [0.0, -0.0, 2.0, 0.0, -0.0], &none, 1.0, &mut all);
        assert_eq!(all[..5], [2.0, 0.0, 1.0, 3.0, 4.0]);
        for router in [
            router,
            Router::Softmax { normalized: true },
            Router::Sigmoid,
            Router::SparseMixer { jitter: 0.1 },
        ] {
            router.route(
                &mut [f32::NAN, 1.0, f32::NAN, f32::NAN],
                &none,
                1.0,
                &mut out,
            );
            assert!(out[..3].iter().all(|&expert| expert < 4.0));
            assert!(out[3..].iter().all(|weight| weight.is_nan()));
        }
    }
}
