//! The engine as its callers see it: submit, watch, abort, stop. Everything here returns at once, whatever the model does.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::core::{Abort, Core, engine_down};
use super::embed::{EmbedJob, EmbedSubmission};
use super::executor::Executor;
use super::lease::{TurnLease, lock};
use super::prepare::{Limits, Prepared, prepare};
use super::worker::Worker;
use crate::error::{Error, Kind, Result};
use crate::kv::BlockPool;
use crate::output::{Mailbox, Poll, Reply, Wake};
use crate::request::Submission;
use crate::sched::{self, Scheduler, SchedulerConfig};
use crate::session::{Base, SessionInfo, SessionKey, SessionStore, StoreLimits};
use crate::text::{ChatTemplate, Tokenizer};

/// Threads that render and tokenize.
const PREPARING_THREADS: usize = 2;

/// Sizes of an engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    /// Sizes of the scheduler.
    pub scheduler: SchedulerConfig,
    /// KV blocks.
    pub num_blocks: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Keep and share the KV of known prefixes.
    pub prefix_cache: bool,
    /// How many sessions are kept.
    pub sessions: StoreLimits,
}

/// What the engine must know of the model.
#[derive(Debug, Clone)]
pub struct Model {
    /// Absent: only token ids go in, and no text comes out.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Absent: no conversations.
    pub template: Option<Arc<ChatTemplate>>,
    /// Tokens that end an answer.
    pub eos_tokens: Vec<u32>,
    /// Rows of the logits.
    pub vocab_size: usize,
    /// Length of an embedding.
    pub hidden_size: usize,
    /// Most tokens of one input to embed.
    pub max_embed_len: usize,
    /// Generates text.
    pub can_generate: bool,
    /// Embeds.
    pub can_embed: bool,
}

/// The state of an engine at its last step.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct Stats {
    pub scheduler: sched::Stats,
    pub free_blocks: usize,
    pub owned_blocks: usize,
    pub cached_blocks: usize,
    pub evictions: u64,
    pub failed_steps: u64,
    pub open_requests: usize,
    pub sessions: usize,
}

pub(super) enum Command {
    Run(Box<ReadyRequest>),
    Embed(Box<EmbedJob>),
    Abort(u64),
    Stop,
}

pub(super) struct ReadyRequest {
    pub(super) submission: Submission,
    pub(super) prepared: Prepared,
    pub(super) lease: Option<TurnLease>,
    pub(super) seed: u64,
    pub(super) reply: Reply,
    pub(super) open: OpenRequest,
}

type AbortFlag = Arc<Mutex<Option<Abort>>>;

/// The requests that have not ended.
#[derive(Debug, Default)]
struct OpenRequests {
    flags: HashMap<u64, AbortFlag>,
    /// Sequences they may make.
    choices: usize,
}

#[derive(Debug, Default)]
struct Inbox {
    commands: Vec<Command>,
    /// The engine's thread is gone and nobody will look again.
    closed: bool,
}

/// What the callers, the preparing pool and the engine's thread share.
#[derive(Debug)]
pub(super) struct Shared {
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    pub(super) wake: Arc<Wake>,
    pub(super) sessions: Arc<Mutex<SessionStore>>,
    open: Mutex<OpenRequests>,
    closed: Condvar,
    /// Refuses new requests.
    draining: AtomicBool,
    down: Mutex<Option<String>>,
    pub(super) stats: Mutex<Stats>,
    next_id: AtomicU64,
}

impl Command {
    /// Fails the request that the command brings.
    pub(super) fn reject(self, error: &Error) {
        match self {
            Self::Run(ready) => {
                let ReadyRequest { lease, reply, .. } = *ready;
                // The session is free again before its client hears of the error.
                drop(lease);
                reply.fail(error.clone());
            }
            Self::Embed(job) => job.fail(error.clone()),
            Self::Abort(_) | Self::Stop => {}
        }
    }
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Run(_) => "Run",
            Self::Embed(_) => "Embed",
            Self::Abort(_) => "Abort",
            Self::Stop => "Stop",
        })
    }
}

