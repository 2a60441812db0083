"""Several runs against one server, and their results as text, JSON and a plot."""

from __future__ import annotations

import platform
import random
import time
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import uvloop
from msgspec import Struct

from lmserve import __version__
from lmserve.bench.http import Target
from lmserve.bench.load import Load, Server, ServerError, discover
from lmserve.bench.plot import plot
from lmserve.bench.report import RunReport, report_of
from lmserve.bench.workload import WORKLOADS, Sizes, Turn, Workload

WARM_UP_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What to measure. `concurrency`: of each workload; none: the workload's own."""

    target: Target
    workloads: tuple[Workload, ...] = (WORKLOADS["mixed"],)
    concurrency: tuple[int, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 0
    model: str | None = None
    timeout: float = 600.0
    resend_history: bool = False


class Result(Struct, frozen=True):
    """The figures of a campaign. `started`: seconds since 1970. `client`: who measured."""

    url: str
    model: str
    seed: int
    started: float
    client: str
    runs: list[RunReport]

    def to_json(self) -> bytes:
        """All of it, indented."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def to_svg(self) -> str:
        """A plot of the runs."""
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.started))
        return plot(f"{self.model} at {self.url}", f"{date}, {self.client}, seed {self.seed}", self.runs)


class Watcher(Protocol):
    """Told how a campaign goes."""

    def started(self, server: Server) -> None:
        """The server has answered, and the first run begins."""

    def progressed(self, load: Load) -> None:
        """A request of the run has ended."""

    def finished(self, report: RunReport) -> None:
        """A run has ended."""


def measure(campaign: Campaign, watcher: Watcher) -> Result:
    """Run all of it. Raises ServerError if the server cannot be measured."""
    return uvloop.run(_measure(campaign, watcher))


async def _measure(campaign: Campaign, watcher: Watcher) -> Result:
    started = time.time()
    server = await discover(
        campaign.target,
        model=campaign.model,
        patience=campaign.timeout,
        resend_history=campaign.resend_history,
    )
    await _warm_up(server)
    watcher.started(server)
    # Sessions of other campaigns live on the same server.
    session = random.Random(campaign.seed).getrandbits(50)  # noqa: S311 - not a secret
    reports = []
    for workload in campaign.workloads:
        for concurrency in campaign.concurrency or workload.concurrency:
            conversations = workload.conversations(campaign.seed, concurrency, campaign.sizes)
            load = Load(server, workload, concurrency, conversations, first_session=session, on_end=watcher.progressed)
            session += len(conversations)
            report = report_of(await load.run())
            watcher.finished(report)
            reports.append(report)
    client = f"lmserve {__version__}, Python {platform.python_version()}, {platform.machine()}"
    return Result(server.target.url, server.model, campaign.seed, started, client, reports)


async def _warm_up(server: Server) -> None:
    """One short request that does not count. Raises ServerError if it fails: so would all others."""
    greeting = Workload("warm-up", "", "completions", (1,), lambda *_: [])
    load = Load(server, greeting, 1, [(Turn("Hello, world", WARM_UP_TOKENS),)], first_session=0)
    (outcome,) = (await load.run()).outcomes
    if outcome.error is not None:
        raise ServerError(f"the first request to {server.target.url} failed: {outcome.error}")
