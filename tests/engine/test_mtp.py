"""Heads that guess a token ahead (MTP): what they compute, and that answers stay what they are without."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mtp_models
import numpy as np
import pytest
import tiny_models
from lmserve import _core
from lmserve.cli.plan_view import plan_lines
from lmserve.config import ServeConfig
from lmserve.engine.load import ModelPlan
from lmserve.engine.submission import SamplingParams, SessionRef, StopParams, Submission, Tokens
from lmserve.engine.tiers import TierPlan, tiers_of
from lmserve.model import CheckpointError, OptionError, RunnerOptions, load_runner, open_checkpoint, plan_memory
from lmserve.model.fingerprint import fingerprint
from lmserve.model.recording import Header
from lmserve.worker.runner import ProcessRunner
from model_driver import Driver, greedy
from test_speculation import replies, submission

OPTIONS = RunnerOptions(device="cpu", quantize="none", max_batch=4, max_model_len=256, kv_memory=4 << 20, mtp=True)


class GuessingDriver(Driver):
    """Keeps the logits of each guess by the position that it was made at."""

    def __init__(self, runner, seed: int = 0) -> None:
        super().__init__(runner, seed)
        self.guesses: dict[int, dict[int, np.ndarray]] = {}

    def step(self, work, edits=None, *, logits: bool = False) -> None:
        sampled = [(s, s.computed + new - 1) for s, new in work if s.computed + new == len(s.tokens)]
        if hasattr(self.runner, "draft_logits"):
            super().step(work, edits, logits=logits)
            rows = self.runner.draft_logits(len(sampled))
        else:
            ops, found = self.runner.draft_ops, []
            draft = ops.draft

            def kept(states, head):
                found.extend(ops.logits(states, head))
                draft(states, head)

            ops.draft = kept
            super().step(work, edits)
            ops.draft = draft
            rows = found
        assert len(rows) == len(sampled)
        for (sequence, position), row, guess in zip(sampled, rows, self.runner.buffers.drafts, strict=False):
            assert row.argmax() == guess
            self.guesses.setdefault(id(sequence), {})[position] = row


def check(runner, head: mtp_models.Head, chunk: int) -> None:
    greedy(runner)
    driver = GuessingDriver(runner)
    random = np.random.default_rng(3)
    sequences = [driver.start(random.integers(0, 199, length)) for length in (40, 23, 3)]
    driver.generate(sequences, 12, chunk=chunk)
    for sequence in sequences:
        expected = head.logits(sequence.tokens)
        guesses = driver.guesses[id(sequence)]
        assert len(guesses) == 12
        for position, row in guesses.items():
            assert np.abs(row - expected[position]).max() < 1e-3


@pytest.mark.parametrize("chunk", [1000, 7])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_small", "qwen3_5_moe", "qwen3_next"])
@pytest.mark.parametrize("ops", ["cpu", "torch"])
def test_heads_give_what_their_layers_give(ops: str, family: str, chunk: int, tmp_path: Path) -> None:
    head = mtp_models.make(family, tmp_path)
    options = dataclasses.replace(OPTIONS, ops=ops, quantize="none" if ops == "cpu" else "auto")
    check(load_runner(open_checkpoint(tmp_path, mtp=True), options), head, chunk)


def test_heads_of_gguf_files_do_too(tmp_path: Path) -> None:
    head = mtp_models.make("qwen3_5", tmp_path)
    mtp_models.write_gguf(tmp_path / "model.gguf", head)
    check(load_runner(open_checkpoint(tmp_path / "model.gguf", mtp=True), OPTIONS), head, 7)
    # And without, they are left out.
    assert not open_checkpoint(tmp_path / "model.gguf").config.mtp


def test_the_plan_counts_the_head(tmp_path: Path) -> None:
    mtp_models.make("qwen3_5", tmp_path)
    plain, head = (open_checkpoint(tmp_path, mtp=mtp) for mtp in (False, True))
    options = dataclasses.replace(OPTIONS, max_batch=2)
    without, with_head = (plan_memory(checkpoint, options) for checkpoint in (plain, head))
    # Two layers of the model have keys and values, and the head has one.
    assert with_head.kv_bytes_per_token * 2 == without.kv_bytes_per_token * 3
    assert (without.max_rows, with_head.max_rows) == (2, 4)
    runners = [load_runner(checkpoint, options) for checkpoint in (plain, head)]
    more = runners[1].info.weight_bytes - runners[0].info.weight_bytes
    assert with_head.weight_bytes - without.weight_bytes == more > 0


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    tiny_models.make("qwen3_5", tmp_path / "qwen")
    tiny_models.make("llama", tmp_path / "llama")
    mtp_models.make("qwen3_5", tmp_path / "head")
    with pytest.raises(CheckpointError, match="it has no head that guesses tokens ahead"):
        open_checkpoint(tmp_path / "qwen", mtp=True)
    with pytest.raises(CheckpointError, match="is known of models of llama"):
        open_checkpoint(tmp_path / "llama", mtp=True)
    with pytest.raises(OptionError, match="split among 2 processes guesses no tokens ahead"):
        plan_memory(open_checkpoint(tmp_path / "head", mtp=True), RunnerOptions(device="cpu", tensor_parallel=2))


def test_sessions_outlive_the_head_but_blocks_do_not(tmp_path: Path) -> None:
    mtp_models.make("qwen3_5", tmp_path)
    plain, head = (open_checkpoint(tmp_path, mtp=mtp) for mtp in (False, True))
    assert fingerprint(plain) == fingerprint(head)
    plan, config = TierPlan(host_blocks=1), ServeConfig()
    told = [tiers_of(plan, config, checkpoint, plan_memory(checkpoint, OPTIONS)) for checkpoint in (plain, head)]
    assert told[0] is not None
    assert told[1] is not None
    assert told[0].fingerprint != told[1].fingerprint


@pytest.fixture(scope="module")
def often(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is often right."""
    folder = tmp_path_factory.mktemp("often")
    mtp_models.make("qwen3_5", folder, often=True)
    return folder