/// A request's place among the open ones; dropping it gives the place back.
#[derive(Debug)]
pub(super) struct OpenRequest {
    shared: Arc<Shared>,
    id: u64,
    choices: usize,
    flag: AbortFlag,
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

impl Shared {
    /// Hands a command to the engine's thread; where that is gone, the command's request fails.
    pub(super) fn send(&self, command: Command) {
        let mut inbox = guard(&self.inbox);
        if inbox.closed {
            drop(inbox);
            command.reject(&engine_down("it was stopped"));
            self.wake.signal();
            return;
        }
        inbox.commands.push(command);
        self.arrived.notify_one();
    }

    /// Takes all commands; waits for one if `idle`.
    pub(super) fn receive(&self, idle: bool) -> Vec<Command> {
        let mut inbox = guard(&self.inbox);
        while idle && inbox.commands.is_empty() {
            inbox = self
                .arrived
                .wait(inbox)
                .unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut inbox.commands)
    }

    /// Closes the inbox and takes what is left in it.
    pub(super) fn close(&self) -> Vec<Command> {
        let mut inbox = guard(&self.inbox);
        inbox.closed = true;
        std::mem::take(&mut inbox.commands)
    }

    pub(super) fn set_down(&self, why: &str) {
        *guard(&self.down) = Some(why.to_owned());
    }
}

impl OpenRequest {
    pub(super) fn aborted(&self) -> Option<Abort> {
        *guard(&self.flag)
    }

    pub(super) const fn id(&self) -> u64 {
        self.id
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        let mut open = guard(&self.shared.open);
        open.flags.remove(&self.id);
        open.choices -= self.choices;
        drop(open);
        self.shared.closed.notify_all();
    }
}

/// One request's stream, as its reader holds it. Dropping it before the end aborts the request.
#[derive(Debug)]
pub struct Stream {
    mailbox: Arc<Mailbox>,
    shared: Arc<Shared>,
}

impl Stream {
    /// The stream's id, as [`Engine::drain`] names it.
    pub fn id(&self) -> u64 {
        self.mailbox.id()
    }

    /// Takes what has come since the last look.
    pub fn poll(&self) -> Poll {
        self.mailbox.poll()
    }

