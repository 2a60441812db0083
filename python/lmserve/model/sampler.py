"""Samples a token from each row of logits. What is sampled is defined here for every `Ops` implementation.

A row with temperature 0 takes its most likely token (the lowest id among equals). Any other row keeps the tokens whose
logit is at least a threshold, and takes the first of them, in order of token id, at which the cumulative probability
exceeds the row's `uniform`. Each filter is such a threshold, so tokens of equal logits are kept or dropped together:

- top_k: the k-th largest logit; top_p: the smallest logit among the most likely tokens that together reach top_p of
what top_k left; min_p: the logit whose probability is min_p times the largest one.

A row whose logits are not finite has no token: it gets NO_TOKEN. There is no randomness but `uniform`, and no row sees
another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmserve.model.interface import F32, I32, MAX_LOGPROBS, NO_TOKEN, LogitEdits, StepBuffers
from lmserve.model.torch_upload import on_device

# Most distributions have their top_p mass in this many tokens; where one has not, the row is sorted whole.
NUCLEUS_WIDTH = 512


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Parameters of R rows; `StepBuffers` says what each is."""

    temperature: F32
    top_k: I32
    top_p: F32
    min_p: F32
    repetition_penalty: F32
    presence_penalty: F32
    frequency_penalty: F32
    uniform: F32

    @classmethod
    def of(cls, buffers: StepBuffers, n_rows: int) -> SamplingRows:
        """The first n_rows of a step's buffers, not copied."""
        return cls(*(getattr(buffers, name)[:n_rows] for name in cls.__slots__))

    def select(self, rows: NDArray[np.intp]) -> SamplingRows:
        """The parameters of some rows."""
        return SamplingRows(*(getattr(self, name)[rows] for name in self.__slots__))


def sample(logits: Tensor, rows: SamplingRows, edits: LogitEdits | None) -> Tensor:
    """Token ids, int64 [R], of float32 logits [R, vocab], which are not changed."""
    # 0 times a finite number is 0, and times any other it is none.
    finite = (logits * 0).sum(-1) == 0
    return _sample(logits, rows, edits).masked_fill_(~finite, NO_TOKEN)


def _sample(logits: Tensor, rows: SamplingRows, edits: LogitEdits | None) -> Tensor:
    special = (rows.temperature > 0) | _changed_rows(rows, edits)
    if not special.any():
        return logits.argmax(-1)
    chosen = np.flatnonzero(special)
    index = on_device(chosen, logits.device)
    changed = logits.index_select(0, index)
    if edits is not None:
        _apply_edits(changed, rows, edits, chosen)
    sampled = logits.argmax(-1)
    sampled[index] = _sample_changed(changed, rows.select(chosen))
    return sampled


def token_logprobs(logits: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of raw logits [n, vocab]: the sampled tokens' log-probabilities [n], and the most likely tokens with theirs.

    The latter are [n, MAX_LOGPROBS], most likely first, lower ids first among equals; a smaller vocabulary is padded
    with token 0 at -inf. A row with NO_TOKEN has no log-probabilities: its values are undefined.
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, sampled[:, None].clamp(min=0))[:, 0]
    width = min(MAX_LOGPROBS, logits.shape[1])
    values, ids = logprobs.topk(width)
    ids, order = ids.sort(dim=-1)
    values, by_value = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    padding = (0, MAX_LOGPROBS - width)
    top_ids = torch.nn.functional.pad(ids.gather(1, by_value), padding, value=0)
    return own, top_ids, torch.nn.functional.pad(values, padding, value=-torch.inf)


def _changed_rows(rows: SamplingRows, edits: LogitEdits | None) -> NDArray[np.bool_]:
    if edits is None:
        return np.zeros(len(rows.temperature), np.bool_)
    n = len(rows.temperature) + 1
    changed: NDArray[np.bool_] = (np.diff(edits.bias_start[:n]) > 0) | (np.diff(edits.seen_start[:n]) > 0)
    if edits.masks is not None:
        changed[edits.masks.rows] = True
    return changed


def _sample_changed(logits: Tensor, rows: SamplingRows) -> Tensor:
    greedy = rows.temperature == 0
    if greedy.all():
        return logits.argmax(-1)
    drawn = on_device(np.flatnonzero(~greedy), logits.device)
    sampled = logits.argmax(-1)
    sampled[drawn] = _draw(logits.index_select(0, drawn), rows.select(np.flatnonzero(~greedy)))
    return sampled


