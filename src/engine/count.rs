//! How many tokens a request would have, without running it.

use super::handle::Engine;
use super::prepare::prepare;
use crate::error::Result;
use crate::request::Submission;
use crate::session::{SessionKey, TurnHistory};

impl Engine {
    /// Tokens of the prompt that a request would be computed for: the history of the session that it branches off from, and its
    /// input. Nothing is computed, no session is marked as used, and a lane is not looked at.
    ///
    /// # Errors
    /// 400 as for [`Self::submit`], a prompt that leaves the context no room among them; 404 for a parent that does not live.
    pub fn count_tokens(&self, json: &[u8]) -> Result<usize> {
        let submission = Submission::parse(json)?;
        let parent = submission.session.as_ref().and_then(|s| s.parent.clone());
        let base = match parent {
            Some(parent) => self
                .session_state(&SessionKey::new(submission.tenant, parent))?
                .base(),
            None => TurnHistory::empty(),
        };
        let prepared = prepare(
            &submission,
            base,
            self.model.tokenizer.as_deref(),
            self.model.template.as_deref(),
            self.limits,
            &|| Ok(()),
        )?;
        Ok(prepared.prompt.len())
    }
}
