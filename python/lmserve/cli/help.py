"""`--help` of one screen, with what most people need; `--help-all` has every flag, with its meaning and default."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from lmserve.cli.terminal import fitted

SCREEN_LINES: Final = 24
LEFT: Final = 26  # columns of the flags' names
MOST_COLUMNS: Final = 100
PLACEHOLDER: Final = " …"


class Parser(argparse.ArgumentParser):
    """A command's parser. `common`: the flags of its short help; None: all. `brief`: its description there."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs | {"add_help": False})
        self.common: Sequence[str] | None = None
        self.brief = self.description or ""
        self.add_argument("-h", "--help", action=_Print, dest="help", printed=Parser.short_help, help="show this help")
        text = "show every flag, with its meaning and default"
        self.add_argument("--help-all", action=_Print, dest="help_all", printed=Parser.format_help, help=text)

    def short_help(self) -> str:
        """The help of one screen."""
        width = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
        arguments = [action for action in self._actions if action.help != argparse.SUPPRESS]
        places = [action for action in arguments if not action.option_strings]
        shown = [a for a in arguments if a.option_strings and self._is_common(a.option_strings[-1])]
        shown.sort(key=lambda action: action.option_strings[-1] == "--help-all")
        usage = " ".join([self.prog, *map(_place, places), "[OPTIONS]"])
        lines = textwrap.wrap(f"usage: {usage}", width, subsequent_indent=" " * 7)
        lines += ["", *_paragraphs(self.brief, width), ""]
        for action in places:
            if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - argparse gives this type no public name
                lines += [_row(command.dest, command, width) for command in action._get_subactions()]  # noqa: SLF001
                lines.append("")
            elif action.help:
                lines.append(_row(str(action.metavar), action, width))
        lines += [_row(_flag(action), action, width) for action in shown]
        return "\n".join(lines) + "\n"

    def error(self, message: str) -> NoReturn:
        """End with the usage and what is wrong."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{fitted(f'{self.prog}: error: {message}', sys.stderr)}\n")

    def _is_common(self, name: str) -> bool:
        return name == "--help-all" or (name != "--help" and (self.common is None or name in self.common))


class _Print(argparse.Action):
    """Print a text of the parser, and end."""

    def __init__(self, *, printed: Callable[[Parser], str], **kwargs: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **kwargs)
        self._printed = printed

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        assert isinstance(parser, Parser)
        print(self._printed(parser), end="")
        parser.exit()


def _paragraphs(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        lines += textwrap.wrap(" ".join(paragraph.split()), width)
    return lines


def _place(action: argparse.Action) -> str:
    many = " ..." if action.nargs in ("*", "+") else ""
    return f"[{action.metavar}]{many}" if action.nargs in ("?", "*") else f"{action.metavar}{many}"


def _flag(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f" {action.metavar or str(action.dest).upper()}"
    return action.option_strings[-1] + value


def _row(name: str, action: argparse.Action, width: int) -> str:
    """A line: what it is for, without what else its help says."""
    text = (action.help or "").split(" (default")[0].split("; ")[0]
    room = width - LEFT - 4
    return f"  {name:<{LEFT}}  {textwrap.shorten(text, room, placeholder=PLACEHOLDER)}".rstrip()
