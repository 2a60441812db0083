"""A model split among processes: the same greedy tokens as in one, for every family that runs on torch.

RANKS=4 for four processes (`make test-parallel`).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import tensor_parallel
import tiny_models
from asked import OPTIONS, answers, make_model
from lmserve.cli import main
from lmserve.errors import LmserveError
from lmserve.model import RunnerOptions, load_runner, open_checkpoint, plan_memory
from lmserve.model.errors import CheckpointError, OptionError
from lmserve.model.families.family import ANY
from lmserve.model.recording import Header, Recorder
from lmserve.model.shares import Part, Share, part_of
from lmserve.model.tensors import StoredTensor
from lmserve.worker.runner import ProcessRunner

RANKS = int(os.environ.get("RANKS", "2"))
# Their tiny models cannot be made of other sizes.
FIXED = ("internlm2", "phi3")
# Second forms of families, which `make test` leaves out.
FORMS = (
    "llama3",
    "gemma4_31b",
    "gemma4_moe",
    "qwen3_5_small",
    "granitemoehybrid_dense",
    "granitemoehybrid_attention",
    "nemotron_h_biased",
    "nemotron_h_latent",
    "lfm2_tied",
    "falcon_h1_normed",
)
FAMILIES = [family for family in tiny_models.CONFIGS if family not in (FIXED if "RANKS" in os.environ else FORMS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    tensor_parallel.make(folder, FAMILIES, RANKS)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return tensor_parallel.run(folder, RANKS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_the_same_as_in_one_process(found, folder, family):
    model = found[family]
    assert model.error is None
    checkpoint = open_checkpoint(folder / family)
    assert model.found == model.alone
    # The names of its tensors are no module's.
    if family != "internlm2":
        assert model.alone[:2] != model.alone[2:]
    # Recurrent layers are whole on every rank.
    most = 0.85 if checkpoint.config.recurrent else 1 / RANKS + 0.07
    assert model.bytes < most * model.alone_bytes
    planned = plan_memory(checkpoint, RunnerOptions(device="cpu", tensor_parallel=RANKS))
    # Norms without weights are no tensors of a file, and keys that are values are one.
    assert abs(planned.weight_bytes - model.bytes) < 0.06 * model.bytes
    assert planned.ranks == RANKS


def test_what_cannot_be_split_is_refused_by_name(tmp_path, minilm_folder):
    tiny_models.make("llama", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(OptionError, match="is 4; llama has 6 query heads here, which 4 does not divide"):
        plan_memory(checkpoint, RunnerOptions(tensor_parallel=4))
    three = dataclasses.replace(checkpoint.config, intermediate_size=81, attention=())
    with pytest.raises(OptionError, match="llama has 2 key-value heads here; one number must divide the other"):
        plan_memory(dataclasses.replace(checkpoint, config=three), RunnerOptions(tensor_parallel=3))
    with pytest.raises(OptionError, match="tensor_parallel is 65; it must be 1 to 64"):
        plan_memory(checkpoint, RunnerOptions(tensor_parallel=65))
    with pytest.raises(OptionError, match="the cpu kernels run a model in one process, but ops is 'cpu'"):
        plan_memory(checkpoint, RunnerOptions(tensor_parallel=2, ops="cpu"))
    with pytest.raises(OptionError, match="is 2; bert is an encoder, which runs in one process"):
        plan_memory(open_checkpoint(minilm_folder), RunnerOptions(tensor_parallel=2))
    with pytest.raises(OptionError, match="transformers runs this model, in one process"):
        plan_memory(dataclasses.replace(checkpoint, family=ANY), RunnerOptions(tensor_parallel=2))
    with pytest.raises(OptionError, match="this process is none of so many"):
        load_runner(checkpoint, RunnerOptions(tensor_parallel=2))


@pytest.mark.parametrize(("whole", "own", "ranks"), [(48, 24, 2), (8, 2, 4), (199, 100, 2), (199, 50, 4), (24, 12, 4)])
def test_the_parts_of_all_ranks_are_the_whole(whole, own, ranks):
    held = []
    for rank in range(ranks):
        share = Share(rank, ranks)
        first, end = share.rows(whole)
        size = end - first if whole % ranks else own
        start = share.start(whole, size)
        held.append(range(start, start + size))
    assert sorted({index for part in held for index in part}) == list(range(whole))
    # As many ranks have each part, and neighbours have the same.
    assert [part.start for part in held] == sorted(part.start for part in held)


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0", "Q4_0"])
def test_columns_are_read_without_the_others(dtype):
    values = np.random.default_rng(3).standard_normal((6, 128)).astype(np.float32)
    if dtype in ("F32", "F16"):
        data = values.astype(np.float32 if dtype == "F32" else np.float16)
    else:
        data = gguf.quantize(values, gguf.GGMLQuantizationType[dtype])
    source = StoredTensor("w", values.shape, dtype, data)
    whole = source.dequantize()
    for rank in range(4):
        part = part_of(source, (6, 32), Share(rank, 4))
        assert isinstance(part, Part)
        assert (part.axis, part.shape, part.nbytes) == (1, (6, 32), source.nbytes // 4)
        np.testing.assert_array_equal(part.dequantize(), whole[:, 32 * rank : 32 * rank + 32])
        rows = part_of(source, (3, 128), Share(rank // 2, 2))
        np.testing.assert_array_equal(rows.dequantize(), whole[rank // 2 * 3 :][:3])
    # Where a part is no whole blocks, all are read.
    np.testing.assert_array_equal(part_of(source, (6, 16), Share(1, 8)).dequantize(), whole[:, 16:32])
    with pytest.raises(CheckpointError, match="cannot be split into parts"):
        part_of(source, (3, 32), Share(0, 2))


def listening(pid: int) -> set[str]:
    """Addresses at which a process listens, as the kernel writes them."""
    inodes = {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    tables = [Path(f"/proc/{pid}/net/{name}").read_text("ascii") for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    return {line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes}


def test_two_processes_answer_as_one_and_listen_on_loopback_alone(tmp_path, smollm2_gguf):
    make_model(tmp_path, 3)
    checkpoint, tokenizer = open_checkpoint(tmp_path), open_checkpoint(smollm2_gguf).tokenizer()
    options = dataclasses.replace(OPTIONS, ops="torch", threads=1)
    expected = answers(load_runner(checkpoint, options), tokenizer)
    split = dataclasses.replace(options, tensor_parallel=2)
    runner = ProcessRunner.start(checkpoint, split)
    try:
        pids = runner.processes.pids
        assert len(pids) == 2
        # 127.0.0.1, or nothing.
        assert {address for pid in pids for address in listening(pid)} <= {"0100007F"}
        header = Header.of(checkpoint, split, runner.info)
        assert answers(Recorder(runner, tmp_path / "steps", header), tokenizer) == expected
    finally:
        runner.processes.close()
    # What several processes have computed is run again in one.
    assert main(["replay", str(tmp_path / "steps")]) == 0


def test_ranks_that_refuse_a_model_are_told_of_as_one_is(tmp_path):
    make_model(tmp_path, 3)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(LmserveError) as refused:
        ProcessRunner.start(checkpoint, dataclasses.replace(OPTIONS, ops="torch", kv_memory=1 << 60, tensor_parallel=2))
    assert refused.value.error["param"] == "kv_memory"
