//! The space that SentencePiece-style vocabularies put before the first word of a text, and how to omit it.

use tokenizers::Result;
use tokenizers::normalizers::{NormalizerWrapper, Sequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::tokenizer::{
    Model, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

/// A tokenizer's normalization without the steps that add a space before the text.
#[derive(Debug)]
pub(super) struct WithoutPrefix {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
}

impl WithoutPrefix {
    /// `None` if `inner` adds no space before a text.
    pub(super) fn of(inner: &tokenizers::Tokenizer) -> Option<Self> {
        let mut changed = false;
        let normalizer = inner
            .get_normalizer()
            .and_then(|step| bare_normalizer(step, &mut changed));
        let pre_tokenizer = inner
            .get_pre_tokenizer()
            .map(|step| bare_pre_tokenizer(step, &mut changed));
        changed.then_some(Self {
            normalizer,
            pre_tokenizer,
        })
    }

    /// The words of `text` up to its first special (or other added) token, and that token's position.
    pub(super) fn words_of_first(
        &self,
        inner: &tokenizers::Tokenizer,
        text: &str,
    ) -> Result<(PreTokenizedString, usize)> {
        let added = inner.get_added_vocabulary();
        let whole = added.extract_and_normalize(self.normalizer.as_ref(), text);
        let cut = whole
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .find(|(_, _, tokens)| tokens.is_some())
            .map_or(text.len(), |(_, (start, _), _)| start);
        let mut words = added.extract_and_normalize(self.normalizer.as_ref(), &text[..cut]);
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut words)?;
        }
        Ok((words, cut))
    }

    /// The tokens of `text` up to its first special (or other added) token, and the text from there on.
    pub(super) fn encode_first<'t>(
        &self,
        inner: &tokenizers::Tokenizer,
        text: &'t str,
    ) -> Result<(Vec<u32>, &'t str)> {
        let (mut words, cut) = self.words_of_first(inner, text)?;
        words.tokenize(|word| inner.get_model().tokenize(word.get()))?;
        let encoding = words.into_encoding(None, 0, OffsetType::None)?;
        Ok((encoding.get_ids().to_vec(), &text[cut..]))
    }
}

fn bare_normalizer(step: &NormalizerWrapper, changed: &mut bool) -> Option<NormalizerWrapper> {
    match step {
        NormalizerWrapper::Prepend(_) => {
            *changed = true;
            None
        }
        NormalizerWrapper::Sequence(steps) => {
            let steps = steps
                .as_ref()
                .iter()
                .filter_map(|step| bare_normalizer(step, changed))
                .collect();
            Some(Sequence::new(steps).into())
        }
        other => Some(other.clone()),
    }
}

fn bare_pre_tokenizer(step: &PreTokenizerWrapper, changed: &mut bool) -> PreTokenizerWrapper {
    match step {
        PreTokenizerWrapper::Metaspace(step) if step.prepend_scheme != PrependScheme::Never => {
            *changed = true;
            let mut step = step.clone();
            step.set_prepend_scheme(PrependScheme::Never);
            step.into()
        }
        PreTokenizerWrapper::ByteLevel(step) if step.add_prefix_space => {
            *changed = true;
            step.add_prefix_space(false).into()
        }
        PreTokenizerWrapper::Sequence(steps) => {
            let mut cut = false;
            let bare = |step: &PreTokenizerWrapper| {
                // If the text is cut at spaces (XLM-R), every word gets the space, not only the first.
                if cut {
                    return step.clone();
                }
                cut = matches!(step, PreTokenizerWrapper::WhitespaceSplit(_));
                bare_pre_tokenizer(step, changed)
            };
            PreTokenizers::new(steps.as_ref().iter().map(bare).collect()).into()
        }
        other => other.clone(),
    }
}
