"""The agents and SDKs: how each is set up, told to work, and what a model must say to have it do so."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from installed import Client, of_npm, of_pypi
from scripted_agent import CONTEXT, Dialect

HERE: Final = Path(__file__).parent
TASKS: Final = (
    "First task: write `final text` for `draft` in notes.txt.",
    "Second task: say how many bytes it has.",
    "Third task: say what you did.",
)
BEFORE, AFTER = "a draft\n", "a final text\n"
SAID: Final = ("It is edited.", "It has 13.", "I edited it.")


@dataclass(frozen=True)
class Place:
    """Where an agent works: a folder with notes.txt, and a home folder, with nothing that others left there."""

    work: Path
    home: Path
    url: str
    model: str
    dialect: Dialect

    @property
    def notes(self) -> str:
        return str(self.work / "notes.txt")

    def call(self, name: str, **arguments: Any) -> str:
        """As the model writes it."""
        return self.dialect.call(name, **arguments)


@dataclass(frozen=True)
class Program:
    """Something that runs three turns, by a command for each or by one for all."""

    client: Client

    # Whether it lets the model call tools, and reads notes.txt by one of them.
    has_tools = True
    # Whether there is one command, which takes all tasks.
    at_once = False
    # Whether each request goes on from the tokens of the one before, in a lane.
    goes_on = False
    # Whether it has a connection for each command.
    connects = False

    def answers(self, place: Place) -> Sequence[Sequence[str]]:
        """What the model says to each task, the last answer of each from `SAID`."""
        raise NotImplementedError

    def environment(self, place: Place) -> dict[str, str]:
        """Variables, and whatever is to be written into files."""
        return {}

    def command(self, place: Place, task: str, *, again: bool) -> list[str]:
        """`again`: it goes on with its last conversation."""
        raise NotImplementedError

    def run(self, place: Place, tasks: Sequence[str], timeout: float) -> Iterator[subprocess.CompletedProcess[str]]:
        """Run a command for each task, in at most `timeout` seconds; gives what each ended with."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(place.home)} | self.environment(place)
        for task in tasks:
            yield subprocess.run(
                self.command(place, task, again=task != tasks[0]),
                cwd=place.work,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )


class ClaudeCode(Program):
    """On /v1/messages."""

    goes_on = True

    def answers(self, place: Place) -> Sequence[Sequence[str]]:
        edit = place.call("Edit", file_path=place.notes, old_string="draft", new_string="final text")
        count = place.call("Bash", command="wc -c notes.txt", description="Count bytes")
        return [[place.call("Read", file_path=place.notes), edit, SAID[0]], [count, SAID[1]], [SAID[2]]]

    def environment(self, place: Place) -> dict[str, str]:
        return {
            "ANTHROPIC_BASE_URL": place.url,
            "ANTHROPIC_API_KEY": "none",
            "ANTHROPIC_MODEL": place.model,
            "ANTHROPIC_SMALL_FAST_MODEL": place.model,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }

    def command(self, place: Place, task: str, *, again: bool) -> list[str]:
        allowed = ["--permission-mode", "acceptEdits", "--allowedTools", "Bash"]
        program = str(self.client.folder / "bin" / "claude.exe")
        return [program, "--print", *(["--continue"] if again else []), *allowed, "--", task]


class Codex(Program):
    """On /v1/responses, with its custom tool for patches."""

    goes_on = True

    def answers(self, place: Place) -> Sequence[Sequence[str]]:
        lines = [
            "*** Begin Patch",
            "*** Update File: notes.txt",
            "@@",
            "-a draft",
            "+a final text",
            "*** End Patch",
            "",
        ]
        edit = place.call("apply_patch", input="\n".join(lines))
        read, count = (place.call("exec_command", cmd=command) for command in ("cat notes.txt", "wc -c notes.txt"))
        return [[read, edit, SAID[0]], [count, SAID[1]], [SAID[2]]]

    def environment(self, place: Place) -> dict[str, str]:
        folder = place.home / ".codex"
        folder.mkdir(exist_ok=True)
        # Without an entry for its model it offers no tool for patches.
        entry = {
            "slug": place.model,
            "display_name": place.model,
            "supported_reasoning_levels": [{"effort": "low", "description": ""}],
            "shell_type": "shell_command",
            "visibility": "list",
            "supported_in_api": True,
            "priority": 1,
            "base_instructions": "You are a coding agent.",
            "supports_reasoning_summaries": True,
            "support_verbosity": True,
            "apply_patch_tool_type": "freeform",
            "truncation_policy": {"mode": "bytes", "limit": 10_000},
            "supports_parallel_tool_calls": True,
            "context_window": CONTEXT,
            "experimental_supported_tools": [],
            "input_modalities": ["text"],
        }
        (folder / "models.json").write_text(json.dumps({"models": [entry]}), "utf-8")
        settings = [
            f'model = "{place.model}"',
            'model_provider = "lmserve"',
            'model_reasoning_effort = "low"',
            f'model_catalog_json = "{folder}/models.json"',
            "[model_providers.lmserve]",
            'name = "lmserve"',
            f'base_url = "{place.url}/v1"',
            f"supports_websockets = {json.dumps(self.connects)}",
        ]
        (folder / "config.toml").write_text("\n".join(settings), "utf-8")
        return {}

    def command(self, place: Place, task: str, *, again: bool) -> list[str]:
        # Its own sandbox needs rights that a container may not have; what is run here is this file's.
        allowed = ["--skip-git-repo-check", "--sandbox", "danger-full-access"]
        program = str(self.client.folder / "bin" / "codex.js")
        return ["node", program, "exec", *allowed, *(["resume", "--last"] if again else []), task]


