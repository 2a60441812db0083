"""Submissions as the core reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from lmserve.engine import submission as sent

SRC = Path(__file__).parents[2] / "src"
RUST = "".join(path.read_text("utf-8") for path in [SRC / "request.rs", *sorted((SRC / "request").glob("*.rs"))])

STRUCTS = {
    "Submission": sent.Submission,
    "SessionRef": sent.SessionRef,
    "SamplingParams": sent.SamplingParams,
    "StopParams": sent.StopParams,
}


def rust_fields(name: str) -> list[str]:
    body = re.search(rf"pub struct {name} \{{(.*?)\n\}}", RUST, re.DOTALL)
    assert body is not None
    sent_fields = re.sub(r"#\[serde\(skip\)\]\s+pub \w+:", "", body[1])
    return re.findall(r"^    pub (\w+):", sent_fields, re.MULTILINE)


def rust_variants(name: str) -> dict[str, list[str]]:
    body = re.search(rf"pub enum {name} \{{(.*?)\n\}}", RUST, re.DOTALL)
    assert body is not None
    found = re.findall(r"^    (\w+) \{(.*?)\n    \}", body[1], re.DOTALL | re.MULTILINE)
    return {variant.lower(): re.findall(r"^        (\w+):", fields, re.MULTILINE) for variant, fields in found}


@pytest.mark.parametrize("name", STRUCTS)
def test_fields_are_those_of_the_core(name: str) -> None:
    assert set(STRUCTS[name].__struct_fields__) == set(rust_fields(name))


def test_inputs_are_those_of_the_core() -> None:
    structs = {"turn": sent.Turn, "messages": sent.Messages, "text": sent.Text, "tokens": sent.Tokens}
    assert {tag: set(s.__struct_fields__) for tag, s in structs.items()} == {
        tag: set(fields) for tag, fields in rust_variants("Input").items()
    }
    assert all(s.__struct_config__.tag == tag for tag, s in structs.items())


def test_defaults_are_not_written() -> None:
    request = sent.Submission(route="generate", input=sent.Turn("x"))
    assert json.loads(sent.encode(request)) == {"route": "generate", "input": {"type": "turn", "text": "x"}}


def test_64_bit_numbers_cross_unharmed() -> None:
    session = sent.SessionRef(id=2**63 - 1)
    sampling = sent.SamplingParams(seed=2**64 - 1)
    request = sent.Submission(route="chat", input=sent.Tokens([0, 2**31 - 1]), session=session, sampling=sampling)
    back = msgspec.json.decode(sent.encode(request), type=sent.Submission)
    assert back == request
