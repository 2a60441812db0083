//! Answers that must follow a grammar: compiled grammars, the state of a grammar in its sequence, and the masks of allowed tokens.
//!
//! This is a pure layer over `llguidance`, without a clock or a thread. A panic of that crate fails only the request at hand.

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
