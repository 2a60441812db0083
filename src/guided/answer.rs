//! The grammar of a whole answer: thoughts first, then the format that the client asked for, or function calls.

use llguidance::api::GrammarWithLexer;

use super::calls::{CallRules, Calls};
use super::grammar::Grammar;
use super::marks::Marks;
use super::schema::Spacing;
use crate::error::Result;
use crate::request::Guide;
use crate::text::Tokenizer;
use crate::text::formats::{Thinking, Thoughts};

/// The parts of an answer.
#[derive(Debug, Default)]
pub struct AnswerGrammar<'a> {
    /// Thoughts at the beginning.
    pub thinking: Option<Thoughts>,
    /// The required format, and the client's field that requires it.
    pub guide: Option<(&'a Guide, &'a str)>,
    /// White space in the JSON that `guide` asks for.
    pub spacing: Spacing,
    /// Function calls instead of an answer.
    pub calls: Option<Calls<'a>>,
    /// Whether words are allowed instead of calls, or before them.
    pub words: bool,
}

impl AnswerGrammar<'_> {
    /// The grammar. None if nothing is required. `tokenizer` knows which markers are single tokens.
    ///
    /// # Errors
    /// `invalid_grammar` (400): a schema is strict, but this format of calls cannot enforce it.
    pub fn grammar(&self, tokenizer: Option<&Tokenizer>) -> Result<Option<Grammar>> {
        if self.calls.is_none() && self.thinking.is_none() {
            let of = |(guide, param): (&Guide, &str)| Grammar::of(guide, param, self.spacing);
            return Ok(self.guide.map(of));
        }
        let of_calls = self.calls.iter().flat_map(|calls| calls.format.tokens);
        let of_thoughts = self
            .thinking
            .iter()
            .flat_map(|thoughts| thoughts.format.tokens);
        let marks = Marks {
            tokenizer,
            tokens: of_calls.chain(of_thoughts).copied().collect(),
        };
        let mut grammars = Vec::new();
        let mut rules = String::new();
        let mut answers = Vec::new();
        let lead = self.thinking.map_or("", |thoughts| thoughts.format.answer);
        if let Some((guide, _)) = self.guide {
            grammars.push(named("answer", Grammar::single(guide, self.spacing)));
            answers.push(format!("{} @answer", marks.sequence(lead)));
        }
        if let Some(calls) = &self.calls {
            let mut written = CallRules::new(&marks);
            written.write(calls)?;
            answers.push("calls".to_owned());
            if self.words {
                written.write_words(calls);
                answers = vec!["words".to_owned()];
            }
            rules += &written.rules;
            grammars.append(&mut written.grammars);
        }
        if answers.is_empty() {
            return Ok(None);
        }
        let mut thoughts = String::new();
        if let Some(Thoughts { format, begin }) = self.thinking {
            thoughts = match begin {
                Thinking::Open => "thoughts".to_owned(),
                Thinking::Maybe => format!("({} thoughts)?", marks.sequence(format.open)),
            };
            rules += "thoughts: inner gap\n";
            rules += &marks.up_to("inner", "/(?s:.*)/", format.close);
            rules += if lead.is_empty() {
                "gap: | /\\n{1,2}/\n"
            } else {
                "gap: \"\"\n"
            };
        }
        let answers = answers.join(" | ");
        let start = format!("start: {thoughts} answer\nanswer: {answers}\n{rules}");
        grammars.insert(0, GrammarWithLexer::from_lark(start));
        let param = self.guide.map_or("tools", |(_, param)| param);
        Ok(Some(Grammar::from_parts(grammars, param)))
    }
}

pub(super) fn named(name: &str, mut grammar: GrammarWithLexer) -> GrammarWithLexer {
    grammar.name = Some(name.to_owned());
    grammar
}
