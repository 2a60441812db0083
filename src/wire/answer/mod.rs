//! What an answer's text is made of: thoughts, words, and calls of functions. State machines over the text as it comes, so
//! that a stream says the same as a whole reply, wherever its text is cut.

mod call;
mod reasoning;
mod tools;
mod value;

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::text::{Thinking, ToolFormat};
use reasoning::ThoughtParser;
use tools::{ToolParser, say};

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Thoughts.
    Reasoning(String),
    /// Words.
    Content(String),
    /// A call of a function begins.
    Call {
        /// Its place among the answer's calls.
        index: usize,
        /// The function's name.
        name: String,
    },
    /// Its arguments go on, as JSON.
    Arguments {
        /// The call's place.
        index: usize,
        /// New text.
        text: String,
    },
}

/// What to look for in an answer.
#[derive(Debug, Clone, Default)]
pub struct AnswerFormat {
    /// Absent: the answer has no thoughts.
    pub thinking: Option<Thinking>,
    /// Absent: the answer has no calls. The names are those of the functions that there are.
    pub tools: Option<(ToolFormat, Vec<String>)>,
    /// Calls after the first are left out.
    pub one_call: bool,
}

/// Takes one answer's text apart.
#[derive(Debug)]
pub struct AnswerParser {
    thoughts: Option<ThoughtParser>,
    tools: Option<ToolParser>,
    one_call: bool,
    thinks: bool,
}

impl AnswerParser {
    /// At the answer's beginning; `None` where there is nothing to look for.
    pub fn new(format: &AnswerFormat) -> Option<Self> {
        if format.thinking.is_none() && format.tools.is_none() {
            return None;
        }
        let tools = format.tools.clone();
        Some(Self {
            thoughts: format.thinking.map(ThoughtParser::new),
            tools: tools.map(|(format, names)| ToolParser::new(format, names)),
            one_call: format.one_call,
            thinks: false,
        })
    }

    /// Whether the text so far, but for what its end flushed, ends within thoughts or their markers.
    pub const fn thinks(&self) -> bool {
        self.thinks
    }

    /// What new text says; some of it may wait for more. `last`: no more will come.
    pub fn push(&mut self, text: &str, last: bool) -> Vec<Piece> {
        let (mut reasoning, mut answer) = (String::new(), String::new());
        match &mut self.thoughts {
            None => answer.push_str(text),
            Some(thoughts) => {
                thoughts.push(text, &mut reasoning, &mut answer);
                self.thinks = thoughts.is_open();
                if last {
                    thoughts.flush(&mut reasoning, &mut answer);
                }
            }
        }
        let mut pieces = Vec::new();
        if !reasoning.is_empty() {
            pieces.push(Piece::Reasoning(reasoning));
        }
        match &mut self.tools {
            None => say(answer, &mut pieces),
            Some(tools) => {
                tools.push(&answer, &mut pieces);
                if last {
                    tools.flush(&mut pieces);
                }
            }
        }
        if self.one_call {
            pieces.retain(|piece| {
                !matches!(piece, Piece::Call { index, .. } | Piece::Arguments { index, .. } if *index > 0)
            });
        }
        pieces
    }
}

/// Names a call: the same for the same reply, choice and call. `short`: nine characters, as Mistral's templates want.
pub fn call_id(prefix: &str, short: bool, reply: &str, choice: usize, call: usize) -> String {
    let mut hasher = DefaultHasher::new();
    (reply, choice, call).hash(&mut hasher);
    let id = format!("{:016x}", hasher.finish());
    if short {
        id[..9].to_owned()
    } else {
        format!("{prefix}{id}")
    }
}

