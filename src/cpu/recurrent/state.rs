//! The states of recurrent layers: a slot of memory for each sequence that runs and for each snapshot.

use super::super::memory::SharedSlice;
use crate::error::{Error, Result};

/// What one layer keeps of a sequence, in f32: the last inputs of a causal convolution, and a matrix for each head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecurrentShape {
    /// Channels of the convolution.
    pub channels: usize,
    /// Tokens that the convolution sees, the current one included.
    pub kernel: usize,
    /// Matrices; 0: the convolution is all.
    pub heads: usize,
    /// Of a matrix: what keys and queries have elements.
    pub rows: usize,
    /// Of a matrix: what values have elements.
    pub columns: usize,
}

impl RecurrentShape {
    /// Numbers of the convolution's part, `[kernel - 1][channels]`, the oldest first.
    const fn conv_len(self) -> usize {
        self.channels * self.kernel.saturating_sub(1)
    }

    /// Numbers of one head's matrix, `[rows][columns]`.
    pub(super) const fn matrix_len(self) -> usize {
        self.rows * self.columns
    }

    /// Numbers in all.
    pub const fn len(self) -> usize {
        self.conv_len() + self.heads * self.matrix_len()
    }

    /// Whether it keeps nothing.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Slots with the states of all layers.
pub struct StateCache {
    /// Each layer's shape, and where its part of a slot begins.
    layers: Vec<(RecurrentShape, usize)>,
    slot_len: usize,
    slots: usize,
    memory: Vec<f32>,
}

impl StateCache {
    /// Room for `slots` states. Memory that is not written yet takes no RAM.
    pub fn new(shapes: &[RecurrentShape], slots: usize) -> Self {
        let mut slot_len = 0;
        let mut layers = Vec::with_capacity(shapes.len());
        for &shape in shapes {
            layers.push((shape, slot_len));
            slot_len += shape.len();
        }
        Self {
            layers,
            slot_len,
            slots,
            memory: vec![0.0; slots * slot_len],
        }
    }

    /// Whether no layer has a state.
    pub const fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// How many states there is room for.
    pub const fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes of a slot.
    pub const fn slot_bytes(&self) -> usize {
        self.slot_len * size_of::<f32>()
    }

    /// Appends the bytes of a slot.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn read_slot(&self, slot: usize, bytes: &mut Vec<u8>) {
        let numbers = &self.memory[slot * self.slot_len..(slot + 1) * self.slot_len];
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    }

    /// Writes what [`Self::read_slot`] gave to a slot.
    ///
    /// # Panics
    /// If there is no such slot, or the bytes are not of one.
    pub fn write_slot(&mut self, slot: usize, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.slot_bytes());
        let numbers = &mut self.memory[slot * self.slot_len..(slot + 1) * self.slot_len];
        for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks().0) {
            *number = f32::from_le_bytes(*bytes);
        }
    }

    /// What a team's threads read and write of it.
    pub fn view(&mut self) -> StateView<'_> {
        StateView {
            layers: &self.layers,
            slot_len: self.slot_len,
            memory: SharedSlice::new(&mut self.memory),
        }
    }
}

/// A [`StateCache`] shared by a team, whose threads work on different sequences, heads or channels.
#[derive(Clone, Copy)]
pub struct StateView<'a> {
    layers: &'a [(RecurrentShape, usize)],
    slot_len: usize,
    memory: SharedSlice<'a, f32>,
}

impl<'a> StateView<'a> {
    pub(super) fn shape(&self, layer: usize) -> RecurrentShape {
        self.layers[layer].0
    }

    /// The convolution's part of a slot, `[kernel - 1][channels]`.
    pub(super) fn conv(&self, layer: usize, slot: usize) -> SharedSlice<'a, f32> {
        let (shape, start) = self.layers[layer];
        let start = slot * self.slot_len + start;
        self.memory.part(start..start + shape.conv_len())
    }

    /// One head's matrix of a slot, `[rows][columns]`.
    pub(super) fn matrix(&self, layer: usize, slot: usize, head: usize) -> SharedSlice<'a, f32> {
        let (shape, start) = self.layers[layer];
        assert!(head < shape.heads);
        let start = slot * self.slot_len + start + shape.conv_len() + head * shape.matrix_len();
        self.memory.part(start..start + shape.matrix_len())
    }
}

/// The states of a step.
#[derive(Clone, Copy)]
pub struct StateStep<'a> {
    /// All of them.
    pub view: StateView<'a>,
    /// Of its sequences.
    pub spans: &'a [StateSpan],
}

