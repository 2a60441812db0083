"""Steps that are launched while the one before is computed: the same answers, and nothing left of discarded rows."""

from __future__ import annotations

import dataclasses
import json
import re
import select
import time
from collections.abc import Iterator

import pytest
import transformers
from lmserve import _core
from lmserve.config import ConfigError, ServeConfig
from lmserve.engine.core import ENDED
from lmserve.engine.submission import Regex, SamplingParams, SessionRef, StopParams, Submission, Tokens, encode
from lmserve.model import RunnerOptions, load_runner, open_checkpoint, plan_memory
from lmserve.model.errors import OptionError

OPTIONS = RunnerOptions(ops="torch", device="cpu", max_batch=16, max_batch_tokens=96, kv_memory=16 << 20, threads=1)
PROMPT = [7, 300, 41, 9, 9, 2000, 17]
GREEDY = SamplingParams(temperature=0.0)
SOME = list(range(0, 49152, 800))
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7)

Engines = dict[str, _core.Engine]


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return open_checkpoint(smollm2_gguf).tokenizer()


@pytest.fixture(scope="module", params=["all that was said", "a window"])
def folder(request, tmp_path_factory):
    """A tiny model with random weights and the default model's vocabulary, whose layers see all or a window."""
    path = tmp_path_factory.mktemp("ahead")
    shape = {
        "vocab_size": 49152,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
    }
    window = {"sliding_window": 24} if request.param == "a window" else {}
    config = transformers.MistralConfig(**shape, **window) if window else transformers.LlamaConfig(**shape)
    transformers.set_seed(5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def start(folder, tokenizer, step_ahead, wrap=lambda runner: runner, **options) -> _core.Engine:
    options = dataclasses.replace(OPTIONS, step_ahead=step_ahead, **options)
    runner = wrap(load_runner(open_checkpoint(folder), options))
    return _core.Engine(runner, tokenizer, None, eos_token_ids=[2])


@pytest.fixture(scope="module")
def engines(folder, tokenizer) -> Iterator[Engines]:
    started = {name: start(folder, tokenizer, name) for name in ("off", "on")}
    yield started
    for engine in started.values():
        engine.shutdown(0)


def submission(max_tokens: int = 24, prompt: list[int] = PROMPT, **changes: object) -> Submission:
    fields = {"route": "completions", "sampling": GREEDY, "stopping": StopParams(max_tokens=max_tokens)} | changes
    return Submission(model="m", input=Tokens(prompt), **fields)


def finish(engine: _core.Engine, streams: list[_core.Stream]) -> list[bytes]:
    """The bytes of each stream until its end, without how much was cached: that depends on who came first."""
    bodies = {stream.id: b"" for stream in streams}
    by_id = {stream.id: stream for stream in streams}
    running = set(by_id)
    while running:
        assert select.select([engine.wake_fd()], [], [], 60)[0]
        for number in engine.drain():
            if number in running:
                state, body = by_id[number].poll()
                bodies[number] += body
                if state == ENDED:
                    running.discard(number)
    return [re.sub(rb'"cached_tokens": ?\d+', b"", body) for body in bodies.values()]


def replies(engine: _core.Engine, requests: list[Submission]) -> list[bytes]:
    return finish(engine, [engine.submit(encode(request)) for request in requests])


def idle(engine: _core.Engine) -> dict[str, int]:
    """The counters once nothing runs, with nothing owned."""
    while (stats := engine.stats())["running"] or stats["open_requests"] or stats["owned_blocks"]:
        select.select([engine.wake_fd()], [], [], 0.01)
        engine.drain()
    return stats


def text_of(engine: _core.Engine, request: Submission) -> str:
    (body,) = replies(engine, [request])
    return json.loads(body)["choices"][0]["text"]


REQUESTS = {
    "greedy": submission(),
    "sampled": submission(sampling=SAMPLED),
    "one token": submission(1),
    "two tokens": submission(2),
    "logprobs": submission(sampling=SamplingParams(temperature=0.7, seed=1, logprobs=3)),
    "streamed": submission(stream=True),
    "held off": submission(stopping=StopParams(max_tokens=24, min_tokens=20, stop_token_ids=SOME)),
    "choices": submission(n=3, sampling=SAMPLED),
    "biased": submission(sampling=SamplingParams(temperature=0.0, logit_bias=[(260, 3.0), (28, -2.0)])),
    "penalties": submission(sampling=SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.1)),
    "guided": submission(guide=Regex("[a-z]{9}"), stopping=StopParams(max_tokens=24)),
    "scored": submission(prompt_logprobs=2),
    "a long prompt": submission(prompt=list(range(100, 400))),
}


