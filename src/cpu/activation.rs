//! The activation functions of feed-forward networks.
#![allow(
    clippy::inline_always,
    reason = "what is not inlined is compiled without the instructions it is made for"
)]

use super::simd::{Kernel, Simd, exp};

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// 1 / (1 + e^-x).
    Sigmoid,
    /// x times the normal distribution function of x.
    Gelu,
    /// GELU, approximated with tanh.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// max(x, 0)^2.
    ReluSquared,
    /// xIELU (Huang and Schlag, 2024): beta * x, plus positive * x^2 above 0 and negative * (e^x - 1 - x) below.
    #[allow(missing_docs)]
    Xielu {
        positive: f32,
        negative: f32,
        beta: f32,
    },
    /// x * sigmoid(alpha * x), with x at most `limit`. The factor is clamped to [-limit, limit], plus 1 (gpt-oss).
    #[allow(missing_docs)]
    ClampedSwiglu { alpha: f32, limit: f32 },
}

/// `out` = the activation of `x`, times `factor` if it is set. All have the same length.
pub(super) struct Activate<'a> {
    pub(super) activation: Activation,
    pub(super) x: &'a [f32],
    pub(super) factor: Option<&'a [f32]>,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.activation {
            Activation::Silu => self.apply(s, Silu),
            Activation::Sigmoid => self.apply(s, Sigmoid),
            Activation::Gelu => self.apply(s, Gelu),
            Activation::GeluTanh => self.apply(s, GeluTanh),
            Activation::Relu => self.apply(s, Relu),
            Activation::ReluSquared => self.apply(s, ReluSquared),
            Activation::Xielu {
                positive,
                negative,
                beta,
            } => self.apply(s, Xielu(positive, negative, beta)),
            Activation::ClampedSwiglu { alpha, limit } => {
                self.apply(s, ClampedSwiglu(alpha, limit));
            }
        }
    }
}

impl Activate<'_> {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, function: impl Function) {
        let (x, len) = (self.x, self.out.len());
        assert!(x.len() == len && self.factor.is_none_or(|factor| factor.len() == len));
        let whole = len / S::LANES * S::LANES;
        let mut i = 0;
        if let Some(factor) = self.factor {
            while i < whole {
                // SAFETY: the vectors lie within the slices, which are of one length.
                unsafe {
                    let y = function.of(s, s.load(x.as_ptr().add(i)));
                    let y = s.mul(y, function.factor(s, s.load(factor.as_ptr().add(i))));
                    s.store(self.out.as_mut_ptr().add(i), y);
                }
                i += S::LANES;
            }
        } else {
            while i < whole {
                // SAFETY: as above.
                unsafe {
                    let y = function.of(s, s.load(x.as_ptr().add(i)));
                    s.store(self.out.as_mut_ptr().add(i), y);
                }
                i += S::LANES;
            }
        }
        let (mut tail, mut factors) = ([0.0; 16], [1.0; 16]);
        let rest = len - whole;
        tail[..rest].copy_from_slice(&x[whole..]);
        // SAFETY: a tail has room for a vector.
        unsafe {
            let mut y = function.of(s, s.load(tail.as_ptr()));
            if let Some(factor) = self.factor {
                factors[..rest].copy_from_slice(&factor[whole..]);
                y = s.mul(y, function.factor(s, s.load(factors.as_ptr())));
            }
            s.store(tail.as_mut_ptr(), y);
        }
        self.out[whole..].copy_from_slice(&tail[..rest]);
    }
}

/// A function of vectors.
trait Function: Copy {
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V;

    /// Converts the given factor before the multiplication.
    #[inline(always)]
    fn factor<S: Simd>(self, _: S, x: S::V) -> S::V {
        x
    }
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// x * sigmoid(x).
#[inline(always)]
pub(super) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    s.mul(x, sigmoid(s, x))
}

#[derive(Clone, Copy)]
struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        silu(s, x)
    }
}

#[derive(Clone, Copy)]
struct Sigmoid;

impl Function for Sigmoid {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        sigmoid(s, x)
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

impl Function for GeluTanh {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        // (1 + tanh(y)) / 2 is sigmoid(2 y), and y is sqrt(2 / pi) (x + 0.044715 x^3).
        let cubic = s.mul_add(s.mul(x, x), s.splat(0.071_354_814), s.splat(1.595_769));
        s.mul(x, sigmoid(s, s.mul(x, cubic)))
    }
}

#[derive(Clone, Copy)]
struct Gelu;

impl Function for Gelu {
    /// By approximation 7.1.26 of Abramowitz and Stegun. The error is at most 1.5e-7.
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        let (zero, one) = (s.splat(0.0), s.splat(1.0));
        let size = s.max(x, s.sub(zero, x));
        let z = s.mul(size, s.splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = s.div(one, s.mul_add(z, s.splat(0.327_591_1), one));
        let sum = s.mul_add(s.splat(1.061_405_4), t, s.splat(-1.453_152));
        let sum = s.mul_add(sum, t, s.splat(1.421_413_7));
        let sum = s.mul_add(sum, t, s.splat(-0.284_496_74));
        let sum = s.mul_add(sum, t, s.splat(0.254_829_6));
        let beyond = s.mul(s.mul(sum, t), exp(s, s.sub(zero, s.mul(z, z))));
        // The distribution function is beyond / 2 below 0, and 1 - beyond / 2 above.
        let tail = s.mul(s.mul(size, s.splat(0.5)), beyond);
        s.sub(s.max(x, zero), tail)
    }
}

