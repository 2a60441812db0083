//! The adapters that requests may name, and how many requests use each.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::locks::lock;
use crate::error::{Error, Kind, Result};
use crate::kv::Owner;
use crate::session::{AdapterDigest, TurnHistory};

#[derive(Debug)]
struct Loaded {
    name: String,
    digest: AdapterDigest,
    /// Number of requests that use it and have not ended.
    open: usize,
}

/// The adapters that are loaded, by their numbers.
#[derive(Debug, Default)]
pub(super) struct Adapters(Mutex<BTreeMap<u32, Loaded>>);

/// A request's use of its adapter. The adapter stays loaded until this is dropped.
#[derive(Debug)]
pub(super) struct AdapterUse {
    adapters: Arc<Adapters>,
    pub(super) number: u32,
    pub(super) digest: AdapterDigest,
}

impl Adapters {
    /// Lets requests use an adapter that the model has loaded.
    ///
    /// # Errors
    /// `invalid_value` (400) for a number that is out of range or taken.
    pub(super) fn add(&self, number: u32, name: String, digest: AdapterDigest) -> Result<()> {
        let mut adapters = lock(&self.0);
        if !(1..=Owner::MOST_ADAPTERS).contains(&number) || adapters.contains_key(&number) {
            let message = format!(
                "an adapter's number must lie in [1, {}] and be free, but {number} was given",
                Owner::MOST_ADAPTERS
            );
            return Err(Error::invalid("adapter", message));
        }
        let loaded = Loaded {
            name,
            digest,
            open: 0,
        };
        adapters.insert(number, loaded);
        Ok(())
    }

    /// Removes an adapter, so that no new request can use it.
    ///
    /// # Errors
    /// `adapter_in_use` (409) while requests use it; 404 if no adapter has this number.
    pub(super) fn remove(&self, number: u32) -> Result<()> {
        let mut adapters = lock(&self.0);
        let Some(loaded) = adapters.get(&number) else {
            return Err(unknown(number));
        };
        if loaded.open > 0 {
            let message = format!(
                "{} requests use the adapter {}; unload it once they have ended",
                loaded.open, loaded.name
            );
            return Err(Error::new(Kind::Conflict, "adapter_in_use", message)
                .with_param("lora_name")
                .with_detail("retry_after", 1));
        }
        adapters.remove(&number);
        Ok(())
    }

    /// Begins a request's use of an adapter. `given` is the adapter's number; 0 is no adapter. If absent, the request uses the
    /// adapter of its session's turns.
    ///
    /// # Errors
    /// `model_not_found` (404) for an adapter that is not loaded any more; `session_adapter_mismatch` (409) if another adapter
    /// computed the session's turns.
    pub(super) fn begin(
        self: &Arc<Self>,
        given: Option<u32>,
        base: &TurnHistory,
    ) -> Result<Option<AdapterUse>> {
        let mut adapters = lock(&self.0);
        let had = base.adapter.filter(|_| !base.turns.is_empty());
        let number = match (given, had) {
            (Some(number), _) => number,
            (None, None) => 0,
            (None, Some(digest)) => number_of(&adapters, digest)
                .ok_or_else(|| mismatch(&named(&adapters, had), None))?,
        };
        let loaded = adapters.get(&number).map(|loaded| loaded.digest);
        if number > 0 && loaded.is_none() {
            return Err(unknown(number));
        }
        if !base.turns.is_empty() && had != loaded {
            let asked = named(&adapters, loaded);
            return Err(mismatch(&named(&adapters, had), Some(&asked)));
        }
        Ok(adapters.get_mut(&number).map(|loaded| {
            loaded.open += 1;
            AdapterUse {
                adapters: Arc::clone(self),
                number,
                digest: loaded.digest,
            }
        }))
    }

    /// The owner of the cached blocks that a session computed with this adapter. None: the adapter is not loaded.
    pub(super) fn owner(&self, tenant: u32, digest: Option<AdapterDigest>) -> Option<Owner> {
        let Some(digest) = digest else {
            return Some(tenant.into());
        };
        let adapter = number_of(&lock(&self.0), digest)?;
        Some(Owner { tenant, adapter })
    }
}

fn number_of(adapters: &BTreeMap<u32, Loaded>, digest: AdapterDigest) -> Option<u32> {
    let mut known = adapters.iter();
    let (&number, _) = known.find(|(_, loaded)| loaded.digest == digest)?;
    Some(number)
}

