"""`lmserve serve --lora`: `model` chooses an adapter, and caches, sessions and lanes keep adapters apart."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import byte_models
import httpx
import pytest
import tiny_adapters
import transformers
from lmserve.cli import main
from lmserve.engine.llm import LLM
from lmserve.engine.submission import SamplingParams, StopParams
from server_process import ServerProcess, children, serving

PROMPT = "The quick brown fox jumps over the lazy dog and "
COUNT = 8
SETTINGS = ("--quantize", "none", "--max-batch", "32", "--threads", "1", "--served-model-name", "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, adapters of it, and the models that these make of it."""
    folder = tmp_path_factory.mktemp("adapters")
    config = transformers.LlamaConfig(**byte_models.SHAPE, num_hidden_layers=2)
    path = byte_models.save(config, folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    modules = tiny_adapters.changeable(model, path)
    for number in range(1, COUNT + 1):
        own = folder / f"a{number}"
        merged = tiny_adapters.write(own, model, modules[number % 2 :], seed=number, alpha=20)
        if number <= 2:
            merged.save_pretrained(folder / f"merged{number}")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / f"merged{number}" / name).write_bytes((path / name).read_bytes())
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    loras = [f"--lora=a{number}={folder / f'a{number}'}" for number in range(1, COUNT + 1)]
    return [str(folder / "model"), *SETTINGS, *loras, *more]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with serving(folder, *arguments(folder)) as server:
        yield server