def _apply_edits(logits: Tensor, rows: SamplingRows, edits: LogitEdits, chosen: NDArray[np.intp]) -> None:
    """Penalties, biases, then masks, in place; row i of logits is row chosen[i] of the step."""
    place = np.full(len(rows.temperature), -1, np.int64)
    place[chosen] = np.arange(len(chosen))
    n = len(rows.temperature)

    def moved(values: NDArray[Any]) -> Tensor:
        return on_device(values, logits.device)

    owner = np.repeat(np.arange(n), np.diff(edits.seen_start[: n + 1]))
    if len(owner):
        end = len(owner)
        at = (moved(place[owner]), moved(edits.seen_token[:end].astype(np.int64)))
        count = moved(edits.seen_count[:end].astype(np.float32))
        value = logits[at]
        repetition = moved(rows.repetition_penalty[owner])
        value = torch.where(value > 0, value / repetition, value * repetition)
        value = value - count * moved(rows.frequency_penalty[owner])
        logits[at] = value - (count > 0) * moved(rows.presence_penalty[owner])
    owner = np.repeat(np.arange(n), np.diff(edits.bias_start[: n + 1]))
    if len(owner):
        end = len(owner)
        at = (moved(place[owner]), moved(edits.bias_token[:end].astype(np.int64)))
        logits.index_put_(at, moved(edits.bias_value[:end]), accumulate=True)
    if edits.masks is not None:
        places = place[edits.masks.rows]
        # Asked for as late as possible: the masks are computed meanwhile.
        words = np.frombuffer(edits.masks.wait(), np.uint8).reshape(len(places), -1)
        forbidden = np.unpackbits(~words, axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
        for at, row in zip(places.tolist(), moved(forbidden), strict=True):
            logits[at].masked_fill_(row, -torch.inf)


def _draw(logits: Tensor, rows: SamplingRows) -> Tensor:
    device = logits.device
    # Finite even where every token is forbidden, so that such a row gives an arbitrary token and no NaN.
    largest = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    scaled = (logits - largest) / on_device(rows.temperature, device)[:, None]
    threshold = _threshold(scaled, rows)
    kept = scaled.exp().masked_fill_(scaled < threshold[:, None], 0.0)
    cumulative = kept.cumsum(-1, dtype=torch.float64)
    target = on_device(rows.uniform, device)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1)


def _threshold(scaled: Tensor, rows: SamplingRows) -> Tensor:
    """The least kept value [n] of scaled [n, vocab], whose largest value is 0 in each row."""
    n, vocab = scaled.shape
    with np.errstate(divide="ignore"):
        threshold = on_device(np.log(rows.min_p), scaled.device)
    top_k = np.where((rows.top_k > 0) & (rows.top_k < vocab), rows.top_k, vocab)
    narrow = top_k <= NUCLEUS_WIDTH
    wide = ~narrow & ((top_k < vocab) | (rows.top_p < 1))
    for chosen in (np.flatnonzero(narrow), np.flatnonzero(wide)):
        if not len(chosen):
            continue
        index = on_device(chosen, scaled.device)
        values = scaled if len(chosen) == n else scaled.index_select(0, index)
        least = _top_threshold(values, top_k[chosen], rows.top_p[chosen])
        threshold[index] = torch.maximum(threshold[index], least)
    return threshold


def _top_threshold(scaled: Tensor, top_k: NDArray[Any], top_p: F32) -> Tensor:
    """The threshold of top_k and top_p together, of rows that are all narrow or all wide."""
    vocab = scaled.shape[1]
    count = on_device(top_k.astype(np.int64), scaled.device)[:, None]
    share = on_device(top_p.astype(np.float64), scaled.device)[:, None]
    widest = int(top_k.max())
    if widest <= NUCLEUS_WIDTH:
        return _cut(scaled, scaled.topk(widest).values, count, share)[0]
    # On a GPU the whole sort costs less than waiting to learn that a part would have done.
    if scaled.device.type != "cpu" or top_k.min() < vocab or vocab <= NUCLEUS_WIDTH:
        return _cut(scaled, scaled.sort(dim=-1, descending=True).values, count, share)[0]
    least, reached = _cut(scaled, scaled.topk(NUCLEUS_WIDTH).values, count, share)
    short = (~reached).nonzero()[:, 0]
    if len(short):
        rest = scaled.index_select(0, short)
        largest_first = rest.sort(dim=-1, descending=True).values
        least[short] = _cut(rest, largest_first, count[short], share[short])[0]
    return least


def _cut(scaled: Tensor, largest: Tensor, count: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds [n] from the w largest values [n, w], largest first, and whether top_p's share is reached in them.

    count [n, 1]: top_k, the vocabulary's size for none; share [n, 1]: top_p.
    """
    width = largest.shape[1]
    least = largest.gather(1, (count - 1).clamp(max=width - 1))
    limited = torch.where(count <= width, least, -torch.inf)
    total = scaled.exp().masked_fill_(scaled < limited, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    mass = largest.exp().cumsum(-1, dtype=torch.float64)
    wanted = share * total
    cut = (mass < wanted).sum(-1, keepdim=True).clamp(max=width - 1)
    by_share = torch.where(share < 1, largest.gather(1, cut), -torch.inf)
    return torch.maximum(limited, by_share)[:, 0], (mass[:, -1:] >= wanted)[:, 0]
