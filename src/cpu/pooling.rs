//! Pools the states of a text's tokens into one vector.

use crate::error::{Error, Result};

/// The states that are pooled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first token's.
    First,
    /// The last token's.
    Last,
    /// Their weighted mean, with weights 1, 2, 3 and so on (SGPT).
    Weighted,
}

impl Pooling {
    /// The pooling with a name of `lmserve.model.embedding`.
    ///
    /// # Errors
    /// `invalid_value` for another name.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "mean" => Ok(Self::Mean),
            "cls" => Ok(Self::First),
            "last" => Ok(Self::Last),
            "weighted" => Ok(Self::Weighted),
            _ => Err(Error::invalid(
                "pooling",
                format!("must be mean, cls, last or weighted, but {name} was given"),
            )),
        }
    }

    /// Writes the pooled vector of the rows of `states` to `out`. There is at least one row, and each is as long as `out`.
    pub(super) fn pool(self, states: &[f32], out: &mut [f32]) {
        let width = out.len();
        let rows = states.len() / width;
        match self {
            Self::First => out.copy_from_slice(&states[..width]),
            Self::Last => out.copy_from_slice(&states[states.len() - width..]),
            Self::Mean => sum(states, |_| 1.0, 1.0 / rows as f64, out),
            Self::Weighted => {
                let total = rows as f64 * (rows + 1) as f64 / 2.0;
                sum(states, |row| (row + 1) as f32, 1.0 / total, out);
            }
        }
    }
}

/// `out` = the weighted sum of the rows, times `scale`.
fn sum(states: &[f32], weight: impl Fn(usize) -> f32, scale: f64, out: &mut [f32]) {
    out.fill(0.0);
    for (at, row) in states.chunks_exact(out.len()).enumerate() {
        let weight = weight(at);
        for (sum, x) in out.iter_mut().zip(row) {
            *sum += x * weight;
        }
    }
    for x in out {
        *x = (f64::from(*x) * scale) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pooling_takes_what_it_says() {
        let states = [1.0, 2.0, 5.0, 6.0, 9.0, -2.0];
        for (pooling, [x, y]) in [
            (Pooling::Mean, [5.0, 2.0]),
            (Pooling::First, [1.0, 2.0]),
            (Pooling::Last, [9.0, -2.0]),
            (Pooling::Weighted, [38.0 / 6.0, 8.0 / 6.0]),
        ] {
            let mut out = [f32::NAN; 2];
            pooling.pool(&states, &mut out);
            let near = (out[0] - x).abs() < 1e-6 && (out[1] - y).abs() < 1e-6;
            assert!(near, "{pooling:?}: {out:?}");
        }
        assert!(Pooling::named("max").is_err());
    }
}
