//! Finds function calls in the text of an answer, piece by piece, by the description of their format.

use super::arguments::Reader;
use super::call::{Call, Progress, Said};
use super::fate::Fate;
use super::{Piece, partial_suffix};
use crate::request::Function;
use crate::text::formats::{Arguments, Shape, ToolFormat, pieces};

/// Maximum length of a function's name, in bytes.
const MAX_NAME: usize = 200;

#[derive(Debug)]
enum Mode {
    /// Words, up to the marker of a call.
    Words,
    /// The text around calls: before a name, or (`behind`) after a call.
    Between {
        behind: bool,
    },
    /// A call as a JSON object.
    Object(Box<Call>),
    /// A name, up to the text that ends it.
    Name(&'static Shape),
    Arguments(Box<Reader>),
}

/// The parser of one answer.
#[derive(Debug)]
pub(super) struct ToolParser {
    format: &'static ToolFormat,
    functions: Vec<Function>,
    /// Whether only white space has come so far.
    at_beginning: bool,
    mode: Mode,
    openings: Vec<&'static str>,
    marks: Vec<Mark>,
    /// Text that may be words or a marker.
    held: String,
    /// The marker with which the current call began. If it turns out not to be a call, this is text.
    opening: String,
    calls: usize,
}

/// A marker before or after a call.
#[derive(Debug, Clone, Copy)]
struct Mark {
    text: &'static str,
    leads: Leads,
}

#[derive(Debug, Clone, Copy)]
enum Leads {
    /// Leads to another marker or a call.
    ToCall,
    /// Leads to the name of a function.
    ToName(&'static Shape),
    /// Leads out of a call.
    Behind,
}

/// All markers of a format.
fn marks(format: &'static ToolFormat) -> Vec<Mark> {
    let mut marks: Vec<Mark> = Vec::new();
    let mut add = |text: &'static str, leads| {
        if !marks.iter().any(|mark| mark.text == text) {
            marks.push(Mark { text, leads });
        }
    };
    for shape in format.shapes {
        if let Shape::Named { before, .. } = shape
            && !before.is_empty()
        {
            add(before.trim(), Leads::ToName(shape));
        }
    }
    for opens in [format.open, format.call_open, format.between] {
        for text in pieces(opens, format.tokens) {
            add(text, Leads::ToCall);
        }
    }
    let commas: &[&str] = if format.list || format.bare {
        &[",", ";"]
    } else {
        &[]
    };
    for text in format.also.iter().chain(commas) {
        add(text, Leads::ToCall);
    }
    if format.list {
        add("[", Leads::ToCall);
        add("]", Leads::Behind);
    }
    for closes in [format.call_close, format.close] {
        for text in pieces(closes, format.tokens) {
            add(text, Leads::Behind);
        }
    }
    for text in format.tokens {
        add(text, Leads::Behind);
    }
    marks
}

impl ToolParser {
    /// `functions`: those that may be called.
    pub(super) fn new(format: &'static ToolFormat, functions: Vec<Function>) -> Self {
        Self {
            format,
            functions,
            at_beginning: true,
            mode: Mode::Words,
            openings: format.openings(),
            marks: marks(format),
            held: String::new(),
            opening: String::new(),
            calls: 0,
        }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        for c in text.chars() {
            self.push_char(c, out);
        }
    }

    /// Ends the answer.
    pub(super) fn flush(&mut self, out: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        let opening = std::mem::take(&mut self.opening);
        match std::mem::replace(&mut self.mode, Mode::Words) {
            Mode::Words => say(held, out),
            Mode::Between { behind: true } => say(held.trim().to_owned(), out),
            Mode::Between { behind: false } | Mode::Name(_) => say(opening + &held, out),
            Mode::Object(call) if !call.named() => say(opening + &call.into_raw(), out),
            Mode::Object(_) => {}
            Mode::Arguments(mut reader) => {
                let mut text = String::new();
                reader.flush(&mut text);
                argue(self.calls - 1, text, out);
            }
        }
    }

    fn push_char(&mut self, c: char, out: &mut Vec<Piece>) {
        match &mut self.mode {
            Mode::Words => self.word(c, out),
            Mode::Between { behind } => {
                let behind = *behind;
                self.between(c, behind, out);
            }
            Mode::Object(_) => self.object(c, out),
            Mode::Name(shape) => {
                let shape = *shape;
                self.held.push(c);
                self.name(shape, out);
            }
            Mode::Arguments(reader) => {
                let mut text = String::new();
                let fate = reader.push(c, &mut text);
                argue(self.calls - 1, text, out);
                match fate {
                    Fate::Open => {}
                    Fate::Ended => self.mode = Mode::Between { behind: true },
                    Fate::Left(rest) => {
                        self.mode = Mode::Between { behind: true };
                        self.push(&rest, out);
                    }
                }
            }
        }
    }

