"""The memory plan of models some of whose layers see a window: what a long sequence takes, and how memory is shared."""

import dataclasses
import json

import numpy as np
import pytest
from lmserve.cli.plan_view import plan_lines
from lmserve.config import ServeConfig
from lmserve.engine.load import ModelPlan
from lmserve.model import RunnerOptions, open_checkpoint, plan_memory
from lmserve.model.cache_sizes import CacheSizes
from lmserve.model.families import gemma3
from safetensors.numpy import save_file

WINDOW, CONTEXT, BLOCK = 512, 32768, 16
LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    "layer_types": LAYERS,
}
# Of one layer: K and V of 2 heads of 16 values in fp32.
LAYER = 2 * 2 * 16 * 4
OPTIONS = RunnerOptions(device="cpu", ops="torch", max_batch=8, max_batch_tokens=512, kv_memory=64 << 20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = gemma3.FAMILY.expected_tensors(gemma3.FAMILY.hf_config(CONFIG))
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def test_a_long_sequence_takes_a_window_and_a_block_in_layers_with_a_window(checkpoint):
    plan = plan_memory(checkpoint, OPTIONS)
    assert (plan.window, plan.sequence_window_blocks) == (WINDOW, WINDOW // BLOCK + 1)
    assert (plan.kv_bytes_per_token, plan.window_bytes_per_token) == (LAYER, 5 * LAYER)
    assert plan.kv_bytes_of(CONTEXT) == CONTEXT * LAYER + (WINDOW + BLOCK) * 5 * LAYER
    assert plan.kv_bytes_of(100) == 112 * 6 * LAYER
    assert plan.kv_bytes <= 64 << 20
    assert plan.max_model_len == CONTEXT
    assert plan.sequences_that_fit(CONTEXT) == 5
    # Without windows, there would be one.
    assert (64 << 20) // (CONTEXT * 6 * LAYER) == 1
    served = ModelPlan(checkpoint.path, ServeConfig(kv_memory=64 << 20, max_batch=8))
    blocks = f"{served.memory.num_window_blocks} blocks; a running sequence holds its last 528 tokens there"
    assert f"Windows   512 tokens, in {blocks}" in plan_lines(served, ("tiny",))


def test_a_context_that_a_window_covers_has_no_blocks_of_its_own_for_windows(checkpoint):
    short = dataclasses.replace(OPTIONS, max_model_len=WINDOW + BLOCK)
    plan = plan_memory(checkpoint, short)
    assert (plan.window, plan.num_window_blocks, plan.kv_bytes_per_token) == (0, 0, 6 * LAYER)
    plan = plan_memory(checkpoint, dataclasses.replace(OPTIONS, max_model_len=WINDOW + 2 * BLOCK))
    assert (plan.window, plan.kv_bytes_per_token) == (WINDOW, LAYER)


@pytest.mark.parametrize("memory", [1 << 16, 1 << 20, 1 << 24, 1 << 30])
@pytest.mark.parametrize("per_token", [0, 64, 640])
def test_memory_is_shared_so_that_one_sequence_can_always_be_computed(memory, per_token):
    sizes = CacheSizes(memory, BLOCK, CONTEXT, per_token, 320, WINDOW)
    blocks, windows = sizes.blocks(max_batch=64, max_batch_tokens=512)
    assert BLOCK * (blocks * per_token + windows * 320) <= memory
    # A sequence's window, the tokens of a step, and a block more at either end; no block has two.
    assert windows >= min(blocks, (WINDOW + 512) // BLOCK + 2)
    assert windows <= blocks
    if blocks * BLOCK >= CONTEXT:
        # The rest is for tokens: half of the memory at least, where a batch does not need more.
        assert windows <= max((WINDOW + 512) // BLOCK + 2, memory // 2 // (320 * BLOCK))