/// `asked`: the model that the turn names, if it names one.
fn mismatch(had: &str, asked: Option<&str>) -> Error {
    let message = asked.map_or_else(
        || format!("the session's turns were computed with {had}; load it, or begin a session"),
        |asked| {
            format!(
                "the session's turns were computed with {had}, but this turn asks for {asked}; name the session's \
                 model, or begin a session"
            )
        },
    );
    Error::new(Kind::Conflict, "session_adapter_mismatch", message).with_param("model")
}

/// An adapter as error messages name it.
fn named(adapters: &BTreeMap<u32, Loaded>, digest: Option<AdapterDigest>) -> String {
    let Some(digest) = digest else {
        return "no adapter".to_owned();
    };
    let mut known = adapters.values();
    known.find(|loaded| loaded.digest == digest).map_or_else(
        || "an adapter that is not loaded".to_owned(),
        |loaded| format!("the adapter {}", loaded.name),
    )
}

impl Drop for AdapterUse {
    fn drop(&mut self) {
        if let Some(loaded) = lock(&self.adapters.0).get_mut(&self.number) {
            loaded.open -= 1;
        }
    }
}

fn unknown(number: u32) -> Error {
    let message = format!("adapter {number} is not loaded");
    Error::new(Kind::NotFound, "model_not_found", message).with_param("model")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Turn;
    use crate::text::Tail;

    fn loaded() -> Arc<Adapters> {
        let adapters = Arc::new(Adapters::default());
        adapters.add(1, "sql".to_owned(), [1; 32]).unwrap();
        adapters.add(2, "poems".to_owned(), [2; 32]).unwrap();
        adapters
    }

    #[test]
    fn an_adapter_leaves_only_when_no_request_uses_it() {
        let (adapters, base) = (loaded(), TurnHistory::empty());
        let used = adapters.begin(Some(1), &base).unwrap();
        let error = adapters.remove(1).unwrap_err();
        assert_eq!(error.code, "adapter_in_use");
        assert!(error.message.contains("1 requests use the adapter sql"));
        adapters.remove(2).unwrap();
        assert_eq!(adapters.remove(2).unwrap_err().code, "model_not_found");
        drop(used);
        adapters.remove(1).unwrap();
        let error = adapters.begin(Some(1), &base).unwrap_err();
        assert_eq!(error.code, "model_not_found");
        assert!(adapters.begin(Some(0), &base).unwrap().is_none());
        assert!(adapters.begin(None, &base).unwrap().is_none());
    }

    #[test]
    fn numbers_are_taken_once_and_have_a_limit() {
        let adapters = loaded();
        for number in [0, 1, Owner::MOST_ADAPTERS + 1] {
            let error = adapters
                .add(number, "more".to_owned(), [3; 32])
                .unwrap_err();
            assert!(error.message.contains("[1, 65535]"), "{error}");
        }
    }

    #[test]
    fn a_session_goes_on_with_its_own_adapter_alone() {
        let adapters = loaded();
        let turn = Turn {
            start: 0,
            input_tokens: 1,
            output_tokens: 1,
            tail: Tail::Closed,
            logprobs: None,
            key: None,
        };
        let base = |adapter| TurnHistory {
            turns: vec![turn.clone()],
            adapter,
            ..TurnHistory::empty()
        };
        let begun = |had, given| {
            let used = adapters.begin(given, &base(had));
            used.map(|used| used.map_or(0, |used| used.number))
        };
        let (sql, gone) = (Some([1; 32]), Some([9; 32]));
        assert_eq!(begun(None, Some(0)).unwrap(), 0);
        assert_eq!(begun(None, None).unwrap(), 0);
        assert_eq!(begun(sql, Some(1)).unwrap(), 1);
        assert_eq!(begun(sql, None).unwrap(), 1);
        for (had, given, said) in [
            (
                None,
                Some(2),
                "no adapter, but this turn asks for the adapter poems",
            ),
            (
                sql,
                Some(0),
                "the adapter sql, but this turn asks for no adapter",
            ),
            (
                sql,
                Some(2),
                "the adapter sql, but this turn asks for the adapter poems",
            ),
            (gone, Some(0), "an adapter that is not loaded, but"),
            (gone, None, "an adapter that is not loaded; load it"),
        ] {
            let error = begun(had, given).unwrap_err();
            assert_eq!(error.code, "session_adapter_mismatch");
            assert!(error.message.contains(said), "{error}");
        }
        let owner = |digest| adapters.owner(3, digest).map(|owner| owner.adapter);
        assert_eq!(owner(None), Some(0));
        assert_eq!(owner(Some([2; 32])), Some(2));
        assert_eq!(owner(Some([9; 32])), None);
    }
}
