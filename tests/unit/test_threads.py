"""Every class of the core that Python can hold, used by four threads at once."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import thread_stress
from lmserve import _core


@pytest.mark.parametrize("name", thread_stress.CLASSES)
def test_four_threads_neither_deadlock_nor_fail(name: str) -> None:
    """A process that its watchdog ends says in which calls the threads hang."""
    script = Path(thread_stress.__file__)
    result = subprocess.run([sys.executable, str(script), name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_class_is_left_out() -> None:
    classes = {name for name, value in vars(_core).items() if inspect.isclass(value)}
    covered = {"Event", "TokenUsage", "StepMasks", "Stream", "CpuProgram", "CpuArrays", "CpuTexts"}
    assert classes == covered | thread_stress.CLASSES.keys()
