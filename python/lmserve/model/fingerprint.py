"""A fingerprint of a model that is computed quickly, whatever the size of its weights."""

from __future__ import annotations

import json
from hashlib import sha256

import numpy as np

from lmserve._core import GgufFile
from lmserve.model.checkpoint import Checkpoint

# Elements of each tensor that are looked at.
SAMPLE = 1024


def fingerprint(checkpoint: Checkpoint) -> bytes:
    """32 bytes over configuration, tokenizer, chat template, and the beginning of every tensor.

    The path does not count: a model that was moved is the same. Raises OSError if a file cannot be read.
    """
    digest = sha256()

    def add(part: bytes) -> None:
        # The length keeps two parts apart.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    if checkpoint.path.is_file():
        with checkpoint.path.open("rb") as file:
            add(file.read(GgufFile(checkpoint.path).data_offset))
    else:
        for name in ("config.json", "tokenizer.json"):
            file_path = checkpoint.path / name
            add(file_path.read_bytes() if file_path.is_file() else b"")
    text = [checkpoint.chat_template, checkpoint.special_tokens, checkpoint.eos_token_ids]
    if checkpoint.tool_template is not None:
        text.append(checkpoint.tool_template)
    add(json.dumps(text, sort_keys=True).encode())
    # What a head that guesses tokens ahead is like changes no answer.
    guesses = f"{checkpoint.config.mtp_layer}." if checkpoint.config.mtp else None
    for name, tensor in sorted(checkpoint.tensors.items()):
        if guesses is not None and name.startswith(guesses):
            continue
        data = tensor.data
        sample = data[:1].reshape(-1)[:SAMPLE] if data.ndim > 1 else data[:SAMPLE]
        add(f"{name} {tensor.dtype} {tensor.shape}".encode())
        add(np.ascontiguousarray(sample).tobytes())
    return digest.digest()
