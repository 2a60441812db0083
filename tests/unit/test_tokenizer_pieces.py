"""A text that is tokenized in pieces has the tokens that it has as a whole, and no fewer than its bytes promise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import test_tokenizer
import test_tokenizer_sentencepiece
import thorough
import tokenizers
from lmserve._core import GgufFile, Tokenizer
from lmserve.errors import LmserveError
from text_samples import BLOCKS, SENTENCES, strings
from tokenizers import Regex, normalizers, pre_tokenizers

WHOLE = 1 << 40
MARKERS = ("<|begin|>", "<|end|>", "<think>", "</s>", "[SEP]", "<|endoftext|>", "naïve", "été ", "<s>", "<0x41>")
FAMILIES = [
    "gpt-2",
    "smollm",
    "llama-bpe",
    "qwen2",
    "qwen35",
    "minicpm5",
    "seed-coder",
    "bailingmoe",
    "tekken",
    "gpt-4o",
    "youtu",
]


def family(pre: str, folder: Path) -> Tokenizer:
    """A byte-level vocabulary from GGUF whose words are cut as `pre` says."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(SENTENCES * 4, test_tokenizer.byte_level_trainer(1200))
    test_tokenizer.write_byte_level(folder / "a.gguf", trained, pre, test_tokenizer.SPECIAL, add_bos_token=True)
    return Tokenizer.from_gguf(GgufFile(folder / "a.gguf"))


