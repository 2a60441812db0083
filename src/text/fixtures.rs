//! Small tokenizers for the tests of this layer.

use std::fmt::Write;

use serde_json::{Value, json};

use super::Tokenizer;

fn load(json: &Value) -> Tokenizer {
    Tokenizer::from_json(json.to_string().as_bytes()).expect("a valid tokenizer.json")
}

fn added(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
}

/// The vocabulary in which each token's id is its index.
fn numbered(tokens: Vec<String>) -> serde_json::Map<String, Value> {
    let numbered = tokens.into_iter().enumerate();
    numbered.map(|(id, token)| (token, id.into())).collect()
}

/// Byte-level BPE: 256 byte tokens (id = byte), merges for "he", "ll", "hell" and for "é" (C3 A9), `<|end|>` special (260).
pub(super) fn byte_level() -> Tokenizer {
    let mut vocab: Vec<String> = (0..=255u8)
        .map(|byte| char_of_byte(byte).to_string())
        .collect();
    vocab.extend(["he", "ll", "hell", "Ã©"].map(str::to_owned));
    let vocab = numbered(vocab);
    load(&json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(260, "<|end|>")], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
            "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["Ã", "©"]]},
    }))
}

/// SentencePiece-style BPE with byte fallback: `<unk>`, `<s>`, `</s>`, 256 byte tokens from id 3, then letters and a word.
pub(super) fn byte_fallback() -> Tokenizer {
    let mut vocab = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    for byte in 0..=255u8 {
        let mut token = String::new();
        write!(token, "<0x{byte:02X}>").expect("a String takes any text");
        vocab.push(token);
    }
    vocab.extend(["▁", "a", "b", "▁a", "▁▁", "é", ""].map(str::to_owned));
    let vocab = numbered(vocab);
    load(&json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
            "merges": [["▁", "a"], ["▁", "▁"]]},
    }))
}

/// WordPiece: `[UNK]`, `[CLS]`, `[SEP]`, then words and word parts.
pub(super) fn word_piece() -> Tokenizer {
    let tokens = [
        "[UNK]", "[CLS]", "[SEP]", "the", "un", "##do", "##ing", ".", ",", "'", "s", "n't", "é",
    ];
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, &token)| (token.to_owned(), id.into()))
        .collect();
    load(&json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "[UNK]"},
        "added_tokens": [added(0, "[UNK]"), added(1, "[CLS]"), added(2, "[SEP]")],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
            "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [], "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [2], "tokens": ["[SEP]"]}}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab},
    }))
}

fn char_of_byte(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(0x100 + before as u32).expect("a character below U+0144")
}
