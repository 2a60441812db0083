//! Builds tokenizers from the vocabulary in a GGUF file's metadata (`tokenizer.ggml.*`), which contain no `tokenizer.json`.

use std::collections::HashSet;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{
    BertNormalizer, NFC, NormalizerWrapper, Precompiled, Prepend, Replace, Sequence, Strip,
};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer, decoders};

use super::markers::END_OF_TURN;
use super::pre_tokenizers::Rules;
use crate::error::{Error, Result};
use crate::gguf::{Array, GgufFile};

/// `tokenizer.ggml.token_type`
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// Maximum length of a token, in bytes, for which merges are computed. The work grows with its square.
const MAX_MERGED_BYTES: usize = 512;

/// The character for a space in a SentencePiece vocabulary.
const SPACE: char = '▁';

/// Builds the tokenizer that `file` describes.
pub(super) fn build(file: &GgufFile) -> Result<Tokenizer> {
    let vocabulary = Vocabulary::read(file)?;
    match file.string("tokenizer.ggml.model") {
        Some("gpt2") => byte_pairs(file, &vocabulary, "default"),
        Some("gemma4") => byte_pairs(file, &vocabulary, "gemma4"),
        Some("llama") => sentence_piece(file, &vocabulary),
        Some("t5") => unigram(file, &vocabulary),
        Some("bert") => word_piece(file, &vocabulary),
        Some(model) => Err(refuse(format!(
            "its vocabulary is of the kind {model} (tokenizer.ggml.model); gpt2, gemma4, llama, t5 and bert are supported"
        ))),
        None => Err(refuse("it has no tokenizer.ggml.model")),
    }
}

/// The tokens of a file, with their types.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Vec<i64>,
    ids: Vocab,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a GgufFile) -> Result<Self> {
        let tokens = strings(file, "tokenizer.ggml.tokens")?
            .ok_or_else(|| refuse("it has no tokenizer.ggml.tokens"))?;
        let types = match file.array("tokenizer.ggml.token_type") {
            None => vec![1; tokens.len()],
            Some(Array::I32(types)) => types.iter().map(|&t| t.into()).collect(),
            Some(Array::U32(types)) => types.iter().map(|&t| t.into()).collect(),
            Some(_) => {
                return Err(refuse(
                    "tokenizer.ggml.token_type is not an array of integers",
                ));
            }
        };
        check_len("token_type", types.len(), tokens.len())?;
        let types = types.into_iter().zip(tokens);
        // Some files mark these as ordinary text. They would be cut into pieces wherever a template writes them.
        let types = types.map(|(t, token)| {
            if END_OF_TURN.contains(&token.as_str()) {
                CONTROL
            } else {
                t
            }
        });
        let types: Vec<i64> = types.collect();
        let mut ids = Vocab::with_capacity(tokens.len());
        for (id, token) in tokens
            .iter()
            .enumerate()
            .filter(|(_, token)| !token.is_empty())
        {
            if let Some(first) = ids.insert(token.clone(), id as u32) {
                return Err(refuse(format!(
                    "its tokens {first} and {id} are both {token:?}"
                )));
            }
        }
        Ok(Self { tokens, types, ids })
    }

    fn token(&self, file: &GgufFile, key: &str) -> Result<Option<&'a str>> {
        let Some(id) = file.unsigned(key) else {
            return Ok(None);
        };
        let Some(token) = usize::try_from(id).ok().and_then(|id| self.tokens.get(id)) else {
            let tokens = self.tokens.len();
            return Err(refuse(format!("{key} is {id}, but it has {tokens} tokens")));
        };
        Ok(Some(token.as_str()).filter(|token| !token.is_empty()))
    }

    /// Tokens that are found in a text before it is cut into words.
    fn added(&self) -> Vec<AddedToken> {
        let added = |(token, &kind): (&String, &i64)| {
            let special = matches!(kind, UNKNOWN | CONTROL);
            (special || kind == USER_DEFINED)
                .then(|| AddedToken::from(token.as_str(), special).normalized(false))
        };
        self.tokens
            .iter()
            .zip(&self.types)
            .filter_map(added)
            .collect()
    }
}

