//! Decides whether a sequence can be admitted: there must be enough blocks for the peak of the batch while the newcomer is in it
//! (after Gong et al. 2025, "Past-Future Scheduler for LLM Serving under SLA Guarantees"). The length of an answer is known if
//! only its limit can end it. Otherwise it is estimated from recent answers.

use std::cmp::Reverse;
use std::collections::VecDeque;

use super::config::{ENTRY_TOKENS, SchedulerConfig};
use super::sequence::Sequence;
use crate::kv::BlockPool;

/// Number of answers whose lengths are remembered.
const RECENT: usize = 512;
/// Number of remembered answers that count as much as the assumption that an answer reaches its limit.
const DOUBT: f32 = 1.0;
/// If the share of answers without a known end is smaller than this, a long answer is expected to end as well.
const UNKNOWN: f32 = 0.1;
/// Expected number of tokens of an answer if neither its client nor other answers give an estimate.
const UNTOLD: usize = 512;
/// Quantile of the answers' lengths that is expected of a newcomer.
const MEDIAN: f32 = 0.5;
/// For this many blocks of answers with estimated ends, one block is reserved for answers that get longer.
const RESERVE: usize = 32;
/// Lengths are exact below 8, and rounded to an eighth of their power of two up to 2^24.
const BUCKETS: usize = 8 * 22;

const fn bucket_of(len: usize) -> usize {
    if len < 8 {
        return len;
    }
    let power = len.ilog2() as usize;
    let bucket = (power - 2) * 8 + ((len >> (power - 3)) & 7);
    if bucket < BUCKETS {
        bucket
    } else {
        BUCKETS - 1
    }
}

/// The longest length in a bucket.
const fn longest_in(bucket: usize) -> usize {
    if bucket < 8 {
        return bucket;
    }
    ((9 + bucket % 8) << (bucket / 8 - 1)) - 1
}

/// How many answers reach which length (Kaplan and Meier 1958: an answer that was cut off, or is still running, shows that a length is
/// reached, but no end).
#[derive(Debug)]
struct Lengths {
    /// The share of answers that get longer than all lengths of the previous buckets.
    reached: [f32; BUCKETS + 1],
    /// The longest answer that ended by itself.
    longest: usize,
}

impl Lengths {
    fn new<'a>(
        recent: &VecDeque<Answer>,
        running: impl Iterator<Item = &'a Box<Sequence>>,
    ) -> Self {
        let (mut seen, mut ended) = ([0.0_f32; BUCKETS], [0.0_f32; BUCKETS]);
        for answer in recent {
            seen[answer.bucket] += 1.0;
            ended[answer.bucket] += f32::from(answer.by_itself);
        }
        for sequence in running.filter(|sequence| sequence.wants_sample()) {
            seen[bucket_of(sequence.output().len())] += 1.0;
        }
        let longest = ended.iter().rposition(|&count| count > 0.0);
        let mut left: f32 = seen.iter().sum();
        let mut reached = [1.0; BUCKETS + 1];
        for bucket in 0..BUCKETS {
            reached[bucket + 1] = reached[bucket] * (1.0 - ended[bucket] / (left + DOUBT));
            left -= seen[bucket];
        }
        Self {
            reached,
            longest: longest.map_or(0, longest_in),
        }
    }

    /// The quantile `rank` of the lengths of answers that get beyond `generated` tokens, if it is known.
    fn expected(&self, generated: usize, rank: f32) -> Option<usize> {
        let first = bucket_of(generated + 1);
        let share = self.reached[first] * (1.0 - rank);
        let bucket = (first..BUCKETS).find(|&bucket| self.reached[bucket + 1] <= share);
        // An answer that gets longer than all others may double its length.
        let beyond = || self.longest.max(2 * generated);
        let known = self.reached[BUCKETS] < UNKNOWN;
        let expected = bucket.map(longest_in).or_else(|| known.then(beyond))?;
        Some(expected.max(generated + 1))
    }
}