    /// The reader left.
    pub fn abort(&self) {
        abort(&self.shared, self.id(), Abort::Disconnect);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.abort();
    }
}

fn abort(shared: &Shared, request: u64, how: Abort) -> bool {
    let Some(flag) = guard(&shared.open).flags.get(&request).cloned() else {
        return false;
    };
    guard(&flag).get_or_insert(how);
    shared.send(Command::Abort(request));
    true
}

type Job = Box<dyn FnOnce() + Send>;

/// A running engine.
pub struct Engine {
    shared: Arc<Shared>,
    model: Model,
    limits: Limits,
    max_open: usize,
    preparing: Mutex<Option<Sender<Job>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the threads.
    ///
    /// # Errors
    /// `invalid_value` for sizes that cannot work; `internal_error` where the system gives no thread or descriptor.
    pub fn start(
        config: EngineConfig,
        model: Model,
        executor: Box<dyn Executor + Send>,
    ) -> Result<Self> {
        let pool = Arc::new(BlockPool::new(
            config.num_blocks,
            config.block_size,
            config.prefix_cache,
        ));
        let max_open = config.scheduler.max_batch + config.scheduler.max_queue;
        // What is open is bounded where it comes in; all of it may reach the scheduler before its first step.
        let sizes = SchedulerConfig {
            max_queue: max_open,
            ..config.scheduler
        };
        let scheduler = Scheduler::new(sizes, pool)?;
        let limits = Limits {
            context_length: scheduler.max_tokens(),
            vocab_size: model.vocab_size,
        };
        let max_batch_tokens = config.scheduler.max_batch_tokens;
        let core = Core::new(scheduler, model.tokenizer.clone(), model.eos_tokens.clone());
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            arrived: Condvar::new(),
            wake: Arc::new(Wake::new()?),
            sessions: Arc::new(Mutex::new(SessionStore::new(config.sessions))),
            open: Mutex::default(),
            closed: Condvar::new(),
            draining: AtomicBool::new(false),
            down: Mutex::default(),
            stats: Mutex::default(),
            next_id: AtomicU64::new(1),
        });
        let worker = Worker::new(Arc::clone(&shared), core, executor, max_batch_tokens);
        let mut threads = vec![spawn("lmserve-engine", move || worker.run())?];
        let (sender, receiver) = channel::<Job>();
        let receiver = Arc::new(Mutex::new(receiver));
        for at in 0..PREPARING_THREADS {
            let receiver = Arc::clone(&receiver);
            threads.push(spawn(&format!("lmserve-prepare-{at}"), move || {
                run_jobs(&receiver);
            })?);
        }
        Ok(Self {
            shared,
            model,
            limits,
            max_open,
            preparing: Mutex::new(Some(sender)),
            threads: Mutex::new(threads),
        })
    }

    /// Most tokens of a sequence, prompt and output.
    pub const fn context_length(&self) -> usize {
        self.limits.context_length
    }

    fn open(&self, choices: usize) -> Result<OpenRequest> {
        if let Some(why) = &*guard(&self.shared.down) {
            return Err(engine_down(why));
        }
        if self.shared.draining.load(Ordering::Acquire) {
            let message = "the server is shutting down and takes no new requests";
            return Err(
                Error::new(Kind::Unavailable, "draining", message).with_detail("retry_after", 5)
            );
        }
        let mut open = guard(&self.shared.open);
        if open.choices + choices > self.max_open {
            let message = format!(
                "{} answers are being made or wait, the limit is {}, and {choices} more were asked for",
                open.choices, self.max_open
            );
            return Err(Error::new(Kind::Busy, "queue_full", message).with_detail("retry_after", 1));
        }
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let flag = AbortFlag::default();
        open.choices += choices;
        open.flags.insert(id, Arc::clone(&flag));
        Ok(OpenRequest {
            shared: Arc::clone(&self.shared),
            id,
            choices,
            flag,
        })
    }

    fn prepare_later(&self, job: Job) -> Result<()> {
        let sender = guard(&self.preparing);
        let sent = sender.as_ref().map(|sender| sender.send(job));
        if matches!(sent, Some(Ok(()))) {
            Ok(())
        } else {
            Err(engine_down("it was stopped"))
        }
    }

    /// Takes a request in. `random` seeds its sampling where neither it nor its session has a seed.
    ///
    /// # Errors
    /// At once: 400 `invalid_value`, 404 `session_not_found`, 409 `session_busy`, 429 `queue_full`, 503. What the template,
    /// the tokenizer or the lengths refuse comes through the stream, before its first byte.
    pub fn submit(&self, json: &[u8], random: u64) -> Result<Stream> {
        let submission = Submission::parse(json)?;
        if !self.model.can_generate {
            return Err(Error::invalid(
                "model",
                "this model makes embeddings; it generates no text",
            ));
        }
        let open = self.open(submission.n as usize)?;
        let id = open.id();
        let (lease, base) = match &submission.session {
            None => (None, Base::empty()),
            Some(session) => {
                let key = SessionKey {
                    tenant: submission.tenant,
                    id: session.id,
                };
                let (start, create) = (session.start, session.create);
                let (lease, base) =
                    TurnLease::begin(&self.shared.sessions, key, id, start, create, now_ms())?;
                (Some(lease), base)
            }
        };
        let seed = submission.sampling.seed.or(base.seed).unwrap_or(random);
        let mailbox = Mailbox::new(id, Arc::clone(&self.shared.wake));
        let reply = Reply::new(&submission, Arc::clone(&mailbox));
        let (model, limits, shared) = (self.model.clone(), self.limits, Arc::clone(&self.shared));
        let job = move || {
            match prepare(
                &submission,
                base,
                model.tokenizer.as_deref(),
                model.template.as_deref(),
                limits,
            ) {
                Ok(prepared) => {
                    let ready = ReadyRequest {
                        submission,
                        prepared,
                        lease,
                        seed,
                        reply,
                        open,
                    };
                    shared.send(Command::Run(Box::new(ready)));
                }
                Err(error) => {
                    // The session is free again before its client hears of the error.
                    drop(lease);
                    reply.fail(error);
                    drop(open);
                    shared.wake.signal();
                }
            }
        };
        let stream = Stream {
            mailbox,
            shared: Arc::clone(&self.shared),
        };
        self.prepare_later(Box::new(job))?;
        Ok(stream)
    }

    /// Takes an embedding request in; the stream carries the whole reply.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn embed(&self, json: &[u8]) -> Result<Stream> {
        let hidden_size = self.model.hidden_size;
        let submission = EmbedSubmission::parse(json, hidden_size)?;
        if !self.model.can_embed {
            return Err(Error::invalid("model", "this model makes no embeddings"));
        }
        let open = self.open(1)?;
        let mailbox = Mailbox::new(open.id(), Arc::clone(&self.shared.wake));
        let stream = Stream {
            mailbox: Arc::clone(&mailbox),
            shared: Arc::clone(&self.shared),
        };
        let (model, shared) = (self.model.clone(), Arc::clone(&self.shared));
        let job = move || match submission.tokenize(
            model.tokenizer.as_deref(),
            model.max_embed_len,
            model.vocab_size,
        ) {
            Ok(sequences) => {
                let job = EmbedJob::new(submission, sequences, hidden_size, mailbox, open);
                shared.send(Command::Embed(Box::new(job)));
            }
            Err(error) => {
                mailbox.fail(error, true, |_, _| {});
                drop(open);
                shared.wake.signal();
            }
        };
        self.prepare_later(Box::new(job))?;
        Ok(stream)
    }

    /// Ends the running turn of a session with what it has; false if none runs.
    pub fn cancel_session(&self, key: SessionKey) -> bool {
        let running = lock(&self.shared.sessions).running_request(key);
        running.is_some_and(|request| abort(&self.shared, request, Abort::Cancel))
    }

    /// Drops a session; false if there was none.
    ///
    /// # Errors
    /// `session_busy` (409) while a turn runs.
    pub fn end_session(&self, key: SessionKey) -> Result<bool> {
        lock(&self.shared.sessions).remove(key)
    }

    /// What can be said of a session.
    ///
    /// # Errors
    /// `session_not_found` or `session_expired` (404).
    pub fn session_info(&self, key: SessionKey) -> Result<SessionInfo> {
        lock(&self.shared.sessions).info(key)
    }

    /// Committed token ids of a session.
    ///
    /// # Errors
    /// `session_not_found` or `session_expired` (404).
    pub fn session_tokens(&self, key: SessionKey) -> Result<Vec<u32>> {
        lock(&self.shared.sessions).tokens(key).map(<[u32]>::to_vec)
    }

    /// Readable while some stream has news.
    pub fn wake_fd(&self) -> i32 {
        self.shared.wake.fd()
    }

    /// Takes the ids of the streams with news.
    pub fn drain(&self) -> Vec<u64> {
        self.shared.wake.drain()
    }

    /// The state at the last step; requests and sessions as they are now.
    pub fn stats(&self) -> Stats {
        let open_requests = guard(&self.shared.open).flags.len();
        Stats {
            open_requests,
            sessions: lock(&self.shared.sessions).len(),
            ..*guard(&self.shared.stats)
        }
    }

    /// Refuses new requests, waits up to `grace` for open ones, gives up the rest and stops the threads. May be called again.
    pub fn shutdown(&self, grace: Duration) {
        self.shared.draining.store(true, Ordering::Release);
        let deadline = Instant::now() + grace;
        let mut open = guard(&self.shared.open);
        while open.choices > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            open = self
                .shared
                .closed
                .wait_timeout(open, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(open);
        self.shared.send(Command::Stop);
        guard(&self.preparing).take();
        for thread in std::mem::take(&mut *guard(&self.threads)) {
            if thread.join().is_err() {
                self.shared.set_down("a thread panicked");
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown(Duration::ZERO);
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(|e| Error::internal(format!("no thread for {name}: {e}")))
}

fn run_jobs(receiver: &Mutex<Receiver<Job>>) {
    loop {
        let job = guard(receiver).recv();
        let Ok(job) = job else { return };
        job();
    }
}
