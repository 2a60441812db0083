"""Conversations that agents send whole in each request: gone on with token for token, where a header names them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from typing import Any, Protocol

import httpx
import numpy as np
import pytest
from conftest import MODEL, serve_core
from lmserve import _core
from lmserve.engine.text import TextLayer
from lmserve.keys import Keyring
from tiny_engine import BLOCK, EOS, PLAIN, TEMPLATE, FormulaRunner, byte_tokenizer, chat_template

START = 256  # <|im_start|>
THOUGHTS = "\nHm, what is there to read?\n</think>\n\n"
CALL = '<tool_call>\n{"name": "read_file", "arguments": {"path": "a.txt", "lines": [1, 2]}}\n</tool_call>'
# Thoughts are opened by the template, which shows none of earlier answers, as Qwen3's.
THINKING = TEMPLATE.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>{%")
# What an agent's model says in three turns.
ANSWERS = [f"Let me look.\n{CALL}", "It says five.", "You are welcome."]
PARAMETERS = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "lines": {"type": "array"},
        "whole": {"type": "boolean", "default": False},
    },
    "required": ["path"],
}


class AnsweringRunner(FormulaRunner):
    """Says one text in its first answer, another one in its second. It sees which it is in the tokens before."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__()
        self._answers = [[*answer.encode(), EOS] for answer in answers]
        self._memory = np.zeros(self.info.num_blocks * BLOCK, np.int32)

    def next_tokens(self, n_tokens: int, n_seqs: int, n_rows: int) -> Any:
        b = self.buffers
        self._memory[b.slots[:n_tokens]] = b.token_ids[:n_tokens]
        sequences = np.searchsorted(b.query_start[1 : n_seqs + 1], b.sample_rows[:n_rows], side="right")
        return np.array([self._next(sequence) for sequence in sequences], np.int32)

    def _next(self, sequence: int) -> int:
        length = self.buffers.context_lens[sequence]
        slots = (self.buffers.block_tables[sequence, :, None] * BLOCK + np.arange(BLOCK)).ravel()[:length]
        said = bytes(np.where(self._memory[slots] < START, self._memory[slots], 0).astype(np.uint8))
        begins = [
            at for at in np.flatnonzero(self._memory[slots] == START) if said[at + 1 :].startswith(b"assistant\n")
        ]
        answer = self._answers[min(len(begins), len(self._answers)) - 1]
        prompt = len("<assistant\n") + len(b"<think>") * said[begins[-1] + 11 :].startswith(b"<think>")
        return answer[min(int(length - begins[-1] - prompt), len(answer) - 1)]


@contextmanager
def server(runner: Any, template: str = TEMPLATE, **options: Any) -> Iterator[str]:
    core = _core.Engine(runner, byte_tokenizer(), chat_template(template), eos_token_ids=[EOS])
    with serve_core(core, TextLayer(byte_tokenizer(), chat_template(template)), **options) as running:
        yield running.url


class Agent(Protocol):
    """A program that keeps its conversation itself."""

    route: str
    headers: dict[str, str]

    def body(self, stream: bool) -> dict[str, Any]: ...
    def hear(self, reply: httpx.Response, stream: bool) -> dict[str, Any]:
        """Takes the answer into the conversation, and calls what it calls. Returns text, calls and usage."""

    def say(self, text: str) -> None: ...


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in data if line != "[DONE]"]


