"""What CUDA runs, as far as it can be proven without a GPU: stand-ins for the kernel and the graphs, all else is real.

tests/gpu holds the same against a real GPU.
"""

import numpy as np
import pytest
import tiny_models
import torch
from lmserve.model import RunnerOptions, open_checkpoint, plan_memory, sampler
from lmserve.model.graphs import DecodeGraphs, buckets
from lmserve.model.interface import MAX_LOGPROBS, LogitEdits
from lmserve.model.runner import allocate_buffers, cache_config, runner_info
from lmserve.model.sampler import SamplingRows
from lmserve.model.torch_ops import TorchOps
from lmserve.model.torch_runner import GraphRunner, TorchRunner
from lmserve.model.torch_varlen import VarlenAttention, varlen, varlen_fits
from model_driver import Driver, greedy

OPTIONS = RunnerOptions(device="cpu", max_batch=6, max_batch_tokens=700, block_size=256, threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    reference = tiny_models.make("qwen3", folder, max_position_embeddings=700)
    return reference, open_checkpoint(folder)


def varlen_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """What torch documents of varlen_attn with a block table, sequence by sequence."""
    assert set(options) == {"scale", "window_size", "enable_gqa", "seqused_k", "block_table"}
    assert options["window_size"] == (-1, 0)
    assert options["enable_gqa"]
    assert cu_seq_k is None
    assert all(t.dtype == torch.int32 for t in (cu_seq_q, options["seqused_k"], options["block_table"]))
    assert len(cu_seq_q) - 1 == len(options["seqused_k"]) == len(options["block_table"])
    out = torch.empty_like(query)
    for s, length in enumerate(options["seqused_k"].tolist()):
        start, end = cu_seq_q[s : s + 2].tolist()
        assert end - start <= max_q
        assert length <= max_k
        pages = options["block_table"][s, : -(-length // key.shape[1])].long()
        mask = torch.ones(end - start, length, dtype=torch.bool).tril(length - (end - start))
        out[start:end] = torch.nn.functional.scaled_dot_product_attention(
            query[start:end].transpose(0, 1),
            key[pages].flatten(0, 1)[:length].transpose(0, 1),
            value[pages].flatten(0, 1)[:length].transpose(0, 1),
            attn_mask=mask,
            scale=options["scale"],
            enable_gqa=True,
        ).transpose(0, 1)
    return out


def parts(checkpoint, options=OPTIONS, **changes):
    plan = plan_memory(checkpoint, options)
    buffers = allocate_buffers(plan)
    ops = TorchOps(
        checkpoint.config,
        cache_config(plan, plan.dtype),
        buffers,
        attention=VarlenAttention,
        copy_inputs=True,
        **changes,
    )
    decoder = checkpoint.load(ops)
    return runner_info(checkpoint, plan, ops.weight_bytes), buffers, decoder, ops


def test_buckets_are_powers_of_two_up_to_max_batch():
    assert buckets(1) == [1]
    assert buckets(8) == [1, 2, 4, 8]
    assert buckets(48) == [1, 2, 4, 8, 16, 32, 48]


def test_graphs_are_captured_largest_first_and_chosen_by_size():
    captured, replayed = [], []

    def capture(size):
        captured.append(size)
        return lambda: replayed.append(size) or f"outputs of {size}"

    graphs = DecodeGraphs(12, capture)
    assert captured == [12, 8, 4, 2, 1]
    assert [graphs.size_for(n) for n in range(1, 13)] == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]
    assert graphs.replay(graphs.size_for(3)) == "outputs of 4"
    assert replayed == [4]
    with pytest.raises(ValueError, match="13 sequences; the largest captured step has 12"):
        graphs.size_for(13)


def test_replayed_steps_equal_transformers(model, monkeypatch):
    reference, checkpoint = model
    monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in)
    replays = []

    def capture(step):
        return lambda: replays.append(1) or step()

    info, buffers, decoder, ops = parts(checkpoint)
    runner = GraphRunner(info, buffers, decoder, ops, capture=capture)
    greedy(runner)
    driver = Driver(runner)
    generator = np.random.default_rng(0)
    # Sequences end one after another, so that steps of every size are padded into every bucket.
    lengths = [(3, 30), (270, 25), (1, 20), (255, 15), (40, 10), (90, 5)]
    sequences = [(driver.start(generator.integers(0, 199, n)), n, n + new) for n, new in lengths]
    while running := [s for s, _, goal in sequences if len(s.tokens) < goal]:
        driver.step([(sequence, sequence.pending) for sequence in running])
    assert len(replays) == 29
    for sequence, start, _ in sequences:
        logits = tiny_models.reference_logits(reference, sequence.tokens)
        assert sequence.tokens[start:] == logits[start - 1 : -1].argmax(-1).tolist()


def test_padding_writes_only_the_spare_block(model, monkeypatch):
    _, checkpoint = model
    monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in)
    info, buffers, decoder, ops = parts(checkpoint)
    runner = GraphRunner(info, buffers, decoder, ops, capture=lambda step: step)
    greedy(runner)
    driver = Driver(runner)
    sequences = [driver.start([1, 2, 3]) for _ in range(3)]
    driver.step([(sequence, 3) for sequence in sequences])
    used = {block for sequence in sequences for block in sequence.blocks}
    keys = ops.cache.keys
    for layer in keys:
        layer.zero_()
    driver.step([(sequence, 1) for sequence in sequences])
    written = set(sum(layer.abs().sum((1, 2, 3)) for layer in keys).nonzero()[:, 0].tolist())
    assert written == used | {ops.cache.spare_block}
    assert ops.cache.spare_block == info.num_blocks


