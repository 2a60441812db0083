//! A few threads for work that must not hold up anyone else.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use super::locks::lock;
use crate::error::{Error, Result};
use crate::panics::contain;

pub(super) type Job = Box<dyn FnOnce() + Send>;

/// Threads that run jobs in the order in which they arrive.
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
            let name = format!("{name}-{at}");
            spawn(&name.clone(), move || run_jobs(&name, &receiver))
        };
        let threads = (0..threads).map(spawn).collect::<Result<_>>()?;
        Ok(Self {
            sender: Mutex::new(Some(sender)),
            threads: Mutex::new(threads),
        })
    }

    /// Queues a job. Returns the job if the pool was stopped.
    pub(super) fn run(&self, job: Job) -> Result<(), Job> {
        match &*lock(&self.sender) {
            Some(sender) => sender.send(job).map_err(|unsent| unsent.0),
            None => Err(job),
        }
    }

    /// Whether no thread has died. True for a stopped pool.
    pub(super) fn is_whole(&self) -> bool {
        !lock(&self.threads).iter().any(JoinHandle::is_finished)
    }

    /// Refuses new jobs and waits for the queued ones. Returns false if a thread panicked. May be called again.
    pub(super) fn stop(&self) -> bool {
        lock(&self.sender).take();
        join(&self.threads)
    }
}

/// Waits for all threads. Returns false if one has panicked.
pub(super) fn join(threads: &Mutex<Vec<JoinHandle<()>>>) -> bool {
    let threads = std::mem::take(&mut *lock(threads));
    let ends: Vec<_> = threads.into_iter().map(JoinHandle::join).collect();
    ends.iter().all(Result::is_ok)
}

pub(super) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(|e| Error::internal(format!("the thread for {name} cannot be started: {e}")))
}

fn run_jobs(name: &str, receiver: &Mutex<Receiver<Job>>) {
    loop {
        let job = lock(receiver).recv();
        let Ok(job) = job else { return };
        // Dropping what the job owned reports the panic to whoever waits for it.
        drop(contain(name, job));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::panics::caught;

    #[test]
    fn a_job_that_panics_takes_no_thread_with_it() {
        let pool = Pool::start("test", 2).unwrap();
        let before = caught();
        for _ in 0..10 {
            assert!(pool.run(Box::new(|| panic!("out of luck"))).is_ok());
        }
        // The test passes only if two threads run at the same time.
        let (meet, (met, wait)) = (Arc::new(Barrier::new(2)), channel());
        for _ in 0..2 {
            let (meet, met) = (Arc::clone(&meet), met.clone());
            let job = move || {
                meet.wait();
                met.send(()).unwrap();
            };
            assert!(pool.run(Box::new(job)).is_ok());
        }
        assert_eq!((wait.recv(), wait.recv()), (Ok(()), Ok(())));
        assert!(caught() >= before + 10);
        assert!(pool.is_whole());
        assert!(pool.stop());
        assert!(pool.run(Box::new(|| ())).is_err());
    }
}