END = 150
SHORT = submission(
    Tokens([9, 10]),
    sampling=SamplingParams(logit_bias=[(END, 100.0)]),
    stopping=StopParams(50, stop_token_ids=[END]),
)


def prompt(number: int, tokens: int = 30) -> Tokens:
    return Tokens([int(token) for token in np.random.default_rng(number).integers(0, 149, tokens)])


def asked(number: int, max_tokens: int = 40, **changes: object) -> Submission:
    """An answer that could end anywhere, but does not."""
    sampling = SamplingParams(temperature=0.6 * (number % 2), seed=number, logit_bias=[(END, -100.0)])
    stopping = StopParams(max_tokens, stop_token_ids=[END])
    return submission(prompt(number), sampling=sampling, stopping=stopping, **changes)


def conversations(engine: _core.Engine) -> list[list[int]]:
    """What sessions hold after answers alone, side by side, of long prompts, and after a fork and a rewind."""
    found = []

    def note(*numbers: int) -> None:
        found.extend(engine.session_tokens(0, number) for number in numbers)

    replies(engine, [asked(0, session=SessionRef(0, start=True))])
    note(0)
    # One of them begins as the first one did.
    replies(engine, [asked(number, session=SessionRef(number + 1, start=True)) for number in range(4)])
    note(1, 2, 3, 4)
    long = submission(prompt(9, 90), 30, session=SessionRef(5, start=True))
    replies(engine, [long, asked(7, session=SessionRef(6, start=True))])
    note(5, 6)
    replies(engine, [submission(prompt(11, 5), 20, session=SessionRef(5))])
    note(5)
    engine.fork_session(0, 5, 7)
    replies(engine, [submission(prompt(12, 6), 20, session=SessionRef(7)), asked(3, session=SessionRef(5))])
    note(5, 7)
    engine.rewind_session(0, 5, 1)
    replies(engine, [submission(prompt(13, 6), 20, session=SessionRef(5))])
    note(5)
    return found


PATHS = {
    "fp32": {"quantize": "none"},
    "q8, KV int8": {"quantize": "q8", "kv_dtype": "int8"},
    "torch": {"ops": "torch"},
}
SIZES = {"room": {}, "small steps": {"max_batch_tokens": 20}, "few blocks": {"blocks": 16}}


