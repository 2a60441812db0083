//! A model's operations, recorded once and run in every step: what each operation reads and writes, and in which buffer.

mod operations;

pub(super) use self::operations::{LinearShape, QkvShape};
use super::op::{Op, Rows, Value};
use crate::error::{Error, Result};

/// A recorded list of operations. Handles stand for values. An operation that changes a value in place consumes its handle. When
/// the recording ends, values get buffers, which are reused once no operation reads the value.
#[derive(Debug, Default, Clone)]
pub struct Program {
    pub(super) ops: Vec<Op>,
    /// Floats per row of each buffer.
    pub(super) buffers: Vec<usize>,
    /// The value of each handle, unless it was consumed.
    values: Vec<Option<Value>>,
    /// Number of ids given to values.
    numbers: usize,
    /// The value that the program computes.
    pub(super) result: Option<Value>,
    /// The value that is sampled before the program ends, and the number of operations before that.
    sampled: Option<(Value, usize)>,
    /// The second half of the program, after the sampling.
    pub(super) draft: Option<Draft>,
}

/// The second half of a program: it predicts the tokens after the sampled ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draft {
    /// Its first operation.
    pub(super) first: usize,
    /// The states from which its logits are computed, one row for each sampled row.
    pub(super) states: Value,
    /// The weight that computes the logits.
    pub(super) head: usize,
}

impl Program {
    fn push(&mut self, rows: Rows, width: usize) -> (usize, Value) {
        let value = Value {
            buffer: self.numbers,
            rows,
            width,
            stride: width,
        };
        self.numbers += 1;
        (self.add_value(value), value)
    }

    fn add_value(&mut self, value: Value) -> usize {
        self.values.push(Some(value));
        self.values.len() - 1
    }

    /// The value of a handle.
    ///
    /// # Errors
    /// `invalid_value` for a handle that does not exist, or was consumed.
    pub(super) fn value(&self, handle: usize) -> Result<Value> {
        let refused = |what| Err(Error::invalid("program", format!("{what} {handle}")));
        match self.values.get(handle) {
            Some(Some(value)) => Ok(*value),
            Some(None) => refused("an operation has consumed the value"),
            None => refused("there is no value"),
        }
    }

    pub(super) fn expect(&self, handle: usize, what: &str, width: usize) -> Result<Value> {
        let value = self.value(handle)?;
        if value.width == width {
            return Ok(value);
        }
        let given = value.width;
        Err(Error::invalid(
            "program",
            format!("{what} takes rows of {width}, but rows of {given} were given"),
        ))
    }

    /// Consumes a handle, and returns the handle of the value that replaces it in place.
    fn changed(&mut self, handle: usize, value: Value) -> usize {
        self.values[handle] = None;
        self.add_value(value)
    }

    /// Ends the recording, and assigns buffers. `result` is the value that the program computes.
    pub(super) fn finish(&mut self, result: usize) -> Result<()> {
        let result = self.value(result)?;
        self.result = Some(self.give_buffers([result])[0]);
        Ok(())
    }

    /// Ends the recording of a program with a second half: `head` computes logits from the rows of `states`.
    pub(super) fn finish_draft(
        &mut self,
        states: usize,
        head: usize,
        columns: usize,
    ) -> Result<()> {
        let states = self.expect(states, "a draft", columns)?;
        let Some((sampled, first)) = self.sampled.filter(|_| states.rows == Rows::Sampled) else {
            let message = "a draft takes the sampled rows, after they were sampled";
            return Err(Error::invalid("program", message));
        };
        let [result, states] = self.give_buffers([sampled, states]);
        self.result = Some(result);
        self.draft = Some(Draft {
            first,
            states,
            head,
        });
        Ok(())
    }

    /// Assigns buffers to values. Those of `kept` are not reused.
    fn give_buffers<const N: usize>(&mut self, mut kept: [Value; N]) -> [Value; N] {
        let mut last_use = vec![0; self.numbers];
        for (index, op) in self.ops.iter_mut().enumerate() {
            op.visit(|value| last_use[value.buffer] = index);
        }
        for value in &kept {
            last_use[value.buffer] = usize::MAX;
        }
        let mut given: Vec<Option<usize>> = vec![None; self.numbers];
        let (mut buffers, mut free): (Vec<usize>, Vec<usize>) = Default::default();
        for (index, op) in self.ops.iter_mut().enumerate() {
            let mut done = Vec::new();
            op.visit(|value| {
                let number = value.buffer;
                let buffer = *given[number].get_or_insert_with(|| {
                    free.pop().unwrap_or_else(|| {
                        buffers.push(0);
                        buffers.len() - 1
                    })
                });
                buffers[buffer] = buffers[buffer].max(value.stride);
                value.buffer = buffer;
                if last_use[number] == index && !done.contains(&buffer) {
                    done.push(buffer);
                }
            });
            free.append(&mut done);
        }
        for value in &mut kept {
            value.buffer = given[value.buffer].unwrap_or(0);
        }
        self.buffers = buffers;
        self.values.clear();
        kept
    }
}

#[cfg(test)]
mod tests;