#[derive(Clone, Copy)]
struct Relu;

impl Function for Relu {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.max(x, s.splat(0.0))
    }
}

#[derive(Clone, Copy)]
struct ReluSquared;

impl Function for ReluSquared {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        let above = s.max(x, s.splat(0.0));
        s.mul(above, above)
    }
}

#[derive(Clone, Copy)]
struct Xielu(f32, f32, f32);

impl Function for Xielu {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        let Self(positive, negative, beta) = self;
        let zero = s.splat(0.0);
        let (above, below) = (s.max(x, zero), s.min(x, zero));
        let curve = s.sub(s.sub(exp(s, below), s.splat(1.0)), below);
        let curve = s.mul(curve, s.splat(negative));
        let square = s.mul_add(s.mul(above, above), s.splat(positive), curve);
        s.mul_add(x, s.splat(beta), square)
    }
}

#[derive(Clone, Copy)]
struct ClampedSwiglu(f32, f32);

impl Function for ClampedSwiglu {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        let x = s.min(s.splat(self.1), x);
        s.mul(x, sigmoid(s, s.mul(x, s.splat(self.0))))
    }

    #[inline(always)]
    fn factor<S: Simd>(self, s: S, x: S::V) -> S::V {
        let x = s.max(s.splat(-self.1), s.min(s.splat(self.1), x));
        s.add(x, s.splat(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Isa;
    use super::super::simd::dispatch;
    use super::*;

    /// Twice the integral of the normal density, by Simpson's rule.
    fn erf(x: f64) -> f64 {
        let steps = 2000;
        let width = x / f64::from(steps);
        let density = |i: i32| (-(f64::from(i) * width).powi(2)).exp();
        let inner: f64 = (1..steps)
            .map(|i| density(i) * if i % 2 == 1 { 4.0 } else { 2.0 })
            .sum();
        (density(0) + inner + density(steps)) * width / 3.0 * std::f64::consts::FRAC_2_SQRT_PI
    }

    fn exact(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2.0_f64.sqrt())),
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh())
            }
            Activation::Relu => x.max(0.0),
            Activation::ReluSquared => x.max(0.0).powi(2),
            Activation::Xielu {
                positive,
                negative,
                beta,
            } => {
                let (positive, negative) = (f64::from(positive), f64::from(negative));
                let curve = if x > 0.0 {
                    positive * x * x
                } else {
                    negative * (x.exp_m1() - x)
                };
                curve + f64::from(beta) * x
            }
            Activation::ClampedSwiglu { alpha, limit } => {
                let x = x.min(f64::from(limit));
                x / (1.0 + (-f64::from(alpha) * x).exp())
            }
        }
    }

    fn exact_factor(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::ClampedSwiglu { limit, .. } => {
                x.clamp(-f64::from(limit), f64::from(limit)) + 1.0
            }
            _ => x,
        }
    }

    #[test]
    fn every_activation_of_any_width_with_and_without_a_factor() {
        let xielu = Activation::Xielu {
            positive: 0.8,
            negative: 0.6,
            beta: 0.5,
        };
        let all = [
            Activation::Silu,
            Activation::Sigmoid,
            Activation::Gelu,
            Activation::GeluTanh,
            Activation::Relu,
            Activation::ReluSquared,
            xielu,
            Activation::ClampedSwiglu {
                alpha: 1.702,
                limit: 0.7,
            },
        ];
        for isa in Isa::available() {
            for width in [1, 8, 31, 48, 576] {
                let mut x: Vec<f32> = (0..width).map(|i| (i as f32 * 0.7).sin() * 4.0).collect();
                x[0] = -100.0;
                let factor: Vec<f32> = (0..width).map(|i| (i as f32 * 0.3).cos()).collect();
                for (activation, factor) in all
                    .into_iter()
                    .flat_map(|a| [(a, None), (a, Some(factor.as_slice()))])
                {
                    let mut out = vec![f32::NAN; width];
                    let row = Activate {
                        activation,
                        x: &x,
                        factor,
                        out: &mut out,
                    };
                    dispatch(isa, row);
                    for i in 0..width {
                        let by = factor
                            .map_or(1.0, |factor| exact_factor(activation, f64::from(factor[i])));
                        let y = exact(activation, f64::from(x[i])) * by;
                        let near = (f64::from(out[i]) - y).abs() < 2e-6 * y.abs().max(1.0);
                        assert!(near, "{} {activation:?}({}): {}", isa.name(), x[i], out[i]);
                    }
                }
            }
        }
    }
}
