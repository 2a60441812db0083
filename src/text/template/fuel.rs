//! What the operations of a template cost that minijinja takes nothing for: they are bounded by the same fuel.
//!
//! minijinja counts instructions, bytes that are made and items that are visited. It does not count what lies deeper: comparing,
//! hashing or writing a list that holds another one twice, which holds another one twice.

use std::fmt::{self, Write};

use minijinja::value::{Kwargs, Rest, Tuple, Value as Variable, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::made;
use super::slice::{places, sliced_text};

/// Bytes of data that one unit of fuel stands for.
const BYTES: usize = 64;
/// What a byte costs of a text that a list or a mapping is written into.
pub(super) const WRITTEN: usize = 16;
/// What it costs to come by a value within another one.
const NODE: u64 = 32;
/// Times that an item may be compared with others when a list is sorted.
const COMPARISONS: u64 = 24;

// Names that no template can write.
pub(super) const MADE: &str = "=made";
pub(super) const STORED: &str = "=stored";
pub(super) const READ: &str = "=read";
pub(super) const ITERATED: &str = "=iterated";
pub(super) const WEIGHED: &str = "=weighed";
pub(super) const IS_LIST: &str = "=is_list";
pub(super) const JOINED: &str = "=joined";
pub(super) const SLICED: &str = "=sliced";
pub(super) const CONCAT: &str = "=concat";
pub(super) const MAPPING: &str = "=mapping";
pub(super) const FILTERED: &str = "=filtered";
pub(super) const TESTED: &str = "=tested";

/// Filters whose cost does not depend on what lies within the items of their input.
const FLAT: [&str; 16] = [
    "attr", "batch", "chain", "count", "d", "default", "first", "items", "last", "length", "list",
    "reverse", "slice", "string", "tojson", "zip",
];
/// Filters that call another one, or a test, for each item.
const EACH: [&str; 5] = ["map", "reject", "rejectattr", "select", "selectattr"];
/// Filters that iterate over their input, which None is not for; those that minijinja itself refuses it for left out.
const ITERATING: [&str; 10] = [
    "batch", "groupby", "join", "list", "max", "min", "slice", "sort", "sum", "unique",
];
/// Filters that compare items with one another.
const COMPARING: [&str; 6] = ["dictsort", "groupby", "max", "min", "sort", "unique"];
/// Adds the filters that stand in place of operations, and bounds those that templates name.
pub(super) fn install(environment: &mut Environment) {
    environment.add_filter(MADE, |state: &State, value: Variable| {
        made::made(state, value)
    });
    environment.add_filter(STORED, stored);
    environment.add_filter(READ, |value: Variable| value);
    environment.add_filter(ITERATED, |value: Variable| iterated(&value).map(|()| value));
    environment.add_filter(WEIGHED, |state: &State, value: Variable| {
        weigh(state, &value, 1).map(|()| value)
    });
    environment.add_filter(IS_LIST, |value: &Variable| {
        is_list(value) && !value.is_tuple()
    });
    environment.add_filter(JOINED, joined);
    environment.add_filter(SLICED, sliced);
    environment.add_filter(CONCAT, concat);
    environment.add_filter(MAPPING, mapping);
    environment.add_filter(FILTERED, filtered);
    environment.add_filter(TESTED, tested);
    environment.add_filter("join", join);
    environment.add_filter("sum", sum);
    // They show a render's whole state.
    environment.remove_global("debug");
    environment.remove_filter("pprint");
}

/// Whether a value is a list to Python, or something that it iterates over.
fn is_list(value: &Variable) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

/// Refuses None where Python would iterate over it; minijinja takes it as an empty list.
///
/// # Errors
/// Says so in Python's words.
fn iterated(value: &Variable) -> Result<(), Error> {
    if value.is_none() {
        return Err(refuse("'NoneType' object is not iterable"));
    }
    Ok(())
}

fn refuse(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Takes the fuel for looking at all that a value holds, `times` times.
///
/// # Errors
/// Out of fuel.
pub(super) fn weigh(state: &State, value: &Variable, times: u64) -> Result<(), Error> {
    let mut left = budget(state);
    let before = left;
    let fits = take(value, times, &mut left);
    pay(state, before - left)?;
    if fits {
        Ok(())
    } else {
        Err(out_of_fuel(state))
    }
}

/// Bytes that the fuel is left for.
fn budget(state: &State) -> u64 {
    state
        .fuel_levels()
        .map_or(u64::MAX, |(_, left)| left.saturating_mul(BYTES as u64))
}

fn pay(state: &State, bytes: u64) -> Result<(), Error> {
    state.consume_fuel(bytes / BYTES as u64)
}

fn out_of_fuel(state: &State) -> Error {
    state
        .consume_fuel(u64::MAX)
        .err()
        .unwrap_or_else(|| Error::from(ErrorKind::OutOfFuel))
}

/// Takes what a value weighs off `left`; false where that is not enough.
fn take(value: &Variable, times: u64, left: &mut u64) -> bool {
    let own = NODE + value.as_str().map_or(0, str::len) as u64;
    let Some(rest) = left.checked_sub(own.saturating_mul(times)) else {
        return false;
    };
    *left = rest;
    let Some(object) = value.as_object() else {
        return true;
    };
    if made::is_alive(object) {
        // It may hold itself.
        return false;
    }
    let pairs = value.kind() == ValueKind::Map;
    object
        .try_iter_pairs()
        .into_iter()
        .flatten()
        .all(|(key, item)| (!pairs || take(&key, times, left)) && take(&item, times, left))
}

/// A text that ends where the fuel does.
struct Text {
    text: String,
    most: u64,
}

impl Write for Text {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        if (self.text.len() + more.len()) as u64 > self.most {
            return Err(fmt::Error);
        }
        self.text.push_str(more);
        Ok(())
    }
}

/// A value as it is printed.
///
/// # Errors
/// Out of fuel; a namespace, which may hold itself.
pub(super) fn text_of(state: &State, value: &Variable) -> Result<String, Error> {
    let Some(object) = value.as_object() else {
        return Ok(value.to_string());
    };
    if made::is_alive(object) {
        return Err(refuse("a namespace or a loop cannot be written as text"));
    }
    let mut out = Text {
        text: String::new(),
        most: budget(state) / WRITTEN as u64,
    };
    if write!(out, "{value}").is_err() {
        return Err(out_of_fuel(state));
    }
    pay(state, (out.text.len() * (WRITTEN - 1)) as u64)?;
    Ok(out.text)
}

/// Refuses a text of so many bytes that there is no fuel for.
///
/// # Errors
/// Out of fuel.
pub(super) fn check_bytes(state: &State, bytes: usize) -> Result<(), Error> {
    if bytes as u64 > budget(state) {
        return Err(out_of_fuel(state));
    }
    Ok(())
}

/// Checks a value that is assigned to a namespace, which must not contain itself.
fn stored(state: &State, value: Variable) -> Result<Variable, Error> {
    if value.as_object().is_some_and(made::is_alive) {
        return Err(refuse(
            "a namespace or a loop can be no part of a namespace",
        ));
    }
    made::made(state, value)
}

/// `a + b` of lists.
fn joined(state: &State, a: &Variable, b: &Variable) -> Result<Variable, Error> {
    if !is_list(a) || a.is_tuple() {
        let message = format!("tried to add a list to a value of type {}", a.kind());
        return Err(refuse(message));
    }
    let count = a.len().unwrap_or(0) + b.len().unwrap_or(0);
    // A place in a list has 24 bytes, and the list grows.
    check_bytes(state, count.saturating_mul(32))?;
    state.consume_fuel(count as u64 / 4)?;
    let mut items = Vec::with_capacity(count);
    for item in a.try_iter()?.checked().chain(b.try_iter()?.checked()) {
        items.push(item?);
    }
    made::list(state, items)
}

/// `a ~ b`
fn concat(state: &State, a: &Variable, b: &Variable) -> Result<String, Error> {
    let length = |value: &Variable| value.as_str().map_or(0, str::len);
    check_bytes(state, length(a) + length(b))?;
    let mut text = text_of(state, a)?;
    match b.as_str() {
        Some(b) => text.push_str(b),
        None => text.push_str(&text_of(state, b)?),
    }
    Ok(text)
}

/// `{key: value, ...}`
fn mapping(state: &State, Rest(items): Rest<Variable>) -> Result<Variable, Error> {
    let (pairs, _) = items.as_chunks::<2>();
    for [key, _] in pairs {
        weigh(state, key, 1)?;
    }
    state.consume_fuel(pairs.len() as u64)?;
    let pairs = pairs
        .iter()
        .map(|[key, value]| (key.clone(), value.clone()));
    made::made(state, Variable::from_pairs(pairs))
}

/// `value[start:stop:step]`
fn sliced(
    state: &State,
    value: &Variable,
    start: &Variable,
    stop: &Variable,
    step: &Variable,
) -> Result<Variable, Error> {
    let number = |value: &Variable| -> Result<Option<i64>, Error> {
        if value.is_none() {
            return Ok(None);
        }
        i64::try_from(value.clone()).map(Some)
    };
    let (start, stop, step) = (number(start)?, number(stop)?, number(step)?.unwrap_or(1));
    if step == 0 {
        return Err(refuse("cannot slice by step size of 0"));
    }
    if let Some(text) = value.as_str() {
        return Ok(Variable::from(sliced_text(text, start, stop, step)));
    }
    if value.is_none() || value.is_undefined() {
        return made::list(state, Vec::new());
    }
    if !is_list(value) {
        let message = format!("value of type {} cannot be sliced", value.kind());
        return Err(refuse(message));
    }
    let value = if value.is_tuple() {
        value.clone()
    } else {
        made::made(state, value.clone())?
    };
    let places = places(value.len().unwrap_or(0), start, stop, step);
    state.consume_fuel(places.clone().count() as u64 / 4)?;
    let items: Vec<Variable> = places
        .map(|at| value.get_item_by_index(at))
        .collect::<Result<_, _>>()?;
    if value.is_tuple() {
        return Ok(Variable::from(Tuple::from(items)));
    }
    made::list(state, items)
}

/// Calls a filter with a tuple of arguments, once what its input holds is paid for.
fn filtered(state: &mut State, args: &Variable, name: &str) -> Result<Variable, Error> {
    let args: Vec<Variable> = args.try_iter()?.collect();
    let Some((input, others)) = args.split_first() else {
        return Err(refuse("a filter needs a value"));
    };
    pay(state, input.as_str().map_or(0, str::len) as u64)?;
    if ITERATING.contains(&name) {
        iterated(input)?;
    }
    if EACH.contains(&name) {
        let called = others.iter().skip(usize::from(name.ends_with("attr")));
        let called: Vec<&Variable> = called.take_while(|arg| !arg.is_kwargs()).collect();
        if let [called, arguments @ ..] = called.as_slice() {
            // A filter may look at all of an item, a test at as much of it as its argument has.
            let flat = called.as_str().is_some_and(|called| FLAT.contains(&called));
            if name == "map" && !flat {
                weigh(state, input, 1)?;
            }
            for argument in arguments {
                weigh(state, argument, input.len().unwrap_or(1) as u64)?;
            }
        }
    } else if !FLAT.contains(&name) {
        let times = if COMPARING.contains(&name) {
            COMPARISONS
        } else {
            1
        };
        for arg in &args {
            weigh(state, arg, times)?;
        }
    }
    if matches!(name, "split" | "lines")
        && let Some(text) = input.as_str()
    {
        check_pieces(state, text, others.first().and_then(Variable::as_str))?;
    }
    let made = state.apply_filter(name, &args)?;
    made::made(state, made)
}

/// Calls a test with a tuple of arguments, once what they hold is paid for: no test looks at more of its value than it compares
/// with.
fn tested(state: &mut State, args: &Variable, name: &str) -> Result<bool, Error> {
    let args: Vec<Variable> = args.try_iter()?.collect();
    for (at, arg) in args.iter().enumerate() {
        if at > 0 || arg.as_str().is_some() || name == "in" {
            weigh(state, arg, 1)?;
        }
    }
    state.perform_test(name, &args)
}

/// Refuses to cut a text into more pieces than there is fuel for.
///
/// # Errors
/// Out of fuel.
pub(super) fn check_pieces(
    state: &State,
    text: &str,
    separator: Option<&str>,
) -> Result<(), Error> {
    let pieces = match separator {
        Some(separator) if !separator.is_empty() => text.matches(separator).count(),
        _ => text.len() / 2,
    };
    check_bytes(state, pieces.saturating_mul(64))
}

/// The items of a list as one text.
///
/// # Errors
/// Out of fuel.
pub(super) fn joined_text(
    state: &State,
    items: &Variable,
    separator: &str,
    attribute: Option<&str>,
) -> Result<String, Error> {
    let mut text = String::new();
    for (at, item) in items.try_iter()?.checked().enumerate() {
        let mut item = item?;
        if let Some(attribute) = attribute {
            for part in attribute.split('.') {
                item = item.get_attr(part)?;
            }
        }
        if at > 0 {
            text.push_str(separator);
        }
        match item.as_str() {
            Some(item) => text.push_str(item),
            None => text.push_str(&text_of(state, &item)?),
        }
        state.consume_fuel(1)?;
        check_bytes(state, text.len())?;
    }
    Ok(text)
}

/// `join(d='', attribute=None)`
#[expect(
    clippy::needless_pass_by_value,
    reason = "a minijinja filter takes its keyword arguments by value"
)]
fn join(
    state: &State,
    items: &Variable,
    Rest(args): Rest<Variable>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let separator = option(&args, &kwargs, 0, "d")?.unwrap_or_default();
    let attribute = option(&args, &kwargs, 1, "attribute")?.unwrap_or_default();
    kwargs.assert_all_used()?;
    joined_text(
        state,
        items,
        &text_of(state, &separator)?,
        attribute.as_str(),
    )
}

