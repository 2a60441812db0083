//! Log-probabilities of a prompt in vLLM's format: one object for each token, with the token and its alternatives by their ids;
//! null for the first token.

use super::choice::Choice;
use super::delta::TokenLogprob;
use super::head::Head;
use super::json::{push_f32, push_string, write_bytes};

/// Adds `,"prompt_logprobs":[...]` if requested.
pub(super) fn push_prompt_logprobs(out: &mut Vec<u8>, head: &Head, choice: &Choice) {
    if !head.prompt_logprobs {
        return;
    }
    out.extend_from_slice(b",\"prompt_logprobs\":[");
    for (at, token) in choice.prompt_logprobs.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        push_position(out, token);
    }
    out.push(b']');
}

fn push_position(out: &mut Vec<u8>, token: &TokenLogprob) {
    let Some(logprob) = token.logprob else {
        out.extend_from_slice(b"null");
        return;
    };
    out.push(b'{');
    let mut named = false;
    for (at, other) in token.top.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        named |= other.token == token.token;
        push_token(out, other.token, &other.bytes, other.logprob, Some(at + 1));
    }
    if !named {
        if !token.top.is_empty() {
            out.push(b',');
        }
        push_token(out, token.token, &token.bytes, logprob, None);
    }
    out.push(b'}');
}

/// `rank` counts from 1. It is unknown for a token that is not among the alternatives.
fn push_token(out: &mut Vec<u8>, token: u32, bytes: &[u8], logprob: f32, rank: Option<usize>) {
    write_bytes(out, format_args!("\"{token}\":{{\"logprob\":"));
    push_f32(out, logprob);
    match rank {
        Some(rank) => write_bytes(out, format_args!(",\"rank\":{rank}")),
        None => out.extend_from_slice(b",\"rank\":null"),
    }
    out.extend_from_slice(b",\"decoded_token\":");
    push_string(out, &String::from_utf8_lossy(bytes));
    out.push(b'}');
}
