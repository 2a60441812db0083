//! Parses one function call written as a JSON object, piece by piece: `{"name": "...", "arguments": {...}}`.

use super::value::{Step, Value};

/// The state of an object after a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// More is to come.
    Open,
    /// It has ended.
    Ended,
    /// It has ended without its closing bracket, before this character.
    Left,
    /// It is not a call. Possible only before its name is known.
    NoCall,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Begin,
    KeyOrEnd,
    Key,
    Colon,
    BeforeValue,
    Value,
    CommaOrEnd,
}

/// The pieces of a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The function's name.
    Name(String),
    /// A piece of the arguments' JSON.
    Arguments(String),
}

/// The parser of one object.
#[derive(Debug, Clone)]
pub(super) struct Call {
    place: Place,
    /// All text so far, until it is known to be a call.
    raw: String,
    key: String,
    escaped: bool,
    value: Value,
    text: String,
    named: bool,
    /// Arguments that came before the name, or all arguments if they are written as a string.
    arguments: String,
    any_arguments: bool,
}

impl Call {
    pub(super) fn new() -> Self {
        Self {
            place: Place::Begin,
            raw: String::new(),
            key: String::new(),
            escaped: false,
            value: Value::default(),
            text: String::new(),
            named: false,
            arguments: String::new(),
            any_arguments: false,
        }
    }

    /// Whether its name has been output.
    pub(super) const fn named(&self) -> bool {
        self.named
    }

    /// The text of an object that turned out not to be a call.
    pub(super) fn into_raw(self) -> String {
        self.raw
    }

    /// Reads one character. `known` tells whether a function of this name exists.
    pub(super) fn push(
        &mut self,
        c: char,
        known: &dyn Fn(&str) -> bool,
        said: &mut Vec<Said>,
    ) -> Progress {
        if !self.named {
            self.raw.push(c);
        }
        match (self.place, c) {
            (Place::Key, '"') if !self.escaped => self.place = Place::Colon,
            (Place::Key, _) => {
                self.escaped = c == '\\' && !self.escaped;
                self.key.push(c);
            }
            (Place::Value, _) => return self.push_value(c, known, said),
            (_, ' ' | '\t' | '\n' | '\r') => {}
            (Place::KeyOrEnd, '"') => {
                self.key.clear();
                self.place = Place::Key;
            }
            (Place::KeyOrEnd | Place::CommaOrEnd, '}') => return self.end(said),
            (Place::Colon, ':') => self.place = Place::BeforeValue,
            (Place::BeforeValue, _) => {
                self.value = Value::default();
                self.text.clear();
                self.place = Place::Value;
                return self.push_value(c, known, said);
            }
            (Place::Begin, '{') | (Place::CommaOrEnd, ',') => self.place = Place::KeyOrEnd,
            // The output cannot be taken back.
            _ if self.named => {
                self.end(said);
                return Progress::Left;
            }
            _ => return Progress::NoCall,
        }
        Progress::Open
    }

    fn push_value(
        &mut self,
        c: char,
        known: &dyn Fn(&str) -> bool,
        said: &mut Vec<Said>,
    ) -> Progress {
        let step = self.value.step(c);
        if step != Step::Behind {
            self.text.push(c);
            if self.is_arguments() && !self.text.starts_with('"') {
                self.say_arguments(c, said);
            }
        }
        if step == Step::Inside {
            return Progress::Open;
        }
        self.place = Place::CommaOrEnd;
        if !self.end_value(known, said) {
            return Progress::NoCall;
        }
        match (step, c) {
            (Step::Behind, ',') => self.place = Place::KeyOrEnd,
            (Step::Behind, '}') => return self.end(said),
            _ => {}
        }
        Progress::Open
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    fn say_arguments(&mut self, c: char, said: &mut Vec<Said>) {
        self.any_arguments = true;
        if !self.named {
            self.arguments.push(c);
        } else if let Some(Said::Arguments(text)) = said.last_mut() {
            text.push(c);
        } else {
            said.push(Said::Arguments(c.to_string()));
        }
    }

    /// Ends a member's value. Returns false if the object is not a call.
    fn end_value(&mut self, known: &dyn Fn(&str) -> bool, said: &mut Vec<Said>) -> bool {
        if matches!(self.key.as_str(), "name" | "tool_name") && !self.named {
            let Ok(name) = serde_json::from_str::<String>(&self.text) else {
                return false;
            };
            if name.is_empty() || !known(&name) {
                return false;
            }
            self.named = true;
            self.raw.clear();
            said.push(Said::Name(name));
            let early = std::mem::take(&mut self.arguments);
            if !early.is_empty() {
                said.push(Said::Arguments(early));
            }
        } else if self.is_arguments() && self.text.starts_with('"') {
            // Some models write the arguments' JSON as a string.
            let text = serde_json::from_str::<String>(&self.text).unwrap_or_default();
            for c in text.chars() {
                self.say_arguments(c, said);
            }
        }
        true
    }

    fn end(&mut self, said: &mut Vec<Said>) -> Progress {
        if !self.named {
            return Progress::NoCall;
        }
        if !self.any_arguments {
            said.push(Said::Arguments("{}".to_owned()));
        }
        Progress::Ended
    }
}