/// A keyword argument, or the positional one at `at`.
pub(super) fn option(
    args: &[Variable],
    kwargs: &Kwargs,
    at: usize,
    name: &str,
) -> Result<Option<Variable>, Error> {
    match args.get(at) {
        Some(given) => Ok(Some(given.clone())),
        None => kwargs.get(name),
    }
}

/// `sum(attribute=None, start=0)`, of numbers or of lists.
fn sum(
    state: &State,
    items: Variable,
    Rest(args): Rest<Variable>,
    kwargs: Kwargs,
) -> Result<Variable, Error> {
    let start = option(&args, &kwargs, 1, "start")?.unwrap_or_else(|| Variable::from(0));
    if start.as_str().is_some() {
        return Err(refuse("sum() can't sum strings [use ''.join(seq) instead]"));
    }
    let attribute = option(&args, &kwargs, 0, "attribute")?;
    if !is_list(&start) {
        let attribute = attribute.as_ref().and_then(Variable::as_str);
        return minijinja::filters::sum(state, items, attribute, Some(start), kwargs);
    }
    kwargs.assert_all_used()?;
    let mut all: Vec<Variable> = start.try_iter()?.collect();
    for item in items.try_iter()?.checked() {
        let item = match attribute.as_ref().and_then(Variable::as_str) {
            Some(attribute) => item?.get_attr(attribute)?,
            None => item?,
        };
        state.consume_fuel(1 + item.len().unwrap_or(0) as u64 / 4)?;
        for part in item.try_iter()?.checked() {
            all.push(part?);
        }
    }
    made::list(state, all)
}

#[cfg(test)]
mod tests;