/// One sequence's part of a step, as recurrent layers see it.
#[derive(Debug, Clone, Copy)]
pub struct StateSpan {
    /// Its first token among the step's.
    pub first_token: usize,
    /// Its tokens in the step, at least one.
    pub tokens: usize,
    /// How many of them its state goes beyond, at least one; those after them are guesses.
    pub kept: usize,
    /// The slot with its state before the step; `None`: it begins.
    pub from: Option<usize>,
    /// The slot that gets its state after the kept tokens; it may be the same.
    pub to: usize,
}

/// The spans of a step's sequences, which begin at the tokens `query_start` and of which `kept` go into the states, once their
/// slots are known to be there and to be written by one sequence each.
///
/// # Errors
/// `internal_error` for slots that are not there, or that are not of one sequence alone, and for tokens that are not there.
pub(in super::super) fn spans(
    query_start: &[i32],
    kept: &[i32],
    (from, to): (&[i32], &[i32]),
    slots: usize,
) -> Result<Vec<StateSpan>> {
    let sequences = query_start.len() - 1;
    if from.len() != sequences || to.len() != sequences || kept.len() != sequences {
        return Err(Error::internal("each sequence of the step needs a state"));
    }
    let mut written_by = vec![None; slots];
    for (sequence, &slot) in to.iter().enumerate() {
        let cell = usize::try_from(slot)
            .ok()
            .and_then(|slot| written_by.get_mut(slot));
        let Some(cell @ None) = cell else {
            return Err(Error::internal(format!(
                "the state slot {slot} is not there ({slots} are), or two sequences write it"
            )));
        };
        *cell = Some(sequence);
    }
    let mut spans = Vec::with_capacity(sequences);
    for (sequence, (&from, &to)) in from.iter().zip(to).enumerate() {
        let from = usize::try_from(from).ok();
        if from.is_some_and(|slot| {
            slot >= slots || written_by[slot].is_some_and(|writer| writer != sequence)
        }) {
            return Err(Error::internal(format!(
                "the state slot {from:?} is not there ({slots} are), or another sequence writes it"
            )));
        }
        let first_token = query_start[sequence] as usize;
        let tokens = query_start[sequence + 1] as usize - first_token;
        let kept = usize::try_from(kept[sequence]).unwrap_or(0);
        if !(1..=tokens).contains(&kept) {
            return Err(Error::internal(format!(
                "{kept} of {tokens} tokens go into a state; at least one must, and no more than there are"
            )));
        }
        spans.push(StateSpan {
            first_token,
            tokens,
            kept,
            from,
            to: to as usize,
        });
    }
    Ok(spans)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_are_missing_or_shared_are_refused() {
        let begins = [0, 2, 3];
        let all = [2, 1];
        let found = spans(&begins, &all, (&[-1, 1], &[0, 1]), 2).unwrap();
        assert_eq!((found[0].from, found[0].to, found[0].tokens), (None, 0, 2));
        assert_eq!(
            (found[1].from, found[1].to, found[1].tokens),
            (Some(1), 1, 1)
        );
        // One snapshot may begin several sequences.
        assert!(spans(&begins, &all, (&[2, 2], &[0, 1]), 3).is_ok());
        for (from, to) in [
            ([-1, -1], [0, 0]),
            ([-1, -1], [0, 2]),
            ([2, -1], [0, 1]),
            ([1, 0], [0, 1]),
        ] {
            let found = spans(&begins, &all, (&from, &to), 2);
            assert!(found.is_err(), "{from:?} {to:?}");
        }
        assert!(spans(&begins, &all, (&[0], &[0]), 2).is_err());
        for kept in [[0, 1], [2, 2], [3, 1], [-1, 1]] {
            assert!(spans(&begins, &kept, (&[-1, 1], &[0, 1]), 2).is_err());
        }
        let guessed = spans(&begins, &[1, 1], (&[-1, 1], &[0, 1]), 2).unwrap();
        assert_eq!((guessed[0].tokens, guessed[0].kept), (2, 1));
    }

    #[test]
    fn slots_and_layers_lie_apart() {
        let shape = |channels, kernel, heads| RecurrentShape {
            channels,
            kernel,
            heads,
            rows: 2,
            columns: 5,
        };
        let mut cache = StateCache::new(&[shape(3, 4, 2), shape(7, 3, 0)], 3);
        let view = cache.view();
        let mut parts = Vec::new();
        for slot in 0..3 {
            let matrices = [0, 1].map(|head| view.matrix(0, slot, head));
            parts.push(view.conv(0, slot));
            parts.extend(matrices);
            parts.push(view.conv(1, slot));
        }
        let lens: Vec<usize> = parts[..4].iter().map(SharedSlice::len).collect();
        assert_eq!(lens, [9, 10, 10, 14]);
        for pair in parts.windows(2) {
            // SAFETY: the end of a part lies within the memory or right behind it.
            let end = unsafe { pair[0].as_ptr().add(pair[0].len()) };
            assert_eq!(end, pair[1].as_ptr());
        }
    }
}
