"""Several models in one server: chosen by the request, loaded when asked for, unloaded when idle or in the way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import pytest
from lmserve.api.http import members as members_module
from lmserve.api.http.members import Member, Members
from lmserve.api.state.database import Database
from lmserve.app import create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.errors import LmserveError
from lmserve.keys import Keyring
from scripted_core import MAX_MODEL_LEN, ScriptedCore
from server_thread import ServerThread
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from wire import wait_until

MEMORY = 100


@dataclass
class Loader:
    """Loads a scripted core, and counts."""

    cores: list[ScriptedCore] = field(default_factory=list)
    fails: int = 0
    seconds: float = 0.0

    def __call__(self) -> AsyncEngine:
        time.sleep(self.seconds)
        if self.fails:
            self.fails -= 1
            raise LmserveError.new(400, "invalid_value", "there is no memory for it")
        self.cores.append(ScriptedCore())
        return AsyncEngine(self.cores[-1], max_model_len=MAX_MODEL_LEN)


@dataclass
class Fleet:
    members: Members
    loaders: dict[str, Loader]
    client: httpx.Client

    def chat(self, model: str | None, text: str = "Hi", **headers: str) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3} | ({"model": model} if model else {})
        return self.client.post("/v1/chat/completions", json=body, headers=headers)

    def loaded(self) -> set[str]:
        return {member.names[0] for member in self.members._members if member.serving is not None}


Begin = Callable[..., Fleet]


def database_of(state: Path | None, name: str) -> Database | None:
    if state is None:
        return None
    (state / name).mkdir(exist_ok=True)
    return Database(state / name, {0: bytes(32)})


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """A server of the models a, b and c, none loaded. `room`: how many fit at a time; `mapped`: from files."""
    monkeypatch.setattr(members_module, "LOOK_SECONDS", 0.01)
    servers: list[ServerThread] = []
    clients: list[httpx.Client] = []

    def start(
        *,
        room: int = 3,
        idle_unload: float = 0.0,
        keys: Keyring | None = None,
        state: Path | None = None,
        mapped: bool = False,
    ) -> Fleet:
        loaders = {name: Loader() for name in "abc"}
        of = [
            Member((name, f"{name}-alias"), load, MEMORY, 1000, {}, database=partial(database_of, state, name))
            for name, load in loaders.items()
        ]
        for member in of:
            member.mapped = MEMORY if mapped else 0
        members = Members(
            of,
            keys,
            free_memory=lambda: MEMORY * (room - sum(member.serving is not None for member in of if not member.mapped)),
            idle_unload=idle_unload,
        )
        server = ServerThread(create_app(members, keys=keys))
        server.__enter__()
        servers.append(server)
        clients.append(httpx.Client(base_url=server.url, timeout=30))
        return Fleet(members, loaders, clients[-1])

    yield start
    for client in clients:
        client.close()
    for server in servers:
        server.__exit__()


def test_the_request_chooses_and_the_model_is_loaded_by_it(begin: Begin) -> None:
    fleet = begin()
    assert fleet.loaded() == set()
    assert fleet.client.get("/health").status_code == 200
    assert fleet.chat("b").json()["model"] == "b"
    assert fleet.loaded() == {"b"}
    # An alias; then nothing, which is the first.
    assert fleet.chat("b-alias").json()["model"] == "b-alias"
    assert fleet.chat(None).json()["model"] == "a"
    assert [len(loader.cores) for loader in fleet.loaders.values()] == [1, 1, 0]
    refused = fleet.chat("d")
    assert refused.status_code == 404
    assert refused.json()["error"]["message"] == (
        "the model 'd' is not served; the served models are: a, a-alias, b, b-alias, c, c-alias"
    )


def test_every_name_is_listed_without_loading(begin: Begin) -> None:
    fleet = begin()
    cards = fleet.client.get("/v1/models").json()["data"]
    assert [(card["id"], card["root"]) for card in cards][:3] == [("a", "a"), ("a-alias", "a"), ("b", "b")]
    assert {card["max_model_len"] for card in cards} == {1000}
    assert fleet.client.get("/v1/models/c").json()["id"] == "c"
    assert fleet.client.get("/v1/models/d").status_code == 404
    assert fleet.loaded() == set()


def test_routes_without_a_model_in_their_body_choose_by_header_or_query(begin: Begin) -> None:
    fleet = begin()
    turn = {"prompt": "Hi", "instance_id": 7, "request_output_len": 2}
    # LMDeploy's clients name a model that is not served.
    assert fleet.client.post("/generate", json=turn | {"model": "internlm-chat-7b"}).status_code == 200
    assert fleet.loaded() == {"a"}
    assert fleet.client.post("/generate", json=turn | {"model": "b"}).status_code == 200
    assert fleet.client.post("/generate", json=turn, headers={"x-lmserve-model": "c"}).status_code == 200
    assert fleet.loaded() == {"a", "b", "c"}
    for core in (loader.cores[0] for loader in fleet.loaders.values()):
        assert list(core.sessions) == [(0, 7)]
    listed = fleet.client.get("/v1/sessions?model=b").json()
    assert [card["id"] for card in listed["data"]] == [7]
    assert fleet.client.delete("/v1/sessions/7?model=b").status_code == 200
    assert fleet.loaders["b"].cores[0].sessions == {}
    assert fleet.loaders["a"].cores[0].sessions != {}
    assert fleet.client.get("/v1/sessions?model=d").status_code == 404


def test_who_watches_loads_no_model(begin: Begin) -> None:
    fleet = begin()
    alone = fleet.client.get("/metrics").text
    assert "lmserve_build_info" in alone
    assert "lmserve_requests_running" not in alone
    assert fleet.loaded() == set()
    fleet.chat("b")
    fleet.chat("c")
    text = fleet.client.get("/metrics?model=a").text
    assert fleet.loaded() == {"b", "c"}
    running = [line for line in text.splitlines() if line.startswith("lmserve_requests_running")]
    assert running == ['lmserve_requests_running{model="b"} 0', 'lmserve_requests_running{model="c"} 0']
    assert text.count("# TYPE lmserve_requests_running ") == 1
    chats = [line for line in text.splitlines() if "chat/completions" in line]
    assert chats == [
        'lmserve_http_requests_total{route="/v1/chat/completions",status="200"} 2',
    ]


def test_many_at_once_load_a_model_once(begin: Begin) -> None:
    fleet = begin()
    fleet.loaders["b"].seconds = 0.2
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: fleet.chat("b"), range(8)))
    assert {reply.status_code for reply in replies} == {200}
    assert len(fleet.loaders["b"].cores) == 1


def test_a_batch_goes_on_after_a_restart_though_nobody_asks_for_its_model(begin: Begin, tmp_path: Path) -> None:
    body = {"model": "b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    core = ScriptedCore(max_queue=0)
    alone = create_app(AsyncEngine(core, max_model_len=MAX_MODEL_LEN), ("b",), database=database_of(tmp_path, "b"))
    with ServerThread(alone) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        upload = {"files": {"file": ("in.jsonl", json.dumps(line).encode())}, "data": {"purpose": "batch"}}
        asked = {"endpoint": line["url"], "completion_window": "24h"}
        asked["input_file_id"] = client.post("/v1/files", **upload).json()["id"]
        batch = client.post("/v1/batches", json=asked).json()["id"]
        wait_until(lambda: len(core.submitted) > 1, "the queue is full for its line")
        assert client.get(f"/v1/batches/{batch}").json()["status"] == "in_progress"
    fleet = begin(state=tmp_path)
    wait_until(lambda: fleet.loaded() == {"b"}, "its model is loaded")
    headers = {"x-lmserve-model": "b"}

    def counts() -> dict[str, int]:
        counts: dict[str, int] = fleet.client.get(f"/v1/batches/{batch}", headers=headers).json()["request_counts"]
        return counts

    wait_until(lambda: counts() == {"completed": 1, "failed": 0, "total": 1}, "its line is answered")


def test_what_cannot_be_loaded_says_why_and_is_tried_again(begin: Begin) -> None:
    fleet = begin()
    fleet.loaders["b"].fails = 1
    refused = fleet.chat("b")
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == "the model b could not be loaded: there is no memory for it"
    assert fleet.chat("b").status_code == 200
    assert fleet.client.get("/health").status_code == 200


def test_an_idle_model_is_unloaded_and_one_in_use_is_not(begin: Begin) -> None:
    fleet = begin(idle_unload=0.05)
    done = threading.Event()

    def hold() -> None:
        fleet.chat("a", "[[pace 0.2]]")
        done.set()

    thread = threading.Thread(target=hold)
    thread.start()
    wait_until(lambda: fleet.loaded() == {"a"}, "a is loaded")
    assert fleet.chat("b").status_code == 200
    wait_until(lambda: "b" not in fleet.loaded(), "b is unloaded")
    if not done.is_set():
        assert fleet.loaded() == {"a"}
    thread.join()
    wait_until(lambda: fleet.loaded() == set(), "a is unloaded")
    assert fleet.chat("b").status_code == 200
    assert len(fleet.loaders["b"].cores) == 2


@pytest.mark.parametrize("mapped", [False, True])
def test_the_least_recently_used_makes_room(begin: Begin, mapped: bool) -> None:
    fleet = begin(room=2, mapped=mapped)
    for name in ("a", "b", "a", "c"):
        assert fleet.chat(name).status_code == 200
    assert fleet.loaded() == {"a", "c"}


def test_a_model_whose_engine_died_is_loaded_anew(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = begin()
    assert fleet.chat("b").status_code == 200
    (core,) = fleet.loaders["b"].cores

    def dead() -> None:
        raise LmserveError.new(503, "engine_unavailable", "the engine thread has ended")

    monkeypatch.setattr(core, "check_health", dead)
    wait_until(lambda: fleet.loaded() == set(), "b is dropped")
    assert fleet.chat("b").status_code == 200
    assert len(fleet.loaders["b"].cores) == 2


def test_nobody_without_a_key_loads_a_model(begin: Begin) -> None:
    fleet = begin(keys=Keyring.of("sk-one"))
    assert fleet.chat("b").status_code == 401
    assert fleet.client.get("/v1/sessions?model=b").status_code == 401
    assert fleet.loaded() == set()
    assert fleet.chat("b", Authorization="Bearer sk-one").status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"model": 7}', b'{"model": "\xff"}', b'{"model": ""}'])
def test_a_body_that_names_no_model_is_refused_by_its_route(begin: Begin, body: bytes) -> None:
    fleet = begin()
    reply = fleet.client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400


def test_two_models_of_one_name_are_refused() -> None:
    twice = [Member(("a",), Loader(), 0, 1, {}), Member(("b", "a"), Loader(), 0, 1, {})]
    with pytest.raises(ValueError, match="two models have the name 'a'"):
        Members(twice, free_memory=lambda: 0)


def test_a_socket_holds_the_model_that_its_handshake_chose(begin: Begin) -> None:
    fleet = begin(room=1)
    url = str(fleet.client.base_url).replace("http://", "ws://").rstrip("/") + "/v1/responses"
    with pytest.raises(InvalidStatus) as caught, connect(url, additional_headers={"x-lmserve-model": "d"}):
        pass
    assert caught.value.response.status_code == 404
    with connect(f"{url}?model=b") as socket:
        assert fleet.loaded() == {"b"}
        socket.send('{"type": "response.create", "model": "a", "input": "x"}')
        told = json.loads(socket.recv(timeout=30))
        assert (told["status"], told["error"]["code"]) == (404, "model_not_found")
        # There is no room for another, but this one is used.
        fleet.chat("a")
        assert "b" in fleet.loaded()