/// `pre`: the rules to cut words if the file names none.
fn byte_pairs(file: &GgufFile, vocabulary: &Vocabulary, pre: &str) -> Result<Tokenizer> {
    let pre = file.string("tokenizer.ggml.pre").unwrap_or(pre);
    let rules = Rules::named(pre).ok_or_else(|| {
        refuse(format!(
            "its pre-tokenizer, {pre} (tokenizer.ggml.pre), is not supported"
        ))
    })?;
    let merges = strings(file, "tokenizer.ggml.merges")?
        .ok_or_else(|| refuse("it has no tokenizer.ggml.merges"))?;
    let model = BPE::builder()
        .vocab_and_merges(
            vocabulary.ids.clone(),
            merges
                .iter()
                .map(|m| split_merge(m))
                .collect::<Result<Merges>>()?,
        )
        .ignore_merges(rules.ignore_merges)
        .byte_fallback(!rules.byte_level)
        .build()
        .map_err(|e| refuse(format!("its merges do not fit its tokens: {e}")))?;
    let mut tokenizer = Tokenizer::new(model);
    if rules.nfc {
        tokenizer.with_normalizer(Some(NFC)).map_err(internal)?;
    }
    let mut words: Vec<PreTokenizerWrapper> = Vec::new();
    for split in rules.splits {
        let pattern = SplitPattern::Regex((*split).to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        words.push(split.map_err(internal)?.into());
    }
    if rules.byte_level {
        words.push(ByteLevel::new(false, true, false).into());
        tokenizer.with_decoder(Some(ByteLevel::default()));
    } else {
        let spaces = Replace::new(" ", SPACE.to_string()).map_err(internal)?;
        tokenizer.with_normalizer(Some(spaces)).map_err(internal)?;
        tokenizer.with_decoder(Some(pieces(false)?));
    }
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(words)));
    finish(file, vocabulary, tokenizer, (rules.add_bos, rules.add_sep))
}

fn split_merge(merge: &str) -> Result<(String, String)> {
    let space = merge
        .char_indices()
        .skip(1)
        .find(|&(_, c)| c == ' ')
        .map(|(at, _)| at);
    let (left, right) = space
        .map(|at| (&merge[..at], &merge[at + 1..]))
        .ok_or_else(|| refuse(format!("its merge {merge:?} is not a pair of tokens")))?;
    Ok((left.to_owned(), right.to_owned()))
}

fn sentence_piece(file: &GgufFile, vocabulary: &Vocabulary) -> Result<Tokenizer> {
    let Some(Array::F32(scores)) = file.array("tokenizer.ggml.scores") else {
        return Err(refuse("it has no tokenizer.ggml.scores of 32-bit floats"));
    };
    check_len("scores", scores.len(), vocabulary.tokens.len())?;
    let merges = merges_by_score(vocabulary, scores);
    let unknown = vocabulary
        .token(file, "tokenizer.ggml.unknown_token_id")?
        .map(str::to_owned);
    let unknown = unknown.or_else(|| {
        vocabulary
            .types
            .iter()
            .position(|&t| t == UNKNOWN)
            .map(|id| vocabulary.tokens[id].clone())
    });
    let mut model = BPE::builder()
        .vocab_and_merges(vocabulary.ids.clone(), merges)
        .fuse_unk(true)
        .byte_fallback(true);
    if let Some(unknown) = unknown {
        model = model.unk_token(unknown);
    }
    let mut tokenizer = Tokenizer::new(model.build().map_err(internal)?);
    let add_prefix = file.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if add_prefix {
        steps.push(Prepend::new(SPACE.to_string()).into());
    }
    steps.push(
        Replace::new(" ", SPACE.to_string())
            .map_err(internal)?
            .into(),
    );
    tokenizer
        .with_normalizer(Some(Sequence::new(steps)))
        .map_err(internal)?;
    tokenizer.with_decoder(Some(pieces(add_prefix)?));
    finish(file, vocabulary, tokenizer, (true, false))
}

/// Decodes pieces with `▁` for spaces and byte tokens. `prefix`: the space at the beginning is removed.
fn pieces(prefix: bool) -> Result<decoders::sequence::Sequence> {
    let mut steps: Vec<decoders::DecoderWrapper> = vec![
        Replace::new(SPACE.to_string(), " ")
            .map_err(internal)?
            .into(),
        decoders::byte_fallback::ByteFallback::new().into(),
        decoders::fuse::Fuse::new().into(),
    ];
    if prefix {
        steps.push(decoders::strip::Strip::new(' ', 1, 0).into());
    }
    Ok(decoders::sequence::Sequence::new(steps))
}

