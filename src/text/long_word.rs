//! Tokenizes a word of any length with a BPE model, in windows.
//!
//! A sequence of tokens is a text's encoding if every two neighbours are the encoding of their own text: a merge depends only on
//! the ranks of its neighbours, so the first merge across a border of two tokens would also happen in their text alone. So two
//! windows that share a token can be joined at it, and the result is the model's encoding of the whole word.

use std::result::Result as Outcome;

use tokenizers::models::bpe::BPE;
use tokenizers::{Model, Result, Token};

/// Whether windows of a model's words can be joined.
pub(super) fn is_joinable(model: &BPE) -> bool {
    model.dropout.is_none()
        && model.continuing_subword_prefix.is_none()
        && model.end_of_word_suffix.is_none()
}

/// The tokens of `word`, computed in windows of about `window` bytes. Windows overlap by `overlap` bytes, which is more than any
/// token has. `look` gets the number of tokens before each window. Its error ends the work.
///
/// # Errors
/// Those of the model and of `look`.
pub(super) fn tokenize_long<E>(
    model: &BPE,
    word: &str,
    window: usize,
    overlap: usize,
    mut look: impl FnMut(usize) -> Outcome<(), E>,
) -> Result<Outcome<Vec<u32>, E>> {
    let window = window.max(4 * overlap);
    let mut ids = Vec::new();
    let mut end = ceil_char_boundary(word, window);
    let mut current = placed(model, word, 0, end)?;
    // The model drops a character without a token. Then the positions after it are unknown.
    let complete = |tokens: &[Placed], end| tokens.last().is_some_and(|last| last.end == end);
    while end < word.len() {
        if let Err(error) = look(ids.len()) {
            return Ok(Err(error));
        }
        // The next window begins at the beginning of a token.
        let wanted = end - overlap;
        let begins = |token: &Placed| token.start <= wanted && word.is_char_boundary(token.start);
        let first = current.iter().rposition(begins);
        let first = first.filter(|_| complete(&current, end)).unwrap_or(0);
        let begin = current.get(first).map_or(0, |token| token.start);
        end = ceil_char_boundary(word, begin + window);
        let next = placed(model, word, begin, end)?;
        let joined = shared(&current[first..], &next).filter(|_| first > 0 && complete(&next, end));
        let Some((at, other)) = joined else {
            // The windows cannot be joined, so the model gets the whole word.
            let whole = placed(model, word, 0, word.len())?;
            return Ok(Ok(whole.iter().map(|token| token.id).collect()));
        };
        ids.extend(current[..first + at].iter().map(|token| token.id));
        current = next;
        current.drain(..other);
    }
    ids.extend(current.iter().map(|token| token.id));
    Ok(Ok(ids))
}

/// A token, and the bytes of the word that it stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Placed {
    start: usize,
    end: usize,
    id: u32,
}

fn placed(model: &BPE, word: &str, start: usize, end: usize) -> Result<Vec<Placed>> {
    let place = |token: Token| Placed {
        start: start + token.offsets.0,
        end: start + token.offsets.1,
        id: token.id,
    };
    let tokens = model.tokenize(&word[start..end])?;
    Ok(tokens.into_iter().map(place).collect())
}

/// The position of the first common token in each list.
fn shared(one: &[Placed], other: &[Placed]) -> Option<(usize, usize)> {
    let (mut a, mut b) = (0, 0);
    while a < one.len() && b < other.len() {
        if one[a] == other[b] {
            return Some((a, b));
        }
        if one[a].start <= other[b].start {
            a += 1;
        } else {
            b += 1;
        }
    }
    None
}

fn ceil_char_boundary(text: &str, mut at: usize) -> usize {
    while at < text.len() && !text.is_char_boundary(at) {
        at += 1;
    }
    at.min(text.len())
}
