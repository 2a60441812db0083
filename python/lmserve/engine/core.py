"""The part of `lmserve._core` that this package uses, as protocols, so that tests can replace it by a scripted core."""

from __future__ import annotations

from typing import Any, Final, Protocol

from lmserve.engine.sessions import SessionId

# States of a stream: the first member of what `CoreStream.poll` returns.
WAITING: Final = 0  # not yet known whether the request is accepted
ACCEPTED: Final = 1
ENDED: Final = 2


class CoreStream(Protocol):
    """One request in the core."""

    @property
    def id(self) -> int:
        """Unique in its engine."""

    def poll(self) -> tuple[int, bytes]:
        """(state, finished wire bytes since the last poll).

        Raises LmserveError if the request failed before its first byte.
        """

    def record(self) -> tuple[int, int, int, float | None, float | None]:
        """Tokens of prompt, cache and output, and seconds to first step and first token, as far as they are known."""

    def abort(self) -> None:
        """The client left. Idempotent."""


class CoreEngine(Protocol):
    """`lmserve._core.Engine`."""

    def submit(self, submission: bytes) -> CoreStream:
        """Takes one JSON `Submission`. Raises LmserveError if it is refused at once."""

    def embed(self, submission: bytes) -> CoreStream:
        """Takes one JSON `EmbedSubmission`; the reply is whole."""

    def count_tokens(self, submission: bytes, /) -> int:
        """Tokens of the prompt that a `Submission` would be computed for. Raises LmserveError (400, 404)."""

    def cancel_session(self, tenant: int, session_id: SessionId, /) -> bool:
        """Ends the running turn with what it has. False: none ran."""

    def end_session(self, tenant: int, session_id: SessionId, cancel: bool, /) -> bool:
        """Drops the session. False: there was none. Raises LmserveError `session_busy` while a turn runs.

        `cancel`: a turn that runs is cancelled, and its end waited for.
        """

    def fork_session(self, tenant: int, session_id: SessionId, new_id: SessionId, turns: int | None, /) -> None:
        """Makes a session that stands where the other one stood after its first turns. Raises LmserveError."""

    def rewind_session(self, tenant: int, session_id: SessionId, turns: int, /) -> None:
        """Takes a session back to where it stood after its first turns. Raises LmserveError."""

    def session_info(self, tenant: int, session_id: SessionId, /) -> dict[str, Any]:
        """What `SessionInfo` holds. Raises LmserveError (404)."""

    def list_sessions(self, tenant: int, after: SessionId | None, limit: int, /) -> list[dict[str, Any]]:
        """The same for the sessions after `after`, in order of their ids, without the number of cached tokens."""

    def session_transcript(self, tenant: int, session_id: SessionId, /) -> list[tuple[str, str, list[int], list[int]]]:
        """(input, output, input token ids, output token ids) of each turn. Raises LmserveError (404)."""

    def export_session(
        self, tenant: int, session_id: SessionId, /
    ) -> tuple[bytes, list[tuple[int, int, bool, bytes | None]], int, int, bytes | None]:
        """The members of a `SessionState`, and of its turns. Raises LmserveError (404, 409)."""

    def import_session(
        self,
        tenant: int,
        session_id: SessionId,
        tokens: bytes,
        turns: list[tuple[int, int, bool, bytes | None]],
        seed: int,
        system_tokens: int,
        adapter: bytes | None,
        /,
    ) -> None:
        """Makes a session of what `export_session` gave. Raises LmserveError (400, 409 `session_exists`)."""

    def restore_session(self, tenant: int, session_id: SessionId, records: list[bytes], /) -> None:
        """Makes a session of what a store was given of it, whatever it was before. Raises LmserveError (400, 409)."""

    def hold_session(self, tenant: int, session_id: SessionId, hold_ms: int, /) -> None:
        """Holds a session and its KV: evicts them only after those that are not held. Raises LmserveError (404)."""

    def give_up_session(self, tenant: int, session_id: SessionId, /) -> int:
        """Gives up a session's KV; returns how many of its tokens are cached then. Raises LmserveError (404)."""

    def add_adapter(self, number: int, name: str, digest: bytes, /) -> None:
        """Lets requests use an adapter that the model has loaded. Raises LmserveError."""

    def remove_adapter(self, number: int, /) -> None:
        """Lets no further request use an adapter. Raises LmserveError (404, 409 `adapter_in_use`)."""

    def wake_fd(self) -> int:
        """A file descriptor that is readable while some stream has news."""

    def drain(self) -> list[int]:
        """Ids of the streams with news; clears the descriptor."""

    def session_log_fault(self) -> tuple[str, str] | None:
        """(code, message) of why no turn can be written down now; None: nothing is wrong."""

    def stats(self) -> dict[str, int | float]:
        """Counters and gauges."""

    def usage(self, tenant: int, /) -> dict[str, Any]:
        """What a tenant has used, its limits, and what is left of them."""

    def quota(self, tenant: int, /) -> dict[str, int]:
        """What a tenant may still do, of what is limited."""

    def check_health(self) -> None:
        """Raises LmserveError (503): `engine_unavailable` for good, `engine_stalled` while work waits for a step."""

    def metrics(self) -> str:
        """Prometheus' text format."""

    def shutdown(self, grace_seconds: float, /) -> None:
        """Refuses new requests, waits `grace_seconds` for running turns, aborts the rest. Blocks, without the GIL."""
