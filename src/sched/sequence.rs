//! One sequence of tokens on its way through the model.

use std::sync::Arc;

use super::draft::{Drafter, RATE};
use super::sampling::SeenTokens;
use super::transfers::Staged;
use crate::kv::{BlockPool, BlockTable, Owner};
use crate::request::SamplingParams;

/// How often a model's own guess is assumed to be right, until a sequence's guesses have shown it.
const GUESS_SHARE: f32 = 0.7;

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// The requested number of tokens, or the end of the context.
    Length,
    /// Cancelled, or its client left.
    Abort,
}

impl FinishReason {
    /// The word of the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// What the scheduler must know of a new sequence.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// Unique; names the sequence in [`super::Step`] and in events.
    pub id: u64,
    /// Whose prefix cache it may use.
    pub tenant: u32,
    /// The number of the adapter that computes it; 0: none.
    pub adapter: u32,
    /// Smaller runs first, where the policy asks for it.
    pub priority: i32,
    /// History and input. Not empty.
    pub prompt: Vec<u32>,
    /// Most tokens to generate; 0 is prefill only.
    pub max_tokens: usize,
    /// `stop_tokens` do not end it before that many.
    pub min_tokens: usize,
    /// Tokens that end it.
    pub stop_tokens: Arc<[u32]>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Seed of its sampling.
    pub seed: u64,
    /// Alternatives to report for each token of the prompt, beside its own; absent: the prompt is not scored.
    pub prompt_logprobs: Option<u32>,
    /// Its tokens follow a grammar, whose masks hold off `stop_tokens` too.
    pub guided: bool,
    /// Lengths of its prompt at which a snapshot of the state of a model with recurrent layers is of use.
    pub borders: Vec<usize>,
}

impl NewSequence {
    /// Whose prefix cache it uses.
    pub(super) const fn owner(&self) -> Owner {
        Owner {
            tenant: self.tenant,
            adapter: self.adapter,
        }
    }
}

/// A sequence that waits or runs.
#[derive(Debug)]
pub struct Sequence {
    pub(super) new: NewSequence,
    pub(super) tokens: Vec<u32>,
    pub(super) computed: usize,
    pub(super) table: BlockTable,
    /// Tokens of the prompt that the prefix cache had when the sequence first ran.
    pub(super) cached: usize,
    pub(super) has_run: bool,
    /// Leading tokens of the prompt whose log-probability is known or not asked for; the first has none.
    pub(super) scored: usize,
    pub(super) seen: Option<SeenTokens>,
    /// Of its policy.
    pub(super) level: i32,
    order: u64,
    pub(super) preemptions: u32,
    /// Leading tokens that had been computed when its blocks were taken away.
    pub(super) lost: usize,
    /// Where its state last was, or became, a snapshot.
    pub(super) snapshot: usize,
    /// What the tiers below had of its prefix, until it joins the batch.
    pub(super) staged: Option<Box<Staged>>,
    /// Of a model with recurrent layers: guessed tokens that turned out right, which its state is yet to go beyond.
    pub(super) accepted: usize,
    /// Made when there is first something to draft.
    drafter: Option<Box<Drafter>>,
    /// What a model that guesses ahead takes for its next token, and how often it was right of late.
    guess: Option<u32>,
    guess_share: f32,
    /// Set when the step just booked was its last.
    pub(super) finish: Option<FinishReason>,
    ended_by_token: bool,
}

impl Sequence {
    // Exactly these values mean that a penalty is off.
    #[allow(clippy::float_cmp)]
    pub(super) fn new(new: NewSequence, pool: &Arc<BlockPool>, rank: (i32, u64)) -> Self {
        let s = &new.sampling;
        let penalized =
            s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0;
        let seen = penalized.then(|| SeenTokens::from_prompt(&new.prompt));
        let tokens = new.prompt.clone();
        let table = BlockTable::from_prefix(pool, new.owner(), &[]);
        let scored = new.prompt_logprobs.map_or(new.prompt.len(), |_| 1);
        Self {
            scored,
            new,
            tokens,
            computed: 0,
            table,
            cached: 0,
            has_run: false,
            seen,
            level: rank.0,
            order: rank.1,
            preemptions: 0,
            lost: 0,
            snapshot: 0,
            staged: None,
            accepted: 0,
            drafter: None,
            guess: None,
            guess_share: GUESS_SHARE,
            finish: None,
            ended_by_token: false,
        }
    }

