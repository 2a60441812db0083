"""The results of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from msgspec import Struct

from lmserve.bench.load import Run
from lmserve.bench.outcome import Outcome


class Spread(Struct, frozen=True):
    """Percentiles of a time in milliseconds."""

    p50: float
    p90: float
    p99: float
    mean: float
    worst: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Percentiles between neighbours are interpolated."""
        values = 1e3 * np.asarray(seconds, np.float64)
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(p50, p90, p99, values.mean().item(), values.max().item())


class RunReport(Struct, frozen=True):
    """One workload at one concurrency. Requests with an error count in `requests` and `errors` alone.

    `inter_token_ms`: between one chunk of text and the next; None if no reply had two. `turn_ttft_ms`: of each turn.
    """

    workload: str
    concurrency: int
    requests: int
    errors: dict[str, int]
    elapsed_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Spread | None
    inter_token_ms: Spread | None
    turn_ttft_ms: list[Spread | None]

    @property
    def error_count(self) -> int:
        return sum(self.errors.values())


def report_of(run: Run) -> RunReport:
    """The figures of `run`."""
    good = [outcome for outcome in run.outcomes if outcome.error is None]
    usages = [outcome.usage for outcome in good if outcome.usage is not None]
    prompt, output = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    gaps = [later - earlier for outcome in good for earlier, later in pairwise(outcome.arrivals)]
    return RunReport(
        workload=run.workload,
        concurrency=run.concurrency,
        requests=len(run.outcomes),
        errors=dict(Counter(outcome.error for outcome in run.outcomes if outcome.error is not None)),
        elapsed_s=run.elapsed,
        prompt_tokens=prompt,
        output_tokens=output,
        output_tokens_per_s=output / run.elapsed,
        total_tokens_per_s=(prompt + output) / run.elapsed,
        ttft_ms=_first_tokens(good),
        inter_token_ms=Spread.of(gaps) if gaps else None,
        turn_ttft_ms=[_first_tokens([o for o in turn if o.error is None]) for turn in run.turns],
    )


def _first_tokens(outcomes: Sequence[Outcome]) -> Spread | None:
    return Spread.of([outcome.time_to_first_token for outcome in outcomes]) if outcomes else None