@pytest.fixture
def web(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def completed(web: httpx.Client, model: str, prompt: str = PROMPT, **changes: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    reply = web.post("/v1/completions", json=body | {"return_token_ids": True} | changes)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def ids(reply: dict[str, Any]) -> list[int]:
    return list(reply["choices"][0]["token_ids"])


def cached(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_model_chooses_and_equals_merged_weights(web: httpx.Client, folder: Path) -> None:
    expected = []
    for name in ("model", "merged1", "merged2"):
        with LLM(folder / name, quantize="none", threads=1) as llm:
            answer = llm.generate(PROMPT, SamplingParams(temperature=0), StopParams(max_tokens=16, ignore_eos=True))
            expected.append(list(answer[0].token_ids))
    given = [completed(web, name) for name in ("tiny", "a1", "a2")]
    assert [ids(reply) for reply in given] == expected
    assert expected[0] != expected[1] != expected[2] != expected[0]
    assert [reply["model"] for reply in given] == ["tiny", "a1", "a2"]


def test_models_are_listed_with_their_parent(web: httpx.Client) -> None:
    listed = web.get("/v1/models").json()["data"]
    found = {card["id"]: (card["root"], card["parent"]) for card in listed}
    assert found == {"tiny": ("tiny", None)} | {f"a{number}": ("tiny", "tiny") for number in range(1, COUNT + 1)}
    assert web.get("/v1/models/a3").json()["parent"] == "tiny"
    reply = web.post("/v1/completions", json={"model": "a9", "prompt": "x"})
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["message"]) == (
        "model_not_found",
        "the model 'a9' is not served; the served models are: tiny, a1, a2, a3, a4, a5, a6, a7, a8",
    )


def test_no_prefix_is_shared_between_adapters(web: httpx.Client) -> None:
    prompt = "A prompt of its own, which takes several blocks of the cache. " * 2
    first = [cached(completed(web, model, prompt)) for model in ("tiny", "a1", "a2")]
    again = [cached(completed(web, model, prompt)) for model in ("tiny", "a1", "a2")]
    assert first == [0, 0, 0]
    assert min(again) > 64


def test_8_adapters_in_one_batch_of_32_answer_as_each_alone(web: httpx.Client) -> None:
    asked = [(f"a{at % COUNT + 1}", f"Request {at}: {'x' * at}") for at in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda each: ids(completed(web, *each, max_tokens=40)), asked))
    alone = [ids(completed(web, *each, max_tokens=40)) for each in asked]
    assert together == alone


def turn(web: httpx.Client, session: int | str, model: str | None, **changes: Any) -> httpx.Response:
    body = {"prompt": "And now?", "instance_id": session, "sequence_start": False, "temperature": 0, "model": model}
    return web.post("/generate", json=body | {"request_output_len": 8, "ignore_eos": True} | changes)


def test_a_session_goes_on_with_its_own_adapter_alone(web: httpx.Client) -> None:
    assert turn(web, 1, "a1", sequence_start=True).status_code == 200
    for other in ("a2",):
        reply = turn(web, 1, other)
        assert reply.status_code == 409
        error = reply.json()["error"]
        assert error["code"] == "session_adapter_mismatch"
        assert "were computed with the adapter a1, but this turn asks for the adapter a2" in error["message"]
    history = web.get("/v1/sessions/1").json()["tokens"]
    # Without an adapter's name the session's own computes the turn.
    for model in ("a1", None, "tiny"):
        reply = turn(web, 1, model).json()
        assert reply["usage"]["cached_tokens"] >= history - 1
    chat = {"messages": [{"role": "user", "content": "x"}], "session_id": 1, "max_tokens": 4}
    reply = web.post("/v1/chat/completions", json={"model": "tiny", **chat})
    assert reply.status_code == 409
    assert "asks for no adapter" in reply.json()["error"]["message"]
    assert web.post("/v1/chat/completions", json={"model": "a1", **chat}).status_code == 200
    # A session that begins anew may have another one.
    assert turn(web, 1, "a2", sequence_start=True).status_code == 200
    assert turn(web, 1, "a1").status_code == 409


def test_a_turn_of_the_sessions_route_names_an_adapter(web: httpx.Client) -> None:
    body = {"prompt": "Hello", "max_tokens": 4, "create": True, "model": "a3"}
    assert web.post("/v1/sessions/turned/turns", json=body).status_code == 200
    assert web.post("/v1/sessions/turned/turns", json=body | {"model": None}).status_code == 200
    reply = web.post("/v1/sessions/turned/turns", json=body | {"model": "a4"})
    assert reply.json()["error"]["code"] == "session_adapter_mismatch"


def test_a_fork_and_an_export_keep_the_adapter(web: httpx.Client) -> None:
    assert turn(web, "kept", "a1", sequence_start=True).status_code == 200
    assert turn(web, "plain", "tiny", sequence_start=True).status_code == 200
    exported = web.get("/v1/sessions/kept/export").json()
    plain = web.get("/v1/sessions/plain/export").json()
    assert exported["fingerprint"] != plain["fingerprint"]
    assert exported["model"] == "a1"
    reply = web.post("/v1/sessions/import?session_id=again", json=exported)
    assert reply.status_code == 200, reply.text
    assert turn(web, "again", "a2").status_code == 409
    assert turn(web, "again", "a1").status_code == 200
    assert web.post("/v1/sessions/kept/fork", json={"session_id": "forked"}).status_code in (200, 201)
    assert turn(web, "forked", "a2").status_code == 409


def test_a_lane_is_of_one_adapter(web: httpx.Client) -> None:
    def asked(model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
        body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
        reply = web.post("/v1/chat/completions", json=body, headers={"x-session-id": "lane"})
        return dict(reply.json())

    messages = [{"role": "user", "content": "A question that fills some blocks of the cache, and a few more."}]
    answer = asked("a1", messages)["choices"][0]["message"]
    messages += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "Go on."}]
    other = asked("a2", messages)
    assert cached(other) == 0
    assert cached(asked("a1", messages)) > 64


def test_embeddings_of_an_adapter_are_refused(web: httpx.Client) -> None:
    reply = web.post("/v1/embeddings", json={"model": "a1", "input": "x"})
    assert reply.status_code == 400
    assert "a1 is an adapter, which generates text only" in reply.json()["error"]["message"]


