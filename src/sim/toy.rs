//! A toy model whose next token is a hash of its whole context as read back through the block tables: one wrong block, slot
//! or position and its output differs. With recurrent states the hash itself is the state, which moves on with each token.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::engine::{Executor, StepOutput};
use crate::error::{Error, Result};
use crate::guided::StepMasks;
use crate::kv::Place;
use crate::sched::{NO_TOKEN, Step};

/// The token that follows `context`, in [0, `vocab_size`): by turns a new one, and the one that followed the last token where it
/// last stood, so that drafts are sometimes right.
pub fn next_token(context: &[u32], vocab_size: usize) -> u32 {
    let hash = context.iter().copied().fold(BEGIN, hash);
    token_behind(hash, context, vocab_size)
}

const BEGIN: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a.
fn hash(hash: u64, token: u32) -> u64 {
    (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3)
}

fn token_behind(hash: u64, context: &[u32], vocab_size: usize) -> u32 {
    let repeated = context.split_last().and_then(|(last, before)| {
        let at = before.iter().rposition(|token| token == last)?;
        Some(context[at + 1]).filter(|_| hash >> 63 == 0)
    });
    repeated.unwrap_or(((hash >> 17) % vocab_size as u64) as u32)
}

/// The first token that is allowed, from `token` on and around the vocabulary; `token` where none is.
pub(super) fn nearest(token: u32, vocab_size: usize, allowed: impl Fn(u32) -> bool) -> u32 {
    let size = vocab_size as u32;
    let mut tokens = (0..size).map(|step| (token + step) % size);
    tokens.find(|&token| allowed(token)).unwrap_or(token)
}

fn is_allowed(words: &[u32], token: u32) -> bool {
    words[token as usize / 32] >> (token % 32) & 1 == 1
}

/// The masks of a step, as a device gets them.
struct Masks {
    rows: Vec<usize>,
    words: Vec<u32>,
}

impl Masks {
    fn of(masks: &StepMasks) -> Self {
        masks.wait();
        let bytes = masks.to_bytes();
        let (words, _) = bytes.as_chunks::<4>();
        Self {
            rows: masks.rows().collect(),
            words: words.iter().map(|&word| u32::from_ne_bytes(word)).collect(),
        }
    }

    fn of_row(&self, row: usize) -> Option<&[u32]> {
        let at = self.rows.binary_search(&row).ok()?;
        let size = self.words.len() / self.rows.len();
        Some(&self.words[at * size..(at + 1) * size])
    }
}

