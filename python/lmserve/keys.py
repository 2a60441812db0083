"""API keys: who may use the server, as which tenant, and how much. A key's number and identity are known here alone."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Annotated, Final, Self

import msgspec
from msgspec import Meta, Struct

NO_TENANT: Final = 0  # who needs no key
NO_TENANT_NAME: Final = bytes(32)  # in a session log

# What src/tenant/limits.rs bounds too has its bounds.
Name = Annotated[str, Meta(pattern=r"^[!-~]([ -~]{0,62}[!-~])?$")]
Secret = Annotated[str, Meta(pattern=r"^[!-~]{1,512}$")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
Weight = Annotated[int, Meta(ge=1, le=1000)]
Count = Annotated[int, Meta(ge=1, le=2**32 - 1)]
TokensPerMinute = Annotated[int, Meta(ge=1, le=10**12)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class KeysError(ValueError):
    """Keys that cannot be; the message holds no key."""


class Limits(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a tenant may do, as src/tenant/limits.rs describes it; None: no limit."""

    weight: Weight = 1
    max_in_flight: Count | None = None
    tokens_per_minute: TokensPerMinute | None = None
    max_sessions: Count | None = None
    max_priority: Priority | None = None


UNLIMITED: Final = Limits()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key by its SHA-256, and what its holder may do."""

    name: str
    digest: bytes = field(repr=False)
    limits: Limits = UNLIMITED
    operator: bool = False  # /metrics tells it what each key uses

    @classmethod
    def of(cls, key: str, name: str, limits: Limits = UNLIMITED, *, operator: bool = False) -> Self:
        return cls(name, sha256(key.encode()).digest(), limits, operator)

    @property
    def durable_name(self) -> bytes:
        """The tenant's name in a session log: a digest of 32 bytes, from which the key cannot be recovered."""
        return blake2b(self.digest, digest_size=32, person=b"lmserve tenant").digest()


class _Tenant(Struct, frozen=True):
    number: int
    limits: Limits


class Keyring:
    """The server's keys. Each is a tenant: they share no session and no cache entry. None: no key is asked for."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        """Raises KeysError if a key or a name is there twice."""
        self.keys = tuple(keys)
        # The time of a digest's look-up tells nothing about the keys: an attacker cannot choose the digest of a guess.
        self._tenants = {key.digest: number for number, key in enumerate(self.keys, NO_TENANT + 1)}
        names = {key.name for key in self.keys}
        if len(self._tenants) < len(self.keys):
            raise KeysError("the same key is given twice")
        if len(names) < len(self.keys):
            twice = next(name for name in names if sum(key.name == name for key in self.keys) > 1)
            raise KeysError(f"two keys have the name {twice!r}")

    @classmethod
    def of(cls, *keys: str) -> Self:
        """Keys without limits, named key-1, key-2, and so on."""
        return cls(ApiKey.of(key, f"key-{number}") for number, key in enumerate(keys, 1))

    def __bool__(self) -> bool:
        return bool(self.keys)

    def tenant_of(self, key: bytes) -> int | None:
        """The number of the key's tenant in this process; None: it is none of the keys."""
        return self._tenants.get(sha256(key).digest())

    def name_of(self, tenant: int) -> str | None:
        """The name of a tenant's key; None where no key is needed."""
        return None if tenant == NO_TENANT else self.keys[tenant - 1].name

    def seen_by(self, tenant: int) -> Iterator[tuple[str, int]]:
        """The keys whose use a tenant may look at, by name and number: an operator's all, others their own alone."""
        if tenant == NO_TENANT:
            return
        for number, key in enumerate(self.keys, NO_TENANT + 1):
            if number == tenant or self.keys[tenant - 1].operator:
                yield key.name, number

    def tenants(self) -> bytes:
        """The tenants as `lmserve._core.Engine` takes them: each with its number and its limits."""
        numbered = enumerate(self.keys, NO_TENANT + 1)
        return msgspec.json.encode([_Tenant(number, key.limits) for number, key in numbered])

    def durable_names(self) -> dict[int, bytes]:
        """The names of all tenants in a session log, including the one without a key."""
        numbered = enumerate(self.keys, NO_TENANT + 1)
        return {NO_TENANT: NO_TENANT_NAME} | {number: key.durable_name for number, key in numbered}


class _Entry(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Name
    key: Secret | None = None
    sha256: Digest | None = None
    operator: bool = False


class _File(Struct, forbid_unknown_fields=True):
    key: Annotated[list[_Entry], Meta(min_length=1, max_length=100_000)]


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a TOML file: a `[[key]]` table for each, as docs/keys.md describes it.

    Raises KeysError, which names what is wrong and where, but never a key.
    """
    try:
        entries = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _File).key
    except OSError as error:
        raise KeysError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KeysError(f"is not UTF-8: {error.reason} at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise KeysError(f"is not valid TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise KeysError(f"is wrong: {error}") from error
    keys = []
    for entry in entries:
        if (entry.key is None) == (entry.sha256 is None):
            raise KeysError(f"is wrong: {entry.name!r} must have either key or sha256")
        limits = Limits(**{field: getattr(entry, field) for field in Limits.__struct_fields__})
        digest = sha256(entry.key.encode()).digest() if entry.key is not None else bytes.fromhex(entry.sha256 or "")
        keys.append(ApiKey(entry.name, digest, limits, entry.operator))
    return tuple(keys)
