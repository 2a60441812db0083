//! Texts that are marked as safe, with the behaviour of `markupsafe`.

use minijinja::value::{Tuple, Value as Variable, ValueKind};
use minijinja::{Environment, Error, State};

use super::fuel::{check_bytes, text_of, weigh};
use super::python::number;

/// The name of the filter [`sides`].
pub(super) const SIDES: &str = "=sides";
/// The name of the filter that tells whether a value is text.
pub(super) const IS_TEXT: &str = "=is_text";
/// The name of the filter [`formatted`].
pub(super) const FORMATTED: &str = "=formatted";
/// Filters that mark a text as safe.
pub(super) const MARKING: [&str; 4] = ["e", "escape", "forceescape", "safe"];

/// Adds the filters that mark texts, and those that replace operations.
pub(super) fn install(environment: &mut Environment) {
    environment.add_filter("e", escape);
    environment.add_filter("escape", escape);
    environment.add_filter("forceescape", force_escape);
    environment.add_filter(SIDES, sides);
    environment.add_filter(IS_TEXT, |value: &Variable| value.as_str().is_some());
    environment.add_filter(FORMATTED, formatted);
}

/// `text` with the five special characters of HTML escaped.
///
/// # Errors
/// Out of fuel.
fn escaped(state: &State, text: &str) -> Result<Variable, Error> {
    // No escaped character is longer than five bytes.
    check_bytes(state, text.len().saturating_mul(5))?;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            _ => out.push(c),
        }
    }
    state.consume_fuel(out.len() as u64 / 64)?;
    Ok(Variable::from_safe_string(out))
}

/// A value as a safe text.
///
/// # Errors
/// Out of fuel; a namespace, which may hold itself.
fn escape(state: &State, value: &Variable) -> Result<Variable, Error> {
    if value.is_safe() {
        return Ok(value.clone());
    }
    force_escape(state, value)
}

fn force_escape(state: &State, value: &Variable) -> Result<Variable, Error> {
    match value.as_str() {
        Some(text) => escaped(state, text),
        None if value.kind() == ValueKind::Number => escaped(state, &number(value)),
        None => escaped(state, &text_of(state, value)?),
    }
}

/// Both operands of an addition. If one is safe and the other is text, the other is escaped.
fn sides(state: &State, both: &Variable) -> Result<Variable, Error> {
    let (left, right) = (both.get_item_by_index(0)?, both.get_item_by_index(1)?);
    let mixed = left.as_str().is_some() && right.as_str().is_some();
    if !mixed || left.is_safe() == right.is_safe() {
        return Ok(both.clone());
    }
    let sides = [escape(state, &left)?, escape(state, &right)?];
    Ok(Variable::from(Tuple::from(sides)))
}

/// `text % values`. A tuple has a value for each field, a mapping has values by the fields' names.
fn formatted(state: &mut State, values: &Variable, text: &Variable) -> Result<Variable, Error> {
    let mut arguments = vec![text.clone()];
    if values.is_tuple() {
        arguments.extend(values.try_iter()?);
    } else {
        arguments.push(values.clone());
    }
    if text.is_safe() {
        for argument in &mut arguments[1..] {
            if argument.as_str().is_some() {
                *argument = escape(state, argument)?;
            }
        }
    }
    for argument in &arguments {
        weigh(state, argument, 1)?;
    }
    state.apply_filter("format", &arguments)
}

/// The result of a method of a safe `text`. Its arguments are escaped first.
///
/// # Errors
/// Those of `method`; out of fuel.
pub(super) fn by_method(
    state: &mut State,
    name: &str,
    args: &[Variable],
    method: impl FnOnce(&mut State, &[Variable]) -> Result<Variable, Error>,
) -> Result<Variable, Error> {
    let made = match (name, args) {
        ("join", [items]) => {
            let items = items.try_iter()?.checked().map(|item| {
                state.consume_fuel(1)?;
                escape(state, &item?)
            });
            let items: Vec<Variable> = items.collect::<Result<_, _>>()?;
            method(state, &[Variable::from(items)])?
        }
        ("format", _) => {
            let args = args.iter().map(|arg| match arg.as_str() {
                Some(_) => escape(state, arg),
                None => Ok(arg.clone()),
            });
            let args: Vec<Variable> = args.collect::<Result<_, _>>()?;
            method(state, &args)?
        }
        _ => method(state, args)?,
    };
    Ok(match made.as_str() {
        Some(text) => Variable::from_safe_string(text.to_owned()),
        None => made,
    })
}