    fn has_object(&self) -> bool {
        let is_object = |shape: &Shape| matches!(shape, Shape::Object { .. });
        self.format.shapes.iter().any(is_object)
    }

    fn word(&mut self, c: char, out: &mut Vec<Piece>) {
        self.held.push(c);
        if self.at_beginning && !c.is_whitespace() {
            self.at_beginning = false;
            let begins = match c {
                '{' => self.has_object(),
                '[' => self.format.list,
                _ => false,
            };
            // Only at the beginning of an answer can a call have no marker.
            if self.format.bare && begins {
                self.held.pop();
                self.opening = std::mem::take(&mut self.held);
                self.mode = Mode::Between { behind: false };
                return self.push_char(c, out);
            }
        }
        if let Some(&mark) = self
            .openings
            .iter()
            .find(|mark| self.held.ends_with(**mark))
        {
            // White space before a call belongs to the call.
            self.held.truncate(self.held.len() - mark.len());
            let words = std::mem::take(&mut self.held);
            let trimmed = words.trim_end();
            say(trimmed.to_owned(), out);
            words[trimmed.len()..].clone_into(&mut self.opening);
            self.pass(mark, mark);
            return;
        }
        let kept = self
            .openings
            .iter()
            .map(|mark| partial_suffix(&self.held, mark))
            .max()
            .unwrap_or(0);
        let sure = self.held[..self.held.len() - kept].trim_end().len();
        let rest = self.held.split_off(sure);
        say(std::mem::replace(&mut self.held, rest), out);
    }

    fn ends_calls(&self, mark: &str) -> bool {
        let known = self.marks.iter().find(|known| known.text == mark);
        known.is_some_and(|mark| matches!(mark.leads, Leads::Behind))
    }

    /// Continues after a marker, which was read as `raw`.
    fn pass(&mut self, mark: &str, raw: &str) {
        self.held.clear();
        let leads = self.marks.iter().find(|known| known.text == mark);
        match leads.map(|mark| mark.leads) {
            Some(Leads::Behind) => self.mode = Mode::Between { behind: true },
            Some(Leads::ToName(shape)) => {
                self.opening.push_str(raw);
                self.mode = Mode::Name(shape);
            }
            Some(Leads::ToCall) | None => {
                self.opening.push_str(raw);
                self.mode = Mode::Between { behind: false };
            }
        }
    }

    fn between(&mut self, c: char, behind: bool, out: &mut Vec<Piece>) {
        self.held.push(c);
        let held = self.held.trim_start();
        if held.is_empty() {
            return;
        }
        let longer = |mark: &Mark| mark.text.len() > held.len() && mark.text.starts_with(held);
        if self.marks.iter().any(longer) {
            return;
        }
        let leading = self.held.len() - held.len();
        let found = self.marks.iter().map(|mark| mark.text);
        let longest = found
            .filter(|text| held.starts_with(text))
            .max_by_key(|text| text.len());
        if let Some(mark) = longest {
            let raw = self.held[..leading + mark.len()].to_owned();
            let rest = held[mark.len()..].to_owned();
            if !behind && self.ends_calls(mark) {
                // The list of calls ends without a call.
                self.no_call(&raw, out);
            } else {
                self.pass(mark, &raw);
            }
            return self.push(&rest, out);
        }
        let opens_object = self.has_object() && held.starts_with('{');
        if behind {
            // Some models leave out the separator between two calls.
            let in_a_row = self.format.list || self.format.bare || !self.format.open.is_empty();
            let rest = held.to_owned();
            self.held.clear();
            if opens_object && in_a_row {
                self.mode = Mode::Object(Box::new(Call::new()));
            } else {
                self.mode = Mode::Words;
            }
            return self.push(&rest, out);
        }
        let bare_name = self
            .format
            .shapes
            .iter()
            .find(|shape| matches!(shape, Shape::Named { before, .. } if before.is_empty()));
        if opens_object {
            let rest = held.to_owned();
            let white = self.held[..leading].to_owned();
            self.opening.push_str(&white);
            self.held.clear();
            self.mode = Mode::Object(Box::new(Call::new()));
            self.push(&rest, out);
        } else if let Some(shape) = bare_name {
            let held = std::mem::take(&mut self.held);
            self.mode = Mode::Name(shape);
            self.push(&held, out);
        } else {
            let held = std::mem::take(&mut self.held);
            self.no_call(&held, out);
        }
    }

    /// Outputs text that is not a call as words: its marker and `text`.
    fn no_call(&mut self, text: &str, out: &mut Vec<Piece>) {
        let whole = std::mem::take(&mut self.opening) + text;
        self.held.clear();
        self.mode = Mode::Words;
        // The last character may begin a marker.
        let last = whole.char_indices().next_back().map_or(0, |(at, _)| at);
        say(whole[..last].to_owned(), out);
        self.push(&whole[last..], out);
    }

