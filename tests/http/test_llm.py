"""LLM, the offline face."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lmserve.config import ConfigError
from lmserve.engine.llm import LLM
from lmserve.engine.submission import Regex, SamplingParams, StopParams
from lmserve.errors import LmserveError
from scripted_core import ScriptedCore


@pytest.fixture
def core() -> Iterator[ScriptedCore]:
    core = ScriptedCore(max_queue=8)
    yield core
    core.shutdown(0)


def test_answers_come_in_the_order_of_the_prompts(core: ScriptedCore) -> None:
    prompts = [" ".join(["word"] * (1 + number % 5)) + f" [[pace {0.002 * (number % 3)}]]" for number in range(40)]
    answers = LLM.over(core).generate(prompts, stopping=StopParams(max_tokens=5))
    assert [answer.usage.prompt_tokens for answer in answers] == [len(prompt.split()) for prompt in prompts]
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert {answer.tokens for answer in answers} == {5}


def test_chat_and_token_ids(core: ScriptedCore) -> None:
    llm = LLM.over(core)
    conversation = [{"role": "user", "content": "Hi"}]
    (answer,) = llm.chat([conversation], SamplingParams(temperature=0))
    assert answer.text.startswith("Hi there")
    assert core.submitted[-1]["input"] == {"type": "messages", "messages": conversation}
    assert core.submitted[-1]["sampling"] == {"temperature": 0}
    llm.generate([[1, 2, 3]])
    assert core.submitted[-1]["input"] == {"type": "tokens", "ids": [1, 2, 3]}
    assert llm.generate([]) == []


@pytest.mark.parametrize("directive", ["[[fail early]]", "[[fail late]]", "[[refuse 400 invalid_value]]"])
def test_a_failure_can_end_the_others(core: ScriptedCore, directive: str) -> None:
    llm = LLM.over(core)
    with pytest.raises(LmserveError):
        llm.generate(["[[hold]]", directive], on_error="raise")
    assert llm.generate(["x"])[0].text
    assert core.aborts == 1


def test_close_ends_the_engine() -> None:
    core = ScriptedCore()
    with LLM.over(core) as llm:
        llm.generate(["x"])
    with pytest.raises(LmserveError, match="stopping"):
        llm.generate(["x"])


def test_one_string_one_list_of_ids_and_one_conversation_are_one_prompt(core: ScriptedCore) -> None:
    llm = LLM.over(core)
    assert len(llm.generate("Once upon a time")) == 1
    assert core.submitted[-1]["input"] == {"type": "text", "text": "Once upon a time"}
    assert len(llm.generate([1, 2, 3])) == 1
    assert core.submitted[-1]["input"] == {"type": "tokens", "ids": [1, 2, 3]}
    conversation = [{"role": "user", "content": "Hi"}]
    assert len(llm.chat(conversation)) == 1
    assert core.submitted[-1]["input"] == {"type": "messages", "messages": conversation}


@pytest.mark.parametrize("directive", ["[[fail early]]", "[[fail late]]", "[[refuse 400 invalid_value]]"])
def test_a_prompt_fails_alone(core: ScriptedCore, directive: str) -> None:
    first, second, third = LLM.over(core).generate(["a b c", directive, "d e f"])
    assert (first.error, third.error) == (None, None)
    assert first.text
    assert third.text
    assert isinstance(second.error, LmserveError)
    assert (second.text, second.finish_reason, second.usage) == ("", "error", None)


@pytest.mark.parametrize("directive", ["[[fail early]]", "[[fail late]]", "[[refuse 400 invalid_value]]"])
def test_a_failure_of_all_is_raised_or_kept(core: ScriptedCore, directive: str) -> None:
    llm = LLM.over(core)
    for prompts in (directive, [directive], [directive, directive]):
        with pytest.raises(LmserveError):
            llm.generate(prompts)
        kept = llm.generate(prompts, on_error="keep")
        assert [answer.finish_reason for answer in kept] == ["error"] * len(kept)
        assert isinstance(kept[0].error, LmserveError)


def test_an_answer_as_it_comes_is_the_whole_one(core: ScriptedCore) -> None:
    llm = LLM.over(core)
    pieces = list(llm.stream("a b c d", stopping=StopParams(max_tokens=4)))
    assert len(pieces) > 1
    assert "".join(pieces) == llm.generate("a b c d", stopping=StopParams(max_tokens=4))[0].text
    stream = llm.stream([{"role": "user", "content": "[[pace 0.01]] Hi"}])
    assert next(stream)
    stream.close()
    assert core.aborts == 1
    with pytest.raises(LmserveError):
        list(llm.stream("a b [[fail late]]"))


def test_answers_of_one_prompt(core: ScriptedCore) -> None:
    first, second = LLM.over(core).generate(["a b", "c"], stopping=StopParams(max_tokens=3), n=3)
    assert core.submitted[-1]["n"] == 3
    for answer in (first, second):
        assert [other.tokens for other in answer.alternatives] == [3, 3]
    assert first.token_ids == (0, 1, 2)
    assert first.prompt_token_ids == (0, 1)
    assert second.prompt_token_ids == (0,)


def test_guides_and_progress(core: ScriptedCore, capsys: pytest.CaptureFixture[str]) -> None:
    LLM.over(core).generate(["a", "b"], guide=Regex("[0-9]+"), progress=True)
    assert core.submitted[-1]["guide"] == {"type": "regex", "pattern": "[0-9]+"}
    assert capsys.readouterr().err.endswith("\r2 of 2 answers\n")


def test_a_model_by_path_with_sizes_as_text(smollm2_gguf: Path) -> None:
    with LLM(smollm2_gguf, kv_memory="64MiB", threads=1, max_batch=4) as llm:
        question = [{"role": "user", "content": "What is the capital of Japan?"}]
        (answer,) = llm.chat(question, SamplingParams(temperature=0))
        assert "Tokyo" in answer.text
        assert answer.usage is not None
        assert answer.usage.completion_tokens == answer.tokens
        ids = llm.tokenizer.encode("Hello")
        assert llm.generate(ids, stopping=StopParams(max_tokens=2))[0].usage.prompt_tokens == len(ids)
        prompt, sampling = llm.tokenizer.encode("The capital of France is"), SamplingParams(temperature=0, logprobs=3)
        (likely,) = llm.generate(prompt, sampling, StopParams(max_tokens=4))
        assert likely.prompt_token_ids == tuple(prompt)
        assert likely.text == llm.tokenizer.decode(list(likely.token_ids))
        assert likely.logprobs is not None
        assert [entry.token_id for entry in likely.logprobs] == list(likely.token_ids)
        for entry in likely.logprobs:
            assert len(entry.top) == 3
            assert next(iter(entry.top.items())) == (entry.token_id, entry.logprob)
        seeded = SamplingParams(temperature=1, seed=7)
        (several,) = llm.generate("Once", seeded, StopParams(max_tokens=8), n=3)
        assert len({several.text, *(other.text for other in several.alternatives)}) == 3
        with pytest.raises(LmserveError, match="n must"):
            llm.generate("Once", n=0)
        long, short = llm.generate(["word " * 3000, "Hi"], stopping=StopParams(max_tokens=2))
        assert long.finish_reason == "error"
        assert long.error is not None
        assert long.error.code == "context_length_exceeded"
        assert short.tokens == 2


def test_it_shares_no_sessions_with_servers() -> None:
    with pytest.raises(ConfigError, match="an LLM has its sessions to itself"):
        LLM(session_store="postgresql://localhost/sessions")
