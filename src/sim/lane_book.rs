//! What was said in lanes, all of it, and what a request may and must go on from.

use std::collections::BTreeMap;

use super::vocabulary::Message;
use crate::session::LaneKey;

/// A lane, and what else its conversations have in common.
pub(super) type LaneName = (LaneKey, usize);

/// A conversation up to one of its answers.
#[derive(Debug, Clone)]
pub(super) struct Said {
    pub(super) messages: Vec<Message>,
    pub(super) tokens: Vec<u32>,
    /// Where each turn ends.
    pub(super) turns: Vec<usize>,
    /// Not only its tokens are those of the conversation that the lane has.
    pub(super) is_certain: bool,
}

/// Where the turn of a request is kept.
#[derive(Debug)]
pub(super) struct OpenLane {
    pub(super) name: LaneName,
    /// What may have been said before the answer: more than one conversation where their tokens are the same.
    pub(super) messages: Vec<Vec<Message>>,
    pub(super) is_certain: bool,
}

/// All conversations of all lanes since the server started.
#[derive(Debug)]
pub(super) struct LaneBook {
    said: BTreeMap<LaneName, Vec<Said>>,
    /// Answers that clients wait for, or have got.
    heard: BTreeMap<u64, Option<String>>,
    pub(super) kept: u64,
    pub(super) kept_responses: u64,
}

/// Whether two messages are the same to a lane.
fn is_same(a: &Message, b: &Message) -> bool {
    let answers = a.is_answer && b.is_answer;
    a == b || (answers && a.text.trim() == b.text.trim())
}

/// Whether a conversation is `messages` or the beginning of it.
fn begins(beginning: &[Message], messages: &[Message]) -> bool {
    let mut both = beginning.iter().zip(messages);
    beginning.len() <= messages.len() && both.all(|(a, b)| is_same(a, b))
}

impl LaneBook {
    pub(super) const fn new() -> Self {
        Self {
            said: BTreeMap::new(),
            heard: BTreeMap::new(),
            kept: 0,
            kept_responses: 0,
        }
    }

    fn of(&self, name: &LaneName) -> &[Said] {
        self.said.get(name).map_or(&[], Vec::as_slice)
    }

    /// What `messages` go on from with something that is no answer, the longest first.
    pub(super) fn before(&self, name: &LaneName, messages: &[Message]) -> Vec<&Said> {
        let goes_on = |said: &&Said| {
            let next = messages.get(said.messages.len());
            begins(&said.messages, messages) && next.is_some_and(|message| !message.is_answer)
        };
        let mut found: Vec<&Said> = self.of(name).iter().filter(goes_on).collect();
        found.sort_by_key(|said| std::cmp::Reverse(said.messages.len()));
        found
    }

    /// The conversations that have exactly these tokens.
    pub(super) fn with_tokens(&self, name: &LaneName, tokens: &[u32]) -> Vec<&Said> {
        let same = |said: &&Said| said.tokens == tokens;
        self.of(name).iter().filter(same).collect()
    }

    /// Whether something follows a conversation.
    pub(super) fn is_followed(&self, name: &LaneName, said: &Said) -> bool {
        let mut longer = self.of(name).iter();
        longer.any(|other| {
            other.messages.len() > said.messages.len() && begins(&said.messages, &other.messages)
        })
    }

    /// Keeps a turn. `turns`: where the turns of its conversation end, itself the last.
    pub(super) fn keep(
        &mut self,
        lane: OpenLane,
        answer: &Message,
        tokens: &[u32],
        turns: &[usize],
    ) {
        self.kept += 1;
        let said = self.said.entry(lane.name).or_default();
        for mut messages in lane.messages {
            messages.push(answer.clone());
            said.push(Said {
                messages,
                tokens: tokens.to_vec(),
                turns: turns.to_vec(),
                is_certain: lane.is_certain,
            });
        }
    }

    /// A client waits for an answer.
    pub(super) fn listen(&mut self, request: u64) {
        self.heard.insert(request, None);
    }

    /// An answer has ended well.
    pub(super) fn hear(&mut self, request: u64, text: &str) {
        if let Some(heard) = self.heard.get_mut(&request) {
            *heard = Some(text.to_owned());
        }
    }

    /// The answer that a client has got; none where its request failed, or its server died.
    pub(super) fn take_heard(&mut self, request: u64) -> Option<String> {
        self.heard.remove(&request).flatten()
    }
}
