//! What records say, as bytes: little-endian. Their frames are in [`super::frame`].

use super::Fingerprint;
use crate::request::TurnKey;
use crate::session::ledger::{Logprobs, SessionUsage};
use crate::session::state::{AdapterDigest, SessionState, Turn};
use crate::text::Tail;

/// Parts at the end of a record: what the session's turns have used, the log-probabilities of one of the record's turns, the adapter
/// that computed all turns, and the name of one of the record's turns.
const USAGE: u8 = 1;
const LOGPROBS: u8 = 2;
const ADAPTER: u8 = 3;
const TURN_KEY: u8 = 4;

/// A session's state as the difference to the previous one: leading tokens and turns that are kept, and what comes after them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Put {
    pub(super) seed: u64,
    pub(super) created_ms: u64,
    pub(super) used_ms: u64,
    pub(super) used_order: u64,
    pub(super) lost_turn: u32,
    pub(super) system_tokens: u32,
    pub(super) keep_turns: u32,
    pub(super) keep_tokens: u32,
    /// Input tokens, output tokens and what each turn leaves open.
    pub(super) turns: Vec<(u32, u32, Tail)>,
    /// Of these turns; none where nothing is known of any.
    pub(super) logprobs: Vec<Option<Logprobs>>,
    /// Names of some of these turns, each with the turn's place.
    pub(super) keys: Vec<(u32, TurnKey)>,
    pub(super) tokens: Vec<u32>,
    pub(super) usage: SessionUsage,
    pub(super) adapter: Option<AdapterDigest>,
}

