//! One step of the model, with what may go wrong in it.

use std::panic::resume_unwind;

use super::check::{Check, ensure};
use super::open::Fault;
use super::vocabulary::END_TOKEN;
use super::world::{World, text};
use crate::engine::{Abort, Executor, request_of};
use crate::error::Error;
use crate::sched::NO_TOKEN;

impl World {
    /// Plans a step, computes it on the toy model, and commits what was sampled.
    pub(super) fn compute(&mut self, unruly: bool) -> Check {
        let still = self.core.scheduler().is_still();
        let empty = self.core.plan().is_empty();
        // Those that a tier is read for do not hold up the others.
        ensure(still || !empty, || {
            "requests wait, but nothing is planned".into()
        })?;
        self.transfer(unruly)?;
        if self.core.scheduler().step().is_empty() {
            return Ok(());
        }
        self.counters.steps += 1;
        if unruly && self.random.once_in(50) {
            // The plan stands: the step is computed without the one that left.
            self.hang_up()?;
        }
        let fault =
            (unruly && self.random.once_in(self.config.fault)).then(|| self.random.range(0, 2));
        if unruly {
            self.disturb_masks();
        }
        let step = self.core.scheduler().step();
        let launched = if fault == Some(0) {
            self.model.spoil_states(step);
            Err(Error::internal("the model failed"))
        } else {
            self.model.launch(step)
        };
        if launched.is_ok() {
            text(self.model.collect(step, &mut self.output))?;
        }
        if fault == Some(2) && launched.is_ok() {
            self.output.tokens.push(END_TOKEN);
            let refused = self.observe(|core, output, events| core.commit(output, events))?;
            ensure(refused.is_err(), || "a step took too many tokens".into())?;
        }
        if fault.is_some() || launched.is_err() {
            self.faults.failed_steps += u64::from(fault.is_some());
            return self.fail_step(fault.is_some());
        }
        self.take_tokens()?;
        let seconds = self.random.range(0, 20) as f64 / 1e3;
        self.core.scheduler_mut().note_time(seconds);
        text(self.observe(|core, output, events| core.commit(output, events))?)?;
        for request in std::mem::take(&mut self.replies.too_slow) {
            self.counters.too_slow += 1;
            self.abort(request, Abort::Disconnect)?;
        }
        Ok(())
    }

    /// The mask of an answer panics on the thread that computes it.
    fn disturb_masks(&mut self) {
        self.ledger.unmasked = None;
        let step = self.core.scheduler().step();
        if let Some(masks) = &step.masks
            && self.random.once_in(200)
        {
            // Without a word from the panic hook.
            let row = masks.next_by(|_| resume_unwind(Box::new("a panic while it was computed")));
            let guided = step.guided.iter().find(|(at, _)| Some(*at) == row);
            self.ledger.unmasked = guided.map(|&(_, id)| request_of(id));
            self.faults.mask_panics += 1;
        }
    }

    /// The step could not be computed; `by_chance`: whatever it held.
    fn fail_step(&mut self, by_chance: bool) -> Check {
        if let ([only], true) = (&*self.core.scheduler().step().scheduled, by_chance) {
            self.ledger.alone = Some(request_of(only.id).0);
        } else {
            self.counters.halved += 1;
        }
        let error = Error::internal("the model failed");
        let outcome = self.observe(|core, _, events| core.fail_step(&error, events));
        self.ledger.alone = None;
        outcome
    }

    /// Holds each sampled token to the one that its context alone gives. Those after a draft that was wrong, and those after an
    /// answer's end, are nobody's.
    fn take_tokens(&mut self) -> Check {
        let step = self.core.scheduler().step();
        let mut rows = self.output.tokens.iter().copied();
        for (scheduled, &end) in step.scheduled.iter().zip(&step.query_start[1..]) {
            if !scheduled.samples {
                continue;
            }
            let sampled: Vec<u32> = rows.by_ref().take(1 + scheduled.drafts).collect();
            let (request, choice) = request_of(scheduled.id);
            let Some(open) = self.ledger.open.get_mut(&request) else {
                continue;
            };
            let drafts = &step.token_ids[end as usize - scheduled.drafts..end as usize];
            let drafts = drafts.iter().map(|&draft| Some(draft as u32));
            for (token, draft) in sampled.into_iter().zip(drafts.chain([None])) {
                if token == NO_TOKEN && open.fault == Some(Fault::NotFinite) {
                    self.faults.not_finite_rows += 1;
                    break;
                }
                let expected = open.expected(choice);
                // Without its mask it is any token, and nobody's.
                let unmasked = self.ledger.unmasked == Some((request, choice));
                ensure(token == expected || unmasked, || {
                    format!("request {request}: token {token} came, {expected} is right")
                })?;
                open.answers[choice].tokens.push(token);
                self.counters.tokens += 1;
                self.counters.guided_tokens += u64::from(open.guide.is_some());
                if draft != Some(token) || open.has_ended(choice, &self.tokenizer) {
                    break;
                }
            }
        }
        Ok(())
    }
}