def test_a_session_survives_a_restart_with_its_adapter(folder: Path, tmp_path: Path) -> None:
    kept = ("--session-dir", str(tmp_path / "sessions"))
    with (
        serving(tmp_path, *arguments(folder, *kept)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        assert turn(client, 5, "a1", sequence_start=True).status_code == 200
    # The name may be another one, and the order too.
    renamed = ("--lora", f"other={folder / 'a2'}", "--lora", f"sql={folder / 'a1'}")
    with (
        serving(tmp_path, str(folder / "model"), *SETTINGS, *kept, *renamed) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        assert turn(client, 5, "other").json()["error"]["code"] == "session_adapter_mismatch"
        assert turn(client, 5, "sql").status_code == 200
    with (
        serving(tmp_path, str(folder / "model"), *SETTINGS, *kept) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        error = turn(client, 5, None).json()["error"]
        assert error["code"] == "session_adapter_mismatch"
        assert "were computed with an adapter that is not loaded; load it" in error["message"]


@pytest.fixture(scope="module")
def changing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server that loads adapters on request, at most three at a time."""
    arguments = (str(folder / "model"), *SETTINGS, "--lora-dir", str(folder), "--max-loras", "3")
    given = ("--lora", f"first={folder / 'a1'}")
    with (
        serving(tmp_path_factory.mktemp("changing"), *arguments, *given) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def load(web: httpx.Client, name: str, path: str) -> httpx.Response:
    return web.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def unload(web: httpx.Client, name: str) -> httpx.Response:
    return web.post("/v1/unload_lora_adapter", json={"lora_name": name})


def code_of(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_adapters_are_loaded_and_unloaded_while_the_server_runs(
    web: httpx.Client, changing: httpx.Client, folder: Path
) -> None:
    assert code_of(changing.post("/v1/completions", json={"model": "new", "prompt": "x"})) == (404, "model_not_found")
    reply = load(changing, "new", "a2")
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert ids(completed(changing, "new")) == ids(completed(web, "a2"))
    assert [card["id"] for card in changing.get("/v1/models").json()["data"]] == ["tiny", "first", "new"]
    assert code_of(load(changing, "new", "a3")) == (409, "adapter_exists")
    assert code_of(load(changing, "tiny", "a3")) == (409, "adapter_exists")
    assert code_of(load(changing, "other", str(folder / "a2"))) == (400, "invalid_adapter")
    assert load(changing, "third", str(folder / "a3")).status_code == 200
    assert code_of(load(changing, "fourth", "a4")) == (409, "too_many_adapters")
    for name in ("new", "third"):
        reply = unload(changing, name)
        assert (reply.status_code, reply.text) == (200, f"Success: LoRA adapter '{name}' removed successfully.")
        assert code_of(unload(changing, name)) == (404, "model_not_found")
    assert code_of(changing.post("/v1/completions", json={"model": "new", "prompt": "x"})) == (404, "model_not_found")
    assert ids(completed(changing, "first")) == ids(completed(web, "a1"))


def test_an_adapter_stays_until_its_requests_have_ended(changing: httpx.Client) -> None:
    assert load(changing, "busy", "a5").status_code == 200
    body = {"model": "busy", "prompt": "x", "max_tokens": 3000, "ignore_eos": True, "n": 4}
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(changing.post, "/v1/completions", json=body) for _ in range(4)]
        with changing.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            next(stream.iter_lines())
            assert code_of(unload(changing, "busy")) == (409, "adapter_in_use")
        assert [reply.result().status_code for reply in asked] == [200] * 4
    deadline = time.monotonic() + 30
    while unload(changing, "busy").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_session_of_an_unloaded_adapter_waits_for_it(changing: httpx.Client) -> None:
    assert load(changing, "mine", "a6").status_code == 200
    assert turn(changing, 1, "mine", sequence_start=True).status_code == 200
    assert unload(changing, "mine").status_code == 200
    assert load(changing, "another", "a7").status_code == 200
    for model in ("another", None):
        reply = turn(changing, 1, model)
        assert code_of(reply) == (409, "session_adapter_mismatch")
        assert "an adapter that is not loaded" in reply.json()["error"]["message"]
    assert code_of(changing.get("/v1/sessions/1/export")) == (409, "session_adapter_mismatch")
    history = changing.get("/v1/sessions/1").json()["tokens"]
    assert load(changing, "again", "a6").status_code == 200
    # What it had computed is still there.
    assert turn(changing, 1, None).json()["usage"]["cached_tokens"] >= history - 1
    assert [unload(changing, name).status_code for name in ("another", "again")] == [200, 200]


def test_only_adapters_of_the_folder_are_loaded(web: httpx.Client, changing: httpx.Client, folder: Path) -> None:
    for path in ("..", ".", "/etc", str(folder), "a1/../../x", "x\0y"):
        reply = load(changing, "x", path)
        assert code_of(reply) == (400, "invalid_value"), path
        assert reply.json()["error"]["param"] == "lora_path"
    for path, said in (("nothing", "it has no adapter_config.json"), ("model", "it has no adapter_config.json")):
        reply = load(changing, "x", path)
        assert code_of(reply) == (400, "invalid_adapter")
        assert said in reply.json()["error"]["message"]
    assert code_of(load(web, "x", "a1")) == (403, "adapter_updates_off")
    assert code_of(unload(web, "a1")) == (403, "adapter_updates_off")


@pytest.mark.parametrize("settings", [("--worker", "process"), ("--tensor-parallel", "2")])
def test_adapters_are_the_same_in_worker_processes_and_after_their_death(
    web: httpx.Client, folder: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    named = ["--lora", f"first={folder / 'a1'}", "--lora-dir", str(folder)]
    own = [*SETTINGS[2:], *named] if "process" not in settings else [*SETTINGS, *named]
    with (
        serving(tmp_path, str(folder / "model"), *own, *settings) as server,
        httpx.Client(base_url=server.url, timeout=60) as other,
    ):
        assert load(other, "second", "a2").status_code == 200
        for _ in range(2):
            given = [ids(completed(other, name)) for name in ("tiny", "first", "second")]
            assert given == [ids(completed(web, name)) for name in ("tiny", "a1", "a2")]
            before = children(server)
            os.kill(before[-1], signal.SIGKILL)
            deadline = time.monotonic() + 180
            while not children(server) or set(children(server)) & set(before) or other.get("/health").is_error:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert unload(other, "second").status_code == 200
        assert code_of(other.post("/v1/completions", json={"model": "second", "prompt": "x"})) == (
            404,
            "model_not_found",
        )


def test_a_recording_with_adapters_is_run_again(
    web: httpx.Client, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = tmp_path / "adapters"
    for name in ("a1", "a2", "a3"):
        shutil.copytree(folder / name, adapters / name)
    steps = tmp_path / "steps"
    arguments = (str(folder / "model"), *SETTINGS, "--lora", f"first={adapters / 'a1'}", "--lora-dir", str(adapters))
    with (
        serving(tmp_path, *arguments, "--record", str(steps), "--kv-memory", "16MiB") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        expected = [ids(completed(web, name)) for name in ("tiny", "a1", "a2", "a3")]
        assert load(client, "second", "a2").status_code == 200
        given = [ids(completed(client, name)) for name in ("tiny", "first", "second")]
        assert unload(client, "second").status_code == 200
        assert load(client, "second", "a3").status_code == 200
        assert [*given, ids(completed(client, "second"))] == expected
    assert main(["replay", str(steps)]) == 0
    counted = re.fullmatch(r"\d+ steps: (\d+) of (\d+) tokens are the same\n", capsys.readouterr().out)
    assert counted
    assert counted[1] == counted[2]
    assert int(counted[1]) >= 4 * 16
    # Another adapter in the place of the recorded one.
    shutil.copytree(folder / "a5", adapters / "a2", dirs_exist_ok=True)
    assert main(["replay", str(steps)]) == 1
    assert f"{adapters / 'a2'} is not the adapter that was recorded" in capsys.readouterr().err