/// An answer that ended.
#[derive(Debug, Clone, Copy)]
struct Answer {
    bucket: usize,
    /// It ended neither by its limit nor by its client.
    by_itself: bool,
}

/// What a sequence needs until it ends.
#[derive(Debug, Clone, Copy)]
struct Demand {
    /// Its tokens now.
    tokens: usize,
    /// Number of steps until it ends.
    steps: usize,
    /// Number of blocks that it needs in the last of them.
    blocks: usize,
    /// Number of its blocks that other sequences share.
    shared: usize,
}

/// Recent answers, and the estimates that they give for running ones.
#[derive(Debug, Default)]
pub(super) struct Forecast {
    recent: VecDeque<Answer>,
    demands: Vec<Demand>,
}

impl Forecast {
    /// Remembers how long an answer got.
    pub(super) fn note(&mut self, sequence: &Sequence, by_itself: bool) {
        if !sequence.wants_sample() {
            return;
        }
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(Answer {
            bucket: bucket_of(sequence.output().len()),
            by_itself,
        });
    }

    /// Whether `newcomer`, which holds its cached blocks, may join `running`. If nothing is running, it always may. Sequences of a
    /// higher level give way to it, so their future blocks do not count.
    pub(super) fn admits(
        &mut self,
        newcomer: &Sequence,
        running: &[Box<Sequence>],
        pool: &BlockPool,
        config: &SchedulerConfig,
    ) -> bool {
        let (available, block_size) = (pool.available(), pool.block_size());
        let needed = newcomer.table.missing(newcomer.tokens.len());
        // What is known of the block after its prefix is held only then: the tokens after it may need one more.
        let first_step = newcomer.computed + ENTRY_TOKENS + block_size - 1;
        let at_once = newcomer
            .table
            .missing(first_step.min(newcomer.tokens.len()));
        let has_room = needed <= available && pool.has_window_room(needed, at_once);
        if running.is_empty() || !has_room {
            return has_room;
        }
        let lengths = Lengths::new(&self.recent, running.iter());
        let context = config.max_model_len.min(pool.num_blocks() * block_size);
        let pace = config.max_batch_tokens - config.max_batch;
        let (mut prompts, mut guessed) = (0, 0);
        let mut others = pool.num_blocks() - available;
        self.demands.clear();
        let peers = running.iter().map(|sequence| &**sequence);
        let peers = peers.filter(|sequence| sequence.level <= newcomer.level);
        let peers = peers.map(|sequence| (sequence, sequence.lot()));
        for (sequence, rank) in peers.chain([(newcomer, MEDIAN)]) {
            let shared = pool.shared(sequence.table.blocks());
            others -= sequence.table.blocks().len() - shared;
            let output = expected_output(sequence, rank, &lengths, context);
            // The last token is sampled but never computed.
            let growth = output.saturating_sub(1);
            let blocks = (sequence.tokens.len() + growth).div_ceil(block_size);
            if ends_by_itself(sequence) {
                guessed += blocks;
            }
            let prompt = sequence.remaining().saturating_sub(1);
            prompts += prompt;
            let delay = if prompt > 0 { prompts / pace } else { 0 };
            self.demands.push(Demand {
                tokens: sequence.tokens.len(),
                steps: growth + delay,
                blocks,
                shared,
            });
        }
        others + self.peak(block_size) + guessed / RESERVE <= pool.num_blocks()
    }

