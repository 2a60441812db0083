"""Coding agents and SDKs as their makers publish them, run against a scripted model behind the real server.

`make test-clients` installs and runs them. What each did is written to logs/ of their cache folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from installed import NotInstalledError, home
from programs import AFTER, BEFORE, PROGRAMS, SAID, TASKS, Place, Program
from scripted_agent import CONTEXT, DIALECTS, Dialect, Script, agent_engine
from server_thread import MODEL, serve_core

TIMEOUT = 240  # seconds a command may take
MAX_BODY = 32 << 20
SHOWN = 200  # characters of a text in a log


class Requests(logging.Handler):
    """The server's log of requests, and of what it has left out."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.name == "lmserve.requests":
            self.entries.append(json.loads(message))
        elif "accepted and ignored" in message:
            self.left_out.append(message)

    @contextmanager
    def listening(self) -> Iterator[None]:
        loggers = [logging.getLogger(name) for name in ("lmserve.requests", "lmserve.http")]
        for logger in loggers:
            logger.addHandler(self)
            logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(self)


@dataclass
class Run:
    """What a program did."""

    version: str
    script: Script
    requests: Requests = field(default_factory=Requests)
    printed: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    notes: str = ""

    def write(self, name: str) -> None:
        """The log."""
        lines = [f"{name} {self.version}", "", "Requests:"]
        for entry in self.requests.entries:
            tokens = f"in={entry['prompt_tokens']} cached={entry['cached_tokens']} out={entry['completion_tokens']}"
            lines.append(f"  {entry['method']} {entry['path']} {entry['status']} {tokens}")
        lines += [f"  {said}" for said in self.requests.left_out]
        lines += ["", "What the model saw last of tools, and said:"]
        for asked in self.script.asked:
            lines.append(f"  {shown(asked.results[-1]) if asked.results else '-'} -> {shown(asked.answer)}")
        lines += ["", f"notes.txt: {BEFORE!r} -> {self.notes!r}", f"Exit codes: {self.codes}", "", *self.printed]
        log = home() / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("\n".join(lines), "utf-8")

    def in_order(self, answers: Sequence[str]) -> list[dict[str, Any]]:
        """The requests that the model answered so, without those that an agent sends beside its conversation."""
        found: list[dict[str, Any]] = []
        for entry in self.requests.entries:
            if len(found) < len(answers) and entry["completion_tokens"] in self.script.lengths(answers[len(found)]):
                found.append(entry)
        return found


def shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def run(program: Program, dialect: Dialect, folder: Path) -> Run:
    work, own = folder / "work", folder / "home"
    for each in (work, own):
        each.mkdir()
    (work / "notes.txt").write_text(BEFORE, "utf-8")
    answers = program.answers(Place(work, own, "", MODEL, dialect))
    script = Script(dialect, dict(zip(TASKS, answers, strict=True)))
    if not program.has_tools:
        script.aside = None
    done = Run(program.client.version, script)
    serving = serve_core(
        agent_engine(script), dialect.text_layer(), max_model_len=CONTEXT, max_body=MAX_BODY, request_log="json"
    )
    with done.requests.listening(), serving as running:
        place = Place(work, own, running.url, MODEL, dialect)
        for ended in program.run(place, TASKS[:1] if program.at_once else TASKS, TIMEOUT):
            done.codes.append(ended.returncode)
            done.printed.append(ended.stdout + ended.stderr)
    done.notes = (work / "notes.txt").read_text("utf-8")
    return done


# Each in one dialect; of each route, one more in the other.
RUNS = [(name, "qwen3") for name in PROGRAMS]
RUNS += [(name, "qwen3-coder") for name in ("claude-code", "codex", "qwen-code")]


@pytest.mark.timeout(3 * TIMEOUT)
@pytest.mark.parametrize(("name", "dialect"), RUNS)
def test_three_turns_with_tools_and_an_edit(name: str, dialect: str, tmp_path: Path) -> None:
    kind, find, package = PROGRAMS[name]
    try:
        program = kind(find(package))
    except NotInstalledError as error:
        pytest.skip(str(error))
    done = run(program, DIALECTS[dialect], tmp_path)
    done.write(f"{name}-{dialect}")
    printed = "\n".join(done.printed)
    assert done.codes == [0] * (1 if program.at_once else len(TASKS)), printed
    refused = [entry for entry in done.requests.entries if entry["status"] >= 400]
    assert not refused, printed
    assert done.notes == AFTER
    answers = list(done.script.tasks.values())
    for task, said, expected in zip(TASKS, SAID, answers, strict=True):
        # Each answer was asked for, in the order of the script, and the last one was shown.
        asked = [each.answer for each in done.script.asked if each.answer in expected]
        assert list(dict.fromkeys(asked)) == list(expected), task
        assert said in printed
    third = next(asked for asked in done.script.asked if asked.answer == SAID[2])
    for words in (*TASKS, SAID[0], SAID[1]):
        assert words in third.prompt
    if program.goes_on:
        said = [answer for each in answers for answer in each]
        requests = done.in_order(said)
        assert len(requests) == len(said)
        for earlier, later in pairwise(requests):
            # All that came before, thoughts included; the last token was sampled, and is computed with what follows it.
            before = earlier["prompt_tokens"] + earlier["completion_tokens"] - 1
            assert later["cached_tokens"] == before, requests
    if program.has_tools:
        by_answer = {asked.answer: asked.results for asked in done.script.asked}
        assert "a draft" in by_answer[answers[0][1]][-1]
        assert len(by_answer[answers[0][2]]) == 2
        assert ("final text" if program.at_once else "13") in by_answer[answers[1][-1]][-1]