class ClaudeCode:
    """Anthropic's messages: a system prompt in parts, a billing line, cache marks that move on, tool results."""

    route = "/v1/messages"

    def __init__(self) -> None:
        self.headers = {"x-claude-code-session-id": "0b1c3a52-5a9e-4a51-b7a4-6f0f3f0f5d11", "anthropic-version": "1"}
        self.messages: list[dict[str, Any]] = []
        self.requests = 0

    def say(self, text: str) -> None:
        reminder = {"type": "text", "text": "<system-reminder>The date is fixed.</system-reminder>\n"}
        self.messages.append({"role": "user", "content": [reminder, {"type": "text", "text": text}]})

    def body(self, stream: bool) -> dict[str, Any]:
        self.requests += 1
        messages = deepcopy(self.messages)
        messages[-1]["content"][-1]["cache_control"] = {"type": "ephemeral"}
        billing = f"x-anthropic-billing-header: cc_version=2.1.1; cch={self.requests:05x};"
        return {
            "model": MODEL,
            "max_tokens": 32000,
            "temperature": 1 if self.requests == 0 else 0,
            "stream": stream,
            "system": [
                {"type": "text", "text": billing},
                {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
            ],
            "messages": messages,
            "tools": [{"name": "read_file", "description": "Reads.", "input_schema": PARAMETERS}],
            "metadata": {"user_id": "user_x_account__session_0b1c3a52"},
            "thinking": {"type": "adaptive"},
        }

    def hear(self, reply: httpx.Response, stream: bool) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        usage: dict[str, Any] = {}
        if not stream:
            content, usage = reply.json()["content"], reply.json()["usage"]
        for event in events(reply) if stream else ():
            if event["type"] == "content_block_start":
                content.append(event["content_block"] | {"json": ""})
            elif event["type"] == "content_block_delta":
                for kind, field in (("text", "text"), ("thinking", "thinking"), ("partial_json", "json")):
                    content[-1][field] = content[-1].get(field, "") + event["delta"].get(kind, "")
            elif event["type"] == "message_delta":
                usage = event["usage"]
        for block in content:
            arguments = block.pop("json", None)
            if block["type"] == "tool_use":
                # It adds what the schema has as defaults.
                block["input"] = {"whole": False} | (json.loads(arguments) if arguments else block["input"])
                for field in ("text", "thinking"):
                    block.pop(field, None)
        # Thoughts are sent back with a signature.
        self.messages.append({"role": "assistant", "content": content})
        calls = [block for block in content if block["type"] == "tool_use"]
        if calls:
            results = [{"type": "tool_result", "tool_use_id": call["id"], "content": "five"} for call in calls]
            self.messages.append({"role": "user", "content": results})
        text = "".join(block.get("text", "") for block in content if block["type"] == "text")
        cached = usage["cache_read_input_tokens"]
        return {"text": text, "calls": calls, "cached": cached, "prompt": usage["input_tokens"] + cached} | {
            "said": usage["output_tokens"]
        }


class Codex:
    """OpenAI's responses: nothing stored, all items in each request, the reasoning without its words."""

    route = "/v1/responses"

    def __init__(self) -> None:
        self.headers = {"session-id": "0199c0de-0000-7000-8000-000000000001", "originator": "codex_cli_rs"}
        self.items: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        self.items.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]})

    def body(self, stream: bool) -> dict[str, Any]:
        return {
            "model": MODEL,
            "instructions": "You are Codex.",
            "input": self.items,
            "tools": [{"type": "function", "name": "read_file", "strict": False, "parameters": PARAMETERS}],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": stream,
            "temperature": 0,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": self.headers["session-id"],
        }

    def hear(self, reply: httpx.Response, stream: bool) -> dict[str, Any]:
        response = events(reply)[-1]["response"] if stream else reply.json()
        text, calls = "", []
        for item in response["output"]:
            if item["type"] == "reasoning":
                self.items.append({"type": "reasoning", "id": item["id"], "summary": [], "encrypted_content": None})
                continue
            self.items.append(item)
            if item["type"] == "message":
                text += "".join(part["text"] for part in item["content"])
            else:
                calls.append(item)
        for call in calls:
            output = {"type": "function_call_output", "call_id": call["call_id"], "output": "five"}
            self.items.append(output)
        usage = response["usage"]
        return {"text": text, "calls": calls, "said": usage["output_tokens"], "prompt": usage["input_tokens"]} | {
            "cached": usage["input_tokens_details"]["cached_tokens"]
        }


