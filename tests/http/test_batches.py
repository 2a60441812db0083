"""/v1/files and /v1/batches over the real core, by the `openai` SDK and by hand."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import MODEL, Running, serve_core
from lmserve.api.batches import runner
from lmserve.api.state import files
from lmserve.api.state.batches import Batches, read_lines
from lmserve.api.state.batches import Running as RunningBatch
from lmserve.api.state.database import Database
from lmserve.errors import LmserveError
from lmserve.keys import Keyring
from lmserve.schemas.batches import CreateBatch
from test_responses import validate
from tiny_engine import formula_engine

from wire import error_of, wait_until

FILES, BATCHES, CHAT = "/v1/files", "/v1/batches", "/v1/chat/completions"


@pytest.fixture
def client(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "seed": 5, "ignore_eos": True, **fields}


def line(name: str, body: dict[str, Any], url: str = CHAT) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def uploaded(client: httpx.Client, content: bytes) -> str:
    response = client.post(FILES, files={"file": ("in.jsonl", content)}, data={"purpose": "batch"})
    assert response.status_code == 200, response.text
    validate(client, "FileReply", response.json())
    return response.json()["id"]


def begun(client: httpx.Client, *lines: Any, endpoint: str = CHAT, **fields: Any) -> dict[str, Any]:
    body = {"input_file_id": uploaded(client, jsonl(*lines)), "endpoint": endpoint, "completion_window": "24h"}
    response = client.post(BATCHES, json=body | fields)
    assert response.status_code == 200, response.text
    validate(client, "BatchReply", response.json())
    return response.json()


def ended(client: httpx.Client, batch: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    def get() -> dict[str, Any]:
        reply = client.get(f"{BATCHES}/{batch['id']}").json()
        validate(client, "BatchReply", reply)
        return reply

    wait_until(lambda: get()["status"] not in ("in_progress", "cancelling"), "the batch ends", 60)
    assert get()["status"] == status
    return get()


def lines_of(client: httpx.Client, file_id: str | None) -> dict[str, Any]:
    """The lines of a file by their custom ids, each there once."""
    if file_id is None:
        return {}
    response = client.get(f"{FILES}/{file_id}/content")
    assert response.status_code == 200
    assert client.get(f"{FILES}/{file_id}").json()["bytes"] == len(response.content)
    lines = [json.loads(text) for text in response.content.splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines)
    return found


def test_the_sdk_runs_a_batch(real: Running, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(jsonl(line("a", chat("One", model=MODEL)), line("b", chat("Two", model="nobody"))))
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0, timeout=60) as sdk:
        file = sdk.files.create(file=path, purpose="batch")
        assert (file.filename, file.bytes, file.purpose) == ("questions.jsonl", path.stat().st_size, "batch")
        assert sdk.files.content(file.id).content == path.read_bytes()
        batch = sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"})
        assert batch.metadata == {"a": "b"}
        wait_until(lambda: sdk.batches.retrieve(batch.id).status == "completed", "the batch ends")
        batch = sdk.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed, batch.request_counts.total) == (1, 1, 2)
        assert batch.id in [each.id for each in sdk.batches.list(limit=5)]
        assert batch.output_file_id is not None
        (answer,) = [json.loads(text) for text in sdk.files.content(batch.output_file_id).text.splitlines()]
        assert answer["custom_id"] == "a"
        assert answer["response"]["status_code"] == 200
        assert answer["error"] is None
        plain = httpx.post(f"{real.url}{CHAT}", json=chat("One")).json()
        assert answer["response"]["body"]["choices"] == plain["choices"]
        assert batch.error_file_id is not None
        (refused,) = [json.loads(text) for text in sdk.files.content(batch.error_file_id).text.splitlines()]
        assert refused["custom_id"] == "b"
        assert refused["response"]["status_code"] == 404
        assert refused["response"]["body"]["error"]["code"] == "model_not_found"
        assert file.id in [each.id for each in sdk.files.list(purpose="batch")]
        assert sdk.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            sdk.files.retrieve(file.id)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "One", "max_tokens": 3}),
        ("/v1/responses", {"input": "One", "max_output_tokens": 3}),
        ("/v1/embeddings", {"input": "One"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "One"}], "max_tokens": 3}),
    ],
)
def test_every_endpoint(client: httpx.Client, endpoint: str, body: dict[str, Any]) -> None:
    batch = ended(client, begun(client, line("a", body, endpoint), endpoint=endpoint))
    assert lines_of(client, batch["output_file_id"])["a"]["response"]["status_code"] == 200
    assert batch["error_file_id"] is None


def test_many_lines_run_behind_other_requests(real: Running, client: httpx.Client) -> None:
    batch = begun(client, *(line(str(at), chat(f"Line {at}", max_tokens=200)) for at in range(60)))
    answered = 0
    while client.get(f"{BATCHES}/{batch['id']}").json()["status"] == "in_progress":
        assert client.post(CHAT, json=chat("Now")).status_code == 200
        answered += 1
    assert answered > 0
    batch = ended(client, batch)
    assert batch["request_counts"] == {"completed": 60, "failed": 0, "total": 60}
    assert set(lines_of(client, batch["output_file_id"])) == {str(at) for at in range(60)}


def test_a_line_has_the_least_priority(scripted: Running) -> None:
    with httpx.Client(base_url=scripted.url, timeout=60) as client:
        ended(client, begun(client, line("a", chat("Of a batch"))))
        client.post(CHAT, json=chat("Of a client")).raise_for_status()
    priorities = {
        each["input"]["messages"][0]["content"]: each.get("priority", 0)
        for each in scripted.core.submitted
        if each.get("input", {}).get("type") == "messages"
    }
    assert priorities["Of a batch"] == 2**31 - 1
    assert priorities["Of a client"] == 0


def test_a_full_queue_is_waited_for(scripted: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted.core, "max_queue", 0)
    with httpx.Client(base_url=scripted.url, timeout=60) as client:
        batch = begun(client, line("a", chat("Wait for me")))
        wait_until(
            lambda: sum("Wait for me" in json.dumps(each) for each in scripted.core.submitted) > 1, "it is tried again"
        )
        assert client.get(f"{BATCHES}/{batch['id']}").json()["status"] == "in_progress"
        monkeypatch.setattr(scripted.core, "max_queue", 1024)
        batch = ended(client, batch)
        assert batch["request_counts"] == {"completed": 1, "failed": 0, "total": 1}


@pytest.mark.parametrize(
    ("content", "code", "at", "param"),
    [
        (b"", "empty_file", None, None),
        (b"\n \n", "empty_file", None, None),
        (b"no json\n", "invalid_json_line", 1, None),
        (jsonl(line("a", {})) + b"[]\n", "invalid_json_line", 2, None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", 1, None),
        (jsonl({**line("a", {}), "method": "GET"}), "invalid_json_line", 1, None),
        (jsonl(line("a", {}), line("a", {})), "duplicate_custom_id", 2, "custom_id"),
        (jsonl(line("a", {}, "/v1/completions")), "mismatched_url", 1, "url"),
        (jsonl(line("a", {"stream": True})), "invalid_request", 1, "body.stream"),
    ],
)
def test_an_input_that_is_wrong(client: httpx.Client, content: bytes, code: str, at: int | None, param: str) -> None:
    body = {"input_file_id": uploaded(client, content), "endpoint": CHAT, "completion_window": "24h"}
    batch = client.post(BATCHES, json=body).json()
    validate(client, "BatchReply", batch)
    assert batch["status"] == "failed"
    (error,) = batch["errors"]["data"]
    assert (error["code"], error["line"], error["param"]) == (code, at, param)
    assert error["message"]
    error_of(client.post(f"{BATCHES}/{batch['id']}/cancel"), 400, "batch_ended", "batch_id")


def test_limits_of_a_batch(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmserve.api.state.batches.MAX_LINES", 2)
    batch = begun(client, *(line(name, {}) for name in "abc"))
    assert batch["errors"]["data"][0]["code"] == "too_many_lines"
    monkeypatch.setattr("lmserve.api.state.batches.MAX_RUNNING", 0)
    body = {"input_file_id": uploaded(client, b""), "endpoint": CHAT, "completion_window": "24h"}
    error_of(client.post(BATCHES, json=body), 400, "too_many_batches")


def test_limits_of_files(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    form: dict[str, Any] = {"files": {"file": ("a", b"x" * 11)}, "data": {"purpose": "batch"}}
    monkeypatch.setattr("lmserve.api.state.files.MAX_BYTES", 10)
    error_of(client.post(FILES, **form), 400, "too_many_files", "file")
    monkeypatch.setattr("lmserve.api.state.files.MAX_FILES", 0)
    error_of(client.post(FILES, **form), 400, "too_many_files", "file")
    error_of(client.post(FILES, files={"file": ("a", b"x" * (2 << 20))}, data={"purpose": "batch"}), 413)


def test_old_batches_make_room(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ended(client, begun(client, line("a", chat("x"))))
    monkeypatch.setattr("lmserve.api.state.batches.MAX_BATCHES", 1)
    second = ended(client, begun(client, line("a", chat("x"))))
    error_of(client.get(f"{BATCHES}/{first['id']}"), 404, "batch_not_found", "batch_id")
    error_of(client.get(f"{FILES}/{first['output_file_id']}"), 404, "file_not_found", "file_id")
    assert client.get(BATCHES).json()["data"] == [second]


def test_uploads_that_are_wrong(client: httpx.Client) -> None:
    file = {"file": ("a", b"x")}
    error_of(client.post(FILES, files=file, data={"purpose": "vision"}), 400, param="purpose")
    error_of(client.post(FILES, files=file), 400, param="purpose")
    error_of(client.post(FILES, files={"other": ("a", b"x")}, data={"purpose": "batch"}), 400, param="file")
    error_of(client.post(FILES, json={}), 400, "invalid_content_type")
    error_of(client.post(FILES, content=b"x", headers={"content-type": "multipart/form-data; boundary=y"}), 400)
    error_of(client.post(FILES, content=b"x", headers={"content-type": "multipart/form-data"}), 400)


def test_requests_that_are_wrong(client: httpx.Client) -> None:
    good = {"input_file_id": uploaded(client, b""), "endpoint": CHAT, "completion_window": "24h"}
    for wrong, param in (
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"what": 1}, "what"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
    ):
        error_of(client.post(BATCHES, json=good | wrong), 400, param=param)
    error_of(client.post(BATCHES, json=good | {"input_file_id": "file-x"}), 404, "file_not_found", "input_file_id")
    output = ended(client, begun(client, line("a", chat("x"))))["output_file_id"]
    error_of(client.post(BATCHES, json=good | {"input_file_id": output}), 400, param="input_file_id")
    error_of(client.get(f"{BATCHES}/batch_x"), 404, "batch_not_found")
    error_of(client.post(f"{BATCHES}/batch_x/cancel"), 404, "batch_not_found")
    for path in ("", "/content"):
        error_of(client.get(f"{FILES}/file-x{path}"), 404, "file_not_found")
    error_of(client.get(FILES, params={"after": "x"}), 400, param="after")
    error_of(client.get(BATCHES, params={"after": "x"}), 400, param="after")


def test_pages(client: httpx.Client) -> None:
    batches = [begun(client, line("a", chat("x")))["id"] for _ in range(3)]
    page = client.get(BATCHES, params={"limit": 2}).json()
    validate(client, "BatchList", page)
    assert [each["id"] for each in page["data"]] == batches[:0:-1]
    assert page["has_more"]
    rest = client.get(BATCHES, params={"limit": 1, "after": page["last_id"]}).json()
    assert [each["id"] for each in rest["data"]] == batches[:1]
    files = [uploaded(client, b"x") for _ in range(3)]
    page = client.get(FILES, params={"limit": 2, "purpose": "batch"}).json()
    validate(client, "FileList", page)
    assert [each["id"] for each in page["data"]] == files[:0:-1]
    page = client.get(FILES, params={"limit": 1, "after": files[1], "order": "asc", "purpose": "batch"}).json()
    assert [each["id"] for each in page["data"]] == files[2:]


def test_a_cancelled_batch_keeps_its_answers(real: Running, client: httpx.Client) -> None:
    long = (line(str(at), chat(f"Line {at}", max_tokens=3000)) for at in range(40))
    batch = begun(client, line("a", chat("x")), *long)
    wait_until(
        lambda: client.get(f"{BATCHES}/{batch['id']}").json()["request_counts"]["completed"] > 0, "a line is answered"
    )
    cancelling = client.post(f"{BATCHES}/{batch['id']}/cancel").json()
    assert cancelling["status"] in ("cancelling", "cancelled")
    batch = ended(client, batch, "cancelled")
    assert client.post(f"{BATCHES}/{batch['id']}/cancel").json() == batch
    answers, errors = (lines_of(client, batch[f"{kind}_file_id"]) for kind in ("output", "error"))
    assert "a" in answers
    assert not answers.keys() & errors.keys()
    assert len(answers) + len(errors) == 41
    assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
    wait_until(lambda: real.core.stats()["open_requests"] == 0, "nothing runs any more")
    # All slots are free again.
    assert ended(client, begun(client, *(line(str(at), chat("x")) for at in range(runner.AT_ONCE + 1))))


def test_a_batch_whose_time_is_over(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmserve.api.state.batches.WINDOW", 0)
    batch = ended(client, begun(client, line("a", chat("x"))), "expired")
    assert lines_of(client, batch["error_file_id"])["a"]["error"]["code"] == "batch_expired"
    assert batch["expired_at"] is not None


def test_keys_do_not_share_files_or_batches() -> None:
    with serve_core(formula_engine(), keys=Keyring.of("a", "b")) as running:
        a, b = (httpx.Client(base_url=running.url, headers={"x-api-key": key}, timeout=60) for key in "ab")
        with a, b:
            batch = ended(a, begun(a, line("a", chat("x", session_id=7))))
            for path in (batch["input_file_id"], batch["output_file_id"]):
                error_of(b.get(f"{FILES}/{path}"), 404, "file_not_found")
                error_of(b.get(f"{FILES}/{path}/content"), 404, "file_not_found")
                error_of(b.delete(f"{FILES}/{path}"), 404, "file_not_found")
            error_of(b.get(f"{BATCHES}/{batch['id']}"), 404, "batch_not_found")
            error_of(b.post(f"{BATCHES}/{batch['id']}/cancel"), 404, "batch_not_found")
            body = {"input_file_id": batch["input_file_id"], "endpoint": CHAT, "completion_window": "24h"}
            error_of(b.post(BATCHES, json=body), 404, "file_not_found")
            assert b.get(FILES).json()["data"] == b.get(BATCHES).json()["data"] == []
            # A line is its key's request.
            assert a.get("/v1/sessions/7").status_code == 200
            error_of(b.get("/v1/sessions/7"), 404)


def test_a_batch_goes_on_after_a_restart(tmp_path: Path) -> None:
    lines = [line(str(at), chat(f"Line {at}", max_tokens=100)) for at in range(40)]
    batch: dict[str, Any] | None = None
    starts = 0
    while batch is None or batch["status"] == "in_progress":
        starts += 1
        assert starts < 50
        with (
            serve_core(formula_engine(pause=0.001), database=Database(tmp_path, {0: bytes(32)})) as running,
            httpx.Client(base_url=running.url, timeout=60) as client,
        ):
            batch = batch or begun(client, *lines)
            before = client.get(f"{BATCHES}/{batch['id']}").json()["request_counts"]["completed"]
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                batch = client.get(f"{BATCHES}/{batch['id']}").json()
                if batch["status"] == "completed" or batch["request_counts"]["completed"] > before:
                    break
            if batch["status"] == "completed":
                assert len(lines_of(client, batch["output_file_id"])) == 40
    assert starts > 1


def test_lines_of_one_session_wait_for_one_another(real: Running, client: httpx.Client) -> None:
    turns = [line(str(at), chat(f"Turn {at}", session_id="batched", max_tokens=40)) for at in range(3)]
    batch = ended(client, begun(client, *turns))
    assert batch["request_counts"] == {"completed": 3, "failed": 0, "total": 3}
    assert client.get("/v1/sessions/batched").json()["turns"] == 3
    # What is no matter of time is an answer.
    long = ended(client, begun(client, line("a", chat("x", session_id="batched", max_tokens=5000))))
    assert lines_of(client, long["error_file_id"])["a"]["response"]["status_code"] == 400
    assert real.core.end_session(0, "batched")


def test_a_full_disk_loses_no_answer_and_asks_for_none_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LAST_PAUSE", 0.05)
    database = Database(tmp_path, {0: bytes(32)})
    core = formula_engine(pause=0.001)

    async def limit(pages: int) -> None:
        await database.run(lambda db: db.execute(f"PRAGMA max_page_count = {pages}"))

    lines = [line(str(at), chat(f"Line {at}", max_tokens=100)) for at in range(40)]
    with (
        serve_core(core, database=database) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        batch = begun(client, *lines)
        # It may not grow beyond what it has.
        asyncio.run_coroutine_threadsafe(limit(1), running.loop).result(10)
        wait_until(lambda: client.get("/health").json()["status"] == "degraded", "the disk is full", 60)
        wait_until(lambda: core.stats()["open_requests"] == 0, "each line that ran waits for the disk", 60)
        stuck = client.get(f"{BATCHES}/{batch['id']}").json()
        assert stuck["status"] == "in_progress"
        assert stuck["request_counts"]["completed"] < 40
        # That it can be read mends nothing.
        assert client.get("/health").json()["status"] == "degraded"
        assert client.post(CHAT, json=chat("Now")).status_code == 200
        asyncio.run_coroutine_threadsafe(limit(100_000), running.loop).result(10)
        batch = ended(client, batch)
        assert batch["request_counts"] == {"completed": 40, "failed": 0, "total": 40}
        assert set(lines_of(client, batch["output_file_id"])) == {str(at) for at in range(40)}
        assert client.get("/health").json()["status"] == "ok"
        # 40 lines and the one that was asked meanwhile.
        assert core.stats()["sampled_tokens"] == 40 * 100 + 8


def test_a_batch_goes_on_without_its_input_file(client: httpx.Client) -> None:
    batch = begun(client, *(line(str(at), chat(f"Line {at}", max_tokens=20)) for at in range(20)))
    assert client.delete(f"{FILES}/{batch['input_file_id']}").status_code == 200
    batch = ended(client, batch)
    assert batch["request_counts"] == {"completed": 20, "failed": 0, "total": 20}


async def batch_of_two() -> tuple[Batches, files.Files, RunningBatch]:
    """One that has ended, each of its lines answered."""
    database = Database(None, {0: bytes(32)})
    batches, kept = Batches(database), files.Files(database)
    content = jsonl(line("a", chat("x")), line("b", chat("y")))
    file = await kept.upload(0, "in", content)
    await batches.create(0, CreateBatch(input_file_id=file.id, endpoint=CHAT, completion_window="24h"))
    (running,) = await batches.running()
    for each in await batches.unanswered(running, 2):
        await batches.answer(running, each, b"{}", failed=False)
    await batches.end(running, "completed")
    assert len(read_lines(content, CHAT)[0]) == 2
    return batches, kept, running


def test_a_batch_ends_once() -> None:
    async def run() -> None:
        batches, kept, running = await batch_of_two()
        before = (
            await batches.get(0, running.id),
            (await kept.page(0, after=None, limit=9, newest_first=True, purpose=None)),
        )
        # It was cancelled while it ended.
        await batches.end(running, "cancelled")
        assert before == (
            await batches.get(0, running.id),
            await kept.page(0, after=None, limit=9, newest_first=True, purpose=None),
        )
        assert before[0].status == "completed"

    asyncio.run(run())


def test_a_file_that_is_deleted_while_it_is_read_is_no_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAGE_LINES", 1)

    async def run() -> None:
        batches, kept, running = await batch_of_two()
        file_id = (await batches.get(0, running.id)).output_file_id
        assert file_id is not None
        ((first, _),) = await kept.lines(0, file_id, 0)
        assert len(await kept.lines(0, file_id, first)) == 1
        await kept.delete(0, file_id)
        with pytest.raises(LmserveError, match="there is no file"):
            await kept.lines(0, file_id, first)

    asyncio.run(run())
