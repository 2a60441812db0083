"""Configurations with values of every wrong kind: each is served or is one line, never a traceback."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lmserve.cli import main
from lmserve.config import ServeConfig
from lmserve.engine.load import ModelPlan
from lmserve.errors import LmserveError
from lmserve.model import CheckpointError, families, open_checkpoint
from lmserve.model.families import llama
from safetensors.numpy import save_file
from tiny_models import CONFIGS

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
WRONG: list[Any] = [
    *(None, True, False, 0, -1, 3, 10**30, 1.5, -0.5, 1e308, math.nan, math.inf, -math.inf),
    *("", "a", "\ud800", "\0"),
    *([], [1], [-1], ["a"], [None], [[1]], [math.nan], {}, {"a": 1}, {"": None}, DEEP),
]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "quantization_config": None,
    "text_config": None,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
TOKEN = {"id": 2, "content": "<e>", "special": True, "normalized": False, "single_word": False, "lstrip": False}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [TOKEN | {"rstrip": False}],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<e>": 2}, "unk_token": "a"},
}
FILES: dict[str, dict[str, Any]] = {
    "config.json": CONFIG,
    "generation_config.json": {"eos_token_id": [2], "temperature": 0.5, "top_k": 5, "do_sample": True, "top_p": 0.9},
    "special_tokens_map.json": {"bos_token": "a", "eos_token": {"content": "<e>"}},
    "tokenizer_config.json": {"eos_token": "<e>", "chat_template": "{{ messages[0].content }}{{ eos_token }}"},
    "tokenizer.json": TOKENIZER,
    "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
}
SETTINGS = ServeConfig(kv_memory=1 << 20, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    shapes = llama.FAMILY.expected_tensors(llama.FAMILY.hf_config(CONFIG))
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def write(folder: Path, **changes: Any) -> None:
    for name, value in FILES.items():
        if name.startswith("chat_template") and name not in changes:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_text(json.dumps(changes.get(name, value)))


def places(value: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where there is a value in an object, to its depths."""
    found = []
    for key, inner in value.items():
        found.append((*path, key))
        if isinstance(inner, dict):
            found += places(inner, (*path, key))
    return found


def changed(value: dict[str, Any], path: tuple[str, ...], wrong: Any) -> dict[str, Any]:
    first, *rest = path
    return value | {first: changed(value[first], tuple(rest), wrong) if rest else wrong}


def check_line(error: Exception) -> None:
    assert str(error)
    assert "\n" not in str(error)
    str(error).encode()
    if isinstance(error, LmserveError):
        assert error.status == 400


PLACES = [(name, path) for name, value in FILES.items() for path in [(), *places(value)]]


@pytest.mark.parametrize(("name", "path"), PLACES, ids=[f"{name} {'.'.join(path)}" for name, path in PLACES])
def test_a_model_with_an_odd_value_is_served_or_refused(
    folder: Path, name: str, path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in WRONG:
        write(folder, **{name: changed(FILES[name], path, wrong) if path else wrong})
        try:
            ModelPlan(folder, SETTINGS).load_engine().shutdown(0)
        except LmserveError as error:
            check_line(error)
        code = main(["plan", str(folder), "--kv-memory", "1MiB"])
        errors = capsys.readouterr().err
        assert (code, len(errors.splitlines())) in ((0, 0), (1, 1)), errors


def test_it_is_served_as_it_is(folder: Path) -> None:
    write(folder)
    ModelPlan(folder, SETTINGS).load_engine().shutdown(0)
    write(folder, **{"chat_template.json": FILES["chat_template.json"]})
    ModelPlan(folder, SETTINGS).load_engine().shutdown(0)


class Read(dict[str, Any]):
    """An object that knows which of its keys were asked for."""

    def __init__(self, values: dict[str, Any], keys_read: set[str] | None = None) -> None:
        super().__init__(values)
        self.keys_read = set() if keys_read is None else keys_read

    def __or__(self, others: dict[str, Any]) -> Read:  # type: ignore[override]
        return Read({**self, **others}, self.keys_read)

    def __ror__(self, others: dict[str, Any]) -> Read:  # type: ignore[override]
        return Read({**others, **self}, self.keys_read)

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_refuses_what_it_cannot_read(tmp_path: Path, family: str) -> None:
    raw = Read(json.loads(CONFIGS[family]().to_json_string(use_diff=False)))
    families.hf_family(raw).hf_config(raw)
    # Some copy it first.
    keys = raw.keys_read if len(raw.keys_read) > 8 else raw.keys()
    for key in sorted(keys):
        for wrong in WRONG:
            (tmp_path / "config.json").write_text(json.dumps(raw | {key: wrong}))
            # At the latest for want of weights.
            with pytest.raises(CheckpointError) as raised:
                open_checkpoint(tmp_path)
            check_line(raised.value)