class OpenCode:
    """Chat completions by the AI SDK: text trimmed, calls with arguments as text, no thoughts."""

    route = "/v1/chat/completions"

    def __init__(self) -> None:
        self.headers = {"x-session-affinity": "ses_6e1f0c2affeZQ"}
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": "You are an agent."}]

    def say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def body(self, stream: bool) -> dict[str, Any]:
        function = {"name": "read_file", "description": "Reads.", "parameters": PARAMETERS}
        return {
            "model": MODEL,
            "messages": self.messages,
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "auto",
            "max_tokens": 32000,
            "temperature": 0,
            "stream": stream,
        } | ({"stream_options": {"include_usage": True}} if stream else {})

    def hear(self, reply: httpx.Response, stream: bool) -> dict[str, Any]:
        text, calls = "", []
        if stream:
            chunks = events(reply)
            usage = chunks[-1]["usage"]
            for delta in (chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]):
                text += delta.get("content") or ""
                for call in delta.get("tool_calls", ()):
                    if "id" in call:
                        calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
                    else:
                        calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        else:
            message, usage = reply.json()["choices"][0]["message"], reply.json()["usage"]
            text, calls = message["content"] or "", message.get("tool_calls") or []
        said: dict[str, Any] = {"role": "assistant", "content": self.spoken(text)}
        self.messages.append(said | ({"tool_calls": calls} if calls else {}))
        self.messages += [{"role": "tool", "tool_call_id": call["id"], "content": "five"} for call in calls]
        return {"text": text, "calls": calls, "said": usage["completion_tokens"], "prompt": usage["prompt_tokens"]} | {
            "cached": usage["prompt_tokens_details"]["cached_tokens"]
        }

    def spoken(self, text: str) -> Any:
        return text.strip()


class QwenCode(OpenCode):
    """Chat completions by OpenAI's SDK: texts in parts with cache marks, null for no words, and no name."""

    def __init__(self) -> None:
        super().__init__()
        self.headers = {"user-agent": "QwenCode/0.15.10 (linux; x64)"}

    def say(self, text: str) -> None:
        part = {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}
        self.messages.append({"role": "user", "content": [part]})

    def spoken(self, text: str) -> Any:
        return text or None


AGENTS = [ClaudeCode, Codex, OpenCode, QwenCode]