/// A unigram model as SentencePiece has it (T5, XLM-RoBERTa): the most likely pieces of each word.
fn unigram(file: &GgufFile, vocabulary: &Vocabulary) -> Result<Tokenizer> {
    let Some(Array::F32(scores)) = file.array("tokenizer.ggml.scores") else {
        return Err(refuse("it has no tokenizer.ggml.scores of 32-bit floats"));
    };
    check_len("scores", scores.len(), vocabulary.tokens.len())?;
    let unknown = file
        .unsigned("tokenizer.ggml.unknown_token_id")
        .and_then(|id| usize::try_from(id).ok())
        .or_else(|| vocabulary.types.iter().position(|&t| t == UNKNOWN));
    let scored = vocabulary.tokens.iter().zip(scores);
    let scored = scored.map(|(token, &score)| (token.clone(), f64::from(score)));
    let bytes = vocabulary.types.contains(&BYTE);
    let model = Unigram::from(scored.collect(), unknown, bytes)
        .map_err(|e| refuse(format!("its tokens make no unigram model: {e}")))?;
    let mut tokenizer = Tokenizer::new(model);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    let map: Option<Vec<u8>> = match file.array("tokenizer.ggml.precompiled_charsmap") {
        None => None,
        Some(Array::U8(map)) => Some(map.clone()),
        Some(Array::I8(map)) => Some(map.iter().map(|&b| b as u8).collect()),
        Some(_) => {
            return Err(refuse(
                "tokenizer.ggml.precompiled_charsmap is not an array of bytes",
            ));
        }
    };
    if let Some(map) = map {
        let map = Precompiled::from(&map)
            .map_err(|e| refuse(format!("its precompiled_charsmap cannot be read: {e}")))?;
        steps.push(map.into());
    }
    let remove = "tokenizer.ggml.remove_extra_whitespaces";
    if file.bool(remove).unwrap_or(true) {
        let runs = ReplacePattern::Regex(" {2,}".to_owned());
        steps.push(Strip::new(true, true).into());
        steps.push(Replace::new(runs, " ").map_err(internal)?.into());
    }
    tokenizer
        .with_normalizer(Some(Sequence::new(steps)))
        .map_err(internal)?;
    let prefix = file.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let scheme = if prefix {
        PrependScheme::Always
    } else {
        PrependScheme::Never
    };
    let spaces = Metaspace::new(SPACE, scheme, true);
    tokenizer.with_pre_tokenizer(Some(spaces.clone()));
    tokenizer.with_decoder(Some(spaces));
    finish(file, vocabulary, tokenizer, (false, true))
}

/// BERT's WordPiece: the longest pieces of words in lower case. Files write its tokens in SentencePiece's way: with `▁` at the
/// beginning of a word, without anything inside it.
fn word_piece(file: &GgufFile, vocabulary: &Vocabulary) -> Result<Tokenizer> {
    let original = |(id, token): (usize, &String)| {
        let special = matches!(
            vocabulary.types[id],
            UNKNOWN | CONTROL | USER_DEFINED | UNUSED
        );
        let token = match token.strip_prefix(SPACE) {
            _ if special || token.starts_with('[') && token.ends_with(']') => token.clone(),
            Some(begin) => begin.to_owned(),
            None => format!("##{token}"),
        };
        (token, id as u32)
    };
    let ids: Vocab = vocabulary.tokens.iter().enumerate().map(original).collect();
    let unknown = vocabulary.token(file, "tokenizer.ggml.unknown_token_id")?;
    let model = WordPiece::builder()
        .vocab(ids)
        .unk_token(unknown.unwrap_or("[UNK]").to_owned())
        .build()
        .map_err(|e| refuse(format!("its tokens make no WordPiece model: {e}")))?;
    let lower = file.bool("tokenizer.ggml.normalizer.lowercase");
    let lower = lower.unwrap_or(true);
    let strip = file.bool("tokenizer.ggml.normalizer.strip_accents");
    let strip = strip.unwrap_or(lower);
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(BertNormalizer::new(true, true, Some(strip), lower)))
        .map_err(internal)?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_decoder(Some(decoders::wordpiece::WordPiece::default()));
    finish(file, vocabulary, tokenizer, (true, true))
}

