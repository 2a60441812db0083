"""`/v1/batches`: OpenAI's Batch API."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Struct

from lmserve.schemas.bounds import Tag
from lmserve.schemas.files import FileId
from lmserve.schemas.hints import NoEffect
from lmserve.schemas.responses import Metadata

MAX_LINES: Final = 50_000
MAX_BATCH_PAGE: Final = 100

BatchId = Annotated[str, Meta(max_length=64, examples=["batch_0123456789abcdef0123456789abcdef"])]
Endpoint = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/score",
    "/v1/rerank",
]
Status = Literal["failed", "in_progress", "completed", "expired", "cancelling", "cancelled"]


class CreateBatch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The requests to run. An unknown key is an error."""

    input_file_id: Annotated[
        FileId, Meta(description="The id of an uploaded file. Each of its lines is a request in JSON.")
    ]
    endpoint: Annotated[Endpoint, Meta(description="The route of every line.")]
    completion_window: Annotated[
        Literal["24h"], Meta(description="A line that has no answer after this time is not run any more.")
    ]
    metadata: Annotated[Metadata | None, Meta(description="Stored with the batch.")] = None
    output_expires_after: NoEffect = UNSET


class BatchLine(Struct, frozen=True, kw_only=True):
    """A line of the input file. Further keys are ignored."""

    custom_id: Annotated[Tag, Meta(min_length=1)]
    method: Literal["POST"]
    url: Endpoint
    body: dict[str, Any]


class LineError(Struct, frozen=True, kw_only=True):
    """An error in a line of the input file; `line` is counted from 1."""

    code: str
    line: int | None
    message: str
    param: str | None = None


class BatchErrors(Struct, frozen=True, kw_only=True):
    """Why a batch was not started: the first errors in its input file."""

    object: Literal["list"] = "list"
    data: list[LineError]


class RequestCounts(Struct, frozen=True, kw_only=True):
    """Number of lines of a batch that have an answer, that have an error, and of all."""

    completed: int
    failed: int
    total: int


class BatchReply(Struct, frozen=True, kw_only=True):
    """A batch. Times are in seconds since 1970, and null for what has not happened."""

    id: BatchId
    object: Literal["batch"] = "batch"
    endpoint: Endpoint
    errors: BatchErrors | None
    input_file_id: FileId
    completion_window: Literal["24h"] = "24h"
    status: Status
    output_file_id: Annotated[FileId | None, Meta(description="The file with the answers, once the batch has ended.")]
    error_file_id: Annotated[
        FileId | None, Meta(description="The file with the lines that have no answer, once the batch has ended.")
    ]
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: Metadata


class BatchList(Struct, frozen=True, kw_only=True):
    """A page of batches, the newest first."""

    object: Literal["list"] = "list"
    data: list[BatchReply]
    first_id: str | None
    last_id: str | None
    has_more: bool
