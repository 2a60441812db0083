//! Escapes JSON strings character by character.

use std::fmt::Write as _;

/// Appends a character as it is written in a JSON string.
pub(super) fn push_escaped(out: &mut String, c: char) {
    match c {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        '\0'..='\u{1f}' => {
            // Writing to a String cannot fail.
            let _ = write!(out, "\\u{:04x}", c as u32);
        }
        _ => out.push(c),
    }
}

/// Appends a text as it is written in a JSON string.
pub(super) fn push_escaped_text(out: &mut String, text: &str) {
    for c in text.chars() {
        push_escaped(out, c);
    }
}
