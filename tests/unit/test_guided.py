"""Answers that follow a grammar, chosen at random under its masks: the core alone, without a model."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from lmserve import LmserveError, SamplingParams, Scheduler, SessionRef, StopParams
from lmserve.engine.submission import Choice, Guide, JsonObject, JsonSchema, Lark, Regex

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "http")]
from random_schemas import SchemaMaker
from tiny_engine import EOS, byte_tokenizer

VOCAB = 258
SIZES: dict[str, Any] = {"block_size": 16, "vocab_size": VOCAB, "max_model_len": 2048, "eos_token_ids": [EOS]}


@dataclass
class Answer:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(num_blocks=8192, tokenizer=byte_tokenizer(), **SIZES)


def answers(scheduler: Scheduler, seed: int = 0) -> dict[int, Answer]:
    """Run all requests, each token drawn at random from those that are allowed."""
    rng = np.random.default_rng(seed)
    found: dict[int, Answer] = {}
    while (step := scheduler.plan()) is not None:
        tokens = np.full(len(step.sample_rows), 65)
        if step.masks is not None:
            words = np.frombuffer(step.masks.wait(), np.uint8).reshape(len(step.masks.rows), -1)
            for row, bits in zip(step.masks.rows, np.unpackbits(words, axis=1, bitorder="little"), strict=True):
                tokens[row] = rng.choice(np.flatnonzero(bits[:VOCAB]))
        for event in scheduler.commit(tokens):
            answer = found.setdefault(event.request, Answer())
            answer.text += event.text
            answer.reason, answer.error = event.finish_reason, event.error
            if event.token is not None:
                answer.tokens.append(event.token)
    return found


def add(scheduler: Scheduler, guide: Guide | None, max_tokens: int = 600, **options: Any) -> int:
    return scheduler.add("x", guide=guide, stopping=StopParams(max_tokens=max_tokens, **options))


def said(scheduler: Scheduler, guide: Guide, count: int = 20, **options: Any) -> list[str]:
    """The texts of `count` answers, all of which ended by themselves."""
    for _ in range(count):
        add(scheduler, guide, **options)
    found = list(answers(scheduler).values())
    assert {(answer.reason, answer.error) for answer in found} == {("stop", None)}
    return [answer.text for answer in found]


def test_500_random_schemas_get_answers_that_they_allow(scheduler: Scheduler) -> None:
    maker = SchemaMaker(7)
    schemas = [maker.make() for _ in range(500)]
    requests = {add(scheduler, JsonSchema(schema, strict=True)): schema for schema in schemas}
    found = answers(scheduler)
    cut = 0
    for request, schema in requests.items():
        answer = found[request]
        assert answer.reason in ("stop", "length"), (schema, answer)
        if answer.reason == "length":
            cut += 1
            continue
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
    assert cut <= 10
    assert len({answer.text for answer in found.values()}) > 300


def test_each_kind_of_guide_is_kept_to(scheduler: Scheduler) -> None:
    choices = ["red", "dark red", "a.b|c", "(x)", "日本", "</s>", 'say "hi"/\\']
    assert set(said(scheduler, Choice(choices), 100)) == set(choices)
    pattern = r"[0-9]{3}-[a-c]{1,4}(/x)?"
    assert all(re.fullmatch(pattern, text) for text in said(scheduler, Regex(pattern)))
    lark = 'start: "(" item ("," item)* ")"\nitem: "a" | "c" | "b" start'
    assert all(text.count("(") == text.count(")") > 0 for text in said(scheduler, Lark(lark), max_tokens=2000))
    request = add(scheduler, JsonObject(), 300)
    assert answers(scheduler)[request].text.lstrip().startswith("{")


FLAGS = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}
TEXTS = {"type": "object", "properties": {"a": {"enum": ["b c", "d:e, f"]}}, "required": ["a"]}
TEXTS |= {"additionalProperties": False}


def test_json_has_no_white_space_between_its_tokens(scheduler: Scheduler) -> None:
    assert not any(c.isspace() for text in said(scheduler, JsonSchema(FLAGS), 50) for c in text)
    assert set(said(scheduler, JsonSchema(TEXTS), 50)) == {'{"a":"b c"}', '{"a":"d:e, f"}'}


def test_white_space_that_is_free_has_a_limit(scheduler: Scheduler) -> None:
    for _ in range(50):
        scheduler.add("x", guide=JsonSchema(FLAGS), stopping=StopParams(max_tokens=600), guided_whitespace="free")
    found = list(answers(scheduler).values())
    assert {(answer.reason, answer.error) for answer in found} == {("stop", None)}
    assert max(len(answer.text) for answer in found) < 400
    assert any(" " in answer.text for answer in found)


def test_a_schema_is_limited_by_what_it_costs_and_not_by_its_length(scheduler: Scheduler) -> None:
    words = [f"word {i} of a long list of words" for i in range(5000)]
    assert set(said(scheduler, JsonSchema({"enum": words}, strict=True), 5)) <= {json.dumps(word) for word in words}
    assert set(said(scheduler, Choice(words), 5)) <= set(words)


def test_boolean_schemas_and_anchors(scheduler: Scheduler) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#word"}, "b": False}, "required": ["a"]}
    schema |= {"additionalProperties": False, "$defs": {"w": {"$anchor": "word", "enum": ["x", "y"]}}}
    assert set(said(scheduler, JsonSchema(schema, strict=True), 50)) == {'{"a":"x"}', '{"a":"y"}'}
    item = {"type": "array", "prefixItems": [True, {"const": 1}], "items": False, "minItems": 2}
    request = add(scheduler, JsonSchema(item, strict=True), 2)
    assert answers(scheduler)[request].text.startswith("[")
    request = add(scheduler, JsonSchema(True, strict=True), 1)
    assert answers(scheduler)[request].text != ""


@pytest.mark.parametrize(
    "pattern",
    ["^(?=.*[0-9])(?=.*[a-c])[0-9a-c]{3,5}$", "^(?=[a-c])[a-c0-9]{2}$", "(?=.b)[ab]{2,3}", "(?!a|.b)[ab]{2,3}"],
)
def test_look_ahead_at_the_beginning_is_kept_to(scheduler: Scheduler, pattern: str) -> None:
    assert all(re.fullmatch(pattern, text) for text in said(scheduler, Regex(pattern), 30))
    if "(?!" not in pattern and pattern.startswith("^"):
        texts = said(scheduler, JsonSchema({"type": "string", "pattern": pattern}, strict=True), 30)
        assert all(re.fullmatch(pattern, json.loads(text)) for text in texts)


def test_an_answer_ends_with_its_grammar_and_not_with_a_token_of_its_own(scheduler: Scheduler) -> None:
    request = add(scheduler, Regex("abc"))
    answer = answers(scheduler)[request]
    assert (answer.text, answer.tokens, answer.reason) == ("abc", [97, 98, 99], "stop")
    # The grammar's end comes before the limit's.
    request = add(scheduler, Regex("abc"), 3)
    assert answers(scheduler)[request].reason == "stop"
    request = add(scheduler, Regex("abc"), 2)
    assert answers(scheduler)[request].reason == "length"


def test_where_a_text_may_end_stop_tokens_may_end_it(scheduler: Scheduler) -> None:
    stop = {"stop_token_ids": [200], "ignore_eos": True}
    for _ in range(40):
        add(scheduler, Regex("a{1,200}"), **stop)
    found = list(answers(scheduler).values())
    assert {answer.reason for answer in found} == {"stop"}
    assert {answer.tokens[-1] for answer in found} == {200, EOS}
    assert all(set(answer.text) == {"a"} for answer in found)


def test_min_tokens_hold_off_the_end_as_long_as_the_grammar_goes_on(scheduler: Scheduler) -> None:
    texts = said(scheduler, Regex("a{1,40}"), min_tokens=30)
    assert min(map(len, texts)) >= 30
    assert set(said(scheduler, Regex("a{1,4}"), min_tokens=30)) == {"aaaa"}


def test_a_stop_string_ends_a_guided_text_too(scheduler: Scheduler) -> None:
    assert set(said(scheduler, Regex("a{5}b{5}"), stop=["ab"])) == {"aaaa"}


def test_preempted_answers_go_on_in_their_grammar() -> None:
    schema = {"type": "array", "items": {"enum": ["one", "two"]}, "minItems": 30, "maxItems": 32}
    tight = Scheduler(num_blocks=40, tokenizer=byte_tokenizer(), **SIZES)
    # After short answers short ones are expected, and more join than there is room for.
    assert set(said(tight, Choice(["a"]), 20)) == {"a"}
    texts = said(tight, JsonSchema(schema), 8)
    assert tight.stats()["preemptions"] > 0
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


def test_each_choice_follows_the_grammar_by_itself(scheduler: Scheduler) -> None:
    scheduler.add("x", guide=Choice(["aa", "bb", "ccc"]), stopping=StopParams(max_tokens=9), n=16)
    texts: dict[int, str] = {}
    rng = np.random.default_rng(1)
    while (step := scheduler.plan()) is not None:
        assert step.masks is not None
        words = np.frombuffer(step.masks.wait(), np.uint8).reshape(len(step.masks.rows), -1)
        allowed = np.unpackbits(words, axis=1, bitorder="little")[:, :VOCAB]
        for event in scheduler.commit([rng.choice(np.flatnonzero(bits)) for bits in allowed]):
            texts[event.choice] = texts.get(event.choice, "") + event.text
    assert len(texts) == 16
    assert set(texts.values()) == {"aa", "bb", "ccc"}


def test_a_token_outside_the_grammar_fails_its_request_alone(scheduler: Scheduler) -> None:
    session = SessionRef(5, create=True)
    bad = scheduler.add("x", guide=Regex("ab"), stopping=StopParams(max_tokens=9), session=session)
    good = scheduler.add("x", sampling=SamplingParams(temperature=0), stopping=StopParams(max_tokens=4))
    found = {}
    while (step := scheduler.plan()) is not None:
        for event in scheduler.commit([ord("z")] * len(step.sample_rows)):
            found[event.request] = (event.finish_reason, event.error)
    assert found[bad][0] == "error"
    assert "grammar" in found[bad][1]
    assert found[good] == ("length", None)
    with pytest.raises(LmserveError):
        scheduler.session_tokens(5)
    assert scheduler.stats()["owned_blocks"] == 0


REFUSED = [
    (Regex("["), "invalid regex"),
    (Regex("(" * 5000 + "a" + ")" * 5000), "invalid regex"),
    (Lark("start: NOWHERE"), "NOWHERE"),
    (Lark("start: " + "(" * 9000 + '"a"' + ")" * 9000), "nested"),
    (Lark("x" * 4_200_000), "4194304"),
    (JsonSchema({"$ref": "#/nowhere"}), "nowhere"),
    (JsonSchema({"not": {}}, strict=True), "not"),
    (JsonSchema({"type": "striing"}), "striing"),
    (JsonSchema({"allOf": [{"anyOf": [{"required": [f"{i}{c}"]} for c in "ab"]} for i in range(20)]}), "too large"),
    (JsonSchema({"enum": [], "type": "string"}), ""),
    (JsonSchema(False), "false allows no text"),
    (JsonSchema({"$ref": "#"}), "requires itself endlessly"),
    (Choice(["a"] * 70_000), "65536"),
    (Choice([]), "at least one"),
]


@pytest.mark.parametrize(("guide", "why"), REFUSED)
def test_a_grammar_that_cannot_be_is_refused_with_the_reason(scheduler: Scheduler, guide: Guide, why: str) -> None:
    with pytest.raises(LmserveError) as caught:
        add(scheduler, guide)
    assert caught.value.status == 400
    assert why in str(caught.value)


def test_a_grammar_beyond_the_limits_is_refused_and_others_go_on(scheduler: Scheduler) -> None:
    # Each terminal is twice the one after it.
    doubling = "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "y"'
    with pytest.raises(LmserveError, match=r"too big|longer than the limit of 2 s") as caught:
        add(scheduler, Lark(doubling))
    assert (caught.value.status, caught.value.code) == (400, "invalid_grammar")
    assert said(scheduler, Regex("abc"), 1) == ["abc"]


def test_a_scheduler_without_a_tokenizer_has_no_grammars() -> None:
    bare = Scheduler(num_blocks=8, **SIZES)
    with pytest.raises(LmserveError, match="tokenizer"):
        bare.add([1, 2], guide=Regex("a"))
