//! The names of contents.

use std::fmt::{self, Debug, Write};

use sha2::{Digest as _, Sha256};

/// A SHA-256 of tokens, and of what they belong to.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

/// What a content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Keys and values of a full block.
    Block,
    /// A recurrent state, with the keys and values of the block that is filled in part.
    State,
}

/// Names one content for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// What it is.
    pub kind: Kind,
    /// Of all tokens up to its end.
    pub digest: Digest,
}

impl Kind {
    pub(super) const fn letter(self) -> char {
        match self {
            Self::Block => 'b',
            Self::State => 's',
        }
    }
}

impl Digest {
    /// Before the first token: of all that decides what tokens mean and who may find them.
    pub fn root(parts: &[&[u8]]) -> Self {
        let mut hasher = Sha256::new();
        for part in parts {
            // The length keeps two parts apart.
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Self(hasher.finalize().into())
    }

    /// Of the tokens before, which are this digest's, and those of a further full block.
    #[must_use]
    pub fn block(self, tokens: &[u32]) -> Self {
        self.extended(Kind::Block, tokens)
    }

    /// The name of the state behind the tokens of this digest and those of `tail`.
    pub fn state_key(self, tail: &[u32]) -> Key {
        Key {
            kind: Kind::State,
            digest: self.extended(Kind::State, tail),
        }
    }

    /// The name of the block that this digest ends with.
    pub const fn block_key(self) -> Key {
        Key {
            kind: Kind::Block,
            digest: self,
        }
    }

    fn extended(self, kind: Kind, tokens: &[u32]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update([kind.letter() as u8]);
        hasher.update(self.0);
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        Self(hasher.finalize().into())
    }

    pub(super) const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8]
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Key {
    /// The name of its file.
    pub fn file_name(&self) -> String {
        let mut name = format!("{}-", self.kind.letter());
        for byte in self.digest.0 {
            // A String takes everything.
            let _ = write!(name, "{byte:02x}");
        }
        name
    }

    /// The content that a file of that name would hold.
    pub fn of_file(name: &str) -> Option<Self> {
        let (kind, hex) = name.split_once('-')?;
        let kind = match kind {
            "b" => Kind::Block,
            "s" => Kind::State,
            _ => return None,
        };
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if hex.len() != 64 || !hex.bytes().all(is_hex) {
            return None;
        }
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).ok()?;
        }
        let digest = Digest(bytes);
        Some(Self { kind, digest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_of_all_tokens_their_owner_and_the_kind() {
        let root = Digest::root(&[b"model", b"tenant"]);
        let names = [
            root.block(&[1, 2]).block(&[3, 4]).block_key(),
            root.block(&[1, 3]).block(&[3, 4]).block_key(),
            root.block(&[3, 4]).block_key(),
            root.block(&[1, 2]).state_key(&[3, 4]),
            root.block(&[1, 2]).state_key(&[3]),
            Digest::root(&[b"modelt", b"enant"])
                .block(&[1, 2])
                .block(&[3, 4])
                .block_key(),
        ];
        for (at, key) in names.iter().enumerate() {
            assert!(!names[at + 1..].contains(key), "{at}");
            assert_eq!(Key::of_file(&key.file_name()), Some(*key));
        }
        assert_eq!(
            root.block(&[1, 2]),
            Digest::root(&[b"model", b"tenant"]).block(&[1, 2])
        );
    }

    #[test]
    fn other_files_name_no_content() {
        let name = Digest::root(&[]).block_key().file_name();
        for other in [
            "lock".to_owned(),
            String::new(),
            format!("{name}.new"),
            name.replacen('b', "c", 1),
            name[..65].to_owned(),
            format!("b-{}", "+1".repeat(32)),
            format!("b-{}", "é".repeat(32)),
        ] {
            assert_eq!(Key::of_file(&other), None, "{other}");
        }
    }
}
