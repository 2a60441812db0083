"""`lmserve bench --fit` on a tiny model, and its step model in the simulator."""

import json

import numpy as np
import pytest
import tiny_gguf
import tiny_models
from lmserve.capacity.fit import Shape, fill
from lmserve.cli import main
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
from model_driver import Driver


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path, tiny_models.make("llama", tmp_path / "hf"), "llama")
    return path


def test_a_fit_feeds_the_simulator(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmserve.capacity.fit.DECODING", (1, 4))
    monkeypatch.setattr("lmserve.capacity.fit.DECODE_CONTEXTS", (16, 64))
    monkeypatch.setattr("lmserve.capacity.fit.PROMPTS", (16, 64))
    monkeypatch.setattr("lmserve.capacity.fit.PROMPT_CONTEXTS", (0, 64))
    file, trace = tmp_path / "fit.json", tmp_path / "trace.jsonl"
    serve = f"{model} --max-batch 4 --max-batch-tokens 64 --device cpu"
    assert main(["bench", "--fit", str(file), "--serve", serve]) == 0
    fit = json.loads(file.read_text())
    assert (fit["sizes"]["max_batch"], fit["sizes"]["max_model_len"]) == (4, 256)
    assert len(fit["steps"]) == 8
    assert all(step["measured_ms"] > 0 for step in fit["steps"])
    assert fit["step_model"]["base_ms"] > 0
    assert "mean error" in capsys.readouterr().out
    trace.write_text('{"arrival": 0, "prompt_tokens": 100, "output_tokens": 5}')
    assert main(["simulate", "--trace", str(trace), "--step-model", str(file)]) == 0
    # A prompt of two steps, and four that decode.
    assert "steps              6" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [Shape(3, 0, 20), Shape(0, 24, 33), Shape(2, 16, 5)])
def test_a_filled_step_is_one_that_the_engine_could_plan(model, shape):
    options = RunnerOptions(device="cpu", ops="torch", max_batch=4, max_batch_tokens=64, threads=1)
    runner = load_runner(open_checkpoint(model), options)
    rows = fill(runner, shape)
    written = {name: getattr(runner.buffers, name).copy() for name in ("query_start", "context_lens", "sample_rows")}
    slots = runner.buffers.slots[: shape.decode + shape.prefill].copy()
    driver = Driver(runner)
    work = []
    for new in [1] * shape.decode + [shape.prefill] * (shape.prefill > 0):
        sequence = driver.start(np.arange(shape.context + new))
        sequence.computed = shape.context
        work.append((sequence, new))
    _, sequences, expected_rows = driver.fill(work)
    assert rows == sequences == expected_rows
    for name, count in (("query_start", rows + 1), ("context_lens", rows), ("sample_rows", rows)):
        assert written[name][:count].tolist() == getattr(runner.buffers, name)[:count].tolist()
    assert len(set(slots.tolist())) == len(slots)
