//! Sequences that wait for a place in the batch, in the order of a [`Policy`].

use std::collections::{BTreeMap, VecDeque};

use super::policy::Policy;
use super::sequence::Sequence;

/// The sequences of one level that have not run, by line.
type Lines = BTreeMap<u32, VecDeque<Box<Sequence>>>;

/// The waiting sequences.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Sequences that have run and were preempted, by rank. They come before all others of their level.
    preempted: VecDeque<Box<Sequence>>,
    levels: BTreeMap<i32, Lines>,
    len: usize,
}

/// Where a sequence waits.
#[derive(Debug, Clone, Copy)]
enum Place {
    Preempted(usize),
    InLine(i32, u32, usize),
}

impl Queue {
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Puts a sequence in a line of its level, by its arrival: at the end, unless it had to wait for its prefix before.
    pub(super) fn push(&mut self, sequence: Box<Sequence>, line: u32) {
        let lines = self.levels.entry(sequence.level).or_default();
        let line = lines.entry(line).or_default();
        let rank = sequence.rank();
        let at = line.partition_point(|other| other.rank() < rank);
        line.insert(at, sequence);
        self.len += 1;
    }

    /// Puts back a preempted sequence, in order of rank.
    pub(super) fn push_preempted(&mut self, sequence: Box<Sequence>) {
        let rank = sequence.rank();
        let at = self.preempted.partition_point(|other| other.rank() < rank);
        self.preempted.insert(at, sequence);
        self.len += 1;
    }

    /// The next sequence.
    pub(super) fn peek_mut(&mut self, policy: &dyn Policy) -> Option<&mut Sequence> {
        let sequence = match self.next_place(policy)? {
            Place::Preempted(at) => self.preempted.get_mut(at)?,
            Place::InLine(level, line, at) => {
                let lines = self.levels.get_mut(&level)?;
                lines.get_mut(&line)?.get_mut(at)?
            }
        };
        Some(&mut **sequence)
    }

    /// Removes and returns the next sequence.
    pub(super) fn pop(&mut self, policy: &dyn Policy) -> Option<Box<Sequence>> {
        let place = self.next_place(policy)?;
        self.take(place)
    }

    /// Removes the sequence with this id, wherever it waits.
    pub(super) fn remove(&mut self, id: u64) -> Option<Box<Sequence>> {
        let place = self.place_of(id)?;
        self.take(place)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        let waiting = self.levels.values().flat_map(BTreeMap::values).flatten();
        self.preempted
            .iter()
            .chain(waiting)
            .map(|sequence| &**sequence)
    }

    fn next_place(&self, policy: &dyn Policy) -> Option<Place> {
        let first = self.levels.iter().next();
        let resumed = self.preempted.front();
        if resumed.is_some_and(|resumed| first.is_none_or(|(&level, _)| resumed.level <= level)) {
            return Some(Place::Preempted(0));
        }
        let (&level, lines) = first?;
        let line = policy.next_line(&mut lines.keys().copied())?;
        Some(Place::InLine(level, line, 0))
    }

    fn place_of(&self, id: u64) -> Option<Place> {
        let find = |line: &VecDeque<Box<Sequence>>| line.iter().position(|s| s.id() == id);
        if let Some(at) = find(&self.preempted) {
            return Some(Place::Preempted(at));
        }
        self.levels.iter().find_map(|(&level, lines)| {
            let mut lines = lines.iter();
            lines.find_map(|(&line, waiting)| Some(Place::InLine(level, line, find(waiting)?)))
        })
    }

    fn take(&mut self, place: Place) -> Option<Box<Sequence>> {
        let sequence = match place {
            Place::Preempted(at) => self.preempted.remove(at)?,
            Place::InLine(level, line, at) => {
                let lines = self.levels.get_mut(&level)?;
                let waiting = lines.get_mut(&line)?;
                let sequence = waiting.remove(at)?;
                if waiting.is_empty() {
                    lines.remove(&line);
                }
                if lines.is_empty() {
                    self.levels.remove(&level);
                }
                sequence
            }
        };
        self.len -= 1;
        Some(sequence)
    }
}
