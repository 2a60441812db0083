"""Adapters that PEFT itself has written equal the models that it merges them into; skipped where PEFT is not installed.

PEFT needs accelerate, with which transformers loads models otherwise: `make test-peft` has both in a folder of their
own.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
import tiny_models
import torch
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from lmserve.model.adapters import open_adapter
from lmserve.model.errors import AdapterError
from model_driver import Driver, greedy

peft = pytest.importorskip("peft")

STEPS = 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NETWORK = ["gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "plain": {"target_modules": ATTENTION + NETWORK},
    "root": {"target_modules": ATTENTION, "use_rslora": True},
    # Of single layers, of modules in all layers, and by a pattern.
    "patterns": {
        "target_modules": ATTENTION + NETWORK,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 6, r"^.*layers\.2\..*down_proj": 2},
        "alpha_pattern": {"o_proj": 10, "model.layers.0.self_attn.v_proj": 1},
    },
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    "by a pattern": {"target_modules": r".*layers\.[01]\.self_attn\.(q|o)_proj"},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
}
FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "glm4_moe")


def written(tmp_path: Path, family: str, settings: dict) -> torch.nn.Module:
    """Write a model, an adapter of it, and a GGUF file; gives what PEFT merges of the two."""
    model = tiny_models.make(family, tmp_path / "model")
    tiny_gguf.write(tmp_path / "model.gguf", model, tiny_gguf.ARCHITECTURES.get(family, family))
    # B is drawn at random, too: with zeros, as training begins, an adapter changes nothing.
    config = peft.LoraConfig(r=4, lora_alpha=7, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    return adapted.merge_and_unload().eval()


def assert_equals_merged(tmp_path: Path, merged: torch.nn.Module) -> None:
    for name in ("model", "model.gguf"):
        checkpoint = open_checkpoint(tmp_path / name)
        adapter = open_adapter(tmp_path / "adapter", checkpoint, max_rank=8)
        for ops in ("cpu", "torch"):
            quantize = "none" if ops == "cpu" else "auto"
            options = RunnerOptions(
                device="cpu", ops=ops, quantize=quantize, max_batch=4, max_batch_tokens=72, threads=1
            )
            runner = load_runner(checkpoint, options)
            runner.load_adapter(1, adapter)
            greedy(runner)
            driver = Driver(runner)
            plain, sequence = driver.start(range(5, 40)), driver.start(range(5, 40))
            sequence.adapter = 1
            driver.generate([plain, sequence], STEPS)
            logits = tiny_models.reference_logits(merged, sequence.tokens)[34:-1]
            assert np.abs(np.array(sequence.logits) - logits).max() < 1e-3
            assert np.abs(plain.logits[0] - logits[0]).max() > 1e-2


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_that_is_read(tmp_path, settings):
    assert_equals_merged(tmp_path, written(tmp_path, "llama", SETTINGS[settings]))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    # PEFT takes networks of experts for experts, whose adapters are refused.
    settings = SETTINGS["root"] if family == "glm4_moe" else SETTINGS["plain"]
    assert_equals_merged(tmp_path, written(tmp_path, family, settings))


def test_what_is_refused_is_what_peft_writes(tmp_path):
    model = tiny_models.make("llama", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    for setting, value in (("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"])):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], **{setting: value})
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / setting)
        with pytest.raises(AdapterError, match=setting):
            open_adapter(tmp_path / setting, checkpoint, max_rank=8)
