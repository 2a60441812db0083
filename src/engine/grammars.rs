//! Compiles the grammars of requests. Each grammar is compiled once, on a thread of its own and within a time limit.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::locks::lock;
use crate::error::{Error, Kind, Result};
use crate::guided::{Compiler, Grammar, GrammarCache, Matcher};
use crate::text::Tokenizer;

/// Time limit of a compilation.
const TIME_LIMIT: Duration = Duration::from_secs(2);
/// Maximum number of compilations that still run after their time limit. A compilation cannot be stopped, so at this number no
/// other one is started.
const MAX_OVERDUE: usize = 2;
/// The compiler recurses into nested schemas and rules.
const STACK_BYTES: usize = 256 << 20;
/// Maximum size of the compiled grammars that are kept.
const CACHE_BYTES: usize = 64 << 20;

/// The compiled grammars of one model.
#[derive(Debug)]
pub struct Grammars {
    tokenizer: Option<Arc<Tokenizer>>,
    vocab_size: usize,
    end_tokens: Vec<u32>,
    /// Created for the first grammar: most servers never get one.
    compiler: OnceLock<Result<Arc<Compiler>>>,
    cache: Mutex<GrammarCache>,
    overdue: Arc<AtomicUsize>,
    time_limit: Duration,
}

impl Grammars {
    /// `vocab_size` is the number of rows of the logits; `end_tokens` end an answer.
    pub fn new(tokenizer: Option<Arc<Tokenizer>>, vocab_size: usize, end_tokens: Vec<u32>) -> Self {
        Self {
            tokenizer,
            vocab_size,
            end_tokens,
            compiler: OnceLock::new(),
            cache: Mutex::new(GrammarCache::new(CACHE_BYTES)),
            overdue: Arc::default(),
            time_limit: TIME_LIMIT,
        }
    }

    /// A matcher for each of `choices`, if the grammar is compiled already.
    pub(super) fn cached(&self, grammar: &Grammar, choices: usize) -> Option<Vec<Matcher>> {
        let matcher = lock(&self.cache).get(&grammar.key())?;
        Some(forks(&matcher, choices))
    }

    /// A matcher for each of `choices`. Blocks while the grammar is compiled.
    ///
    /// # Errors
    /// `invalid_grammar` (400) with the reason, which may be the time limit; `grammar_compiler_busy` (429).
    pub fn matchers(&self, grammar: &Grammar, choices: usize) -> Result<Vec<Matcher>> {
        if let Some(matchers) = self.cached(grammar, choices) {
            return Ok(matchers);
        }
        let compiler = self.compiler()?;
        let (matcher, bytes) = self.compile(compiler, grammar.clone())?;
        let matcher = Arc::new(matcher);
        lock(&self.cache).insert(grammar.key(), Arc::clone(&matcher), bytes);
        Ok(forks(&matcher, choices))
    }

    fn compiler(&self) -> Result<Arc<Compiler>> {
        let make = || {
            let tokenizer = self.tokenizer.as_deref().ok_or_else(|| {
                let message = "grammars need a tokenizer, but this model has none";
                Error::new(Kind::Invalid, "unsupported_parameter", message)
            })?;
            Compiler::new(tokenizer, self.vocab_size, &self.end_tokens).map(Arc::new)
        };
        self.compiler.get_or_init(make).clone()
    }

