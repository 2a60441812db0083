//! Clients that have their conversations themselves and send all of it with each request, as agents do, or what is new on a
//! WebSocket. They name lanes, several the same one; they take back what they said, change what they heard, and leave.

use std::sync::{Arc, PoisonError};

use serde_json::{Value, json};

use super::agents::{Asked, NAMES, Running};
use super::check::{Check, ensure};
use super::config::TENANTS;
use super::lane_book::{OpenLane, Said};
use super::open::Open;
use super::vocabulary::{Message, rendered};
use super::world::World;
use crate::engine::Prepared;
use crate::request::{SessionId, Submission};
use crate::session::{SessionKey, Turn};

/// A lane's history may leave less than this part of the context only to whoever asks for no more.
const LEAST_ROOM: usize = 4;

fn in_json(messages: &[Message]) -> Value {
    let role = |message: &Message| {
        if message.is_answer {
            "assistant"
        } else {
            "user"
        }
    };
    let messages = messages.iter();
    messages
        .map(|message| json!({"role": role(message), "content": message.text}))
        .collect()
}

impl World {
    /// An agent hears an answer and asks again.
    pub(super) fn run_agent(&mut self) -> Check {
        let at = self.random.range(0, self.agents.len() - 1);
        if let Some(running) = self.agents[at].running.take() {
            if self.ledger.open.contains_key(&running.request) {
                self.agents[at].running = Some(running);
                return Ok(());
            }
            self.hear(at, running)?;
        }
        self.change_mind(at);
        let before = self.agents[at].said.len();
        for _ in 0..=usize::from(self.random.once_in(4)) {
            // Few words, so that conversations meet and part.
            let letters = ["", "a", "b", "aé"];
            let text = letters[self.random.range(0, letters.len() - 1)].to_owned();
            let is_answer = false;
            self.agents[at].said.push(Message { is_answer, text });
        }
        self.ask(at, before)
    }

    fn hear(&mut self, at: usize, running: Running) -> Check {
        let answer = self.ledger.book.take_heard(running.request);
        let trims = self.random.once_in(4);
        let agent = &mut self.agents[at];
        let Some(text) = answer else {
            agent.said.truncate(running.before);
            return Ok(());
        };
        // Many clients lose the white space at the ends of texts.
        let text = if trims { text.trim().to_owned() } else { text };
        let is_answer = true;
        agent.said.push(Message { is_answer, text });
        match std::mem::replace(&mut agent.tip, running.session) {
            Some(before) if self.random.once_in(2) => self.end_session(&before),
            _ => Ok(()),
        }
    }

    /// The agent may begin anew, take back what it said, or change what it heard.
    fn change_mind(&mut self, at: usize) {
        let agent = &mut self.agents[at];
        match self.random.range(0, 11) {
            0 => agent.said.clear(),
            1 | 2 => {
                let answers = agent.said.iter().enumerate();
                let answers = answers.filter(|(_, message)| message.is_answer);
                let ends: Vec<usize> = answers.map(|(at, _)| at + 1).collect();
                let end = self.random.pick(&ends).copied();
                agent.said.truncate(end.unwrap_or(0));
            }
            3 => {
                if let Some(last) = agent.said.last_mut() {
                    last.text.push('b');
                }
            }
            _ => return,
        }
        agent.tip = None;
    }

