//! Lists and mappings that store how deeply they are nested, so that no template can nest them without limit.

use std::fmt;
use std::sync::Arc;

use minijinja::value::{DynObject, Enumerator, Object, ObjectRepr, Value as Variable};
use minijinja::{Error, ErrorKind, State};

/// Maximum nesting of lists and mappings. Deeper nesting could overflow the stack when a value is printed or dropped. JSON from the
/// wire has at most 128 levels.
const MAX_DEPTH: usize = 200;

/// A list or a mapping, and its depth.
pub(super) struct Made {
    inner: DynObject,
    depth: usize,
}

impl Made {
    /// `value` with its depth, if it is a list or a mapping.
    pub(super) fn with_depth(value: Variable, depth: usize) -> Variable {
        match value.as_object() {
            Some(inner) => Variable::from_object(Self {
                inner: inner.clone(),
                depth,
            }),
            None => value,
        }
    }
}

impl fmt::Debug for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Object for Made {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        self.inner.repr()
    }

    fn get_value(self: &Arc<Self>, key: &Variable) -> Option<Variable> {
        self.inner.get_value(key)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Variable> {
        self.inner.get_value_by_str(key)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.inner.enumerate()
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        self.inner.enumerator_len()
    }
}

/// Whether a value may change after it was created, or refers to one that may. Within another value, it could contain itself.
pub(super) fn is_alive(object: &DynObject) -> bool {
    let name = object.type_name();
    name.ends_with("::Namespace") || name.ends_with("::Loop")
}

/// The result of an operation or a call. An iterator becomes a list. It may be nested at most [`MAX_DEPTH`] levels deep.
///
/// # Errors
/// The value is nested too deeply, or contains a namespace; out of fuel.
pub(super) fn made(state: &State, value: Variable) -> Result<Variable, Error> {
    let Some(object) = value.as_object() else {
        return Ok(value);
    };
    if object.downcast_ref::<Made>().is_some() || is_alive(object) {
        return Ok(value);
    }
    if value.is_tuple() {
        depth_of(state, &value)?;
        return Ok(value);
    }
    match object.repr() {
        ObjectRepr::Seq if object.downcast_ref::<Vec<Variable>>().is_some() => {
            let depth = depth_of(state, &value)?;
            Ok(Made::with_depth(value, depth))
        }
        ObjectRepr::Seq | ObjectRepr::Iterable => {
            let mut items: Vec<Variable> = Vec::new();
            for item in value.try_iter()?.checked() {
                state.consume_fuel(1)?;
                items.push(item?);
            }
            list(state, items)
        }
        ObjectRepr::Map => {
            let depth = depth_of(state, &value)?;
            Ok(Made::with_depth(value, depth))
        }
        _ => Ok(value),
    }
}

/// A list of these items.
///
/// # Errors
/// Those of [`made`].
pub(super) fn list(state: &State, items: Vec<Variable>) -> Result<Variable, Error> {
    let value = Variable::from(items);
    let depth = depth_of(state, &value)?;
    Ok(Made::with_depth(value, depth))
}

/// Number of nested levels of lists and mappings in `value`.
fn depth_of(state: &State, value: &Variable) -> Result<usize, Error> {
    depth_within(state, value, MAX_DEPTH)
}

fn depth_within(state: &State, value: &Variable, most: usize) -> Result<usize, Error> {
    let Some(object) = value.as_object() else {
        return Ok(0);
    };
    let depth = match object.downcast_ref::<Made>() {
        Some(made) => made.depth,
        None if is_alive(object) => {
            let message = "a namespace or a loop can be no part of a list or a mapping";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        None if object.repr() == ObjectRepr::Plain => 0,
        None if most == 0 => return Err(too_deep()),
        None => {
            state.consume_fuel(1)?;
            state.consume_fuel(object.enumerator_len().unwrap_or(0) as u64 / 32)?;
            let mut deepest = 0;
            let pairs = object.repr() == ObjectRepr::Map;
            for (key, item) in object.try_iter_pairs().into_iter().flatten() {
                deepest = deepest.max(depth_within(state, &item, most - 1)?);
                if pairs {
                    deepest = deepest.max(depth_within(state, &key, most - 1)?);
                }
            }
            deepest + 1
        }
    };
    if depth > most {
        return Err(too_deep());
    }
    Ok(depth)
}

fn too_deep() -> Error {
    let message = format!("lists and mappings are nested deeper than {MAX_DEPTH} levels");
    Error::new(ErrorKind::InvalidOperation, message)
}
