"""The results of runs as text: a row per run."""

from __future__ import annotations

from lmserve.bench.report import RunReport, Spread

HEAD = (
    f"{'':<14}{'':>8}{'':>9}  {'tokens/s':^19}  {'time to first token, ms':^27}  {'between tokens, ms':^23}\n"
    f"{'workload':<14}{'clients':>8}{'requests':>9}  {'output':>9} {'total':>9}  "
    f"{'p50':>8} {'p90':>9} {'p99':>8}  {'p50':>7} {'p90':>7} {'p99':>7}  errors"
)


COLUMNS = max(map(len, HEAD.splitlines()))


def row(report: RunReport) -> str:
    """A run's line under `HEAD`, and its errors and turns on further lines."""
    line = (
        f"{report.workload:<14}{report.concurrency:>8}{report.requests:>9}  "
        f"{_figure(report.output_tokens_per_s, 9)} {_figure(report.total_tokens_per_s, 9)}  "
        f"{_spread(report.ttft_ms, (8, 9, 8))}  {_spread(report.inter_token_ms, (7, 7, 7))}  {report.error_count:>6}"
    )
    return "\n".join([line, *_more(report)])


def block(report: RunReport) -> str:
    """A run's figures on lines of their own, for a terminal that is narrower than `COLUMNS`."""
    clients = f"{report.concurrency} client{'' if report.concurrency == 1 else 's'}"
    lines = [
        f"{report.workload}, {clients}, {report.requests} requests, {report.error_count} errors",
        f"  {'tokens/s':<24} output {_figure(report.output_tokens_per_s)}  total {_figure(report.total_tokens_per_s)}",
        f"  {'time to first token, ms':<24} {_named(report.ttft_ms)}",
        f"  {'between tokens, ms':<24} {_named(report.inter_token_ms)}",
        *_more(report),
    ]
    return "\n".join(lines)


def _more(report: RunReport) -> list[str]:
    """Errors, and turns where there are several."""
    lines = [f"  {count} x {error}" for error, count in report.errors.items()]
    if len(report.turn_ttft_ms) > 1:
        turns = " ".join(_figure(None if turn is None else turn.p50, 7) for turn in report.turn_ttft_ms)
        lines.append(f"  p50 of turn 1 to {len(report.turn_ttft_ms)}, time to first token, ms: {turns}")
    return lines


def _figure(value: float | None, width: int = 0) -> str:
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:>{width},.0f}" if value >= 1000 else f"{value:>{width}.1f}"


def _spread(spread: Spread | None, widths: tuple[int, int, int]) -> str:
    values = (None, None, None) if spread is None else (spread.p50, spread.p90, spread.p99)
    return " ".join(_figure(value, width) for value, width in zip(values, widths, strict=True))


def _named(spread: Spread | None) -> str:
    values = (None, None, None) if spread is None else (spread.p50, spread.p90, spread.p99)
    return "  ".join(f"{name} {_figure(value)}" for name, value in zip(("p50", "p90", "p99"), values, strict=True))
