"""`lmserve simulate`."""

from __future__ import annotations

import pytest
from lmserve.cli import main


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["simulate", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_seed_replays_and_another_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, other = (output(capsys, "--steps", "2000", "--seed", seed) for seed in ("3", "3", "4"))
    assert first[0] == "seed 3"
    assert first[1:-1] == second[1:-1]
    digests = [lines[-1].rpartition(" ")[2] for lines in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]


def test_it_says_how_many_faults_of_each_kind_it_injected(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "--steps", "20000", "--seed", "1")
    faults = lines[lines.index("injected faults:") + 1 : -1]
    counts = {name: int(count.replace(",", "")) for name, count in (line.rsplit(maxsplit=1) for line in faults)}
    panics = {"prepare panics", "mask panics", "log panics"}
    kinds = panics | {"failing rows", "not finite rows", "failed syncs", "flipped bits"}
    assert kinds <= {name.strip() for name in counts}
    assert min(counts.values()) > 0


def test_without_a_seed_each_run_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--steps", "1")[0] != output(capsys, "--steps", "1")[0]


@pytest.mark.parametrize("arguments", [("--seed", "-1"), ("--seed", str(2**64)), ("--steps", "0"), ("--steps", "x")])
def test_numbers_out_of_bounds_are_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["simulate", *arguments])
    assert stop.value.code == 2
    assert f"but {arguments[1]!r} was given" in capsys.readouterr().err
