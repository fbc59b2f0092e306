"""One training sequence. Apart from the rest, so that preparing data needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Sample", "as_count"]


def as_count(total: float) -> int | float:
    """A sum of weights: an int where it is whole, as it always is where weights are 0 or 1."""
    return int(total) if float(total).is_integer() else float(total)


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    `tokens` [T + 1] holds the T inputs and, one place later, the T labels; both are views of it, so the shift by one
    happens here and nowhere else. `loss_mask` [T], bool or float, says for each *input position* whether (or with what
    weight) predicting its label is supervised.
    """

    tokens: np.ndarray  # [T + 1] integer
    loss_mask: np.ndarray  # [T] bool or float

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 1, self.tokens.shape
        assert len(self.tokens) >= 2, self.tokens.shape
        assert self.loss_mask.shape == (len(self.tokens) - 1,), (self.loss_mask.shape, self.tokens.shape)

    @property
    def num_tokens(self) -> int | float:
        """Supervised tokens: the sum of the loss mask."""
        return as_count(self.loss_mask.sum(dtype=np.float64))

    @property
    def input_ids(self) -> np.ndarray:
        """[T]"""
        return self.tokens[:-1]

    @property
    def labels(self) -> np.ndarray:
        """[T], `labels[t] = tokens[t + 1]`. Always real token ids."""
        return self.tokens[1:]

    def __len__(self) -> int:
        """T, the number of inputs."""
        return len(self.tokens) - 1
