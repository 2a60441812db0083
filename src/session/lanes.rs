//! Conversations of clients that send the whole history with each request, kept with their tokens.
//!
//! A client names a lane. A lane has the turns of a conversation: the new messages of each turn, the answer as the client got it, and
//! the tokens of both. If the messages of a request begin with some of these turns, the request continues from their tokens. If they
//! then differ, the request becomes a branch that shares the earlier turns. Nothing waits for a lane, and no request fails without one.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Map, Value};

use super::state::{Turn, TurnHistory};
use crate::text::Tail;

/// Approximate bytes that a turn takes besides its texts and tokens.
const TURN_BYTES: usize = 256;

/// How many lanes are kept.
#[derive(Debug, Clone, Copy)]
pub struct LaneLimits {
    /// Maximum number of lanes of a tenant. The least recently used one is dropped first.
    pub lanes: usize,
    /// Maximum number of branches of a lane. The least recently used one is dropped first.
    pub branches: usize,
    /// Maximum number of bytes of all lanes. The least recently used lane is dropped first.
    pub bytes: usize,
}

impl Default for LaneLimits {
    fn default() -> Self {
        Self {
            lanes: 1024,
            branches: 32,
            bytes: 256 << 20,
        }
    }
}

/// A lane's name within its tenant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneKey {
    /// The API key's number; 0 is no key.
    pub tenant: u32,
    /// The number of the adapter that computes it; 0: none.
    pub adapter: u32,
    /// The client's name for it.
    pub name: Arc<str>,
}

/// An answer as the client got it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ToldAnswer {
    /// Thoughts.
    pub reasoning: String,
    /// Text.
    pub content: String,
    /// Names and arguments of the calls, the latter as JSON.
    pub calls: Vec<(String, String)>,
}

impl ToldAnswer {
    /// Whether `message` of a request is this answer. White space at the ends of texts is not compared, and thoughts only where
    /// the client sends some. Some clients add the defaults of a tool's schema to its calls.
    fn is(&self, message: &Value, setting: &Setting) -> bool {
        let text = |name: &str| message[name].as_str().unwrap_or_default().trim();
        if message["role"] != "assistant" || text("content") != self.content.trim() {
            return false;
        }
        let thoughts = text("reasoning_content");
        if !thoughts.is_empty() && thoughts != self.reasoning.trim() {
            return false;
        }
        let calls = message["tool_calls"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        let same = |(call, (name, arguments)): (&Value, &(String, String))| {
            let defaults = setting.defaults.get(name);
            call["function"]["name"] == **name
                && same_arguments(&call["function"]["arguments"], arguments, defaults)
        };
        calls.len() == self.calls.len() && calls.iter().zip(&self.calls).all(same)
    }

    fn bytes(&self) -> usize {
        let calls = self
            .calls
            .iter()
            .map(|(name, json)| name.len() + json.len());
        self.reasoning.len() + self.content.len() + calls.sum::<usize>()
    }
}

fn same_arguments(given: &Value, told: &str, defaults: Option<&Map<String, Value>>) -> bool {
    if let Value::String(text) = given {
        return text == told;
    }
    let Ok(told) = serde_json::from_str::<Value>(told) else {
        return false;
    };
    if told == *given {
        return true;
    }
    let (Some(given), Some(told), Some(defaults)) = (given.as_object(), told.as_object(), defaults)
    else {
        return false;
    };
    told.iter()
        .all(|(name, value)| given.get(name) == Some(value))
        && given
            .iter()
            .all(|(name, value)| told.contains_key(name) || defaults.get(name) == Some(value))
}

/// What the template of a conversation gets besides the messages. With a different setting, it is a different conversation.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    text: String,
    /// The arguments of each function for which its schema has a default.
    defaults: HashMap<String, Map<String, Value>>,
}

impl Setting {
    /// Digest of the tools and the variables of a request.
    pub fn new(tools: Option<&[Value]>, variables: &Map<String, Value>) -> Self {
        let functions = tools
            .into_iter()
            .flatten()
            .map(|tool| &tool["function"])
            .filter_map(|function| {
                let defaults = defaults(&function["parameters"]["properties"])?;
                Some((function["name"].as_str()?.to_owned(), defaults))
            });
        Self {
            defaults: functions.collect(),
            text: serde_json::json!([tools, variables]).to_string(),
        }
    }
}

fn defaults(properties: &Value) -> Option<Map<String, Value>> {
    let with_default = properties
        .as_object()?
        .iter()
        .filter_map(|(name, schema)| Some((name.clone(), schema.get("default")?.clone())));
    let defaults: Map<String, Value> = with_default.collect();
    (!defaults.is_empty()).then_some(defaults)
}

