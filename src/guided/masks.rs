//! The masks of one step. Helper threads compute them while the model runs. A thread that waits for them computes the rest.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::matcher::{Matcher, set};
use crate::error::{Error, Result};
use crate::panics::contain;

/// A sampled row of a step, with restrictions on its next token.
#[derive(Debug)]
pub struct MaskRow {
    /// Its index among the step's sampled rows.
    row: usize,
    allowed: Allowed,
}

/// The tokens that may come next.
#[derive(Debug)]
enum Allowed {
    ByGrammar {
        /// The state of its sequence.
        matcher: Arc<Mutex<Matcher>>,
        /// Tokens that end the sequence, in addition to the model's.
        stop_tokens: Arc<[u32]>,
        /// Whether the sequence must not end yet.
        hold_off_stop: bool,
    },
    Only {
        token: u32,
        vocab_size: usize,
    },
    /// These tokens, as a bit mask.
    Given(Vec<u32>),
}

impl MaskRow {
    /// Allows what a grammar allows. `stop_tokens` end the sequence in addition to the model's end tokens; `hold_off_stop`: it must
    /// not end yet.
    pub const fn by_grammar(
        row: usize,
        matcher: Arc<Mutex<Matcher>>,
        stop_tokens: Arc<[u32]>,
        hold_off_stop: bool,
    ) -> Self {
        let allowed = Allowed::ByGrammar {
            matcher,
            stop_tokens,
            hold_off_stop,
        };
        Self { row, allowed }
    }

    /// Allows a single token of a vocabulary of `vocab_size`.
    pub const fn only(row: usize, token: u32, vocab_size: usize) -> Self {
        let allowed = Allowed::Only { token, vocab_size };
        Self { row, allowed }
    }

    /// Allows the tokens of an existing mask. It has a bit for each token; the first token is the least significant bit of the
    /// first word.
    pub const fn given(row: usize, words: Vec<u32>) -> Self {
        Self {
            row,
            allowed: Allowed::Given(words),
        }
    }

    /// The only allowed token, if there is just one.
    pub const fn forced(&self) -> Option<u32> {
        match self.allowed {
            Allowed::Only { token, .. } => Some(token),
            Allowed::ByGrammar { .. } | Allowed::Given(_) => None,
        }
    }

    /// Number of 32-bit words of its mask.
    fn words(&self) -> usize {
        match &self.allowed {
            Allowed::ByGrammar { matcher, .. } => guard(matcher).mask_words(),
            Allowed::Only { vocab_size, .. } => vocab_size.div_ceil(32),
            Allowed::Given(words) => words.len(),
        }
    }

    fn mask(&self, end_tokens: &[u32]) -> Result<Vec<u32>> {
        match &self.allowed {
            Allowed::ByGrammar {
                matcher,
                stop_tokens,
                hold_off_stop,
            } => guard(matcher).mask(end_tokens, stop_tokens, *hold_off_stop),
            Allowed::Only { token, .. } => {
                let mut bits = vec![0; self.words()];
                set(&mut bits, *token, true);
                Ok(bits)
            }
            Allowed::Given(words) => Ok(words.clone()),
        }
    }
}

/// A row's mask, once it is computed.
type Mask = Option<Result<Vec<u32>>>;

/// The masks of one step's rows.
#[derive(Debug)]
pub struct StepMasks {
    end_tokens: Arc<[u32]>,
    /// Number of 32-bit words of a mask.
    words: usize,
    rows: Vec<(MaskRow, Mutex<Mask>)>,
    next: AtomicUsize,
    done: Mutex<usize>,
    all_done: Condvar,
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StepMasks {
    /// Masks to compute for `rows`, in ascending order and at least one. `end_tokens` are the model's.
    pub fn new(rows: Vec<MaskRow>, end_tokens: Arc<[u32]>) -> Self {
        let words = rows.first().map_or(0, MaskRow::words);
        let rows = rows
            .into_iter()
            .map(|row| (row, Mutex::default()))
            .collect();
        Self {
            end_tokens,
            words,
            rows,
            next: AtomicUsize::new(0),
            done: Mutex::new(0),
            all_done: Condvar::new(),
        }
    }

    /// The rows with masks, in ascending order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = usize> {
        self.rows.iter().map(|(row, _)| row.row)
    }

    /// Computes masks that no thread has begun, until none is left.
    pub fn work(&self) {
        while self.next_by(|row| row.mask(&self.end_tokens)).is_some() {}
    }

    /// Computes the next mask by `compute`. Returns its index among the step's rows.
    pub(crate) fn next_by(
        &self,
        compute: impl FnOnce(&MaskRow) -> Result<Vec<u32>>,
    ) -> Option<usize> {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        let (row, _) = self.rows.get(at)?;
        self.fill(at, || compute(row));
        Some(row.row)
    }

    /// Stores a row's mask. This must happen in any case, because other threads wait for all masks.
    fn fill(&self, at: usize, compute: impl FnOnce() -> Result<Vec<u32>>) {
        *guard(&self.rows[at].1) = Some(contain("a mask", compute).flatten());
        let mut done = guard(&self.done);
        *done += 1;
        if *done == self.rows.len() {
            self.all_done.notify_all();
        }
    }

    /// Computes masks too, and waits until all are complete.
    pub fn wait(&self) {
        self.work();
        let mut done = guard(&self.done);
        while *done < self.rows.len() {
            done = self
                .all_done
                .wait(done)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The masks row after row, as words in native byte order. A failed row allows everything, because its request is about to end.
    /// Call it after [`Self::wait`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (_, result) in &self.rows {
            if let Some(Ok(mask)) = &*guard(result) {
                bytes.extend(mask.iter().flat_map(|word| word.to_ne_bytes()));
            } else {
                bytes.resize(bytes.len() + self.words * 4, 0xff);
            }
        }
        bytes
    }

    /// Why a row's mask could not be computed.
    pub fn error(&self, row: usize) -> Option<Error> {
        let (_, result) = self.rows.iter().find(|(other, _)| other.row == row)?;
        guard(result).as_ref()?.as_ref().err().cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_that_panics_is_an_error_of_its_row_and_nobody_waits_for_ever() {
        let row = |row| {
            let broken = std::io::Error::other("no grammar");
            let matcher = Matcher::new(llguidance::Matcher::new(Err(broken.into())), 64);
            MaskRow::by_grammar(row, Arc::new(Mutex::new(matcher)), Arc::default(), false)
        };
        let masks = StepMasks::new(vec![row(3), row(5)], Arc::default());
        assert_eq!(masks.next_by(|_| panic!("out of luck")), Some(3));
        masks.wait();
        assert_eq!(masks.error(3).unwrap().code, "internal_error");
        assert_eq!(masks.error(5).unwrap().code, "grammar_too_complex");
        assert_eq!(masks.to_bytes(), [0xff; 16]);
    }
}