    fn ask(&mut self, at: usize, before: usize) -> Check {
        let agent = &self.agents[at];
        let on_socket = if agent.tip.is_some() {
            !self.random.once_in(4)
        } else {
            self.random.once_in(6)
        };
        let name = agent.name.clone();
        let tip = agent.tip.clone().filter(|_| on_socket);
        let left_out = if tip.is_some() { before } else { 0 };
        let messages = agent.said.clone();
        let session = on_socket.then(|| {
            let id = SessionId::Number(-2 - self.next_request as i64);
            SessionKey::new(name.0.tenant, id)
        });
        let mut body = self.draw_submission();
        body["n"] = json!(1);
        body["tenant"] = json!(name.0.tenant);
        body["lane"] = json!(&*name.0.name);
        body["input"] = json!({
            "type": "messages",
            "messages": in_json(&messages[left_out..]),
            "template_kwargs": {"setting": name.1},
        });
        if body["stopping"]["max_tokens"] == json!(0) {
            body["stopping"]["max_tokens"] = Value::Null;
        }
        let went_on = tip.is_some();
        body["session"] = session.as_ref().map_or(
            Value::Null,
            |key| json!({"id": key.id, "start": !went_on, "parent": tip.map(|tip| tip.id)}),
        );
        let asked = Asked {
            name,
            messages,
            left_out,
        };
        match self.submit_messages(&body, Some(asked))? {
            Ok(request) => {
                self.ledger.book.listen(request);
                self.agents[at].running = Some(Running {
                    request,
                    session,
                    before,
                });
            }
            // The session is gone, or has lost a turn: the agent sends all of it next time.
            Err(404 | 409) if went_on => {
                self.agents[at].said.truncate(before);
                self.agents[at].tip = None;
            }
            // It is full.
            Err(400) => {
                self.agents[at].said.clear();
                self.agents[at].tip = None;
            }
            Err(status) => return Err(format!("an agent is refused with {status}")),
        }
        Ok(())
    }

    /// Whether a tenant's lanes keep all that was said in them.
    fn keeps_all(&self, tenant: u32) -> bool {
        let limits = self.config.lanes;
        let unbounded = limits.branches == usize::MAX && limits.bytes == usize::MAX;
        unbounded && NAMES[tenant as usize] <= limits.lanes
    }

