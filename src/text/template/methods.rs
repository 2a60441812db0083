//! Methods, filters, functions and tests of Python and jinja2 that templates use and minijinja lacks.

use minijinja::value::{Kwargs, Rest, Value as Variable, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::globals::{cycler, joiner};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::fuel::{check_bytes, check_pieces, joined_text, option, weigh};
use super::made::made;
use super::markup::by_method;

/// The name of the filter [`unbound`].
pub(super) const UNBOUND: &str = "=unbound";
/// Methods of Python's mappings.
pub(super) const OF_MAPPINGS: [&str; 11] = [
    "clear",
    "copy",
    "fromkeys",
    "get",
    "items",
    "keys",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "values",
];

/// Maximum width to which a method pads, in characters.
const MAX_WIDTH: usize = 10_000;

/// Adds all of them to `environment`.
pub(super) fn install(environment: &mut Environment) {
    environment.set_unknown_method_callback(call);
    environment.add_filter("indent", indent);
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    environment.add_function("cycler", cycler_of);
    environment.add_function("joiner", joiner);
    environment.add_function("dict", dict);
    environment.add_test("callable", is_callable);
    environment.add_filter(UNBOUND, unbound);
}

/// `cycler(items...)` for texts and numbers. Other items are refused, because a check could not see inside it.
fn cycler_of(Rest(items): Rest<Variable>) -> Result<Variable, Error> {
    if items.iter().any(|item| item.as_object().is_some()) {
        return Err(refuse("cycler takes texts and numbers".to_owned()));
    }
    cycler(items)
}

/// The result of a Python method, within the fuel.
fn call(
    state: &mut State,
    value: &Variable,
    method: &str,
    args: &[Variable],
) -> Result<Variable, Error> {
    if value.is_safe() {
        return by_method(state, method, args, |state, args| {
            within(state, value, method, args)
        });
    }
    within(state, value, method, args)
}

/// The same for a text that is not marked as safe, or for another value.
fn within(
    state: &mut State,
    value: &Variable,
    method: &str,
    args: &[Variable],
) -> Result<Variable, Error> {
    if let (Some(separator), "join", [items]) = (value.as_str(), method, args) {
        return joined_text(state, items, separator, None).map(Variable::from);
    }
    for arg in args {
        weigh(state, arg, 1)?;
    }
    if let Some(text) = value.as_str() {
        let first = args.first().and_then(Variable::as_str);
        match method {
            "split" | "rsplit" | "splitlines" => check_pieces(state, text, first)?,
            "format" if has_wide_field(text) => {
                let message = "a field of format() has a width of at most 9999".to_owned();
                return Err(refuse(message));
            }
            _ => {}
        }
    } else if matches!(method, "count" | "index") {
        weigh(state, value, 1)?;
    }
    let result = called(state, value, method, args)?;
    made(state, result)
}

/// Whether a field of a format has a width or a precision of five digits.
fn has_wide_field(format: &str) -> bool {
    let fields = format.split('{').filter_map(|part| part.split_once('}'));
    fields
        .flat_map(|(field, _)| field.split(|c: char| !c.is_ascii_digit()))
        .any(|digits| digits.len() > 4)
}

fn called(
    state: &mut State,
    value: &Variable,
    method: &str,
    args: &[Variable],
) -> Result<Variable, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = of_text(text, method, args)
    {
        return result;
    }
    match (value.kind(), method, args) {
        (ValueKind::Map | ValueKind::Seq, "copy", []) => Ok(value.clone()),
        (ValueKind::Seq | ValueKind::Iterable, "index", [wanted]) => value
            .try_iter()?
            .position(|item| item == *wanted)
            .map(Variable::from)
            .ok_or_else(|| refuse("the value is not in the list".to_owned())),
        _ => unknown_method_callback(state, value, method, args),
    }
}