class CodexOnWebSocket(Codex):
    """On the WebSocket of /v1/responses."""

    connects = True


class OpenCode(Program):
    """On /v1/chat/completions."""

    goes_on = True

    def answers(self, place: Place) -> Sequence[Sequence[str]]:
        edit = place.call("edit", filePath=place.notes, oldString="draft", newString="final text")
        count = place.call("bash", command="wc -c notes.txt", description="Count bytes")
        return [[place.call("read", filePath=place.notes), edit, SAID[0]], [count, SAID[1]], [SAID[2]]]

    def environment(self, place: Place) -> dict[str, str]:
        provider = {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": f"{place.url}/v1"},
            "models": {place.model: {}},
        }
        settings = {"provider": {"lmserve": provider}, "model": f"lmserve/{place.model}"}
        (place.work / "opencode.json").write_text(json.dumps(settings), "utf-8")
        offline = ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD")
        return {f"OPENCODE_DISABLE_{name}": "1" for name in offline}

    def command(self, place: Place, task: str, *, again: bool) -> list[str]:
        program = str(self.client.folder / "bin" / "opencode.exe")
        return [program, "run", "--auto", *(["--continue"] if again else []), task]


class QwenCode(Program):
    """On /v1/chat/completions."""

    goes_on = True

    def answers(self, place: Place) -> Sequence[Sequence[str]]:
        edit = place.call("edit", file_path=place.notes, old_string="draft", new_string="final text")
        count = place.call("run_shell_command", command="wc -c notes.txt", is_background=False)
        return [[place.call("read_file", file_path=place.notes), edit, SAID[0]], [count, SAID[1]], [SAID[2]]]

    def environment(self, place: Place) -> dict[str, str]:
        return {"OPENAI_BASE_URL": f"{place.url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": place.model}

    def command(self, place: Place, task: str, *, again: bool) -> list[str]:
        program = str(self.client.folder.parents[1] / ".bin" / "qwen")
        return [program, "--auth-type", "openai", "--yolo", *(["--continue"] if again else []), task]


class Aider(Program):
    """On /v1/chat/completions, without tools: its model writes what is to be searched and replaced."""

    has_tools = False

    def answers(self, place: Place) -> Sequence[Sequence[str]]:
        lines = ["notes.txt", "```", "<<<<<<< SEARCH", "a draft", "=======", "a final text", ">>>>>>> REPLACE", "```"]
        return [["\n".join([SAID[0], "", *lines])], [SAID[1]], [SAID[2]]]

    def environment(self, place: Place) -> dict[str, str]:
        return {"OPENAI_API_BASE": f"{place.url}/v1", "OPENAI_API_KEY": "none"}

    def command(self, place: Place, task: str, *, again: bool) -> list[str]:
        quiet = ["--no-git", "--no-check-update", "--analytics-disable", "--no-show-model-warnings", "--no-pretty"]
        history = ["--restore-chat-history"] if again else []
        model = ["--model", f"openai/{place.model}", "--edit-format", "diff", "--yes-always"]
        program = str(self.client.folder / "bin" / "aider")
        return [program, *model, *quiet, *history, "--message", task, "notes.txt"]


class Sdk(Program):
    """Functions of a program of ours."""

    at_once = True

    def answers(self, place: Place) -> Sequence[Sequence[str]]:
        edit = place.call("edit_file", path=place.notes, old="draft", new="final text")
        read = place.call("read_file", path=place.notes)
        return [[read, edit, SAID[0]], [read, SAID[1]], [SAID[2]]]


class OpenAIAgents(Sdk):
    """Two turns whole, and one streamed."""

    route = ""

    def command(self, place: Place, task: str, *, again: bool) -> list[str]:
        program = [str(self.client.folder / "bin" / "python"), str(HERE / "openai_agents_turns.py")]
        return [*program, place.url, place.model, self.route, *TASKS]


class OpenAIAgentsOnResponses(OpenAIAgents):
    route = "responses"


class OpenAIAgentsOnChat(OpenAIAgents):
    route = "chat"


class AISdk(Sdk):
    """On /v1/chat/completions; two turns whole, and one streamed."""

    def command(self, place: Place, task: str, *, again: bool) -> list[str]:
        packages = str(self.client.folder.parents[1])
        return ["node", str(HERE / "ai_sdk_turns.mjs"), packages, place.url, place.model, *TASKS]


# By the names of their logs: what finds the package, and its name there.
PROGRAMS: Final[dict[str, tuple[type[Program], Any, str]]] = {
    "claude-code": (ClaudeCode, of_npm, "@anthropic-ai/claude-code"),
    "codex": (Codex, of_npm, "@openai/codex"),
    "codex-websocket": (CodexOnWebSocket, of_npm, "@openai/codex"),
    "opencode": (OpenCode, of_npm, "opencode-ai"),
    "qwen-code": (QwenCode, of_npm, "@qwen-code/qwen-code"),
    "aider": (Aider, of_pypi, "aider-chat"),
    "openai-agents-responses": (OpenAIAgentsOnResponses, of_pypi, "openai-agents"),
    "openai-agents-chat": (OpenAIAgentsOnChat, of_pypi, "openai-agents"),
    "ai-sdk": (AISdk, of_npm, "ai"),
}
