"""A span for each request: what it says, whose trace it joins, and that no collector can hold up a request."""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import MODEL, serve_core
from lmserve import __version__, _core
from lmserve.api.http.tracing import Tracing
from lmserve.cli.errors import CommandError
from lmserve.cli.tracing import endpoint_of, open_tracing
from lmserve.engine.text import TextLayer
from lmserve.keys import Keyring
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from scripted_core import ScriptedCore
from server_process import serving
from tiny_engine import TEMPLATE, byte_tokenizer, formula_engine

from wire import wait_until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
KEY = {"Authorization": "Bearer sk-1"}
BUILT = Path(__file__).parents[2] / "target" / "otelcol" / "otelcol"
OTELCOL = shutil.which("otelcol") or shutil.which("otelcol-contrib") or shutil.which(BUILT)


class Collector:
    """An HTTP server that takes traces as a collector does. It answers `status`, once `answering` is set."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.status = 200
        self.answering = threading.Event()
        self.answering.set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.answering.wait()
                if self.path == "/v1/traces" and collector.status == 200:
                    collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(collector.status)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def resources(self) -> list[Any]:
        return [resource for request in self.requests for resource in request.resource_spans]

    def spans(self) -> list[Span]:
        return [span for resource in self.resources() for scope in resource.scope_spans for span in scope.spans]

    def close(self) -> None:
        self.answering.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    collector = Collector()
    yield collector
    collector.close()


@contextmanager
def tracing(url: str) -> Iterator[Tracing]:
    opened = open_tracing(url, {})
    assert opened is not None
    yield opened
    opened.close()


def attributes(of: Any) -> dict[str, object]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in of.attributes}


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_says_what_a_request_took_and_joins_its_trace(collector: Collector, stream: bool) -> None:
    text = TextLayer(byte_tokenizer(), _core.ChatTemplate(TEMPLATE, b"{}"))
    body = {"prompt": "Hello", "max_tokens": 5, "temperature": 0, "ignore_eos": True, "stream": stream}
    with (
        tracing(collector.url) as opened,
        serve_core(formula_engine(), text, keys=Keyring.of("sk-1"), tracing=opened) as running,
    ):
        headers = {**KEY, **TRACEPARENT, "X-Request-Id": "mine"}
        assert httpx.post(f"{running.url}/v1/completions?x=1", json=body, headers=headers).status_code == 200
        wait_until(lambda: len(collector.spans()) == 1, "the span arrives")
    (span,) = collector.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (span.name, span.kind) == ("POST /v1/completions", Span.SPAN_KIND_SERVER)
    assert span.status.code == Status.STATUS_CODE_UNSET
    said = attributes(span)
    queued, first = said.pop("lmserve.queue_time"), said.pop("gen_ai.response.time_to_first_chunk")
    assert 0 <= queued <= first <= (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert said == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "client.address": "127.0.0.1",
        "lmserve.request.id": "mine",
        "lmserve.key": "key-1",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "lmserve",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 5,
    }
    (resource,) = collector.resources()
    named = attributes(resource.resource)
    assert (named["service.name"], named["service.version"]) == ("lmserve", __version__)


def test_requests_that_fail_and_those_that_are_no_route(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-model")
    with tracing(collector.url) as opened, serve_core(ScriptedCore(), tracing=opened) as running:
        bad = {"traceparent": "00-nonsense"}
        for path, prompt, headers in (
            ("/generate", "[[fail early]]", bad),
            ("/generate", "[[refuse 429 queue_full]]", {}),
            ("/nothing", "", {}),
            ("/chat/completions", "", {}),
        ):
            httpx.post(running.url + path, json={"prompt": prompt, "instance_id": "mine"}, headers=headers)
        httpx.get(f"{running.url}/health")
        wait_until(lambda: len(collector.spans()) == 4, "the spans arrive")
    failed, refused, unknown, short = sorted(collector.spans(), key=lambda span: span.start_time_unix_nano)
    assert (failed.name, failed.status.code, failed.parent_span_id) == (
        "POST /generate",
        Status.STATUS_CODE_ERROR,
        b"",
    )
    assert attributes(failed)["error.type"] == "500"
    assert attributes(failed)["gen_ai.conversation.id"] == "mine"
    assert refused.status.code == Status.STATUS_CODE_UNSET
    assert attributes(refused)["http.response.status_code"] == 429
    assert (unknown.name, attributes(unknown)["http.response.status_code"]) == ("POST", 404)
    assert "gen_ai.operation.name" not in attributes(unknown)
    assert (short.name, attributes(short)["url.path"]) == ("POST /v1/chat/completions", "/chat/completions")
    assert {attributes(resource.resource)["service.name"] for resource in collector.resources()} == {"chat-model"}


def test_a_trace_that_is_not_sampled_stays_so(collector: Collector) -> None:
    with tracing(collector.url) as opened, serve_core(ScriptedCore(), tracing=opened) as running:
        httpx.get(f"{running.url}/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        httpx.get(f"{running.url}/v1/models", headers=TRACEPARENT)
        wait_until(collector.spans, "the span arrives")
    assert [span.trace_id.hex() for span in collector.spans()] == [TRACE]


def test_a_collector_that_is_away_costs_one_line(
    collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")
    caplog.set_level(logging.DEBUG)

    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name.startswith(("lmserve.tracing", "opentelemetry"))]

    collector.close()
    with tracing(collector.url) as opened, serve_core(ScriptedCore(), tracing=opened) as running:

        def ask() -> bool:
            return httpx.get(f"{running.url}/v1/models").status_code == 200

        assert ask()
        wait_until(lines, "the line is written")
        for _ in range(5):
            assert ask()
        back = Collector(collector.port)
        wait_until(lambda: ask() and back.spans(), "spans arrive again", 30)
        wait_until(lambda: len(lines()) > 1, "the line is written")
    back.close()
    first, second = lines()
    where = f"{collector.url}/v1/traces"
    assert first.startswith(f"traces cannot be sent to {where} and are dropped until they can; the exporter reports: ")
    assert "refused" in first
    assert second == f"traces are sent to {where} again"


def test_a_collector_that_does_not_answer_holds_nothing_up(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    collector.answering.clear()
    with serve_core(ScriptedCore(), tracing=Tracing(f"{collector.url}/v1/traces")) as running:
        for _ in range(20):
            assert httpx.get(f"{running.url}/v1/models").status_code == 200
        assert collector.requests == []
        collector.answering.set()
        wait_until(lambda: len(collector.spans()) >= 4, "what the queue held is sent")
        assert len(collector.spans()) < 20
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry") and record.exc_info]


def test_a_refusal_of_the_collector_is_told(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    collector.status = 401
    with tracing(collector.url) as opened, serve_core(ScriptedCore(), tracing=opened) as running:
        httpx.get(f"{running.url}/v1/models")
        wait_until(lambda: "401" in caplog.text, "the line is written")


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, {}, None),
        ("http://c:4318", {}, "http://c:4318/v1/traces"),
        ("http://c:4318/", {"OTEL_SDK_DISABLED": "true"}, "http://c:4318/v1/traces"),
        ("http://c:4318/x/v1/traces", {}, "http://c:4318/x/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/t"}, "http://c/t"),
        ("http://flag", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, "http://flag/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "True"}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
    ],
)
def test_the_flag_counts_more_than_the_environment(
    given: str | None, environment: dict[str, str], expected: str | None
) -> None:
    assert endpoint_of(given, environment) == expected


def test_without_the_packages_the_flag_is_an_error_and_the_variable_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "lmserve.api.http.tracing", None)
    with pytest.raises(CommandError, match=r"--otlp-endpoint needs OpenTelemetry: pip install 'lmserve\[otel\]'"):
        open_tracing("http://c:4318", {})
    assert open_tracing(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}) is None
    assert "pip install 'lmserve[otel]'" in caplog.text
    assert open_tracing(None, {}) is None


def ask_a_server(tmp_path: Path, url: str, arrived: Callable[[], bool]) -> str:
    """`lmserve serve` with traces to `url`, a question to it, and its end once the trace has arrived; its output."""
    with serving(tmp_path, "--otlp-endpoint", url) as server:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=TRACEPARENT, timeout=60).raise_for_status()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        wait_until(arrived, "the span arrives")
        return server.output()


def test_a_server_that_stops_sends_its_last_spans(
    collector: Collector, tmp_path: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert smollm2_gguf.is_file()
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    ask_a_server(tmp_path, collector.url, lambda: bool(collector.spans()))
    (span,) = collector.spans()
    assert (span.trace_id.hex(), attributes(span)["gen_ai.usage.output_tokens"]) == (TRACE, 4)


COLLECTOR_CONFIG = """
receivers: {{otlp: {{protocols: {{http: {{endpoint: "127.0.0.1:{port}"}}}}}}}}
exporters: {{debug: {{verbosity: detailed}}}}
service:
  pipelines: {{traces: {{receivers: [otlp], exporters: [debug]}}}}
  telemetry: {{metrics: {{level: none}}}}
"""


@pytest.mark.skipif(OTELCOL is None, reason="no OpenTelemetry collector (otelcol): `make otelcol` builds one")
def test_a_real_collector_takes_the_trace(tmp_path: Path, smollm2_gguf: Path) -> None:
    assert smollm2_gguf.is_file()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config, output = tmp_path / "config.yaml", tmp_path / "collected"
    config.write_text(COLLECTOR_CONFIG.format(port=port), "utf-8")
    with (
        output.open("wb") as file,
        subprocess.Popen([OTELCOL, "--config", config], stdout=file, stderr=file) as process,
    ):
        try:
            wait_until(lambda: "Everything is ready" in output.read_text("utf-8"), "the collector listens", 60)
            url = f"http://127.0.0.1:{port}"
            ask_a_server(tmp_path, url, lambda: "POST /v1/chat/completions" in output.read_text("utf-8"))
        finally:
            process.terminate()
    collected = output.read_text("utf-8")
    assert f"Trace ID       : {TRACE}" in collected
    assert f"Parent ID      : {PARENT}" in collected
    assert "gen_ai.usage.output_tokens: Int(4)" in collected
    assert "service.name: Str(lmserve)" in collected
