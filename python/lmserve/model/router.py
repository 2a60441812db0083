"""How the experts of a token are chosen from its logits, as numbers that every `Ops` implementation can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lmserve.model.errors import CheckpointError

Kind = Literal["softmax", "softmax_of_chosen", "sigmoid", "corrected_sigmoid", "grouped_softmax", "sparse_mixer"]


@dataclass(frozen=True, slots=True)
class Router:
    """A choice of `top_k` experts and their weights, which are multiplied by `factor`.

    `kind` is the name of a function of `lmserve.model.torch_routers`, whose docstring has the formula, and which reads
    the numbers after it: `normalized`: weights are divided by their sum, to which some kinds add `tiny`; `groups` of
    experts side by side, of which the best `top_groups` take part; `jitter`: of a sparse mixer.
    """

    kind: Kind
    top_k: int
    factor: float = 1.0
    normalized: bool = False
    groups: int = 1
    top_groups: int = 1
    jitter: float = 0.0
    tiny: float = 1e-20

    def check(self, experts: int) -> Router:
        """Itself. Raises CheckpointError for a choice that so many experts do not leave."""
        groups, opened = self.groups, self.top_groups
        if not 1 <= opened <= groups or experts % groups or not 1 <= self.top_k <= experts // groups * opened:
            raise CheckpointError(
                f"each token is to go to {self.top_k} experts of {opened} groups, but there are {groups} groups of"
                f" {experts} experts"
            )
        return self


def experts_of(raw: dict[str, Any], *keys: str) -> int:
    """The first of these keys of config.json that is there. Raises CheckpointError where none is, or no count."""
    found = next((raw[key] for key in keys if raw.get(key) is not None), None)
    if type(found) is not int or found < 1:
        raise CheckpointError(f"config.json: {keys[0]} must be at least 1, but {found!r} was given")
    return found
