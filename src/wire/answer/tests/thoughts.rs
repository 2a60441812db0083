//! Tests thoughts before an answer, in each format.

use super::*;

#[test]
fn thoughts_are_told_from_the_answer() {
    let think = |begin, text: &str| {
        let (reasoning, content, _) = parse(&format(None, Some(Thoughts::think(begin))), &[text]);
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

#[test]
fn thoughts_are_read_in_each_format() {
    for (name, text) in [
        ("think", "<think>\nHm.\n</think>\n\nYes."),
        ("mistral", "[THINK]Hm.[/THINK]Yes."),
        ("gemma4", "<|channel>thought\nHm.<channel|>Yes."),
        ("seed", "<seed:think>Hm.</seed:think>Yes."),
        (
            "command",
            "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>",
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        ),
    ] {
        let thinking = THOUGHT_FORMATS
            .into_iter()
            .find(|format| format.name == name)
            .map(|format| Thoughts {
                format,
                begin: Thinking::Maybe,
            });
        assert!(thinking.is_some());
        let format = format(None, thinking);
        assert_eq!(
            parse(&format, &[text]),
            ("Hm.".to_owned(), "Yes.".to_owned(), vec![]),
            "{name}"
        );
    }
}