    /// The number of the adapter that computes it; 0: none.
    pub(super) const fn adapter(&self) -> u32 {
        self.new.adapter
    }

    /// The sequence's name.
    pub const fn id(&self) -> u64 {
        self.new.id
    }

    /// Prompt and output.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Generated tokens so far.
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.new.prompt.len()..]
    }

    /// Tokens of the prompt that were not computed again.
    pub const fn cached_tokens(&self) -> usize {
        self.cached
    }

    /// Whether its last token is an end token.
    pub const fn ended_by_token(&self) -> bool {
        self.ended_by_token
    }

    /// How often its blocks were taken away.
    pub const fn preemptions(&self) -> u32 {
        self.preemptions
    }

    /// The blocks it holds.
    pub const fn table(&self) -> &BlockTable {
        &self.table
    }

    /// Its tokens whose keys and values are computed.
    pub const fn computed(&self) -> usize {
        self.computed
    }

    /// Its place among others: by level, then arrival.
    pub(super) const fn rank(&self) -> (i32, u64) {
        (self.level, self.order)
    }

    /// A number in [0, 1) of its own. Those of sequences that came one after another lie evenly.
    pub(super) fn lot(&self) -> f32 {
        // Multiples of the golden ratio.
        let bits = (self.order + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        bits as f32 / (1 << 24) as f32
    }

    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether it is but a token behind, and beside that what was guessed right.
    pub(super) fn is_decoding(&self) -> bool {
        self.remaining() == 1 + self.accepted
    }

    /// Whether it has more than that to compute.
    pub(super) fn is_prompt(&self) -> bool {
        self.remaining() > 1 + self.accepted
    }

    pub(super) const fn wants_sample(&self) -> bool {
        self.new.max_tokens > 0
    }

    /// Whether a step that computes that many of its tokens samples its next one.
    pub(super) fn is_sampled(&self, granted: usize) -> bool {
        self.wants_sample() && granted > 0 && granted == self.remaining()
    }

    pub(super) const fn is_scoring(&self) -> bool {
        self.scored < self.new.prompt.len()
    }

    /// The position whose logits score the next token of the prompt.
    pub(super) const fn next_scoring_position(&self) -> usize {
        self.scored - 1
    }

    /// Holds the cached part of the prefix. What is left to compute has every token whose logits are needed: the last, and those
    /// that score the prompt.
    pub(super) fn attach_prefix(&mut self, pool: &Arc<BlockPool>) {
        let known = &self.tokens[..self.attachable()];
        self.table = BlockTable::from_prefix(pool, self.new.owner(), known);
        self.computed = self.table.known();
        self.snapshot = self.computed;
    }

    /// Whether there are blocks for all its tokens and `headroom` more, and a slot for its state where it needs one.
    pub(super) fn has_room(&self, headroom: usize) -> bool {
        let missing = self.table.missing(self.tokens.len());
        missing + headroom <= self.table.pool().available() && self.table.has_state_room()
    }

    /// Holds the block after the cached prefix that another sequence has left filled in part.
    pub(super) fn attach_tail(&mut self) {
        if self.table.has_state() {
            return;
        }
        let attachable = self.attachable();
        self.computed += self.table.take_tail(&self.tokens[..attachable]);
    }

    /// Caches what it has computed last for a sequence that continues from it: the partly full block, and the state.
    pub(super) fn leave_tail(&mut self) {
        if self.table.has_state() {
            self.table.leave_snapshot(&self.tokens, self.computed);
        } else {
            self.table.leave_tail(&self.tokens, self.computed);
        }
    }

    pub(super) const fn attachable(&self) -> usize {
        if self.is_scoring() {
            self.next_scoring_position()
        } else {
            self.tokens.len().saturating_sub(1)
        }
    }

    /// Holds what has come into the prefix cache since, beyond what is computed. Returns how many tokens need no computation now.
    pub(super) fn adopt_prefix(&mut self) -> usize {
        let attachable = &self.tokens[..self.attachable()];
        let reached = if self.table.has_state() {
            self.table.adopt_state(attachable, self.computed)
        } else {
            self.table.adopt(attachable)
        };
        let adopted = reached.saturating_sub(self.computed);
        self.computed += adopted;
        if adopted > 0 {
            self.snapshot = self.computed;
        }
        if self.preemptions == 0 {
            self.cached += adopted;
        }
        adopted
    }

    /// Whether what comes next here is what comes next for `other`, and can be adopted once that has computed it.
    pub(super) fn shares_next_block(&self, other: &Self) -> bool {
        if self.table.has_state() {
            return self.shares_next_snapshot(other);
        }
        let attachable = &self.tokens[..self.attachable()];
        self.table
            .shares_next_block(attachable, &other.table, &other.tokens)
    }

    /// Tokens of a step, which has granted it `granted` already, that need no row beside its own: those before the prompt's scored
    /// part, and one more; and that lie before its next snapshot.
    pub(super) fn free_tokens(&self, granted: usize) -> usize {
        if !self.is_scoring() {
            return self.until_snapshot(granted);
        }
        (self.next_scoring_position() + 1).saturating_sub(self.computed + granted)
    }

    pub(super) fn detach(&mut self, pool: &Arc<BlockPool>) {
        self.table = BlockTable::from_prefix(pool, self.new.owner(), &[]);
        self.computed = 0;
        self.snapshot = 0;
        self.accepted = 0;
    }

    /// Whether a step that computes that many of its tokens decodes it, and in such a way that what comes after a draft can be
    /// sampled as it would be without: a grammar's masks follow from the tokens before.
    pub(super) fn may_draft(&self, granted: usize) -> bool {
        self.is_decoding() && self.is_sampled(granted) && !self.new.guided
    }

    /// Drafts up to `most` next tokens, as long as they are worth their cost and free blocks are available for them: the model's own
    /// guess, or else what followed the same text before, up to `most_known` tokens. Also says whether it is the model's guess.
    pub(super) fn draft(
        &mut self,
        most_known: usize,
        most: usize,
        mut pays: impl FnMut(f32) -> bool,
    ) -> (Vec<u32>, bool) {
        let mut drafts = Vec::new();
        let generated = self.tokens.len() - self.new.prompt.len();
        // One more token is sampled than drafts are right.
        let most = most.min(self.new.max_tokens - generated - 1);
        let drafter = (most_known > 0).then(|| {
            &*self
                .drafter
                .get_or_insert_with(|| Box::new(Drafter::new(&self.tokens)))
        });
        let known = drafter.map_or(0.0, |drafter| drafter.share());
        let guess = self.guess.filter(|_| most > 0 && self.guess_share > known);
        if let Some(guess) = guess {
            drafts.extend(pays(self.guess_share).then_some(guess));
        } else if let Some(drafter) = drafter {
            drafter.draft(&self.tokens, most.min(most_known), pays, &mut drafts);
        }
        if !self.table.grow(self.tokens.len() + drafts.len()) {
            drafts.truncate(self.table.capacity() - self.tokens.len());
        }
        (drafts, guess.is_some())
    }

    /// Notes what the model takes for its next token.
    pub(super) const fn note_guess(&mut self, guess: Option<u32>) {
        self.guess = guess;
    }

    pub(super) fn push(&mut self, token: u32) -> Option<FinishReason> {
        self.tokens.push(token);
        if let Some(seen) = &mut self.seen {
            seen.push(token);
        }
        if let Some(drafter) = &mut self.drafter {
            drafter.push(&self.tokens);
        }
        if let Some(guess) = self.guess.take() {
            let came = f32::from(u8::from(guess == token));
            self.guess_share += RATE * (came - self.guess_share);
        }
        let generated = self.tokens.len() - self.new.prompt.len();
        if generated > self.new.min_tokens && self.new.stop_tokens.contains(&token) {
            self.ended_by_token = true;
            return Some(FinishReason::Stop);
        }
        (generated >= self.new.max_tokens).then_some(FinishReason::Length)
    }
}
