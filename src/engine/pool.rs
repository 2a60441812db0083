//! A few threads for work that must not hold up anyone else.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use super::shared::guard;
use crate::error::{Error, Result};

pub(super) type Job = Box<dyn FnOnce() + Send>;

/// Threads that do jobs in the order in which they come.
pub(super) struct Pool {
    sender: Mutex<Option<Sender<Job>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Pool {
    /// Starts threads named `name-0`, `name-1`, ...
    pub(super) fn start(name: &str, threads: usize) -> Result<Self> {
        let (sender, receiver) = channel::<Job>();
        let receiver = Arc::new(Mutex::new(receiver));
        let spawn = |at| {
            let receiver = Arc::clone(&receiver);
            spawn(&format!("{name}-{at}"), move || run_jobs(&receiver))
        };
        let threads = (0..threads).map(spawn).collect::<Result<_>>()?;
        Ok(Self {
            sender: Mutex::new(Some(sender)),
            threads: Mutex::new(threads),
        })
    }

    /// Hands a job over; gives it back once the pool is stopped.
    pub(super) fn run(&self, job: Job) -> Result<(), Job> {
        match &*guard(&self.sender) {
            Some(sender) => sender.send(job).map_err(|unsent| unsent.0),
            None => Err(job),
        }
    }

    /// Takes no more jobs, and waits for those that it has. False if one panicked. May be called again.
    pub(super) fn stop(&self) -> bool {
        guard(&self.sender).take();
        let threads = std::mem::take(&mut *guard(&self.threads));
        let ends: Vec<_> = threads.into_iter().map(JoinHandle::join).collect();
        ends.iter().all(Result::is_ok)
    }
}

pub(super) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    Builder::new()
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
