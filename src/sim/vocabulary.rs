//! The toy model's vocabulary: an end token, letters, and the bytes of a two-byte and a three-byte character as tokens of
//! their own, so that text is often incomplete.

use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::text::Tokenizer;

/// Tokens of the vocabulary.
pub const VOCAB_SIZE: u32 = 24;
/// The token that ends an answer.
pub const END_TOKEN: u32 = 0;
/// Stop strings that requests ask for; none is a part of another of its list.
pub(super) const STOPS: [&[&str]; 5] =
    [&["a"], &["bc", "é"], &["你"], &["d e", "fg"], &["hi", "j"]];

/// A byte-level tokenizer over the vocabulary.
pub(super) fn tokenizer() -> Result<Tokenizer> {
    // After the letters, as GPT-2 writes bytes: space, C3, A9 (é), E4, BD, A0 (你).
    let letters = "abcdefghijklmnopq".chars().chain("ĠÃ©ä½ł".chars());
    let vocabulary: Map<String, Value> = letters
        .enumerate()
        .map(|(at, letter)| (letter.to_string(), (at + 1).into()))
        .collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let end = json!({"id": END_TOKEN, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocabulary, "merges": []});
    let file = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [end], "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level, "model": model});
    Tokenizer::from_json(file.to_string().as_bytes())
}
