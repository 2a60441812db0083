"""Writes the OpenAPI document, which tests/unit/test_openapi_snapshot.py compares: python tools/openapi.py FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lmserve.app import openapi_document


def main() -> None:
    document = json.loads(openapi_document(secured=False))
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