/// The toy model with its paged memory: one token id per slot.
#[derive(Debug)]
pub struct ToyModel {
    memory: Vec<Option<i32>>,
    /// That of layers with a window, and how many tokens they see.
    windows: Option<(usize, Vec<Option<i32>>)>,
    /// Hashes of contexts; none: nobody knows of what.
    states: Vec<Option<u64>>,
    block_size: usize,
    vocab_size: usize,
    /// It guesses what follows each sampled token, and is right about every other time.
    guesses: bool,
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

fn torn() -> Error {
    Error::internal("a content has another size")
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
            windows: None,
            states: Vec::new(),
            block_size,
            vocab_size,
            guesses: false,
            steps: 0,
            failing_steps: Vec::new(),
            failing: BTreeMap::new(),
            not_finite: BTreeMap::new(),
            not_finite_embedding: None,
        }
    }

    /// The model with slots for recurrent states.
    #[must_use]
    pub fn with_states(mut self, slots: usize) -> Self {
        self.states = vec![None; slots];
        self
    }

    /// The model with layers that see `window` tokens, in memory for `num_blocks` blocks.
    #[must_use]
    pub fn with_windows(mut self, window: usize, num_blocks: usize) -> Self {
        self.windows = Some((window, vec![None; num_blocks * self.block_size]));
        self
    }

    /// The model with a head that guesses a token ahead.
    #[must_use]
    pub const fn with_guesses(mut self, guesses: bool) -> Self {
        self.guesses = guesses;
        self
    }

    /// A guess of the token that follows `context` and `token`.
    fn guess(&self, context: &[u32], token: u32) -> u32 {
        let text = [context, &[token]].concat();
        let next = next_token(&text, self.vocab_size);
        let wrong = text.iter().copied().fold(BEGIN, hash) >> 62 & 1;
        (next + wrong as u32) % self.vocab_size as u32
    }

    /// A step that fails half way leaves states that are none.
    pub fn spoil_states(&mut self, step: &Step) {
        for &slot in &step.state_to {
            self.states[slot as usize] = None;
        }
    }

    /// Copies what a step wants copied, first of all.
    fn copy_blocks(&mut self, step: &Step) {
        for (at, &source) in step.copied_blocks.iter().enumerate() {
            let Ok(source) = usize::try_from(source) else {
                continue;
            };
            let size = self.block_size;
            let position = step.positions[step.query_start[at] as usize] as usize;
            let own = step.block_tables[at][position / size] as usize;
            for offset in 0..position % size {
                self.memory[own * size + offset] = self.memory[source * size + offset];
            }
        }
    }

    fn move_states(&mut self, step: &Step) {
        for (at, (&from, &to)) in step.state_from.iter().zip(&step.state_to).enumerate() {
            let begin = usize::try_from(from).map_or(Some(BEGIN), |from| self.states[from]);
            let first = step.query_start[at] as usize;
            let kept = first + step.state_tokens[at] as usize;
            let tokens = step.token_ids[first..kept]
                .iter()
                .map(|&token| token as u32);
            // What is no state gives a token that nobody expects.
            self.states[to as usize] = Some(tokens.fold(begin.unwrap_or(0), hash));
        }
    }

    /// That layers with a window find, for each token of the step, what the others have.
    fn check_windows(&self, step: &Step) -> Result<()> {
        let Some((window, memory)) = &self.windows else {
            return Ok(());
        };
        for (at, own) in step.window_tables.iter().enumerate() {
            let start = step.positions[step.query_start[at] as usize] as usize;
            let end = step.context_lens[at] as usize;
            let context = self.context(&step.block_tables[at], end)?;
            let first = (start + 1).saturating_sub(*window);
            for (position, &expected) in context.iter().enumerate().skip(first) {
                let (size, index) = (self.block_size, position / self.block_size);
                let block = index.checked_sub(own.first).and_then(|i| own.blocks.get(i));
                let slot = block.map(|&block| block as usize * size + position % size);
                let token = slot.and_then(|slot| memory[slot]);
                if token != Some(expected as i32) {
                    let message = format!("the window shows {token:?} at {position}");
                    return Err(Error::internal(message));
                }
            }
        }
        Ok(())
    }

    /// The slot and the tokens' cells of a place.
    fn parts(&self, place: Place) -> (Option<usize>, Range<usize>) {
        let cells = |block: u32| {
            let start = block as usize * self.block_size;
            start..start + self.block_size
        };
        match place {
            Place::Block(block) => (None, cells(block)),
            Place::State { slot, tail_block } => {
                (Some(slot as usize), tail_block.map_or(0..0, cells))
            }
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
            self.spoil_states(step);
            return Err(Error::internal("a sequence of the step makes it fail"));
        }
        self.copy_blocks(step);
        self.move_states(step);
        for (&slot, &token) in step.slots.iter().zip(&step.token_ids) {
            self.memory[slot as usize] = Some(token);
        }
        if let Some((_, memory)) = &mut self.windows {
            for (&slot, &token) in step.window_slots.iter().zip(&step.token_ids) {
                memory[slot as usize] = Some(token);
            }
        }
        Ok(())
    }

    fn collect(&mut self, step: &Step, output: &mut StepOutput) -> Result<()> {
        output.tokens.clear();
        output.guesses.clear();
        self.check_windows(step)?;
        let masks = step.masks.as_deref().map(Masks::of);
        for (at, scheduled) in step.scheduled.iter().enumerate() {
            for _ in 0..scheduled.prompt_rows {
                // A row that scores a token of a prompt is biased towards it alone.
                let bias = step.bias_start[output.tokens.len()];
                output.tokens.push(step.bias_token[bias as usize] as u32);
                output.guesses.extend(self.guesses.then_some(0));
            }
            if !scheduled.samples {
                continue;
            }
            let context = self.context(&step.block_tables[at], step.context_lens[at] as usize)?;
            for end in context.len() - scheduled.drafts..=context.len() {
                let row = output.tokens.len();
                let token = if reached(&self.not_finite, scheduled.id, end) {
                    NO_TOKEN
                } else {
                    let free = if let Some(&slot) = step.state_to.get(at) {
                        let state = self.states[slot as usize].unwrap_or(0);
                        let guessed = &context[context.len() - scheduled.drafts..end];
                        let state = guessed.iter().copied().fold(state, hash);
                        token_behind(state, &context[..end], self.vocab_size)
                    } else {
                        next_token(&context[..end], self.vocab_size)
                    };
                    let mask = masks.as_ref().and_then(|masks| masks.of_row(row));
                    let allowed = |token| mask.is_none_or(|words| is_allowed(words, token));
                    nearest(free, self.vocab_size, allowed)
                };
                output.tokens.push(token);
                let guess = self.guesses.then(|| self.guess(&context[..end], token));
                output.guesses.extend(guess);
            }
        }
        Ok(())
    }

    fn save(&mut self, place: Place) -> Result<Vec<u8>> {
        let (state, block) = self.parts(place);
        let mut bytes = Vec::new();
        if let Some(slot) = state {
            // What is no state is nothing to go on from: it gives a token that nobody expects.
            bytes.extend(self.states[slot].unwrap_or(0).to_le_bytes());
        }
        for &token in &self.memory[block] {
            bytes.extend(token.unwrap_or(-1).to_le_bytes());
        }
        Ok(bytes)
    }

    fn load(&mut self, place: Place, bytes: &[u8]) -> Result<()> {
        let (state, block) = self.parts(place);
        let mut tokens = bytes;
        if let Some(slot) = state {
            let (state, rest) = bytes.split_first_chunk().ok_or_else(torn)?;
            self.states[slot] = Some(u64::from_le_bytes(*state));
            tokens = rest;
        }
        let (tokens, rest) = tokens.as_chunks();
        let memory = &mut self.memory[block];
        if !rest.is_empty() || tokens.len() != memory.len() {
            return Err(torn());
        }
        for (cell, bytes) in memory.iter_mut().zip(tokens) {
            let token = i32::from_le_bytes(*bytes);
            *cell = (token >= 0).then_some(token);
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