    /// Holds the prompt of a request with messages to what was said in its lane; the code of the refusal where it does not fit.
    pub(super) fn fit_messages(
        &mut self,
        asked: Asked,
        submission: &Submission,
        prepared: Option<&Prepared>,
        open: &mut Open,
    ) -> Result<Result<(), &'static str>, String> {
        let tokenizer = Arc::clone(&self.tokenizer);
        let encode = |text: &str| {
            let tokens = tokenizer.encode(text, false);
            tokens.map_err(|error| error.message)
        };
        let new = rendered(&asked.messages[asked.left_out..]);
        if asked.left_out > 0 {
            // Behind the answer that is still open.
            open.prompt.extend(encode(&format!("o{new}p"))?);
            self.find_branch(asked, prepared, open)?;
        } else {
            let history = self.find_history(&asked, submission, prepared, encode)?;
            if let Some(history) = history {
                let new = rendered(&asked.messages[history.messages.len()..]);
                open.prompt = [history.tokens, encode(&format!("o{new}p"))?].concat();
                open.turns = history.turns;
                open.history_tokens = open.turns.last().copied().unwrap_or(0);
            } else {
                open.prompt = encode(&format!("{new}p"))?;
            }
            open.lane = Some(OpenLane {
                name: asked.name,
                messages: vec![asked.messages],
                is_certain: true,
            });
        }
        Ok(self
            .most_tokens(submission, open.prompt.len())
            .map(|most| open.max_tokens = most))
    }

    /// What a request with its whole conversation goes on from. Its lane may have dropped some; if not, it is the longest that
    /// leaves room.
    fn find_history(
        &mut self,
        asked: &Asked,
        submission: &Submission,
        prepared: Option<&Prepared>,
        encode: impl Fn(&str) -> Result<Vec<u32>, String>,
    ) -> Result<Option<Said>, String> {
        let known = self.ledger.book.before(&asked.name, &asked.messages);
        let context = self.limits.context_length;
        let mut usable = Vec::new();
        for &said in &known {
            let new = encode(&format!(
                "o{}p",
                rendered(&asked.messages[said.messages.len()..])
            ))?;
            let prompt = said.tokens.len() + new.len();
            let has_room = self.most_tokens(submission, prompt).is_ok_and(|_| {
                let room = context - prompt;
                let asked = submission.stopping.max_tokens;
                room >= context / LEAST_ROOM || asked.is_some_and(|asked| asked as usize <= room)
            });
            usable.push(has_room);
        }
        let Some(prepared) = prepared else {
            // What goes wrong with it is wrong with its messages alone.
            let longest = known.first().map(|said| said.messages.len());
            let must = known.iter().zip(&usable).find(|(said, usable)| {
                said.is_certain && **usable && Some(said.messages.len()) == longest
            });
            return match must {
                Some((said, _)) if self.keeps_all(asked.name.0.tenant) => {
                    Err(format!("{asked:?} is refused, but {said:?} was said"))
                }
                _ => Ok(None),
            };
        };
        let ends: Vec<usize> = prepared.turns.iter().map(Turn::end).collect();
        let history = &prepared.prompt[..prepared.history_tokens];
        let mut both = known.iter().zip(&usable);
        let taken = both.find(|(said, _)| said.tokens == history && said.turns == ends);
        let longest = known.iter().find(|said| said.is_certain);
        let longest = longest.map_or(0, |said| said.messages.len());
        let Some((said, &has_room)) = taken else {
            ensure(history.is_empty(), || {
                format!("{asked:?} goes on from {history:?}, which its lane was never told")
            })?;
            // Of those that the lane has for certain, one of the longest has no room, or one that is longer.
            let short = known.iter().zip(&usable);
            let mut short = short.filter(|(said, _)| said.messages.len() >= longest);
            let all_there = longest == 0 || short.any(|(_, usable)| !usable);
            self.counters.lane_misses += u64::from(!all_there);
            return ensure(all_there || !self.keeps_all(asked.name.0.tenant), || {
                format!("{asked:?} goes on from nothing, but {known:?} was said")
            })
            .map(|()| None);
        };
        ensure(has_room, || {
            format!("{said:?} leaves no room for {asked:?}")
        })?;
        let all_there = said.messages.len() >= longest;
        ensure(all_there || !self.keeps_all(asked.name.0.tenant), || {
            format!("{asked:?} goes on from {said:?}, but {known:?} was said")
        })?;
        self.counters.lane_hits += 1;
        self.counters.lane_misses += u64::from(!all_there);
        self.counters.lane_forks += u64::from(self.ledger.book.is_followed(&asked.name, said));
        Ok(Some((*said).clone()))
    }

    /// Where the turn of a request is kept that goes on from a session.
    fn find_branch(&self, asked: Asked, prepared: Option<&Prepared>, open: &mut Open) -> Check {
        let Some(prepared) = prepared else {
            return Ok(());
        };
        let history = &prepared.prompt[..prepared.history_tokens];
        let found = self.ledger.book.with_tokens(&asked.name, history);
        let (own, new) = asked.messages.split_at(asked.left_out);
        let certain = found.iter().any(|said| said.is_certain);
        let kept = prepared.lane.is_some();
        ensure(!kept || !found.is_empty(), || {
            format!("{asked:?} is kept in a lane that was never told {history:?}")
        })?;
        ensure(
            kept || !certain || !self.keeps_all(asked.name.0.tenant),
            || format!("{asked:?} is not kept, but {found:?} was said"),
        )?;
        if kept {
            let trimmed = |messages: &[Message]| -> Vec<String> {
                let texts = messages
                    .iter()
                    .map(|message| message.text.trim().to_owned());
                texts.collect()
            };
            open.lane = Some(OpenLane {
                is_certain: found
                    .iter()
                    .all(|said| said.is_certain && trimmed(&said.messages) == trimmed(own)),
                messages: found
                    .iter()
                    .map(|said| [&said.messages[..], new].concat())
                    .collect(),
                name: asked.name,
            });
        }
        Ok(())
    }

    /// No tenant has more lanes than it may, and all together take no more bytes.
    pub(super) fn check_lanes(&self) -> Check {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let limits = self.config.lanes;
        let counts = (0..TENANTS as u32).map(|tenant| lanes.count_of(tenant));
        ensure(counts.clone().all(|count| count <= limits.lanes), || {
            format!(
                "{:?} lanes, not {}",
                counts.collect::<Vec<_>>(),
                limits.lanes
            )
        })?;
        // What runs may hold turns of lanes that are dropped.
        ensure(lanes.bytes() <= limits.bytes || lanes.is_empty(), || {
            format!(
                "the lanes take {} bytes, not {}",
                lanes.bytes(),
                limits.bytes
            )
        })
    }

    /// Nothing that ran holds a turn that its lane has dropped.
    pub(super) fn check_idle_lanes(&self) -> Check {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let (bytes, most) = (lanes.bytes(), self.config.lanes.bytes);
        ensure(bytes <= most && (bytes == 0) == lanes.is_empty(), || {
            format!("{} idle lanes take {bytes} bytes, not {most}", lanes.len())
        })
    }
}
