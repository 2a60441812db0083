"""POST /generate: replies, sessions, and the idioms of LMDeploy's clients."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest
from conftest import Running
from scripted_core import MAX_MODEL_LEN

from wire import error_of, frames_of

ids = itertools.count(1000)


def generate(client: httpx.Client, prompt: Any = "Hello there", **fields: Any) -> dict[str, Any]:
    response = client.post("/generate", json={"prompt": prompt, "request_output_len": 8, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def test_stream_of_frames(client: httpx.Client) -> None:
    body = {"prompt": "Hello there", "stream": True, "request_output_len": 20, "ignore_eos": True, "seed": 1}
    response = client.post("/generate", json=body)
    assert response.status_code == 200
    frames = frames_of(response.content)
    counts = [frame["tokens"] for frame in frames]
    assert counts == sorted(counts)
    assert counts[-1] == 20
    assert [frame["finish_reason"] for frame in frames[:-1]] == [None] * (len(frames) - 1)
    assert frames[-1]["finish_reason"] == "length"
    usage = frames[-1]["usage"]
    assert usage["completion_tokens"] == 20
    assert usage["prompt_tokens"] > 0
    assert usage["history_tokens"] == 0
    assert all("usage" not in frame for frame in frames[:-1])


def test_whole_reply_equals_stream(client: httpx.Client) -> None:
    body = {"prompt": "Tell me", "request_output_len": 40, "ignore_eos": True, "seed": 5}
    whole = client.post("/generate", json=body).json()
    frames = frames_of(client.post("/generate", json=body | {"stream": True}).content)
    assert "".join(frame["text"] for frame in frames) == whole["text"]
    assert frames[-1]["tokens"] == whole["tokens"] == 40


def test_exact_bytes(scripted_client: httpx.Client) -> None:
    body = {"prompt": "a b", "stream": True, "request_output_len": 5}
    assert scripted_client.post("/generate", json=body).content == (
        b'{"text": "Hi", "tokens": 1, "finish_reason": null}\x00'
        b'{"text": " there", "tokens": 2, "finish_reason": null}\x00'
        b'{"text": ",", "tokens": 3, "finish_reason": null}\x00'
        b'{"text": " \\u4f60", "tokens": 4, "finish_reason": null}\x00'
        b'{"text": "\\u597d", "tokens": 5, "finish_reason": null}\x00'
        b'{"text": "", "tokens": 5, "finish_reason": "length", "usage": {"prompt_tokens": 2, "history_tokens": 0, '
        b'"cached_tokens": 0, "completion_tokens": 5}}\x00'
    )


def test_list_prompt_and_unknown_keys(client: httpx.Client) -> None:
    messages = [
        {"role": "system", "content": "Be brief.", "name": "ignored"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Again?"},
    ]
    assert generate(client, messages, model="any", nonsense=[1, 2])["tokens"] > 0


def test_a_session_keeps_its_history(client: httpx.Client) -> None:
    session = next(ids)
    first = generate(client, "one", instance_id=session)
    assert first["usage"]["history_tokens"] == 0
    second = generate(client, "two", instance_id=session, sequence_start=False)
    total = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert total - 1 <= second["usage"]["history_tokens"] <= total
    assert second["usage"]["prompt_tokens"] > second["usage"]["history_tokens"]
    again = generate(client, "three", instance_id=session, sequence_start=True)
    assert again["usage"]["history_tokens"] == 0
    generate(client, "", instance_id=session, request_output_len=0, sequence_start=False, sequence_end=True)


def test_sequence_end_drops_the_session_after_its_turn(client: httpx.Client) -> None:
    session = next(ids)
    generate(client, "one", instance_id=session)
    last = generate(client, "two", instance_id=session, sequence_start=False, sequence_end=True)
    assert last["usage"]["history_tokens"] > 0
    body = {"prompt": "three", "instance_id": session, "sequence_start": False}
    error_of(client.post("/generate", json=body), 404, "session_not_found")


def test_anonymous_turns_have_no_session(client: httpx.Client) -> None:
    generate(client, "one", instance_id=-1)
    body = {"prompt": "two", "instance_id": -1, "sequence_start": False, "request_output_len": 4}
    assert client.post("/generate", json=body).json()["usage"]["history_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["", []])
@pytest.mark.parametrize("known", [False, True])
def test_end_idiom(client: httpx.Client, stream: bool, prompt: Any, known: bool) -> None:
    session = next(ids)
    if known:
        generate(client, "one", instance_id=session)
    body = {
        "prompt": prompt,
        "request_output_len": 0,
        "sequence_start": False,
        "sequence_end": True,
        "instance_id": session,
        "stream": stream,
    }
    response = client.post("/generate", json=body)
    assert response.status_code == 200
    (frame,) = frames_of(response.content) if stream else [response.json()]
    usage = {"prompt_tokens": 0, "history_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}
    assert frame == {"text": "", "tokens": 0, "finish_reason": "stop", "usage": usage}
    continued = {"prompt": "two", "instance_id": session, "sequence_start": False}
    error_of(client.post("/generate", json=continued), 404, "session_not_found")


def test_prefill_idiom(client: httpx.Client) -> None:
    session = next(ids)
    messages = [{"role": "user", "content": "My name is Ann."}, {"role": "assistant", "content": "Hello Ann."}]
    filled = generate(client, messages, instance_id=session, request_output_len=0)
    assert filled["text"] == ""
    assert filled["tokens"] == 0
    assert filled["usage"]["completion_tokens"] == 0
    turn = generate(client, "Who am I?", instance_id=session, sequence_start=False, sequence_end=True)
    assert turn["usage"]["history_tokens"] >= filled["usage"]["prompt_tokens"] - 1 > 0


# Long enough to be still running when the test acts, whichever the core.
HELD = {"prompt": "[[hold]] [[pace 0.002]]", "request_output_len": 3500, "ignore_eos": True, "stream": True}


def test_cancel_idiom(served: Running, client: httpx.Client) -> None:
    session = next(ids)
    cancel = {"prompt": "", "instance_id": session, "request_output_len": 0, "sequence_start": False, "stop": True}
    with client.stream("POST", "/generate", json=HELD | {"instance_id": session}) as response:
        chunks = response.iter_raw()
        first = next(chunks)
        reply = httpx.post(f"{served.url}/generate", json=cancel).json()
        frames = frames_of(first + b"".join(chunks))
    assert reply["tokens"] == 0
    assert frames[-1]["finish_reason"] == "abort"
    assert 0 < frames[-1]["tokens"] < 3500
    # What was generated stays.
    following = generate(client, "go on", instance_id=session, sequence_start=False, sequence_end=True)
    assert following["usage"]["history_tokens"] >= frames[-1]["tokens"]


def test_cancel_without_a_turn_is_no_error(client: httpx.Client) -> None:
    assert generate(client, "", instance_id=next(ids), request_output_len=0, stop=True)["text"] == ""


def test_cancel_of_an_anonymous_turn_is_refused(client: httpx.Client) -> None:
    response = client.post("/generate", json={"prompt": "", "stop": True})
    error_of(response, 400, "invalid_value", "instance_id")


def test_busy_session(served: Running, client: httpx.Client) -> None:
    session = next(ids)
    with client.stream("POST", "/generate", json=HELD | {"instance_id": session}) as held:
        chunks = held.iter_raw()
        first = next(chunks)
        for body in (
            {"prompt": "x", "instance_id": session, "sequence_start": False},
            {"prompt": "x", "instance_id": session, "stream": True},
            {"prompt": "", "instance_id": session, "request_output_len": 0, "sequence_end": True},
        ):
            response = httpx.post(f"{served.url}/generate", json=body)
            error_of(response, 409, "session_busy")
            assert int(response.headers["retry-after"]) >= 1
        httpx.post(f"{served.url}/generate", json={"prompt": "", "instance_id": session, "stop": True})
        assert frames_of(first + b"".join(chunks))[-1]["finish_reason"] == "abort"


def test_what_the_core_is_asked(scripted: Running, scripted_client: httpx.Client) -> None:
    body = {
        "prompt": "x",
        "instance_id": 2**63 - 1,
        "sequence_start": False,
        "sequence_end": True,
        "request_output_len": 3,
        "top_p": 0.5,
        "top_k": -1,
        "temperature": 0,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "seed": -1,
        "min_p": 0.25,
        "stop_words": ["a", "\n"],
        "on_disconnect": "keep",
        "on_overflow": "truncate_output",
    }
    error_of(scripted_client.post("/generate", json=body), 404, "session_not_found")
    assert scripted.core.submitted[-1] == {
        "route": "generate",
        "model": "tiny-model",
        "input": {"type": "turn", "text": "x"},
        "session": {"id": 2**63 - 1, "end": True, "on_disconnect": "keep"},
        "on_overflow": "truncate_output",
        "sampling": {
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 0.5,
            "min_p": 0.25,
            "repetition_penalty": 1.2,
            "seed": 2**64 - 1,
        },
        "stopping": {"max_tokens": 3, "stop": ["a", "\n"], "ignore_eos": True},
    }


def test_defaults_are_lmdeploys(scripted: Running, scripted_client: httpx.Client) -> None:
    generate(scripted_client, "x", request_output_len=512)
    request = scripted.core.submitted[-1]
    off = {"min_p": 0, "repetition_penalty": 1}
    assert off | request["sampling"] == off | {"temperature": 0.8, "top_k": 40, "top_p": 0.8}
    assert request["stopping"] == {"max_tokens": 512}
    assert "session" not in request


def test_overflow_policies(real: Running) -> None:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        body = {"prompt": "x" * 3000, "request_output_len": 4000, "ignore_eos": True}
        error = error_of(client.post("/generate", json=body), 400, "context_length_exceeded")
        assert error["context_length"] == MAX_MODEL_LEN
        assert error["requested_tokens"] == 4000
        assert error["input_tokens"] > 3000
        assert error["history_tokens"] == 0
        cut = client.post("/generate", json=body | {"on_overflow": "truncate_output"}).json()
        assert cut["finish_reason"] == "length"
        assert cut["usage"]["prompt_tokens"] + cut["tokens"] == MAX_MODEL_LEN


@pytest.mark.parametrize("stream", [False, True])
def test_failure_before_the_first_byte_has_its_status(scripted_client: httpx.Client, stream: bool) -> None:
    for prompt, status, code in (
        ("[[refuse 429 queue_full]]", 429, "queue_full"),
        ("[[refuse 503 unavailable]]", 503, "unavailable"),
        ("[[fail early]]", 500, "internal_error"),
        ("[[wait 0.05]] [[fail early]]", 500, "internal_error"),
        ("x " * 5000, 400, "context_length_exceeded"),
    ):
        response = scripted_client.post("/generate", json={"prompt": prompt, "stream": stream})
        error_of(response, status, code)
        if "refuse" in prompt:
            assert response.headers["retry-after"] == "3"


def test_failure_after_the_first_byte_is_a_frame(scripted_client: httpx.Client) -> None:
    body = {"prompt": "[[fail late]]", "stream": True}
    response = scripted_client.post("/generate", json=body)
    assert response.status_code == 200
    frames = frames_of(response.content)
    assert len(frames) == 4
    assert frames[-1]["finish_reason"] == "error"
    assert frames[-1]["error"]["code"] == "internal_error"
    assert "usage" in frames[-1]
    error_of(scripted_client.post("/generate", json=body | {"stream": False}), 500, "internal_error")
