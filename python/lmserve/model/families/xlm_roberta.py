"""RoBERTa and XLM-R encoders (bge-m3, multilingual e5, bge rerankers), which are computed as BERT is."""

from __future__ import annotations

from typing import Any

from lmserve.model.config import EncoderConfig
from lmserve.model.families.bert import Bert, bert_config, bert_tensors
from lmserve.model.families.family import Family


def _hf_config(raw: dict[str, Any]) -> EncoderConfig:
    return bert_config(raw, offset=True)


FAMILY = Family(
    name="xlm_roberta",
    kind="embed",
    hf_architectures=tuple(
        f"{name}{what}"
        for name in ("XLMRoberta", "Roberta", "Camembert")
        for what in ("Model", "ForMaskedLM", "ForSequenceClassification")
    ),
    hf_config=_hf_config,
    decoder=Bert,
    hf_tensors=bert_tensors,
)