@pytest.mark.parametrize("speculate", [0, 5])
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("path", list(PATHS))
def test_answers_are_the_same_with_and_without(often: Path, path: str, size: str, speculate: int) -> None:
    changes = dict(SIZES[size])
    blocks = changes.pop("blocks", None)
    runs = []
    for mtp in (False, True):
        checkpoint = open_checkpoint(often, mtp=mtp)
        options = RunnerOptions(
            device="cpu",
            max_batch=4,
            max_model_len=256,
            kv_memory=1 << 20,
            threads=1,
            mtp=mtp,
            speculate=speculate * mtp,
            **PATHS[path],
            **changes,
        )
        if blocks is not None:
            per_token = plan_memory(checkpoint, options).kv_bytes_per_token
            options = dataclasses.replace(options, kv_memory=16 * blocks * per_token)
        engine = _core.Engine(load_runner(checkpoint, options), None, None, eos_token_ids=[], speculate=speculate * mtp)
        # After short answers short ones are expected, and more join than there is room for.
        replies(engine, [SHORT] * 20)
        replies(engine, [asked(number, 120, session=SessionRef(number + 20, start=True)) for number in range(4)])
        long = [engine.session_tokens(0, number) for number in range(20, 24)]
        runs.append([*long, *conversations(engine)])
        assert blocks is None or engine.stats()["preemptions"] > 0
        engine.shutdown(0)
    assert runs[0] == runs[1]


def test_what_was_guessed_and_accepted_is_counted(often: Path) -> None:
    drafted = accepted = 0
    for number in range(4):
        # What steps take is learned anew by each engine, and assumed to be little until then.
        options = dataclasses.replace(OPTIONS, max_batch=1, threads=1)
        engine = _core.Engine(load_runner(open_checkpoint(often, mtp=True), options), None, None, eos_token_ids=[])
        replies(engine, [asked(number)])
        stats, metrics = engine.stats(), engine.metrics()
        engine.shutdown(0)
        assert stats["drafted_tokens"] == stats["mtp_drafted_tokens"]
        for name in ("drafted", "accepted"):
            assert f"\nlmserve_mtp_{name}_tokens_total {stats[f'mtp_{name}_tokens']}\n" in metrics
        drafted += stats["mtp_drafted_tokens"]
        accepted += stats["mtp_accepted_tokens"]
    assert 0 < accepted < drafted


def test_heads_that_are_seldom_right_change_nothing(tmp_path: Path) -> None:
    mtp_models.make("qwen3_5", tmp_path)
    runs = []
    for mtp in (False, True):
        runner = load_runner(open_checkpoint(tmp_path, mtp=mtp), dataclasses.replace(OPTIONS, threads=1))
        engine = _core.Engine(runner, None, None, eos_token_ids=[])
        runs.append(conversations(engine))
        engine.shutdown(0)
    assert runs[0] == runs[1]


def test_the_setting_opens_the_model_with_its_head(often: Path) -> None:
    settings = ServeConfig(max_model_len=200, max_batch=2, kv_memory=4 << 20, mtp=True, speculate=0, device="cpu")
    plan = ModelPlan(often, settings)
    assert plan.memory.mtp
    drafts = plan_lines(plan, ("it",))[-1]
    assert drafts == "Drafts    one token of a sequence by the model's own head, 4 sampled rows a step with them"
    assert plan.options.mtp


def guesses(runner) -> list[tuple[list[int], list[int]]]:
    """What is sampled in some steps of three sequences, and what is guessed then."""
    greedy(runner)
    driver = Driver(runner)
    sequences = [driver.start(prompt(number).ids) for number in range(3)]
    found = []
    for _ in range(12):
        driver.step([(sequence, sequence.pending) for sequence in sequences])
        found.append((runner.buffers.sampled[:3].tolist(), runner.buffers.drafts[:3].tolist()))
    assert any(any(drafts) for _, drafts in found)
    return found


def test_recordings_and_worker_processes_have_the_head(often: Path) -> None:
    checkpoint = open_checkpoint(often, mtp=True)
    options = dataclasses.replace(OPTIONS, threads=1)
    runner = load_runner(checkpoint, options)
    assert Header.of(checkpoint, options, runner.info).open(often).config.mtp
    process = ProcessRunner.start(checkpoint, options)
    try:
        assert guesses(process) == guesses(runner)
    finally:
        process.processes.close()
