"""The default model with and without speculation: the same bytes, in fewer steps."""

from __future__ import annotations

import dataclasses
import re
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from lmserve import _core
from lmserve.config import ServeConfig
from lmserve.engine.core import ENDED
from lmserve.engine.load import ModelPlan
from lmserve.engine.submission import (
    Messages,
    Regex,
    SamplingParams,
    SessionRef,
    StopParams,
    Submission,
    Tokens,
    Turn,
    encode,
)
from lmserve.model import RunnerOptions, load_runner, open_checkpoint, plan_memory

TEXT = "The tide gate opens at noon. The keeper notes the time, the wind and the height of the water in a long book."
REPEAT = Messages([{"role": "user", "content": f"Repeat this text word for word: {TEXT}"}])
STORY = Messages([{"role": "user", "content": "Write a short story about a lighthouse keeper."}])
LONG = Messages([{"role": "user", "content": f"How often does the gate open? {TEXT * 16}"}])
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7)

Engines = tuple[_core.Engine, _core.Engine]


@pytest.fixture(scope="module")
def engines(smollm2_gguf: Path) -> Iterator[Engines]:
    """One without speculation and one with it."""
    settings = ServeConfig(max_model_len=1024, max_batch=8, max_batch_tokens=128, kv_memory=64 << 20)
    both = tuple(
        ModelPlan(smollm2_gguf, dataclasses.replace(settings, speculate=speculate)).load_engine()
        for speculate in (0, 8)
    )
    yield both[0], both[1]
    for engine in both:
        engine.shutdown(0)


def submission(prompt: Messages | Tokens | Turn, max_tokens: int = 48, **changes: object) -> Submission:
    fields = {"route": "generate", "sampling": GREEDY, "stopping": StopParams(max_tokens=max_tokens)} | changes
    return Submission(model="m", input=prompt, **fields)


def finish(engine: _core.Engine, streams: list[_core.Stream]) -> list[bytes]:
    """The bytes of each stream until its end. What was cached is left out: who comes first is chance."""
    bodies = {stream.id: b"" for stream in streams}
    by_id = {stream.id: stream for stream in streams}
    running = set(by_id)
    while running:
        assert select.select([engine.wake_fd()], [], [], 30)[0]
        for number in engine.drain():
            if number in running:
                state, body = by_id[number].poll()
                bodies[number] += body
                if state == ENDED:
                    running.discard(number)
    return [re.sub(rb'"cached_tokens": ?\d+', b"", body) for body in bodies.values()]


def replies(engine: _core.Engine, requests: list[Submission]) -> list[bytes]:
    """The bytes of each reply, of requests that run side by side."""
    return finish(engine, [engine.submit(encode(request)) for request in requests])


def drafts(engine: _core.Engine) -> tuple[int, int]:
    """Tokens drafted and accepted since the start."""
    stats = engine.stats()
    return int(stats["drafted_tokens"]), int(stats["accepted_tokens"])


REQUESTS = {
    "greedy": submission(REPEAT),
    "sampled": submission(REPEAT, sampling=SAMPLED),
    "story": submission(STORY, sampling=SAMPLED),
    "penalties": submission(
        REPEAT, sampling=SamplingParams(temperature=0.0, repetition_penalty=1.05, frequency_penalty=0.1)
    ),
    "logprobs": submission(REPEAT, route="completions", sampling=SamplingParams(temperature=0.0, logprobs=3)),
    "streamed": submission(REPEAT, stream=True, route="chat"),
    "stop string": submission(REPEAT, stopping=StopParams(max_tokens=48, stop=["wind and the h"])),
    "stop token": submission(REPEAT, stopping=StopParams(max_tokens=48, min_tokens=2)),
    "ignore_eos": submission(REPEAT, stopping=StopParams(max_tokens=64, ignore_eos=True)),
    "last token": submission(REPEAT, max_tokens=13),
    "choices": submission(REPEAT, route="completions", n=2, sampling=SAMPLED),
    "guided": submission(REPEAT, guide=Regex("(The tide gate opens at noon\\. ){3}")),
    "biased": submission(REPEAT, sampling=SamplingParams(temperature=0.0, logit_bias=[(260, 3.0), (28, -2.0)])),
    "scored prompt": submission(REPEAT, route="completions", prompt_logprobs=2),
}


