"""A model in a process of its own: the same tokens, and what becomes of processes that end or send garbage."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_adapters
import transformers
from asked import OPTIONS, answers, make_model
from lmserve.errors import LmserveError
from lmserve.model import load_runner, open_checkpoint
from lmserve.model.adapter_files import Adapter, LowRank
from lmserve.model.adapters import open_adapter
from lmserve.model.errors import AdapterError
from lmserve.worker import adapters as adapters_of_processes
from lmserve.worker import pipe, processes
from lmserve.worker.errors import PipeError
from lmserve.worker.pipe import MAGIC, Kind, Pipe
from lmserve.worker.runner import ProcessRunner
from model_driver import Driver, greedy

# A process in place of the one that computes: it answers as it is told by SAYS.
IMPOSTOR = """
import os, socket, sys
from lmserve.worker.pipe import Kind, Pipe
connection = socket.socket(fileno=int(sys.argv[1]))
Pipe(connection).receive()
said = os.environ["SAYS"]
if said == "ends":
    sys.exit(3)
connection.sendall(bytes.fromhex(said))
Pipe(connection).receive()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    make_model(folder, 3)
    return folder


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return open_checkpoint(smollm2_gguf).tokenizer()


@pytest.fixture
def runner(folder):
    runner = ProcessRunner.start(open_checkpoint(folder), OPTIONS)
    yield runner
    runner.processes.close()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lay(runner: ProcessRunner) -> None:
    """A step of one sequence of one token."""
    buffers = runner.buffers
    buffers.token_ids[0] = 7
    buffers.query_start[:2] = 0, 1
    buffers.context_lens[0] = 1
    buffers.lay_sequence(0, slice(0, 1), np.zeros(1, np.int32), np.zeros(1, np.int32), runner.info.block_size)


@pytest.mark.parametrize("ops", ["cpu", "torch"])
def test_a_process_answers_as_a_thread_does(folder, tokenizer, ops):
    options = dataclasses.replace(OPTIONS, ops=ops)
    checkpoint = open_checkpoint(folder)
    expected = answers(load_runner(checkpoint, options), tokenizer)
    runner = ProcessRunner.start(checkpoint, options)
    pids = runner.processes.pids
    assert answers(runner, tokenizer) == expected
    runner.processes.close()
    assert all(map(is_gone, pids))


def test_texts_are_embedded_as_in_a_thread(minilm_folder):
    checkpoint = open_checkpoint(minilm_folder)
    ids, bounds = np.arange(1000, 1009, dtype=np.int32), np.array([0, 4, 9], np.int32)
    expected = load_runner(checkpoint, OPTIONS).embed(ids, bounds)
    runner = ProcessRunner.start(checkpoint, OPTIONS)
    assert np.array_equal(runner.embed(ids, bounds), expected)
    runner.processes.close()


def test_a_long_text_is_embedded_in_passes_between_which_there_are_steps(folder):
    checkpoint = open_checkpoint(folder)
    options = dataclasses.replace(OPTIONS, max_batch_tokens=72)
    ids, bounds = np.arange(1, 181, dtype=np.int32), np.array([0, 170, 180], np.int32)
    thread = load_runner(checkpoint, options)
    expected = list(thread.embed_passes(ids, bounds))
    assert [found is None for found in expected] == [True] * 3 + [False]
    runner = ProcessRunner.start(checkpoint, options)
    passes = runner.embed_passes(ids, bounds)
    found = []
    for pass_ in passes:
        found.append(pass_)
        lay(runner)
        runner.launch(1, 1, 0, None)
        runner.collect()
    assert found[:-1] == [None] * 3
    np.testing.assert_array_equal(found[-1], expected[-1])
    # Of texts that nobody waits for any more, the rest is not computed.
    abandoned = runner.embed_passes(ids, bounds)
    assert next(abandoned) is None
    short = ids[:5], np.array([0, 5], np.int32)
    np.testing.assert_array_equal(runner.embed(*short), thread.embed(*short))
    broken = runner.embed_passes(ids, bounds)
    assert next(broken) is None
    os.kill(runner.processes.pids[0], signal.SIGKILL)
    with pytest.raises(LmserveError, match="is down") as caught:
        next(broken)
    assert caught.value.status == 503
    runner.processes.close()


