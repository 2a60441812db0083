"""`/v1/files`: OpenAI's Files API, for the files of batches."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

MAX_FILE_PAGE: Final = 10_000
MAX_NAME_CHARS: Final = 512

FileId = Annotated[str, Meta(max_length=64, examples=["file-0123456789abcdef0123456789abcdef"])]
Purpose = Literal["batch", "batch_output"]


class FileReply(Struct, frozen=True, kw_only=True):
    """A file; `created_at` is in seconds since 1970."""

    id: FileId
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Annotated[
        Purpose, Meta(description="batch: a client has uploaded the file. batch_output: a batch has written it.")
    ]
    status: Literal["processed"] = "processed"


class FileList(Struct, frozen=True, kw_only=True):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Struct, frozen=True, kw_only=True):
    """The file is deleted."""

    id: FileId
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
