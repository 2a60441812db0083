"""Examples of the server's models, files, batches and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from lmserve.api.http.examples.values import CREATED, MODEL
from lmserve.schemas.adapters import LoadLoraRequest, UnloadLoraRequest
from lmserve.schemas.batches import BatchList, BatchReply, CreateBatch
from lmserve.schemas.files import FileDeleted, FileList, FileReply
from lmserve.schemas.health import HealthReply
from lmserve.schemas.models import ModelCard, ModelList
from lmserve.schemas.server import PropsReply, VersionReply

FILE_ID: Final = "file-0123456789abcdef0123456789abcdef"
FILE: Final = {
    "id": FILE_ID,
    "object": "file",
    "bytes": 217,
    "created_at": CREATED,
    "filename": "questions.jsonl",
    "purpose": "batch",
    "status": "processed",
}
BATCH: Final = {
    "id": "batch_0123456789abcdef0123456789abcdef",
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "errors": None,
    "input_file_id": FILE_ID,
    "completion_window": "24h",
    "status": "in_progress",
    "output_file_id": None,
    "error_file_id": None,
    "created_at": CREATED,
    "in_progress_at": CREATED,
    "expires_at": CREATED + 86400,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"completed": 1, "failed": 0, "total": 2},
    "metadata": {},
}
CARD: Final = {
    "id": MODEL,
    "object": "model",
    "created": CREATED,
    "owned_by": "lmserve",
    "root": MODEL,
    "parent": None,
    "permission": [
        {
            "id": f"modelperm-{MODEL}",
            "object": "model_permission",
            "created": CREATED,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": True,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
    ],
    "max_model_len": 8192,
    "default_sampling_params": {"temperature": 0.2, "top_p": 0.9, "max_tokens": 512},
}

EXAMPLES: Final[Mapping[type[Struct], tuple[Any, ...]]] = {
    LoadLoraRequest: ({"lora_name": "sql", "lora_path": "sql-v2"},),
    UnloadLoraRequest: ({"lora_name": "sql"},),
    FileReply: (FILE,),
    FileList: ({"object": "list", "data": [FILE], "first_id": FILE_ID, "last_id": FILE_ID, "has_more": False},),
    FileDeleted: ({"id": FILE_ID, "object": "file", "deleted": True},),
    CreateBatch: ({"input_file_id": FILE_ID, "endpoint": "/v1/chat/completions", "completion_window": "24h"},),
    BatchReply: (BATCH,),
    BatchList: (
        {"object": "list", "data": [BATCH], "first_id": BATCH["id"], "last_id": BATCH["id"], "has_more": False},
    ),
    ModelList: ({"object": "list", "data": [CARD]},),
    ModelCard: (CARD,),
    HealthReply: (
        {"status": "ok"},
        {
            "status": "degraded",
            "faults": [
                {
                    "code": "storage_full",
                    "message": "the session log has no room on its disk: No space left on device (os error 28)",
                }
            ],
        },
    ),
    VersionReply: ({"version": "0.1.0"},),
    PropsReply: (
        {
            "default_generation_settings": {"n_ctx": 8192},
            "model_alias": MODEL,
            "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
            "modalities": {"vision": False, "audio": False},
            "build_info": "lmserve 0.1.0",
        },
    ),
}
