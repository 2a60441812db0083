//! Passes finished bytes from the engine's thread to the readers of streams, with one wake-up per step.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Wakes one reader for any number of streams with new bytes. It uses a socket pair, so an event loop on any Unix can wait for it.
#[derive(Debug)]
pub struct Wake {
    sender: UnixStream,
    receiver: UnixStream,
    signalled: AtomicBool,
    ready: Mutex<Vec<u64>>,
}

impl Wake {
    /// A new socket pair.
    ///
    /// # Errors
    /// `internal_error` if the process has no file descriptor left.
    pub fn new() -> Result<Self> {
        let pair = || {
            let (sender, receiver) = UnixStream::pair()?;
            sender.set_nonblocking(true)?;
            receiver.set_nonblocking(true)?;
            Ok((sender, receiver))
        };
        let (sender, receiver) = pair().map_err(|e: std::io::Error| {
            Error::internal(format!("no socket pair to wake the server with: {e}"))
        })?;
        Ok(Self {
            sender,
            receiver,
            signalled: AtomicBool::new(false),
            ready: Mutex::new(Vec::new()),
        })
    }

    /// The descriptor that is readable while a stream has new bytes.
    pub fn fd(&self) -> RawFd {
        self.receiver.as_raw_fd()
    }

    fn ready(&self) -> MutexGuard<'_, Vec<u64>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the reader, if a stream has new bytes.
    pub fn signal(&self) {
        if self.ready().is_empty() || self.signalled.swap(true, Ordering::AcqRel) {
            return;
        }
        if (&self.sender).write(&[1]).is_err() {
            // Nothing was sent, so the next call must try again.
            self.signalled.store(false, Ordering::Release);
        }
    }

    /// Returns the ids of the streams with new bytes.
    pub fn drain(&self) -> Vec<u64> {
        let mut sent = [0_u8; 16];
        while (&self.receiver)
            .read(&mut sent)
            .is_ok_and(|count| count == sent.len())
        {}
        // From here on, a new signal sends again. This call or the next one returns the stream that it was for.
        self.signalled.store(false, Ordering::Release);
        std::mem::take(&mut *self.ready())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Accepted,
    Ended,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    bytes: Vec<u8>,
    error: Option<Error>,
    /// Whether it is listed as having new bytes since the last `drain`.
    listed: bool,
}

/// Maximum number of unread bytes of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadLimits {
    /// If more bytes are unread, new text of a choice waits and becomes one frame.
    pub merge_above: usize,
    /// If more bytes are unread or wait, the stream ends with an error, and its request is aborted.
    pub most: usize,
}

impl Default for ReadLimits {
    fn default() -> Self {
        Self {
            merge_above: 64 << 10,
            most: 8 << 20,
        }
    }
}

/// One stream's finished bytes. [`super::Reply`] keeps them within the limits, except for the frames that end a stream.
#[derive(Debug)]
pub struct Mailbox {
    id: u64,
    wake: Arc<Wake>,
    limits: ReadLimits,
    state: Mutex<State>,
}

/// The result of a poll.
#[derive(Debug, PartialEq)]
pub enum Poll {
    /// Not yet known whether the request is accepted.
    Waiting,
    /// Accepted, with the bytes since the last poll.
    Accepted(Vec<u8>),
    /// Ended, with the last bytes.
    Ended(Vec<u8>),
    /// Refused, or failed before its first byte.
    Failed(Error),
}

impl Mailbox {
    /// An empty mailbox of stream `id`.
    pub fn new(id: u64, wake: Arc<Wake>) -> Arc<Self> {
        Self::with_limits(id, wake, ReadLimits::default())
    }

    /// An empty mailbox of stream `id` with these limits.
    pub fn with_limits(id: u64, wake: Arc<Wake>, limits: ReadLimits) -> Arc<Self> {
        let state = State {
            phase: Phase::Waiting,
            bytes: Vec::new(),
            error: None,
            listed: false,
        };
        Arc::new(Self {
            id,
            wake,
            limits,
            state: Mutex::new(state),
        })
    }

    /// The stream's id.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// How many bytes the reader may leave unread.
    pub const fn limits(&self) -> ReadLimits {
        self.limits
    }

    /// Bytes that the reader has not taken yet.
    pub fn unread(&self) -> usize {
        self.state().bytes.len()
    }

    /// Whether the stream has ended.
    pub fn is_ended(&self) -> bool {
        self.state().phase == Phase::Ended
    }

