//! Streams whose reader falls behind: what is unread stays within its limits, whole frames come all the same, and a reader that
//! reads nothing at all is told so at the end.

use std::sync::Arc;

use lmserve::request::Submission;
use lmserve::sched::FinishReason;
use lmserve::wire::{
    Alternative, Delta, Mailbox, Poll, ReadLimits, Reply, TokenLogprob, Usage, Wake,
};
use serde_json::{Value, json};

const LIMITS: ReadLimits = ReadLimits {
    merge_above: 1000,
    most: 20_000,
};
const ROUTES: [&str; 6] = [
    "generate",
    "chat",
    "completions",
    "responses",
    "messages",
    "interactive",
];
/// What a frame may take beside its text.
const FRAME: usize = 1000;

struct Stream {
    mailbox: Arc<Mailbox>,
    reply: Reply,
    tokens: usize,
    logprobs: bool,
}

fn stream(route: &str, n: usize, logprobs: bool) -> Stream {
    let mut submission =
        json!({"route": route, "stream": true, "n": n, "input": {"type": "text", "text": "x"}});
    if logprobs {
        submission["sampling"] = json!({"logprobs": 3});
    }
    let submission = Submission::parse(submission.to_string().as_bytes()).unwrap();
    let mailbox = Mailbox::with_limits(1, Arc::new(Wake::new().unwrap()), LIMITS);
    let mut reply = Reply::new(&submission, Arc::clone(&mailbox)).unwrap();
    reply.accept(1, 0);
    Stream {
        mailbox,
        reply,
        tokens: 0,
        logprobs,
    }
}

impl Stream {
    fn delta(&self, text: &str) -> Delta {
        let top = |token: u32| Alternative {
            token,
            bytes: b"other".to_vec(),
            logprob: -2.0,
        };
        let bytes = text.as_bytes().to_vec();
        let logprob = TokenLogprob::new(7, bytes, Some(-0.5), (0..3).map(top).collect());
        Delta {
            text: text.to_owned(),
            tokens: self.tokens,
            logprobs: self.logprobs.then_some(logprob).into_iter().collect(),
            ..Delta::default()
        }
    }

    fn push(&mut self, choice: usize, text: &str) -> bool {
        self.tokens += 1;
        let delta = self.delta(text);
        self.reply.push(choice, delta)
    }

    fn finish(&mut self, choice: usize) {
        let delta = self.delta("!");
        self.reply
            .finish(choice, delta, FinishReason::Length, Usage::default());
    }

