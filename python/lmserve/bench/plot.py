"""The results of runs as a plot: a row of panels per workload."""

from __future__ import annotations

from collections.abc import Sequence

from lmserve.bench.report import RunReport, Spread
from lmserve.bench.svg import SHADES, Panel, Series, figure

PERCENTILES = ("p50", "p90", "p99")


def plot(title: str, subtitle: str, reports: Sequence[RunReport]) -> str:
    """An SVG of all reports."""
    workloads = list(dict.fromkeys(report.workload for report in reports))
    return figure(title, subtitle, [_row([r for r in reports if r.workload == name]) for name in workloads])


def _row(reports: Sequence[RunReport]) -> list[Panel]:
    name = reports[0].workload
    clients = [str(report.concurrency) for report in reports]
    rates = [Series("output", [report.output_tokens_per_s for report in reports])]
    first = [report.ttft_ms for report in reports]
    gaps = [report.inter_token_ms for report in reports]
    turns = reports[-1].turn_ttft_ms
    panels = [
        Panel(name, "output tokens/s", "clients", clients, rates),
        Panel("time to first token", "ms", "clients", clients, _percentiles(first), SHADES),
        Panel("between tokens", "ms", "clients", clients, _percentiles(gaps), SHADES),
    ]
    if len(turns) > 1:
        numbers = [float(turn) for turn in range(1, len(turns) + 1)]
        title = f"time to first token, {clients[-1]} clients"
        panels.append(Panel(title, "ms", "turn", numbers, _percentiles(turns), SHADES))
    return panels


def _percentiles(spreads: Sequence[Spread | None]) -> list[Series]:
    return [Series(p, [None if spread is None else getattr(spread, p) for spread in spreads]) for p in PERCENTILES]
