"""The OpenAPI document as it was last looked at: a change of the API is seen in the diff of docs/openapi.json."""

from __future__ import annotations

import json
from pathlib import Path

from lmserve.app import openapi_document

SNAPSHOT = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_document_is_the_committed_one() -> None:
    committed = json.loads(SNAPSHOT.read_text("utf-8"))
    document = json.loads(openapi_document(secured=False))
    assert document == committed, "the API changed; `make openapi` writes docs/openapi.json anew"
    assert list(document["paths"]) == list(committed["paths"])
