"""LLM, the offline face."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lmserve.engine.llm import LLM
from lmserve.engine.submission import SamplingParams, StopParams
from lmserve.errors import LmserveError
from scripted_core import ScriptedCore


@pytest.fixture
def core() -> Iterator[ScriptedCore]:
    core = ScriptedCore(max_queue=8)
    yield core
    core.shutdown(0)


def test_answers_come_in_the_order_of_the_prompts(core: ScriptedCore) -> None:
    prompts = [" ".join(["word"] * (1 + number % 5)) + f" [[pace {0.002 * (number % 3)}]]" for number in range(40)]
    answers = LLM(core).generate(prompts, stopping=StopParams(max_tokens=5))
    assert [answer.usage.prompt_tokens for answer in answers] == [len(prompt.split()) for prompt in prompts]
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert {answer.tokens for answer in answers} == {5}


def test_chat_and_token_ids(core: ScriptedCore) -> None:
    llm = LLM(core)
    conversation = [{"role": "user", "content": "Hi"}]
    (answer,) = llm.chat([conversation], SamplingParams(temperature=0))
    assert answer.text.startswith("Hi there")
    assert core.submitted[-1]["input"] == {"type": "messages", "messages": conversation}
    assert core.submitted[-1]["sampling"] == {"temperature": 0}
    llm.generate([[1, 2, 3]])
    assert core.submitted[-1]["input"] == {"type": "tokens", "ids": [1, 2, 3]}
    assert llm.generate([]) == []


@pytest.mark.parametrize("directive", ["[[fail early]]", "[[fail late]]", "[[refuse 400 invalid_value]]"])
def test_a_failure_ends_the_others(core: ScriptedCore, directive: str) -> None:
    llm = LLM(core)
    with pytest.raises(LmserveError):
        llm.generate(["[[hold]]", directive])
    assert llm.generate(["x"])[0].text
    assert core.aborts == 1


def test_close_ends_the_engine() -> None:
    core = ScriptedCore()
    with LLM(core) as llm:
        llm.generate(["x"])
    with pytest.raises(LmserveError, match="stopping"):
        llm.generate(["x"])
