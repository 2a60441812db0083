"""Decoding token by token: what comes out, joined, is what the `tokenizers` package decodes at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from lmserve._core import GgufFile, StreamDecoder, Tokenizer
from test_tokenizer import bert, byte_fallback, byte_level, unigram
from text_samples import strings

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def streamed(decoder: StreamDecoder, tokens: list[int]) -> list[str]:
    return [*(decoder.push(token)[0] for token in tokens), decoder.flush()[0]]


@pytest.mark.parametrize("train", [bert, unigram, byte_fallback, byte_level])
def test_deltas_join_to_the_whole_text(train: Callable[[], tokenizers.Tokenizer]) -> None:
    data = train().to_str()
    ours, oracle = Tokenizer.from_json(data.encode()), tokenizers.Tokenizer.from_str(data)
    oracle.no_truncation()
    oracle.no_padding()
    size = oracle.get_vocab_size()
    rng = random.Random(1)
    samples = [oracle.encode(text).ids for text in strings(1500, seed=2)]
    samples += [[rng.randrange(size + 2) for _ in range(rng.randint(0, 20))] for _ in range(1500)]
    # Runs of byte tokens, valid and not.
    samples += [[rng.randrange(3, 280) for _ in range(rng.randint(0, 9))] for _ in range(1500)]
    for tokens in samples:
        for skip_special in (True, False):
            expected = oracle.decode(tokens, skip_special_tokens=skip_special)
            assert "".join(streamed(StreamDecoder(ours, skip_special=skip_special), tokens)) == expected


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GgufFile(smollm2_gguf))


def test_no_delta_has_half_a_character(smollm2: Tokenizer) -> None:
    for text in strings(1500, seed=3):
        tokens = smollm2.encode(text)
        whole = smollm2.decode(tokens, skip_special=False)
        deltas = streamed(StreamDecoder(smollm2, skip_special=False), tokens)
        assert "".join(deltas) == whole
        if REPLACEMENT not in whole:
            assert not any(REPLACEMENT in delta for delta in deltas)


def test_a_delta_waits_for_no_more_than_a_character(smollm2: Tokenizer) -> None:
    for text in strings(300, seed=4):
        tokens = smollm2.encode(text)
        decoder = StreamDecoder(smollm2, skip_special=False)
        sent = ""
        for count, token in enumerate(tokens, start=1):
            sent += decoder.push(token)[0]
            whole = smollm2.decode(tokens[:count], skip_special=False)
            assert whole.startswith(sent)
            assert whole[len(sent) :] in ("", REPLACEMENT)


def test_random_tokens_with_much_invalid_utf8(smollm2: Tokenizer) -> None:
    rng = random.Random(5)
    broken = [token for token in range(smollm2.vocab_size) if not _is_text(smollm2.token_bytes(token))]
    for _ in range(1000):
        pool = broken if rng.random() < 0.5 else range(smollm2.vocab_size)
        tokens = [rng.choice(pool) for _ in range(rng.randint(1, 40))]
        assert "".join(streamed(StreamDecoder(smollm2), tokens)) == smollm2.decode(tokens)


def _is_text(piece: bytes | None) -> bool:
    try:
        (piece or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def test_stop_strings_are_found_across_tokens(smollm2: Tokenizer) -> None:
    rng = random.Random(6)
    for text in strings(1500, seed=7):
        tokens = smollm2.encode(text)
        whole = smollm2.decode(tokens, skip_special=False)
        stops = [whole[at : at + rng.randint(1, 5)] for at in rng.choices(range(len(whole) + 1), k=3)] + ["\x00nowhere"]
        ends = [(whole.find(stop) + len(stop), -len(stop)) for stop in stops if stop and stop in whole]
        for include_stop in (False, True):
            decoder = StreamDecoder(smollm2, stop=stops, include_stop=include_stop, skip_special=False)
            got, stopped = "", False
            for token in tokens:
                delta, stopped = decoder.push(token)
                got += delta
                if stopped:
                    break
            if not stopped:
                delta, stopped = decoder.flush()
                got += delta
            assert stopped == bool(ends)
            end, length = min(ends, default=(len(whole), 0))
            assert got == whole[: end if include_stop else end + length]