@pytest.mark.parametrize("name", list(REQUESTS))
def test_a_reply_is_the_same_to_the_byte(engines: Engines, name: str) -> None:
    plain, speculating = engines
    assert replies(plain, [REQUESTS[name]]) == replies(speculating, [REQUESTS[name]])
    assert drafts(plain) == (0, 0)


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_the_last_token_may_lie_anywhere_in_a_draft(engines: Engines, max_tokens: int) -> None:
    plain, speculating = (replies(engine, [submission(REPEAT, max_tokens)]) for engine in engines)
    assert plain == speculating
    assert f'"completion_tokens": {max_tokens}}}'.encode() in plain[0]


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"repetition_penalty": 1.2, "presence_penalty": 0.3}],
)
@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 1.6])
def test_seeded_samples_and_their_logprobs_are_the_same(
    engines: Engines, temperature: float, filters: dict[str, Any]
) -> None:
    requests = [
        submission(
            REPEAT,
            24,
            route="completions",
            sampling=SamplingParams(temperature=temperature, seed=seed, logprobs=2, **filters),
        )
        for seed in range(4)
    ]
    plain, speculating = (replies(engine, requests) for engine in engines)
    assert plain == speculating
    assert len(set(plain)) > 1 or temperature < 0.5


def test_replies_of_a_batch_are_the_same_to_the_byte(engines: Engines) -> None:
    plain, speculating = engines
    requests = [*list(REQUESTS.values())[:8], submission(LONG), submission(LONG, sampling=SAMPLED)]
    assert replies(plain, requests) == replies(speculating, requests)


def test_repeated_text_takes_fewer_steps(engines: Engines) -> None:
    plain, speculating = engines
    steps = []
    for engine in (plain, speculating):
        before = engine.stats()["steps"]
        replies(engine, [REQUESTS["greedy"]])
        steps.append(engine.stats()["steps"] - before)
    assert steps[1] < steps[0] * 0.6
    drafted, accepted = drafts(speculating)
    assert 0 < accepted <= drafted
    counters = f"\nlmserve_drafted_tokens_total {drafted}\n", f"\nlmserve_accepted_tokens_total {accepted}\n"
    assert all(counter in speculating.metrics() for counter in counters)
    assert "\nlmserve_drafted_tokens_total 0\n" in plain.metrics()


def test_a_guided_answer_is_not_drafted(engines: Engines) -> None:
    before = drafts(engines[1])
    replies(engines[1], [REQUESTS["guided"]])
    assert drafts(engines[1]) == before


def test_sessions_go_on_as_without(engines: Engines) -> None:
    told = []
    for engine in engines:
        turns = []
        for number, text in enumerate((f"Repeat: {TEXT}", "Once more, please.", "And again.")):
            session = SessionRef(5, start=number == 0)
            turns += replies(engine, [submission(Turn(text), session=session)])
        told.append((turns, engine.session_info(0, 5)["tokens"], engine.session_transcript(0, 5)))
        assert engine.stats()["owned_blocks"] == 0
        engine.end_session(0, 5, False)
    assert told[0] == told[1]


def cancel(engine: _core.Engine, stream: _core.Stream) -> None:
    engine.cancel_session(0, 6)
    finish(engine, [stream])


def leave(engine: _core.Engine, stream: _core.Stream) -> None:
    stream.abort()
    while engine.session_info(0, 6)["busy"]:
        select.select([engine.wake_fd()], [], [], 0.01)


def end(engine: _core.Engine, stream: _core.Stream) -> None:
    finish(engine, [stream])


@pytest.mark.parametrize("ending", [end, cancel, leave])
@pytest.mark.parametrize("then", ["goes on", "is rewound", "is forked"])
def test_what_a_turn_leaves_is_what_its_tokens_say(
    engines: Engines, ending: Callable[[_core.Engine, _core.Stream], None], then: str
) -> None:
    """However a turn with drafts ends, the next one reads from the cache nothing but what its history gives afresh."""
    plain, speculating = engines
    first = submission(Turn(f"Repeat: {TEXT}"), session=SessionRef(6, start=True))
    replies(speculating, [first])
    stopping = StopParams(max_tokens=200, ignore_eos=True)
    session = SessionRef(6, on_disconnect="keep")
    stream = speculating.submit(encode(submission(Turn("Again."), stopping=stopping, stream=True, session=session)))
    before = speculating.stats()["accepted_tokens"]
    while speculating.stats()["accepted_tokens"] < before + 3:
        select.select([speculating.wake_fd()], [], [], 0.01)
    ending(speculating, stream)
    goes_on = 6
    if then == "is rewound":
        speculating.rewind_session(0, 6, 1)
    elif then == "is forked":
        goes_on = 7
        speculating.fork_session(0, 6, 7)
    history = speculating.session_tokens(0, goes_on)
    more = Tokens([28, 198, 504])
    replies(speculating, [submission(more, session=SessionRef(goes_on))])
    replies(plain, [submission(Tokens(history + more.ids), session=SessionRef(8, start=True))])
    assert speculating.session_tokens(0, goes_on) == plain.session_tokens(0, 8)
    for engine in engines:
        for number in (6, 7, 8):
            engine.end_session(0, number, True)
        assert engine.stats()["owned_blocks"] == 0


