"""kill -9 at random points: nothing that was acknowledged is lost, and nothing is answered twice.

A real process serves sessions, conversations, lanes and batches while clients ask, and is killed. The next one must
have all that clients were told, and once what lines of batches add to sessions and conversations. KILLS=... and
SEED=... for more rounds, and others (`make kill`).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

KILLS = int(os.environ.get("KILLS", "5"))
SEED = int(os.environ.get("SEED", "1"))
LINES = 10 * KILLS
TURNS = 10 * KILLS  # of each kind, at least
MOST_REPLIES = 100  # of one server
TALKERS = 2  # of each kind
MOST_TURNS = 80  # of a conversation, each of about 45 tokens
LINES_OF_A_SESSION = 40
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
SERVER = Path(__file__).with_name("durable_server.py")


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with (folder / "errors").open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, str(SERVER), str(folder)], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, (folder / "errors").read_text("utf-8")
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield url, process
    finally:
        process.kill()
        process.wait()


@dataclass
class Talk:
    """A conversation as its client knows it."""

    name: str
    told: list[tuple[str, str]] = field(default_factory=list)  # what was asked and answered

    def ask(self, client: httpx.Client, text: str) -> str:
        raise NotImplementedError

    def read(self, client: httpx.Client) -> list[tuple[str, str]]:
        """What the server has of it."""
        raise NotImplementedError

    @property
    def is_full(self) -> bool:
        """A few more turns, and the context has no room."""
        return len(self.told) >= MOST_TURNS

    def go_on(self, client: httpx.Client) -> None:
        if self.is_full:
            # Which tells whether the server is still there.
            client.get("/health")
            time.sleep(0.05)
            return
        text = f"Question {len(self.told)}"
        self.told.append((text, self.ask(client, text)))

    def check(self, client: httpx.Client) -> None:
        """The server has all that was told, in order and once; the turn that ran may be there as well."""
        there = self.read(client)
        assert there[: len(self.told)] == self.told, self.name
        assert len(there) - len(self.told) in (0, 1), self.name
        if len(there) > len(self.told):
            assert there[-1][0] == f"Question {len(self.told)}"
        self.told = there


class SessionTalk(Talk):
    def ask(self, client: httpx.Client, text: str) -> str:
        body = {"prompt": text, "create": True, "max_tokens": 8, "seed": 5, "ignore_eos": True}
        reply = client.post(f"/v1/sessions/{self.name}/turns", json=body)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["text"])

    def read(self, client: httpx.Client) -> list[tuple[str, str]]:
        reply = client.get(f"/v1/sessions/{self.name}/transcript")
        if reply.status_code == 404:
            return []
        turns = [(turn["input"], turn["output"]) for turn in reply.json()["turns"]]
        said = [(text.rpartition("user\n")[2].partition("<|im_end|>")[0], answer) for text, answer in turns]
        return [(text, answer.replace("<|im_end|>", "")) for text, answer in said]


class ConversationTalk(Talk):
    def ask(self, client: httpx.Client, text: str) -> str:
        store = len(self.told) % 2 == 0
        body = {"input": text, "conversation": self.name, "max_output_tokens": 8, "seed": 5, "store": store}
        reply = client.post("/v1/responses", json=body | {"ignore_eos": True})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["output"][0]["content"][0]["text"])

    def read(self, client: httpx.Client) -> list[tuple[str, str]]:
        texts: list[str] = []
        after: dict[str, str] = {}
        while True:
            params = {"order": "asc", "limit": "100"} | after
            page = client.get(f"/v1/conversations/{self.name}/items", params=params).json()
            texts += [item["content"][0]["text"] for item in page["data"]]
            if not page["has_more"]:
                return list(zip(texts[::2], texts[1::2], strict=True))
            after = {"after": page["last_id"]}


class LaneTalk(Talk):
    """Its client has all of it, and sends it in each request. A lane dies with its server, and nobody must miss it."""

    computed: int | None = None  # tokens that this server has of it

    def chat(self, client: httpx.Client, text: str, headers: dict[str, str], before: int) -> tuple[str, dict[str, Any]]:
        """Answer and usage of `text` behind the first turns."""
        messages = [{"role": "system", "content": self.name}]
        for asked, answered in self.told[:before]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        body = {"messages": [*messages, {"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        reply = client.post(CHAT, json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"], reply.json()["usage"]

    def ask(self, client: httpx.Client, text: str) -> str:
        answer, usage = self.chat(client, text, {"x-session-id": self.name}, len(self.told))
        assert self.computed in (None, usage["prompt_tokens_details"]["cached_tokens"])
        # The last token was sampled, and is computed with what follows it.
        self.computed = usage["total_tokens"] - 1
        return answer

    def read(self, client: httpx.Client) -> list[tuple[str, str]]:
        self.computed = None
        if not self.told:
            return []
        asked = self.told[-1][0]
        answer, _ = self.chat(client, asked, {}, len(self.told) - 1)
        return [*self.told[:-1], (asked, answer)]


class Background:
    """Responses of the background, which nobody waits for."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def go_on(self, client: httpx.Client) -> None:
        body = {"input": "Hello", "background": True, "max_output_tokens": 40, "ignore_eos": True}
        reply = client.post("/v1/responses", json=body)
        assert reply.status_code == 200, reply.text
        self.told.append(reply.json()["id"])
        time.sleep(0.02)

    def check(self, client: httpx.Client) -> None:
        """Each is there, and has ended: what ran when the server was killed has failed."""
        for response_id in self.told:
            reply = client.get(f"/v1/responses/{response_id}")
            assert reply.status_code == 200, reply.text
            assert reply.json()["status"] in ("incomplete", "failed")
        # The server keeps so many, and no more.
        self.told = self.told[-20:]


