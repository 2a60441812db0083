//! Continues from the turns of a lane that a request repeats, and adds the request's turn to the lane.

use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::config::Limits;
use super::lane_turn::OpenLaneTurn;
use super::locks::lock;
use super::prepare::{Prepared, prepare};
use crate::error::Result;
use crate::request::{Input, Submission};
use crate::session::{Known, LaneKey, Lanes, Setting, TurnHistory, written};
use crate::text::{ChatTemplate, Tokenizer};
use crate::wire::answer::AnswerFormat;

/// If a lane's history leaves less than this part of the context, it is used only if the request asks for no more than that.
const LEAST_ROOM: usize = 4;

/// A lane that a request continues.
struct OpenLane {
    lanes: Arc<Mutex<Lanes>>,
    key: LaneKey,
    setting: Arc<Setting>,
    known: Known,
    branches: bool,
    /// All messages of the request.
    written: Vec<Box<str>>,
}

impl OpenLane {
    /// The lane of a request. None if the request names no lane, or asks for something that needs more than a history and an
    /// answer. A branch of a session sends only new messages: its lane must have the turns of `base`.
    fn of(submission: &Submission, base: &TurnHistory, lanes: &Arc<Mutex<Lanes>>) -> Option<Self> {
        let name = submission.lane.as_deref()?;
        let Input::Messages {
            messages,
            tools,
            template_kwargs,
            continue_final_message: false,
            add_generation_prompt: None | Some(true),
        } = &submission.input
        else {
            return None;
        };
        let session = submission.session.as_ref();
        let branches = session.is_some_and(|session| session.parent.is_some());
        let begins = session.is_none_or(|session| session.start);
        let plain = submission.n == 1
            && submission.prompt_logprobs.is_none()
            && submission.stopping.max_tokens != Some(0)
            && !submission.on_overflow.drops_turns();
        if !(begins || branches) || !plain {
            return None;
        }
        let key = LaneKey {
            tenant: submission.tenant,
            adapter: submission.adapter.unwrap_or(0),
            name: name.into(),
        };
        let setting = Setting::new(tools.as_deref(), template_kwargs);
        let written: Vec<Box<str>> = messages.iter().map(written).collect();
        let view = lock(lanes).view(&key);
        let known = if branches {
            Known {
                turns: view.find_tokens(&setting, &base.history)?,
                messages: 0,
            }
        } else {
            view.find(&setting, messages, &written)
        };
        Some(Self {
            known,
            lanes: Arc::clone(lanes),
            key,
            setting: Arc::new(setting),
            branches,
            written,
        })
    }

    /// The turn after the first `known` turns of the lane.
    fn turn(self, known: Known, format: AnswerFormat) -> OpenLaneTurn {
        OpenLaneTurn {
            lanes: self.lanes,
            key: self.key,
            setting: self.setting,
            history_tokens: known.history().history.len(),
            turns: known.turns,
            messages: self.written[known.messages..].to_vec(),
            format,
            text: String::new(),
        }
    }
}

/// Like [`prepare`]. A request that names a lane continues from the messages that the lane has, if the result fits into the
/// context. `base`: the history of the request's session or of its parent; the request continues from it in any case.
///
/// # Errors
/// Those of [`prepare`].
pub fn prepare_in_lane(
    submission: &mut Submission,
    base: TurnHistory,
    lanes: &Arc<Mutex<Lanes>>,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
    limits: Limits,
    wanted: &dyn Fn() -> Result<()>,
) -> Result<Prepared> {
    let Some(mut lane) = OpenLane::of(submission, &base, lanes) else {
        return prepare(submission, base, tokenizer, template, limits, wanted);
    };
    let known = std::mem::take(&mut lane.known);
    if lane.branches {
        let mut prepared = prepare(submission, base, tokenizer, template, limits, wanted)?;
        prepared.lane = Some(lane.turn(known, prepared.answer.clone()));
        return Ok(prepared);
    }
    if !known.turns.is_empty() {
        let before = take_messages(submission, known.messages);
        let history = TurnHistory {
            seed: base.seed,
            ..known.history()
        };
        let prepared = prepare(submission, history, tokenizer, template, limits, wanted);
        put_messages(submission, before);
        // If it cannot continue from the lane, or has little room, all messages are rendered: they may take fewer tokens than the
        // lane's history.
        if let Ok(mut prepared) = prepared
            && has_room(submission, &prepared, limits)
        {
            prepared.lane = Some(lane.turn(known, prepared.answer.clone()));
            return Ok(prepared);
        }
        wanted()?;
    }
    let mut prepared = prepare(submission, base, tokenizer, template, limits, wanted)?;
    prepared.lane = Some(lane.turn(Known::default(), prepared.answer.clone()));
    Ok(prepared)
}

fn has_room(submission: &Submission, prepared: &Prepared, limits: Limits) -> bool {
    let room = limits.context_length - prepared.prompt.len();
    let stopping = &submission.stopping;
    let asked = stopping.max_tokens.or(stopping.default_max_tokens);
    room >= limits.context_length / LEAST_ROOM || asked.is_some_and(|asked| asked as usize <= room)
}

/// Removes the first `count` messages from a request.
fn take_messages(submission: &mut Submission, count: usize) -> Vec<Value> {
    match &mut submission.input {
        Input::Messages { messages, .. } => messages.drain(..count.min(messages.len())).collect(),
        _ => Vec::new(),
    }
}

fn put_messages(submission: &mut Submission, before: Vec<Value>) {
    if let Input::Messages { messages, .. } = &mut submission.input {
        messages.splice(..0, before);
    }
}