def ask(client: httpx.Client, agent: Agent, *, stream: bool = True, named: bool = True) -> dict[str, Any]:
    headers = agent.headers if named else {}
    body = agent.body(stream) if named else agent.body(stream) | {"prompt_cache_key": None}
    if not named and agent.route == "/v1/messages":
        del body["prompt_cache_key"]
    reply = client.post(agent.route, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return agent.hear(reply, stream)


def before(reply: dict[str, Any]) -> int:
    """Tokens of a conversation after an answer that ended by itself: its last token is not part of it."""
    return reply["prompt"] + reply["said"] - 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", AGENTS)
def test_an_agent_computes_only_what_is_new(kind: type[Agent], stream: bool) -> None:
    said = []
    for enabled in (True, False):
        with server(AnsweringRunner(ANSWERS), agent_sessions=enabled) as url, httpx.Client(base_url=url) as client:
            agent = kind()
            agent.say("What is in a.txt?")
            replies = [ask(client, agent, stream=stream)]
            assert [call.get("name") or call["function"]["name"] for call in replies[0]["calls"]] == ["read_file"]
            replies.append(ask(client, agent, stream=stream))
            agent.say("Thank you.")
            replies.append(ask(client, agent, stream=stream))
            said.append([(reply["text"], len(reply["calls"])) for reply in replies])
            if enabled:
                assert replies[0]["cached"] == 0
                for earlier, later in pairwise(replies):
                    assert later["cached"] == before(earlier)
    assert said[0] == said[1]
    assert [text.strip() for text, _ in said[0]] == ["Let me look.", *ANSWERS[1:]]


@pytest.mark.parametrize("kind", AGENTS)
def test_thoughts_that_a_template_leaves_out_are_kept(kind: type[Agent]) -> None:
    answers = [THOUGHTS + answer for answer in ANSWERS]
    for named in (True, False):
        with server(AnsweringRunner(answers), THINKING) as url, httpx.Client(base_url=url) as client:
            agent = kind()
            agent.say("What is in a.txt?")
            replies = [ask(client, agent, named=named), ask(client, agent, named=named)]
            agent.say("Thank you.")
            replies.append(ask(client, agent, named=named))
            for earlier, later in pairwise(replies):
                # Without a name the thoughts are gone, and all behind them is computed again.
                assert (later["cached"] == before(earlier)) == named
            assert [reply["text"].strip() for reply in replies] == ["Let me look.", *ANSWERS[1:]]


def chat(client: httpx.Client, messages: list[dict[str, Any]], lane: str | None, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 24, **fields}
    headers = {} if lane is None else {"x-session-id": lane}
    reply = client.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(reply: dict[str, Any]) -> str:
    return reply["choices"][0]["message"]["content"]


def cached(reply: dict[str, Any]) -> int:
    return reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answered(messages: list[dict[str, Any]], reply: dict[str, Any], *more: dict[str, Any]) -> list[dict[str, Any]]:
    return [*messages, {"role": "assistant", "content": text_of(reply)}, *more]


@pytest.fixture(scope="module")
def plain() -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """A server with lanes, and one without."""
    with (
        server(FormulaRunner(said=PLAIN)) as first,
        server(FormulaRunner(said=PLAIN), agent_sessions=False) as second,
        httpx.Client(base_url=first) as with_lanes,
        httpx.Client(base_url=second) as without,
    ):
        yield with_lanes, without


def test_greedy_text_is_the_same_with_and_without(plain: tuple[httpx.Client, httpx.Client]) -> None:
    with_lanes, without = plain
    messages = [{"role": "system", "content": "Be brief."}, user("one")]
    total = 0
    for turn in range(8):
        # Answers that end by themselves, and answers that are cut off.
        fields = {"max_tokens": 300 if turn % 2 else 24}
        replies = [chat(client, messages, "greedy", **fields) for client in plain]
        assert text_of(replies[0]) == text_of(replies[1])
        assert replies[0]["usage"]["prompt_tokens"] == replies[1]["usage"]["prompt_tokens"]
        assert cached(replies[0]) == total
        total = replies[0]["usage"]["total_tokens"] - 1
        messages = answered(messages, replies[0], user(f"and {turn}?"))
    assert with_lanes.base_url != without.base_url


def test_a_fork_goes_on_from_the_last_common_turn_and_harms_neither_branch(
    plain: tuple[httpx.Client, httpx.Client],
) -> None:
    with_lanes, without = plain
    root = [user("tell")]
    first = chat(with_lanes, root, "fork")
    second = chat(with_lanes, answered(root, first, user("more")), "fork")
    trunk = answered(root, first, user("more"))
    branches = [answered(trunk, second, user("left")), answered(root, first, user("right"))]
    for _ in range(3):
        for at, branch in enumerate(branches):
            reply = chat(with_lanes, branch, "fork")
            assert text_of(reply) == text_of(chat(without, branch, None))
            # All but the last message, and what the template writes before it, were there.
            assert cached(reply) >= reply["usage"]["prompt_tokens"] - 64
            branches[at] = answered(branch, reply, user(f"on {at}"))
    # An answer that the client has changed is not what was said.
    changed = [*trunk, {"role": "assistant", "content": "Something else."}, user("left")]
    assert text_of(chat(with_lanes, changed, "fork")) == text_of(chat(without, changed, None))


def test_tools_and_variables_are_part_of_a_conversation(plain: tuple[httpx.Client, httpx.Client]) -> None:
    with_lanes, without = plain
    root = [user("tools")]
    messages = answered(root, chat(with_lanes, root, "tools"), user("more"))
    tools = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
    for fields in ({"tools": tools}, {"chat_template_kwargs": {"enable_thinking": False}}):
        reply = chat(with_lanes, messages, "tools", **fields)
        expected = chat(without, messages, None, **fields)
        assert reply["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
        assert text_of(reply) == text_of(expected)


def test_what_is_more_than_a_turn_goes_without(plain: tuple[httpx.Client, httpx.Client]) -> None:
    with_lanes, without = plain
    root = [user("scored")]
    messages = answered(root, chat(with_lanes, root, "scored"), user("more"))
    for fields in ({"n": 2}, {"prompt_logprobs": 1}):
        replies = [chat(client, messages, "scored", **fields) for client in (with_lanes, without)]
        assert [choice["message"] for choice in replies[0]["choices"]] == [
            choice["message"] for choice in replies[1]["choices"]
        ]
    open_answer = {"messages": [*root, {"role": "assistant", "content": "It "}], "continue_final_message": True}
    replies = [chat(client, lane="scored", **open_answer) for client in (with_lanes, without)]  # type: ignore[arg-type]
    assert text_of(replies[0]) == text_of(replies[1])


def test_an_answer_that_a_stop_string_cut_is_asked_anew(plain: tuple[httpx.Client, httpx.Client]) -> None:
    with_lanes, without = plain
    root = [user("stop here")]
    said = text_of(chat(without, root, None))
    reply = chat(with_lanes, root, "stop", stop=[said[4:6]])
    messages = answered(root, reply, user("more"))
    replies = [chat(client, messages, "stop") for client in (with_lanes, without)]
    assert text_of(replies[0]) == text_of(replies[1])
    assert replies[0]["usage"]["prompt_tokens"] == replies[1]["usage"]["prompt_tokens"]


def test_a_lane_is_never_busy(plain: tuple[httpx.Client, httpx.Client]) -> None:
    with_lanes, without = plain
    root = [user("many")]
    messages = answered(root, chat(with_lanes, root, "many"), user("more"))
    expected = text_of(chat(without, messages, None, max_tokens=200))
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda _: chat(with_lanes, messages, "many", max_tokens=200), range(48)))
    assert {text_of(reply) for reply in replies} == {expected}


