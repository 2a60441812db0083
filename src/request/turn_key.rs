//! The name of a turn that must not run twice.

use std::fmt;

use serde::Deserialize;

/// Names a turn for good: whoever asks for it again gets the answer that its session has.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct TurnKey([u8; Self::BYTES]);

impl TurnKey {
    /// Bytes of a key.
    pub const BYTES: usize = 16;

    /// A key of these bytes.
    pub const fn new(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl fmt::Debug for TurnKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TurnKey({:032x})", u128::from_be_bytes(self.0))
    }
}

impl TryFrom<String> for TurnKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u128::from_str_radix(&text, 16).ok();
        let number = number.filter(|_| digits && text.len() == 2 * Self::BYTES);
        number
            .map(|number| Self(number.to_be_bytes()))
            .ok_or_else(|| {
                format!(
                    "a turn's key has {} hexadecimal digits, but {text:?} was given",
                    2 * Self::BYTES
                )
            })
    }
}
