//! Lanes against a model that keeps every conversation that was ever said.

use std::collections::BTreeMap;
use std::sync::Arc;

use lmserve::session::{LaneKey, LaneLimits, Lanes, NewTurn, Setting, ToldAnswer, written};
use lmserve::text::Tail;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn key(tenant: u32, name: &str) -> LaneKey {
    LaneKey {
        tenant,
        adapter: 0,
        name: name.into(),
    }
}

fn setting(tools: &[Value]) -> Arc<Setting> {
    Arc::new(Setting::new(Some(tools), &Map::new()))
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn answer(text: &str) -> ToldAnswer {
    ToldAnswer {
        content: text.to_owned(),
        ..ToldAnswer::default()
    }
}

/// Says `messages` in a lane, as a server does: goes on from what is known, and keeps the turn. Returns what was known of its
/// messages and the tokens of all.
fn say(
    lanes: &mut Lanes,
    key: &LaneKey,
    setting: &Arc<Setting>,
    messages: &[Value],
    told: ToldAnswer,
    fresh: &mut u32,
) -> (usize, Vec<u32>) {
    let texts: Vec<Box<str>> = messages.iter().map(written).collect();
    let known = lanes.view(key).find(setting, messages, &texts);
    let mut all = known.history().history;
    let input = (messages.len() - known.messages) as u32;
    let tokens: Vec<u32> = (*fresh..=*fresh + input).collect();
    *fresh += input + 1;
    all.extend(&tokens);
    let new = NewTurn {
        messages: texts[known.messages..].to_vec(),
        answer: told,
        tokens,
        input_tokens: input as usize,
        tail: Tail::OpenAssistant,
    };
    lanes.commit(key, Arc::clone(setting), known.turns, new);
    (known.messages, all)
}

/// Whether `message`, which a client gives back after its question, is taken for the answer `told`.
fn is_taken_as(setting: &Arc<Setting>, told: &ToldAnswer, message: Value) -> bool {
    let (mut lanes, key, mut fresh) = (Lanes::default(), key(0, "a"), 0);
    let asked = [user("go")];
    say(&mut lanes, &key, setting, &asked, told.clone(), &mut fresh);
    let result = json!({"role": "tool", "content": "5"});
    let messages = [user("go"), message, result];
    let (known, _) = say(
        &mut lanes,
        &key,
        setting,
        &messages,
        answer("ok"),
        &mut fresh,
    );
    known == 2
}

#[test]
fn a_conversation_goes_on_and_a_fork_leaves_both_branches() {
    let (mut lanes, key, tools) = (Lanes::default(), key(0, "a"), setting(&[]));
    let mut fresh = 0;
    let mut talk = |lanes: &mut Lanes, messages: &[Value], told: &str| {
        say(lanes, &key, &tools, messages, answer(told), &mut fresh)
    };
    let mut said = vec![
        json!({"role": "system", "content": "Be brief."}),
        user("one"),
    ];
    let assistant = |text: &str| json!({"role": "assistant", "content": text});
    assert_eq!(talk(&mut lanes, &said, "1").0, 0);
    said.extend([assistant(" 1\n"), user("two")]);
    let (known, second) = talk(&mut lanes, &said, "2");
    assert_eq!((known, second.len()), (3, 5));
    said.extend([assistant("2"), user("three")]);
    let (known, third) = talk(&mut lanes, &said, "3");
    assert_eq!(known, 5);
    assert!(third.starts_with(&second));

    // The second answer is another one: a branch behind the first turn.
    let mut fork = said[..4].to_vec();
    fork.extend([assistant("two?"), user("three")]);
    let (known, forked) = talk(&mut lanes, &fork, "III");
    assert_eq!(known, 3);
    assert_eq!(forked[..3], third[..3]);
    assert!(!forked.starts_with(&second));

    // Both go on from all that they have.
    for (mut branch, told, tokens) in [(said, "3", third), (fork, "III", forked)] {
        branch.extend([assistant(told), user("four")]);
        let (known, all) = talk(&mut lanes, &branch, "4");
        assert_eq!(known, branch.len() - 1);
        assert!(all.starts_with(&tokens));
    }
}

#[test]
fn thoughts_and_calls_are_compared_as_they_were_told() {
    let told = ToldAnswer {
        reasoning: "Hm.".into(),
        content: String::new(),
        calls: vec![("f".into(), "{\"a\": 1, \"b\": [2]}".into())],
    };
    let call =
        |arguments: Value| json!([{"id": "c", "function": {"name": "f", "arguments": arguments}}]);
    let same = call(json!({"b": [2], "a": 1}));
    let mut taken = Vec::new();
    for message in [
        json!({"role": "assistant", "content": "", "tool_calls": same}),
        json!({"role": "assistant", "content": null, "tool_calls": same, "reasoning_content": "Hm.\n"}),
        json!({"role": "assistant", "content": "", "tool_calls": same, "reasoning_content": "Other."}),
        json!({"role": "assistant", "content": "x", "tool_calls": same}),
        json!({"role": "assistant", "content": "", "tool_calls": call(json!({"a": 1}))}),
        json!({"role": "assistant", "content": "", "tool_calls": call("{\"a\": 1, \"b\": [2]}".into())}),
        json!({"role": "assistant", "content": ""}),
        json!({"role": "user", "content": "", "tool_calls": same}),
    ] {
        taken.push(is_taken_as(&setting(&[]), &told, message));
    }
    assert_eq!(taken, [true, true, false, false, false, true, false, false]);
}

#[test]
fn a_call_with_the_defaults_of_its_schema_is_the_same_call() {
    let schema = json!({"type": "object", "properties": {
        "path": {"type": "string"},
        "all": {"type": "boolean", "default": false},
    }});
    let tools = setting(&[json!({"function": {"name": "edit", "parameters": schema}})]);
    let told = ToldAnswer {
        calls: vec![("edit".into(), "{\"path\": \"a\"}".into())],
        ..ToldAnswer::default()
    };
    let mut taken = Vec::new();
    for arguments in [
        json!({"path": "a"}),
        json!({"all": false, "path": "a"}),
        json!({"all": true, "path": "a"}),
        json!({"all": false, "path": "b"}),
        json!({"path": "a", "other": false}),
        json!({"all": false}),
    ] {
        let calls = json!([{"id": "c", "function": {"name": "edit", "arguments": arguments}}]);
        let called = json!({"role": "assistant", "content": "", "tool_calls": calls});
        taken.push(is_taken_as(&tools, &told, called));
    }
    assert_eq!(taken, [true, true, false, false, false, false]);
}

#[test]
fn another_key_another_name_and_other_tools_are_other_conversations() {
    let (mut lanes, mut fresh) = (Lanes::default(), 0);
    let tools = setting(&[json!({"name": "f"})]);
    let messages = [
        user("one"),
        json!({"role": "assistant", "content": "1"}),
        user("two"),
    ];
    say(
        &mut lanes,
        &key(1, "a"),
        &tools,
        &messages[..1],
        answer("1"),
        &mut fresh,
    );
    for (key, tools) in [
        (key(2, "a"), &tools),
        (key(1, "b"), &tools),
        (key(1, "a"), &setting(&[])),
    ] {
        let texts: Vec<_> = messages.iter().map(written).collect();
        assert_eq!(lanes.view(&key).find(tools, &messages, &texts).messages, 0);
    }
    let known = say(
        &mut lanes,
        &key(1, "a"),
        &tools,
        &messages,
        answer("2"),
        &mut fresh,
    )
    .0;
    assert_eq!(known, 2);
    // What has nothing new behind its last answer is asked again.
    let known = say(
        &mut lanes,
        &key(1, "a"),
        &tools,
        &messages[..2],
        answer("2"),
        &mut fresh,
    )
    .0;
    assert_eq!(known, 0);
}

/// Tenant, lane, setting, and the words of the user.
type Said = (u32, usize, usize, Vec<usize>);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Conversations of few words, so that they meet and part: what is known of one was said in its lane, token for token, and
    /// the lanes stay within their limits.
    #[test]
    fn what_a_lane_knows_was_said_in_it(
        says in prop::collection::vec((0_u32..2, 0_usize..4, 0_usize..2, prop::collection::vec(0_usize..2, 1..5)), 1..60),
        most_lanes in 1_usize..4,
        branches in 1_usize..5,
        bytes in prop::sample::select(vec![2_000_usize, 100_000]),
    ) {
        let limits = LaneLimits { lanes: most_lanes, branches, bytes };
        let mut lanes = Lanes::new(limits);
        let settings = [setting(&[]), setting(&[json!({})])];
        // Tokens of every conversation that a lane was told of, by its messages without the last answer.
        let mut told: BTreeMap<Said, Vec<Vec<u32>>> = BTreeMap::new();
        let mut fresh = 0;
        for (tenant, name, which, words) in says {
            let key = key(tenant, &name.to_string());
            // The answer to the same words is the same.
            let mut messages = Vec::new();
            for (at, word) in words.iter().enumerate() {
                messages.push(user(&word.to_string()));
                if at + 1 < words.len() {
                    messages.push(json!({"role": "assistant", "content": format!("{:?}", &words[..=at])}));
                }
            }
            let last = answer(&format!("{words:?}"));
            let (known, tokens) = say(&mut lanes, &key, &settings[which], &messages, last, &mut fresh);
            prop_assert_eq!(known % 2, 0);
            let before = (tenant, name, which, words[..known / 2].to_vec());
            if known > 0 {
                let known_tokens = told.get(&before).into_iter().flatten();
                prop_assert!(known_tokens.into_iter().any(|said| tokens.starts_with(said)), "{before:?}");
            }
            told.entry((tenant, name, which, words)).or_default().push(tokens);
            prop_assert!(lanes.len() <= 2 * most_lanes);
            prop_assert!(lanes.bytes() <= bytes);
        }
        drop(lanes);
    }

    /// With room for all, the most that was said of a conversation is known.
    #[test]
    fn all_that_was_said_is_known(
        says in prop::collection::vec(prop::collection::vec(0_usize..2, 1..5), 1..30),
    ) {
        let limits = LaneLimits { branches: 1000, ..LaneLimits::default() };
        let (mut lanes, key, tools, mut fresh) = (Lanes::new(limits), key(0, "a"), setting(&[]), 0);
        let mut said: Vec<Vec<usize>> = Vec::new();
        for words in says {
            let mut messages = Vec::new();
            for (at, word) in words.iter().enumerate() {
                messages.push(user(&word.to_string()));
                if at + 1 < words.len() {
                    messages.push(json!({"role": "assistant", "content": format!("{:?}", &words[..=at])}));
                }
            }
            let last = answer(&format!("{words:?}"));
            let known = say(&mut lanes, &key, &tools, &messages, last, &mut fresh).0 / 2;
            // Turns are found one behind another, each with its answer: what was said whole, and what that went on from.
            let longest = (0..words.len()).rev().find(|&len| said.contains(&words[..len].to_vec()));
            prop_assert_eq!(known, longest.unwrap_or(0), "{:?} of {:?}", words, said);
            said.push(words);
        }
    }
}
