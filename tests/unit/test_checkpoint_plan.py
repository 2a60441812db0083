"""The memory plan: arithmetic on a checkpoint's headers, and options that are refused."""

import dataclasses
import json

import numpy as np
import pytest
from lmserve import LmserveError, Scheduler
from lmserve._core import ENTRY_TOKENS
from lmserve.model import OptionError, RunnerOptions, device, load, open_checkpoint, options, plan_memory
from lmserve.model.families import qwen3
from safetensors.numpy import save_file

GIB = 1 << 30
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1000,
}
# 2 (K and V) * 3 layers * 2 heads * 16 values
VALUES_PER_TOKEN = 192


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = qwen3.FAMILY.expected_tensors(qwen3.FAMILY.hf_config(CONFIG))
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.fixture
def machine(monkeypatch):
    """A machine with 8 GiB of RAM and one GPU of 4 GiB."""
    monkeypatch.setattr(options, "available_memory", lambda: 8 * GIB)
    monkeypatch.setattr(options, "cuda_memory", lambda index: 4 * GIB if index == 0 else None)


def elements(checkpoint) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values())


def test_cpu(checkpoint, machine):
    plan = plan_memory(checkpoint, RunnerOptions(device="cpu", ops="torch", kv_memory=10_000_000))
    assert (plan.device, plan.dtype, plan.ops, plan.block_size) == ("cpu", "fp32", "torch", 16)
    assert plan.weight_bytes == elements(checkpoint) * 4
    assert plan.kv_bytes_per_token == VALUES_PER_TOKEN * 4
    assert plan.num_blocks == 10_000_000 // (16 * VALUES_PER_TOKEN * 4)
    assert plan.kv_bytes == plan.num_blocks * 16 * VALUES_PER_TOKEN * 4 <= 10_000_000
    assert (plan.max_model_len, plan.max_batch, plan.max_batch_tokens) == (1000, 64, 512)


def test_gpu_where_there_is_one(checkpoint, machine):
    plan = plan_memory(checkpoint, RunnerOptions(max_batch=3000, max_batch_tokens=3016))
    assert (plan.device, plan.dtype, plan.block_size) == ("cuda:0", "bf16", 256)
    assert plan.kv_bytes_per_token == VALUES_PER_TOKEN * 2
    assert 3 * GIB < plan.kv_bytes < 0.9 * 4 * GIB - plan.weight_bytes
    known = plan_memory(checkpoint, RunnerOptions(max_batch=3000, max_batch_tokens=3016), gpu_memory=2 * GIB)
    assert plan.kv_bytes - known.kv_bytes == pytest.approx(0.9 * 2 * GIB, abs=256 * VALUES_PER_TOKEN * 2)
    with pytest.raises(OptionError, match="the CUDA driver shows no GPU for cuda:1"):
        plan_memory(checkpoint, RunnerOptions(device="cuda:1"))


def test_cpu_where_there_is_no_gpu(checkpoint, machine, monkeypatch):
    monkeypatch.setattr(options, "cuda_memory", lambda index: None)
    assert plan_memory(checkpoint, RunnerOptions()).device == "cpu"
    with pytest.raises(OptionError, match="the CUDA driver shows no GPU for cuda:0"):
        plan_memory(checkpoint, RunnerOptions(device="cuda"))


def test_default_memory_is_bounded(checkpoint, machine, monkeypatch):
    many = RunnerOptions(device="cpu", max_batch=4096)
    per_block = 16 * VALUES_PER_TOKEN * 4
    assert plan_memory(checkpoint, many).kv_bytes == pytest.approx(2 * GIB, abs=GIB / 4)
    monkeypatch.setattr(options, "available_memory", lambda: GIB)
    assert 0 < plan_memory(checkpoint, many).kv_bytes < GIB / 4
    one = plan_memory(checkpoint, RunnerOptions(device="cpu", ops="torch", max_batch=1))
    assert one.kv_bytes == pytest.approx(4 * 1016 * VALUES_PER_TOKEN * 4, abs=per_block)


def test_context_shrinks_to_the_memory_unless_it_was_asked_for(checkpoint, machine):
    memory = 100 * VALUES_PER_TOKEN * 4
    plan = plan_memory(checkpoint, RunnerOptions(device="cpu", ops="torch", kv_memory=memory))
    assert (plan.num_blocks, plan.max_model_len) == (6, 96)
    message = r"which holds 96 tokens of 768 bytes each, but one sequence of max_model_len needs 500"
    with pytest.raises(OptionError, match=message):
        plan_memory(checkpoint, RunnerOptions(device="cpu", ops="torch", kv_memory=memory, max_model_len=500))
    with pytest.raises(OptionError, match="holds 0 tokens"):
        plan_memory(checkpoint, RunnerOptions(device="cpu", ops="torch", kv_memory=100))


