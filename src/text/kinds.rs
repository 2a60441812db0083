//! Characters of which it is known what the patterns that cut texts into words take them for.

/// What a character is to the patterns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Letter,
    Number,
    Space,
    Mark,
}

impl Kind {
    /// `None` where patterns differ, or where that is not worked out here.
    pub(super) fn of(character: char) -> Option<Self> {
        Some(match character {
            // Some patterns take these together.
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

/// Whether a character stands by itself: it neither joins the one before it nor changes places with it when text is normalized.
pub(super) fn begins_anew(character: char) -> bool {
    character.is_ascii() || Kind::of(character).is_some()
}
