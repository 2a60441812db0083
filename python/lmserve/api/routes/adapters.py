"""`POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`: vLLM's routes, where `--lora-dir` allows them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Final

from litestar import Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import Serving, serving_of
from lmserve.engine.adapters import Adapters
from lmserve.errors import LmserveError
from lmserve.schemas.adapters import LoadLoraRequest, UnloadLoraRequest
from lmserve.schemas.errors import ErrorReply

logger = logging.getLogger("lmserve.engine")

TEXT: Final = "text/plain"
DONE: Final = {200: ResponseSpec(str, media_type=TEXT, description="What was done.", generate_examples=False)}


@post(
    "/v1/load_lora_adapter",
    dto=StrictJson[LoadLoraRequest],
    return_dto=None,
    status_code=200,
    operation_id="load_lora_adapter",
    summary="Load an adapter",
    description="vLLM's route, for servers with --lora-dir. Requests can name the adapter as model once the reply is "
    "there.",
    tags=["Adapters"],
    responses=responses(ErrorReply, 400, 401, 403, 404, 408, 409, 413, 503) | DONE,
)
async def load_lora_adapter(data: JSONBody[LoadLoraRequest], request: Request[Any, Any, Any]) -> Response[str]:
    """The adapter, from a folder of the server."""
    serving = serving_of(request)
    adapters, folder = _changeable(serving)
    if data.lora_name in serving.names:
        message = f"{data.lora_name!r} is a name of the model; choose another one"
        raise LmserveError.new(409, "adapter_exists", message, param="lora_name")
    path = await asyncio.to_thread(_below, folder, data.lora_path)
    loaded = await asyncio.to_thread(adapters.load, data.lora_name, path)
    logger.info("the adapter %s of rank %d was loaded from %s", loaded.name, loaded.rank, loaded.path)
    return Response(f"Success: LoRA adapter '{loaded.name}' added successfully.", media_type=TEXT)


@post(
    "/v1/unload_lora_adapter",
    dto=StrictJson[UnloadLoraRequest],
    return_dto=None,
    status_code=200,
    operation_id="unload_lora_adapter",
    summary="Unload an adapter",
    description="vLLM's route, for servers with --lora-dir. An adapter that requests use is 409 adapter_in_use.",
    tags=["Adapters"],
    responses=responses(ErrorReply, 400, 401, 403, 404, 408, 409, 413, 503) | DONE,
)
async def unload_lora_adapter(data: JSONBody[UnloadLoraRequest], request: Request[Any, Any, Any]) -> Response[str]:
    """What it has computed for sessions stays, and is continued once it is loaded again."""
    adapters, _ = _changeable(serving_of(request))
    await asyncio.to_thread(adapters.unload, data.lora_name)
    logger.info("the adapter %s was unloaded", data.lora_name)
    return Response(f"Success: LoRA adapter '{data.lora_name}' removed successfully.", media_type=TEXT)


def _changeable(serving: Serving) -> tuple[Adapters, Path]:
    """The adapters, and the folder that new ones are in. Raises LmserveError (403, 503)."""
    adapters = serving.engine.adapters
    if serving.lora_dir is None or adapters is None:
        message = "this server loads and unloads no adapters on request; --lora-dir allows it for those of a folder"
        raise LmserveError.new(403, "adapter_updates_off", message)
    return adapters, serving.lora_dir


def _below(folder: Path, given: str) -> Path:
    """The folder of an adapter. Raises LmserveError (400) for one that is not below the server's folder."""
    try:
        whole = folder.resolve()
        path = (whole / given).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise LmserveError.invalid("lora_path", f"lora_path {given!r} cannot be a path: {error}") from error
    if not path.is_relative_to(whole) or path == whole:
        raise LmserveError.invalid("lora_path", f"lora_path must lie below the folder of --lora-dir, but is {given!r}")
    return path
