"""`lmserve.Client`, `AsyncClient` and `APIClient` against real servers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import lmserve
import pytest
from conftest import MODEL, NAMES, Running, serve_core
from lmserve import APIClient, AsyncClient, Client, LmserveError
from lmserve.api_client import get_model_list
from lmserve.client import Frames
from lmserve.keys import Keyring
from tiny_engine import formula_engine

from wire import wait_until


@pytest.fixture
def client(real: Running) -> Iterator[Client]:
    with Client(real.url, timeout=60) as client:
        yield client


def test_a_conversation(client: Client) -> None:
    first = client.generate("One", session_id=8001, start=True, max_tokens=9, seed=3, ignore_eos=True)
    assert (first.tokens, first.finish_reason) == (9, "length")
    second = client.generate("Two", session_id=8001, max_tokens=4, ignore_eos=True)
    assert second.usage.history_tokens == first.usage.prompt_tokens + 9
    assert client.session(8001).turns == 2
    assert 8001 in [session.id for session in client.sessions(limit=1000, after=8000).data]
    turns = client.transcript(8001, token_ids=True).turns
    assert len(turns) == 2
    assert "One" in turns[0].input
    assert len(turns[0].output_ids) == 9
    assert client.fork(8001, 8002, turns=1).turns == 1
    assert client.rewind(8001, 1).tokens == client.session(8002).tokens
    assert client.append(8002, "Three").usage.completion_tokens == 0
    assert client.append(8003, [{"role": "user", "content": "Hi"}], create=True).id == 8003
    assert not client.cancel(8001).cancelled
    for session_id in (8001, 8002, 8003):
        assert client.delete(session_id).deleted
    with pytest.raises(LmserveError) as gone:
        client.session(8001)
    assert (gone.value.status, gone.value.code) == (404, "session_not_found")


def test_a_stream_is_the_whole_text(client: Client) -> None:
    options = {"max_tokens": 40, "seed": 4, "temperature": 0.5, "stop": ["never said"]}
    frames = list(client.stream("Hello", **options))
    whole = client.generate("Hello", **options)
    assert "".join(frame.text for frame in frames) == whole.text
    assert (frames[-1].tokens, frames[-1].finish_reason) == (whole.tokens, whole.finish_reason)
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert client.generate(conversation, max_tokens=2).tokens <= 2


def test_to_stop_reading_is_to_leave(real: Running, client: Client) -> None:
    stream = client.stream("Hello", session_id=8004, start=True, max_tokens=3500, ignore_eos=True)
    assert next(stream).tokens >= 1
    stream.close()
    wait_until(lambda: real.core.stats()["open_requests"] == 0, "nothing runs any more")
    with pytest.raises(LmserveError):
        client.session(8004)


def test_cancel(real: Running, client: Client) -> None:
    replies = []

    def run() -> None:
        with Client(real.url) as other:
            replies.append(other.generate("Hi", session_id=8005, start=True, max_tokens=3500, ignore_eos=True))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: real.core.stats()["running"] > 0, "the turn runs")
    assert client.cancel(8005).cancelled
    thread.join(30)
    assert replies[0].finish_reason == "abort"
    client.delete(8005)


def test_refusals(real: Running, scripted: Running, client: Client) -> None:
    with pytest.raises(LmserveError) as bad:
        client.generate("Hello", temperature=9)
    assert (bad.value.status, bad.value.error["param"]) == (400, "temperature")
    with pytest.raises(LmserveError) as missing:
        list(client.stream("Hello", session_id=8006))
    assert missing.value.code == "session_not_found"
    with Client(scripted.url) as other:
        with pytest.raises(LmserveError) as full:
            other.generate("[[refuse 429 queue_full]]")
        assert (full.value.status, full.value.retry_after) == (429, 3)
        frames = other.stream("[[fail late]]")
        assert [next(frames).tokens for _ in range(3)] == [1, 2, 3]
        with pytest.raises(LmserveError, match="failed as asked"):
            next(frames)
    with Client(f"{real.url}/elsewhere") as lost, pytest.raises(LmserveError) as nothing:
        lost.models()
    assert nothing.value.status == 404


def test_frames_before_a_failure_are_not_lost() -> None:
    """However the stream is cut into pieces."""
    said = b'{"text": "a", "tokens": 1, "finish_reason": null}\0'
    failed = (
        b'{"text": "", "tokens": 1, "finish_reason": "error", "error": {"message": "m", "type": "t", "param": null, '
    )
    failed += b'"code": "c"}}\0'
    for cut in range(len(said + failed) + 1):
        pieces = ((said + failed)[:cut], (said + failed)[cut:])
        frames, texts = Frames(), []
        with pytest.raises(LmserveError, match="m"):
            texts.extend(frame.text for piece in pieces for frame in frames.push(piece))
        assert texts == ["a"]


def test_a_server_that_is_another() -> None:
    with Client("http://127.0.0.1:9", timeout=5) as client, pytest.raises(Exception, match=r"[Cc]onnect"):
        client.models()


def test_the_key() -> None:
    with serve_core(formula_engine(), keys=Keyring.of("secret")) as running:
        with Client(running.url, api_key="secret") as client:
            assert [card.id for card in client.models().data] == NAMES
        with Client(running.url) as client, pytest.raises(LmserveError) as refused:
            client.models()
        assert refused.value.status == 401
        assert APIClient(running.url, api_key="secret").available_models == NAMES


def test_asyncio(real: Running) -> None:
    async def run() -> None:
        async with AsyncClient(real.url, timeout=60) as client:
            assert [card.id for card in (await client.models()).data] == NAMES
            options = {"session_id": 8010, "max_tokens": 20, "seed": 3, "ignore_eos": True}
            frames = [frame async for frame in client.stream("One", start=True, **options)]
            whole = await client.generate("One", max_tokens=20, seed=3, ignore_eos=True)
            assert "".join(frame.text for frame in frames) == whole.text
            assert (await client.generate("Two", **options)).usage.history_tokens > 20
            assert (await client.session(8010)).turns == 2
            assert len((await client.transcript(8010)).turns) == 2
            assert (await client.fork(8010, 8011, turns=1)).id == 8011
            assert (await client.rewind(8010, 1)).turns == 1
            assert (await client.append(8010, "Three")).usage.completion_tokens == 0
            assert not (await client.cancel(8010)).cancelled
            assert [s.id for s in (await client.sessions(after=8009, limit=2)).data] == [8010, 8011]
            for session_id in (8010, 8011):
                await client.delete(session_id)
            with pytest.raises(LmserveError) as missing:
                _ = [frame async for frame in client.stream("Hello", session_id=8010)]
            assert missing.value.status == 404
            with pytest.raises(LmserveError):
                await client.session(8010)

    asyncio.run(run())


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_frames_come_in_pieces_of_any_size(size: int) -> None:
    body = "".join(f'{{"text": "é{n}", "tokens": {n}, "finish_reason": null}}\0' for n in range(9)).encode()
    frames = Frames()
    found = [frame for at in range(0, len(body), size) for frame in frames.push(body[at : at + size])]
    assert [(frame.text, frame.tokens) for frame in found] == [(f"é{n}", n) for n in range(9)]


def test_importing_lmserve_does_not_import_httpx() -> None:
    script = "import sys, lmserve; print('httpx' in sys.modules); lmserve.Client; print('httpx' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="Clint"):
        _ = lmserve.Clint


class TestLMDeploysClient:
    """What scripts written for LMDeploy's APIClient do."""

    @pytest.fixture
    def api(self, real: Running) -> APIClient:
        return APIClient(real.url)

    def test_models(self, api: APIClient, real: Running) -> None:
        assert api.available_models == get_model_list(f"{real.url}/v1/models") == NAMES

    def test_chat_completions(self, api: APIClient) -> None:
        model = api.available_models[0]
        messages = [{"role": "user", "content": "Say this is a test!"}]
        (whole,) = api.chat_completions_v1(model=model, messages=messages, max_tokens=20, seed=3)
        chunks = list(api.chat_completions_v1(model=model, messages=messages, max_tokens=20, seed=3, stream=True))
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == whole["choices"][0]["message"]["content"]
        (plain,) = api.chat_completions_v1(model, "Say this is a test!", 0.7, 1.0, 1, 20, seed=3)
        assert plain["choices"][0]["message"]["content"] == text

    def test_completions(self, api: APIClient) -> None:
        (whole,) = api.completions_v1(model=MODEL, prompt="Hi", max_tokens=20, seed=3, ignore_eos=True)
        chunks = list(api.completions_v1(model=MODEL, prompt="Hi", max_tokens=20, seed=3, ignore_eos=True, stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]

    def test_interactive_sessions(self, api: APIClient) -> None:
        lines = list(api.chat("Hi, pls intro yourself", session_id=8020, request_output_len=20, stream=True))
        assert lines[-1][1] > 0
        (reply,) = api.chat_interactive_v1(
            prompt="And then?", session_id=8020, interactive_mode=True, request_output_len=5
        )
        assert reply["history_tokens"] > 20
        api.end_session(8020)
        (reply,) = api.chat_interactive_v1("Anew", session_id=8020, request_output_len=5)
        assert reply["history_tokens"] == 0
        with pytest.raises(ValueError, match="-1"):
            next(api.chat("Hi", session_id=-1))

    def test_encode_and_embeddings(self, real: Running, api: APIClient) -> None:
        ids, length = api.encode("Hi")
        assert (ids, length) == ([72, 105], 2)
        assert api.encode(["Hi", "x"]) == ([[72, 105], [120]], [2, 1])
        assert api.embeddings_v1(MODEL, ["Hi", "x"])["data"][1]["index"] == 1

    def test_errors_are_raised(self, api: APIClient) -> None:
        with pytest.raises(LmserveError, match="gpt-x"):
            list(api.completions_v1(model="gpt-x", prompt="Hi"))