def digits_of_three() -> tokenizers.Tokenizer:
    """As `byte_level`, with words cut by other steps, and nothing normalized but composed."""
    oracle = test_tokenizer.byte_level()
    number = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    oracle.pre_tokenizer = pre_tokenizers.Sequence([number, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    oracle.normalizer = normalizers.NFC()
    return oracle


def spaced() -> tokenizers.Tokenizer:
    """As `byte_level`, with a space before each text, and no token that must be a word."""
    data = json.loads(test_tokenizer.byte_level().to_str())
    data["added_tokens"] = [token | {"single_word": False} for token in data["added_tokens"]]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def own_pattern() -> tokenizers.Tokenizer:
    """A pattern that looks as far ahead as it likes: it must not be cut."""
    oracle = test_tokenizer.byte_level()
    own = pre_tokenizers.Split(Regex(r"a+b|a|[^a]+"), "isolated")
    oracle.pre_tokenizer = pre_tokenizers.Sequence([own, pre_tokenizers.ByteLevel(use_regex=False)])
    return oracle


JSON: list[Callable[[], tokenizers.Tokenizer]] = [
    test_tokenizer.bert,
    test_tokenizer.byte_fallback,
    test_tokenizer.byte_level,
    test_tokenizer.bare,
    test_tokenizer.unigram,
    digits_of_three,
    spaced,
    own_pattern,
]
NAMES = [*FAMILIES, "sentencepiece", *(train.__name__ for train in JSON)]
# What their normalizer, pattern or added tokens do is not known to leave the words of a piece alone.
UNCUT = {"unigram", "own_pattern", "byte_level", "youtu"}


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param in FAMILIES:
        ours = family(request.param, folder)
    elif request.param == "sentencepiece":
        trained = test_tokenizer_sentencepiece.trained()
        test_tokenizer_sentencepiece.write_gguf(folder / "a.gguf", trained, "llama", add_eos_token=True)
        ours = Tokenizer.from_gguf(GgufFile(folder / "a.gguf"))
    else:
        [train] = [train for train in JSON if train.__name__ == request.param]
        ours = Tokenizer.from_json(train().to_str().encode())
    assert ours.works_in_pieces == (request.param not in UNCUT)
    return ours


def long_texts() -> list[str]:
    """Mixtures of everything, and long runs of one kind, which have no words to be cut at."""
    rng = random.Random(11)
    parts = strings(4000, seed=12, markers=MARKERS)
    texts = ["".join(rng.choices(parts, k=rng.randint(20, 200))) for _ in range(30)]
    texts += [" ".join(rng.choices(parts, k=120)) for _ in range(10)]
    texts += ["".join(chr(rng.randrange(*rng.choice(BLOCKS))) for _ in range(2000)) for _ in range(20)]
    texts += [
        "".join(rng.choices(alphabet, k=4000))
        for alphabet in ("aB", "ab 1", "a'sl L\n/", "漢字Bb", " \n\t", "1", ".-/\n")
    ]
    runs = [
        "1",
        "a",
        "aB",
        "漢",
        "漢字B",
        " ",
        "\n ",
        "ab ",
        "-",
        "/\n",
        "e\u0301",
        "\u0301",
        "▁",
        "<|end|>",
        "naïve",
        "Ā",
        "🏳️‍🌈",
        "'s",
    ]
    texts += [run * (9000 // len(run)) + "b" for run in runs]
    return texts + [run * 700 + " x" + run * 900 for run in runs]


TEXTS = long_texts()[:: thorough.of(3, 1)]


def test_a_text_in_pieces_has_the_tokens_of_the_whole(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        whole = tokenizer.encode(text, add_special=True, piece_bytes=WHOLE)
        assert tokenizer.least_tokens(text) <= len(whole), text[:50]
        for piece in (64, 700, 3000):
            assert tokenizer.encode(text, add_special=True, piece_bytes=piece) == whole, (piece, text[:50])


def test_a_text_that_goes_on_has_the_tokens_of_the_whole(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        whole = tokenizer.encode_continued(text, piece_bytes=WHOLE)
        for piece in (64, 1500):
            assert tokenizer.encode_continued(text, piece_bytes=piece) == whole, (piece, text[:50])


def test_a_very_long_word_has_the_tokens_of_the_whole(tokenizer: Tokenizer) -> None:
    """Words beyond the size that a model is given at once are joined from windows."""
    rng = random.Random(13)
    for alphabet in ("a", "the", "abcdefgh", "éa", "漢字かな", "aaaaaaab"):
        text = "".join(rng.choices(alphabet, k=40_000))
        assert tokenizer.encode(text, piece_bytes=1000) == tokenizer.encode(text, piece_bytes=WHOLE), alphabet


def test_published_models(smollm2_gguf: Path, minilm_folder: Path) -> None:
    smollm2 = Tokenizer.from_gguf(GgufFile(smollm2_gguf))
    minilm = Tokenizer.from_json((minilm_folder / "tokenizer.json").read_bytes())
    for ours in (smollm2, minilm):
        assert ours.works_in_pieces
        for text in TEXTS:
            assert ours.encode(text, piece_bytes=500) == ours.encode(text, piece_bytes=WHOLE), text[:50]
    assert smollm2.least_tokens("1" * 8_000_000) > 8192
    # An unknown word of any length is one token to it.
    assert minilm.least_tokens("1" * 8_000_000) == 0


def test_what_is_abandoned_ends() -> None:
    ours = Tokenizer.from_json(test_tokenizer.byte_level().to_str().encode())
    assert ours.encode("a")
    ours.abandon()
    with pytest.raises(LmserveError) as caught:
        ours.encode("a b" * 100_000)
    assert (caught.value.status, caught.value.error["code"]) == (503, "draining")


@pytest.mark.parametrize("field", ["lstrip", "rstrip"])
def test_where_a_token_takes_the_space_around_it_there_is_no_bound(field: str) -> None:
    data = json.loads(test_tokenizer.byte_level().to_str())
    data["added_tokens"] = [token | {"rstrip": False} for token in data["added_tokens"]]
    assert Tokenizer.from_json(json.dumps(data).encode()).least_tokens(" " * 100) > 0
    data["added_tokens"][0][field] = True
    assert Tokenizer.from_json(json.dumps(data).encode()).least_tokens(" " * 100) == 0
