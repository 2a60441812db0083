"""Help of one screen, completion in real shells where they are installed, and the manual page."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lmserve.cli import main, parser
from lmserve.cli.completion import commands_of, flags_of, script
from lmserve.cli.help import SCREEN_LINES

ROOT = Path(__file__).parents[2]
COMMANDS = list(commands_of(parser()))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_one_screen(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [command] if command else []
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = printed(capsys, *words, "--help").splitlines()
        assert len(lines) <= SCREEN_LINES, "\n".join(lines)
        assert max(map(len, lines)) <= width
        assert "--help-all" in lines[-1]
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, printed(capsys, *words, "--help").splitlines())) <= 60


@pytest.mark.parametrize("command", COMMANDS)
def test_the_rest_of_the_help_is_behind_help_all(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, of_command = commands_of(parser())[command]
    whole = printed(capsys, command, "--help-all")
    for action in flags_of(of_command):
        assert action.option_strings[-1] in whole
    if of_command.common is not None:
        flags = {action.option_strings[-1] for action in flags_of(of_command)}
        assert set(of_command.common) <= flags


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_reads_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command in text
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([program, "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lmserve se", {"serve", "sessions"}),
        ("lmserve serve --max-b", {"--max-batch", "--max-batch-tokens", "--max-body"}),
        ("lmserve serve --policy ", {"fair", "fcfs"}),
        ("lmserve completion ", {"bash", "zsh", "fish", "-h", "--help", "--help-all"}),
    ],
)
def test_bash_completes(line: str, expected: set[str]) -> None:
    words = line.split(" ")
    typed = f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}"
    text = f"{script(parser(), 'bash')}{typed}; _lmserve; printf '%s\\n' ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-eu"], input=text, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_the_manual_page_has_every_flag(tmp_path: Path) -> None:
    page = tmp_path / "lmserve.1"
    subprocess.run([sys.executable, ROOT / "tools" / "man.py", page], check=True)
    text = page.read_text("utf-8").replace("\\-", "-")
    for name, (_, command) in commands_of(parser()).items():
        section = re.search(rf"^\.SS lmserve {name}$.*?(?=^\.S[SH])", text, re.MULTILINE | re.DOTALL)
        assert section, name
        for action in flags_of(command):
            assert f"\\fB{action.option_strings[-1]}\\fR" in section[0]
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed")
    done = subprocess.run([groff, "-man", "-Tutf8", "-ww", page], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "--max-batch-tokens" in re.sub(r"\x1b\[\d*m|.\x08", "", done.stdout)
