"""`/v1/files`: OpenAI's Files API, for the inputs and outputs of batches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from litestar import Request, Response, delete, get, post
from litestar.datastructures import UploadFile
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.params import FromPath, QueryParameter
from litestar.response import Stream

from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import ready_for
from lmserve.api.state.files import Files
from lmserve.errors import LmserveError
from lmserve.schemas.files import MAX_FILE_PAGE, MAX_NAME_CHARS, FileDeleted, FileList, FileReply

STATUSES: Final = (400, 401, 404, 503)
TAGS: Final = ["OpenAI"]
ALL: Final = "/v1/files"
ID: Final = f"{ALL}/{{file_id:str}}"
FORM: Final = "multipart/form-data"
LINES: Final = "application/jsonl"
MAX_QUOTE: Final = 64


@dataclass
class Upload(Operation):
    """`Operation` with the form of an upload."""

    def __post_init__(self) -> None:
        """Describe the form."""
        purpose = Schema(type=OpenAPIType.STRING, enum=["batch"], description="The purpose of the file.")
        file = Schema(
            type=OpenAPIType.STRING, content_media_type="application/octet-stream", description="A file in JSON lines."
        )
        form = Schema(
            type=OpenAPIType.OBJECT, properties={"file": file, "purpose": purpose}, required=["file", "purpose"]
        )
        self.request_body = RequestBody(content={FORM: OpenAPIMediaType(schema=form)}, required=True)


@post(
    ALL,
    status_code=200,
    operation_id="upload_file",
    summary="Upload the input file of a batch",
    description="OpenAI's Files API. A key can have at most 1000 files, and its uploaded files at most 1 GiB.",
    tags=TAGS,
    operation_class=Upload,
    responses=responses(FileReply, 400, 401, 408, 413, 503, 507),
)
async def upload_file(request: Request[Any, Any, Any]) -> FileReply:
    """The file as it is kept."""
    serving, tenant = ready_for(request)
    name, content = await _uploaded(request)
    return await serving.files.upload(tenant, name, content)


@get(
    ALL,
    operation_id="list_files",
    summary="List the files",
    tags=TAGS,
    responses=responses(FileList, 400, 401, 503),
)
async def list_files(
    request: Request[Any, Any, Any],
    limit: Annotated[
        int, QueryParameter(ge=1, le=MAX_FILE_PAGE, description="The largest number of files in one page.")
    ] = MAX_FILE_PAGE,
    order: Annotated[
        Literal["asc", "desc"], QueryParameter(description="desc: the newest first. asc: the oldest first.")
    ] = "desc",
    after: Annotated[
        str | None, QueryParameter(description="Only files that come after this one in the chosen order.")
    ] = None,
    purpose: Annotated[
        Literal["batch", "batch_output"] | None, QueryParameter(description="Only files with this purpose.")
    ] = None,
) -> FileList:
    """A page of the files."""
    serving, tenant = ready_for(request)
    found, more = await serving.files.page(
        tenant, after=after, limit=limit, newest_first=order == "desc", purpose=purpose
    )
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return FileList(data=found, first_id=first, last_id=last, has_more=more)


@get(ID, operation_id="get_file", summary="Describe a file", tags=TAGS, responses=responses(FileReply, *STATUSES))
async def get_file(file_id: FromPath[str], request: Request[Any, Any, Any]) -> FileReply:
    """The file without its content."""
    serving, tenant = ready_for(request)
    return await serving.files.get(tenant, file_id)


@get(
    f"{ID}/content",
    operation_id="get_file_content",
    summary="Read a file",
    tags=TAGS,
    responses=responses(FileReply, *STATUSES)
    | {200: ResponseSpec(str, media_type=LINES, description="The lines of the file.", generate_examples=False)},
)
async def get_file_content(file_id: FromPath[str], request: Request[Any, Any, Any]) -> Response[Any] | Stream:
    """What is in it."""
    serving, tenant = ready_for(request)
    content = await serving.files.content(tenant, file_id)
    if content is not None:
        return Response(content, media_type=LINES)
    return Stream(_lines(serving.files, tenant, file_id), media_type=LINES)


@delete(
    ID,
    status_code=200,
    operation_id="delete_file",
    summary="Delete a file",
    description="Batches that were started with the file keep running.",
    tags=TAGS,
    responses=responses(FileDeleted, 400, 401, 404, 408, 413, 503, 507),
)
async def delete_file(file_id: FromPath[str], request: Request[Any, Any, Any]) -> FileDeleted:
    """The file is gone."""
    serving, tenant = ready_for(request)
    await serving.files.delete(tenant, file_id)
    return FileDeleted(id=file_id)


async def _lines(files: Files, tenant: int, file_id: str) -> AsyncIterator[bytes]:
    last = 0
    while page := await files.lines(tenant, file_id, last):
        yield b"".join(reply + b"\n" for _, reply in page)
        last = page[-1][0]


async def _uploaded(request: Request[Any, Any, Any]) -> tuple[str, bytes]:
    """Name and content of the file in the form. Raises LmserveError (400)."""
    given = request.headers.get("content-type", "none")
    if not given.lower().startswith(FORM):
        message = f"Content-Type must be {FORM}, but {given[:MAX_QUOTE]} was given"
        raise LmserveError.invalid(None, message, "invalid_content_type")
    try:
        form = await request.form()
    except (HTTPException, ValueError) as error:
        raise LmserveError.invalid(None, "the body must be a form, but it cannot be read", "invalid_form") from error
    purpose = form.get("purpose")
    if purpose != "batch":
        told = "none" if purpose is None else repr(purpose)[:MAX_QUOTE]
        raise LmserveError.invalid("purpose", f"purpose must be 'batch', but {told} was given")
    file = form.get("file")
    if isinstance(file, UploadFile):
        return (file.filename or "file")[:MAX_NAME_CHARS], await file.read()
    raise LmserveError.invalid("file", "file must be a file in the form, but none was given", "missing_field")
