"""The OpenAPI document against the server: schemathesis sends what the schema allows, and what it does not.

Every check of schemathesis is on, for every operation. SEED=... sends others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import schemathesis
from conftest import NAMES, ServerThread
from lmserve import _core
from lmserve.app import API, create_app
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.text import TextLayer
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig
from schemathesis.config._checks import NEGATIVE_DATA_REJECTION_EXPECTED_STATUSES as REJECTIONS
from schemathesis.engine import from_schema
from schemathesis.engine.events import NonFatalError, ScenarioFinished
from tiny_engine import MAX_MODEL_LEN, TEMPLATE, byte_tokenizer, formula_engine

EXAMPLES = int(os.environ.get("EXAMPLES", "10"))  # of each operation; `make fuzz` has more
SEED = int(os.environ.get("SEED", "20"))

# What no schema can say: the model's and a session's numbers, a comparison of two fields, the last entry of a list,
# names that look like a parameter's, what an item of an unknown type is.
BEYOND_THE_SCHEMA = re.compile(
    rf"the context holds {MAX_MODEL_LEN} tokens|maximum context length is {MAX_MODEL_LEN} tokens"
    r"|token ids .*lie in \[0, 258\)"
    r"|dimensions? must lie in \[1, 8\]|max_tokens_per_doc does not go with texts"
    r"|unknown field `\w+` would change the text"
    r"|messages must have at least one message"
    r"|turns must lie in \[1, \d+\]"
    r"|has no tokens; at least one is needed"
    r"|min_(?:new_)?tokens must be at most"
    r"|the session belongs to another model"
    r"|the session was changed after its export|must be Base64|seed must be a number in decimal digits"
    r"|the turns have \d+ tokens"
    r"|hold must be at most"
    r"|after must be (?:an item of the (?:response|conversation)|a file|a batch)"
    r"|the server does not have the events of this response|starting_after \d+ needs stream true"
    r"|must be what /v1/responses/compact of this server gave|input or previous_response_id must be given"
    r"|the model wrote no summary"
    r"|only a running response can be cancelled"
    r"|an input can be truncated to|prompt_name must be one of the model's prompts"
    r"|prompt_name and input_type cannot be combined"
    r"|text_1 must be one text or as many as text_2"
    r"|this model gives no labels"
    r"|best_of must be at least n|best_of \d+ with n \d+ cannot be streamed"
    r"|a request may have \d+ choices"
    r"|continue_final_message needs an assistant's message at the end"
    r"|tool_choice needs tools|only one field may set the format of the answer"
    r"|functions must have different names|tool_choice must name one of the tools"
    r"|(?:json|regex|choice|grammar|format|tools) cannot be compiled"
    r"|json must be a JSON schema \(an object\), but its text cannot be read"
)

load_all_checks()
ACCEPTS = CHECKS.get_one("positive_data_acceptance")


def schema_valid_is_accepted(ctx, response, case):
    """schemathesis's positive_data_acceptance, but for a 400 whose reason is none of the schema's."""
    if response.status_code == 400 and BEYOND_THE_SCHEMA.search(response.json()["error"]["message"]):
        return None
    return ACCEPTS(ctx, response, case)


@dataclass
class Outcome:
    """What became of one operation."""

    fuzzed: int = 0
    failures: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    text = TextLayer(byte_tokenizer(), _core.ChatTemplate(TEMPLATE, b"{}"))
    engine = AsyncEngine(formula_engine(), max_model_len=MAX_MODEL_LEN, text=text)
    with ServerThread(create_app(engine, NAMES)) as thread:
        yield thread.url


def explored(url: str, only: str | None = None) -> dict[str, Outcome]:
    """Each operation, and under "" what belongs to none. `only`: the method and path of the one to explore."""
    settings = {
        "seed": SEED,
        "continue-on-failure": True,
        "generation": {"max-examples": EXAMPLES, "database": "none"},
        "checks": {
            "positive_data_acceptance": {"enabled": False},
            # A list over its limit may be a body over its limit, which is refused first.
            "negative_data_rejection": {"expected-statuses": [*REJECTIONS, "413"]},
        },
        # In a form, a number is a text like any other.
        "operations": [{"include-path": "/v1/files", "checks": {"negative_data_rejection": {"enabled": False}}}],
    }
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=SchemathesisConfig.from_dict(settings))
    if only is not None:
        method, _, path = only.partition(" ")
        schema = schema.include(method=method, path=path)
    outcomes: dict[str, Outcome] = {}
    for event in from_schema(schema).execute():
        if isinstance(event, NonFatalError):
            outcomes.setdefault(event.label or "", Outcome()).failures.append(f"{event.value!r}")
        if not isinstance(event, ScenarioFinished):
            continue
        outcome = outcomes.setdefault(event.label or "", Outcome())
        recorder = event.recorder
        if event.phase.value == "fuzzing":
            outcome.fuzzed += len(recorder.cases)
        for case, checks in recorder.checks.items():
            for check in checks:
                if check.failure_info is not None:
                    sent, response = recorder.cases[case].value, recorder.interactions[case].response
                    got = "no response" if response is None else f"{response.status_code} {response.content[:500]!r}"
                    outcome.failures.append(f"{check.name}: {check.failure_info.failure}\n{sent.body!r:.1000}\n{got}")
    return outcomes


def test_the_server_is_as_its_schema_says(url: str) -> None:
    schemathesis.check(schema_valid_is_accepted)
    try:
        outcomes = explored(url)
        # Among many others, an operation with an id in its path may get few cases.
        few = [label for label, found in outcomes.items() if label.startswith("POST") and found.fuzzed < EXAMPLES]
        for label in few:
            alone = explored(url, label)[label]
            alone.failures += outcomes[label].failures
            outcomes[label] = alone
    finally:
        CHECKS.unregister(schema_valid_is_accepted.__name__)
    failures = [f"{label}: {failure}" for label, outcome in outcomes.items() for failure in outcome.failures]
    assert not failures, "\n\n".join(failures[:20])
    operations = {
        f"{method} {re.sub(':[a-z]+}', '}', path)}" for h in API for method in h.http_methods for path in h.paths
    }
    assert {label for label in outcomes if label} == operations
    for label, outcome in outcomes.items():
        if label.startswith("POST"):
            assert outcome.fuzzed >= EXAMPLES, label