/// One turn of a lane. It is never changed, and branches share it.
#[derive(Debug)]
pub struct LaneTurn {
    messages: Box<[Box<str>]>,
    answer: ToldAnswer,
    tokens: Box<[u32]>,
    input_tokens: usize,
    tail: Tail,
    bytes: usize,
    counter: Arc<AtomicUsize>,
}

impl Drop for LaneTurn {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A finished turn.
#[derive(Debug)]
pub struct NewTurn {
    /// Its new messages, in the form of [`written`].
    pub messages: Vec<Box<str>>,
    /// The answer.
    pub answer: ToldAnswer,
    /// Token ids of its input and of its output.
    pub tokens: Vec<u32>,
    /// How many of them are input.
    pub input_tokens: usize,
    /// Whether it left the assistant's message open.
    pub tail: Tail,
}

/// A message in the form in which messages are compared.
pub fn written(message: &Value) -> Box<str> {
    message.to_string().into()
}

#[derive(Debug, Clone)]
struct Branch {
    setting: Arc<Setting>,
    turns: Vec<Arc<LaneTurn>>,
    used: u64,
}

/// The part of a lane from which a request continues.
#[derive(Debug, Default)]
pub struct Known {
    /// The turns, the oldest first.
    pub turns: Vec<Arc<LaneTurn>>,
    /// Number of the request's messages that these turns cover.
    pub messages: usize,
}

impl Known {
    /// The history for a turn that continues from here.
    pub fn history(&self) -> TurnHistory {
        let mut history = TurnHistory::empty();
        for turn in &self.turns {
            history.turns.push(Turn {
                start: history.history.len(),
                input_tokens: turn.input_tokens,
                output_tokens: turn.tokens.len() - turn.input_tokens,
                tail: turn.tail,
                logprobs: None,
                key: None,
            });
            history.history.extend_from_slice(&turn.tokens);
            history.tail = turn.tail;
        }
        history
    }
}

impl Branch {
    /// The first turns of a conversation that this branch has, each with its answer, followed by at least one message.
    fn common(&self, messages: &[Value], written: &[Box<str>]) -> (usize, usize) {
        let (mut turns, mut at) = (0, 0);
        for turn in &self.turns {
            let answer = at + turn.messages.len();
            let follows = messages.get(answer + 1);
            let same = written.get(at..answer) == Some(&turn.messages)
                && messages
                    .get(answer)
                    .is_some_and(|message| turn.answer.is(message, &self.setting));
            if !same || follows.is_none_or(|message| message["role"] == "assistant") {
                break;
            }
            (turns, at) = (turns + 1, answer + 1);
        }
        (turns, at)
    }

    /// The first turns that have exactly these tokens.
    fn with_tokens(&self, tokens: &[u32]) -> Option<&[Arc<LaneTurn>]> {
        let mut rest = tokens;
        for (at, turn) in self.turns.iter().enumerate() {
            rest = rest.strip_prefix(&*turn.tokens)?;
            if rest.is_empty() {
                return Some(&self.turns[..=at]);
            }
        }
        None
    }