def test_a_model_that_cannot_be_loaded_is_refused_as_in_a_thread(folder):
    checkpoint = open_checkpoint(folder)
    options = dataclasses.replace(OPTIONS, kv_memory=1 << 60)
    with pytest.raises(LmserveError) as expected:
        load_runner(checkpoint, options)
    with pytest.raises(LmserveError) as refused:
        ProcessRunner.start(checkpoint, options)
    assert refused.value.code == expected.value.code
    assert refused.value.error["param"] == "kv_memory"


def test_a_step_that_fails_is_the_step_s_fault_alone(runner):
    lay(runner)
    runner.buffers.block_tables[0, 0] = runner.buffers.slots[0] = -5
    (pid,) = runner.processes.pids
    runner.launch(1, 1, 1, None)
    with pytest.raises(RuntimeError, match="Error"):
        runner.collect()
    lay(runner)
    runner.launch(1, 1, 1, None)
    runner.collect()
    assert runner.processes.pids == [pid]


def test_a_process_that_is_killed_is_started_again_and_the_engine_hears_of_its_memory(runner):
    lay(runner)
    (first,) = runner.processes.pids
    group = runner.processes.group()
    os.kill(first, signal.SIGKILL)
    group.ended.wait(60)
    with pytest.raises(LmserveError) as error:
        runner.launch(1, 1, 1, None)
    assert (error.value.status, error.value.code) == (503, "worker_unavailable")
    assert f"process {first} ended with signal 9 (Killed)" in str(error.value)
    wait_until(lambda: runner.processes.pids)
    # The engine knows that everything is lost.
    runner.launch(1, 1, 1, None)
    runner.collect()
    (second,) = runner.processes.pids
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: runner.processes.pids not in ([], [second]))
    # It does not, of a process that was replaced while nothing ran.
    with pytest.raises(LmserveError) as error:
        runner.launch(1, 1, 1, None)
    assert error.value.code == "memory_lost"
    runner.launch(1, 1, 1, None)
    runner.collect()
    assert runner.processes.restarts == 2


def greedy_tokens(runner, adapters: list[int]) -> list[list[int]]:
    """What sequences with these adapters say."""
    greedy(runner)
    driver = Driver(runner)
    sequences = [driver.start(range(5, 25 + at)) for at in range(len(adapters))]
    for sequence, adapter in zip(sequences, adapters, strict=True):
        sequence.adapter = adapter
    driver.generate(sequences, 6, logits=False)
    return [sequence.tokens for sequence in sequences]


@pytest.mark.parametrize("split", [{"ops": "cpu"}, {"ops": "torch", "tensor_parallel": 2, "threads": 1}])
def test_adapters_are_the_same_in_processes_and_in_new_ones(folder, tmp_path, split):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    modules = tiny_adapters.changeable(model, folder)
    for number in (1, 2):
        tiny_adapters.write(tmp_path / str(number), model, modules, seed=number, alpha=40)
    checkpoint = open_checkpoint(folder)
    adapters = [open_adapter(tmp_path / str(number), checkpoint, max_rank=8) for number in (1, 2)]
    options = dataclasses.replace(OPTIONS, **split)
    thread = load_runner(checkpoint, dataclasses.replace(options, tensor_parallel=1))
    runner = ProcessRunner.start(checkpoint, options)
    try:
        for number, adapter in enumerate(adapters, 1):
            thread.load_adapter(number, adapter)
            runner.load_adapter(number, adapter)
        expected = greedy_tokens(thread, [0, 1, 2])
        assert len({tuple(tokens[25:]) for tokens in expected}) == 3
        assert greedy_tokens(runner, [0, 1, 2]) == expected
        # New processes get them again, without their files.
        shutil.rmtree(tmp_path)
        first = runner.processes.pids
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: runner.processes.pids not in ([], first))
        with pytest.raises(LmserveError, match="was started again"):
            greedy_tokens(runner, [1])
        assert greedy_tokens(runner, [0, 1, 2]) == expected
        # Another one under the number of one that is gone.
        runner.unload_adapter(1)
        runner.load_adapter(1, adapters[1])
        thread.unload_adapter(1)
        thread.load_adapter(1, adapters[1])
        assert greedy_tokens(runner, [0, 1, 2]) == greedy_tokens(thread, [0, 1, 2]) != expected
        runner.unload_adapter(1)
        with pytest.raises(RuntimeError, match="adapter 1 is not loaded"):
            greedy_tokens(runner, [0, 1])
        assert greedy_tokens(runner, [0]) == expected[:1]
    finally:
        runner.processes.close()


