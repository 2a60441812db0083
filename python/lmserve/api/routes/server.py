"""`GET /version`, `/ping` and `/props`, for clients and load balancers of vLLM, SageMaker and llama.cpp."""

from __future__ import annotations

from typing import Any

from litestar import Request, get

from lmserve import __version__
from lmserve.api.http.middleware import PUBLIC
from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import serving_of
from lmserve.api.routes.health import health_of
from lmserve.schemas.health import HealthReply
from lmserve.schemas.server import GenerationSettings, Modalities, PropsReply, VersionReply


@get(
    "/version",
    opt={PUBLIC: True},
    operation_id="version",
    summary="Read the server's version",
    description="vLLM's route. Needs no API key.",
    tags=["server"],
    security=[{}],
    responses=responses(VersionReply),
)
async def version() -> VersionReply:
    """The version of lmserve, also while the model is loaded."""
    return VersionReply(__version__)


@get(
    "/ping",
    opt={PUBLIC: True},
    operation_id="ping",
    summary="Check whether the server takes requests, for SageMaker",
    description="The same as `/health`, under SageMaker's name. Needs no API key.",
    tags=["server"],
    security=[{}],
    responses=responses(HealthReply, 503),
)
async def ping(request: Request[Any, Any, Any]) -> HealthReply:
    """Raises LmserveError (503) while no request would be served."""
    return health_of(serving_of(request))


@get(
    "/props",
    operation_id="props",
    summary="Read the served model's context and chat template",
    description="llama.cpp's route.",
    tags=["server"],
    responses=responses(PropsReply, 401, 503),
)
async def props(request: Request[Any, Any, Any]) -> PropsReply:
    """Raises LmserveError (503) while there is no engine to serve with."""
    serving = serving_of(request)
    engine = serving.engine
    return PropsReply(
        default_generation_settings=GenerationSettings(engine.max_model_len),
        model_alias=serving.names[0],
        chat_template=(engine.text.template_source if engine.text is not None else None) or "",
        modalities=Modalities(),
        build_info=f"lmserve {__version__}",
    )