@pytest.mark.parametrize("name", list(REQUESTS))
def test_a_reply_is_the_same_to_the_byte(engines: Engines, name: str) -> None:
    plain, ahead = (replies(engine, [REQUESTS[name]]) for engine in engines.values())
    assert plain == ahead
    assert idle(engines["off"])["steps_ahead"] == 0


@pytest.mark.parametrize("waits", ["penalties", "guided", "scored"])
def test_no_step_goes_ahead_of_what_it_must_know(engines: Engines, waits: str) -> None:
    before = idle(engines["on"])["steps_ahead"]
    replies(engines["on"], [limited(REQUESTS[waits], max_tokens=1)])
    assert idle(engines["on"])["steps_ahead"] == before


def limited(request: Submission, max_tokens: int) -> Submission:
    return type(request)(
        **{name: getattr(request, name) for name in request.__struct_fields__ if name != "stopping"},
        stopping=StopParams(max_tokens=max_tokens),
    )


def test_all_steps_of_an_answer_but_the_first_go_ahead(engines: Engines) -> None:
    before = idle(engines["on"])
    replies(engines["on"], [submission(20, prompt=[5, 6, 7])])
    after = idle(engines["on"])
    assert after["steps"] - before["steps"] == 20
    assert after["steps_ahead"] - before["steps_ahead"] == 19
    assert after["discarded_rows"] == before["discarded_rows"]
    assert f"\nlmserve_steps_ahead_total {after['steps_ahead']}\n" in engines["on"].metrics()


def test_a_batch_of_sixteen_of_different_lengths(engines: Engines) -> None:
    requests = []
    for at in range(16):
        sampling = GREEDY if at % 2 else SamplingParams(temperature=0.8, top_k=50, seed=at)
        prompt = [(at * 31 + step * 7) % 49000 for step in range(1 + 13 * (at % 6))]
        requests.append(submission(3 + 4 * at, prompt, sampling=sampling))
    requests += list(REQUESTS.values())
    plain, ahead = (replies(engine, requests) for engine in engines.values())
    for number, (expected, found) in enumerate(zip(plain, ahead, strict=True)):
        # Rows of other batches are multiplied in another order: the logprobs differ in their last digits.
        tokens = [re.findall(rb'"text": ?"(?:[^"\\]|\\.)*"', body) for body in (expected, found)]
        assert tokens[0] == tokens[1], number
        assert tokens[0]
    for engine in engines.values():
        idle(engine)


def test_a_stop_string_ends_an_answer_and_its_next_row_is_thrown_away(engines: Engines) -> None:
    whole = text_of(engines["off"], submission(30))
    assert len(whole) > 12
    # Not the end, so that the row after it is one that goes on.
    stop = StopParams(max_tokens=30, stop=[whole[8:11]])
    before = idle(engines["on"])["discarded_rows"]
    plain, ahead = (replies(engine, [submission(stopping=stop)]) for engine in engines.values())
    assert plain == ahead
    # The step that it is in is recorded after the one that ended the answer.
    deadline = time.monotonic() + 10
    while engines["on"].stats()["discarded_rows"] == before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert idle(engines["on"])["discarded_rows"] == before + 1


