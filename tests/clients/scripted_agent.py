"""A model that plays a script for agents: it thinks, calls the tools that it is told to, and says when it is done.

It is a runner behind the real core: its prompts come through route, template and tokenizer, and its answers go through
detokenizer, parser and wire form, as those of any model do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from lmserve import _core
from lmserve.engine.text import TextLayer
from lmserve.model.interface import I32
from tiny_engine import BLOCK, EOS, FormulaRunner, byte_tokenizer, chat_template

# The prompts of agents are large, and a token is a byte here.
CONTEXT: Final = 400_000
BEGIN: Final = 256  # <|im_start|>
HEADER: Final = b"assistant\n"
NO_THOUGHTS: Final = b"<think>\n\n</think>\n\n"
THOUGHTS: Final = b"<think>\nLet me see.\n</think>\n\n"
RESULT: Final = "<tool_response>\n"
TEMPLATES: Final = Path(__file__).parents[1] / "unit" / "templates"


@dataclass(frozen=True)
class Dialect:
    """How a model writes: a published chat template, and calls as it has the model write them."""

    template: str
    # In the prompt, where there are tools.
    tools: str
    thoughts: bytes
    write: Callable[[str, dict[str, Any]], str]

    def call(self, name: str, **arguments: Any) -> str:
        return self.write(name, arguments)

    def text_layer(self) -> TextLayer:
        """The server's own view of its texts."""
        return TextLayer(byte_tokenizer(), self.chat_template())

    def chat_template(self) -> _core.ChatTemplate:
        return chat_template((TEMPLATES / self.template).read_text("utf-8"))


def in_json(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def in_tags(name: str, arguments: dict[str, Any]) -> str:
    """A text stands as it is."""
    lines = ["<tool_call>", f"<function={name}>"]
    for key, value in arguments.items():
        lines += [f"<parameter={key}>", value if isinstance(value, str) else json.dumps(value), "</parameter>"]
    return "\n".join([*lines, "</function>", "</tool_call>"])


DIALECTS: Final = {
    "qwen3": Dialect("qwen3.jinja", "<tools>\n{", THOUGHTS, in_json),
    "qwen3-coder": Dialect("qwen3-coder.jinja", "<tools>\n<function>", b"", in_tags),
}


@dataclass
class Asked:
    """A prompt that was answered."""

    prompt: str
    answer: str

    @property
    def results(self) -> list[str]:
        """What tools gave in the whole conversation, oldest first."""
        parts = self.prompt.split(RESULT)[1:]
        return [part.partition("\n</tool_response>")[0] for part in parts]


@dataclass
class Script:
    """What the model says: to each task, the answers in their order, one more for each result of a tool."""

    dialect: Dialect
    tasks: dict[str, Sequence[str]]
    # Said to prompts without tools, which agents send for titles and summaries; None: these are answered as all are.
    aside: str | None = "Notes"
    asked: list[Asked] = field(default_factory=list)

    def answer(self, prompt: str) -> str:
        """To a prompt, up to the answer's header."""
        said = self._chosen(prompt)
        self.asked.append(Asked(prompt, said))
        return said

    def lengths(self, answer: str) -> set[int]:
        """Tokens of an answer with its thoughts, or without, and with its end."""
        return {len(thoughts + answer.encode()) + 1 for thoughts in (self.dialect.thoughts, NO_THOUGHTS)}

    def _chosen(self, prompt: str) -> str:
        places = {task: prompt.rfind(task) for task in self.tasks}
        task = max(places, key=places.__getitem__)
        if places[task] < 0 or (self.aside is not None and self.dialect.tools not in prompt):
            return self.aside or "Yes."
        answers = self.tasks[task]
        return answers[min(prompt.count(RESULT, places[task]), len(answers) - 1)]


class AgentRunner(FormulaRunner):
    """Says what its script has for the prompt. It sees how far it has come in the tokens that it was given."""

    def __init__(self, script: Script) -> None:
        super().__init__(max_batch=16, max_batch_tokens=8192, max_model_len=CONTEXT, num_blocks=6 * CONTEXT // BLOCK)
        self._script = script
        self._memory = np.zeros(self.info.num_blocks * BLOCK, np.int32)
        self._answers: dict[int, bytes] = {}

    def next_tokens(self, n_tokens: int, n_seqs: int, n_rows: int) -> I32:
        b = self.buffers
        self._memory[b.slots[:n_tokens]] = b.token_ids[:n_tokens]
        sequences = np.searchsorted(b.query_start[1 : n_seqs + 1], b.sample_rows[:n_rows], side="right")
        return np.array([self._next(sequence) for sequence in sequences], np.int32)

    def _next(self, sequence: int) -> int:
        length = self.buffers.context_lens[sequence]
        blocks = self.buffers.block_tables[sequence, : -(-length // BLOCK), None]
        tokens = self._memory[(blocks * BLOCK + np.arange(BLOCK)).ravel()[:length]]
        begin = int(np.nonzero(tokens == BEGIN)[0][-1])
        said = tokens[begin + 1 + len(HEADER) :]
        answer = self._answer(tokens[:begin], text_of(said[: len(NO_THOUGHTS)]) == NO_THOUGHTS)
        return answer[len(said)] if len(said) < len(answer) else EOS

    def _answer(self, prompt: I32, without_thoughts: bool) -> bytes:
        key = hash(prompt.tobytes())
        if key not in self._answers:
            said = self._script.answer(text_of(prompt).decode("utf-8", "replace"))
            thoughts = NO_THOUGHTS if without_thoughts else self._script.dialect.thoughts
            self._answers[key] = thoughts + said.encode()
        return self._answers[key]


def text_of(tokens: I32) -> bytes:
    """The bytes, without special tokens."""
    return tokens[tokens < BEGIN].astype(np.uint8).tobytes()


def agent_engine(script: Script) -> _core.Engine:
    """The real core over such a model."""
    return _core.Engine(AgentRunner(script), byte_tokenizer(), script.dialect.chat_template(), eos_token_ids=[EOS])
