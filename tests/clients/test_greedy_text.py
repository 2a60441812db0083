"""Agents as published, over the default model: the text that they are answered with is the same with lanes and without.

The model has 8,192 tokens of context, so that those with longer system prompts and tools are told to leave them out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from installed import NotInstalledError
from programs import PROGRAMS, ClaudeCode, Codex, OpenCode, Place, Program, QwenCode
from recording_proxy import Exchange, recording
from scripted_agent import DIALECTS
from server_process import serving

MODEL = "SmolLM2-135M-Instruct"
SETTINGS = ["--max-model-len", "8192", "--kv-memory", "1GiB"]
TASKS = ["Say hello.", "What is the capital of France?", "Say thank you."]
SYSTEM = "You answer in one short sentence."
REPLY_TOKENS = 200  # at most: what the model says depends on the date in the prompt, and it may go round in circles
TIMEOUT = 600  # seconds a command may take


class BriefClaudeCode(ClaudeCode):
    def environment(self, place: Place) -> dict[str, str]:
        return super().environment(place) | {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(REPLY_TOKENS)}

    def command(self, place: Place, task: str, *, again: bool) -> list[str]:
        program, *arguments, _ = super().command(place, task, again=again)
        arguments.remove("--")
        return [program, *arguments, "--tools", "", "--system-prompt", SYSTEM, "--", task]


class BriefOpenCode(OpenCode):
    def environment(self, place: Place) -> dict[str, str]:
        variables = super().environment(place)
        file = place.work / "opencode.json"
        settings = json.loads(file.read_text("utf-8"))
        settings["agent"] = {"build": {"prompt": SYSTEM, "tools": {"*": False}}}
        settings["provider"]["lmserve"]["models"][place.model] = {"limit": {"context": 8192, "output": REPLY_TOKENS}}
        file.write_text(json.dumps(settings), "utf-8")
        return variables


class BriefQwenCode(QwenCode):
    def environment(self, place: Place) -> dict[str, str]:
        return super().environment(place) | {"QWEN_CODE_MAX_OUTPUT_TOKENS": str(REPLY_TOKENS)}

    def command(self, place: Place, task: str, *, again: bool) -> list[str]:
        program, *arguments, _ = super().command(place, task, again=again)
        return [program, *arguments, "--bare", "--system-prompt", SYSTEM, task]


AGENTS: dict[str, type[Program]] = {
    "claude-code": BriefClaudeCode,
    "codex": Codex,
    "opencode": BriefOpenCode,
    "qwen-code": BriefQwenCode,
}


@pytest.fixture(scope="module")
def servers(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """One with lanes, and one without."""
    assert smollm2_gguf.is_file()
    with ExitStack() as stack:
        folders = [(lanes, tmp_path_factory.mktemp(f"lanes-{lanes}")) for lanes in ("on", "off")]
        yield [
            stack.enter_context(serving(folder, *SETTINGS, "--agent-sessions", lanes)).url for lanes, folder in folders
        ]


def went_on(exchanges: Sequence[Exchange], task: str) -> bool:
    """Whether an answer to a task was computed after all that came before, and no token of it again."""
    for at, later in enumerate(exchanges):
        before = [prompt + said - 1 for prompt, _, said in (earlier.tokens for earlier in exchanges[:at])]
        if json.dumps(task)[1:-1].encode() in later.body and later.tokens[1] in before:
            return True
    return False


@pytest.mark.timeout(4 * TIMEOUT)
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_hears_the_same_with_and_without(name: str, servers: list[str], tmp_path: Path) -> None:
    _, find, package = PROGRAMS[name]
    try:
        program = AGENTS[name](find(package))
    except NotInstalledError as error:
        pytest.skip(str(error))
    work, home = tmp_path / "work", tmp_path / "home"
    for each in (work, home):
        each.mkdir()
    with recording(servers[0]) as (url, exchanges):
        for ended in program.run(Place(work, home, url, MODEL, DIALECTS["qwen3"]), TASKS, TIMEOUT):
            assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(exchanges) >= len(TASKS)
    assert any(exchange.said[0].strip() for exchange in exchanges)
    for exchange in exchanges:
        other = exchange.asked_of(servers[1])
        assert exchange.said == other.said
        assert exchange.tokens[::2] == other.tokens[::2]
    for task in TASKS[1:]:
        assert went_on(exchanges, task), [exchange.tokens for exchange in exchanges]
