//! The operations of recurrent layers in a step, spread over a team.

use std::ops::Range;

use super::super::memory::SharedSlice;
use super::super::model::Weight;
use super::super::op::Value;
use super::super::pool::Team;
use super::super::simd::dispatch;
use super::super::step_context::StepContext;
use super::conv::{CHANNELS, ConvGate, ConvTokens};
use super::scan::{COLUMNS, ScanRule, ScanTokens, TokenRows};
use super::state::StateSpan;

/// A sequence's state before some tokens; `None`: it begins with them.
type Before<'a> = Option<SharedSlice<'a, f32>>;

impl StepContext<'_> {
    /// A causal convolution; every thread of the team calls it. Ends with a barrier.
    pub(in super::super) fn conv(
        &self,
        team: &Team,
        (x, out): (Value, Value),
        layer: usize,
        weight: usize,
        gate: ConvGate,
    ) {
        let Weight::Conv(weight) = &self.weights[weight] else {
            unreachable!("the recorder has looked at the weight")
        };
        let parts = weight.channels.div_ceil(CHANNELS);
        let (from, to) = (self.buffer(x), self.buffer(out));
        team.for_chunks(self.states.spans.len() * parts, 1, |units| {
            for unit in units {
                let span = self.states.spans[unit / parts];
                let first = unit % parts * CHANNELS;
                let state = |slot| self.states.view.conv(layer, slot);
                let go = |tokens: Range<usize>, before: Before<'_>, after: SharedSlice<'_, f32>| {
                    let rows = |width| {
                        let start = (span.first_token + tokens.start) * width;
                        start..start + tokens.len() * width
                    };
                    let part = ConvTokens {
                        weight,
                        gate,
                        channels: first..weight.channels.min(first + CHANNELS),
                        x: from.part(rows(x.stride)),
                        x_stride: x.stride,
                        tokens: tokens.len(),
                        from: before,
                        to: after,
                        out: to.part(rows(out.stride)),
                    };
                    dispatch(self.isa, part);
                };
                known_then_guessed(span, state, go);
            }
        });
    }

    /// A recurrence; every thread of the team calls it. Ends with a barrier.
    pub(in super::super) fn scan(
        &self,
        team: &Team,
        (x, gates, out): (Value, Value, Value),
        layer: usize,
        weight: usize,
        (rule, groups): (ScanRule, usize),
    ) {
        let Weight::Scan(weight) = &self.weights[weight] else {
            unreachable!("the recorder has looked at the weight")
        };
        let shape = self.states.view.shape(layer);
        let parts = shape.columns.div_ceil(COLUMNS);
        let of_sequence = shape.heads * parts;
        team.for_chunks(self.states.spans.len() * of_sequence, 1, |units| {
            for unit in units {
                let span = self.states.spans[unit / of_sequence];
                let head = unit % of_sequence / parts;
                let first = unit % parts * COLUMNS;
                let state = |slot| self.states.view.matrix(layer, slot, head);
                let go = |tokens: Range<usize>, before: Before<'_>, after: SharedSlice<'_, f32>| {
                    let rows = |value: Value| {
                        let start = (span.first_token + tokens.start) * value.stride;
                        let end = start + tokens.len() * value.stride;
                        self.buffer(value).part(start..end)
                    };
                    let part = ScanTokens {
                        rule,
                        weight,
                        shape,
                        groups,
                        head,
                        columns: first..shape.columns.min(first + COLUMNS),
                        x: TokenRows {
                            values: rows(x),
                            stride: x.stride,
                        },
                        gates: TokenRows {
                            values: rows(gates),
                            stride: gates.stride,
                        },
                        tokens: tokens.len(),
                        from: before,
                        to: after,
                        out: rows(out),
                    };
                    dispatch(self.isa, part);
                };
                known_then_guessed(span, state, go);
            }
        });
    }
}

/// Calls `go` with tokens, the state before them and the state after them: for those that are known, and for the guesses, which
/// go on in a copy that nobody keeps.
fn known_then_guessed<'a>(
    span: StateSpan,
    state: impl Fn(usize) -> SharedSlice<'a, f32>,
    go: impl Fn(Range<usize>, Before<'_>, SharedSlice<'_, f32>),
) {
    let kept = state(span.to);
    go(0..span.kept, span.from.map(&state), kept);
    if span.kept < span.tokens {
        let mut guessed = vec![0.0; kept.len()];
        let guessed = SharedSlice::new(&mut guessed);
        go(span.kept..span.tokens, Some(kept), guessed);
    }
}
