//! Token ids in vLLM's format, for training on exactly what the model read and sampled.

use super::choice::Choice;
use super::head::Head;
use super::json::write_bytes;

/// Adds `,"prompt_token_ids":[...]` if requested.
pub(super) fn push_prompt_ids(out: &mut Vec<u8>, head: &Head) {
    if let Some(ids) = &head.prompt_ids {
        push_ids(out, "prompt_token_ids", ids);
    }
}

/// Adds `,"token_ids":[...]` with the ids of this frame, if requested.
pub(super) fn push_token_ids(out: &mut Vec<u8>, head: &Head, choice: &Choice) {
    if head.prompt_ids.is_some() {
        push_ids(out, "token_ids", &choice.token_ids);
    }
}

fn push_ids(out: &mut Vec<u8>, name: &str, ids: &[u32]) {
    write_bytes(out, format_args!(",\"{name}\":["));
    for (at, id) in ids.iter().enumerate() {
        let comma = if at > 0 { "," } else { "" };
        write_bytes(out, format_args!("{comma}{id}"));
    }
    out.push(b']');
}

/// Writes a token id in place of the token's text, if requested.
pub(super) fn push_id_as_text(out: &mut Vec<u8>, token: u32) {
    write_bytes(out, format_args!("\"token_id:{token}\""));
}