    fn compile(&self, compiler: Arc<Compiler>, grammar: Grammar) -> Result<(Matcher, usize)> {
        let overdue = self.overdue.load(Ordering::Acquire);
        if overdue >= MAX_OVERDUE {
            let message = format!(
                "{overdue} grammars are taking longer than the limit of {} s to compile, so no other one can be \
                 started; try again",
                self.time_limit.as_secs()
            );
            return Err(Error::new(Kind::Busy, "grammar_compiler_busy", message)
                .with_detail("retry_after", 5));
        }
        let param = grammar.param().to_owned();
        let (sender, receiver) = channel();
        let compile = move || {
            // After the time limit nobody receives it.
            let _ = sender.send(compiler.compile(&grammar));
        };
        let thread = Builder::new()
            .name("lmserve-compile".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(compile)
            .map_err(|e| {
                Error::internal(format!(
                    "the thread that compiles a grammar cannot be started: {e}"
                ))
            })?;
        match receiver.recv_timeout(self.time_limit) {
            Ok(compiled) => compiled,
            Err(RecvTimeoutError::Timeout) => {
                self.watch(thread);
                Err(refusal(
                    &param,
                    &format!(
                        "it takes longer than the limit of {} s",
                        self.time_limit.as_secs()
                    ),
                ))
            }
            Err(RecvTimeoutError::Disconnected) => Err(refusal(&param, "the compiler failed")),
        }
    }

    /// Counts a compilation that exceeds its time limit until it ends.
    fn watch(&self, thread: JoinHandle<()>) {
        let overdue = Arc::clone(&self.overdue);
        overdue.fetch_add(1, Ordering::AcqRel);
        let wait = move || {
            // Nobody needs its result any more.
            let _ = thread.join();
            overdue.fetch_sub(1, Ordering::AcqRel);
        };
        // If no thread can watch it, it counts for ever. That only means that fewer are started.
        let _ = Builder::new()
            .name("lmserve-overdue".to_owned())
            .spawn(wait);
    }
}

fn refusal(param: &str, why: &str) -> Error {
    let message = format!("{param} cannot be compiled: {why}");
    Error::new(Kind::Invalid, "invalid_grammar", message).with_param(param)
}

fn forks(matcher: &Matcher, choices: usize) -> Vec<Matcher> {
    (0..choices).map(|_| matcher.fork()).collect()
}

#[cfg(test)]
mod tests {
    use std::thread::yield_now;

    use super::*;
    use crate::guided::Spacing;
    use crate::request::Guide;

    fn grammars(time_limit: Duration) -> Grammars {
        let json = r#"{"version":"1.0","added_tokens":[],"decoder":{"type":"ByteLevel","add_prefix_space":false,
            "trim_offsets":false,"use_regex":false},"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":[]}}"#;
        let tokenizer = Tokenizer::from_json(json.as_bytes()).unwrap();
        Grammars {
            time_limit,
            ..Grammars::new(Some(Arc::new(tokenizer)), 2, vec![])
        }
    }

    fn regex(pattern: &str) -> Grammar {
        let pattern = pattern.to_owned();
        Grammar::of(&Guide::Regex { pattern }, "guided_regex", Spacing::Compact)
    }

    #[test]
    fn a_grammar_is_compiled_once() {
        let grammars = grammars(TIME_LIMIT);
        assert!(grammars.cached(&regex("ab"), 1).is_none());
        assert_eq!(grammars.matchers(&regex("ab"), 3).unwrap().len(), 3);
        let mut matchers = grammars.cached(&regex("ab"), 1).unwrap();
        assert!(!matchers[0].consume(0).unwrap());
        assert!(matchers[0].consume(1).unwrap());
        // The other matchers have not moved.
        let mut others = grammars.cached(&regex("ab"), 1).unwrap();
        assert!(others[0].consume(1).is_err());
    }

    #[test]
    fn beyond_the_time_limit_a_grammar_is_refused_and_counts_until_it_ends() {
        let grammars = grammars(Duration::ZERO);
        // Each rule stands for twice as much as the next one, so that the compiler needs a while to find it too large.
        let doubling = (0..40).fold("start: A0\nA40: \"a\"".to_owned(), |grammar, at| {
            let next = at + 1;
            grammar + &format!("\nA{at}: A{next} A{next}")
        });
        let slow = Grammar::of(
            &Guide::Lark { grammar: doubling },
            "guided_grammar",
            Spacing::Compact,
        );
        let error = grammars.matchers(&slow, 1).unwrap_err();
        assert!(
            error.message.contains("longer than the limit of 0 s"),
            "{error}"
        );
        assert_eq!((error.kind, error.code), (Kind::Invalid, "invalid_grammar"));
        grammars.overdue.fetch_add(MAX_OVERDUE, Ordering::AcqRel);
        let error = grammars.matchers(&regex("b"), 1).unwrap_err();
        assert_eq!(
            (error.kind, error.code),
            (Kind::Busy, "grammar_compiler_busy")
        );
        while grammars.overdue.load(Ordering::Acquire) > MAX_OVERDUE {
            yield_now();
        }
    }
}
