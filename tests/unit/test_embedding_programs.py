"""The programs of docs/embedding.md run as they stand, and do what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "embedding.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def run(marker: str) -> dict[str, Any]:
    (program,) = [program for program in PROGRAMS if marker in program]
    assert len(program.splitlines()) < 40
    names: dict[str, Any] = {}
    exec(compile(program, PAGE.name, "exec"), names)
    return names


def test_the_toy_model_answers_as_its_whole_history_does(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("memory[step.slots]")
    lines = capsys.readouterr().out.splitlines()

    def answer(history: list[int]) -> list[int]:
        tokens = list(history)
        for _ in range(8):
            tokens.append(sum(tokens) % 97)
        return tokens[len(history) :]

    first = [1, 2, 3, *answer([1, 2, 3])]
    second = [*first, 4, 5]
    assert lines == [
        f"{first[3:]} length 0 cached",
        f"{answer(second)} length 10 cached",
        f"{answer([9])} length 0 cached",
    ]
    assert names["scheduler"].session_tokens(1) == second + answer(second)
    assert names["scheduler"].stats()["owned_blocks"] == 0


def test_the_transformers_model_answers_as_it_does_alone(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    names = run("DynamicCache")
    answers: dict[int, list[int]] = {1: [], 2: [], 3: []}
    ended = set()
    for line in capsys.readouterr().out.splitlines():
        request, token, *reason = line.split()
        answers[int(request)].append(int(token))
        ended |= {int(request)} if reason == ["length"] else set()
    assert ended == {1, 2, 3}
    for request, prompt in {1: [1, 2, 3], 2: [4, 5, 6, 7, 8], 3: [9]}.items():
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.inference_mode():
                token = names["model"](ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None, None]], 1)
        assert answers[request] == ids[0, len(prompt) :].tolist()


def test_the_offline_face_answers(smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smollm2_gguf.is_file()
    run("with LLM(")
    first, rest = capsys.readouterr().out.split("\n", 1)
    assert first == "The capital of Japan is Tokyo. 8"
    assert rest
