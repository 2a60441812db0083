//! The marginal time of one sampled row. It differs with the machine, the model and the batch, and is learned from past steps.

/// Weight of the latest step.
const RATE: f64 = 1.0 / 64.0;
/// Variance of the number of rows (in rows, squared) at which the measured value counts as much as the assumed one.
const ROWS_DOUBT: f64 = 0.1;
/// The same for contexts, whose tokens are assumed to cost nothing.
const CONTEXT_DOUBT: f64 = 1e4;
/// A step that takes this many times the expected time was delayed by something else.
const OUTLIER: f64 = 3.0;

/// The size of a step: its rows, and the tokens that they attend to, counted once per sequence.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Size {
    pub(super) rows: f64,
    pub(super) context: f64,
}

/// A plane fitted to the times of the last steps by their sizes: least squares with decaying weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepCost {
    /// Marginal time of a row, in steps without rows. It is used while the steps' rows do not vary.
    assumed: f64,
    steps: f64,
    mean: Size,
    seconds: f64,
    /// Variances of rows and contexts, and their covariance.
    variance: Size,
    shared: f64,
    /// Covariances with the time.
    covariance: Size,
}

impl StepCost {
    pub(super) const fn new(assumed: f32) -> Self {
        const NONE: Size = Size {
            rows: 0.0,
            context: 0.0,
        };
        Self {
            assumed: assumed as f64,
            steps: 0.0,
            mean: NONE,
            seconds: 0.0,
            variance: NONE,
            shared: 0.0,
            covariance: NONE,
        }
    }

    /// Adds a step in which each token was a sampled row.
    pub(super) fn note(&mut self, size: Size, seconds: f64) {
        let seconds = if self.steps > 0.0 {
            seconds.min(OUTLIER * self.expected(size))
        } else {
            seconds
        };
        self.steps += 1.0;
        let rate = RATE.max(1.0 / self.steps);
        let (rows, context) = (size.rows - self.mean.rows, size.context - self.mean.context);
        let longer = seconds - self.seconds;
        self.mean.rows += rate * rows;
        self.mean.context += rate * context;
        self.seconds += rate * longer;
        let take = |sum: &mut f64, product: f64| *sum = (1.0 - rate) * rate.mul_add(product, *sum);
        take(&mut self.variance.rows, rows * rows);
        take(&mut self.variance.context, context * context);
        take(&mut self.shared, rows * context);
        take(&mut self.covariance.rows, rows * longer);
        take(&mut self.covariance.context, context * longer);
    }

    /// Time of a step of this size, and marginal time of one more row of its sequences, in the same unit.
    pub(super) fn of(&self, size: Size) -> (f64, f64) {
        if self.steps == 0.0 || self.seconds <= 0.0 {
            return (self.assumed.mul_add(size.rows, 1.0), self.assumed);
        }
        (self.expected(size), self.slopes().rows)
    }

    fn expected(&self, size: Size) -> f64 {
        let slopes = self.slopes();
        let rows = slopes.rows * (size.rows - self.mean.rows);
        let context = slopes.context * (size.context - self.mean.context);
        // Far from the measured steps, the plane may give any value.
        (self.seconds + rows + context).max(self.seconds / 4.0)
    }

    /// Marginal seconds of a row, and of a token of context.
    fn slopes(&self) -> Size {
        let assumed = self.assumed * self.seconds / self.assumed.mul_add(self.mean.rows, 1.0);
        let rows_variance = self.variance.rows + ROWS_DOUBT;
        let context_variance = self.variance.context + CONTEXT_DOUBT;
        let rows = ROWS_DOUBT.mul_add(assumed, self.covariance.rows);
        let context = self.covariance.context;
        // The added variances keep it above 0.
        let determinant = rows_variance.mul_add(context_variance, -self.shared * self.shared);
        let slope = rows.mul_add(context_variance, -self.shared * context) / determinant;
        let context = context.mul_add(rows_variance, -self.shared * rows) / determinant;
        Size {
            rows: slope.max(0.0),
            context: context.max(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(rows: usize, context: usize) -> Size {
        Size {
            rows: rows as f64,
            context: context as f64,
        }
    }

    /// A row's share of a step of 8 rows over 1,000 tokens.
    fn share(cost: &StepCost) -> f64 {
        let (step, row) = cost.of(size(8, 1000));
        row / step
    }

    fn after(assumed: f32, steps: impl IntoIterator<Item = (Size, f64)>) -> StepCost {
        let mut cost = StepCost::new(assumed);
        for (size, seconds) in steps {
            cost.note(size, seconds);
        }
        cost
    }

    /// Rows of `row` seconds beside 4 ms and a microsecond for each token of context, for some sequences with some drafts.
    fn step(i: usize, row: f64) -> (Size, f64) {
        let (sequences, drafts) = (1 + i * 5 % 7, i * 11 % 4);
        let (rows, context) = (sequences + drafts, sequences * 250 + i * 13 % 200);
        let fixed = 1e-6_f64.mul_add(context as f64, 0.004);
        (size(rows, context), row.mul_add(rows as f64, fixed))
    }

    const SHARE: f64 = 0.001 / 0.013;

    #[test]
    fn what_was_assumed_holds_until_rows_vary() {
        for steps in [0, 1, 100] {
            let cost = after(0.3, vec![(size(8, 1000), 0.02); steps]);
            assert!((share(&cost) - 0.3 / 3.4).abs() < 1e-6);
        }
        let cost = after(0.3, [(size(1, 9), 0.0), (size(2, 9), 0.0)]);
        assert!((share(&cost) - 0.3 / 3.4).abs() < 1e-6);
    }

    #[test]
    fn what_steps_show_takes_its_place_whether_it_is_more_or_less() {
        for assumed in [0.01, 0.25, 2.0] {
            let found = share(&after(assumed, (0..200).map(|i| step(i, 0.001))));
            assert!((found / SHARE - 1.0).abs() < 0.1, "{assumed}: {found}");
        }
    }

    #[test]
    fn what_changes_is_learned_anew() {
        let first = (0..500).map(|i| step(i, 0.0001));
        let found = share(&after(0.25, first.chain((0..500).map(|i| step(i, 0.001)))));
        assert!((found / SHARE - 1.0).abs() < 0.1, "{found}");
    }

    #[test]
    fn steps_that_were_held_up_hardly_count() {
        let held_up = |i: usize| {
            let (size, seconds) = step(i, 0.001);
            (size, if i % 50 == 49 { 5.0 } else { seconds })
        };
        let found = share(&after(0.25, (0..300).map(held_up)));
        assert!((0.5..2.0).contains(&(found / SHARE)), "{found}");
    }

    #[test]
    fn rows_that_cost_nothing_are_free() {
        let found = share(&after(0.3, (0..200).map(|i| step(i, 0.0))));
        assert!(found < 0.02, "{found}");
    }
}