@pytest.mark.parametrize(
    ("changes", "option", "message"),
    [
        ({"device": "tpu"}, "device", "device is 'tpu'; it must be auto, cpu or cuda"),
        ({"device": "cuda:x"}, "device", "device is 'cuda:x'; it must be auto, cpu or cuda"),
        ({"dtype": "int8"}, "dtype", "dtype is 'int8'; it must be one of auto, fp32, fp16, bf16"),
        ({"max_batch": 0}, "max_batch", "max_batch is 0; it must be 1 to 4096"),
        (
            {"max_batch": 9, "max_batch_tokens": 8},
            "max_batch_tokens",
            "is 8; it must be at least 25: max_batch, 9, and 16",
        ),
        ({"max_model_len": 1001}, "max_model_len", "max_model_len is 1001; this model takes 1 to 1000 tokens"),
        ({"max_model_len": 0}, "max_model_len", "max_model_len is 0; this model takes 1 to 1000 tokens"),
        ({"ops": "gpu"}, "ops", "ops is 'gpu'"),
        ({"speculate": -1}, "speculate", "speculate is -1; it must be at least 0"),
    ],
)
def test_options_that_are_refused(checkpoint, machine, changes, option, message):
    with pytest.raises(OptionError, match=message) as error:
        plan_memory(checkpoint, RunnerOptions(**{"device": "cpu", "ops": "torch"} | changes))
    assert error.value.status == 400
    assert error.value.error["param"] == option


def test_pieces_of_prompts_are_as_large_as_the_threads_are_many(checkpoint, machine):
    def most(**changes):
        return plan_memory(checkpoint, RunnerOptions(device="cpu", ops="cpu", **changes)).max_batch_tokens

    assert [most(threads=threads) for threads in (1, 2, 6, 64)] == [128, 128, 384, 512]
    assert most(threads=2, max_batch=200) == 264
    assert most(threads=2, max_batch_tokens=77, max_batch=7) == 77


@pytest.mark.parametrize("ops", ["torch", "cpu"])
@pytest.mark.parametrize("max_batch", [1, 64, 500, 4096])
def test_a_step_is_no_smaller_than_the_scheduler_wants_it(checkpoint, machine, ops, max_batch):
    plan = plan_memory(checkpoint, RunnerOptions(device="cpu", ops=ops, max_batch=max_batch))
    sizes = {"num_blocks": 8, "block_size": 16, "vocab_size": 100, "max_model_len": 64, "max_batch": max_batch}
    assert Scheduler(**sizes, max_batch_tokens=plan.max_batch_tokens) is not None
    least = max_batch + ENTRY_TOKENS
    assert Scheduler(**sizes, max_batch_tokens=least) is not None
    with pytest.raises(LmserveError, match=f"= {least}, but {least - 1} was given"):
        Scheduler(**sizes, max_batch_tokens=least - 1)
    with pytest.raises(OptionError, match=f"is {least - 1}; it must be at least {least}"):
        plan_memory(checkpoint, RunnerOptions(device="cpu", ops=ops, max_batch=max_batch, max_batch_tokens=least - 1))


def test_drafts_get_the_rows_that_a_batch_leaves(checkpoint, machine):
    def rows(**changes):
        return plan_memory(checkpoint, RunnerOptions(device="cpu", **changes)).max_rows

    assert rows(max_batch=4) == 4
    assert rows(max_batch=4, speculate=5) == 24
    assert rows(max_batch=16, speculate=5) == 64
    assert rows(max_batch=4, max_batch_tokens=20, speculate=8) == 20
    assert rows(max_batch=100, speculate=8) == 100


def test_a_model_that_generates_nothing_takes_no_drafts(checkpoint, machine):
    encoder = dataclasses.replace(checkpoint, kind="embed")
    with pytest.raises(OptionError, match="speculate is 4; a model of kind 'embed' generates no tokens to guess"):
        plan_memory(encoder, RunnerOptions(device="cpu", speculate=4))


def test_this_machine():
    assert device.available_memory() > 1 << 20
    assert device.usable_cores() >= 1
    assert device.cuda_memory(10_000) is None


def test_kv_memory_beyond_what_is_free_is_refused_in_a_line(checkpoint, machine):
    with pytest.raises(OptionError, match="kv_memory is 9216 MiB, but this process can take only 8192 MiB more"):
        plan_memory(checkpoint, RunnerOptions(device="cpu", kv_memory=9 * GIB))
    with pytest.raises(OptionError, match="cuda:0 has 24576 MiB"):
        plan_memory(
            checkpoint, RunnerOptions(device="cuda", kv_memory=30 * GIB, gpu_memory_fraction=1), gpu_memory=24 * GIB
        )


def test_weights_that_do_not_fit_are_refused_before_they_are_read(checkpoint, machine, monkeypatch):
    monkeypatch.setattr(load, "available_memory", lambda: 1 << 20)
    with pytest.raises(OptionError, match=r"KV cache of \d+ MiB do not fit: this process may still take 1 MiB"):
        load.load_runner(checkpoint, RunnerOptions(device="cpu"))
