"""What is wrong with a checkpoint or with the options that it is loaded with."""

from __future__ import annotations

from lmserve.errors import LmserveError


class CheckpointError(LmserveError):
    """A checkpoint that cannot be served; the message says what was found and what would do."""

    def __init__(self, message: str) -> None:
        super().__init__(
            400, {"message": message, "type": "invalid_request_error", "param": "model", "code": "invalid_checkpoint"}
        )


class AdapterError(LmserveError):
    """An adapter that cannot be used with the model; the message says what was found and what would do."""

    def __init__(self, message: str) -> None:
        super().__init__(
            400, {"message": message, "type": "invalid_request_error", "param": "lora_path", "code": "invalid_adapter"}
        )


class UnknownArchitectureError(CheckpointError):
    """A model that is of none of the families."""


class OptionError(LmserveError):
    """A runner option that does not fit the checkpoint or this machine; `option` names it."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(
            400, {"message": message, "type": "invalid_request_error", "param": option, "code": "invalid_value"}
        )