/// The result of a method of Python's strings. `None` if it is not supported, or has other arguments.
fn of_text(text: &str, method: &str, args: &[Variable]) -> Option<Result<Variable, Error>> {
    let first = args.first().and_then(Variable::as_str);
    let parts = |before: &str, separator: &str, after: &str| {
        Variable::from(vec![
            before.to_owned(),
            separator.to_owned(),
            after.to_owned(),
        ])
    };
    Some(Ok(match (method, first, args.len()) {
        ("partition", Some(separator), 1) if !separator.is_empty() => {
            match text.split_once(separator) {
                Some((before, after)) => parts(before, separator, after),
                None => parts(text, "", ""),
            }
        }
        ("rpartition", Some(separator), 1) if !separator.is_empty() => {
            match text.rsplit_once(separator) {
                Some((before, after)) => parts(before, separator, after),
                None => parts("", "", text),
            }
        }
        ("rsplit", Some(separator), 1 | 2) if !separator.is_empty() => {
            let most = args.get(1).map_or(Some(-1), Variable::as_i64)?;
            let mut pieces: Vec<&str> = match usize::try_from(most) {
                Ok(most) => text.rsplitn(most.saturating_add(1), separator).collect(),
                Err(_) => text.rsplit(separator).collect(),
            };
            pieces.reverse();
            pieces.into_iter().map(Variable::from).collect()
        }
        ("removeprefix", Some(prefix), 1) => {
            Variable::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        ("removesuffix", Some(suffix), 1) => {
            Variable::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        ("index", Some(wanted), 1) => match text.find(wanted) {
            Some(at) => Variable::from(text[..at].chars().count()),
            None => return Some(Err(refuse("substring not found".to_owned()))),
        },
        ("casefold", None, 0) => Variable::from(text.to_lowercase()),
        ("zfill", None, 1) => {
            let missing = missing(text, args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            Variable::from(format!("{sign}{}{digits}", "0".repeat(missing)))
        }
        ("ljust", None, 1) => Variable::from(format!("{text}{}", " ".repeat(missing(text, args)?))),
        ("rjust", None, 1) => Variable::from(format!("{}{text}", " ".repeat(missing(text, args)?))),
        _ => return None,
    }))
}

/// Number of characters that a text needs to reach the given width.
fn missing(text: &str, args: &[Variable]) -> Option<usize> {
    let width = usize::try_from(args.first()?.as_i64()?).unwrap_or(0);
    Some(width.min(MAX_WIDTH).saturating_sub(text.chars().count()))
}

fn refuse(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// `indent(width=4, first=False, blank=False)`, which keeps a newline at the end.
#[expect(
    clippy::needless_pass_by_value,
    reason = "a minijinja filter takes its keyword arguments by value"
)]
fn indent(
    state: &State,
    text: &str,
    Rest(args): Rest<Variable>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let width = option(&args, &kwargs, 0, "width")?;
    let first = option(&args, &kwargs, 1, "first")?.is_some_and(|flag| flag.is_true());
    let blank = option(&args, &kwargs, 2, "blank")?.is_some_and(|flag| flag.is_true());
    kwargs.assert_all_used()?;
    let space = match width {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(space) => space.to_owned(),
            None => " ".repeat(usize::try_from(i64::try_from(width)?.clamp(0, 64)).unwrap_or(0)),
        },
    };
    let most = text.matches('\n').count() + 1;
    check_bytes(state, text.len() + most.saturating_mul(space.len()))?;
    let lines = text.split('\n').enumerate().map(|(at, line)| {
        let indented = if at == 0 {
            first
        } else {
            blank || !line.is_empty()
        };
        format!("{}{line}", if indented { space.as_str() } else { "" })
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// `truncate(length=255, killwords=False, end='...', leeway=5)`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "a minijinja filter takes its keyword arguments by value"
)]
fn truncate(text: &str, Rest(args): Rest<Variable>, kwargs: Kwargs) -> Result<String, Error> {
    let number = |at, name, default: usize| -> Result<usize, Error> {
        match option(&args, &kwargs, at, name)? {
            Some(value) => Ok(usize::try_from(i64::try_from(value)?).unwrap_or(0)),
            None => Ok(default),
        }
    };
    let (length, leeway) = (number(0, "length", 255)?, number(3, "leeway", 5)?);
    let kill = option(&args, &kwargs, 1, "killwords")?.is_some_and(|flag| flag.is_true());
    let end = option(&args, &kwargs, 2, "end")?.map_or("...".to_owned(), |end| end.to_string());
    kwargs.assert_all_used()?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let kept = length.saturating_sub(end.chars().count());
    let kept: String = text.chars().take(kept).collect();
    let whole = kept.rsplit_once(' ').filter(|_| !kill);
    Ok(whole.map_or(kept.as_str(), |(words, _)| words).to_owned() + &end)
}

/// `dict(pairs or mapping, **more)`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "a minijinja function takes its keyword arguments by value"
)]
fn dict(state: &State, Rest(args): Rest<Variable>, kwargs: Kwargs) -> Result<Variable, Error> {
    let mut pairs: Vec<(Variable, Variable)> = Vec::new();
    if let Some(given) = args.first() {
        // The keys are compared with one another.
        weigh(state, given, 1)?;
        for item in given.try_iter()? {
            if given.kind() == ValueKind::Map {
                let value = given.get_item(&item)?;
                pairs.push((item, value));
                continue;
            }
            let pair: Vec<Variable> = item.try_iter()?.collect();
            let [key, value] = <[Variable; 2]>::try_from(pair)
                .map_err(|_| refuse("dict takes a mapping or a list of pairs".to_owned()))?;
            pairs.push((key, value));
        }
    }
    for name in kwargs.args() {
        pairs.push((Variable::from(name), kwargs.peek(name)?));
    }
    Ok(Variable::from_pairs(pairs))
}

/// `value.name` without a call, if Python's mappings have a method of that name: the method, not the key. Namespaces have only
/// their own attributes.
fn unbound(value: &Variable, name: &str) -> Result<Variable, Error> {
    let is_namespace = || {
        let object = value.as_object();
        object.is_some_and(|object| object.type_name().ends_with("Namespace"))
    };
    if value.kind() == ValueKind::Map && !is_namespace() {
        return Ok(Variable::from_function(|| ()));
    }
    value.get_attr(name)
}

fn is_callable(value: &Variable) -> bool {
    // Functions and macros are objects without items.
    value.kind() == ValueKind::Plain
}
