"""A session that moves from one server's process to another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from test_kill import served

TURNS = 6


def say(client: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 1.0, "create": True, **fields}
    reply = client.post("/v1/sessions/moved/turns", json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_a_session_of_six_turns_goes_on_in_another_process_token_for_token(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    with (
        served(folders[0]) as (one, _),
        served(folders[1]) as (other, _),
        httpx.Client(base_url=one, timeout=60) as first,
        httpx.Client(base_url=other, timeout=60) as second,
    ):
        for turn in range(TURNS):
            say(first, f"Turn {turn}", **({"seed": 11} if turn == 0 else {}))
        export = first.get("/v1/sessions/moved/export").json()
        assert len(export["turns"]) == TURNS
        assert second.post("/v1/sessions/import", json=export).status_code == 200
        assert second.get("/v1/sessions/moved/export").json()["tokens"] == export["tokens"]
        # Sampled, by the session's own seed.
        told = [say(client, "And now?") for client in (first, second)]
        assert told[0]["text"] == told[1]["text"]
        assert told[0]["usage"]["prompt_tokens"] == told[1]["usage"]["prompt_tokens"]
        ledgers = [client.get("/v1/sessions/moved/completions").json() for client in (first, second)]
        ids = [[(turn["input_ids"], turn["output_ids"]) for turn in ledger["data"]] for ledger in ledgers]
        assert ids[0] == ids[1]
        assert len(ids[0]) == TURNS + 1
