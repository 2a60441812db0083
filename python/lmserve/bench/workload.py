"""The workloads: prompts of chosen lengths from one seed, and how many clients send them at the same time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

# Each is one token, with the space before it, in the vocabularies of most models.
_TEXT: Final = """\
about after again another around base before between boat book brown can catch cause center chance change check clean
clear color common copy corn course cover cross cup dark day dead deal deep dinner direct door draw dress drive drop
during eat eight end enemy enough enter equal event every exact example expect fall far favor fear figure final fine
finger flow flower fly forward fresh full fun game general girl glass go good gray ground grow happen hat heat history
hold hole home horse hot hour how hundred hurry ice imagine instant job join jump just keep key kill knew lake lay lead
learn length let lift light list little located long lot loud main man many map mark market match mean measure meat
meet melody men metal milk minute modern moment month mouth much must need neighbor new noise north number object
office only operate original over page paint pair paragraph pass path pattern pay picture place play prepare press
probable property question radio reach ready reason record red rest ride river road root row say science seven share
sharp sheet shoe shoulder shout sing single sister slip smile snow soil soldier solution song space speak speed spot
square start stay steel story strange strong student study subject substance sudden suit swim tall teach tell than
thank then there these tone took tool top touch town train truck true try turn type under until value vary very voice
wall want watch weather week weight west wheel which whole whose wife wind wish word write wrong yard young
"""
WORDS: Final = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: what is new in it, and how many tokens the answer must have.

    It is sent when the turn before has ended, and not before `arrival` seconds of the run.
    """

    prompt: str
    output_tokens: int
    arrival: float = 0.0


# One turn, or several in which each builds on those before it.
Conversation = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the command line says of a run. None: the workload's own."""

    output_tokens: int | None = None
    requests: int | None = None
    turns: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of load. `concurrency`: how many conversations run at a time, one run for each number."""

    name: str
    description: str
    route: Literal["completions", "chat"]
    concurrency: tuple[int, ...]
    draw: Callable[[random.Random, int, Sizes], list[Conversation]]

    def conversations(self, seed: int, concurrency: int, sizes: Sizes) -> list[Conversation]:
        """The same for the same arguments; no two runs share a prompt, so that none finds another's in a cache."""
        source = random.Random(f"{seed} {self.name} {concurrency}")  # noqa: S311 - not a secret
        return self.draw(source, concurrency, sizes)


def text(source: random.Random, words: int) -> str:
    """So many words, drawn from `source`."""
    return " ".join(source.choices(WORDS, k=words))


def mixed_length(source: random.Random) -> int:
    """30 to 388, 142 on average."""
    return 30 + round(358 * source.betavariate(1.25, 2.75))


def _mixed(source: random.Random, concurrency: int, sizes: Sizes) -> list[Conversation]:
    count = sizes.requests or max(8, 3 * concurrency)
    output = sizes.output_tokens or 128
    return [(Turn(text(source, mixed_length(source)), output),) for _ in range(count)]


def _burst(source: random.Random, concurrency: int, sizes: Sizes) -> list[Conversation]:
    output = sizes.output_tokens or 32
    return [(Turn(text(source, mixed_length(source)), output),) for _ in range(sizes.requests or concurrency)]


def _shared_prefix(source: random.Random, _concurrency: int, sizes: Sizes) -> list[Conversation]:
    prefix = text(source, 1535)
    output = sizes.output_tokens or 64
    return [(Turn(f"{prefix} {text(source, 40)}", output),) for _ in range(sizes.requests or 32)]


def _long_prompt(source: random.Random, concurrency: int, sizes: Sizes) -> list[Conversation]:
    count = sizes.requests or max(3, 2 * concurrency)
    return [(Turn(text(source, 4000), sizes.output_tokens or 16),) for _ in range(count)]


def _prompt(source: random.Random, concurrency: int, sizes: Sizes) -> list[Conversation]:
    count = sizes.requests or max(3, 2 * concurrency)
    return [(Turn(text(source, 2000), sizes.output_tokens or 16),) for _ in range(count)]


def _agent(source: random.Random, _concurrency: int, sizes: Sizes) -> list[Conversation]:
    def conversation() -> Conversation:
        return tuple(Turn(text(source, 550), sizes.output_tokens or 48) for _ in range(sizes.turns or 20))

    return [conversation() for _ in range(sizes.requests or 1)]


def _chat(source: random.Random, concurrency: int, sizes: Sizes) -> list[Conversation]:
    def conversation() -> Conversation:
        turns = range(sizes.turns or 6)
        return tuple(Turn(text(source, source.randint(30, 90)), sizes.output_tokens or 64) for _ in turns)

    return [conversation() for _ in range(sizes.requests or concurrency)]


WORKLOADS: Final = {
    workload.name: workload
    for workload in (
        Workload(
            "mixed",
            "prompts of 30 to 388 tokens (142 on average), 128 output tokens each",
            "completions",
            (1, 8, 32),
            _mixed,
        ),
        Workload(
            "shared-prefix",
            "32 prompts of 40 tokens after the same first 1,535 tokens, 64 output tokens each",
            "completions",
            (8,),
            _shared_prefix,
        ),
        Workload("long-prompt", "prompts of 4,000 tokens, 16 output tokens each", "completions", (1,), _long_prompt),
        Workload("prompt", "prompts of 2,000 tokens, 16 output tokens each", "completions", (1,), _prompt),
        Workload(
            "agent",
            "a conversation of 20 turns, with 550 new tokens and 48 output tokens per turn: 12,000 tokens at its end",
            "chat",
            (1,),
            _agent,
        ),
        Workload(
            "chat",
            "conversations of 6 turns, one per client, with 30 to 90 new tokens and 64 output tokens per turn",
            "chat",
            (8,),
            _chat,
        ),
        Workload(
            "burst",
            "prompts as in mixed, all sent at the same moment, 32 output tokens each",
            "completions",
            (64,),
            _burst,
        ),
    )
}
