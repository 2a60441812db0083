//! Tokenizes a long text piece by piece. The tokens are exactly those of the whole text, but only one piece needs memory.
//!
//! A piece ends between two words of the whole text, where the following text begins a new word whatever stands before it. The
//! words before this place must not depend on the text after the piece. The patterns below look past one run of characters of the
//! same class, and then at a few more characters. So a piece ends where enough changes of class follow within the text that was
//! read.

use std::result::Result as Outcome;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::{Model, PreTokenizer, SplitDelimiterBehavior};
use tokenizers::{
    ModelWrapper, OffsetReferential, OffsetType, PreTokenizedString, Result, Tokenizer,
};

use super::bound::replaced;
use super::kinds::{Kind, begins_anew};
use super::long_word::{is_joinable, tokenize_long};
use super::pre_tokenizers::RUNS;
use super::prefix::WithoutPrefix;
use super::unjoined::Unjoined;

/// Number of changes of class that must follow the end of a piece: a pattern looks at one character, a run, and three more
/// characters.
const CHANGES: usize = 8;
/// Words of more bytes are tokenized in windows.
const LONG_WORD: usize = 8192;

/// GPT-2's pattern as `tokenizer.json` files write it.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Number of words between two calls of `look`.
const WORDS: usize = 256;

/// The rules by which a tokenizer's texts can be cut.
#[derive(Debug)]
pub(super) struct Pieces {
    /// Whether texts can be cut. If not, a text is one piece whose words are tokenized one by one.
    cuts: bool,
    /// Tokens before a text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// Length in bytes of the longest added token, which may begin anywhere.
    longest_added: usize,
    /// Number of bytes that two windows of a long word share. It is more than any token has, because a token that is a whole word
    /// may be used without its merges.
    overlap: usize,
    /// Whether an added token matches depends on the character before it.
    single_words: bool,
    /// Whether a digit ends a run of digits.
    short_numbers: bool,
    /// Where words can be cut further, if there is no pre-tokenizer.
    unjoined: Option<Unjoined>,
}

/// A word of a piece.
#[derive(Debug)]
struct Word {
    /// Its bytes in the piece.
    start: usize,
    end: usize,
    kind: WordKind,
}

#[derive(Debug)]
enum WordKind {
    /// A normalized text for the model.
    Text(String),
    /// An added token that was found in the text.
    Added(Vec<u32>),
}

/// The tokens of the beginning of a piece, and the number of bytes that they cover.
pub(super) struct Piece {
    pub(super) ids: Vec<u32>,
    pub(super) bytes: usize,
}

impl Pieces {
    /// `None` if the tokenizer does more with a text than tokenize its words. `has_prefix`: it puts a space before a text.
    pub(super) fn of(inner: &Tokenizer, has_prefix: bool) -> Option<Self> {
        if matches!(inner.get_model(), ModelWrapper::BPE(model) if model.dropout.is_some()) {
            return None;
        }
        // Nothing cuts a text into words.
        let one_word = inner.get_pre_tokenizer().is_none_or(splits_nothing);
        let unjoined = Unjoined::of(inner).filter(|_| one_word);
        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let single_words = added.values().any(|token| token.single_word);
        let spaced = |content: &str| content.starts_with(char::is_whitespace);
        let looks_back =
            single_words && (has_prefix || added.values().any(|token| spaced(&token.content)));
        let cuts = inner.get_normalizer().is_none_or(is_local)
            && inner.get_pre_tokenizer().is_none_or(is_restartable)
            && (!one_word || unjoined.is_some())
            && !looks_back;
        let (prefix, suffix) = around(inner)?;
        let vocabulary = inner.get_vocab(false);
        let longest_token = vocabulary.keys().map(String::len).max().unwrap_or(0);
        Some(Self {
            cuts,
            prefix,
            suffix,
            longest_added: added
                .values()
                .map(|token| token.content.len())
                .max()
                .unwrap_or(0),
            overlap: longest_token.max(512) + 1,
            single_words,
            short_numbers: inner.get_pre_tokenizer().is_some_and(has_short_numbers),
            unjoined: unjoined.filter(|_| cuts),
        })
    }

    /// Whether texts can be cut.
    pub(super) const fn cuts(&self) -> bool {
        self.cuts
    }

    pub(super) fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    pub(super) fn suffix(&self) -> &[u32] {
        &self.suffix
    }

