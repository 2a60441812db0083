"""A PostgreSQL server of the tests' own, from the programs of this machine."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def programs() -> Path | None:
    """The folder of initdb and postgres; None: there is none."""
    found = shutil.which("initdb")
    if found is not None and shutil.which("postgres"):
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


class Postgres:
    """A database that can be stopped and started again."""

    def __init__(self, folder: Path, user: str | None) -> None:
        found = programs()
        assert found is not None
        self._programs, self._folder, self._user = found, folder, user
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._run("initdb", "--auth=trust", "--username=lmserve", "--no-sync", "--pgdata", str(folder / "data"))
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://lmserve@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        # Its last connections may have to wait until their port is free.
        options = f"-h 127.0.0.1 -p {self.port} -k {self._folder} -c shared_buffers=16MB -c max_connections=40"
        self._control("start", "-w", "-o", options, "-l", str(self._folder / "log"))

    def stop(self) -> None:
        self._control("stop", "-m", "immediate")

    def close(self) -> None:
        if (self._folder / "data/postmaster.pid").exists():
            self.stop()

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self._folder / "data"), *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        options: dict[str, Any] = {} if self._user is None else {"user": self._user, "group": self._user}
        with (self._folder / "said").open("w+") as said:
            # Not through a pipe, which the server would keep open.
            command = [str(self._programs / program), *arguments]
            done = (
                subprocess.run(
                    command, cwd=self._folder, stdout=said, stderr=said, check=False, extra_groups=[], **options
                )
                if self._user
                else subprocess.run(command, cwd=self._folder, stdout=said, stderr=said, check=False)
            )
            said.seek(0)
            assert done.returncode == 0, said.read()


@contextmanager
def database() -> Iterator[Postgres]:
    """Skips the test where there is no PostgreSQL, or nobody who may run it."""
    if programs() is None:
        pytest.skip("PostgreSQL (initdb, postgres) is not installed")
    pytest.importorskip("psycopg")
    user = None
    if os.geteuid() == 0:
        # It refuses to run as root.
        names = [entry.pw_name for entry in pwd.getpwall()]
        user = next((name for name in ("postgres", "nobody") if name in names), None)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    with tempfile.TemporaryDirectory(prefix="lmserve-postgres-") as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        server = Postgres(folder, user)
        try:
            yield server
        finally:
            server.close()
