"""`GET /v1/models`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class ModelPermission(Struct, frozen=True, kw_only=True):
    """Kept for clients of OpenAI's older API."""

    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = True
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCard(Struct, frozen=True, kw_only=True):
    """A name under which the model is served; `root` is its first name, `created` is in seconds since 1970.

    `parent`: of an adapter the model that it changes.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lmserve"
    root: str
    parent: str | None = None
    permission: list[ModelPermission]
    max_model_len: int
    default_sampling_params: Annotated[
        dict[str, float | int],
        Meta(description="Sampling parameters that apply to a request that leaves them out, by field."),
    ]


class ModelList(Struct, frozen=True, kw_only=True):
    """All names under which the model is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
