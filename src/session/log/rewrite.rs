//! Writes a log anew beside itself, a chunk of sessions at a time.

use std::io;

use super::append::{Chain, Staged};
use super::fault::LogFault;
use super::{LogStorage, SessionLog};
use crate::session::state::{Gone, SessionKey, SessionState};

/// Sessions that are copied at a time where nothing else waits.
const CHUNK: usize = 256;

/// A rewrite that is under way.
#[derive(Debug)]
pub(super) struct Rewrite {
    pub(super) chain: Chain,
    /// The last session that was copied.
    pub(super) last: Option<SessionKey>,
    pub(super) len: u64,
}

impl<S: LogStorage> SessionLog<S> {
    /// Whether most of the log is out of date, where `live` bytes would do.
    pub fn wants_rewrite(&self, live: u64) -> bool {
        let garbage = self.len.saturating_sub(live);
        self.rewrite.is_none() && garbage > live && garbage > self.options.min_garbage
    }

    /// Whether a rewrite is under way.
    pub const fn is_rewriting(&self) -> bool {
        self.rewrite.is_some()
    }

    /// Begins a rewrite.
    ///
    /// # Errors
    /// Those of the file. The log is as it was.
    pub fn begin_rewrite(&mut self) -> io::Result<()> {
        let head = self.head();
        self.storage.begin_rewrite()?;
        self.storage.append_rewrite(&head)?;
        self.rewrite = Some(Rewrite {
            chain: Chain::default(),
            last: None,
            len: head.len() as u64,
        });
        Ok(())
    }

    /// Copies the next sessions to the new file, which replaces the log behind the last of them. `next` gives some of the
    /// store's sessions in order, those behind a key, and `gone` those that are remembered as gone.
    ///
    /// # Errors
    /// Those of the file. The rewrite is given up then, and the log is as it was.
    pub fn rewrite_some(
        &mut self,
        next: impl FnOnce(Option<SessionKey>) -> Vec<(SessionKey, SessionState)>,
        gone: impl FnOnce() -> Vec<(SessionKey, Gone)>,
    ) -> io::Result<()> {
        let Some(mut rewrite) = self.rewrite.take() else {
            return Ok(());
        };
        let sessions = next(rewrite.last.clone());
        let mut staged = Staged::new(&rewrite.chain, &self.tags, self.marker);
        for (key, state) in &sessions {
            staged.put(key, None, state).map_err(io::Error::other)?;
        }
        let last = sessions.last().map(|(key, _)| key.clone());
        if last.is_none() {
            for (key, gone) in gone() {
                staged.gone(&key, gone).map_err(io::Error::other)?;
            }
        }
        let (bytes, links) = staged.finish();
        self.storage.append_rewrite(&bytes)?;
        rewrite.chain.take(links);
        rewrite.len += bytes.len() as u64;
        if last.is_some() {
            rewrite.last = last;
            self.rewrite = Some(rewrite);
            return Ok(());
        }
        let was_suspect = self.suspect;
        let fault = self.fault.take();
        self.begin_write();
        if let Err(e) = self.storage.finish_rewrite() {
            (self.suspect, self.fault) = (was_suspect, fault);
            return Err(e);
        }
        self.chain = rewrite.chain;
        self.len = rewrite.len;
        self.synced = rewrite.len;
        (self.suspect, self.fault) = (false, None);
        if let Err(e) = self.storage.sync_place() {
            // After the machine's death the old log might be there again, and with it what was refused.
            self.suspend(LogFault::of(&e));
            return Err(e);
        }
        if was_suspect {
            // Where the word stays, the next server writes the log anew for nothing.
            drop(self.storage.mark_suspect(false));
        }
        Ok(())
    }

    /// Writes the whole log anew, whatever is on the disk; `next` and `gone` as for [`Self::rewrite_some`].
    ///
    /// # Errors
    /// As [`Self::rewrite_some`]. A log that was suspect stays so.
    pub fn rewrite_all(
        &mut self,
        mut next: impl FnMut(Option<SessionKey>, usize) -> Vec<(SessionKey, SessionState)>,
        mut gone: impl FnMut() -> Vec<(SessionKey, Gone)>,
    ) -> io::Result<()> {
        let rewritten = self.begin_rewrite().and_then(|()| {
            while self.is_rewriting() {
                self.rewrite_some(|last| next(last, CHUNK), &mut gone)?;
            }
            Ok(())
        });
        if let Err(e) = &rewritten
            && self.suspect
        {
            self.fault = Some(LogFault::of(e));
        }
        rewritten
    }
}
