"""Where a setting of `lmserve serve` comes from: its flag, else its LMSERVE_ variable, else the file of --config."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from lmserve.cli.errors import CommandError

PREFIX: Final = "LMSERVE_"
# Variables that are no settings of a server.
OTHERS: Final = frozenset({"LMSERVE_ARGS", "LMSERVE_CACHE", "LMSERVE_CPU_ISA", "LMSERVE_URL"})
# Kubernetes gives these to every container beside a service named lmserve.
SERVICE: Final = re.compile(r"LMSERVE_(SERVICE_(HOST|PORT).*|PORT_\d+_.*)")
SERVICE_ADDRESS: Final = re.compile(r"(tcp|udp|sctp)://")
YES: Final = frozenset({"1", "true", "yes", "on"})
NO: Final = frozenset({"0", "false", "no", "off"})


class Origins:
    """What to call each setting in a message: where it was given."""

    def __init__(self, actions: Mapping[str, argparse.Action]) -> None:
        self._names = {action.dest: action.option_strings[0] for action in actions.values()}

    def give(self, dest: str, name: str) -> None:
        """The setting `dest` came from `name`."""
        self._names[dest] = name

    def of(self, dest: str) -> str:
        """Its flag, variable, or key of the file."""
        return self._names.get(dest, dest)


def fill(
    given: dict[str, Any],
    parser: argparse.ArgumentParser,
    environment: Mapping[str, str],
    repeatable: Collection[str],
) -> Origins:
    """Put into `given` (values by their `dest`) what no flag gave, but the environment or the file does.

    `repeatable`: those that have a list of values, in the environment with spaces between them.

    Raises CommandError (exit code 2) for a value that cannot be, and for a name that is almost one of a setting.
    """
    options = [action for action in parser._actions if action.option_strings]  # noqa: SLF001 - there is no other list
    actions = {action.option_strings[0].removeprefix("--"): action for action in options}
    origins = Origins(actions)
    for name, action, text in _variables(actions, environment):
        if given.get(action.dest) is None:
            given[action.dest] = _of_text(name, action, text, many=action.dest in repeatable)
            origins.give(action.dest, name)
    if given.get("config") is not None:
        for name, action, value in _entries(actions, given["config"]):
            if given.get(action.dest) is None:
                given[action.dest] = _of_toml(name, action, value, many=action.dest in repeatable)
                origins.give(action.dest, name)
    return origins


def variable(flag: str) -> str:
    """The environment's name of a flag: --max-body is LMSERVE_MAX_BODY."""
    return PREFIX + flag.removeprefix("--").replace("-", "_").upper()


def _variables(
    actions: Mapping[str, argparse.Action], environment: Mapping[str, str]
) -> Iterator[tuple[str, argparse.Action, str]]:
    known = {variable(flag): action for flag, action in actions.items()}
    for name, text in environment.items():
        if not name.startswith(PREFIX) or name in OTHERS or SERVICE.fullmatch(name) or SERVICE_ADDRESS.match(text):
            continue
        if name in known:
            yield name, known[name], text
        elif near := get_close_matches(name, known, 1, 0.85):
            raise CommandError(f"{name} is not a setting; did you mean {near[0]}?", exit_code=2)


def _entries(actions: Mapping[str, argparse.Action], path: Path) -> Iterator[tuple[str, argparse.Action, Any]]:
    try:
        entries = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--config {path} cannot be read: {error}", exit_code=2) from error
    except tomllib.TOMLDecodeError as error:
        raise CommandError(f"--config {path} is not valid TOML: {error}", exit_code=2) from error
    for key, value in entries.items():
        flag = key.replace("_", "-")
        if flag not in actions or flag == "config":
            near = get_close_matches(flag, actions, 1)
            advice = (
                f"; did you mean {near[0]}?" if near else "; the keys are the names of the flags without their dashes"
            )
            raise CommandError(f"--config {path}: {key} is not a setting{advice}", exit_code=2)
        yield f"{path}: {key}", actions[flag], value


def _of_text(name: str, action: argparse.Action, text: str, *, many: bool) -> Any:
    if not text.strip():
        raise CommandError(f"{name} is empty: give it a value, or unset it", exit_code=2)
    if action.nargs == 0:
        return _switch(name, action, text.strip().lower())
    if many:
        # One model's path may have spaces; several have names.
        words = [text] if action.dest == "model" and "=" not in text else text.split()
        return [_converted(name, action, word) for word in words]
    return _converted(name, action, text)


def _of_toml(name: str, action: argparse.Action, value: Any, *, many: bool) -> Any:
    if action.nargs == 0:
        return _switch(name, action, str(value).lower())
    values = value if isinstance(value, list) and many else [value]
    for part in values:
        if isinstance(part, bool | dict | list):
            kind = "a text, or a list of texts" if many else "one value"
            raise CommandError(f"{name}: {kind} expected, but {part!r} was given", exit_code=2)
    converted = [_converted(name, action, str(part)) for part in values]
    return converted if many else converted[0]


def _switch(name: str, action: argparse.Action, word: str) -> Any:
    if word in YES:
        return action.const
    if word in NO:
        return None
    raise CommandError(f"{name}: true or false expected, but {word!r} was given", exit_code=2)


def _converted(name: str, action: argparse.Action, text: str) -> Any:
    try:
        value = action.type(text) if callable(action.type) else text
    except argparse.ArgumentTypeError as error:
        raise CommandError(f"{name}: {error}", exit_code=2) from error
    except ValueError as error:
        raise CommandError(f"{name}: {text!r} is not a valid value", exit_code=2) from error
    if action.choices is not None and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise CommandError(f"{name}: one of {choices} expected, but {text!r} was given", exit_code=2)
    return value
