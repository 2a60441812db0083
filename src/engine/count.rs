//! Counts a request's tokens without running it.

use super::handle::Engine;
use super::prepare::prepare;
use crate::error::Result;
use crate::request::Submission;
use crate::session::{SessionKey, TurnHistory};

impl Engine {
    /// Number of prompt tokens that a request would have: the history of the session that it branches off from, and its input. This
    /// computes nothing, marks no session as used, and ignores lanes.
    ///
    /// # Errors
    /// 400 as for [`Self::submit`], including a prompt that fills the context; 404 for a parent that does not exist.
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
