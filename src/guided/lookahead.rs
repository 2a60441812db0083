//! Splits off look-ahead at the beginning of a regular expression. The grammar compiler does not support look-ahead, but it can
//! intersect expressions.

/// The parts of `^(?=a)(?!b)c`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LookAhead {
    /// Expressions with each of which the text must begin.
    pub(super) with: Vec<String>,
    /// Expressions with which it must not begin.
    pub(super) without: Vec<String>,
    /// The expression after the look-ahead.
    pub(super) rest: String,
}

impl LookAhead {
    /// `None` if `pattern` does not begin with look-ahead.
    pub(super) fn split(pattern: &str) -> Option<Self> {
        let (anchor, mut rest) = match pattern.strip_prefix('^') {
            Some(rest) => ("^", rest),
            None => ("", pattern),
        };
        let (mut with, mut without) = (Vec::new(), Vec::new());
        while let Some(inner) = rest.strip_prefix("(?=").or(rest.strip_prefix("(?!")) {
            let end = group_end(inner)?;
            let found = if rest.starts_with("(?=") {
                &mut with
            } else {
                &mut without
            };
            found.push(inner[..end].to_owned());
            rest = &inner[end + 1..];
        }
        // An alternative outside a group would escape the look-ahead.
        if with.is_empty() && without.is_empty() || has_bare_alternative(rest) {
            return None;
        }
        Some(Self {
            with,
            without,
            rest: format!("{anchor}{rest}"),
        })
    }
}

/// The characters that are neither escaped nor in a class. With each come its position and the depth of groups before it.
fn bare(pattern: &str) -> impl Iterator<Item = (usize, char, usize)> {
    let (mut escaped, mut in_class, mut depth) = (false, false, 0_usize);
    pattern.char_indices().filter_map(move |(at, c)| {
        if escaped {
            escaped = false;
            return None;
        }
        match c {
            '\\' => {
                escaped = true;
                return None;
            }
            '[' if !in_class => in_class = true,
            ']' if in_class => in_class = false,
            _ => {}
        }
        if in_class {
            return None;
        }
        let before = depth;
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        Some((at, c, before))
    })
}

/// The position of the bracket that closes a group, given the text after its opening bracket.
fn group_end(inner: &str) -> Option<usize> {
    bare(inner)
        .find(|&(_, c, depth)| c == ')' && depth == 0)
        .map(|(at, ..)| at)
}

fn has_bare_alternative(pattern: &str) -> bool {
    bare(pattern).any(|(_, c, depth)| c == '|' && depth == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_look_ahead_at_the_beginning_is_taken_apart() {
        let split = LookAhead::split(r"^(?=.*(a|\)))(?![)x])b(c)$").unwrap();
        assert_eq!(split.with, [r".*(a|\))"]);
        assert_eq!(split.without, ["[)x]"]);
        assert_eq!(split.rest, "^b(c)$");
        for pattern in ["abc", "a(?=b)c", "(?=a)b|c", "(?=a", "^(?:a)b"] {
            assert_eq!(LookAhead::split(pattern), None, "{pattern}");
        }
    }
}