fn common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Put {
    /// The difference between two states of a session; `before` is absent where there was none. A session that begins anew is
    /// written whole: what is damaged before it does it no harm.
    pub(super) fn between(before: Option<&SessionState>, after: &SessionState) -> Self {
        let keep_turns = before.map_or(0, |before| common(&before.turns, &after.turns));
        let kept = before.filter(|_| keep_turns > 0);
        let keep_tokens = kept.map_or(0, |before| common(&before.tokens, &after.tokens));
        let turns = after.turns[keep_turns..].iter();
        Self {
            seed: after.seed,
            created_ms: after.created_ms,
            used_ms: after.used_ms,
            used_order: after.used_order,
            lost_turn: after.lost_turn,
            system_tokens: after.system_tokens as u32,
            keep_turns: keep_turns as u32,
            keep_tokens: keep_tokens as u32,
            turns: turns
                .map(|t| (t.input_tokens as u32, t.output_tokens as u32, t.tail))
                .collect(),
            logprobs: logprobs_of(&after.turns[keep_turns..]),
            keys: keys_of(&after.turns[keep_turns..]),
            tokens: after.tokens[keep_tokens..].to_vec(),
            usage: after.usage,
            adapter: after.adapter,
        }
    }

    /// Whether it says all of a session, and needs nothing before it.
    pub(super) const fn is_whole(&self) -> bool {
        self.keep_turns == 0 && self.keep_tokens == 0
    }

    /// Turns of the session after the change.
    pub(super) const fn turns_after(&self) -> u32 {
        self.keep_turns + self.turns.len() as u32
    }

    /// Whether the difference can follow a state of so many tokens and these turns.
    pub(super) fn fits(&self, tokens: usize, turns: &[Turn]) -> bool {
        let (keep_turns, keep_tokens) = (self.keep_turns as usize, self.keep_tokens as usize);
        if keep_turns > turns.len() || keep_tokens > tokens {
            return false;
        }
        let kept = turns[..keep_turns].last().map_or(0, Turn::end);
        let added = self
            .turns
            .iter()
            .map(|&(input, output, _)| input as usize + output as usize);
        let total = keep_tokens + self.tokens.len();
        keep_turns + self.turns.len() > 0
            && kept + added.sum::<usize>() == total
            && self.system_tokens as usize <= total
    }

    /// Applies the difference to a session that it fits.
    pub(super) fn apply(&self, tokens: &mut Vec<u32>, turns: &mut Vec<Turn>) {
        turns.truncate(self.keep_turns as usize);
        tokens.truncate(self.keep_tokens as usize);
        tokens.extend_from_slice(&self.tokens);
        for (at, &(input, output, tail)) in self.turns.iter().enumerate() {
            turns.push(Turn {
                start: turns.last().map_or(0, Turn::end),
                input_tokens: input as usize,
                output_tokens: output as usize,
                tail,
                logprobs: self.logprobs.get(at).cloned().flatten(),
                key: None,
            });
        }
        for &(at, key) in &self.keys {
            if let Some(turn) = turns.get_mut((self.keep_turns + at) as usize) {
                turn.key = Some(key);
            }
        }
    }

    /// Appends the record's body.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        for number in [self.seed, self.created_ms, self.used_ms, self.used_order] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        let counts = [
            self.lost_turn,
            self.system_tokens,
            self.keep_turns,
            self.keep_tokens,
            self.turns.len() as u32,
            self.tokens.len() as u32,
        ];
        for count in counts {
            out.extend_from_slice(&count.to_le_bytes());
        }
        for &(input, output, tail) in &self.turns {
            out.extend_from_slice(&input.to_le_bytes());
            out.extend_from_slice(&output.to_le_bytes());
            out.push(u8::from(tail == Tail::OpenAssistant));
        }
        for token in &self.tokens {
            out.extend_from_slice(&token.to_le_bytes());
        }
        if self.usage != SessionUsage::default() {
            out.push(USAGE);
            out.extend_from_slice(&(SessionUsage::BYTES as u32).to_le_bytes());
            self.usage.write(out);
        }
        if let Some(adapter) = &self.adapter {
            out.push(ADAPTER);
            out.extend_from_slice(&(adapter.len() as u32).to_le_bytes());
            out.extend_from_slice(adapter);
        }
        for (turn, logprobs) in self.logprobs.iter().enumerate() {
            let Some(logprobs) = logprobs else { continue };
            out.push(LOGPROBS);
            out.extend_from_slice(&(4 + 4 * logprobs.len() as u32).to_le_bytes());
            out.extend_from_slice(&(turn as u32).to_le_bytes());
            logprobs.write(out);
        }
        for (turn, key) in &self.keys {
            out.push(TURN_KEY);
            out.extend_from_slice(&(4 + TurnKey::BYTES as u32).to_le_bytes());
            out.extend_from_slice(&turn.to_le_bytes());
            out.extend_from_slice(key.bytes());
        }
    }

    /// Takes one of the parts at the end; None where it is none of this format. An unknown one is skipped.
    fn take(&mut self, tag: u8, part: &[u8]) -> Option<()> {
        match tag {
            USAGE => self.usage = SessionUsage::parse(part)?,
            ADAPTER => self.adapter = Some(part.try_into().ok()?),
            LOGPROBS => {
                let mut rest = Bytes(part);
                let turn = rest.u32()? as usize;
                let logprobs = Logprobs::parse(rest.take_all())?;
                let &(_, output, _) = self.turns.get(turn)?;
                if logprobs.len() != output as usize {
                    return None;
                }
                self.logprobs.resize(self.turns.len(), None);
                self.logprobs[turn] = Some(logprobs);
            }
            TURN_KEY => {
                let mut rest = Bytes(part);
                let turn = rest.u32()?;
                let key = TurnKey::new(rest.array()?);
                if turn as usize >= self.turns.len() || !rest.0.is_empty() {
                    return None;
                }
                self.keys.push((turn, key));
            }
            _ => {}
        }
        Some(())
    }

    /// The body of a record; None where it is none of this format. What a later version adds at its end is skipped.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        let mut rest = Bytes(body);
        let [seed, created_ms, used_ms, used_order] =
            [rest.u64()?, rest.u64()?, rest.u64()?, rest.u64()?];
        let [lost_turn, system_tokens, keep_turns, keep_tokens] =
            [rest.u32()?, rest.u32()?, rest.u32()?, rest.u32()?];
        let (turns, tokens) = (rest.u32()? as usize, rest.u32()? as usize);
        let mut put = Self {
            seed,
            created_ms,
            used_ms,
            used_order,
            lost_turn,
            system_tokens,
            keep_turns,
            keep_tokens,
            turns: rest.turns(turns)?,
            logprobs: Vec::new(),
            keys: Vec::new(),
            tokens: rest.tokens(tokens)?,
            usage: SessionUsage::default(),
            adapter: None,
        };
        let mut whole = true;
        rest.sections(|tag, part| whole &= put.take(tag, part).is_some())?;
        whole.then_some(put)
    }
}

