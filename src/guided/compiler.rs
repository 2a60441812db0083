//! Compiles grammars for one vocabulary.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{ParserFactory, TokenParser};

use super::grammar::Grammar;
use super::matcher::{Matcher, reason};
use crate::error::{Error, Kind, Result};
use crate::text::Tokenizer;

/// Maximum length of a token, in bytes, that a grammar may allow: the limit of a trie node.
const MAX_TOKEN_BYTES: usize = 1000;
/// Maximum number of states of one sequence's lexer. Each takes about 2 kB.
const MAX_LEXER_STATES: usize = 20_000;
/// Approximate size of a compiled grammar without its lexer, per byte of its source.
const BYTES_PER_SOURCE_BYTE: usize = 64;

/// The vocabulary as a trie, and the limits of compilation. There is one for each model.
pub struct Compiler {
    factory: ParserFactory,
    vocab_size: usize,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler")
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

impl Compiler {
    /// Reads the bytes of all tokens. `vocab_size` is the number of rows of the logits; `end_tokens` end an answer.
    ///
    /// # Errors
    /// `unsupported_parameter` (400) if the tokenizer cannot tell which bytes a token adds to a text.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize, end_tokens: &[u32]) -> Result<Self> {
        if !tokenizer.has_exact_bytes() {
            let message = "this model's tokenizer does not say what each token adds to a text, which grammars need";
            return Err(Error::new(Kind::Invalid, "unsupported_parameter", message));
        }
        let words: Vec<Vec<u8>> = (0..vocab_size as u32)
            .map(|id| word(tokenizer, id))
            .collect();
        let end_tokens: Vec<u32> = end_tokens
            .iter()
            .copied()
            .filter(|&id| (id as usize) < vocab_size)
            .collect();
        let build = || {
            let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, INVALID_TOKEN), &words);
            let trie = if end_tokens.is_empty() {
                trie
            } else {
                trie.with_eos_tokens(&end_tokens)
            };
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let slices = SlicedBiasComputer::general_slices();
            ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
        };
        let mut factory = guarded(build).map_err(Error::internal)?;
        let limits = factory.limits_mut();
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        factory.quiet();
        Ok(Self {
            factory,
            vocab_size,
        })
    }

    /// Compiles a grammar. Returns a matcher at its beginning, and its approximate size in bytes.
    ///
    /// # Errors
    /// `invalid_grammar` (400) names the fault, or the limit that the grammar exceeds.
    pub fn compile(&self, grammar: &Grammar) -> Result<(Matcher, usize)> {
        let refuse = |why: String| {
            let (param, why) = (grammar.param(), reason(&why));
            Error::new(
                Kind::Invalid,
                "invalid_grammar",
                format!("{param} cannot be compiled: {why}"),
            )
            .with_param(param)
        };
        let compiled = || -> Result<TokenParser, String> {
            let mut parser = guarded(|| self.factory.create_parser(grammar.source()))?;
            guarded(|| {
                parser.start_without_prompt();
                // Computing the first mask creates lexer states that all forks then share.
                parser.compute_mask()
            })?;
            Ok(parser)
        };
        let parser = compiled().map_err(refuse)?;
        let bytes =
            parser.parser.lexer_stats().num_bytes + grammar.key().len() * BYTES_PER_SOURCE_BYTE;
        let inner = llguidance::Matcher::new(Ok(parser));
        Ok((Matcher::new(inner, self.vocab_size), bytes))
    }
}

/// The bytes of a token. Those of a special token begin with a marker that no text contains.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    if bytes.len() > MAX_TOKEN_BYTES {
        return Vec::new();
    }
    let mut word = Vec::with_capacity(bytes.len() + 1);
    if tokenizer.is_special(id) && !bytes.is_empty() {
        word.push(TokTrie::SPECIAL_TOKEN_MARKER);
    }
    word.extend_from_slice(bytes);
    word
}

/// Calls the library, and converts a panic into an error.
fn guarded<T, E: std::fmt::Display>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("it exceeds the limits of the compiler".to_owned()),
    }
}
