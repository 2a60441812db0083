//! Batches as `/v1/batches` keeps them: lines that run after all other requests, until each has an answer, which is written once.

use serde_json::json;

use super::check::{Check, ensure};
use super::kept::{Batch, Line};
use super::ledger::Told;
use super::next_token;
use super::vocabulary::{END_TOKEN, VOCAB_SIZE};
use super::world::World;

/// Lines that run at once.
const AT_ONCE: usize = 2;
/// Most tokens of an answer.
const MOST_TOKENS: usize = 8;

/// What the model says to a line, alone.
fn right_answer(prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..max_tokens {
        tokens.push(next_token(&tokens, VOCAB_SIZE as usize));
        if tokens.last() == Some(&END_TOKEN) {
            break;
        }
    }
    tokens
}

impl World {
    /// Writes down the answers that are there, and asks for others; `unruly`: there may be a new batch, and a write may come late.
    pub(super) fn run_batch(&mut self, unruly: bool) -> Check {
        if unruly && self.batch.has_ended() && self.random.once_in(100) {
            let context = self.limits.context_length;
            let lines = (0..self.random.range(1, 6)).map(|_| {
                let count = self.random.range(1, 12.min(context - 1));
                Line {
                    prompt: self.random.tokens(count, VOCAB_SIZE),
                    max_tokens: MOST_TOKENS.min(context - count),
                    running: None,
                    asked: false,
                    answer: None,
                }
            });
            self.batch = Batch(lines.collect());
        }
        for at in 0..self.batch.0.len() {
            let late = unruly && self.random.once_in(2);
            let Some(request) = self.batch.0[at].running.filter(|_| !late) else {
                continue;
            };
            match self.ledger.take_told(request) {
                Told::NotYet => continue,
                Told::Nothing => {}
                Told::All(answer) => self.write_line(at, answer)?,
            }
            self.batch.0[at].running = None;
        }
        let lines = self.batch.0.iter();
        let running = lines.filter(|line| line.running.is_some()).count();
        let next = self
            .batch
            .0
            .iter()
            .position(|line| line.running.is_none() && line.answer.is_none());
        match next {
            Some(at) if running < AT_ONCE => self.ask_line(at),
            _ => Ok(()),
        }
    }

    fn ask_line(&mut self, at: usize) -> Check {
        let body = json!({
            "route": "generate",
            "input": {"type": "tokens", "ids": self.batch.0[at].prompt},
            "stopping": {"max_tokens": self.batch.0[at].max_tokens},
            "priority": i32::MAX,
            "background": true,
        });
        let request = self.submit(&body)?;
        let request = request.map_err(|status| format!("a line is refused with {status}"))?;
        let line = &mut self.batch.0[at];
        self.counters.lines_again += u64::from(line.asked);
        line.asked = true;
        line.running = Some(request);
        self.ledger.told.insert(request, None);
        Ok(())
    }

    fn write_line(&mut self, at: usize, answer: Vec<u32>) -> Check {
        self.counters.lines += 1;
        let line = &mut self.batch.0[at];
        ensure(line.answer.is_none(), || {
            format!("answered twice: {line:?}")
        })?;
        ensure(
            answer == right_answer(&line.prompt, line.max_tokens),
            || format!("{line:?} is answered with {answer:?}"),
        )?;
        line.answer = Some(answer);
        Ok(())
    }
}
