//! Finds stop strings across the borders of tokens.

/// The output of a [`StopMatcher`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Matched {
    /// Text that can be sent now.
    pub emit: String,
    /// Whether a stop string was found. Generation then ends, and nothing follows `emit`.
    pub stopped: bool,
}

/// Finds the first of several stop strings in a text that comes in pieces.
///
/// Text that may be the beginning of a stop string is held back, and no more than that. The match that ends first wins;
/// of those that end at the same place, the longest. The outcome does not depend on how the text is cut into pieces.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    include_stop: bool,
    /// The end of the text so far, if it may be the beginning of a stop string.
    held: String,
    /// Index of the stop string that was found.
    found: Option<usize>,
}

/// One stop string, matched by the algorithm of Knuth, Morris and Pratt: a byte costs constant time on average.
#[derive(Debug, Clone)]
struct Stop {
    bytes: Vec<u8>,
    /// `borders[n]`: length of the longest proper prefix of the first `n + 1` bytes that is also their suffix.
    borders: Vec<usize>,
    /// Number of bytes of this string with which the text so far ends.
    matched: usize,
}

impl Stop {
    fn new(stop: &str) -> Self {
        let bytes = stop.as_bytes().to_vec();
        let mut borders = vec![0; bytes.len()];
        let mut border = 0;
        for n in 1..bytes.len() {
            while border > 0 && bytes[n] != bytes[border] {
                border = borders[border - 1];
            }
            border += usize::from(bytes[n] == bytes[border]);
            borders[n] = border;
        }
        Self {
            bytes,
            borders,
            matched: 0,
        }
    }

    /// Reads one byte. Returns true if the string ends with it.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.borders[self.matched - 1];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

impl StopMatcher {
    /// Empty stop strings are ignored, because they would match anywhere. `include_stop` keeps the stop string in the text.
    pub fn new(stops: &[String], include_stop: bool) -> Self {
        let stops = stops
            .iter()
            .filter(|stop| !stop.is_empty())
            .map(|stop| Stop::new(stop))
            .collect();
        Self {
            stops,
            include_stop,
            held: String::new(),
            found: None,
        }
    }

    /// Reads the next piece of text. After a match, all further text is dropped.
    pub fn push(&mut self, delta: &str) -> Matched {
        if self.stopped() {
            return Matched {
                emit: String::new(),
                stopped: true,
            };
        }
        if self.stops.is_empty() {
            return Matched {
                emit: delta.to_owned(),
                stopped: false,
            };
        }
        let mut text = std::mem::take(&mut self.held);
        let begin = text.len();
        text.push_str(delta);
        for end in begin..text.len() {
            let byte = text.as_bytes()[end];
            let mut found = 0;
            for (at, stop) in self.stops.iter_mut().enumerate() {
                if stop.advance(byte) && stop.bytes.len() > found {
                    found = stop.bytes.len();
                    self.found = Some(at);
                }
            }
            if found > 0 {
                text.truncate(if self.include_stop {
                    end + 1
                } else {
                    end + 1 - found
                });
                return Matched {
                    emit: text,
                    stopped: true,
                };
            }
        }
        // A stop string begins with a whole character, so the held text does too.
        let hold = self
            .stops
            .iter()
            .map(|stop| stop.matched)
            .max()
            .unwrap_or(0);
        self.held = text.split_off(text.len() - hold);
        Matched {
            emit: text,
            stopped: false,
        }
    }