def test_shapes_and_dtypes_flow_through_the_kernel_on_the_meta_device(model):
    _, checkpoint = model
    info, buffers, decoder, ops = parts(checkpoint, device="meta", dtype="bf16")
    runner = TorchRunner(info, buffers, decoder, ops)
    driver = Driver(runner)
    n_tokens, n_seqs, n_rows = driver.fill([(driver.start([1, 2, 3]), 2), (driver.start(range(9)), 9)])
    with torch.inference_mode():
        ops.begin(n_tokens, n_seqs, n_rows)
        states = decoder.forward(sampled_rows_only=True)
        logits = ops.linear(states, decoder.head)
    assert states.shape == (1, checkpoint.config.hidden_size)
    assert logits.shape == (1, checkpoint.config.vocab_size)
    assert states.dtype == logits.dtype == torch.bfloat16


def test_sampling_asks_the_device_nothing():
    """A meta tensor has no values: whatever would wait for the device to tell one fails on it."""
    n, vocab = 5, 3 * sampler.NUCLEUS_WIDTH
    ones, zeros = np.ones(n, np.float32), np.zeros(n, np.float32)
    rows = SamplingRows(
        temperature=np.array([0, 1, 1, 0.5, 2], np.float32),
        top_k=np.array([0, 0, 40, 0, vocab - 1], np.int32),
        top_p=np.array([1, 0.9, 1, 1, 0.5], np.float32),
        min_p=np.array([0, 0, 0, 0.1, 0], np.float32),
        repetition_penalty=1.5 * ones,
        presence_penalty=ones,
        frequency_penalty=zeros,
        uniform=0.5 * ones,
    )
    starts = np.arange(n + 1, dtype=np.int32)
    edits = LogitEdits(
        bias_start=starts,
        bias_token=starts[:n],
        bias_value=ones,
        seen_start=starts,
        seen_token=starts[:n],
        seen_count=starts[:n],
    )
    logits = torch.empty(n, vocab, device="meta")
    for given in (None, edits):
        sampled = sampler.sample(logits, rows, given)
        assert (sampled.device.type, sampled.shape, sampled.dtype) == ("meta", (n,), torch.int64)
    own, top_ids, top_logprobs = sampler.token_logprobs(logits, sampled)
    assert own.shape == (n,)
    assert top_ids.shape == top_logprobs.shape == (n, MAX_LOGPROBS)


def test_outputs_come_with_collect(model, monkeypatch):
    """Until then the engine may read those of the step before."""
    _, checkpoint = model
    monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in)
    info, buffers, decoder, ops = parts(checkpoint)
    runner = TorchRunner(info, buffers, decoder, ops)
    greedy(runner)
    driver = Driver(runner)
    shape = driver.fill([(driver.start([1, 2, 3]), 3)])
    buffers.sampled[:] = -7
    runner.launch(*shape, None)
    assert buffers.sampled[0] == -7
    runner.collect()
    first = int(buffers.sampled[0])
    assert first >= 0
    runner.collect()
    assert buffers.sampled[0] == first


def test_the_kernel_is_chosen_only_where_it_fits(model):
    _, checkpoint = model
    config = checkpoint.config
    cache = cache_config(plan_memory(checkpoint, RunnerOptions(device="cpu", dtype="bf16", block_size=256)), "bf16")
    assert varlen_fits(config, cache, torch.device("cuda"))
    assert not varlen_fits(config, cache, torch.device("cpu"))
    for changes in ({"block_size": 16}, {"dtype": "fp32"}):
        plan = plan_memory(checkpoint, RunnerOptions(**{"device": "cpu", "dtype": "bf16", "block_size": 256} | changes))
        assert not varlen_fits(config, cache_config(plan, plan.dtype), torch.device("cuda"))
