"""Longrope (Phi-3) on either side of its original context length, against transformers.

A server chooses the factors by its own context, so that keys of one token and position are the same in every sequence:
the prefix cache and sessions share them. transformers chooses by the longest sequence of each forward pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from lmserve.cli.plan_view import plan_lines
from lmserve.config import DiskTier, ServeConfig
from lmserve.engine.load import ModelPlan
from lmserve.engine.tiers import tiers_of
from lmserve.model import Checkpoint, RunnerOptions, load_runner, open_checkpoint
from model_driver import Driver, greedy

ORIGINAL = 64
TOKENS = np.random.default_rng(6).integers(0, 199, 120).tolist()
LONG = [1.25, 4.0]


def made(folder: Path, short: list[float]) -> Any:
    rope = tiny_models.CONFIGS["phi3"]().rope_parameters
    changed = rope | {"short_factor": short, "long_factor": LONG, "original_max_position_embeddings": ORIGINAL}
    lengths = {"original_max_position_embeddings": ORIGINAL, "sliding_window": None}
    return tiny_models.make("phi3", folder, rope_parameters=changed, **lengths)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Checkpoint]:
    """The model, the same with its long factors for all lengths, and its checkpoint."""
    path = tmp_path_factory.mktemp("phi3")
    reference = made(path, [1.0, 1.5])
    return reference, made(tmp_path_factory.mktemp("long"), LONG), open_checkpoint(path)


def logits_of(checkpoint: Checkpoint, ops: str, context: int, prompt: list[int], steps: int) -> tuple[Any, list[int]]:
    """Logits of the last token of the prompt and of all but the last that are generated, and all tokens."""
    options = RunnerOptions(
        device="cpu", ops=ops, quantize="none", max_batch=4, max_batch_tokens=128, max_model_len=context, threads=1
    )
    runner = load_runner(checkpoint, options)
    greedy(runner)
    driver = Driver(runner)
    sequence = driver.start(prompt)
    driver.generate([sequence], steps)
    return np.array(sequence.logits), sequence.tokens


def expected(reference: Any, tokens: list[int], steps: int) -> Any:
    return tiny_models.reference_logits(reference, tokens)[-steps - 1 : -1]


@pytest.mark.parametrize("ops", ["torch", "cpu"])
def test_a_context_up_to_the_original_length_has_the_short_factors(references: Any, ops: str) -> None:
    reference, _, checkpoint = references
    logits, tokens = logits_of(checkpoint, ops, ORIGINAL, TOKENS[:40], 20)
    assert np.abs(logits - expected(reference, tokens, 20)).max() < 1e-3


@pytest.mark.parametrize("ops", ["torch", "cpu"])
def test_a_longer_context_has_the_long_factors_for_every_sequence(references: Any, ops: str) -> None:
    reference, long, checkpoint = references
    # A sequence that is longer than the original length: as transformers.
    logits, tokens = logits_of(checkpoint, ops, 256, TOKENS, 8)
    assert np.abs(logits - expected(reference, tokens, 8)).max() < 1e-3
    # One that grows beyond it: its keys stay, where transformers computes them again with the other factors.
    logits, tokens = logits_of(checkpoint, ops, 256, TOKENS[: ORIGINAL - 4], 12)
    assert np.abs(logits - expected(long, tokens, 12)).max() < 1e-3
    assert np.abs(logits[-4:] - expected(reference, tokens, 12)[-4:]).max() < 1e-3
    # A shorter one: as transformers with the long factors, and not as transformers alone.
    logits, tokens = logits_of(checkpoint, ops, 256, TOKENS[:40], 8)
    assert np.abs(logits - expected(long, tokens, 8)).max() < 1e-3
    assert np.abs(logits - expected(reference, tokens, 8)).max() > 1e-2


def test_blocks_on_a_disk_are_those_of_the_same_factors(references: Any, tmp_path: Path) -> None:
    _, _, checkpoint = references

    def fingerprint(context: int) -> bytes:
        config = ServeConfig(kv_memory=1 << 20, ops="cpu", kv_disk=DiskTier(tmp_path, 1 << 20), max_model_len=context)
        plan = ModelPlan(checkpoint.path, config)
        tiers = tiers_of(plan.tiers, config, plan.checkpoint, plan.memory)
        assert tiers is not None
        return tiers.fingerprint

    assert fingerprint(32) == fingerprint(ORIGINAL)
    assert fingerprint(ORIGINAL + 1) == fingerprint(256)
    assert fingerprint(ORIGINAL) != fingerprint(ORIGINAL + 1)


def test_the_plan_says_which_factors_are_chosen(references: Any) -> None:
    _, _, checkpoint = references

    def notes(context: int | None) -> list[str]:
        plan = ModelPlan(checkpoint.path, ServeConfig(kv_memory=1 << 20, max_model_len=context))
        return [line for line in plan_lines(plan, ("tiny",)) if "longrope" in line]

    assert notes(ORIGINAL) == []
    assert notes(ORIGINAL + 1) == notes(None)
    (note,) = notes(None)
    assert f"more than {ORIGINAL} tokens; --max-model-len {ORIGINAL} chooses the short ones" in note
