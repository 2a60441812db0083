"""The supported model families, one file each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lmserve.model.errors import CheckpointError, UnknownArchitectureError
from lmserve.model.families import (
    apertus,
    bert,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    exaone4,
    falcon_h1,
    gemma2,
    gemma3,
    gemma4,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granite,
    granitemoe,
    granitemoehybrid,
    internlm2,
    lfm2,
    llama,
    llama4,
    minimax_m2,
    ministral3,
    mistral,
    mixtral,
    nemotron_h,
    olmo2,
    olmoe,
    phi3,
    phimoe,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
    xlm_roberta,
)
from lmserve.model.families.family import Family
from lmserve.model.families.missing import missing_part
from lmserve.model.wrapped import MODEL_TYPES

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    ministral3.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gemma4.FAMILY,
    gpt_oss.FAMILY,
    glm4_moe.FAMILY,
    glm4_moe_lite.FAMILY,
    deepseek_v3.FAMILY,
    deepseek_v2.FAMILY,
    minimax_m2.FAMILY,
    llama4.FAMILY,
    granite.FAMILY,
    granitemoe.FAMILY,
    phi3.FAMILY,
    phimoe.FAMILY,
    smollm3.FAMILY,
    olmo2.FAMILY,
    olmoe.FAMILY,
    exaone4.FAMILY,
    cohere2.FAMILY,
    cohere2.COHERE,
    seed_oss.FAMILY,
    stablelm.FAMILY,
    starcoder2.FAMILY,
    apertus.FAMILY,
    internlm2.FAMILY,
    lfm2.FAMILY,
    qwen3_5.FAMILY,
    qwen3_5_moe.FAMILY,
    qwen3_next.FAMILY,
    granitemoehybrid.FAMILY,
    nemotron_h.FAMILY,
    falcon_h1.FAMILY,
    bert.FAMILY,
    xlm_roberta.FAMILY,
)


def hf_family(raw: Mapping[str, Any], *, pooled: bool = False) -> Family:
    """The family that config.json, `raw`, names: by its `architectures`, or by its `model_type` where it has none.

    pooled: it is a model of texts, and may be a decoder without the head that generates.
    """
    given = raw.get("architectures")
    names = given if given is not None else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"config.json: architectures must be a list of names, but {given!r} was given")
    for family in FAMILIES:
        if set(names) & set(family.hf_architectures):
            return family
    if pooled:
        generating = {re.sub(r"(ForSequenceClassification|Model)$", "ForCausalLM", name) for name in names}
        for family in FAMILIES:
            if generating & set(family.hf_architectures):
                return family
    kind = raw.get("model_type")
    if not names and isinstance(kind, str):
        stem = _stem(MODEL_TYPES.get(kind, kind))
        for family in FAMILIES:
            if stem in map(_stem, family.hf_architectures):
                return family
    supported = ", ".join(name for family in FAMILIES for name in family.hf_architectures)
    what = ", ".join(names) or f"of model_type {kind!r}"
    part = missing_part(raw)
    needs = "" if part is None else f"; it has {part}, which is not computed here"
    raise UnknownArchitectureError(f"config.json: architecture {what} is not supported ({supported} are){needs}")


def _stem(name: str) -> str:
    """What an architecture and its model_type have in common: Qwen2ForCausalLM and qwen2, Gemma3 and gemma3_text."""
    name = re.sub(r"(ForCausalLM|ForMaskedLM|Model|LMHeadModel|_text)$", "", name)
    return name.replace("_", "").lower()


def gguf_family(architecture: str, *, experts: bool = False) -> Family:
    """The family that GGUF's `general.architecture` names; of several that of its models with, or without, experts."""
    named = [family for family in FAMILIES if family.gguf_architecture == architecture]
    for family in named:
        if family.gguf_experts == experts:
            return family
    if named:
        return named[0]
    supported = ", ".join(family.gguf_architecture for family in FAMILIES if family.gguf_architecture)
    raise CheckpointError(f"GGUF architecture {architecture!r} is not supported ({supported} are)")
