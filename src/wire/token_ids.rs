//! Token ids in vLLM's form, for training on what the model really read and sampled.

use super::choice::Choice;
use super::head::Head;
use super::json::write_bytes;

/// Adds `,"prompt_token_ids":[...]` where it is asked for.
pub(super) fn push_prompt_ids(out: &mut Vec<u8>, head: &Head) {
    if let Some(ids) = &head.prompt_ids {
        push_ids(out, "prompt_token_ids", ids);
    }
}

/// Adds `,"token_ids":[...]`, of what the choice says here, where it is asked for.
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

/// A token id instead of the token's text, if the request asks for it.
pub(super) fn push_id_as_text(out: &mut Vec<u8>, token: u32) {
    write_bytes(out, format_args!("\"token_id:{token}\""));
}
