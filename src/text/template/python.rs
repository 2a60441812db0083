//! Adapts minijinja to templates that were written for Python.

use minijinja::value::ValueKind;
use minijinja::{Environment, Error, Output, State, Value as Variable, escape_formatter};

use super::fuel::text_of;

/// Lets `environment` print and test values as `jinja2` does.
pub(super) fn install(environment: &mut Environment) {
    environment.set_formatter(print);
    environment.add_filter("string", string);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
}

fn is_float(value: &Variable) -> bool {
    value.kind() == ValueKind::Number && !value.is_integer()
}

fn print(out: &mut Output, state: &mut State, value: &Variable) -> Result<(), Error> {
    if is_float(value) {
        out.write_str(&number(value)).map_err(Error::from)
    } else if value.as_object().is_some() {
        out.write_str(&text_of(state, value)?).map_err(Error::from)
    } else {
        escape_formatter(out, state, value)
    }
}

fn string(state: &State, value: &Variable) -> Result<Variable, Error> {
    Ok(match value.kind() {
        ValueKind::String => value.clone(),
        ValueKind::Number => Variable::from(number(value)),
        _ => Variable::from(text_of(state, value)?),
    })
}

/// Whether Python can iterate over it; None is not iterable.
fn is_iterable(value: &Variable) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Whether it has a length and items, as strings and mappings have.
fn is_sequence(value: &Variable) -> bool {
    matches!(
        value.kind(),
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map
    )
}

/// A number as Python prints it.
pub(super) fn number(value: &Variable) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
}

/// A float as Python prints it: the shortest digits that read back equal, with an exponent below 1e-4 and from 1e16 on.
fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    let sign = if x.is_sign_negative() { "-" } else { "" };
    if x.is_infinite() {
        return format!("{sign}inf");
    }
    let (digits, exponent) = shortest_digits(x.abs());
    let (first, rest) = digits.split_at(1);
    match exponent {
        -4..0 => format!(
            "{sign}0.{}{digits}",
            "0".repeat(exponent.unsigned_abs() as usize - 1)
        ),
        0..16 => {
            let whole = exponent as usize;
            let rest = format!("{rest:0<whole$}");
            let fraction = if rest.len() > whole {
                &rest[whole..]
            } else {
                "0"
            };
            format!("{sign}{first}{}.{fraction}", &rest[..whole])
        }
        _ => {
            let point = if rest.is_empty() { "" } else { "." };
            let direction = if exponent < 0 { '-' } else { '+' };
            format!(
                "{sign}{first}{point}{rest}e{direction}{:02}",
                exponent.unsigned_abs()
            )
        }
    }
}

/// The digits of a finite, non-negative `x` without zeros at either end, and the power of ten of the first digit. If two results
/// are equally short and near, the JSON writer takes the even one, as Python does. `{}` does not.
fn shortest_digits(x: f64) -> (String, i32) {
    let text = serde_json::Value::from(x).to_string();
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let significant = digits.trim_start_matches('0');
    let leading_zeros = digits.len() - significant.len();
    let exponent =
        exponent.parse::<i32>().unwrap_or_default() + whole.len() as i32 - 1 - leading_zeros as i32;
    let significant = significant.trim_end_matches('0');
    if significant.is_empty() {
        ("0".to_owned(), 0)
    } else {
        (significant.to_owned(), exponent)
    }
}