    fn object(&mut self, c: char, out: &mut Vec<Piece>) {
        let known = |name: &str| is_callable(self.format, &self.functions, name);
        let Mode::Object(call) = &mut self.mode else {
            return;
        };
        let mut said = Vec::new();
        let progress = call.push(c, &known, &mut said);
        for said in said {
            match said {
                Said::Name(name) => self.announce(name, out),
                Said::Arguments(text) => argue(self.calls - 1, text, out),
            }
        }
        match progress {
            Progress::Open => {}
            Progress::Ended => self.mode = Mode::Between { behind: true },
            Progress::Left => {
                self.mode = Mode::Between { behind: true };
                self.push_char(c, out);
            }
            Progress::NoCall => {
                let Mode::Object(call) = std::mem::replace(&mut self.mode, Mode::Words) else {
                    return;
                };
                self.no_call(&call.into_raw(), out);
            }
        }
    }

    /// Looks for the end of the name in the held text.
    fn name(&mut self, shape: &'static Shape, out: &mut Vec<Piece>) {
        let Shape::Named {
            number,
            remark,
            after,
            arguments,
            ..
        } = shape
        else {
            return;
        };
        // The texts that end a name, and whether each belongs to the arguments.
        let own = Some((after.trim(), false)).filter(|(mark, _)| !mark.is_empty());
        let brace = match arguments {
            Arguments::Pairs { key_open, .. } => Some(key_open.trim()),
            Arguments::Loose(loose) if loose.open == '(' => Some("("),
            Arguments::Json | Arguments::Loose(_) => Some("{"),
        };
        let pairs = matches!(arguments, Arguments::Pairs { .. });
        let close = pieces(self.format.call_close, self.format.tokens).next();
        let close = close.filter(|_| pairs);
        let mut ends = own
            .into_iter()
            .chain(brace.into_iter().chain(close).map(|mark| (mark, true)));
        let Some((end, argues)) = ends.find(|(mark, _)| self.held.ends_with(mark)) else {
            let begun = self.held.trim_start();
            let callable = |function: &Function| function.name.starts_with(begun.trim_end());
            if begun.len() > MAX_NAME || (self.format.bare && !self.functions.iter().any(callable))
            {
                let held = std::mem::take(&mut self.held);
                self.no_call(&held, out);
            }
            return;
        };
        let held = std::mem::take(&mut self.held);
        let name = clean(&held[..held.len() - end.len()], *number, *remark);
        if !is_name(name) || !is_callable(self.format, &self.functions, name) {
            return self.no_call(&held, out);
        }
        let parameters = self
            .functions
            .iter()
            .find(|function| function.name == name)
            .map_or_else(Vec::new, |function| function.parameters.clone());
        self.announce(name.to_owned(), out);
        self.mode = Mode::Arguments(Box::new(Reader::new(arguments, parameters)));
        if argues {
            self.push(end, out);
        }
    }

    fn announce(&mut self, name: String, out: &mut Vec<Piece>) {
        self.held.clear();
        self.opening.clear();
        out.push(Piece::Call {
            index: self.calls,
            name,
        });
        self.calls += 1;
    }
}

/// If calls need no marker, only the name of an existing function makes a call.
fn is_callable(format: &ToolFormat, functions: &[Function], name: &str) -> bool {
    !format.bare || functions.iter().any(|function| function.name == name)
}

/// A name without the number, the remark and the quotes that models write around it.
fn clean<'a>(text: &'a str, number: Option<&str>, remark: Option<&str>) -> &'a str {
    let mut name = text;
    if let Some((before, _)) = remark.and_then(|remark| name.split_once(remark)) {
        name = before;
    }
    if let Some((before, digits)) = number.and_then(|number| name.rsplit_once(number))
        && !digits.trim().is_empty()
        && digits.trim().bytes().all(|byte| byte.is_ascii_digit())
    {
        name = before;
    }
    name.trim()
}

fn is_name(name: &str) -> bool {
    let odd = |c: char| c.is_whitespace() || c.is_control() || "<>{}[]()\"',;".contains(c);
    !name.is_empty() && !name.contains(odd)
}

/// Appends words to the last piece, or adds a piece.
pub(super) fn say(text: String, out: &mut Vec<Piece>) {
    if text.is_empty() {
        return;
    }
    if let Some(Piece::Content(said)) = out.last_mut() {
        said.push_str(&text);
    } else {
        out.push(Piece::Content(text));
    }
}

/// Appends arguments to the call with this index.
pub(super) fn argue(index: usize, text: String, out: &mut Vec<Piece>) {
    if text.is_empty() {
        return;
    }
    if let Some(Piece::Arguments { text: said, .. }) = out.last_mut() {
        said.push_str(&text);
    } else {
        out.push(Piece::Arguments { index, text });
    }
}