/// Length in bytes of the longest beginning of `marker`, short of all of it, that `text` ends with.
fn partial_suffix(text: &str, marker: &str) -> usize {
    let longest = marker.len().saturating_sub(1).min(text.len());
    let ends = |&len: &usize| text.as_bytes().ends_with(&marker.as_bytes()[..len]);
    (1..=longest).rev().find(ends).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the pieces say together: reasoning, content, and each call's name and arguments.
    type Whole = (String, String, Vec<(String, String)>);

    fn join(pieces: Vec<Piece>) -> Whole {
        let (mut reasoning, mut content, mut calls) = (String::new(), String::new(), Vec::new());
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => reasoning += &text,
                Piece::Content(text) => content += &text,
                Piece::Call { index, name } => {
                    assert_eq!(index, calls.len());
                    calls.push((name, String::new()));
                }
                Piece::Arguments { index, text } => {
                    assert_eq!(index + 1, calls.len());
                    calls[index].1 += &text;
                }
            }
        }
        (reasoning, content, calls)
    }

    fn format(tools: Option<ToolFormat>, thinking: Option<Thinking>) -> AnswerFormat {
        let names = ["f", "get_weather"].map(str::to_owned).to_vec();
        AnswerFormat {
            thinking,
            tools: tools.map(|format| (format, names)),
            one_call: false,
        }
    }

    fn parse(format: &AnswerFormat, chunks: &[&str]) -> Whole {
        let mut parser = AnswerParser::new(format).unwrap();
        let mut pieces: Vec<Piece> = chunks
            .iter()
            .flat_map(|chunk| parser.push(chunk, false))
            .collect();
        pieces.extend(parser.push("", true));
        join(pieces)
    }

    fn calls(tools: ToolFormat, text: &str) -> (String, Vec<(String, String)>) {
        let (_, content, calls) = parse(&format(Some(tools), None), &[text]);
        (content, calls)
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn hermes_calls_are_found_among_words() {
        let text = "Let me see. \n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"\", \"b\": [1, {}]}}\n</tool_call>\n\
            <tool_call>{\"arguments\": {\"x\": 1}, \"name\": \"g\"}</tool_call>\nDone.";
        let expected = vec![
            call("f", "{\"a\": \"}\\\"\", \"b\": [1, {}]}"),
            call("g", "{\"x\": 1}"),
        ];
        assert_eq!(
            calls(ToolFormat::Hermes, text),
            ("Let me see.Done.".to_owned(), expected)
        );
    }

    #[test]
    fn of_several_calls_only_the_first_is_told_where_one_is_asked_for() {
        let text = "So.<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>\n\
            <tool_call>{\"name\": \"get_weather\", \"arguments\": {}}</tool_call>";
        let format = AnswerFormat {
            one_call: true,
            ..format(Some(ToolFormat::Hermes), None)
        };
        let (_, content, calls) = parse(&format, &[text]);
        assert_eq!(content, "So.");
        assert_eq!(calls, [call("f", "{\"a\": 1}")]);
        for cut in (1..text.len()).filter(|&cut| text.is_char_boundary(cut)) {
            let (_, content, calls) = parse(&format, &[&text[..cut], &text[cut..]]);
            assert_eq!((content.as_str(), calls.len()), ("So.", 1), "cut at {cut}");
        }
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in [
            "plain <tool> words ",
            "<tool_call>\nnot json\n</tool_call>",
            "<tool_call>{\"nam\": 1}</tool_call>",
            "<tool_call>{\"name\": \"f",
            "<tool_cal",
            "{\"name\": \"f\", \"arguments\": {}}",
            "",
        ] {
            assert_eq!(calls(ToolFormat::Hermes, text), (text.to_owned(), vec![]));
        }
        for text in [
            "{\"answer\": 42}",
            " {\"name\": \"nobody\", \"parameters\": {}}",
            "See {\"name\": \"f\", \"parameters\": {}}",
            "[1, 2]",
        ] {
            assert_eq!(calls(ToolFormat::Llama3, text), (text.to_owned(), vec![]));
        }
        for text in ["[TOOL_CALLS] ", "[TOOL", "a [TOOL_CALLS] name"] {
            let text = text.trim_end();
            let said = calls(ToolFormat::Mistral, text);
            assert_eq!(
                (said.0.replace(' ', ""), said.1),
                (text.replace(' ', ""), vec![])
            );
        }
    }

    #[test]
    fn a_call_that_was_begun_is_kept_however_it_ends() {
        let cut = calls(
            ToolFormat::Hermes,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [1,",
        );
        assert_eq!(cut, (String::new(), vec![call("f", "{\"a\": [1,")]));
        let unclosed = "<tool_call>{\"name\": \"f\", \"arguments\": {}</tool_call><tool_call>{\"name\": \"g\"}</tool_call>";
        assert_eq!(
            calls(ToolFormat::Hermes, unclosed),
            (String::new(), vec![call("f", "{}"), call("g", "{}")])
        );
    }

    #[test]
    fn arguments_written_as_a_text_are_taken_out_of_it() {
        let text = "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>";
        assert_eq!(
            calls(ToolFormat::Hermes, text),
            (String::new(), vec![call("f", "{\"a\": 1}")])
        );
    }

    #[test]
    fn llama_3_calls_are_bare_or_tagged() {
        let bare = "{\"name\": \"f\", \"parameters\": {\"a\": 1}}; {\"type\": \"function\", \"name\": \"get_weather\", \"parameters\": {}}";
        let expected = vec![call("f", "{\"a\": 1}"), call("get_weather", "{}")];
        assert_eq!(calls(ToolFormat::Llama3, bare), (String::new(), expected));
        let tagged = "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\": 1}}";
        let expected = (String::new(), vec![call("f", "{\"a\": 1}")]);
        assert_eq!(calls(ToolFormat::Llama3, tagged), expected);
    }

    #[test]
    fn mistral_calls_are_a_list_or_named() {
        let expected = vec![call("f", "{\"a\": [1]}"), call("g", "{}")];
        let list = "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": [1]}}, {\"name\": \"g\", \"arguments\": {}}]";
        assert_eq!(
            calls(ToolFormat::Mistral, list),
            (String::new(), expected.clone())
        );
        let named = "[TOOL_CALLS]f[ARGS]{\"a\": [1]}[TOOL_CALLS]g{}";
        assert_eq!(calls(ToolFormat::Mistral, named), (String::new(), expected));
    }

    #[test]
    fn thoughts_are_told_from_the_answer() {
        let think = |thinking, text: &str| {
            let (reasoning, content, _) = parse(&format(None, Some(thinking)), &[text]);
            (reasoning, content)
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let text = "<think>\nHm. <b>\n</think>\n\nYes. <think>no</think>";
        assert_eq!(
            think(Thinking::Maybe, text),
            pair("Hm. <b>", "Yes. <think>no</think>")
        );
        assert_eq!(
            think(Thinking::Open, "\nHm.\n</think>\nYes."),
            pair("Hm.", "Yes.")
        );
        assert_eq!(think(Thinking::Open, "Hm. </thi"), pair("Hm. </thi", ""));
        assert_eq!(think(Thinking::Maybe, " <thin"), pair("", " <thin"));
        assert_eq!(
            think(Thinking::Maybe, "Yes.</think>"),
            pair("", "Yes.</think>")
        );
        assert_eq!(think(Thinking::Maybe, "<think></think>"), pair("", ""));
    }

    const PARTS: [&str; 26] = [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "{",
        "}",
        "[",
        "]",
        "\"name\": ",
        "\"arguments\": ",
        "\"f\"",
        "\"g\"",
        ", ",
        ";",
        "\n",
        " ",
        "words",
        "\\",
        "\"",
        "é😀",
        "1",
        "{\"name\": \"f\", \"arguments\": {\"a\": 1}}",
        "[CALL_ID]",
    ];

    proptest! {
        #[test]
        fn a_stream_says_the_same_wherever_it_is_cut(
            parts in prop::collection::vec(0..PARTS.len(), 0..14),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
            tools in 0..4_usize,
            thinking in 0..3_usize,
        ) {
            let text: String = parts.iter().map(|&at| PARTS[at]).collect();
            let tools = [None, Some(ToolFormat::Hermes), Some(ToolFormat::Llama3), Some(ToolFormat::Mistral)][tools];
            let thinking = [None, Some(Thinking::Maybe), Some(Thinking::Open)][thinking];
            let format = format(tools, thinking);
            prop_assume!(tools.is_some() || thinking.is_some());
            let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
            let mut at: Vec<usize> = cuts.iter().map(|cut| *cut.get(&borders)).chain([0, text.len()]).collect();
            at.sort_unstable();
            let chunks: Vec<&str> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            prop_assert_eq!(parse(&format, &chunks), parse(&format, &[&text]));
        }
    }
}
