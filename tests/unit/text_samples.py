"""Strings that tokenizers are compared on: many scripts, code, odd white space, and seeded random mixtures of them."""

# ruff: noqa: RUF001 - characters that look like others are what these strings are for
from __future__ import annotations

import random

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. It's 9:45, we've 1,234.56 reasons; don't they'll I'm you're HE'LL?",
    "Größe, Straße, Übermut – „Anführungszeichen“ und ‚einfache‘; 3,5 % von 1.000 €.",
    "L'été dernier, où étiez-vous ? Ça m'a coûté 12 €… « Voilà ! »",
    "¿Qué tal, señor? ¡Mañana será otro día! El pingüino bebe agua.",
    "Привет, мир! Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "你好，世界！今天天气怎么样？我们一共有１２３个苹果。",
    "吾輩は猫である。名前はまだ無い。カタカナとひらがな、ﾊﾝｶｸも。",
    "안녕하세요, 세계! 오늘은 날씨가 좋네요. 각가",
    "مرحبا بالعالم! كيف حالك اليوم؟ ١٢٣٤٥ وَالْحَمْدُ لِلَّهِ",
    "שלום עולם! מה שלומך היום? עִבְרִית",
    "नमस्ते दुनिया! आप कैसे हैं? १२३ क्षत्रिय",
    "สวัสดีชาวโลก วันนี้เป็นอย่างไรบ้าง ๑๒๓",
    "Γειά σου Κόσμε! Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "வணக்கம் உலகம்! ஹலோ நமக்கு",
    "გამარჯობა მსოფლიო! Բարեւ աշխարհ! ሰላም ልዑል! ᏣᎳᎩ ᠮᠣᠩᠭᠣᠯ",
    "Xin chào thế giới! Tiếng Việt có dấu: ắ ằ ẳ ẵ ặ.",
    "Dvě žluťoučké kobyly; İstanbul'da ığdır ŞEKER; naïve café cafe\u0301 A\u030a\u0327",
    "👋🏽 🌍 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️‍🔥 1️⃣ ☺︎ 𝕳𝖊𝖑𝖑𝖔 𝟘𝟙𝟚 ½ Ⅷ ² ﬁ ǅ",
    'def f(x: int) -> str:\n    """Doc."""\n\treturn f"{x!r:>{10}}"  # 100%\n\n\nprint(f(0xFF), 1e-10, __name__)',
    '{"key": [1, 2.5, null], "t": "\\u00e9\\n"}\r\n<div class="a">&nbsp;</div>\r\n',
    "https://example.com/a/b?c=d&e=%20#f user@host.org C:\\path\\to /usr/bin/env $HOME",
    "a  b   c    d\t\te\n\nf\n \n g\r\n\r\nh \u00a0 i\u2003j\u200bk\u2028l\u3000m   ",
    "    indented\n        more\n\ttab\n  \n",
    "!!!???...---===***___~~~```###@@@ ,.;: (((a)))[[b]]{{c}} <<>> ||&&",
    "ZALGO: Z̸̢̛͙̻̈́a̵͕͌l̶̰̇g̷̣̈́o̸̭͝ \u0000\u0001\u001f\u007f\u0085\ufeff\ufffd\U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbb 11111111111111111 =================",
    "▁lower one eighth block▁▁ <0x0A> <0xZZ> <s> </s> <unk> Ġ Ċ Ã©",
    " leading", "  two leading", "trailing ", "\n", " ", "", "a", "\u00a0", "   ",
]  # fmt: skip

BLOCKS = [
    (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0x980), (0xE00, 0xE80),
    (0x1100, 0x1200), (0x2000, 0x2070), (0x2190, 0x2300), (0x2600, 0x27C0), (0x3000, 0x3100), (0x4E00, 0x4F00),
    (0xAC00, 0xAD00), (0xFE00, 0xFE10), (0xFF00, 0xFFEF), (0x1D400, 0x1D500), (0x1F300, 0x1F650), (0x20000, 0x20100),
]  # fmt: skip
GLUE = ["", "", " ", "  ", "\n", "\n\n", "\t", "\r\n", "'s", "'LL", "1", "23", ".", ",", "-", "▁", "\u00a0", "é"]


def strings(count: int, seed: int, markers: tuple[str, ...] = ()) -> list[str]:
    """The sentences, then `count` seeded random strings; `markers` (special tokens) are strewn in."""
    rng = random.Random(seed)
    glue = [*GLUE, *markers]
    texts = list(SENTENCES)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 6)):
            kind = rng.random()
            if kind < 0.4:
                sentence = rng.choice(SENTENCES)
                start = rng.randrange(len(sentence) + 1)
                parts.append(sentence[start : start + rng.randint(1, 20)])
            elif kind < 0.7:
                low, high = rng.choice(BLOCKS)
                parts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 8))))
            elif kind < 0.75:
                parts.append(_any_character(rng))
            parts.append(rng.choice(glue))
        texts.append("".join(parts))
    return texts


def _any_character(rng: random.Random) -> str:
    while 0xD800 <= (code := rng.randrange(0x110000)) < 0xE000:
        pass
    return chr(code)
