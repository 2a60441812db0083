//! Sessions as Python sees them: what can be said of one, and all that makes one.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::{Error, Result};
use crate::session::{AdapterDigest, Commit, Logprobs, SessionInfo, SessionState, SessionUsage};
use crate::text::Tail;

/// Token ids, turns, seed, tokens of the system prompt, and the digest of the adapter. Numbers in bytes are little-endian, of four bytes each.
pub(super) type Exported<'py> = (
    Bound<'py, PyBytes>,
    Vec<ExportedTurn<'py>>,
    u64,
    usize,
    Option<Bound<'py, PyBytes>>,
);
/// Input tokens, output tokens, whether the assistant's message is open, and the output's log-probabilities.
type ExportedTurn<'py> = (usize, usize, bool, Option<Bound<'py, PyBytes>>);
/// The same from Python.
pub(super) type ImportedTurn = (usize, usize, bool, Option<Vec<u8>>);

fn usage_dict<'py>(py: Python<'py>, usage: &SessionUsage) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("prompt_tokens", usage.prompt_tokens)?;
    dict.set_item("cached_tokens", usage.cached_tokens)?;
    dict.set_item("computed_tokens", usage.computed_tokens())?;
    dict.set_item("generated_tokens", usage.generated_tokens)?;
    dict.set_item("time_ms", usage.time_ms)?;
    Ok(dict)
}

pub(super) fn info_dict<'py>(py: Python<'py>, info: &SessionInfo) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("id", &info.key.id)?;
    dict.set_item("turns", info.turns)?;
    dict.set_item("tokens", info.tokens)?;
    dict.set_item("busy", info.busy)?;
    dict.set_item("created_ms", info.created_ms)?;
    dict.set_item("used_ms", info.used_ms)?;
    dict.set_item("lost_turn", info.lost_turn)?;
    dict.set_item("hold_until_ms", info.hold_until)?;
    dict.set_item("usage", usage_dict(py, &info.usage)?)?;
    Ok(dict)
}

/// All that makes a session.
pub(super) fn exported<'py>(py: Python<'py>, state: &SessionState) -> Exported<'py> {
    let turns = state.turns.iter().map(|turn| {
        let open = turn.tail == Tail::OpenAssistant;
        let logprobs = turn.logprobs.as_ref().map(|logprobs| {
            let bytes: Vec<u8> = logprobs.values().flat_map(f32::to_le_bytes).collect();
            PyBytes::new(py, &bytes)
        });
        (turn.input_tokens, turn.output_tokens, open, logprobs)
    });
    let turns = turns.collect();
    let tokens: Vec<u8> = state.tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    let tokens = PyBytes::new(py, &tokens);
    let adapter = state.adapter.map(|adapter| PyBytes::new(py, &adapter));
    (tokens, turns, state.seed, state.system_tokens, adapter)
}

/// What makes a session of what [`exported`] gave.
///
/// # Errors
/// `invalid_value` (400) for what no session is.
pub(super) fn imported(
    tokens: &[u8],
    turns: Vec<ImportedTurn>,
    seed: u64,
    system_tokens: usize,
    adapter: Option<AdapterDigest>,
) -> Result<Commit> {
    let turns = turns.into_iter().map(|(input, output, open, logprobs)| {
        let tail = if open {
            Tail::OpenAssistant
        } else {
            Tail::Closed
        };
        let logprobs = logprobs
            .map(|bytes| numbers("logprobs", &bytes))
            .transpose()?
            .map(|values| Logprobs::new(values.into_iter().map(f32::from_bits)));
        Ok((input, output, tail, logprobs))
    });
    let turns = turns.collect::<Result<Vec<_>>>()?;
    let commit = Commit::of_turns(numbers("tokens", tokens)?, turns, seed, system_tokens)?;
    Ok(Commit { adapter, ..commit })
}

/// Numbers of four bytes each.
///
/// # Errors
/// `invalid_value` (400) for bytes that are none.
fn numbers(param: &str, bytes: &[u8]) -> Result<Vec<u32>> {
    let (numbers, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        let message = format!(
            "{param} has numbers of 4 bytes each, but {} bytes",
            bytes.len()
        );
        return Err(Error::invalid(param, message));
    }
    Ok(numbers.iter().map(|&n| u32::from_le_bytes(n)).collect())
}
