//! JSON strings, written straight into a byte buffer.

use std::io::Write;

/// Appends `text` as a JSON string in ASCII, as Python's `json.dumps` does with `ensure_ascii`.
pub(super) fn push_ascii(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    for ch in text.chars() {
        match ch {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            '\u{8}' => out.extend_from_slice(b"\\b"),
            '\u{c}' => out.extend_from_slice(b"\\f"),
            ' '..='~' => out.push(ch as u8),
            _ => {
                for unit in ch.encode_utf16(&mut [0; 2]) {
                    write_bytes(out, format_args!("\\u{unit:04x}"));
                }
            }
        }
    }
    out.push(b'"');
}

/// Appends `text` as a JSON string in UTF-8.
pub(super) fn push_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut start = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        let escape: &[u8] = match byte {
            b'"' => b"\\\"",
            b'\\' => b"\\\\",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            b'\t' => b"\\t",
            0..0x20 => b"",
            _ => continue,
        };
        out.extend_from_slice(&bytes[start..at]);
        if escape.is_empty() {
            write_bytes(out, format_args!("\\u{byte:04x}"));
        } else {
            out.extend_from_slice(escape);
        }
        start = at + 1;
    }
    out.extend_from_slice(&bytes[start..]);
    out.push(b'"');
}

/// Appends formatted text; writing to a `Vec` cannot fail.
pub(super) fn write_bytes(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    if out.write_fmt(text).is_err() {
        unreachable!("a Vec takes every write");
    }
}

/// Appends a number as JSON. JSON has no infinity: the log of zero becomes the lowest finite f32, as in OpenAI's replies.
pub(super) fn push_f32(out: &mut Vec<u8>, value: f32) {
    let value = if value.is_finite() { value } else { -9999.0 };
    write_bytes(out, format_args!("{value}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascii_strings_are_those_of_json_dumps() {
        let mut out = Vec::new();
        push_ascii(&mut out, "a\"\\\n\u{1}\u{7f}é你😀");
        assert_eq!(
            String::from_utf8_lossy(&out),
            r#""a\"\\\n\u0001\u007f\u00e9\u4f60\ud83d\ude00""#
        );
    }

    #[test]
    fn both_forms_parse_back() {
        for text in [
            "",
            "plain",
            "q\"b\\s\n\r\t\u{0}\u{1f}",
            "\u{2028}日本\u{10ffff}",
        ] {
            for push in [push_ascii, push_string] {
                let mut out = Vec::new();
                push(&mut out, text);
                assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
            }
        }
    }
}
