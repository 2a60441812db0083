//! Finds the end of a JSON value character by character.

/// How a character belongs to the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Part of it.
    Inside,
    /// Its last character.
    Last,
    /// It follows the value.
    Behind,
}

/// The parser of one value. It looks only at brackets and quotes: the text between them may be invalid JSON.
#[derive(Debug, Clone, Default)]
pub(super) struct Value {
    depth: usize,
    begun: bool,
    in_string: bool,
    escaped: bool,
}

impl Value {
    pub(super) fn step(&mut self, c: char) -> Step {
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => {
                    self.in_string = false;
                    if self.depth == 0 {
                        return Step::Last;
                    }
                }
                _ => {}
            }
            return Step::Inside;
        }
        let bare = self.begun && self.depth == 0;
        match c {
            ',' | '}' | ']' if self.depth == 0 => return Step::Behind,
            _ if bare && c.is_whitespace() => return Step::Behind,
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth -= 1;
                if self.depth == 0 {
                    return Step::Last;
                }
            }
            _ => {}
        }
        self.begun = true;
        Step::Inside
    }
}
