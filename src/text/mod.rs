//! Converts text to tokens and back: tokenizer, incremental detokenizer, stop strings and chat templates.
//!
//! This layer does not use pyo3, and has no clocks, threads or random numbers.

mod around;
mod bound;
mod detokenizer;
#[cfg(test)]
mod fixtures;
pub mod formats;
mod from_gguf;
mod kinds;
mod long_word;
mod markers;
mod pieces;
mod pre_tokenizers;
mod prefix;
mod stop;
mod table;
mod template;
mod tokenizer;
mod unjoined;
mod user_text;

pub use detokenizer::Detokenizer;
pub use markers::END_OF_TURN;
pub use stop::{Matched, StopMatcher};
pub use template::{ChatTemplate, Ending, Tail, without_notes};
pub use tokenizer::{PIECE_BYTES, Tokenizer, Watch};
pub use user_text::{MARK, SpecialTexts};
