//! The toy model's vocabulary: an end token, letters, and the bytes of a two-byte and a three-byte character as tokens of
//! their own, so that text is often incomplete.

use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::guided::{Compiler, Grammar, Matcher, Spacing};
use crate::request;
use crate::text::{ChatTemplate, Tokenizer};

/// Tokens of the vocabulary.
pub const VOCAB_SIZE: u32 = 24;
/// The token that ends an answer.
pub const END_TOKEN: u32 = 0;
/// Stop strings that requests ask for; none is a part of another of its list.
pub(super) const STOPS: [&[&str]; 5] =
    [&["a"], &["bc", "é"], &["你"], &["d e", "fg"], &["hi", "j"]];

/// What some answers are made of: letters of the beginning of the alphabet, in some number.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guide {
    /// Letters that it may have: the tokens from 1 on.
    letters: u32,
    least: usize,
    pub(super) most: usize,
}

pub(super) const GUIDES: [Guide; 3] = [
    Guide {
        letters: 2,
        least: 1,
        most: 4,
    },
    Guide {
        letters: 7,
        least: 3,
        most: 20,
    },
    Guide {
        letters: 17,
        least: 8,
        most: 90,
    },
];

impl Guide {
    pub(super) fn pattern(&self) -> String {
        let last = char::from(b'a' + self.letters as u8 - 1);
        format!("[a-{last}]{{{},{}}}", self.least, self.most)
    }

    /// Whether a token may come behind so many letters, where those of `ends` end the answer and `held_off` says that it must go on.
    pub(super) fn allows(&self, token: u32, behind: usize, ends: &[u32], held_off: bool) -> bool {
        let is_letter = (1..=self.letters).contains(&token);
        let is_end = token == END_TOKEN || ends.contains(&token);
        let may_end = behind >= self.least;
        if held_off {
            // Of the letters, one at most is an end.
            return is_letter && !is_end;
        }
        is_letter || (may_end && is_end)
    }
}

/// The compiled grammars of [`GUIDES`].
pub(super) fn matchers(tokenizer: &Tokenizer) -> Result<Vec<Matcher>> {
    let compiler = Compiler::new(tokenizer, VOCAB_SIZE as usize, &[END_TOKEN])?;
    let compile = |guide: &Guide| {
        let pattern = guide.pattern();
        let grammar = Grammar::of(
            &request::Guide::Regex { pattern },
            "guide",
            Spacing::Compact,
        );
        Ok(compiler.compile(&grammar)?.0)
    };
    GUIDES.iter().map(compile).collect()
}

/// As the template of a model that leaves out what it thought, this one leaves each `a` out of an answer.
const TEMPLATE: &str = "{% for message in messages %}{% if message.role == 'assistant' %}\
    p{{ message.content | replace('a', '') }}{% else %}q{{ message.content }}{% endif %}o{% endfor %}\
    {% if add_generation_prompt %}p{% endif %}";

/// A chat template of the vocabulary's letters.
pub(super) fn template() -> Result<ChatTemplate> {
    ChatTemplate::new(TEMPLATE, &Map::new())
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) is_answer: bool,
    pub(super) text: String,
}

/// What the template makes of messages, without what comes before an answer.
pub(super) fn rendered(messages: &[Message]) -> String {
    let written = messages.iter().map(|message| {
        if message.is_answer {
            format!("p{}o", message.text.replace('a', ""))
        } else {
            format!("q{}o", message.text)
        }
    });
    written.collect()
}

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
