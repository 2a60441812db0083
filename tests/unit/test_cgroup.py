"""Limits of control groups, read from trees as the kernel shows them; and from this machine's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmserve.model import cgroup, device


class Machine:
    """A process's view of its groups: /proc/self and a mounted tree, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.mounts = folder / "proc", folder / "mount points"
        self.proc.mkdir()
        self._groups: list[str] = []
        self._mounts: list[str] = []

    def mount(
        self, name: str, kind: str, group: str, *, root: str = "/", number: str = "0", controllers: str = ""
    ) -> None:
        point = str(self.mounts / name).replace(" ", "\\040")
        self._mounts.append(f"30 1 0:28 {root} {point} rw,relatime - {kind} {kind} rw,{controllers}")
        self._groups.append(f"{number}:{controllers}:{group}")
        (self.proc / "mountinfo").write_text("\n".join(self._mounts) + "\n")
        (self.proc / "cgroup").write_text("\n".join(self._groups) + "\n")

    def write(self, path: str, text: str) -> None:
        file = self.mounts / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    monkeypatch.setattr(cgroup, "PROC", machine.proc)
    return machine


def test_no_groups_at_all(machine: Machine) -> None:
    assert cgroup.memory_left() is None
    assert cgroup.cpu_quota() is None


def test_v2_the_tightest_of_nested_groups_holds(machine: Machine) -> None:
    machine.mount("unified", "cgroup2", "/pod/box")
    machine.write("unified/pod/memory.max", "1000\n")
    machine.write("unified/pod/memory.current", "300\n")
    machine.write("unified/pod/memory.stat", "anon 100\nfile 150\nshmem 50\n")
    machine.write("unified/pod/box/memory.max", "max\n")
    machine.write("unified/pod/cpu.max", "max 100000\n")
    machine.write("unified/pod/box/cpu.max", "150000 100000\n")
    # Of 300 in use, 100 are page cache, which the kernel gives back; shared memory it cannot.
    assert cgroup.memory_left() == 800
    assert cgroup.cpu_quota() == 1.5
    assert device.available_memory() == 800
    machine.write("unified/pod/box/memory.max", "400\n")
    assert cgroup.memory_left() == 400


def test_v1_with_a_hierarchy_for_each_controller(machine: Machine) -> None:
    machine.mount("memory", "cgroup", "/box", number="4", controllers="memory")
    machine.mount("cpu,cpuacct", "cgroup", "/box", number="3", controllers="cpu,cpuacct")
    machine.write("memory/box/memory.limit_in_bytes", "5000\n")
    machine.write("memory/box/memory.usage_in_bytes", "6000\n")
    machine.write("memory/box/memory.stat", "total_cache 2000\n")
    machine.write("cpu,cpuacct/box/cpu.cfs_quota_us", "-1\n")
    machine.write("cpu,cpuacct/box/cpu.cfs_period_us", "100000\n")
    assert cgroup.memory_left() == 1000
    assert cgroup.cpu_quota() is None
    machine.write("cpu,cpuacct/box/cpu.cfs_quota_us", "50000\n")
    assert cgroup.cpu_quota() == 0.5
    assert device.usable_cores() == 1


@pytest.mark.parametrize("group", ["/docker/abc", "/docker/abc/inner", "/", "/../elsewhere"])
def test_a_container_that_sees_its_own_group_as_the_top(machine: Machine, group: str) -> None:
    machine.mount("unified", "cgroup2", group, root="/docker/abc")
    machine.write("unified/memory.max", "700\n")
    assert cgroup.memory_left() == 700


def test_what_is_garbled_is_no_limit(machine: Machine) -> None:
    machine.mount("unified", "cgroup2", "/")
    machine.write("unified/memory.max", "much\n")
    machine.write("unified/cpu.max", "half\n")
    (machine.proc / "mountinfo").write_bytes((machine.proc / "mountinfo").read_bytes() + b"x y - z\n\xff\n")
    assert cgroup.memory_left() is None
    assert cgroup.cpu_quota() is None


def test_this_machine() -> None:
    assert device.available_memory() > 1 << 20
    assert 1 <= device.usable_cores() <= 4096
