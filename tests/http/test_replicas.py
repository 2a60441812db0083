"""Several servers that share their sessions in PostgreSQL: each continues every session, and none loses a turn."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from postgres import Postgres, database

SERVER = Path(__file__).with_name("replica_server.py")
TURN = {"prompt": "hi", "create": True, "max_tokens": 8, "ignore_eos": True}
SEEDS: list[dict[str, Any]] = [{"seed": 7}, {}, {}, {}, {}, {}]  # of six turns


class Replica:
    """One of the servers."""

    def __init__(self, url: str, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.client = httpx.Client(base_url=url, timeout=60)

    def turn(self, session: int | str, **more: Any) -> dict[str, Any]:
        """The first turn's seed is the session's."""
        reply = self.client.post(f"/v1/sessions/{session}/turns", json=TURN | more)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def tokens(self, session: int | str) -> list[list[int]]:
        reply = self.client.get(f"/v1/sessions/{session}/transcript", params={"token_ids": True})
        assert reply.status_code == 200, reply.text
        return [turn["input_ids"] + turn["output_ids"] for turn in reply.json()["turns"]]

    def card(self, session: int | str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/sessions/{session}").json())


@contextmanager
def replica(postgres: Postgres, pause: float = 0.0) -> Iterator[Replica]:
    command = [sys.executable, str(SERVER), postgres.url, str(pause)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url
        found = Replica(url, process)
        wait_for(lambda: found.client.get("/health").status_code == 200)
        yield found
    finally:
        process.kill()
        process.wait()


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with database() as server:
        yield server


@pytest.fixture(scope="module")
def two(postgres: Postgres) -> Iterator[tuple[Replica, Replica]]:
    with ExitStack() as stack:
        yield stack.enter_context(replica(postgres)), stack.enter_context(replica(postgres))


def test_each_server_continues_every_session(two: tuple[Replica, Replica]) -> None:
    # The same conversation, on one server.
    alone = [two[0].turn("alone", prompt=f"turn {n}", **seed)["text"] for n, seed in enumerate(SEEDS)]
    moving = [two[n % 2].turn("moving", prompt=f"turn {n}", **seed)["text"] for n, seed in enumerate(SEEDS)]
    assert moving == alone
    tokens = two[0].tokens("alone")
    assert len(tokens) == 6
    assert two[0].tokens("moving") == two[1].tokens("moving") == tokens


def test_what_a_turn_has_used_moves_with_its_session(two: tuple[Replica, Replica]) -> None:
    for n in range(4):
        two[n % 2].turn("used")
    cards = [server.card("used") for server in two]
    assert [card["turns"] for card in cards] == [4, 4]
    assert cards[0]["usage"] == cards[1]["usage"]
    assert cards[0]["usage"]["generated_tokens"] == 32
    assert cards[0]["created"] == cards[1]["created"]


def test_streams_and_the_other_routes_share_sessions(two: tuple[Replica, Replica]) -> None:
    one, other = two
    first = {"prompt": "hi", "instance_id": 77, "request_output_len": 4, "ignore_eos": True, "stream": True}
    assert one.client.post("/generate", json=first).status_code == 200
    message = {"model": "tiny-model", "session_id": 77, "max_tokens": 4, "messages": "go on"}
    chat = other.client.post("/v1/chat/completions", json=message)
    assert chat.status_code == 200, chat.text
    assert one.card(77)["turns"] == 2
    assert one.tokens(77) == other.tokens(77)


def test_verbs_of_one_server_hold_on_the_other(two: tuple[Replica, Replica]) -> None:
    one, other = two
    for _ in range(3):
        one.turn("verbs")
    tokens = other.tokens("verbs")
    assert other.client.post("/v1/sessions/verbs/rewind", json={"turns": 1}).json()["turns"] == 1
    assert one.tokens("verbs") == tokens[:1]
    # As many turns as before, of other tokens.
    other.turn("verbs", prompt="another")
    other.turn("verbs", prompt="another")
    assert one.tokens("verbs") == other.tokens("verbs") != tokens
    assert one.client.post("/v1/sessions/verbs/fork", json={"session_id": "branch"}).json()["turns"] == 3
    assert other.client.post("/v1/sessions/branch/append", json={"prompt": "more"}).status_code == 200
    assert len(one.tokens("branch")) == 4
    assert one.client.get("/v1/sessions/branch/export").json()["tokens"] == exported(other, "branch")
    assert other.client.delete("/v1/sessions/branch").status_code == 200
    assert one.client.get("/v1/sessions/branch").status_code == 404
    assert one.client.delete("/v1/sessions/branch").status_code == 404
    # The name is free again, everywhere.
    one.turn("branch")
    assert len(other.tokens("branch")) == 1
    assert other.client.post("/v1/sessions/branch/fork", json={"session_id": "verbs"}).status_code == 409


def test_what_is_written_and_loaded_is_counted(two: tuple[Replica, Replica]) -> None:
    one, other = two

    def counted(server: Replica) -> list[int]:
        page = server.client.get("/metrics").text
        line = r"^lmserve_session_store_{}_total(?:{{.*}})? (\d+)$"
        found = [re.search(line.format(name), page, re.MULTILINE) for name in ("writes", "loads")]
        return [int(match[1]) for match in found if match is not None]

    before, others = counted(one), counted(other)
    one.turn("counted")
    one.turn("counted")
    other.turn("counted")
    assert counted(one) == [before[0] + 2, before[1]]
    assert counted(other) == [others[0] + 1, others[1] + 1]


def exported(server: Replica, session: str) -> str:
    return str(server.client.get(f"/v1/sessions/{session}/export").json()["tokens"])


def test_an_import_is_shared(two: tuple[Replica, Replica]) -> None:
    one, other = two
    one.turn("source")
    session = other.client.get("/v1/sessions/source/export").json()
    assert one.client.post("/v1/sessions/import?session_id=copy", json=session).status_code == 200
    assert other.client.post("/v1/sessions/import?session_id=copy", json=session).status_code == 409
    assert other.tokens("copy") == one.tokens("source")


def test_a_list_has_the_sessions_of_all(two: tuple[Replica, Replica]) -> None:
    one, other = two
    for server, name in ((one, 900000002), (other, 900000010), (one, "zz-a"), (other, "zz-é")):
        server.turn(name)
    for server in two:
        page = server.client.get("/v1/sessions", params={"after": "900000001", "limit": 2}).json()
        assert [card["id"] for card in page["data"]] == [900000002, 900000010]
        assert page["has_more"]
        rest = server.client.get("/v1/sessions", params={"after": "zz", "limit": 1000}).json()
        assert [card["id"] for card in rest["data"]] == ["zz-a", "zz-é"]
        assert rest["data"][0]["usage"]["generated_tokens"] == 8


def test_many_rewinds_do_not_grow_the_store(two: tuple[Replica, Replica], postgres: Postgres) -> None:
    import psycopg

    two[0].turn("rewound")
    for _ in range(80):
        two[0].turn("rewound", max_tokens=1)
        assert two[0].client.post("/v1/sessions/rewound/rewind", json={"turns": 1}).status_code == 200
    tokens = two[0].tokens("rewound")
    assert two[1].tokens("rewound") == tokens
    with psycopg.connect(postgres.url) as connection:
        count = "SELECT count(*) FROM lmserve_records GROUP BY session ORDER BY 1 DESC LIMIT 1"
        row = connection.execute(count).fetchone()
    assert row is not None
    assert row[0] <= 2 * 2 + 64 + 1


def test_what_the_store_has_is_checked(two: tuple[Replica, Replica], postgres: Postgres) -> None:
    import psycopg

    name = b"\1spoilt"
    two[0].turn("spoilt")
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        session = "(SELECT key FROM lmserve_sessions WHERE id = %s)"
        row = connection.execute(f"SELECT body FROM lmserve_records WHERE session = {session}", (name,)).fetchone()
        assert row is not None
        for body, status, code in (
            (row[0][:-9], 409, "session_damaged"),
            # A token that the model does not have.
            (row[0][:65] + b"\xff\xff\xff\x7f" + row[0][69:], 400, "invalid_value"),
        ):
            change = f"UPDATE lmserve_records SET body = %s WHERE session = {session}"
            assert connection.execute(change, (body, name)).rowcount == 1
            refused = two[1].client.post("/v1/sessions/spoilt/turns", json=TURN)
            assert (refused.status_code, refused.json()["error"]["code"]) == (status, code), refused.text
        connection.execute("DELETE FROM lmserve_sessions WHERE id = %s", (name,))
    two[1].turn("spoilt")
    assert len(two[0].tokens("spoilt")) == 1


def test_two_servers_race_for_a_session(two: tuple[Replica, Replica]) -> None:
    """One of them runs its turn; the other says so, and its turn is none."""
    told: list[tuple[int, str]] = []
    for server in two:
        server.turn("raced")
    for _ in range(10):
        barrier = threading.Barrier(2)

        def ask(server: Replica, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            reply = server.client.post("/v1/sessions/raced/turns", json=TURN | {"max_tokens": 40})
            told.append((reply.status_code, reply.json().get("error", {}).get("code", "")))

        threads = [threading.Thread(target=ask, args=(server,)) for server in two]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(told) <= {(200, ""), (409, "session_busy")}
    kept = 2 + sum(status == 200 for status, _ in told)
    assert kept >= 12
    assert len(two[0].tokens("raced")) == len(two[1].tokens("raced")) == kept


def test_a_busy_session_is_refused_elsewhere_until_its_client_leaves(postgres: Postgres) -> None:
    with replica(postgres, pause=0.02) as one, replica(postgres) as other:
        one.turn("held", max_tokens=1)
        body = TURN | {"max_tokens": 400, "stream": True}
        with one.client.stream("POST", "/v1/sessions/held/turns", json=body) as reply:
            assert reply.status_code == 200
            refused = other.client.post("/v1/sessions/held/turns", json=TURN)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "session_busy")
            assert refused.headers["retry-after"] == "1"
            again = one.client.post("/v1/sessions/held/turns", json=TURN)
            assert (again.status_code, again.json()["error"]["code"]) == (409, "session_busy")
            # What is said of it meanwhile is its last committed turn.
            assert [server.card("held")["turns"] for server in (one, other)] == [1, 1]
        wait_for(lambda: other.client.post("/v1/sessions/held/turns", json=TURN).status_code == 200)
        assert len(one.tokens("held")) == 2
        # A turn that is kept when its client leaves is there before the session is free.
        with one.client.stream("POST", "/v1/sessions/held/turns", json=body | {"on_disconnect": "keep"}) as reply:
            next(reply.iter_raw())
        wait_for(lambda: other.client.post("/v1/sessions/held/turns", json=TURN).status_code == 200)
        assert len(one.tokens("held")) == 4
        # A turn that is cancelled keeps what it has, and its session can be ended at once.
        with one.client.stream("POST", "/v1/sessions/held/turns", json=body) as reply:
            next(reply.iter_raw())
            end = {"prompt": "", "instance_id": "held", "request_output_len": 0, "stop": True, "sequence_start": False}
            assert one.client.post("/generate", json=end | {"sequence_end": True}).status_code == 200
        assert other.client.get("/v1/sessions/held").status_code == 404


def test_a_killed_server_loses_its_running_turn_alone(postgres: Postgres) -> None:
    with replica(postgres) as other:
        alone = [other.turn("unharmed", prompt=f"turn {n}", **SEEDS[n])["text"] for n in range(4)]
        with replica(postgres, pause=0.02) as one:
            assert [one.turn("harmed", prompt=f"turn {n}", **SEEDS[n])["text"] for n in range(2)] == alone[:2]
            body = TURN | {"prompt": "turn 2", "max_tokens": 400, "stream": True}
            with one.client.stream("POST", "/v1/sessions/harmed/turns", json=body) as reply:
                next(reply.iter_raw())
                one.process.send_signal(signal.SIGKILL)
                one.process.wait()
        # The lease has ended with its server's connection.
        wait_for(lambda: other.client.post("/v1/sessions/harmed/append", json={"prompt": "x"}).status_code == 200)
        assert other.client.post("/v1/sessions/harmed/rewind", json={"turns": 2}).status_code == 200
        assert [other.turn("harmed", prompt=f"turn {n}")["text"] for n in (2, 3)] == alone[2:]
        assert other.tokens("harmed") == other.tokens("unharmed")


def test_a_database_that_is_down_is_a_clear_error_and_no_loss() -> None:
    with database() as postgres, replica(postgres) as one, replica(postgres, pause=0.02) as other:
        one.turn("kept")
        body = TURN | {"max_tokens": 100}
        replies: list[httpx.Response] = []
        running = threading.Thread(
            target=lambda: replies.append(other.client.post("/v1/sessions/running/turns", json=body))
        )
        running.start()
        wait_for(lambda: other.client.get("/v1/sessions/running").json().get("busy") is True)
        postgres.stop()
        running.join()
        assert (replies[0].status_code, replies[0].json()["error"]["code"]) == (503, "storage_failed")
        for server in (one, other):
            refused = server.client.post("/v1/sessions/kept/turns", json=TURN)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_failed")
            assert "postgresql" not in refused.text
            assert str(postgres.port) not in refused.text
            # What needs no session is served.
            message = {"model": "tiny-model", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
            assert server.client.post("/v1/chat/completions", json=message).status_code == 200
            assert server.client.get("/v1/sessions/kept").status_code == 503
        assert other.client.get("/health").json()["status"] == "degraded"
        assert other.client.get("/health/ready").status_code == 200
        postgres.start()
        wait_for(lambda: other.client.get("/health").json()["status"] == "ok")
        for server in (one, other):
            server.turn("kept")
            server.turn("running")
        assert len(one.tokens("kept")) == 3
        assert len(one.tokens("running")) == 2


def test_sessions_of_another_model_or_key_are_not_seen(postgres: Postgres) -> None:
    from lmserve.engine.postgres import PostgresStore
    from lmserve.engine.session_store import Record, StoredKey

    key, record = StoredKey(0, "mine"), Record(True, 1, 3, (1, 0, 1, 1, 5), b"body")
    names = {0: bytes(32), 1: b"1" * 32}
    mine, other = (PostgresStore(postgres.url, fingerprint=bytes([n]) * 32, tenants=names) for n in (1, 2))
    version = mine.put(key, None, record)
    assert version is not None
    assert mine.put(key, None, record) is None
    stored = mine.load(key)
    assert stored is not None
    assert (stored.version, stored.records) == (version, [b"body"])
    assert other.load(key) is None
    assert mine.load(StoredKey(1, "mine")) is None
    assert [info.id for info in mine.list(0, None, 10)] == ["mine"]
    assert other.list(0, None, 10) == mine.list(1, None, 10) == []
    assert not other.end(key, version)
    assert mine.end(key, version)
    assert mine.version(key) is None
    for store in (mine, other):
        store.close()


def test_unused_sessions_are_deleted(postgres: Postgres) -> None:
    from lmserve.engine.postgres import PostgresStore
    from lmserve.engine.session_store import Record, StoredKey

    store = PostgresStore(postgres.url, fingerprint=b"t" * 32, tenants={0: bytes(32)}, session_ttl=0.05)
    key, record = StoredKey(0, 5), Record(True, 1, 3, (1, 0, 1, 1, 5), b"old")
    version = store.put(key, None, record)
    assert version is not None
    wait_for(lambda: store.version(key) is None)
    assert store.load(key) is None
    assert store.list(0, None, 10) == []
    # Its place is free, and its records are gone with it.
    after = store.put(key, None, record._replace(body=b"new"))
    assert after is not None
    stored = PostgresStore(postgres.url, fingerprint=b"t" * 32, tenants={0: bytes(32)}).load(key)
    assert stored is not None
    assert stored.records == [b"new"]
    store.close()