PATHS = {
    "torch": {"ops": "torch"},
    "fp32": {"ops": "cpu", "quantize": "none"},
    "q8": {"ops": "cpu", "quantize": "q8"},
    "q4, KV int8": {"ops": "cpu", "quantize": "q4", "kv_dtype": "int8"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.make("llama", folder)
    return folder


@pytest.mark.parametrize("path", list(PATHS))
def test_every_path_verifies_drafts(tiny: Path, path: str) -> None:
    """Tokens of sequences that take each other's blocks, so that some are preempted on the way."""
    checkpoint = open_checkpoint(tiny)
    options = RunnerOptions(device="cpu", max_batch=4, max_batch_tokens=32, max_model_len=200, **PATHS[path])
    options = dataclasses.replace(options, kv_memory=256 * plan_memory(checkpoint, options).kv_bytes_per_token)
    end = 150
    short = submission(
        Tokens([9, 10]),
        sampling=SamplingParams(logit_bias=[(end, 100.0)]),
        stopping=StopParams(50, stop_token_ids=[end]),
    )
    runs: list[list[list[int]]] = []
    accepted = 0
    # Where a machine has much else to do, drafts may not seem to pay, so that none are made.
    for speculate in (0, *[6] * 10):
        if accepted:
            break
        runner = load_runner(checkpoint, dataclasses.replace(options, speculate=speculate))
        engine = _core.Engine(runner, None, None, eos_token_ids=[], speculate=speculate)
        requests = [
            submission(
                Tokens([5 + number, 6, 7, 8] * 6),
                sampling=SamplingParams(temperature=0.3 * (number % 2), seed=number, logit_bias=[(end, -100.0)]),
                stopping=StopParams(120, stop_token_ids=[end]),
                session=SessionRef(number, start=True),
            )
            for number in range(4)
        ]
        # After short answers short ones are expected, and more join than there is room for.
        replies(engine, [short] * 20)
        replies(engine, requests)
        runs.append([engine.session_tokens(0, number) for number in range(4)])
        stats = engine.stats()
        accepted = stats["accepted_tokens"]
        engine.shutdown(0)
        assert runs[-1] == runs[0]
        assert stats["preemptions"] > 0
    assert all(len(tokens) == 144 for tokens in runs[0])
    assert accepted > 0


@pytest.mark.parametrize(
    ("family", "path"), [("qwen3_5", "torch"), ("qwen3_5", "q8"), ("lfm2", "fp32"), ("nemotron_h", "fp32")]
)
def test_no_state_goes_beyond_a_guess(family: str, path: str, tmp_path: Path) -> None:
    """Answers of two tokens in any order, so that guesses are right about as often as wrong."""
    tiny_models.make(family, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    options = RunnerOptions(device="cpu", max_batch=1, max_model_len=200, kv_memory=1 << 20, threads=1, **PATHS[path])
    runs, drafted, accepted = [], 0, 0
    for speculate in (0, 6):
        runner = load_runner(checkpoint, dataclasses.replace(options, speculate=speculate))
        for seed in range(4):
            # What steps take is learned anew by each engine, and assumed to be little until then.
            engine = _core.Engine(runner, None, None, eos_token_ids=[], speculate=speculate, state_every=32)
            session, turns = SessionRef(1, start=True), []
            for _ in range(2):
                request = submission(
                    Tokens([5, 6, 6, 5] * 6),
                    sampling=SamplingParams(temperature=1.0, seed=seed, logit_bias=[(5, 40.0), (6, 40.0)]),
                    stopping=StopParams(50),
                    session=session,
                )
                replies(engine, [request])
                session = SessionRef(1)
                turns.append(engine.session_tokens(0, 1))
            runs.append(turns)
            drafted, accepted = (a + b for a, b in zip((drafted, accepted), drafts(engine), strict=True))
            engine.shutdown(0)
    assert runs[:4] == runs[4:]
    assert len(runs[0][1]) == 148
    assert 0 < accepted < drafted