def test_sessions_and_what_they_find_in_the_prefix_cache(engines: Engines) -> None:
    whole = text_of(engines["off"], submission(60))
    told = []
    for engine in engines.values():
        turns, cached = [], []
        for number in range(6):
            stopping = StopParams(max_tokens=11 + number, stop=[whole[8:11]] if number % 2 else [])
            session = SessionRef(5, start=number == 0)
            prompt = [40 + number, 8, 9, 10]
            stream = engine.submit(encode(submission(prompt=prompt, stopping=stopping, session=session)))
            turns += finish(engine, [stream])
            cached.append(stream.record()[1])
            idle(engine)
        told.append((turns, cached, engine.session_tokens(0, 5)))
        # A prefix that a row for nobody was computed behind is found, and what follows it is computed anew.
        told[-1] += (replies(engine, [submission(8, engine.session_tokens(0, 5)[:-3])]),)
        engine.end_session(0, 5, False)
    assert told[0] == told[1]
    assert max(told[0][1]) > 30


@pytest.mark.parametrize("how", ["cancelled", "left"])
def test_one_that_goes_leaves_the_others_what_they_were(engines: Engines, how: str) -> None:
    others = [submission(20, [at, 3, 3], sampling=SAMPLED) for at in range(50, 54)]
    expected = replies(engines["off"], others)
    engine = engines["on"]
    gone = submission(900, [1, 2, 3], stream=True, session=SessionRef(9, start=True))
    for _ in range(4):
        stream = engine.submit(encode(gone))
        running = [engine.submit(encode(request)) for request in others]
        while not stream.poll()[1]:
            select.select([engine.wake_fd()], [], [], 0.01)
        if how == "cancelled":
            assert engine.cancel_session(0, 9)
        else:
            stream.abort()
        assert finish(engine, running) == expected
        idle(engine)
    kept = how == "cancelled"
    assert engine.end_session(0, 9, True) == kept


class Failing:
    """A runner whose launches and collects fail at these numbers, counted from 1."""

    goes_ahead = True

    def __init__(self, runner, launches=(), collects=()) -> None:
        self.info, self.buffers, self.runner = runner.info, runner.buffers, runner
        self.launches, self.collects = set(launches), set(collects)
        self.launched = self.collected = 0
        self.embed = runner.embed

    def launch(self, *step) -> None:
        self.launched += 1
        if self.launched in self.launches:
            raise RuntimeError("a launch that fails")
        self.runner.launch(*step)

    def collect(self) -> None:
        self.collected += 1
        self.runner.collect()
        if self.collected in self.collects:
            raise RuntimeError("a step that fails")


@pytest.mark.parametrize("failing", [{"launches": [6, 15]}, {"collects": [5, 14]}, {"launches": [9], "collects": [7]}])
def test_a_step_that_fails_takes_the_one_ahead_with_it(folder, tokenizer, engines: Engines, failing) -> None:
    requests = [submission(16, [at, 4, 4, 4], sampling=SAMPLED) for at in range(60, 66)]
    expected = replies(engines["off"], requests)
    engine = start(folder, tokenizer, "on", lambda runner: Failing(runner, **failing))
    try:
        assert replies(engine, requests) == expected
        stats = idle(engine)
        assert stats["failed_steps"] == sum(map(len, failing.values()))
        assert stats["steps_ahead"] > 5
    finally:
        engine.shutdown(0)


def test_where_steps_cannot_go_ahead_it_is_said(folder, tmp_path) -> None:
    for changes in ({"record": tmp_path / "steps"}, {"worker": "process"}, {"tensor_parallel": 2}, {"speculate": 4}):
        with pytest.raises(ConfigError, match="on cannot go with --"):
            ServeConfig(step_ahead="on", **changes)
        ServeConfig(step_ahead="auto", **changes)
    with pytest.raises(OptionError, match="step_ahead is 'on'; the cpu kernels compute a step before"):
        plan_memory(open_checkpoint(folder), dataclasses.replace(OPTIONS, ops="cpu", step_ahead="on"))
    with pytest.raises(OptionError, match="step_ahead is 'never'; it must be one of auto, on, off"):
        plan_memory(open_checkpoint(folder), dataclasses.replace(OPTIONS, step_ahead="never"))
