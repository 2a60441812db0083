"""The supported model families, one file each. A file is imported when a model may be its family's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any, Final

from lmserve.model.errors import CheckpointError, UnknownArchitectureError
from lmserve.model.families.family import Family
from lmserve.model.families.missing import missing_part
from lmserve.model.wrapped import MODEL_TYPES

# Each has `FAMILIES`, or one `FAMILY`. Where several read an architecture of GGUF, the first is that of most models.
FILES: Final = (
    "llama",
    "mistral",
    "mixtral",
    "ministral3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "gemma4",
    "gpt_oss",
    "glm4_moe",
    "glm4_moe_lite",
    "deepseek_v3",
    "deepseek_v2",
    "mistral4",
    "minimax_m2",
    "llama4",
    "granite",
    "granitemoe",
    "phi3",
    "phimoe",
    "smollm3",
    "olmo2",
    "olmoe",
    "exaone4",
    "cohere2",
    "seed_oss",
    "stablelm",
    "starcoder2",
    "apertus",
    "internlm2",
    "lfm2",
    "lfm2_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "granitemoehybrid",
    "nemotron_h",
    "falcon_h1",
    "bert",
    "xlm_roberta",
    "mpnet",
    "nomic_bert",
    "modernbert",
    "gte",
    "gemma_embedding",
)


@cache
def all_families() -> tuple[Family, ...]:
    """Every family; imports all files."""
    return tuple(family for file in FILES for family in _families_in(file))


def _families_in(file: str) -> tuple[Family, ...]:
    module = import_module(f"{__name__}.{file}")
    several: tuple[Family, ...] | None = getattr(module, "FAMILIES", None)
    return (module.FAMILY,) if several is None else several


def _of_files_named(name: str) -> Iterator[Family]:
    """The families of the files that are called like an architecture, which as a rule are its own."""
    for file in FILES:
        if _stem(file) == _stem(name):
            yield from _families_in(file)


def _nearest_first(names: list[str]) -> Iterator[Family]:
    for name in names:
        yield from _of_files_named(name)
    yield from all_families()


def hf_family(raw: Mapping[str, Any], *, pooled: bool = False) -> Family:
    """The family that config.json, `raw`, names: by its `architectures`, or by its `model_type` where it has none.

    pooled: it is a model of texts, and may be a decoder without the head that generates.
    """
    given = raw.get("architectures")
    names = given if given is not None else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"config.json: architectures must be a list of names, but {given!r} was given")
    for family in _nearest_first(names):
        if set(names) & set(family.hf_architectures):
            return family
    if pooled:
        generating = {re.sub(r"(ForSequenceClassification|Model)$", "ForCausalLM", name) for name in names}
        for family in all_families():
            if generating & set(family.hf_architectures):
                return family
    kind = raw.get("model_type")
    if not names and isinstance(kind, str):
        stem = _stem(MODEL_TYPES.get(kind, kind))
        for family in all_families():
            if stem in map(_stem, family.hf_architectures):
                return family
    supported = ", ".join(name for family in all_families() for name in family.hf_architectures)
    what = ", ".join(names) or f"of model_type {kind!r}"
    part = missing_part(raw)
    needs = "" if part is None else f"; it has {part}, which is not computed here"
    raise UnknownArchitectureError(f"config.json: architecture {what} is not supported ({supported} are){needs}")


def _stem(name: str) -> str:
    """What an architecture and its model_type have in common: Qwen2ForCausalLM and qwen2, Gemma3 and gemma3_text."""
    name = re.sub(r"(ForCausalLM|ForMaskedLM|Model|LMHeadModel|_text)$", "", name)
    return re.sub("[_-]", "", name).lower()


def gguf_family(architecture: str, *, experts: bool = False) -> Family:
    """The family that GGUF's `general.architecture` names; of several that of its models with, or without, experts."""
    for family in _of_files_named(architecture):
        if family.gguf_architecture == architecture and family.gguf_experts == experts:
            return family
    named = [family for family in all_families() if family.gguf_architecture == architecture]
    for family in named:
        if family.gguf_experts == experts:
            return family
    if named:
        return named[0]
    supported = ", ".join(family.gguf_architecture for family in all_families() if family.gguf_architecture)
    raise CheckpointError(f"GGUF architecture {architecture!r} is not supported ({supported} are)")
