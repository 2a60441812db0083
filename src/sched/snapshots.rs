//! Where the states of sequences become snapshots, in a model with recurrent layers: at the borders that a request names, at
//! multiples of a number of tokens, and where a sequence ends or is preempted.

use super::sequence::Sequence;

/// A border this close after a snapshot is skipped: computing these few tokens again costs less than an additional step now.
const NEAR: usize = 16;

impl Sequence {
    /// The first length above `computed` at which its state becomes a snapshot; `usize::MAX` if none does.
    fn next_snapshot(&self, computed: usize) -> usize {
        let pool = self.table.pool();
        let Some(states) = pool.states().filter(|_| pool.has_prefix_cache()) else {
            return usize::MAX;
        };
        let far = |border: &usize| *border > computed && *border > self.snapshot + NEAR;
        let border = self.new.borders.iter().copied().filter(far).min();
        let multiple = states.next_multiple(computed);
        border.map_or(multiple, |border| border.min(multiple))
    }

    /// Tokens of a step, which has granted it `granted` already, that lie before its next snapshot.
    pub(super) fn until_snapshot(&self, granted: usize) -> usize {
        self.next_snapshot(self.computed)
            .saturating_sub(self.computed + granted)
    }

    /// Adds what a step has computed after the first `before` tokens to the prefix cache.
    pub(super) fn register(&mut self, before: usize) {
        self.table.register(&self.tokens, self.computed);
        self.table.slide(self.computed, &self.new.borders);
        if self.table.has_state() {
            self.table.advance_state();
            if self.computed == self.next_snapshot(before) {
                self.table.leave_snapshot(&self.tokens, self.computed);
                self.snapshot = self.computed;
            }
        }
    }

    /// Whether `other` will leave a snapshot with which this one can go on.
    pub(super) fn shares_next_snapshot(&self, other: &Self) -> bool {
        let next = other.next_snapshot(other.computed);
        next > self.computed
            && next <= self.attachable()
            && self
                .table
                .pool()
                .shares(self.new.owner(), other.new.owner())
            && other.tokens.get(..next) == self.tokens.get(..next)
    }
}
