//! Conversations as `/v1/conversations` keeps them over sessions. Each response is a session of its own, a branch of the one before.
//! Once the core has committed it, it is written down with what was said, and the session before it is ended.

use serde_json::json;

use super::check::{Check, ensure};
use super::ledger::Told;
use super::vocabulary::VOCAB_SIZE;
use super::world::World;
use crate::request::SessionId;
use crate::session::SessionKey;

impl World {
    /// A client asks for one more response, or an answer is written down.
    pub(super) fn converse(&mut self) -> Check {
        let at = self.random.range(0, self.conversations.len() - 1);
        if let Some((request, key)) = self.conversations[at].running.take() {
            // A server that dies here has committed what is not written down.
            let waits = self.ledger.open.contains_key(&request) || self.random.once_in(2);
            if waits && self.ledger.told.contains_key(&request) {
                self.conversations[at].running = Some((request, key));
                return Ok(());
            }
            if let Told::All(said) = self.ledger.take_told(request) {
                return self.write_response(at, said, key);
            }
        }
        let count = self.random.range(1, 5);
        let new = self.random.tokens(count, VOCAB_SIZE);
        let tip = self.conversations[at].tip.clone();
        let gone = match tip {
            Some(tip) => self.respond(at, &new, Some(tip))? == Err(404),
            None => true,
        };
        let tip = self.conversations[at].tip.clone();
        if gone && self.respond(at, &new, None)?.is_ok() && tip.is_some() {
            self.counters.begun_anew += 1;
        }
        Ok(())
    }

    /// Begins a response after `tip`, or after all that was said; or the status of its refusal.
    fn respond(
        &mut self,
        at: usize,
        new: &[u32],
        tip: Option<SessionKey>,
    ) -> Result<Result<(), u16>, String> {
        let tenant = at as u32 % 2;
        let id = SessionId::Number(-2 - self.next_request as i64);
        let key = SessionKey::new(tenant, id);
        let said = self.conversations[at].said.clone();
        let before = if tip.is_some() { &[] } else { &said[..] };
        let ids = [before, new].concat();
        let mut body = self.draw_submission();
        body["n"] = json!(1);
        body["tenant"] = json!(tenant);
        body["on_overflow"] = json!("truncate_output");
        body["input"] = json!({"type": "tokens", "ids": ids});
        body["session"] = json!({
            "id": key.id,
            "start": tip.is_none(),
            "parent": tip.map(|tip| tip.id),
        });
        let request = match self.submit(&body)? {
            Ok(request) => request,
            Err(400) => {
                // It is full: its client deletes it.
                if let Some(tip) = self.conversations[at].tip.take() {
                    self.end_session(&tip)?;
                }
                self.conversations[at].said.clear();
                return Ok(Err(400));
            }
            // A session that lost a turn cannot be gone on from either.
            Err(status) => return Ok(Err(if status == 409 { 404 } else { status })),
        };
        let open = &self.ledger.open[&request];
        ensure(open.prompt == [&said[..], new].concat(), || {
            format!(
                "a conversation is {:?}, not {said:?} and {new:?}",
                open.prompt
            )
        })?;
        self.ledger.told.insert(request, None);
        self.conversations[at].running = Some((request, key));
        Ok(Ok(()))
    }

    fn write_response(&mut self, at: usize, said: Vec<u32>, key: SessionKey) -> Check {
        self.counters.responses += 1;
        let conversation = &mut self.conversations[at];
        ensure(said.starts_with(&conversation.said), || {
            format!("{said:?} does not go on from {:?}", conversation.said)
        })?;
        conversation.said = said;
        match conversation.tip.replace(key) {
            // Of responses that are stored, the session stays.
            Some(before) if self.random.once_in(2) => self.end_session(&before),
            _ => Ok(()),
        }
    }
}
