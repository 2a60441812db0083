//! Tests texts that are composed of parts of all formats and cut anywhere.

use proptest::prelude::*;

use super::*;

/// Markers of all formats, and their beginnings and ends.
fn parts() -> Vec<String> {
    let mut parts: Vec<String> = [
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "\"",
        "'",
        "\\",
        "=",
        ":",
        ",",
        ";",
        "\n",
        " ",
        "é😀",
        "1",
        "true",
        "words",
        "f",
        "city",
        "\"name\": ",
        "\"arguments\": ",
        "\"f\"",
        "{\"name\": \"f\", \"arguments\": {\"a\": 1}}",
        "f(city='a')",
        ">>>",
        "all\n",
    ]
    .map(str::to_owned)
    .to_vec();
    for format in TOOL_FORMATS {
        let texts = [
            format.open,
            format.close,
            format.call_open,
            format.call_close,
        ]
        .map(str::to_owned);
        parts.extend(texts.into_iter().filter(|text| !text.is_empty()));
        parts.extend(format.tokens.iter().map(|&token| token.to_owned()));
    }
    for (_, text) in WRITTEN {
        let middle = text
            .char_indices()
            .nth(text.chars().count() / 2)
            .map_or(0, |(at, _)| at);
        parts.extend([text[..middle].to_owned(), text[middle..].to_owned()]);
    }
    for format in THOUGHT_FORMATS {
        parts.extend([format.open.to_owned(), format.close.to_owned()]);
    }
    parts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_stream_says_the_same_wherever_it_is_cut(
        chosen in prop::collection::vec(any::<prop::sample::Index>(), 0..14),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        tools in 0..=TOOL_FORMATS.len(),
        thinking in 0..=2 * THOUGHT_FORMATS.len(),
    ) {
        let parts = parts();
        let text: String = chosen.iter().map(|at| at.get(&parts).as_str()).collect();
        let tools = TOOL_FORMATS.get(tools).copied();
        let thinking = THOUGHT_FORMATS.get(thinking / 2).map(|&format| Thoughts {
            format,
            begin: [Thinking::Maybe, Thinking::Open][thinking % 2],
        });
        prop_assume!(tools.is_some() || thinking.is_some());
        let format = format(tools, thinking);
        let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let mut at: Vec<usize> = cuts.iter().map(|cut| *cut.get(&borders)).chain([0, text.len()]).collect();
        at.sort_unstable();
        let chunks: Vec<&str> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        prop_assert_eq!(parse(&format, &chunks), parse(&format, &[&text]));
    }
}
