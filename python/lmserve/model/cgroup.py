"""The limits of the control groups that this process is in: v1 and v2, nested, with a namespace of its own or without.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, and proc(5), mountinfo.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")

# mountinfo writes spaces, tabs, newlines and backslashes of a path in octal.
OCTAL = re.compile(r"\\([0-7]{3})")


def memory_left() -> int | None:
    """Bytes that this process may still take under the tightest group; page cache counts as free. None: no limit."""
    left: list[int] = []
    for folder in _folders("memory"):
        if (folder / "memory.max").is_file():
            limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
            cache = _statistic(folder / "memory.stat", "file") - _statistic(folder / "memory.stat", "shmem")
        else:
            limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
            cache = _statistic(folder / "memory.stat", "total_cache") - _statistic(
                folder / "memory.stat", "total_shmem"
            )
        if limit is not None:
            left.append(max(0, limit - max(0, (used or 0) - cache)))
    return min(left, default=None)


def cpu_quota() -> float | None:
    """Processors' worth of time that this process may use under the tightest group. None: no limit."""
    quotas: list[float] = []
    for folder in _folders("cpu"):
        if (folder / "cpu.max").is_file():
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        # "max" and -1 are no limit.
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _folders(controller: str) -> Iterator[Path]:
    """The folder of this process's group for a controller, then those of the groups around it; of v1 and of v2."""
    groups = [line.split(":", 2) for line in _read(PROC / "cgroup").splitlines() if line.count(":") >= 2]
    for line in _read(PROC / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        root, mount = (OCTAL.sub(lambda match: chr(int(match[1], 8)), path) for path in fields[3:5])
        for number, controllers, group in groups:
            v2 = kind[0] == "cgroup2" and number == "0"
            if v2 or (
                kind[0] == "cgroup" and controller in controllers.split(",") and controller in kind[2].split(",")
            ):
                yield from _chain(Path(mount), PurePosixPath(root), PurePosixPath(group))


def _chain(mount: Path, root: PurePosixPath, group: PurePosixPath) -> Iterator[Path]:
    # A group outside of what is mounted (a namespace made later) leaves the mounted top.
    inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
    parts = () if ".." in inside.parts else inside.parts
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _read(path: Path) -> str:
    """The file's text, "" where it cannot be read: a controller may be off at any level."""
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.isdecimal() else None


def _statistic(path: Path, name: str) -> int:
    fields = (line.partition(" ") for line in _read(path).splitlines())
    return next((int(value) for key, _, value in fields if key == name and value.isdecimal()), 0)
