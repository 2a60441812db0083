"""`lmserve simulate --trace`, and the fit of its step model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from lmserve.capacity.fit import Shape, fit, shapes
from lmserve.capacity.setup import PARTS, Fit, ServerSizes, StepModel, read_step_model
from lmserve.cli import main
from msgspec.json import encode

MODEL = "base_ms=10,decode_ms=1,prefill_ms=0.5"


def write_trace(folder: Path, requests: list[dict[str, Any]]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(request) for request in requests) + "\n")
    return path


def request(arrival: float, prompt: int, output: int, **more: int) -> dict[str, Any]:
    return {"arrival": arrival, "prompt_tokens": prompt, "output_tokens": output, **more}


def simulate(folder: Path, requests: list[dict[str, Any]], *arguments: str, model: str = MODEL) -> dict[str, Any]:
    figures = folder / "figures.json"
    trace = write_trace(folder, requests)
    assert main(["simulate", "--trace", str(trace), "--step-model", model, "--json", str(figures), *arguments]) == 0
    return dict(json.loads(figures.read_text()))


def test_one_request_takes_the_time_of_its_steps(tmp_path: Path) -> None:
    figures = simulate(tmp_path, [request(2.0, 100, 5)])
    # The prompt's step, and four that decode.
    assert figures["steps"] == 5
    assert figures["ttft_ms"]["p50"] == pytest.approx(10 + 0.5 * 100)
    assert figures["inter_token_ms"]["mean"] == pytest.approx(11)
    assert figures["elapsed_s"] == pytest.approx(2 + 0.060 + 4 * 0.011)
    assert (figures["completed"], figures["prompt_tokens"], figures["output_tokens"]) == (1, 100, 5)
    assert figures["busy"] == pytest.approx(0.104 / 2.104)


def test_requests_share_steps_and_wait_for_a_place(tmp_path: Path) -> None:
    together = simulate(tmp_path, [request(0, 10, 20)] * 4)
    apart = simulate(tmp_path, [request(0, 10, 20)] * 4, "--max-batch", "1")
    assert together["steps"] == 20
    assert apart["steps"] == 80
    assert apart["ttft_ms"]["worst"] > 3 * 20 * 11 > together["ttft_ms"]["worst"]


def test_blocks_of_layers_with_a_window_are_given_back_and_waited_for(tmp_path: Path) -> None:
    """A sequence holds its window and a block or two there, however long it gets; a batch waits for them."""
    fit = tmp_path / "fit.json"
    requests = [request(0, 16, 1000)] * 8

    def steps(window: int, blocks: int) -> int:
        sizes = ServerSizes(
            max_batch=8, max_batch_tokens=64, max_model_len=2048, window=window, num_window_blocks=blocks
        )
        fit.write_bytes(encode(Fit(model="m", machine="x", step_model=TRUE, sizes=sizes, mean_error=0.1)))
        figures = simulate(tmp_path, requests, model=str(fit))
        assert figures["completed"] == 8
        return int(figures["steps"])

    alone = steps(0, 0)
    # Eight times a window of 64 tokens, its own block and the next: without giving back, one sequence takes 64.
    assert steps(64, 8 * 6 + 4) == alone
    assert steps(64, 2 * 6) > 2 * alone
    with pytest.raises(AssertionError):
        steps(64, 5)


def test_turns_of_a_session_wait_for_each_other_and_find_their_history(tmp_path: Path) -> None:
    turns = [request(0, 64, 17, session=7), request(0.001, 16, 1, session=7), request(9, 16, 1, session=7)]
    figures = simulate(tmp_path, turns)
    assert figures["prompt_tokens"] == 64 + (64 + 17 + 16) + (64 + 17 + 16 + 1 + 16)
    # All but what was never computed: the token generated last, which no step has taken in.
    assert figures["cached_tokens"] == (64 + 16) + (64 + 17 + 16)
    # Nobody waits while the turn before runs: the client has not sent its own yet.
    assert figures["ttft_ms"]["worst"] == pytest.approx(10 + 0.5 * 64)


def test_shared_beginnings_are_cached_for_all(tmp_path: Path) -> None:
    requests = [request(at, 100, 2, shared_tokens=64) for at in range(3)]
    assert simulate(tmp_path, requests)["cached_tokens"] == 2 * 64
    assert simulate(tmp_path, [request(at, 100, 2) for at in range(3)])["cached_tokens"] == 0


def test_a_small_cache_makes_requests_wait_and_refuses_what_can_never_fit(tmp_path: Path) -> None:
    requests = [request(0, 40, 60)] * 4 + [request(0, 400, 1)]
    figures = simulate(tmp_path, requests, "--kv-tokens", "160")
    # Each joins when the one before has nearly all its tokens.
    assert figures["ttft_ms"]["worst"] > 2 * 60 * 11
    assert figures["recomputed_tokens"] == 0
    assert (figures["completed"], figures["refused"]) == (4, {"context_length_exceeded": 1})
    assert figures["output_tokens"] == 240


def test_a_burst_beyond_the_cache_is_computed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--kv-tokens", "16384", "--max-batch", "64", "--max-batch-tokens", "256")
    figures = simulate(tmp_path, [request(0, 1000, 200)] * 64, *sizes)
    assert figures["recomputed_tokens"] < figures["computed_tokens"] / 100
    assert figures["computed_tokens"] - figures["recomputed_tokens"] == 64 * 1199
    # As many as if nobody had left room for anybody.
    assert figures["steps"] <= 1073
    assert "computed again" in capsys.readouterr().out


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    figures = simulate(tmp_path, [request(0, 10, 5)] * 10, "--max-batch", "1", "--max-queue", "3")
    assert figures["refused"]["queue_full"] == 10 - figures["completed"] > 0


def test_replicas_share_the_load_and_keep_their_sessions(tmp_path: Path) -> None:
    requests = [request(0, 10, 20)] * 8 + [request(at, 32, 2, session=5) for at in range(3)]
    figures = simulate(tmp_path, requests, "--replicas", "4", "--max-batch", "2")
    assert figures["completed"] == 11
    assert figures["cached_tokens"] == (32 + 1) + (32 + 2 + 32 + 1)
    assert simulate(tmp_path, requests, "--max-batch", "2")["ttft_ms"]["p99"] > figures["ttft_ms"]["p99"]


def test_plot_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = tmp_path / "plot.svg"
    requests = [request(at / 10, 50, 20) for at in range(100)]
    first = simulate(tmp_path, requests, "--plot", str(drawing))
    titles = {node.text for node in ET.parse(drawing).iter("{http://www.w3.org/2000/svg}text")}
    assert titles >= {"trace.jsonl on 1 replica", "throughput", "time to first token", "requests", "KV cache"}
    tokens = sum(moment["output_tokens_per_s"] for moment in first["timeline"]) * 0.25
    assert tokens == pytest.approx(2000)
    assert f"requests {100:>14}" in capsys.readouterr().out
    assert simulate(tmp_path, requests) == first


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"arrival": 0}', "line 2 of the trace: missing field `prompt_tokens`"),
        ("{", "line 2 of the trace: EOF while parsing"),
        ('{"arrival": -1, "prompt_tokens": 1, "output_tokens": 1}', "line 2 of the trace: arrival must lie in [0, "),
        ('{"arrival": 0, "prompt_tokens": 1, "output_tokens": 0}', "must be at least 1"),
        ('{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1, "sesion": 1}', "unknown field `sesion`"),
        ('{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1, "shared_tokens": 2}', "has only 1 tokens"),
    ],
)
def test_wrong_lines_are_named(line: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps(request(0, 1, 1)) + "\n" + line)
    assert main(["simulate", "--trace", str(trace), "--step-model", MODEL]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trace", "/nowhere"], "--trace needs --step-model"),
        (["--trace", "/nowhere", "--step-model", MODEL], "--trace /nowhere cannot be read: No such file"),
        (["--trace", "/nowhere", "--step-model", "base=1"], "NAME=MILLISECONDS of base_ms, decode_ms,"),
        (["--trace", "/nowhere", "--step-model", "base_ms=x"], "but 'base_ms=x' was given"),
        (
            ["--trace", "/nowhere", "--step-model", "/nowhere"],
            "/nowhere is not a file of lmserve bench --fit: No such file",
        ),
        (["--replicas", "2"], "--replicas needs --trace"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_a_step_without_a_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path, [request(0, 1, 1)])
    assert main(["simulate", "--trace", str(trace), "--step-model", "base_ms=0"]) == 1
    assert "base_ms must be greater than 0" in capsys.readouterr().err


TRUE = StepModel(
    base_ms=5, decode_ms=1.25, decode_context_ms=0.001, prefill_ms=0.5, prefill_context_ms=0.0002, prompt_end_ms=0.75
)


def times(chosen: list[Shape], model: StepModel) -> list[float]:
    return [float(np.dot(shape.features(), [getattr(model, part) for part in PARTS])) for shape in chosen]


def test_a_fit_finds_the_model_that_made_the_times() -> None:
    chosen = shapes(ServerSizes())
    found, error = fit([shape.features() for shape in chosen], times(chosen, TRUE))
    assert error < 1e-9
    assert [getattr(found, part) for part in PARTS] == pytest.approx([getattr(TRUE, part) for part in PARTS])


def test_no_part_of_a_fit_is_negative() -> None:
    chosen = shapes(ServerSizes())
    # Steps that get shorter with the context, as noise can make them seem.
    measured = [time - 0.002 * shape.context for shape, time in zip(chosen, times(chosen, TRUE), strict=True)]
    found, _ = fit([shape.features() for shape in chosen], [max(time, 0.1) for time in measured])
    assert min(getattr(found, part) for part in PARTS) >= 0
    assert found.base_ms > 0


def test_shapes_fit_their_server() -> None:
    sizes = ServerSizes(max_batch=8, max_batch_tokens=128, max_model_len=1024, num_blocks=128)
    chosen = shapes(sizes)
    assert {shape.decode for shape in chosen} == {0, 1, 2, 4, 8}
    assert {shape.prefill for shape in chosen} == {0, 16, 64, 128}
    assert max(shape.context for shape in chosen) == 512


def test_a_file_of_a_fit_is_a_step_model(tmp_path: Path) -> None:
    file = tmp_path / "fit.json"
    sizes = ServerSizes(max_batch=3)
    file.write_bytes(encode(Fit(model="m", machine="x", step_model=TRUE, sizes=sizes, mean_error=0.1)))
    assert read_step_model(str(file)) == (TRUE, sizes)