    /// The tokens of `text` up to the last place where it can be cut, or of all of it if it is the `last` piece. `bare`: without
    /// the space that some vocabularies put before a text. `None` if it cannot be cut. `look` gets the number of tokens so far,
    /// after every few words and within very long words.
    ///
    /// # Errors
    /// Those of the tokenizer and of `look`.
    pub(super) fn encode<E>(
        &self,
        inner: &Tokenizer,
        bare: Option<&WithoutPrefix>,
        text: &str,
        last: bool,
        mut look: impl FnMut(usize) -> Outcome<(), E>,
    ) -> Result<Outcome<Option<Piece>, E>> {
        let words = self.words(inner, bare, text)?;
        let (count, bytes) = if last {
            (words.len(), text.len())
        } else {
            match self.last_cut(text, &words) {
                None => return Ok(Ok(None)),
                Some(count) => (count, words[count - 1].end),
            }
        };
        let mut ids = Vec::new();
        for (at, word) in words[..count].iter().enumerate() {
            if at % WORDS == WORDS - 1
                && let Err(error) = look(ids.len())
            {
                return Ok(Err(error));
            }
            let text = match &word.kind {
                WordKind::Added(tokens) => {
                    ids.extend_from_slice(tokens);
                    continue;
                }
                WordKind::Text(text) => text,
            };
            if let ModelWrapper::BPE(model) = inner.get_model()
                && text.len() > LONG_WORD
                && is_joinable(model)
            {
                let so_far = ids.len();
                let more = tokenize_long(model, text, LONG_WORD, self.overlap, |count| {
                    look(so_far + count)
                })?;
                match more {
                    Ok(more) => ids.extend(more),
                    Err(error) => return Ok(Err(error)),
                }
            } else {
                let tokens = inner.get_model().tokenize(text)?;
                ids.extend(tokens.iter().map(|token| token.id));
            }
        }
        Ok(Ok(Some(Piece { ids, bytes })))
    }

    /// The number of words before the last place where the text can be cut.
    fn last_cut(&self, text: &str, words: &[Word]) -> Option<usize> {
        let limit = self.settled(text)?;
        let mut starts = usize::MAX;
        let mut cut = None;
        for count in (1..words.len()).rev() {
            starts = starts.min(words[count].start);
            let before = &words[count - 1];
            if before.end > limit || before.end > starts {
                continue;
            }
            let ends_before = words[..count]
                .iter()
                .rev()
                .take(8)
                .all(|word| word.end <= before.end);
            let next = text[before.end..].chars().next()?;
            let fits = matches!(before.kind, WordKind::Text(_))
                && ends_before
                && before.end > 0
                && begins_anew(next)
                && (!self.single_words || next.is_whitespace());
            if fits {
                cut = Some(count);
                break;
            }
        }
        cut
    }

    /// The last place before which the words do not depend on text that may follow.
    fn settled(&self, text: &str) -> Option<usize> {
        let end = text.len().checked_sub(self.longest_added)?;
        if self.unjoined.is_some() {
            // Two neighbouring characters decide.
            return Some(end);
        }
        let mut changes = 0;
        let mut following: Option<Kind> = None;
        for (at, character) in text.char_indices().rev() {
            if at > end {
                continue;
            }
            let Some(kind) = Kind::of(character) else {
                continue;
            };
            let apart = kind == Kind::Number && self.short_numbers;
            if following.is_some_and(|other| apart || kind != other) {
                changes += 1;
                if changes == CHANGES {
                    return Some(at);
                }
            }
            following = Some(kind);
        }
        None
    }

