"""Sends a span for each request to an OpenTelemetry collector, by OTLP over HTTP. Needs the extra `lmserve[otel]`.

The span is created when its request has ended. It waits in a bounded queue, from which a thread of the SDK sends it.
The attributes follow the semantic conventions for HTTP servers and for generative AI; ours begin with `lmserve.`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lmserve import __version__
from lmserve.api.http.request_log import Entry, is_probe

logger = logging.getLogger("lmserve.tracing")

FLUSH_SECONDS: Final = 2.0  # how long a server that stops waits for its last spans to be sent
NANOSECONDS: Final = 1_000_000_000
CONTEXT_HEADERS: Final = (b"traceparent", b"tracestate")  # of W3C's Trace Context
# `gen_ai.operation.name` of each route that has one.
OPERATIONS: Final = {
    "/generate": "chat",
    "/v1/chat/completions": "chat",
    "/v1/chat/interactive": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
}
# Says for each batch what `_Sender` says once.
EXPORTER_LOG: Final = logging.getLogger("opentelemetry.exporter")
# Says for each span that the queue is full.
QUEUE_LOG: Final = logging.getLogger("opentelemetry.sdk._shared_internal")


class Tracing:
    """Where the spans of this server's requests go."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: the URL that spans are posted to. The variables OTEL_* of the SDK hold for all else."""
        self._context = TraceContextTextMapPropagator()
        found = OTELResourceDetector().detect().attributes
        resource = Resource.create({"service.name": "lmserve", "service.version": __version__, **found})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Sender(endpoint)))
        self._tracer = self._provider.get_tracer("lmserve", __version__)

    def request(
        self, entry: Entry, *, route: str | None, scheme: str, model: str, given: Mapping[bytes, bytes]
    ) -> None:
        """A request has ended now. Does not block.

        `route`: the template of its path; None: there is no such route. `given`: its headers. Probes that find the
        server well have no span.
        """
        if is_probe(entry):
            return
        ended = entry.ended_ns
        carrier = {name.decode(): given[name].decode("latin-1") for name in CONTEXT_HEADERS if name in given}
        span = self._tracer.start_span(
            entry.method if route is None else f"{entry.method} {route}",
            context=self._context.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=_attributes(entry, route, scheme, model),
            start_time=ended - round(entry.duration_s * NANOSECONDS),
        )
        if entry.status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(ended)

    def close(self) -> None:
        """Send what is left, for at most FLUSH_SECONDS."""
        # The SDK itself would wait up to 30 s for a collector that does not answer.
        closing = threading.Thread(target=self._provider.shutdown, name="close-tracing", daemon=True)
        closing.start()
        closing.join(FLUSH_SECONDS)


def _attributes(entry: Entry, route: str | None, scheme: str, model: str) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float | None] = {
        "http.request.method": entry.method,
        "http.response.status_code": entry.status,
        "http.route": route,
        "url.path": entry.path,
        "url.scheme": scheme,
        "client.address": entry.client,
        "error.type": str(entry.status) if entry.status >= 500 else None,
        "lmserve.request.id": entry.id,
        "lmserve.key": entry.key,
        "lmserve.batch.id": entry.batch,
        "lmserve.queue_time": entry.queue_s,
    }
    if (operation := OPERATIONS.get(route or "")) is not None and entry.method == "POST":
        attributes |= {
            "gen_ai.conversation.id": None if entry.session is None else str(entry.session),
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "lmserve",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.response.time_to_first_chunk": entry.first_token_s,
            "gen_ai.usage.input_tokens": entry.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": entry.cached_tokens,
            "gen_ai.usage.output_tokens": entry.completion_tokens,
        }
    return {name: value for name, value in attributes.items() if value is not None}


class _Sender(SpanExporter):
    """Sends spans to the collector. Says in the log when it begins to fail and when it works again, once each."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._failing = False
        self._heard = _LastWords()
        EXPORTER_LOG.handlers = [self._heard]
        EXPORTER_LOG.propagate = False
        QUEUE_LOG.addFilter(lambda record: not self._failing or record.levelno > logging.WARNING)
        self._exporter = OTLPSpanExporter(endpoint)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._heard.words = None
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._failing:
            message = "traces cannot be sent to %s and are dropped until they can; the exporter reports: %s"
            logger.warning(message, self._endpoint, self._heard.words)
        elif self._failing and not failed:
            logger.warning("traces are sent to %s again", self._endpoint)
        self._failing = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _LastWords(logging.Handler):
    """Keeps the first warning since `words` was None: the ones after it say less."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.words is None:
            self.words = record.getMessage()