def test_a_module_that_no_frame_can_hold_is_refused(monkeypatch):
    monkeypatch.setattr(adapters_of_processes, "MAX_BODY", 100)
    matrices = LowRank(np.zeros((2, 4), np.float32), np.zeros((3, 2), np.float32), "x.lora_A.weight")
    with pytest.raises(AdapterError, match=r"layers\.0\.x takes 56 bytes; the limit is 50"):
        adapters_of_processes.SentAdapters().load(1, Adapter(Path("a"), b"", {"layers.0.x": matrices}))


def test_a_process_that_dies_within_a_step_ends_the_step(runner):
    lay(runner)
    (pid,) = runner.processes.pids
    os.kill(pid, signal.SIGSTOP)
    runner.launch(1, 1, 1, None)
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(LmserveError) as error:
        runner.collect()
    assert error.value.code == "worker_unavailable"


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (b"GET / HTTP/1.1\r\n".hex(), "which is no frame"),
        ("ends", "ended with exit code 3"),
        ((MAGIC + bytes([2, 0, 0, 0, 9, 0, 0, 0, 1, 2, 3, 4])).hex(), "it sent 0 bytes of 9 and stopped for 0.2 s"),
    ],
)
def test_garbage_in_place_of_an_answer_is_an_error(folder, tmp_path, monkeypatch, says, why):
    (tmp_path / "impostor.py").write_text(IMPOSTOR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SAYS", says)
    monkeypatch.setattr(processes, "CHILD", "impostor")
    monkeypatch.setattr(pipe, "BODY_SECONDS", 0.2)
    with pytest.raises(LmserveError, match=why):
        ProcessRunner.start(open_checkpoint(folder), OPTIONS)


def test_a_process_that_is_sent_garbage_ends(runner):
    group = runner.processes.group()
    group._children[0].pipe._socket.sendall(b"\0" * 64)
    assert group.ended.wait(60)
    assert "exit code 0" in group.why


def test_a_process_without_a_parent_ends_at_once():
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-P", "-m", processes.CHILD, str(theirs.fileno()), "1"]
    with ours, theirs:
        assert subprocess.run(words, pass_fds=(theirs.fileno(),), timeout=60, check=False).returncode == 1


def frames(data: bytes) -> Pipe:
    """A pipe with this in it, and nothing behind it."""
    ours, theirs = socket.socketpair()
    theirs.sendall(data)
    theirs.close()
    return Pipe(ours)


def sent(kind: Kind, body: bytes) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Pipe(ours).send(kind, body)
        return theirs.recv(1 << 16)


def test_a_pipe_takes_whole_frames_alone():
    whole = sent(Kind.STEP, b"a step")
    assert frames(whole).receive() == (Kind.STEP, b"a step")
    for end in range(len(whole)):
        with pytest.raises(PipeError, match="its connection ended"):
            frames(whole[:end]).receive()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 0x41
        with pytest.raises(PipeError):
            frames(bytes(changed)).expect(Kind.STEP)
    with pytest.raises(PipeError, match="it sent STEP where OUTCOME was due"):
        frames(whole).expect(Kind.OUTCOME)