/// Of the turns, as a record has them.
fn logprobs_of(turns: &[Turn]) -> Vec<Option<Logprobs>> {
    if turns.iter().all(|turn| turn.logprobs.is_none()) {
        return Vec::new();
    }
    turns.iter().map(|turn| turn.logprobs.clone()).collect()
}

/// Of the turns, as a record has them.
fn keys_of(turns: &[Turn]) -> Vec<(u32, TurnKey)> {
    let named = turns.iter().enumerate();
    named
        .filter_map(|(at, turn)| Some((at as u32, turn.key?)))
        .collect()
}

/// The body of a log's header: whose tokens it holds.
pub(super) fn parse_header(body: &[u8]) -> Option<(Fingerprint, String)> {
    let mut rest = Bytes(body);
    let fingerprint = rest.array()?;
    let model = String::from_utf8(rest.take_all().to_vec()).ok()?;
    Some((fingerprint, model))
}

/// Bytes that are read from their beginning.
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl<'a> Bytes<'a> {
    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*array)
    }

    pub(super) fn slice(&mut self, len: usize) -> Option<&'a [u8]> {
        let (slice, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(slice)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn flag(&mut self) -> Option<bool> {
        match self.array::<1>()? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    pub(super) fn turns(&mut self, count: usize) -> Option<Vec<(u32, u32, Tail)>> {
        // No allocation that the bytes do not pay for.
        let mut turns = Vec::with_capacity(count.min(self.0.len() / 9));
        for _ in 0..count {
            let (input, output) = (self.u32()?, self.u32()?);
            let tail = if self.flag()? {
                Tail::OpenAssistant
            } else {
                Tail::Closed
            };
            turns.push((input, output, tail));
        }
        Some(turns)
    }

    pub(super) fn tokens(&mut self, count: usize) -> Option<Vec<u32>> {
        let (tokens, _) = self.slice(count.checked_mul(4)?)?.as_chunks::<4>();
        Some(tokens.iter().map(|&t| u32::from_le_bytes(t)).collect())
    }

    /// What follows: parts with a tag (u8) and a length (u32) each.
    pub(super) fn sections(&mut self, mut take: impl FnMut(u8, &'a [u8])) -> Option<()> {
        while !self.0.is_empty() {
            let [tag] = self.array()?;
            let length = self.u32()? as usize;
            take(tag, self.slice(length)?);
        }
        Some(())
    }

    pub(super) fn take_all(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_names_the_adapter_that_computed_the_turns() {
        for adapter in [None, Some([7; 32])] {
            let mut after = SessionState::new(5);
            after.tokens = [1, 2, 3].into();
            after.turns = [Turn {
                start: 0,
                input_tokens: 2,
                output_tokens: 1,
                tail: Tail::Closed,
                logprobs: None,
                key: None,
            }]
            .into();
            after.adapter = adapter;
            let mut body = Vec::new();
            Put::between(None, &after).write(&mut body);
            assert_eq!(Put::parse(&body).unwrap().adapter, adapter);
            if adapter.is_some() {
                // A digest of another length is none of this format.
                body.pop();
                let at = body.len() - 35;
                body[at..at + 4].copy_from_slice(&31_u32.to_le_bytes());
                assert!(Put::parse(&body).is_none());
            }
        }
    }
}