/// Converts scores to ranked merges. SentencePiece joins the two neighbours whose union has the highest score. The merges are all
/// ways to cut a token in two, ranked by the token's score. Tokens that never occur in text are left out.
fn merges_by_score(vocabulary: &Vocabulary, scores: &[f32]) -> Merges {
    let mergeable = |id: usize| {
        !matches!(
            vocabulary.types[id],
            UNKNOWN | CONTROL | UNUSED | BYTE | USER_DEFINED
        ) && vocabulary.tokens[id].len() <= MAX_MERGED_BYTES
    };
    let whole: Vec<(&str, f32)> = (0..vocabulary.tokens.len())
        .filter(|&id| mergeable(id))
        .map(|id| (vocabulary.tokens[id].as_str(), scores[id]))
        .collect();
    let known: HashSet<&str> = whole.iter().map(|&(token, _)| token).collect();
    let mut pairs: Vec<(f32, &str, &str)> = Vec::new();
    for &(token, score) in &whole {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if known.contains(left) && known.contains(right) {
                pairs.push((score, left, right));
            }
        }
    }
    // `transformers` ranks merges of equal score like this.
    let longer_first = |a: &str, b: &str| b.chars().count().cmp(&a.chars().count());
    pairs.sort_by(|a, b| {
        b.0.total_cmp(&a.0)
            .then_with(|| longer_first(a.1, b.1))
            .then_with(|| longer_first(a.2, b.2))
    });
    pairs
        .into_iter()
        .map(|(_, left, right)| (left.to_owned(), right.to_owned()))
        .collect()
}

/// Adds the parts that all models have: tokens that are found before anything else, and tokens around a text.
fn finish(
    file: &GgufFile,
    vocabulary: &Vocabulary,
    mut tokenizer: Tokenizer,
    (add_bos, add_end): (bool, bool),
) -> Result<Tokenizer> {
    tokenizer.add_tokens(vocabulary.added()).map_err(internal)?;
    let around = |flag: &str, default: bool, key: &str| {
        if file.bool(flag).unwrap_or(default) {
            vocabulary.token(file, key)
        } else {
            Ok(None)
        }
    };
    let bos = around(
        "tokenizer.ggml.add_bos_token",
        add_bos,
        "tokenizer.ggml.bos_token_id",
    )?;
    // Some files call the end token a separator.
    let sep = around(
        "tokenizer.ggml.add_sep_token",
        add_end,
        "tokenizer.ggml.seperator_token_id",
    )?;
    let eos = match sep {
        Some(sep) => Some(sep),
        None => around(
            "tokenizer.ggml.add_eos_token",
            add_end,
            "tokenizer.ggml.eos_token_id",
        )?,
    };
    if bos.is_none() && eos.is_none() {
        return Ok(tokenizer);
    }
    let special: Vec<(String, u32)> = bos
        .iter()
        .chain(&eos)
        .map(|&token| (token.to_owned(), vocabulary.ids[token]))
        .collect();
    let single: Vec<&str> = bos.into_iter().chain(["$A"]).chain(eos).collect();
    // RoBERTa writes the end token twice between two texts.
    let twice = eos.filter(|_| file.string("tokenizer.ggml.model") == Some("t5"));
    let second = twice.into_iter().chain(["$B:1"]).chain(eos);
    let pair: Vec<&str> = single.iter().copied().chain(second).collect();
    let processor = TemplateProcessing::builder()
        .try_single(single)
        .map_err(refuse)?
        .try_pair(pair)
        .map_err(refuse)?
        .special_tokens(special)
        .build()
        .map_err(internal)?;
    tokenizer.with_post_processor(Some(processor));
    Ok(tokenizer)
}

fn strings<'a>(file: &'a GgufFile, key: &str) -> Result<Option<&'a [String]>> {
    match file.array(key) {
        None if file.get(key).is_none() => Ok(None),
        Some(Array::String(strings)) => Ok(Some(strings)),
        _ => Err(refuse(format!("{key} is not an array of texts"))),
    }
}

fn check_len(name: &str, len: usize, tokens: usize) -> Result<()> {
    if len == tokens {
        return Ok(());
    }
    Err(refuse(format!(
        "tokenizer.ggml.{name} has {len} entries for {tokens} tokens"
    )))
}

fn refuse(reason: impl AsRef<str>) -> Error {
    Error::invalid(
        "model",
        format!(
            "the tokenizer of this GGUF file cannot be used: {}",
            reason.as_ref()
        ),
    )
}

fn internal(error: impl std::fmt::Display) -> Error {
    Error::internal(format!("the tokenizer cannot be built: {error}"))
}
