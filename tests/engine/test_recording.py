"""Steps as messages: written down and run again, and sent as bytes to a runner that shares nothing else."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from asked import OPTIONS, answers, make_model
from lmserve.cli import main
from lmserve.model import load_runner, open_checkpoint, plan_memory
from lmserve.model.interface import LogitEdits, Runner, StepBuffers
from lmserve.model.recording import MAGIC, Header, Recorder, Recording, RecordingError
from lmserve.model.runner import allocate_buffers
from lmserve.model.step_message import INPUTS, OUTPUTS, StepOutcome, StepPlan, encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    make_model(folder, 3)
    return folder


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return open_checkpoint(smollm2_gguf).tokenizer()


def recorded(folder, tokenizer, path, **changes) -> list[str]:
    checkpoint = open_checkpoint(folder)
    options = dataclasses.replace(OPTIONS, **changes)
    runner = load_runner(checkpoint, options)
    return answers(Recorder(runner, path, Header.of(checkpoint, options, runner.info)), tokenizer)


def test_every_array_of_a_step_is_in_its_message():
    names = {field.name for field in dataclasses.fields(StepBuffers)}
    assert names == set(INPUTS) | set(OUTPUTS)


@pytest.mark.parametrize("ops", ["cpu", "torch"])
def test_a_recording_is_run_again_token_for_token(folder, tokenizer, tmp_path, ops, capsys):
    path = tmp_path / "steps"
    expected = answers(load_runner(open_checkpoint(folder), dataclasses.replace(OPTIONS, ops=ops)), tokenizer)
    assert recorded(folder, tokenizer, path, ops=ops) == expected
    assert main(["replay", str(path)]) == 0
    said = capsys.readouterr().out
    recording = Recording(path)
    steps = list(recording.steps())
    rows = sum(plan.rows for plan, _ in steps)
    assert rows >= 8 * 20 + 3
    assert said == f"{len(steps)} steps: {rows} of {rows} tokens are the same\n"
    assert any(plan.masked for plan, _ in steps)
    assert any(plan.edits and plan.edits["seen_token"] for plan, _ in steps)


def test_another_token_is_found(folder, tokenizer, tmp_path, capsys):
    path = tmp_path / "steps"
    recorded(folder, tokenizer, path)
    recording = Recording(path)
    changed = [MAGIC]

    def add(message) -> None:
        body = encode(message)
        changed.append(len(body).to_bytes(4, "little") + body)

    add(recording.header)
    at = 5
    for number, (plan, outcome) in enumerate(recording.steps()):
        add(plan)
        outputs = dict(outcome.outputs)
        if number == at:
            sampled = outcome.sampled().copy()
            assert len(sampled)
            sampled[0] += 1
            outputs["sampled"] = sampled.tobytes()
        add(msgspec.structs.replace(outcome, outputs=outputs))
    path.write_bytes(b"".join(changed))
    assert main(["replay", str(path)]) == 1
    assert capsys.readouterr().out.startswith(f"step {at}, row 0: token ")


def test_a_torn_end_and_a_limit_end_a_recording(folder, tokenizer, tmp_path):
    path = tmp_path / "steps"
    recorded(folder, tokenizer, path)
    whole = list(Recording(path).steps())
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    torn = list(Recording(path).steps())
    # The last outcome is gone; its step is run all the same.
    assert [plan for plan, _ in torn] == [plan for plan, _ in whole]
    assert torn[-1][1] is None
    checkpoint = open_checkpoint(folder)
    runner = load_runner(checkpoint, OPTIONS)
    recorder = Recorder(runner, path, Header.of(checkpoint, OPTIONS, runner.info), max_bytes=len(data) // 2)
    answers(recorder, tokenizer)
    assert 0 < len(list(Recording(path).steps())) < len(whole)
    assert path.stat().st_size <= len(data) // 2


def test_what_is_no_recording_is_refused_in_one_line(folder, tokenizer, tmp_path, capsys):
    path = tmp_path / "steps"
    path.write_bytes(b"something else")
    assert main(["replay", str(path)]) == 1
    assert "is not a recording of lmserve serve --record" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "nowhere")]) == 1
    assert "cannot be read: No such file or directory" in capsys.readouterr().err
    path.write_bytes(MAGIC + b"\x03\x00\x00\x00abc")
    assert main(["replay", str(path)]) == 1
    assert "its header cannot be read" in capsys.readouterr().err
    checkpoint = open_checkpoint(folder)
    runner = load_runner(checkpoint, OPTIONS)
    with pytest.raises(RecordingError, match="cannot be written: Is a directory"):
        Recorder(runner, tmp_path, Header.of(checkpoint, OPTIONS, runner.info))
    recorded(folder, tokenizer, path)
    make_model(tmp_path / "other", 4)
    assert main(["replay", str(path), "--model", str(tmp_path / "other")]) == 1
    assert "is not the model that was recorded" in capsys.readouterr().err


class Distant:
    """A runner behind a wire: it has buffers of its own, and only bytes pass between it and the engine."""

    def __init__(self, runner: Runner, buffers: StepBuffers) -> None:
        self.info = runner.info
        self.buffers = buffers
        self._runner = runner
        self._sent = b""
        self._edits: LogitEdits | None = None

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        plan = StepPlan.of(self.buffers, (n_tokens, n_seqs, n_rows), edits, self.info.block_size)
        self._sent, self._edits = encode(plan), edits

    def collect(self) -> None:
        masks = bytes(self._edits.masks.wait()) if self._edits is not None and self._edits.masks is not None else None
        answer = self._run(self._sent, masks)
        outcome = msgspec.msgpack.decode(answer, type=StepOutcome)
        outcome.write(self.buffers, len(outcome.sampled()))

    def _run(self, sent: bytes, masks: bytes | None) -> bytes:
        plan = msgspec.msgpack.decode(sent, type=StepPlan)
        plan.write(self._runner.buffers)
        self._runner.launch(*plan.sizes, plan.logit_edits(masks))
        self._runner.collect()
        return encode(StepOutcome.of(self._runner.buffers, plan.rows, None))

    def embed(self, token_ids, cu_seqlens):
        return self._runner.embed(token_ids, cu_seqlens)


@pytest.mark.parametrize("ops", ["cpu", "torch"])
def test_a_runner_that_is_reached_by_bytes_alone_answers_the_same(folder, tokenizer, ops):
    options = dataclasses.replace(OPTIONS, ops=ops)
    checkpoint = open_checkpoint(folder)
    expected = answers(load_runner(checkpoint, options), tokenizer)
    runner = load_runner(checkpoint, options)
    assert answers(Distant(runner, allocate_buffers(plan_memory(checkpoint, options))), tokenizer) == expected
