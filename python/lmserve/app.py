"""The HTTP application: routes over one engine, as an ASGI app that other apps can mount."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from litestar import Litestar, Response, route
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.handlers import HTTPRouteHandler
from litestar.middleware import DefineMiddleware
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme
from litestar.types import LifeSpanReceive, LifeSpanScope, LifeSpanSend, Receive, Scope, Send

from lmserve import __version__
from lmserve.api.http.accounting import Accounting
from lmserve.api.http.edge import Edge
from lmserve.api.http.errors import respond_to_exception
from lmserve.api.http.members import ChooseModel, Members
from lmserve.api.http.middleware import ApiKeys, BodyLimits
from lmserve.api.http.openapi import docs, docs_asset, document, openapi_json
from lmserve.api.http.request_log import Form
from lmserve.api.http.serving import Serving
from lmserve.api.responses.store import ResponseStore
from lmserve.api.routes.adapters import load_lora_adapter, unload_lora_adapter
from lmserve.api.routes.batches import cancel_batch, create_batch, get_batch, list_batches
from lmserve.api.routes.chat import chat_completions
from lmserve.api.routes.cohere import embed_by_type
from lmserve.api.routes.completions import completions
from lmserve.api.routes.conversations import (
    create_conversation,
    create_conversation_items,
    delete_conversation,
    delete_conversation_item,
    get_conversation,
    get_conversation_item,
    list_conversation_items,
    update_conversation,
)
from lmserve.api.routes.embeddings import embeddings
from lmserve.api.routes.files import delete_file, get_file, get_file_content, list_files, upload_file
from lmserve.api.routes.generate import generate
from lmserve.api.routes.health import health, live
from lmserve.api.routes.interactive import chat_interactive
from lmserve.api.routes.messages import count_tokens, create_message
from lmserve.api.routes.metrics import metrics
from lmserve.api.routes.models import get_model, list_models
from lmserve.api.routes.response_tools import compact_response, count_input_tokens
from lmserve.api.routes.responses import (
    cancel_response,
    create_response,
    delete_response,
    get_response,
    list_input_items,
)
from lmserve.api.routes.responses_socket import responses_socket
from lmserve.api.routes.scoring import classify, rerank, score
from lmserve.api.routes.server import ping, props, version
from lmserve.api.routes.session_state import (
    export_session,
    import_session,
    list_session_completions,
    retain_session,
)
from lmserve.api.routes.sessions import (
    append_to_session,
    cancel_session,
    continue_session,
    delete_session,
    fork_session,
    get_session,
    get_transcript,
    list_sessions,
    rewind_session,
)
from lmserve.api.routes.tei import embed, rerank_texts
from lmserve.api.routes.tokenize import detokenize, encode, tokenize, tokenizer_info
from lmserve.api.routes.usage import usage
from lmserve.api.routes.web import index, web_file
from lmserve.api.state.database import Database
from lmserve.engine.async_engine import AsyncEngine
from lmserve.keys import Keyring

if TYPE_CHECKING:
    from lmserve.api.http.tracing import Tracing

MAX_BODY: Final = 32 * 1024 * 1024
BODY_TIMEOUT: Final = 60.0

API: Final = (
    generate,
    list_models,
    get_model,
    chat_completions,
    completions,
    create_response,
    get_response,
    list_input_items,
    cancel_response,
    delete_response,
    count_input_tokens,
    compact_response,
    create_conversation,
    get_conversation,
    update_conversation,
    delete_conversation,
    list_conversation_items,
    create_conversation_items,
    get_conversation_item,
    delete_conversation_item,
    upload_file,
    list_files,
    get_file,
    get_file_content,
    delete_file,
    create_batch,
    list_batches,
    get_batch,
    cancel_batch,
    create_message,
    count_tokens,
    embeddings,
    embed_by_type,
    embed,
    score,
    rerank,
    rerank_texts,
    classify,
    chat_interactive,
    tokenize,
    detokenize,
    encode,
    tokenizer_info,
    list_sessions,
    get_session,
    get_transcript,
    fork_session,
    rewind_session,
    append_to_session,
    continue_session,
    cancel_session,
    delete_session,
    list_session_completions,
    export_session,
    import_session,
    retain_session,
    usage,
    load_lora_adapter,
    unload_lora_adapter,
    metrics,
    health,
    live,
    ping,
    version,
    props,
)
SOCKETS: Final = (responses_socket,)
PAGES: Final = (index, web_file, docs, docs_asset, openapi_json)


class Application(Litestar):
    """Litestar, within what every request goes through: `edge`."""

    edge: Edge

    async def __call__(
        self,
        scope: Scope | LifeSpanScope,
        receive: Receive | LifeSpanReceive,
        send: Send | LifeSpanSend,
    ) -> None:
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
        else:
            await self.edge(scope, receive, send)  # type: ignore[arg-type]


def create_app(
    engine: AsyncEngine | Callable[[], AsyncEngine] | Members,
    model_names: Sequence[str] = (),
    *,
    keys: Keyring | None = None,
    responses: ResponseStore | None = None,
    database: Database | None = None,
    cors_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] | None = None,
    request_log: Form = "off",
    tracing: Tracing | None = None,
    max_body: int = MAX_BODY,
    body_timeout: float = BODY_TIMEOUT,
    agent_sessions: bool = True,
    adapters: Sequence[str] = (),
    lora_dir: Path | None = None,
) -> Application:
    """The application.

    `engine`: a ready one, or a function that loads one; it runs on a thread of its own while /health answers 503, and
    its engine is shut down with the app. Or several models, which bring their names and keys. `model_names`: the first
    is the model's id, the others are accepted and listed too. `keys`: one of them is asked for on every route but
    /health and the pages, which hold no data; their limits are
    the engine's to hold, which must have been given `keys.tenants()`. `responses`: where stored responses are kept,
    restored by the time that the engine is there; None: in memory alone. `database`: where conversations are kept, as
    well; it must know the tenants of `keys`. `cors_origins`: of pages that may use the
    server; without keys, pages of other origins can change nothing. `allowed_hosts`: names that a request may give as
    the server's (Host), besides localhost and addresses such as 127.0.0.1; None: any. `request_log`: the form of a line
    for each request. `tracing`: where a span for each request goes; its owner closes it. `max_body`: bytes of a
    request's body, which must arrive within `body_timeout` seconds. `agent_sessions`: whether the headers of agents and
    prompt_cache_key name conversations. `adapters`, `lora_dir`: as `Serving` has them.
    """
    keys = keys or Keyring()
    if isinstance(engine, Members):
        serving: Serving = engine
        choosing = [DefineMiddleware(ChooseModel, members=engine)]
    else:
        serving = Serving(
            model_names,
            engine,
            keys,
            responses,
            database,
            agent_sessions=agent_sessions,
            adapters=adapters,
            lora_dir=lora_dir,
        )
        choosing = []

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        loading = asyncio.create_task(serving.load())
        try:
            yield
        finally:
            loading.cancel()
            await serving.close()

    app = Application(
        [*shared_path_options(API), *API, *PAGES, *SOCKETS],
        exception_handlers={Exception: respond_to_exception},
        middleware=[
            DefineMiddleware(ApiKeys, keys=keys),
            DefineMiddleware(BodyLimits, max_bytes=max_body, timeout=body_timeout),
            *choosing,
        ],
        cors_config=CORSConfig(allow_origins=list(cors_origins)) if cors_origins else None,
        # BodyLimits has its own, which lets clients finish sending.
        request_max_body_size=None,
        lifespan=[lifespan],
        # Litestar's own pages load scripts from other servers.
        openapi_config=None,
        logging_config=None,
        state=State({"serving": serving, "openapi_json": partial(openapi_document, secured=bool(keys))}),
    )
    routes = super(Application, app).__call__
    app.edge = Edge(
        routes,
        paths=[path for handler in (*API, *PAGES) for path in handler.paths],
        keys=serving.keys,
        accounting=Accounting(serving, request_log, tracing),
        hosts=allowed_hosts,
        origins=cors_origins,
    )
    serving.batch_runner.app = app.edge
    return app


def openapi_document(*, secured: bool) -> bytes:
    """The OpenAPI document of all routes as JSON; `secured`: they need a key. The first call takes half a second."""
    with _one_document:
        return _openapi_document(secured)


_one_document = threading.Lock()


@cache
def _openapi_document(secured: bool) -> bytes:
    config = OpenAPIConfig(
        title="lmserve",
        version=__version__,
        description="LMDeploy's /generate with sessions on the server, OpenAI's API and Anthropic's API.",
        components=Components(security_schemes={"key": SecurityScheme(type="http", scheme="bearer")}),
        security=[{"key": []}] if secured else None,
    )
    return document(Litestar(API, openapi_config=config, logging_config=None).openapi_schema.to_schema())


def shared_path_options(handlers: Sequence[HTTPRouteHandler]) -> list[HTTPRouteHandler]:
    """Handlers of OPTIONS for the paths that several handlers share.

    Litestar's own would tell the methods of the first handler alone.
    """
    methods: dict[str, list[str]] = {}
    for handler in handlers:
        for path in handler.paths:
            methods.setdefault(path, []).extend(handler.http_methods)
    return [_options(path, [*found, "OPTIONS"]) for path, found in methods.items() if len(found) > 1]


def _options(path: str, methods: Sequence[str]) -> HTTPRouteHandler:
    headers = {"Allow": ", ".join(sorted(methods))}

    @route(path, http_method="OPTIONS", include_in_schema=False)
    async def options() -> Response[None]:
        return Response(None, status_code=204, headers=headers)

    return options
