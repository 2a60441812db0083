//! The engine as its callers see it: submit, watch, stop. Everything here returns at once, whatever the model does.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::config::{EngineConfig, Model, Stats};
use super::core::{Core, engine_down};
use super::embed::{EmbedJob, EmbedSubmission};
use super::executor::Executor;
use super::lease::{TurnLease, lock};
use super::prepare::{Limits, prepare};
use super::shared::{Command, ReadyRequest, Shared, guard, now_ms};
use super::stream::Stream;
use super::worker::Worker;
use crate::error::{Error, Result};
use crate::kv::BlockPool;
use crate::output::{Mailbox, Reply};
use crate::request::Submission;
use crate::sched::{Scheduler, SchedulerConfig};
use crate::session::{Base, SessionKey, SessionStore};

/// Threads that render and tokenize.
const PREPARING_THREADS: usize = 2;

type Job = Box<dyn FnOnce() + Send>;

/// A running engine.
pub struct Engine {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: Arc<BlockPool>,
    pub(super) model: Model,
    limits: Limits,
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
        let scheduler = Scheduler::new(sizes, Arc::clone(&pool))?;
        let limits = Limits {
            context_length: scheduler.max_tokens(),
            vocab_size: model.vocab_size,
        };
        let max_batch_tokens = config.scheduler.max_batch_tokens;
        let core = Core::new(scheduler, model.tokenizer.clone(), model.eos_tokens.clone());
        let sessions = SessionStore::new(config.sessions);
        let shared = Arc::new(Shared::new(sessions, max_open)?);
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
            pool,
            model,
            limits,
            preparing: Mutex::new(Some(sender)),
            threads: Mutex::new(threads),
        })
    }

    /// Most tokens of a sequence, prompt and output.
    pub const fn context_length(&self) -> usize {
        self.limits.context_length
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
        let open = self.shared.open(submission.n as usize)?;
        let id = open.id();
        let (lease, base) = match &submission.session {
            None => (None, Base::empty()),
            Some(session) => {
                let key = SessionKey {
                    tenant: submission.tenant,
                    id: session.id,
                };
                let (lease, base) =
                    TurnLease::begin_turn(&self.shared.sessions, key, session, id, now_ms())?;
                (Some(lease), base)
            }
        };
        let seed = submission.sampling.seed.or(base.seed).unwrap_or(random);
        let mailbox = Mailbox::new(id, Arc::clone(&self.shared.wake));
        let mut reply = Reply::new(&submission, Arc::clone(&mailbox));
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
        let open = self.shared.open(1)?;
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
        Stats {
            open_requests: self.shared.open_requests(),
            sessions: lock(&self.shared.sessions).len(),
            ..*guard(&self.shared.stats)
        }
    }

    /// Refuses new requests, waits up to `grace` for open ones, gives up the rest and stops the threads. May be called again.
    pub fn shutdown(&self, grace: Duration) {
        self.shared.drain(grace);
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
