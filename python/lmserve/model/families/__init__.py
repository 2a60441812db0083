"""The supported model families, one file each."""

from __future__ import annotations

from lmserve.model.errors import CheckpointError
from lmserve.model.families import bert, internlm2, llama, qwen2, qwen3
from lmserve.model.families.family import Family

FAMILIES: tuple[Family, ...] = (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY, internlm2.FAMILY, bert.FAMILY)


def hf_family(architectures: list[str]) -> Family:
    """The family that config.json's `architectures` names."""
    for family in FAMILIES:
        if set(architectures) & set(family.hf_architectures):
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.hf_architectures)
    raise CheckpointError(f"config.json: architecture {', '.join(architectures)} is not supported ({supported} are)")


def gguf_family(architecture: str) -> Family:
    """The family that GGUF's `general.architecture` names."""
    for family in FAMILIES:
        if family.gguf_architecture == architecture:
            return family
    supported = ", ".join(family.gguf_architecture for family in FAMILIES if family.gguf_architecture)
    raise CheckpointError(f"GGUF architecture {architecture!r} is not supported ({supported} are)")
