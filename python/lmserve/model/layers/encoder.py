"""What all encoders have in common: a state of each token, and no logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from lmserve.model.config import EncoderConfig
from lmserve.model.ops import Ops

A = TypeVar("A")
W = TypeVar("W")


class Encoder(ABC, Generic[A, W]):
    """A model of whole texts."""

    ops: Ops[A, W]
    config: EncoderConfig

    @property
    def head(self) -> W:
        """There is none."""
        raise TypeError("an encoder makes no logits")

    def forward(self, *, sampled_rows_only: bool) -> A:
        """The states of all tokens, [T, hidden]."""
        if sampled_rows_only:
            raise TypeError("an encoder samples nothing")
        return self.states()

    @abstractmethod
    def states(self) -> A:
        """The last layer's states, [T, hidden]."""
