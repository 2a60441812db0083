"""docs/coming-from.md: every flag and route of ours is there, and others' flags are taken or refused as it says."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from lmserve.app import API
from lmserve.cli.aliases import ALIASES, DEFAULT, ONLY, REFUSED, WITH_VALUE, translated
from lmserve.cli.errors import CommandError
from lmserve.cli.serve_options import add_options
from lmserve.schemas.chat import ChatRequest
from lmserve.schemas.completions import CompletionRequest
from lmserve.schemas.generate import GenerateRequest
from lmserve.schemas.interactive import InteractiveRequest

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text("utf-8")
ROWS = [(theirs, ours) for theirs, ours in re.findall(r"^\| (.*?) \| (.*) \|$", PAGE, re.MULTILINE) if "`" in theirs]
PATHS = {path for handler in API for path in handler.paths}
REQUESTS = (ChatRequest, CompletionRequest, GenerateRequest, InteractiveRequest)
FIELDS = {field for model in REQUESTS for field in model.__struct_fields__}
TABLES = ALIASES.keys() | WITH_VALUE.keys() | DEFAULT | ONLY.keys() | REFUSED.keys()


def own_flags() -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    return {name for action in parser._actions for name in action.option_strings}


OWN = own_flags()


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def flags(text: str) -> list[str]:
    return [match for span in spans(text) for match in re.findall(r"(?<!\S)-{1,2}[a-zA-Z][\w-]*", span)]


def routes(text: str) -> list[str]:
    return [match for span in spans(text) for match in re.findall(r"(?<![\w./:])/[a-z][\w/.]*", span)]


@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[theirs[:50] for theirs, _ in ROWS])
def test_a_row_is_true(theirs: str, ours: str) -> None:
    same = ours.startswith(("the same", "only 1", "always so", "refused"))
    assert set(flags(ours)) <= OWN
    assert set(routes(ours)) <= PATHS
    if ours.startswith("the same"):
        assert set(routes(theirs)) <= PATHS
        given = {span for span in spans(theirs) if re.fullmatch(r"[a-z_]+", span)}
        assert given <= FIELDS
    named = [flag for flag in flags(theirs) if not theirs.startswith(("`lmdeploy", "`python"))]
    for flag in named:
        if "(taken)" in ours and flag not in OWN:
            taken(flag, ours)
        elif ours.startswith("refused"):
            with pytest.raises(CommandError, match=re.escape(flag)):
                translated([flag, "2"])
        elif ours.startswith("the same"):
            assert flag in OWN, flag
    assert same or flags(ours) or routes(ours) or spans(ours) or "nothing" in ours or "names" in ours


def taken(flag: str, ours: str) -> None:
    if flag in ONLY:
        assert translated([flag, "1"]) == []
        with pytest.raises(CommandError, match="must be 1"):
            translated([flag, "2"])
    elif flag in DEFAULT:
        assert ours.startswith("always so")
        assert translated([flag]) == []
    elif flag in WITH_VALUE:
        assert " ".join(WITH_VALUE[flag]) in ours
    else:
        assert ALIASES[flag] in flags(ours) or "lmserve serve" in ours


def test_every_flag_of_others_that_is_known_is_on_the_page() -> None:
    missing = TABLES - {flag for theirs, _ in ROWS for flag in flags(theirs)}
    assert missing <= {"-tp", "-pp", "-dp", "--max-num-seqs", "--disable-uvicorn-access-log"}, missing
