"""The real core over a model that is a formula: the whole engine but the mathematics, without torch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from lmserve import _core
from lmserve.model.interface import I32, LogitEdits, RunnerInfo, StepBuffers
from numpy.typing import NDArray

MAX_MODEL_LEN = 4096
SPECIAL = ["<|im_start|>", "<|im_end|>"]
EOS = 257  # <|im_end|>
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

# Mostly letters, and some bytes that are only parts of characters.
SAID = [*range(32, 127), *"é你😀".encode(), 0xFF, 0xC3, 10]
# Letters alone, so that a text has the tokens that were said.
PLAIN = [*b"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ."]
END_EVERY = 97  # positions
BLOCK = 16


BEGINS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": SPECIAL[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {SPECIAL[0]: {"id": SPECIAL[0], "ids": [256], "tokens": [SPECIAL[0]]}},
}


def byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_tokenizer(*, repeat: int = 1, begins: bool = False, added: tuple[str, ...] = ()) -> _core.Tokenizer:
    """`byte_tokenizer_json`, read."""
    return _core.Tokenizer.from_json(byte_tokenizer_json(repeat=repeat, begins=begins, added=added))


def byte_tokenizer_json(*, repeat: int = 1, begins: bool = False, added: tuple[str, ...] = ()) -> bytes:
    """One token a byte, the special ones, and those `added` after them, for which the model has no row.

    `repeat`: how often a token says its byte; `begins`: with one before each text.
    """
    special = [
        {
            "id": 256 + index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, text in enumerate([*SPECIAL, *added])
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": BEGINS if begins else None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {character * repeat: byte for byte, character in enumerate(byte_characters())},
            "merges": [],
        },
    }
    return json.dumps(description).encode()


class FormulaRunner:
    """The next token is a function of the last one, its position and the engine's random number."""

    def __init__(
        self,
        *,
        max_batch: int = 64,
        max_batch_tokens: int = 512,
        max_model_len: int = MAX_MODEL_LEN,
        num_blocks: int = 64 * MAX_MODEL_LEN // BLOCK,
        pause: float = 0.0,
        said: Sequence[int] = SAID,
    ) -> None:
        self.pause = pause  # seconds a step takes
        self.info = RunnerInfo(
            name="formula",
            device="cpu",
            dtype="none",
            vocab_size=258,
            hidden_size=8,
            max_model_len=max_model_len,
            block_size=BLOCK,
            num_blocks=num_blocks,
            kv_bytes_per_token=0,
            weight_bytes=0,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            can_generate=True,
            can_embed=True,
        )

        def ints(*shape: int) -> I32:
            return np.zeros(shape, np.int32)

        def floats(*shape: int) -> NDArray[np.float32]:
            return np.zeros(shape, np.float32)

        tokens, rows = max_batch_tokens, max_batch
        self.buffers = StepBuffers(
            token_ids=ints(tokens),
            positions=ints(tokens),
            slots=ints(tokens),
            query_start=ints(rows + 1),
            context_lens=ints(rows),
            block_tables=ints(rows, max_model_len // BLOCK),
            sample_rows=ints(rows),
            temperature=floats(rows),
            top_k=ints(rows),
            top_p=floats(rows),
            min_p=floats(rows),
            repetition_penalty=floats(rows),
            presence_penalty=floats(rows),
            frequency_penalty=floats(rows),
            uniform=floats(rows),
            logprobs=ints(rows),
            sampled=ints(rows),
            sampled_logprob=floats(rows),
            top_ids=ints(rows, 20),
            top_logprobs=floats(rows, 20),
            adapters=ints(rows),
        )
        self._said = np.array(said, np.int32)

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        b = self.buffers
        b.sampled[:n_rows] = self.next_tokens(n_tokens, n_seqs, n_rows)
        if edits is not None and edits.masks is not None:
            # What is allowed and comes next after what it would have said.
            guided = np.array(edits.masks.rows)
            bits = np.frombuffer(edits.masks.wait(), np.uint8).reshape(len(guided), -1)
            allowed = np.unpackbits(bits, axis=1, bitorder="little")[:, : self.info.vocab_size]
            offset = (np.arange(self.info.vocab_size) + b.sampled[guided, None]) % self.info.vocab_size
            first = np.take_along_axis(allowed, offset, axis=1).argmax(axis=1)
            b.sampled[guided] = np.take_along_axis(offset, first[:, None], axis=1)[:, 0]
        b.sampled_logprob[:n_rows] = -1.5
        if edits is not None:
            # A row of a prompt is biased towards its token, and towards nothing else.
            scored = np.flatnonzero(np.diff(edits.bias_start) == 1)
            tokens = edits.bias_token[edits.bias_start[scored]]
            forced = edits.bias_value[edits.bias_start[scored]] > 1e6
            b.sampled_logprob[scored[forced]] = -tokens[forced] / 64
        b.top_ids[:n_rows] = np.arange(65, 85)
        b.top_logprobs[:n_rows] = -np.arange(1, 21)

    def next_tokens(self, n_tokens: int, n_seqs: int, n_rows: int) -> I32:
        del n_tokens, n_seqs
        b = self.buffers
        rows = b.sample_rows[:n_rows]
        last, position = b.token_ids[rows], b.positions[rows]
        luck = np.where(b.temperature[:n_rows] > 0, b.uniform[:n_rows] * 1000, 0).astype(np.int32)
        said = self._said[(last * 131 + position * 31 + luck) % len(self._said)]
        return np.where(position % END_EVERY == END_EVERY - 1, EOS, said).astype(np.int32)

    def collect(self) -> None:
        if self.pause:
            time.sleep(self.pause)

    def embed(self, token_ids: I32, cu_seqlens: I32) -> NDArray[np.float32]:
        rows = []
        for start, end in pairwise(cu_seqlens):
            weights = 1 + np.arange(end - start)[:, None] + np.arange(8)[None, :]
            row = np.sin((1 + token_ids[start:end, None]) * weights).sum(0)
            rows.append(row / np.linalg.norm(row))
        return np.array(rows, np.float32)


class RecitingRunner(FormulaRunner):
    """Says one text in each answer. It sees how much it has said in the tokens that it was given."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = [*text.encode(), EOS]
        self._memory = np.zeros(self.info.num_blocks * BLOCK, np.int32)

    def next_tokens(self, n_tokens: int, n_seqs: int, n_rows: int) -> I32:
        b = self.buffers
        self._memory[b.slots[:n_tokens]] = b.token_ids[:n_tokens]
        sequences = np.searchsorted(b.query_start[1 : n_seqs + 1], b.sample_rows[:n_rows], side="right")
        said = [self._said_so_far(sequence) for sequence in sequences]
        return np.array([self._text[min(count, len(self._text) - 1)] for count in said], np.int32)

    def _said_so_far(self, sequence: int) -> int:
        length = self.buffers.context_lens[sequence]
        slots = (self.buffers.block_tables[sequence, :, None] * BLOCK + np.arange(BLOCK)).ravel()[:length]
        (begins,) = np.nonzero(self._memory[slots] == 256)  # <|im_start|>
        return int(length - begins[-1] - len("<assistant\n"))


def reciting_engine(text: str, template: str = TEMPLATE, **parsers: str) -> _core.Engine:
    """`parsers`: of the core's `ChatTemplate`."""
    template_of = chat_template(template, **parsers)
    return _core.Engine(RecitingRunner(text), byte_tokenizer(), template_of, eos_token_ids=[EOS])


def chat_template(source: str = TEMPLATE, **parsers: str) -> _core.ChatTemplate:
    """`parsers`: how answers are read."""
    return _core.ChatTemplate(source, json.dumps({"eos_token": "<|im_end|>"}).encode(), **parsers)


def formula_engine(
    *,
    pause: float = 0.0,
    max_batch: int = 64,
    template: _core.ChatTemplate | None = None,
    repeat: int = 1,
    said: Sequence[int] = SAID,
    **options: Any,
) -> _core.Engine:
    """`repeat`: as for `byte_tokenizer`; `options`: of the core's `Engine`."""
    template = template or chat_template()
    runner = FormulaRunner(pause=pause, max_batch=max_batch, said=said)
    return _core.Engine(runner, byte_tokenizer(repeat=repeat), template, eos_token_ids=[EOS], **options)