def test_a_name_that_is_none_is_ignored_and_a_key_of_the_body_is_one(
    plain: tuple[httpx.Client, httpx.Client],
) -> None:
    with_lanes, without = plain
    root = [user("named")]
    for client, key, ignored in ((with_lanes, "k", None), (with_lanes, "", None), (without, "k", "prompt_cache_key")):
        body = {"model": MODEL, "messages": root, "max_tokens": 4, "prompt_cache_key": key}
        for header in ({}, {"x-session-id": ""}, {"x-session-id": "x" * 257}):
            reply = client.post("/v1/chat/completions", json=body, headers=header)
            assert reply.status_code == 200
            assert reply.headers.get("x-lmserve-ignored") == ignored
    first = chat(with_lanes, root, None, prompt_cache_key="body")
    messages = answered(root, first, user("more"))
    # White space at an end is lost in many clients, and the answer is the same.
    messages[1]["content"] = f"\n{messages[1]['content']} "
    reply = chat(with_lanes, messages, None, prompt_cache_key="body")
    assert cached(reply) == first["usage"]["total_tokens"] - 1


def test_two_keys_never_meet() -> None:
    keys = Keyring.of("sk-first", "sk-second")
    with server(FormulaRunner(said=PLAIN), keys=keys) as url:
        clients = [
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) for key in ("sk-first", "sk-second")
        ]
        root = [user("mine")]
        first = chat(clients[0], root, "shared")
        messages = answered(root, first, user("more"))
        # The second key knows the words, the name and the answer, and finds nothing.
        assert cached(chat(clients[1], messages, "shared")) == 0
        assert cached(chat(clients[0], messages, "shared")) == first["usage"]["total_tokens"] - 1
        for client in clients:
            client.close()


def test_lanes_are_counted(plain: tuple[httpx.Client, httpx.Client]) -> None:
    with_lanes, _ = plain
    chat(with_lanes, [user("counted")], "counted")
    (line,) = [line for line in with_lanes.get("/metrics").text.splitlines() if line.startswith("lmserve_lanes{")]
    assert int(line.split()[-1]) >= 1
