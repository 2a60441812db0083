"""Converts a session of the core into an export or a training record, and back."""

from __future__ import annotations

import time
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Iterator
from hashlib import sha256
from struct import pack
from typing import Final

from lmserve.engine.sessions import SessionId, SessionState, StateTurn
from lmserve.engine.submission import GiveUp, Hold
from lmserve.errors import LmserveError
from lmserve.schemas.retention import MAX_HOLD_HOURS, Retention
from lmserve.schemas.session_state import ExportedTurn, SessionCompletion, SessionExport

MAGIC: Final = b"lmserve session 1\n"
MAX_SEED: Final = 2**64 - 1
UNITS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}


def exported(session_id: SessionId, state: SessionState, *, model: str, fingerprint: str) -> SessionExport:
    """The session's form on the way to another server. `fingerprint`: hexadecimal digits."""
    turns = [
        ExportedTurn(
            input_tokens=turn.input_tokens,
            output_tokens=turn.output_tokens,
            open=turn.open,
            logprobs=None if turn.logprobs is None else b64encode(turn.logprobs).decode(),
        )
        for turn in state.turns
    ]
    return SessionExport(
        id=session_id,
        model=model,
        fingerprint=fingerprint,
        created=int(time.time()),
        seed=str(state.seed),
        system_tokens=state.system_tokens,
        turns=turns,
        tokens=b64encode(state.tokens).decode(),
        checksum=checksum(state, fingerprint),
    )


def imported(data: SessionExport, *, model: str, fingerprint: str) -> SessionState:
    """The session as the core takes it.

    Raises LmserveError (400) for one of another model, and for one that is not as it was exported.
    """
    if data.fingerprint != fingerprint:
        message = (
            f"the session belongs to another model, tokenizer or chat template: it was exported by {data.model} "
            f"({data.fingerprint[:8]}), and {model} ({fingerprint[:8]}) is served"
        )
        raise LmserveError.invalid("fingerprint", message, "session_import_mismatch")
    if not (data.seed.isascii() and data.seed.isdigit()) or int(data.seed) > MAX_SEED:
        message = f"seed must be a number in decimal digits and at most {MAX_SEED}, but {data.seed!r} was given"
        raise LmserveError.invalid("seed", message)
    seed = int(data.seed)
    turns = [
        StateTurn(
            turn.input_tokens,
            turn.output_tokens,
            turn.open,
            None if turn.logprobs is None else _decoded(turn.logprobs, f"turns[{at}].logprobs"),
        )
        for at, turn in enumerate(data.turns)
    ]
    state = SessionState(_decoded(data.tokens, "tokens"), turns, seed, data.system_tokens)
    expected = checksum(state, fingerprint)
    if expected != data.checksum:
        message = f"the session was changed after its export: its checksum is {expected}, but {data.checksum} was given"
        raise LmserveError.invalid("checksum", message, "invalid_session_export")
    return state


def checksum(state: SessionState, fingerprint: str) -> str:
    """SHA-256 over all that makes the session, in hexadecimal digits."""
    digest = sha256(MAGIC + bytes.fromhex(fingerprint))
    digest.update(pack("<QII", state.seed, state.system_tokens, len(state.turns)))
    for turn in state.turns:
        scored = turn.logprobs is not None
        digest.update(pack("<IIBB", turn.input_tokens, turn.output_tokens, turn.open, scored))
    digest.update(state.tokens)
    for turn in state.turns:
        digest.update(turn.logprobs or b"")
    return digest.hexdigest()


def _decoded(text: str, param: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except Base64Error as error:
        message = f"{param} must be Base64, but {text[:40]!r} was given: {error}"
        raise LmserveError.invalid(param, message, "invalid_session_export") from error


def completions(state: SessionState) -> Iterator[SessionCompletion]:
    """The turns of a session, as the model read and sampled them."""
    ids = memoryview(state.tokens).cast("I").tolist()
    start = 0
    for number, turn in enumerate(state.turns, 1):
        border, end = start + turn.input_tokens, start + turn.input_tokens + turn.output_tokens
        yield SessionCompletion(
            turn=number,
            context_tokens=start,
            input_ids=ids[start:border],
            output_ids=ids[border:end],
            logprobs=None if turn.logprobs is None else list(memoryview(turn.logprobs).cast("f")),
            loss_mask=[0] * turn.input_tokens + [1] * turn.output_tokens,
        )
        start = end


def retention_of(data: Retention | None, param: str = "retention") -> Hold | GiveUp | None:
    """What is to become of a session's KV. Raises LmserveError (400) for what is neither a time nor drop."""
    if data is None:
        return None
    if (data.hold is None) != data.drop:
        given = "both were" if data.drop else "neither was"
        raise LmserveError.invalid(param, f"{param} must have either hold or drop true, but {given} given")
    if data.hold is None:
        return GiveUp()
    digits = data.hold.rstrip("msh")
    ms = int(digits) * UNITS[data.hold.removeprefix(digits)]
    if ms > MAX_HOLD_HOURS * UNITS["h"]:
        message = f"{param}.hold must be at most {MAX_HOLD_HOURS}h, but {data.hold} was given"
        raise LmserveError.invalid(f"{param}.hold", message)
    return Hold(ms)
