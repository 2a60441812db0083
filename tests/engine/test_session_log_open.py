"""A session log is opened before the weights are read, for it may be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import lmserve.engine.load
import pytest
import tiny_models
from lmserve import _core
from lmserve.config import ServeConfig
from lmserve.engine.load import ModelPlan
from lmserve.engine.sessions import SessionLog, log_report_of
from lmserve.errors import LmserveError
from lmserve.model import RunnerOptions, load_runner, open_checkpoint


def settings(folder: Path, **fields: Any) -> SessionLog:
    return SessionLog(**{"folder": str(folder), "fingerprint": bytes(32), "model": "ours", "tenants": {}} | fields)


def test_a_log_of_another_model_is_refused_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: object) -> NoReturn:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(lmserve.engine.load, "load_runner", no_weights)
    tiny_models.make(next(iter(tiny_models.CONFIGS)), tmp_path / "model")
    plan = ModelPlan(tmp_path / "model", ServeConfig(session_dir=tmp_path / "log", kv_memory=4 << 20))
    _core.OpenSessionLog(settings(tmp_path / "log", model="theirs"))
    with pytest.raises(LmserveError, match="it was written with theirs") as error:
        plan.load_engine()
    assert error.value.error["code"] == "session_log_mismatch"


def test_an_open_log_is_locked_and_says_what_it_has(tmp_path: Path) -> None:
    log = _core.OpenSessionLog(settings(tmp_path))
    report = log_report_of(log.restored)
    assert (report.sessions, report.tokens, report.torn, report.is_whole) == (0, 0, 0, True)
    with pytest.raises(LmserveError, match="is in use by another running server") as error:
        _core.OpenSessionLog(settings(tmp_path))
    assert error.value.error["code"] == "session_dir_in_use"
    del log
    _core.OpenSessionLog(settings(tmp_path), max_sessions=5, session_ttl=60)


def test_a_log_is_one_engines(tmp_path: Path) -> None:
    tiny_models.make(next(iter(tiny_models.CONFIGS)), tmp_path / "model")
    runner = load_runner(open_checkpoint(tmp_path / "model"), RunnerOptions(device="cpu", kv_memory=4 << 20))
    log = _core.OpenSessionLog(settings(tmp_path / "log"))
    engine = _core.Engine(runner, None, None, eos_token_ids=[], session_log=log)
    try:
        with pytest.raises(LmserveError, match="another engine has this log already"):
            _core.Engine(runner, None, None, eos_token_ids=[], session_log=log)
    finally:
        engine.shutdown(0)


@pytest.mark.parametrize("ttl", [-1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(tmp_path: Path, ttl: float) -> None:
    with pytest.raises(LmserveError, match="session_ttl must be a number of seconds"):
        _core.OpenSessionLog(settings(tmp_path), session_ttl=ttl)
