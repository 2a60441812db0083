//! A toy model whose next token is a hash of its whole context as read back through the block tables: one wrong block, slot
//! or position and its output differs.

use std::collections::BTreeMap;

use crate::engine::{Executor, StepOutput};
use crate::error::{Error, Result};
use crate::sched::{NO_TOKEN, Step};

/// The token that follows `context`, in [0, `vocab_size`): by turns a new one, and the one that followed the last token where it
/// last stood, so that drafts are sometimes right.
pub fn next_token(context: &[u32], vocab_size: usize) -> u32 {
    // FNV-1a over the ids.
    let hash = context
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &token| {
            (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3)
        });
    let repeated = context.split_last().and_then(|(last, before)| {
        let at = before.iter().rposition(|token| token == last)?;
        Some(context[at + 1]).filter(|_| hash >> 63 == 0)
    });
    repeated.unwrap_or(((hash >> 17) % vocab_size as u64) as u32)
}

/// The toy model with its paged memory: one token id per slot.
#[derive(Debug)]
pub struct ToyModel {
    memory: Vec<Option<i32>>,
    block_size: usize,
    vocab_size: usize,
    /// Steps computed so far.
    pub steps: u64,
    /// The steps (counted from 1) that fail.
    pub failing_steps: Vec<u64>,
    /// Sequences with the context length from which on no step that holds them can be computed.
    pub failing: BTreeMap<u64, usize>,
    /// Sequences with the context length from which on their logits are not finite.
    pub not_finite: BTreeMap<u64, usize>,
    /// The first token of texts whose embeddings are not finite.
    pub not_finite_embedding: Option<i32>,
}

/// Whether a sequence has reached the length at which its fault begins.
fn reached(faults: &BTreeMap<u64, usize>, sequence: u64, len: usize) -> bool {
    faults.get(&sequence).is_some_and(|&from| len >= from)
}

impl ToyModel {
    /// A model with memory for `num_blocks` blocks of `block_size` tokens.
    pub fn new(num_blocks: usize, block_size: usize, vocab_size: usize) -> Self {
        let memory = vec![None; num_blocks * block_size];
        Self {
            memory,
            block_size,
            vocab_size,
            steps: 0,
            failing_steps: Vec::new(),
            failing: BTreeMap::new(),
            not_finite: BTreeMap::new(),
            not_finite_embedding: None,
        }
    }

    fn context(&self, blocks: &[u32], len: usize) -> Result<Vec<u32>> {
        let at = |position: usize| {
            blocks[position / self.block_size] as usize * self.block_size
                + position % self.block_size
        };
        (0..len)
            .map(|position| {
                let slot = at(position);
                let token = self.memory.get(slot).copied().flatten();
                token
                    .map(|token| token as u32)
                    .ok_or_else(|| Error::internal(format!("slot {slot} was never written")))
            })
            .collect()
    }
}

impl Executor for ToyModel {
    fn launch(&mut self, step: &Step) -> Result<()> {
        self.steps += 1;
        if self.failing_steps.contains(&self.steps) {
            return Err(Error::internal("the toy model was told to fail"));
        }
        let mut sequences = step.scheduled.iter().zip(&step.context_lens);
        if sequences.any(|(s, &len)| reached(&self.failing, s.id, len as usize)) {
            return Err(Error::internal("a sequence of the step makes it fail"));
        }
        for (&slot, &token) in step.slots.iter().zip(&step.token_ids) {
            self.memory[slot as usize] = Some(token);
        }
        Ok(())
    }

    fn collect(&mut self, step: &Step, output: &mut StepOutput) -> Result<()> {
        output.tokens.clear();
        for (at, scheduled) in step.scheduled.iter().enumerate() {
            for _ in 0..scheduled.prompt_rows {
                // A row that scores a token of a prompt is biased towards it alone.
                let bias = step.bias_start[output.tokens.len()];
                output.tokens.push(step.bias_token[bias as usize] as u32);
            }
            if !scheduled.samples {
                continue;
            }
            let context = self.context(&step.block_tables[at], step.context_lens[at] as usize)?;
            for end in context.len() - scheduled.drafts..=context.len() {
                output
                    .tokens
                    .push(if reached(&self.not_finite, scheduled.id, end) {
                        NO_TOKEN
                    } else {
                        next_token(&context[..end], self.vocab_size)
                    });
            }
        }
        Ok(())
    }

    fn embed(&mut self, token_ids: &[i32], cu_seqlens: &[i32]) -> Result<Vec<f32>> {
        // Two numbers a sequence, on the unit circle.
        Ok(cu_seqlens
            .windows(2)
            .flat_map(|borders| {
                let text = &token_ids[borders[0] as usize..borders[1] as usize];
                if self.not_finite_embedding == text.first().copied() {
                    return [f32::NAN, 0.0];
                }
                let angle = text.iter().sum::<i32>() as f32;
                [angle.cos(), angle.sin()]
            })
            .collect())
    }
}
