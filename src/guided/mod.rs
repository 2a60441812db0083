//! Answers that must follow a grammar: compiled grammars, the state of each sequence in its grammar, and the masks of allowed
//! tokens.
//!
//! This is a pure layer over `llguidance`, without clocks or threads. A panic in that crate fails only the current request.

mod answer;
mod cache;
mod calls;
mod compiler;
mod grammar;
mod lookahead;
mod loose;
mod marks;
mod masks;
mod matcher;
mod schema;

pub use answer::AnswerGrammar;
pub use cache::GrammarCache;
pub use calls::Calls;
pub use compiler::Compiler;
pub use grammar::Grammar;
pub use masks::{MaskRow, StepMasks};
pub use matcher::Matcher;
pub use schema::Spacing;