    /// The held text, when the sequence ends without a match.
    pub fn flush(&mut self) -> String {
        for stop in &mut self.stops {
            stop.matched = 0;
        }
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was found.
    pub const fn stopped(&self) -> bool {
        self.found.is_some()
    }

    /// The stop string that was found.
    pub fn found(&self) -> Option<&str> {
        std::str::from_utf8(&self.stops[self.found?].bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stops(stops: &[&str]) -> Vec<String> {
        stops.iter().map(|&stop| stop.to_owned()).collect()
    }

    /// The text before the stop string that ends first, found by trying every end.
    fn oracle(text: &str, stops: &[String], include_stop: bool) -> (String, bool) {
        for end in 0..=text.len() {
            let longest = stops
                .iter()
                .filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes()))
                .map(String::len)
                .max();
            if let Some(len) = longest {
                let cut = if include_stop { end } else { end - len };
                return (text[..cut].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    #[test]
    fn text_that_may_begin_a_stop_string_is_held_back() {
        let mut matcher = StopMatcher::new(&stops(&["<end>"]), false);
        assert_eq!(
            matcher.push("a<e"),
            Matched {
                emit: "a".into(),
                stopped: false
            }
        );
        assert_eq!(
            matcher.push("n"),
            Matched {
                emit: String::new(),
                stopped: false
            }
        );
        assert_eq!(
            matcher.push("<e"),
            Matched {
                emit: "<en".into(),
                stopped: false
            }
        );
        assert_eq!(
            matcher.push("nd>tail"),
            Matched {
                emit: String::new(),
                stopped: true
            }
        );
        assert_eq!(
            matcher.push("more"),
            Matched {
                emit: String::new(),
                stopped: true
            }
        );
        assert_eq!(matcher.flush(), "");
    }

    #[test]
    fn what_is_held_back_comes_out_at_the_end() {
        let mut matcher = StopMatcher::new(&stops(&["\n\n"]), false);
        assert_eq!(matcher.push("x\n").emit, "x");
        assert_eq!(matcher.flush(), "\n");
        assert!(!matcher.stopped());
    }

    #[test]
    fn the_match_that_ends_first_wins() {
        for (include_stop, emit) in [(false, "a"), (true, "abc")] {
            let mut matcher = StopMatcher::new(&stops(&["abcd", "bc", "c"]), include_stop);
            assert_eq!(
                matcher.push("abcd"),
                Matched {
                    emit: emit.into(),
                    stopped: true
                }
            );
            assert_eq!(matcher.found(), Some("bc"));
        }
        assert_eq!(StopMatcher::new(&stops(&["x"]), false).found(), None);
    }

    #[test]
    fn an_empty_stop_string_is_none() {
        let mut matcher = StopMatcher::new(&stops(&[""]), false);
        assert_eq!(
            matcher.push("text"),
            Matched {
                emit: "text".into(),
                stopped: false
            }
        );
    }

    proptest! {
        #[test]
        fn every_chunking_gives_the_same(
            pieces in proptest::collection::vec("[ab你é]{0,4}", 0..12),
            stops in proptest::collection::vec("[ab你é]{1,4}", 0..4),
            include_stop in any::<bool>(),
        ) {
            let whole = pieces.concat();
            let (expected, stops_at) = oracle(&whole, &stops, include_stop);
            let mut matcher = StopMatcher::new(&stops, include_stop);
            let mut text = String::new();
            for piece in &pieces {
                let before = text.len();
                let matched = matcher.push(piece);
                text.push_str(&matched.emit);
                prop_assert!(expected.starts_with(&text), "{:?} sent too early", &text[before..]);
                if matched.stopped {
                    break;
                }
            }
            prop_assert_eq!(matcher.stopped(), stops_at);
            text.push_str(&matcher.flush());
            prop_assert_eq!(text, expected);
        }

        #[test]
        fn no_more_is_held_back_than_a_stop_string_may_need(
            pieces in proptest::collection::vec("[ab]{0,3}", 1..10),
            stops in proptest::collection::vec("[ab]{1,4}", 1..4),
        ) {
            let mut matcher = StopMatcher::new(&stops, false);
            let (mut seen, mut sent) = (String::new(), String::new());
            for piece in &pieces {
                seen.push_str(piece);
                let matched = matcher.push(piece);
                sent.push_str(&matched.emit);
                if matched.stopped {
                    break;
                }
                let held = &seen[sent.len()..];
                prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
            }
        }
    }
}
