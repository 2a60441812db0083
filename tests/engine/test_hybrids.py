"""Models with recurrent layers: both forms of a recurrence, long prompts, and checkpoints as they are published."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_models
import torch
from lmserve.model import CheckpointError, RunnerOptions, load_runner, open_checkpoint
from lmserve.model.config import RecurrentLayer
from lmserve.model.torch_scan import TorchScan, run, step
from model_driver import Driver, greedy
from safetensors.torch import load_file, save_file

HEADS, GROUPS, ROWS, COLUMNS = 4, 2, 32, 24
LONG = 4000


def scan_inputs(rule: str, tokens: int, speed: float):
    """Random inputs of a recurrence, whose states decay by about e^-speed a token."""
    generator = torch.Generator().manual_seed(11)
    inner, mamba = HEADS * COLUMNS, rule == "mamba"
    x = torch.randn(tokens, 2 * GROUPS * ROWS + inner, generator=generator)
    gates = torch.randn(tokens, HEADS if mamba else 2 * HEADS, generator=generator)
    weight = -speed * torch.rand(HEADS, generator=generator)
    skip = torch.randn(HEADS, generator=generator) if mamba else None
    scan = TorchScan(weight, torch.randn(HEADS, generator=generator), skip=skip)
    return scan.inputs(x, gates, RecurrentLayer(x.shape[1], 4, HEADS, ROWS, COLUMNS), rule)


@pytest.mark.parametrize("speed", [0.001, 0.1, 30.0])
@pytest.mark.parametrize("rule", ["delta", "delta_tiled", "mamba"])
def test_chunks_give_what_steps_give_over_a_long_prompt(rule, speed):
    inputs = scan_inputs(rule, LONG, speed)
    state = torch.zeros(HEADS, ROWS, COLUMNS)
    outputs = []
    for token in range(LONG):
        moved, output = step(state[None], inputs.part(slice(token, token + 1)))
        state = moved[0]
        outputs.append(output)
    expected = torch.cat(outputs)
    for first in (0, 1, 70):
        # A step may end anywhere.
        before, outputs = run(torch.zeros_like(state), inputs.part(slice(0, first))) if first else (0 * state, None)
        after, rest = run(before, inputs.part(slice(first, None)))
        found = rest if outputs is None else torch.cat([outputs, rest])
        for one, other in ((found, expected), (after, state)):
            assert torch.isfinite(one).all()
            assert (one - other).abs().max() < 1e-4 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("family", ["qwen3_5", "granitemoehybrid"])
def test_both_ops_agree_over_a_long_prompt(family, tmp_path):
    tiny_models.make(family, tmp_path, max_position_embeddings=2 * LONG)
    prompt = np.random.default_rng(3).integers(0, 199, LONG)
    options = RunnerOptions(device="cpu", quantize="none", max_batch=2, max_batch_tokens=1024, kv_memory=16 << 20)
    found = []
    for ops, chunk in (("torch", 1024), ("cpu", 1024), ("cpu", 333)):
        own = dataclasses.replace(options, ops=ops, quantize="none" if ops == "cpu" else "auto")
        runner = load_runner(open_checkpoint(tmp_path), own)
        greedy(runner)
        driver = Driver(runner)
        sequence = driver.start(prompt)
        driver.generate([sequence], 8, chunk=chunk)
        found.append((sequence.tokens, np.array(sequence.logits)))
    (tokens, logits), (whole_tokens, whole), (cut_tokens, cut) = found
    assert tokens == whole_tokens == cut_tokens
    assert np.abs(logits - whole).max() < 1e-3
    assert np.array_equal(whole, cut)


def published(folder, raw, tensors, architecture):
    """The same model as it is published: within a wrapper, beside what sees, and with a head that guesses ahead."""
    folder.mkdir()
    wrapper = {
        "architectures": [architecture],
        "model_type": raw["model_type"].removesuffix("_text"),
        "text_config": {
            key: value for key, value in raw.items() if key not in ("architectures", "transformers_version")
        },
        "vision_config": {"depth": 2},
        "tie_word_embeddings": raw["tie_word_embeddings"],
    }
    (folder / "config.json").write_text(json.dumps(wrapper))
    named = {
        name if name.startswith("lm_head") else f"model.language_model.{name.removeprefix('model.')}": tensor
        for name, tensor in tensors.items()
    }
    others = ("model.visual.blocks.0.attn.qkv.weight", "mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight")
    save_file(named | {name: torch.ones(2, 2) for name in others}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("qwen3_5", "Qwen3_5ForConditionalGeneration"), ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration")],
)
def test_published_wrappers_are_served_as_their_text_models(family, architecture, tmp_path):
    tiny_models.make(family, tmp_path / "plain")
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    published(tmp_path / "outer", raw, load_file(tmp_path / "plain" / "model.safetensors"), architecture)
    plain, outer = open_checkpoint(tmp_path / "plain"), open_checkpoint(tmp_path / "outer")
    assert outer.config == plain.config
    assert outer.notes == ("served text-only: 1 tensors that see or hear are not loaded",)
    assert outer.tensors.keys() == plain.tensors.keys()
    for name, tensor in plain.tensors.items():
        assert np.array_equal(outer.tensors[name].dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["linear_attention", "conv", "full_attention"]}, "'conv' is among them"),
        ({"layer_types": ["linear_attention"]}, "but there are 1"),
        ({"linear_num_value_heads": 5}, "the 5 value heads of the delta nets are no multiple of their 2 key heads"),
        ({"num_attention_heads": 3}, r"q_proj.weight must have 96 rows, but has 192"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes, message, tmp_path):
    tiny_models.make("qwen3_next", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("ops", ["torch", "cpu"])
def test_time_steps_are_held_within_their_limits(ops, tmp_path):
    reference = tiny_models.make("granitemoehybrid_dense", tmp_path, time_step_limit=(0.2, 0.4))
    options = RunnerOptions(device="cpu", ops=ops, quantize="none" if ops == "cpu" else "auto", kv_memory=4 << 20)
    runner = load_runner(open_checkpoint(tmp_path), options)
    greedy(runner)
    driver = Driver(runner)
    sequence = driver.start(np.random.default_rng(2).integers(0, 199, 50))
    driver.generate([sequence], 16)
    logits = tiny_models.reference_logits(reference, sequence.tokens)[49:-1]
    assert np.abs(np.array(sequence.logits) - logits).max() < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mamba_n_groups": 3}, "a Mamba-2 mixer of width 96 has 4 heads in 3 groups"),
        ({"mamba_n_heads": 8}, "tensor model.layers.1.mamba.in_proj.weight must have 232 rows, but has 228"),
        ({"time_step_limit": [1, 0]}, "time_step_limit must be two numbers in order"),
        ({"time_step_limit": [1]}, "time_step_limit must be two numbers, but is"),
        ({"layer_types": ["mamba", "rnn", "attention"]}, "'rnn' is among them"),
    ],
)
def test_mixers_that_do_not_fit_are_refused(changes, message, tmp_path):
    tiny_models.make("granitemoehybrid_dense", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_older_names_of_layers_are_known(tmp_path):
    tiny_models.make("granitemoehybrid", tmp_path)
    newer = open_checkpoint(tmp_path).config
    raw = json.loads((tmp_path / "config.json").read_text())
    older = {"linear_attention": "mamba", "full_attention": "attention"}
    raw["layer_types"] = [older[kind] for kind in raw["layer_types"]]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert open_checkpoint(tmp_path).config == newer


LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}


def test_letters_say_what_layers_are(tmp_path):
    tiny_models.make("nemotron_h", tmp_path)
    named = open_checkpoint(tmp_path).config
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["hybrid_override_pattern"] = "".join(LETTERS[kind] for kind in raw.pop("layers_block_type"))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert open_checkpoint(tmp_path).config == named


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("M-*ME", "tensor model.layers.4.mixer.gate.weight is missing"),
        ("M-*MX", "a layer of kind 'X' is not known"),
        ("M-MM-", "must have Mamba-2 mixers and attention"),
        ("*-**-", "must have Mamba-2 mixers and attention"),
        ("M-*M", "tensor model.layers.4"),
        ("", "must say what the layers are"),
        (7, "must say what the layers are"),
    ],
)
def test_layers_that_are_not_known_are_refused(pattern, message, tmp_path):
    tiny_models.make("nemotron_h", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["layers_block_type"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"hybrid_override_pattern": pattern}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("family", ["qwen3_5_small", "granitemoehybrid", "lfm2"])
def test_models_without_attention_are_refused(family, tmp_path):
    tiny_models.make(family, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    recurrent = "conv" if family == "lfm2" else "linear_attention"
    raw["layer_types"] = [recurrent] * raw["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="all layers are recurrent"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mamba_proj_bias": True}, "mamba_proj_bias is not supported in a Falcon-H1"),
        ({"mamba_rms_norm": True, "mamba_norm_before_gate": True}, "mamba_norm_before_gate is not supported"),
        ({"ssm_multipliers": [1, 2]}, "ssm_multipliers must be 5 numbers"),
        ({"key_multiplier": float("inf")}, "key_multiplier must be finite"),
    ],
)
def test_what_no_falcon_has_is_refused(changes, message, tmp_path):
    tiny_models.make("falcon_h1", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