    fn read(&self) -> String {
        match self.mailbox.poll() {
            Poll::Accepted(bytes) | Poll::Ended(bytes) => String::from_utf8(bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

/// The objects of a stream, whatever frames them.
fn frames(wire: &str) -> Vec<Value> {
    let pieces = wire.split(['\0', '\n']);
    let bare = pieces.map(|piece| piece.trim_start_matches("data: "));
    bare.filter(|piece| piece.starts_with('{'))
        .map(|piece| serde_json::from_str(piece).unwrap())
        .collect()
}

fn text_of(frame: &Value) -> &str {
    let texts = [
        "/text",
        "/choices/0/text",
        "/choices/0/delta/content",
        "/delta",
        "/delta/text",
    ];
    // The closing events of a response say all of its text again.
    if frame["type"] == "response.output_text.done" {
        return "";
    }
    texts
        .iter()
        .find_map(|at| frame.pointer(at)?.as_str())
        .unwrap_or_default()
}

#[test]
fn what_a_reader_missed_comes_in_one_frame() {
    for route in ROUTES {
        let mut stream = stream(route, 1, false);
        let mut expected = String::new();
        let mut say = |stream: &mut Stream, words: usize| {
            for word in 0..words {
                let text = format!("{word} ");
                expected += &text;
                assert!(stream.push(0, &text));
            }
        };
        say(&mut stream, 1000);
        let first = stream.read();
        let bounds = LIMITS.merge_above..LIMITS.merge_above + FRAME;
        assert!(bounds.contains(&first.len()), "{route}: {}", first.len());
        // The next token brings all that waited.
        say(&mut stream, 1);
        let waited = stream.read();
        assert_eq!(frames(&waited).len(), 1, "{route}: {waited}");
        assert!(text_of(&frames(&waited)[0]).len() > 2000, "{route}");
        say(&mut stream, 500);
        stream.finish(0);
        let whole = first + &waited + &stream.read();
        let told: String = frames(&whole).iter().map(text_of).collect();
        assert_eq!(told, expected.clone() + "!", "{route}");
    }
}

#[test]
fn each_choice_and_each_log_probability_waits_for_itself() {
    for route in ["chat", "completions"] {
        let mut stream = stream(route, 2, true);
        for at in 0..20 {
            assert!(stream.push(0, &format!("a{at} ")));
            assert!(stream.push(1, &format!("b{at} ")));
        }
        let mut wire = stream.read();
        stream.push(1, "b! ");
        wire += &stream.read();
        stream.finish(0);
        stream.finish(1);
        wire += &stream.read();
        for choice in [0, 1] {
            let all = frames(&wire);
            let own: Vec<_> = all
                .iter()
                .filter(|frame| frame["choices"][0]["index"] == choice)
                .collect();
            let text: String = own.iter().map(|frame| text_of(frame)).collect();
            let name = if choice == 0 { "a" } else { "b" };
            let count = text.matches(name).count();
            assert_eq!(count, 20 + usize::from(choice == 1), "{route}: {text}");
            let logprobs: usize = own
                .iter()
                .filter_map(|frame| {
                    let logprobs = &frame["choices"][0]["logprobs"];
                    Some(
                        logprobs["content"]
                            .as_array()
                            .or(logprobs["tokens"].as_array())?
                            .len(),
                    )
                })
                .sum();
            // One for each token, the last one's included.
            assert_eq!(logprobs, count + 1, "{route}");
        }
    }
}

#[test]
fn a_reader_that_reads_nothing_is_told_so_and_holds_nothing() {
    for route in ROUTES {
        for logprobs in [false, true] {
            let mut stream = stream(route, 1, logprobs);
            let mut tokens = 0;
            while stream.push(0, "some words of the answer ") {
                tokens += 1;
                assert!(tokens < 10_000, "{route}");
                assert!(stream.mailbox.unread() <= LIMITS.merge_above + FRAME);
            }
            // With log-probabilities a token takes more.
            assert!(tokens * 25 < LIMITS.most, "{route}: {tokens}");
            let unread = stream.mailbox.unread();
            assert!(unread < LIMITS.most + 2 * FRAME, "{route}: {unread}");
            // The end that the abort brings comes too late for it.
            stream.finish(0);
            let wire = stream.read();
            let all = frames(&wire);
            assert_eq!(all.len(), 1, "{route}: {wire}");
            let error = match route {
                "responses" => &all[0]["response"]["error"],
                _ => &all[0]["error"],
            };
            let message = error["message"].as_str().unwrap();
            assert!(message.contains("20000 bytes behind"), "{route}: {message}");
            if route != "responses" {
                assert_eq!(error["code"], "reader_too_slow");
            }
        }
    }
}

#[test]
fn a_whole_reply_has_no_reader_to_wait_for() {
    let submission = json!({"route": "generate", "input": {"type": "text", "text": "x"}});
    let submission = Submission::parse(submission.to_string().as_bytes()).unwrap();
    let mailbox = Mailbox::with_limits(1, Arc::new(Wake::new().unwrap()), LIMITS);
    let mut reply = Reply::new(&submission, Arc::clone(&mailbox)).unwrap();
    reply.accept(1, 0);
    let text = "x".repeat(2 * LIMITS.most);
    let delta = Delta {
        text: text.clone(),
        tokens: 1,
        ..Delta::default()
    };
    assert!(reply.push(0, delta));
    assert!(reply.finish(0, Delta::default(), FinishReason::Stop, Usage::default()));
    let Poll::Ended(bytes) = mailbox.poll() else {
        panic!("it has ended");
    };
    let whole: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(whole["text"], text);
}