def until_it_dies(
    url: str, work: Callable[[httpx.Client], None], replies: list[None], failures: list[BaseException]
) -> threading.Thread:
    """Do the work again and again, as long as there is a server."""

    def run() -> None:
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                while True:
                    work(client)
                    replies.append(None)
        except httpx.TransportError:
            return
        except BaseException as error:  # noqa: BLE001 - the test raises it
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def new_session(client: httpx.Client) -> Talk:
    del client
    return SessionTalk(f"talk-{uuid.uuid4().hex}")


def new_conversation(client: httpx.Client) -> Talk:
    return ConversationTalk(client.post("/v1/conversations", json={}).json()["id"])


def new_lane(client: httpx.Client) -> Talk:
    del client
    return LaneTalk(f"lane-{uuid.uuid4().hex}")


NEW_TALKS: dict[type[Talk], Callable[[httpx.Client], Talk]] = {
    SessionTalk: new_session,
    ConversationTalk: new_conversation,
    LaneTalk: new_lane,
}


class Batch:
    """A batch whose lines name nothing."""

    endpoint = CHAT

    def __init__(self, client: httpx.Client) -> None:
        self._names = self.named(client)
        bodies = [self.body(at, self._names[at // LINES_OF_A_SESSION]) for at in range(LINES)]
        lines = [
            {"custom_id": str(at), "method": "POST", "url": self.endpoint, "body": body}
            for at, body in enumerate(bodies)
        ]
        content = "\n".join(json.dumps(each) for each in lines).encode()
        file = client.post("/v1/files", files={"file": ("a", content)}, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file, "endpoint": self.endpoint, "completion_window": "24h"}
        self._id = str(client.post("/v1/batches", json=body).json()["id"])
        self.answered = 0

    def named(self, client: httpx.Client) -> list[str]:
        """What the lines name: each of it in so many."""
        del client
        return [uuid.uuid4().hex for _ in range(0, LINES, LINES_OF_A_SESSION)]

    def body(self, at: int, name: str) -> dict[str, Any]:
        del name
        return {"messages": f"Line {at}", "max_tokens": 40}

    def text(self, reply: dict[str, Any]) -> str:
        return str(reply["choices"][0]["message"]["content"])

    def read(self, client: httpx.Client, name: str) -> list[tuple[str, str]]:
        """What was asked and answered there."""
        raise NotImplementedError

    def count(self, client: httpx.Client) -> int:
        """Lines that are answered: never fewer than before."""
        counts = client.get(f"/v1/batches/{self._id}").json()["request_counts"]
        assert (counts["failed"], counts["total"]) == (0, LINES)
        assert counts["completed"] >= self.answered
        self.answered = counts["completed"]
        return self.answered

    def end(self, client: httpx.Client) -> list[str]:
        """The answers, each of which is there once."""
        deadline = time.monotonic() + 240
        while (done := client.get(f"/v1/batches/{self._id}").json())["status"] != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert done["request_counts"] == {"completed": LINES, "failed": 0, "total": LINES}
        content = client.get(f"/v1/files/{done['output_file_id']}/content").text
        lines = [json.loads(text) for text in content.splitlines()]
        assert sorted((each["custom_id"] for each in lines), key=int) == [str(at) for at in range(LINES)]
        lines.sort(key=lambda each: int(each["custom_id"]))
        return [self.text(each["response"]["body"]) for each in lines]


class NamingBatch(Batch):
    """A batch whose lines add to something."""

    def end(self, client: httpx.Client) -> list[str]:
        answers = super().end(client)
        # What the lines have added is there once, and is what they were answered.
        there = [pair for name in self._names for pair in sorted(self.read(client, name), key=number_of)]
        assert there == [(f"Line {at}", answer) for at, answer in enumerate(answers)]
        return answers


def number_of(pair: tuple[str, str]) -> int:
    return int(pair[0].removeprefix("Line "))


class SessionBatch(NamingBatch):
    def body(self, at: int, name: str) -> dict[str, Any]:
        return {"messages": f"Line {at}", "max_tokens": 8, "session_id": name, "ignore_eos": True}

    def read(self, client: httpx.Client, name: str) -> list[tuple[str, str]]:
        return SessionTalk(name).read(client)


class ConversationBatch(NamingBatch):
    endpoint = RESPONSES

    def named(self, client: httpx.Client) -> list[str]:
        return [client.post("/v1/conversations", json={}).json()["id"] for _ in super().named(client)]

    def body(self, at: int, name: str) -> dict[str, Any]:
        return {"input": f"Line {at}", "max_output_tokens": 8, "conversation": name, "store": at % 2 == 0}

    def text(self, reply: dict[str, Any]) -> str:
        return str(reply["output"][0]["content"][0]["text"])

    def read(self, client: httpx.Client, name: str) -> list[tuple[str, str]]:
        return ConversationTalk(name).read(client)


def fewest_turns(talks: list[Talk]) -> int:
    """Of any kind."""
    return min(sum(len(talk.told) for talk in talks if isinstance(talk, kind)) for kind in NEW_TALKS)


@pytest.mark.timeout(60 * KILLS)
def test_nothing_told_is_lost_and_nothing_is_answered_twice(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    talks: list[Talk] = []
    full: list[Talk] = []
    background = Background()
    batches: list[Batch] = []
    kills, ends = 0, False
    while not ends:
        with served(tmp_path) as (url, process), httpx.Client(base_url=url, timeout=60) as client:
            if kills == 0:
                talks = [new_talk(client) for new_talk in NEW_TALKS.values() for _ in range(TALKERS)]
                batches = [Batch(client), SessionBatch(client), ConversationBatch(client)]
            for each in (*talks, background):
                each.check(client)
            for batch in batches:
                batch.count(client)
            ends = kills >= KILLS and fewest_turns([*full, *talks]) >= TURNS
            if ends:
                break
            for at, talk in enumerate(talks):
                if talk.is_full:
                    full.append(talk)
                    talks[at] = NEW_TALKS[type(talk)](client)
            replies: list[None] = []
            failures: list[BaseException] = []
            threads = [until_it_dies(url, each.go_on, replies, failures) for each in (*talks, background)]
            last = chance.randint(1, MOST_REPLIES)
            while len(replies) < last and not failures:
                time.sleep(chance.uniform(0, 0.01))
            for batch in batches:
                batch.count(client)
            process.send_signal(signal.SIGKILL)
            kills += 1
            for thread in threads:
                thread.join()
            assert not failures, failures
    assert background.told
    with served(tmp_path) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        for batch in batches:
            batch.end(client)
        # And each goes on, token for token: a conversation's session is the log's.
        for talk in talks:
            talk.go_on(client)
        for talk in (*full, *talks):
            talk.check(client)
    for kind in NEW_TALKS:
        turns = sum(len(talk.told) for talk in (*full, *talks) if isinstance(talk, kind))
        sys.stdout.write(f"{kind.__name__}: {turns} turns\n")
    sys.stdout.write(f"{LINES} lines of each of {len(batches)} batches, {kills} kills\n")
