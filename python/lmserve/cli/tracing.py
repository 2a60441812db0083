"""Whether traces are sent, and where to: --otlp-endpoint, else the variables that OpenTelemetry's programs share."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from lmserve.cli.errors import CommandError

if TYPE_CHECKING:
    from lmserve.api.http.tracing import Tracing

logger = logging.getLogger("lmserve.tracing")

TRACES_PATH: Final = "/v1/traces"  # below an endpoint that serves traces, metrics and logs
INSTALL: Final = "pip install 'lmserve[otel]'"
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def open_tracing(given: str | None, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """`given`: of --otlp-endpoint. None: no traces are sent.

    Raises CommandError if traces were asked for by the flag, and the packages for them are not installed.
    """
    endpoint = endpoint_of(given, environment)
    if endpoint is None:
        return None
    try:
        from lmserve.api.http.tracing import Tracing
    except ImportError as error:
        if given is not None:
            raise CommandError(f"--otlp-endpoint needs OpenTelemetry: {INSTALL}") from error
        # The variable may be there for every program of this machine.
        logger.warning(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but lmserve needs OpenTelemetry to send traces: %s", INSTALL
        )
        return None
    return Tracing(endpoint)


def endpoint_of(given: str | None, environment: Mapping[str, str]) -> str | None:
    """The URL that traces are posted to; None: none are."""
    if given is not None:
        return given if given.endswith(TRACES_PATH) else given.rstrip("/") + TRACES_PATH
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    whole = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = whole or (base and base.rstrip("/") + TRACES_PATH) or None
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), None)
    if endpoint is not None and protocol not in (None, "http/protobuf"):
        message = (
            "lmserve sends traces as http/protobuf only, so it sends none for the protocol %s of the environment; "
        )
        logger.warning(message + "--otlp-endpoint takes the collector's HTTP port (4318)", protocol)  # noqa: G003
        return None
    return endpoint