    fn begins(&self, turns: &[Arc<LaneTurn>]) -> bool {
        self.turns.len() <= turns.len()
            && self.turns.iter().zip(turns).all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

/// The branches of a lane at one moment, so that they can be searched without its lock.
#[derive(Debug, Default)]
pub struct LaneView(Vec<Branch>);

impl LaneView {
    /// The longest part of a conversation that a branch has. `written`: the messages in the form of [`written`].
    pub fn find(&self, setting: &Setting, messages: &[Value], written: &[Box<str>]) -> Known {
        let branches = self.0.iter().filter(|branch| *branch.setting == *setting);
        let found = branches.map(|branch| (branch.common(messages, written), branch));
        let most = found.max_by_key(|((turns, at), _)| (*at, *turns));
        most.map_or_else(Known::default, |((turns, messages), branch)| Known {
            turns: branch.turns[..turns].to_vec(),
            messages,
        })
    }

    /// The turns of a branch that have exactly these tokens. None if no branch has them.
    pub fn find_tokens(&self, setting: &Setting, tokens: &[u32]) -> Option<Vec<Arc<LaneTurn>>> {
        let branches = self.0.iter().filter(|branch| *branch.setting == *setting);
        let found = branches.filter_map(|branch| Some((branch.used, branch.with_tokens(tokens)?)));
        let last = found.max_by_key(|&(used, _)| used);
        last.map(|(_, turns)| turns.to_vec())
    }
}

#[derive(Debug, Default)]
struct Lane {
    branches: Vec<Branch>,
    used: u64,
}

/// All lanes of one server.
#[derive(Debug, Default)]
pub struct Lanes {
    by_key: HashMap<LaneKey, Lane>,
    /// The order of all lanes, the least recently used first, and that of each tenant's lanes.
    by_use: BTreeSet<(u64, LaneKey)>,
    by_tenant: BTreeSet<(u32, u64, LaneKey)>,
    counts: HashMap<u32, usize>,
    uses: u64,
    bytes: Arc<AtomicUsize>,
    limits: LaneLimits,
}

impl Lanes {
    /// No lanes.
    pub fn new(limits: LaneLimits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    /// Number of lanes.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Number of lanes of a tenant.
    pub fn count_of(&self, tenant: u32) -> usize {
        self.counts.get(&tenant).copied().unwrap_or(0)
    }

    /// Approximate bytes of all turns.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The branches that a lane has now.
    pub fn view(&self, key: &LaneKey) -> LaneView {
        self.by_key
            .get(key)
            .map_or_else(LaneView::default, |lane| LaneView(lane.branches.clone()))
    }

    /// Adds a turn after `turns`: to the branch that ends with them, or to a new one.
    pub fn commit(
        &mut self,
        key: &LaneKey,
        setting: Arc<Setting>,
        mut turns: Vec<Arc<LaneTurn>>,
        new: NewTurn,
    ) {
        let texts = new.messages.iter().map(|message| message.len());
        let bytes = TURN_BYTES + texts.sum::<usize>() + new.answer.bytes() + 4 * new.tokens.len();
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        turns.push(Arc::new(LaneTurn {
            messages: new.messages.into(),
            answer: new.answer,
            tokens: new.tokens.into(),
            input_tokens: new.input_tokens,
            tail: new.tail,
            bytes,
            counter: Arc::clone(&self.bytes),
        }));
        self.touch(key);
        let (used, most) = (self.uses, self.limits.branches);
        if let Some(lane) = self.by_key.get_mut(key) {
            // A branch that is a prefix of the new one is contained in it.
            lane.branches
                .retain(|branch| branch.setting != setting || !branch.begins(&turns));
            while lane.branches.len() >= most.max(1) {
                let oldest = lane.branches.iter().enumerate();
                let oldest = oldest
                    .min_by_key(|(_, branch)| branch.used)
                    .map(|(at, _)| at);
                lane.branches.swap_remove(oldest.unwrap_or(0));
            }
            lane.branches.push(Branch {
                setting,
                turns,
                used,
            });
        }
        self.make_room(key.tenant);
    }

    /// Makes the lane the most recently used one, and creates it if it does not exist.
    fn touch(&mut self, key: &LaneKey) {
        self.uses += 1;
        let used = self.uses;
        if let Some(lane) = self.by_key.get_mut(key) {
            let before = std::mem::replace(&mut lane.used, used);
            self.unlist(key, before);
        } else {
            *self.counts.entry(key.tenant).or_default() += 1;
            let lane = Lane {
                used,
                ..Lane::default()
            };
            self.by_key.insert(key.clone(), lane);
        }
        self.by_use.insert((self.uses, key.clone()));
        self.by_tenant.insert((key.tenant, self.uses, key.clone()));
    }

    fn make_room(&mut self, tenant: u32) {
        while self
            .counts
            .get(&tenant)
            .is_some_and(|&count| count > self.limits.lanes)
        {
            let first = LaneKey {
                tenant,
                adapter: 0,
                name: "".into(),
            };
            let oldest = self.by_tenant.range((tenant, 0, first)..).next();
            let Some((_, _, key)) = oldest.cloned() else {
                break;
            };
            self.drop_lane(&key);
        }
        while self.bytes() > self.limits.bytes {
            let Some((_, key)) = self.by_use.first().cloned() else {
                break;
            };
            self.drop_lane(&key);
        }
    }

    fn unlist(&mut self, key: &LaneKey, used: u64) {
        self.by_use.remove(&(used, key.clone()));
        self.by_tenant.remove(&(key.tenant, used, key.clone()));
    }

    fn drop_lane(&mut self, key: &LaneKey) {
        let Some(lane) = self.by_key.remove(key) else {
            return;
        };
        self.unlist(key, lane.used);
        if let Some(count) = self.counts.get_mut(&key.tenant) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&key.tenant);
            }
        }
    }
}
