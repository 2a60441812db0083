"""The outcome of `lmserve simulate --trace` as text and as a plot."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Struct

from lmserve import _core
from lmserve.bench.svg import SHADES, Panel, Series, figure
from lmserve.capacity.setup import ServerSizes, StepModel


class Spread(Struct, frozen=True):
    """Percentiles of a time in milliseconds."""

    p50: float
    p90: float
    p99: float
    mean: float
    worst: float


class Moment(Struct, frozen=True):
    """A span of the timeline, as the average of one replica, but for the rate, which is of all."""

    at_s: float
    output_tokens_per_s: float
    running: float
    waiting: float
    kv_share: float
    ttft_ms: Spread | None


class Capacity(Struct, frozen=True):
    """What the trace came to; see src/sim/capacity.rs. `busy`: share of the time in which a replica computed."""

    completed: int
    refused: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    computed_tokens: int
    steps: int
    preemptions: int
    recomputed_tokens: int
    evictions: int
    elapsed_s: float
    busy: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Spread | None
    inter_token_ms: Spread | None
    timeline: list[Moment]


def simulate(trace: bytes, step_model: StepModel, sizes: ServerSizes, replicas: int) -> Capacity:
    """Put a trace (JSON lines) on `replicas` servers. Raises LmserveError for a line or a size that cannot be."""
    setup = msgspec.structs.asdict(sizes) | {"step_model": step_model, "replicas": replicas}
    return msgspec.json.decode(_core.capacity(trace, msgspec.json.encode(setup)), type=Capacity)


def table(capacity: Capacity) -> str:
    """The figures as lines."""
    c = capacity
    cached = c.cached_tokens / max(c.prompt_tokens, 1)
    again = c.recomputed_tokens / max(c.computed_tokens, 1)
    lines = [
        f"{'requests':>20} {c.completed:>14,}",
        *(f"{f'refused, {code}':>20} {count:>14,}" for code, count in c.refused.items()),
        f"{'time':>20} {c.elapsed_s:>14,.1f} s, of which a replica computed {c.busy:.0%}",
        f"{'output tokens':>20} {c.output_tokens:>14,} {c.output_tokens_per_s:>12,.1f} /s",
        f"{'prompt tokens':>20} {c.prompt_tokens:>14,} {cached:>12.1%} cached",
        f"{'steps':>20} {c.steps:>14,} {c.computed_tokens / max(c.steps, 1):>12,.1f} tokens each",
        f"{'preemptions':>20} {c.preemptions:>14,} {c.evictions:>12,} blocks evicted",
        f"{'computed again':>20} {c.recomputed_tokens:>14,} {again:>12.1%} of all computed tokens",
        "",
        f"{'ms':>20} {'p50':>10} {'p90':>10} {'p99':>10} {'mean':>10} {'worst':>10}",
    ]
    for name, spread in (("time to first token", c.ttft_ms), ("between tokens", c.inter_token_ms)):
        if spread is not None:
            values = (spread.p50, spread.p90, spread.p99, spread.mean, spread.worst)
            lines.append(f"{name:>20} " + " ".join(f"{value:>10,.1f}" for value in values))
    return "\n".join(lines)


def plot(title: str, subtitle: str, capacity: Capacity) -> str:
    """An SVG of the timeline."""
    moments = capacity.timeline
    seconds = [moment.at_s for moment in moments]

    def series(name: str, value: Callable[[Moment], float | None]) -> Series:
        return Series(name, [value(moment) for moment in moments])

    def of(spread: Spread | None, percentile: str) -> float | None:
        return None if spread is None else getattr(spread, percentile)

    waits = [Series(p, [of(moment.ttft_ms, p) for moment in moments]) for p in ("p50", "p90", "p99")]
    rates = [series("output", lambda moment: moment.output_tokens_per_s)]
    requests = [series("running", lambda moment: moment.running), series("waiting", lambda moment: moment.waiting)]
    blocks = [series("in use", lambda moment: 100 * moment.kv_share)]
    rows = [
        [
            Panel("throughput", "output tokens/s", "seconds", seconds, rates),
            Panel("time to first token", "ms", "seconds, at which the client began to wait", seconds, waits, SHADES),
        ],
        [
            Panel("requests", "on average, of a replica", "seconds", seconds, requests),
            Panel("KV cache", "% of its blocks in use", "seconds", seconds, blocks),
        ],
    ]
    return figure(title, subtitle, rows)