    /// Wakes the reader, if a stream has new bytes.
    pub fn signal(&self) {
        self.wake.signal();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        if state.phase == Phase::Ended {
            return;
        }
        change(&mut state);
        if !state.listed {
            state.listed = true;
            self.wake.ready().push(self.id);
        }
    }

    /// Records that the request was accepted: a streaming reply may send its status now.
    pub fn accept(&self) {
        self.change(|state| state.phase = Phase::Accepted);
    }

    /// Appends bytes by `write`. If it writes nothing, the reader is not woken.
    pub fn write(&self, write: impl FnOnce(&mut Vec<u8>)) {
        self.change(|state| {
            state.phase = Phase::Accepted;
            write(&mut state.bytes);
        });
    }

    /// Appends the last bytes and ends the stream.
    pub fn end(&self, write: impl FnOnce(&mut Vec<u8>)) {
        self.change(|state| {
            write(&mut state.bytes);
            state.phase = Phase::Ended;
        });
    }

    /// Discards the unread bytes, and ends the stream with `frame`.
    pub fn cut(&self, frame: impl FnOnce(&mut Vec<u8>)) {
        self.change(|state| {
            state.bytes = Vec::new();
            frame(&mut state.bytes);
            state.phase = Phase::Ended;
        });
    }

    /// Ends the stream with an error. After the first byte, `frame` writes it as the stream's last frame. Before it, the reader
    /// gets the error itself.
    pub fn fail(&self, error: Error, whole: bool, frame: impl FnOnce(&Error, &mut Vec<u8>)) {
        self.change(|state| {
            if state.phase == Phase::Waiting || whole {
                state.error = Some(error);
            } else {
                frame(&error, &mut state.bytes);
            }
            state.phase = Phase::Ended;
        });
    }

    /// Takes the bytes since the last poll.
    pub fn poll(&self) -> Poll {
        let mut state = self.state();
        state.listed = false;
        if let Some(error) = &state.error {
            return Poll::Failed(error.clone());
        }
        let bytes = std::mem::take(&mut state.bytes);
        match state.phase {
            Phase::Waiting => Poll::Waiting,
            Phase::Accepted => Poll::Accepted(bytes),
            Phase::Ended => Poll::Ended(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn error() -> Error {
        Error::new(Kind::Internal, "internal_error", "broken")
    }

    #[test]
    fn one_wake_lists_each_stream_once() {
        let wake = Arc::new(Wake::new().unwrap());
        let (a, b) = (
            Mailbox::new(1, Arc::clone(&wake)),
            Mailbox::new(2, Arc::clone(&wake)),
        );
        a.accept();
        a.write(|out| out.extend_from_slice(b"x"));
        b.accept();
        wake.signal();
        assert_eq!(wake.drain(), [1, 2]);
        assert!(wake.drain().is_empty());
        assert_eq!(a.poll(), Poll::Accepted(b"x".to_vec()));
        a.end(|out| out.extend_from_slice(b"y"));
        assert_eq!(wake.drain(), [1]);
        assert_eq!(a.poll(), Poll::Ended(b"y".to_vec()));
    }

    #[test]
    fn an_error_before_the_first_byte_is_handed_over_and_after_it_is_a_frame() {
        let wake = Arc::new(Wake::new().unwrap());
        let early = Mailbox::new(1, Arc::clone(&wake));
        early.fail(error(), false, |_, _| panic!("no frame"));
        assert_eq!(early.poll(), Poll::Failed(error()));
        let late = Mailbox::new(2, Arc::clone(&wake));
        late.accept();
        late.fail(error(), false, |e, out| {
            out.extend_from_slice(e.message.as_bytes());
        });
        assert_eq!(late.poll(), Poll::Ended(b"broken".to_vec()));
        let whole = Mailbox::new(3, wake);
        whole.accept();
        whole.fail(error(), true, |_, _| panic!("no frame"));
        assert_eq!(whole.poll(), Poll::Failed(error()));
    }

    #[test]
    fn nothing_comes_after_the_end() {
        let wake = Arc::new(Wake::new().unwrap());
        let mailbox = Mailbox::new(1, wake);
        mailbox.end(|out| out.extend_from_slice(b"z"));
        mailbox.write(|_| panic!("ended"));
        assert_eq!(mailbox.poll(), Poll::Ended(b"z".to_vec()));
    }
}