    fn words(
        &self,
        inner: &Tokenizer,
        bare: Option<&WithoutPrefix>,
        text: &str,
    ) -> Result<Vec<Word>> {
        let mut words = Vec::new();
        let mut rest = 0;
        if let Some(bare) = bare {
            let (first, cut) = bare.words_of_first(inner, text)?;
            self.collect(first, 0, &mut words)?;
            rest = cut;
        }
        if rest < text.len() || bare.is_none() {
            let added = inner.get_added_vocabulary();
            let mut split = added.extract_and_normalize(inner.get_normalizer(), &text[rest..]);
            if let Some(pre_tokenizer) = inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut split)?;
            }
            self.collect(split, rest, &mut words)?;
        }
        Ok(words)
    }

    fn collect(
        &self,
        mut split: PreTokenizedString,
        offset: usize,
        words: &mut Vec<Word>,
    ) -> Result<()> {
        if let Some(unjoined) = &self.unjoined {
            split.split(|_, text| text.split(unjoined, SplitDelimiterBehavior::Isolated))?;
        }
        let splits = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        words.extend(splits.into_iter().map(|(text, (start, end), tokens)| Word {
            start: offset + start,
            end: offset + end,
            kind: match tokens {
                Some(tokens) => WordKind::Added(tokens.iter().map(|token| token.id).collect()),
                None => WordKind::Text(text.to_owned()),
            },
        }));
        Ok(())
    }
}

/// The tokens before and after each text. `None` if the post-processor does more than add these.
fn around(inner: &Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let ids = |special| {
        let encoding = inner.encode_fast("a", special).ok()?;
        Some(encoding.get_ids().to_vec())
    };
    if inner.get_post_processor().is_none() {
        return Some((Vec::new(), Vec::new()));
    }
    let (own, all) = (ids(false)?, ids(true)?);
    if own.is_empty() {
        return None;
    }
    let mut places =
        (0..=all.len().checked_sub(own.len())?).filter(|&at| all[at..].starts_with(&own));
    let at = places.next()?;
    let (prefix, rest) = all.split_at(at);
    places
        .next()
        .is_none()
        .then(|| (prefix.to_vec(), rest[own.len()..].to_vec()))
}

/// Whether a normalizer changes a character independently of all others, except those that combine with it.
fn is_local(normalizer: &NormalizerWrapper) -> bool {
    match normalizer {
        NormalizerWrapper::NFC(_)
        | NormalizerWrapper::NFD(_)
        | NormalizerWrapper::NFKC(_)
        | NormalizerWrapper::NFKD(_)
        | NormalizerWrapper::Lowercase(_)
        | NormalizerWrapper::StripAccents(_)
        | NormalizerWrapper::BertNormalizer(_)
        | NormalizerWrapper::ByteLevel(_)
        // It is skipped for all pieces except the first.
        | NormalizerWrapper::Prepend(_) => true,
        NormalizerWrapper::Replace(step) => {
            replaced(step).is_some_and(|pattern| pattern.chars().count() == 1)
        }
        NormalizerWrapper::Sequence(steps) => steps.as_ref().iter().all(is_local),
        _ => false,
    }
}

/// Whether the words after any word's beginning are those of the text that begins there.
fn is_restartable(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::ByteLevel(_)
        | PreTokenizerWrapper::BertPreTokenizer(_)
        | PreTokenizerWrapper::Metaspace(_)
        | PreTokenizerWrapper::Whitespace(_)
        | PreTokenizerWrapper::WhitespaceSplit(_)
        | PreTokenizerWrapper::Digits(_) => true,
        PreTokenizerWrapper::Punctuation(step) => is_plain(step.behavior),
        PreTokenizerWrapper::Split(Split {
            pattern: SplitPattern::Regex(pattern),
            behavior,
            invert: false,
            ..
        }) => is_plain(*behavior) && (pattern == GPT2 || RUNS.contains(&pattern.as_str())),
        PreTokenizerWrapper::Sequence(steps) => steps.as_ref().iter().all(is_restartable),
        _ => false,
    }
}

const fn is_plain(behavior: SplitDelimiterBehavior) -> bool {
    matches!(
        behavior,
        SplitDelimiterBehavior::Isolated | SplitDelimiterBehavior::Removed
    )
}

fn splits_nothing(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::ByteLevel(step) => !step.use_regex,
        PreTokenizerWrapper::Metaspace(step) => !step.split,
        PreTokenizerWrapper::Sequence(steps) => steps.as_ref().iter().all(splits_nothing),
        _ => false,
    }
}

/// Whether a run of digits is cut after three digits at most.
fn has_short_numbers(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::Digits(step) => step.individual_digits,
        PreTokenizerWrapper::Split(Split {
            pattern: SplitPattern::Regex(pattern),
            ..
        }) => !pattern.contains(r"\p{N}+"),
        // Later steps see only the words of the first.
        PreTokenizerWrapper::Sequence(steps) => steps.as_ref().iter().any(has_short_numbers),
        _ => false,
    }
}
