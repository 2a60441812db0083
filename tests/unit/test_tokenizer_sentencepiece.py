"""SentencePiece-style vocabularies from GGUF, against sentencepiece itself and transformers' conversion."""

from __future__ import annotations

import io
import itertools
import random
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from lmserve._core import GgufFile, Tokenizer
from lmserve.errors import LmserveError
from text_samples import SENTENCES, strings
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ADDED = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED, "[PAD1]": UNUSED}


@pytest.fixture(scope="module")
def processor() -> sentencepiece.SentencePieceProcessor:
    return trained()


def trained() -> sentencepiece.SentencePieceProcessor:
    """A BPE model with byte fallback, as Llama's: no normalization, a space before the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(itertools.repeat(SENTENCES, 5)),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_gguf(path: Path, sp: sentencepiece.SentencePieceProcessor, architecture: str, **flags: bool) -> None:
    """The vocabulary of `sp`, then `ADDED`."""
    pieces = range(sp.vocab_size())

    def kind(piece: int) -> int:
        if sp.is_unknown(piece):
            return UNKNOWN
        if sp.is_control(piece):
            return CONTROL
        return BYTE if sp.is_byte(piece) else NORMAL

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*(sp.id_to_piece(piece) for piece in pieces), *ADDED])
    writer.add_token_scores([*(sp.get_score(piece) for piece in pieces), *(-1000.0 for _ in ADDED)])
    writer.add_token_types([*map(kind, pieces), *ADDED.values()])
    writer.add_bos_token_id(sp.bos_id())
    writer.add_eos_token_id(sp.eos_id())
    writer.add_unk_token_id(sp.unk_id())
    for key, flag in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", flag)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_path(processor: sentencepiece.SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "vocabulary.gguf"
    # transformers takes this architecture to put a space before every text, as llama.cpp does for all of them.
    write_gguf(path, processor, "phi3")
    return path


@pytest.fixture(scope="module")
def ours(gguf_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GgufFile(gguf_path))


@pytest.fixture(scope="module")
def converted(gguf_path: Path) -> tokenizers.Tokenizer:
    architecture, tokenizer, _ = get_gguf_tokenizer(str(gguf_path))
    return convert_gguf_tokenizer(architecture, tokenizer)[0]


def test_text_is_cut_as_sentencepiece_cuts_it(ours: Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> None:
    # The names of control tokens are text to sentencepiece, and tokens to a server.
    names = ("<s>", "</s>", "<unk>")
    texts = [text for text in strings(6000, seed=1) if not any(name in text for name in names)]
    assert len(texts) > 5000
    expected = processor.encode(texts)
    assert [text for text, want in zip(texts, expected, strict=True) if ours.encode(text) != want] == []


def test_special_tokens_are_found_as_transformers_finds_them(ours: Tokenizer, converted: tokenizers.Tokenizer) -> None:
    texts = strings(6000, seed=2, markers=(*ADDED, "<s>", "</s>", "<unk>", "<0x41>"))
    expected = converted.encode_batch(texts, add_special_tokens=False)
    assert [text for text, want in zip(texts, expected, strict=True) if ours.encode(text) != want.ids] == []


def test_tokens_are_decoded_as_transformers_decodes_them(ours: Tokenizer, converted: tokenizers.Tokenizer) -> None:
    rng = random.Random(3)
    for _ in range(4000):
        low, high = rng.choice([(0, ours.vocab_size), (0, 300), (3, 259)])
        tokens = [rng.randrange(low, high) for _ in range(rng.randint(0, 12))]
        for skip_special in (True, False):
            expected = converted.decode(tokens, skip_special_tokens=skip_special)
            assert ours.decode(tokens, skip_special=skip_special) == expected


def test_a_beginning_token_comes_first_unless_the_file_says_otherwise(
    ours: Tokenizer, processor: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    assert ours.encode("a", add_special=True) == [processor.bos_id(), *ours.encode("a")]
    write_gguf(tmp_path / "a.gguf", processor, "llama", add_bos_token=False, add_eos_token=True, add_space_prefix=False)
    other = Tokenizer.from_gguf(GgufFile(tmp_path / "a.gguf"))
    assert other.encode("a", add_special=True) == [*other.encode("a"), processor.eos_id()]
    assert other.encode(" The") == ours.encode("The")
    assert other.decode(other.encode(" The")) == " The"


def test_text_that_goes_on_gets_no_space_before_it(ours: Tokenizer) -> None:
    before = ours.encode("x")
    for text in strings(1000, seed=4):
        if "<" in text:
            continue
        # In such a vocabulary this character is a space.
        assert ours.decode([*before, *ours.encode_continued(text)]) == "x" + text.replace("\u2581", " ")
    assert ours.encode_continued(" </s>") == [ours.token_to_id("\u2581"), 2]
    assert ours.encode_continued("a</s>b") == [ours.token_to_id("a"), 2, *ours.encode("b")]
    assert ours.encode_continued("</s>b") == ours.encode("</s>b")


@pytest.mark.parametrize("key", ["tokens", "scores", "token_type"])
def test_vocabularies_that_contradict_themselves_are_refused(key: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("llama")
    lists = {"tokens": ["<unk>", "a", "a" if key == "tokens" else "b"], "scores": [0.0] * 3, "token_type": [2, 1, 1]}
    if key != "tokens":
        lists[key] = lists[key][:2]
    for name, values in lists.items():
        writer.add_array(f"tokenizer.ggml.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LmserveError) as caught:
        Tokenizer.from_gguf(GgufFile(tmp_path / "a.gguf"))
    assert caught.value.status == 400
