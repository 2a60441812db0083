//! Classifies characters for the patterns that cut texts into words.

/// The class of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Letter,
    Number,
    Space,
    Mark,
}

impl Kind {
    /// `None` if patterns disagree about the character, or it is not classified here.
    pub(super) fn of(character: char) -> Option<Self> {
        Some(match character {
            // Some patterns join these.
            '\r' | '\n' | '/' => return None,
            // Latin, Greek, Cyrillic, Arabic, kana, Han and Hangul.
            'a'..='z'
            | 'A'..='Z'
            | 'À'..='Ö'
            | 'Ø'..='ö'
            | 'ø'..='ʯ'
            | 'Α'..='Ρ'
            | 'Σ'..='Ω'
            | 'α'..='ω'
            | 'А'..='я'
            | 'ا'..='غ'
            | 'ァ'..='ヺ'
            | 'ぁ'..='ゖ'
            | '一'..='鿌'
            | '가'..='힣' => Self::Letter,
            '0'..='9' => Self::Number,
            ' ' | '\t' => Self::Space,
            '!'..='~'
            | '、'
            | '。'
            | '「'
            | '」'
            | '，'
            | '！'
            | '？'
            | '：'
            | '；'
            | '،'
            | '؟' => Self::Mark,
            _ => return None,
        })
    }
}

/// Whether a character is independent of the one before it: normalization neither composes nor reorders them.
pub(super) fn begins_anew(character: char) -> bool {
    character.is_ascii() || Kind::of(character).is_some()
}
