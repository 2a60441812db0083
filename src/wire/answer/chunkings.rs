//! Tests that a stream gives the same as a whole reply, with a thousand random ways to cut the text of each format.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use super::tests::{WRITTEN, format, parse};
use crate::text::formats::{THOUGHT_FORMATS, TOOL_FORMATS, Thinking, Thoughts};

const CHUNKINGS: usize = 1000;

/// `text` in a random number of pieces, cut at random characters.
fn chunks<'a>(runner: &mut TestRunner, text: &'a str) -> Vec<&'a str> {
    let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    let cuts = prop::collection::vec(any::<prop::sample::Index>(), 0..borders.len());
    let cuts = cuts.new_tree(runner).unwrap().current();
    let mut at: Vec<usize> = cuts.iter().map(|cut| *cut.get(&borders)).collect();
    at.extend([0, text.len()]);
    at.sort_unstable();
    at.dedup();
    at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
}

#[test]
fn every_format_of_calls_and_of_thoughts_over_a_thousand_random_chunkings_each() {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
    for tools in TOOL_FORMATS {
        let (_, calls) = WRITTEN
            .iter()
            .find(|(name, _)| *name == tools.name)
            .unwrap();
        for (at, thoughts) in THOUGHT_FORMATS.into_iter().enumerate() {
            let (open, close) = (thoughts.open, thoughts.close);
            let end = thoughts.around.first().copied().unwrap_or_default();
            let text = format!("{open}Hm, {open} é </ and [/\n{close}{end}{calls}{end} Done.");
            let begin = [Thinking::Maybe, Thinking::Open][at % 2];
            let format = format(
                Some(tools),
                Some(Thoughts {
                    format: thoughts,
                    begin,
                }),
            );
            let whole = parse(&format, &[&text]);
            for _ in 0..CHUNKINGS.div_ceil(THOUGHT_FORMATS.len()) {
                let chunks = chunks(&mut runner, &text);
                assert_eq!(
                    parse(&format, &chunks),
                    whole,
                    "{} {}: {chunks:?}",
                    tools.name,
                    thoughts.name
                );
            }
        }
    }
}
