"""The heads of models that score a pair of texts (`*ForSequenceClassification`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lmserve.model.config import EncoderConfig, ModelConfig
from lmserve.model.embedding import DenseLayer, Embedding, VectorNorm
from lmserve.model.errors import CheckpointError
from lmserve.model.tensors import TensorSource

SUFFIX: Final = "ForSequenceClassification"
# Weight, and what comes after it, of each layer: of BERT, RoBERTa, decoders, Nomic BERT and GTE, and ModernBERT.
HEADS: Final[tuple[tuple[tuple[str, str], ...], ...]] = (
    (("bert.pooler.dense", "tanh"), ("classifier", "identity")),
    (("pooler.dense", "tanh"), ("classifier", "identity")),
    (("classifier.dense", "tanh"), ("classifier.out_proj", "identity")),
    (("score", "identity"),),
    (("new.pooler.dense", "tanh"), ("classifier", "identity")),
    (("nomic_bert.pooler.dense", "tanh"), ("classifier", "identity")),
    (("gte.pooler.dense", "tanh"), ("classifier", "identity")),
    (("head.dense", "gelu"), ("classifier", "identity")),
)


def scores_pairs(config: Mapping[str, Any]) -> bool:
    """Whether config.json names a model that classifies texts."""
    names = config.get("architectures")
    return isinstance(names, list) and any(isinstance(name, str) and name.endswith(SUFFIX) for name in names)


def read_scores(
    config: Mapping[str, Any],
    stored: Mapping[str, TensorSource],
    segments: tuple[int, int] | None,
    model: ModelConfig,
) -> Embedding:
    """The head among a checkpoint's tensors. Raises CheckpointError where there is none of a known form."""
    for names in HEADS:
        if all(f"{name}.weight" in stored for name, _ in names):
            layers = tuple(
                DenseLayer(stored[f"{name}.weight"], stored.get(f"{name}.bias"), activation, _norm(stored, name, model))
                for name, activation in names
            )
            return Embedding(
                pooling=model.classifier_pooling if isinstance(model, EncoderConfig) else "last",
                layers=layers,
                scores=_shown(config),
                labels=_labels(config, layers[-1].weight.shape[0]),
                several_labels=config.get("problem_type") == "multi_label_classification",
                segments=segments,
            )
    raise CheckpointError("the head that scores texts is missing, or not of a known form (BERT, RoBERTa, decoders)")


def _norm(stored: Mapping[str, TensorSource], name: str, model: ModelConfig) -> VectorNorm | None:
    """The norm that ModernBERT has after a layer of its head."""
    before = name.removesuffix(".dense")
    weight = stored.get(f"{before}.norm.weight")
    if weight is None or before == name:
        return None
    return VectorNorm(weight, stored.get(f"{before}.norm.bias"), model.norm_eps)


def _shown(config: Mapping[str, Any]) -> str:
    """The function that sentence-transformers shows scores through; a sigmoid unless the model says otherwise."""
    own = config.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, dict) else config.get("sbert_ce_default_activation_function")
    return "identity" if str(named).endswith("Identity") else "sigmoid"


def _labels(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    names = config.get("id2label")
    found = names if isinstance(names, dict) else {}
    return tuple(str(found.get(str(index), f"LABEL_{index}")) for index in range(count))
