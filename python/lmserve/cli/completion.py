"""`lmserve completion SHELL`: a script by which bash, zsh or fish completes commands, flags and their values."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from lmserve.cli.help import Parser
    from lmserve.cli.types import Commands

SHELLS: Final = ("bash", "zsh", "fish")
DESCRIPTION: Final = """\
Print a script that completes commands, flags and their values. Add one of these lines to your shell's configuration:

  ~/.bashrc                    eval "$(lmserve completion bash)"
  ~/.zshrc                     eval "$(lmserve completion zsh)"
  ~/.config/fish/config.fish   lmserve completion fish | source
"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a script that completes the command line",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.brief = DESCRIPTION.partition("\n\n")[0] + " Use eval for bash and zsh, and source for fish."
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"{', '.join(SHELLS)}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    print(script(arguments.top, arguments.shell), end="")
    return 0


def script(top: Parser, shell: str) -> str:
    """The script for a shell."""
    return fish(top) if shell == "fish" else bash(top, zsh=shell == "zsh")


def commands_of(top: argparse.ArgumentParser) -> dict[str, tuple[str, Parser]]:
    """Help and parser of each command, by name; aliases are left out."""
    (actions,) = [a for a in top._actions if isinstance(a, argparse._SubParsersAction)]  # noqa: SLF001
    return {
        action.dest: (action.help or "", actions.choices[action.dest])
        for action in actions._get_subactions()  # noqa: SLF001
    }


def flags_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Its flags, in order."""
    yield from (action for action in parser._actions if action.option_strings)  # noqa: SLF001


def values_of(action: argparse.Action) -> list[str]:
    """The values that there are; none where any is."""
    return [] if action.choices is None else [str(choice) for choice in action.choices]


def bash(top: Parser, *, zsh: bool) -> str:
    """For bash, and by its own bashcompinit for zsh."""
    found = commands_of(top)
    cases = []
    for name, (_, parser) in found.items():
        words = " ".join(text for action in flags_of(parser) for text in action.option_strings)
        words += "".join(f" {value}" for a in parser._actions if not a.option_strings for value in values_of(a))  # noqa: SLF001
        values = "".join(
            f"        {'|'.join(action.option_strings)}) words={shlex.quote(' '.join(values_of(action)))} ;;\n"
            for action in flags_of(parser)
            if values_of(action)
        )
        inner = f'      case "$previous" in\n{values}      esac\n' if values else ""
        cases.append(f"    {name})\n      words={shlex.quote(words)}\n{inner}      ;;\n")
    begin = "autoload -Uz bashcompinit && bashcompinit\n" if zsh else ""
    return (
        f"{begin}_lmserve() {{\n"
        '  local word="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" words=""\n'
        '  case "$([ "$COMP_CWORD" -gt 1 ] && echo "${COMP_WORDS[1]}")" in\n'
        f'    "") words={shlex.quote(" ".join([*found, "--help", "--version"]))} ;;\n'
        f"{''.join(cases)}"
        "  esac\n"
        '  COMPREPLY=($(compgen -W "$words" -- "$word"))\n'
        "}\n"
        "complete -o default -F _lmserve lmserve\n"
    )


def fish(top: Parser) -> str:
    """For fish."""
    lines = ["complete -c lmserve -f -n __fish_use_subcommand -l version -d 'print the version'"]
    for name, (text, parser) in commands_of(top).items():
        lines.append(f"complete -c lmserve -f -n __fish_use_subcommand -a {name} -d {_fish(text)}")
        inside = f"-n '__fish_seen_subcommand_from {name}'"
        for action in flags_of(parser):
            named = " ".join(
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in action.option_strings
            )
            values = f" -x -a {_fish(' '.join(values_of(action)))}" if values_of(action) else ""
            takes = "" if action.nargs == 0 or values else " -r"
            brief = (action.help or "").partition(" (default")[0]
            lines.append(f"complete -c lmserve {inside} {named}{takes}{values} -d {_fish(brief)}")
    return "\n".join(lines) + "\n"


def _fish(text: str) -> str:
    """Quoted for fish, in which a backslash within single quotes escapes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