    /// Peak number of blocks that the demands need until the last of them, the newcomer's, has ended, without shared blocks.
    fn peak(&mut self, block_size: usize) -> usize {
        let demands = self.demands.iter();
        let all: usize = demands.map(|d| d.blocks.saturating_sub(d.shared)).sum();
        let newcomer_ends = self.demands.last().map_or(0, |demand| demand.steps);
        // Their needs only grow until one ends. Going backwards from the last end, each end adds the sequences that end then.
        self.demands
            .sort_unstable_by_key(|demand| Reverse(demand.steps));
        let (mut peak, mut whole, mut shared) = (0, 0, 0);
        // Number of sequences by the number of tokens in their last, partly full block.
        let mut partial = vec![0; block_size];
        for (before, demand) in self.demands.iter().enumerate() {
            whole += demand.tokens / block_size;
            partial[demand.tokens % block_size] += 1;
            shared += demand.shared;
            if demand.steps > newcomer_ends {
                continue;
            }
            let (grown, rest) = (demand.steps / block_size, demand.steps % block_size);
            let last = (rest..).zip(&partial);
            let last: usize = last.map(|(len, &n)| len.div_ceil(block_size) * n).sum();
            let blocks = whole + (before + 1) * grown + last;
            peak = peak.max(blocks.saturating_sub(shared));
        }
        peak.min(all)
    }
}

/// Whether something may end a sequence before its limit.
fn ends_by_itself(sequence: &Sequence) -> bool {
    sequence.new.guided || !sequence.new.stop_tokens.is_empty()
}

/// Number of tokens that a sequence will still get.
fn expected_output(sequence: &Sequence, rank: f32, lengths: &Lengths, context: usize) -> usize {
    let (new, generated) = (&sequence.new, sequence.output().len());
    let most = new.max_tokens;
    let expected = if ends_by_itself(sequence) {
        lengths.expected(generated, rank).unwrap_or_else(|| {
            // A limit at the end of the context was not chosen by the client.
            let said = new.prompt.len() + most < context;
            if said {
                most
            } else {
                generated + generated.max(UNTOLD)
            }
        })
    } else {
        most
    };
    expected
        .max(new.min_tokens)
        .min(most)
        .saturating_sub(generated)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths of answers, and whether each answer ended by itself.
    fn lengths(answers: impl IntoIterator<Item = (usize, bool)>) -> Lengths {
        let answers = answers.into_iter().map(|(len, by_itself)| Answer {
            bucket: bucket_of(len),
            by_itself,
        });
        Lengths::new(&answers.collect(), [].iter())
    }

    #[test]
    fn a_bucket_holds_lengths_of_an_eighth_of_their_size() {
        for len in 0..100_000 {
            let bucket = bucket_of(len);
            let longest = longest_in(bucket);
            assert!(longest >= len && (longest - len) * 8 <= len, "{len}");
            assert_eq!(bucket_of(longest + 1), bucket + 1);
        }
        assert_eq!(bucket_of(usize::MAX), BUCKETS - 1);
    }

    #[test]
    fn nothing_is_expected_of_answers_of_which_none_has_ended_by_itself() {
        assert_eq!(lengths([]).expected(0, 0.5), None);
        assert_eq!(lengths(vec![(16, false); 500]).expected(0, 0.5), None);
    }

    #[test]
    fn the_more_answers_end_the_more_is_expected_to() {
        let known = |count, rank| lengths(vec![(5, true); count]).expected(0, rank);
        assert_eq!((known(1, 0.5), known(1, 0.6)), (Some(5), None));
        assert_eq!((known(3, 0.7), known(3, 0.8)), (Some(5), None));
        assert_eq!((known(20, 0.9), known(20, 0.99)), (Some(5), Some(5)));
    }

    #[test]
    fn those_that_got_beyond_the_short_ones_are_expected_to_be_long() {
        let answers = (0..100).map(|at| (if at % 10 == 0 { 700 } else { 5 }, true));
        let lengths = lengths(answers);
        assert_eq!(lengths.expected(0, 0.5), Some(5));
        assert_eq!(lengths.expected(5, 0.5), Some(longest_in(bucket_of(700))));
        // And one that gets beyond all of them may double its length.
        assert_eq!(lengths.expected(2000, 0.5), Some(4000));
    }

    #[test]
    fn answers_that_were_cut_off_are_expected_to_be_longer() {
        let ended = (0..50).map(|_| (100, true));
        let cut = (0..50).map(|_| (10, false));
        let all = lengths(ended.clone().chain(cut)).expected(0, 0.5);
        assert_eq!(all, lengths(ended).expected(0, 0.5));
    }
}
