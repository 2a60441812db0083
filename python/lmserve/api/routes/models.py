"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from litestar import Request, get
from litestar.params import FromPath

from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import Serving, serving_of
from lmserve.schemas.models import ModelCard, ModelList, ModelPermission


@get(
    "/v1/models",
    operation_id="list_models",
    summary="List the served models",
    tags=["OpenAI"],
    responses=responses(ModelList, 401, 503),
)
async def list_models(request: Request[Any, Any, Any]) -> ModelList:
    """Each name under which the model is served, and each adapter."""
    serving = serving_of(request)
    return ModelList(data=[_card(serving, name) for name in serving.all_names])


@get(
    "/v1/models/{model_id:path}",
    operation_id="get_model",
    summary="Describe a model",
    tags=["OpenAI"],
    responses=responses(ModelCard, 400, 401, 404, 503),
)
async def get_model(model_id: FromPath[str], request: Request[Any, Any, Any]) -> ModelCard:
    """One name; it may contain slashes."""
    serving = serving_of(request)
    name = model_id.removeprefix("/")
    return _card(serving, name)


def _card(serving: Serving, name: str) -> ModelCard:
    facts = serving.facts_of(name)
    created = serving.created if facts.created is None else facts.created
    permission = ModelPermission(id=f"modelperm-{name}", created=created)
    return ModelCard(
        id=name,
        created=created,
        root=facts.root,
        parent=facts.parent,
        permission=[permission],
        max_model_len=facts.max_model_len,
        default_sampling_params=dict(facts.sampling),
    )
