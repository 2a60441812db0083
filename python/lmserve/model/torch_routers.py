"""The routers of mixtures of experts in torch, one function for each kind of `lmserve.model.router.Router`.

Each takes float32 logits s [n, experts] and gives the numbers of the chosen experts, int64 [n, top_k], and their
weights, float32, before they are multiplied by the router's factor. Sums and softmaxes are over a token's experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmserve.model.router import Router


def softmax(logits: Tensor, router: Router, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest p, which is the softmax of s, divided by their sum where normalized (Qwen3-MoE, OLMoE, Mixtral)."""
    del correction
    weights, chosen = logits.softmax(-1).topk(router.top_k, dim=-1)
    return chosen, weights / weights.sum(-1, keepdim=True) if router.normalized else weights


def softmax_of_chosen(logits: Tensor, router: Router, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest s; their weights are the softmax over these alone (gpt-oss, Granite)."""
    del correction
    largest, chosen = logits.topk(router.top_k, dim=-1)
    return chosen, largest.softmax(-1)


def sigmoid(logits: Tensor, router: Router, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest s; the weight of each is its sigmoid (Llama 4)."""
    del correction
    largest, chosen = logits.topk(router.top_k, dim=-1)
    return chosen, largest.sigmoid()


def corrected_sigmoid(logits: Tensor, router: Router, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """With p = sigmoid(s) and c = p + correction the largest c in the best groups; their weights are p, divided by
    their sum plus `tiny` where normalized (GLM-4.5, DeepSeek-V3, MiniMax-M2).

    A group's score is the sum of its two largest c.
    """
    scores = logits.sigmoid()
    corrected = scores if correction is None else scores + correction
    if router.groups > 1:
        grouped = corrected.view(len(corrected), router.groups, corrected.shape[-1] // router.groups)
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1)[0].sum(-1)
        corrected = corrected.masked_fill(~_open(best, router, grouped.shape[-1]), -torch.inf)
    chosen = corrected.topk(router.top_k, dim=-1)[1]
    weights = scores.gather(-1, chosen)
    return chosen, weights / (weights.sum(-1, keepdim=True) + router.tiny) if router.normalized else weights


def grouped_softmax(logits: Tensor, router: Router, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest p, which is the softmax of s, in the best groups (DeepSeek-V2).

    A group's score is its largest p.
    """
    del correction
    scores = logits.softmax(-1)
    if router.groups > 1:
        grouped = scores.view(len(scores), router.groups, scores.shape[-1] // router.groups)
        scores = scores.masked_fill(~_open(grouped.amax(-1), router, grouped.shape[-1]), 0.0)
    weights, chosen = scores.topk(router.top_k, dim=-1)
    return chosen, weights


def sparse_mixer(logits: Tensor, router: Router, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """Repeatedly the largest s of the rest, m; its weight is its softmax over those left for which
    (m - s) / max(|s|, m) is at most 2 * jitter (Phi-3.5-MoE).
    """
    del correction
    left, all_chosen, all_weights = logits, [], []
    for _ in range(router.top_k):
        largest, chosen = left.max(-1, keepdim=True)
        far = (largest - logits) / torch.maximum(logits.abs(), largest) > 2 * router.jitter
        all_chosen.append(chosen)
        all_weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, chosen))
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(all_chosen, -1), torch.cat(all_weights, -1)


def _open(best: Tensor, router: Router, size: int) -> Tensor:
    """[n, experts] True: in one of the best groups of `size` experts."""
    groups = best.topk(router.top_groups, dim=-1)[1]
    opened = torch.zeros_like(best, dtype=torch.bool).scatter(-1, groups, value=True)
    return opened.repeat_interleave(size, dim=-1)


KINDS = {
    "softmax": softmax,
    "softmax_of_chosen": softmax_of_chosen,
    "sigmoid": sigmoid,
    "corrected_sigmoid": corrected_sigmoid,
    "grouped_softmax": grouped_softmax,
    "sparse_mixer": sparse_mixer,
}
