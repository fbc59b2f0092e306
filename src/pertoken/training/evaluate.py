"""Evaluation: one sum over every supervised token, divided once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from pertoken.data.batch import collate, plan
from pertoken.data.store import Store
from pertoken.training.precision import Precision

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Sums over a whole data set."""

    loss_sum: float  # nats
    num_tokens: float  # supervised tokens
    num_bytes: int  # UTF-8 bytes of the supervised text; special tokens have none

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """All nats (those of special tokens too) in bits, per byte of text: comparable between tokenizers."""
        return self.loss_sum / math.log(2) / self.num_bytes if self.num_bytes else math.nan


@torch.no_grad()
def evaluate(model: nn.Module, store: Store, precision: Precision, *, token_budget: int) -> Evaluation:
    """Token-weighted loss over every sample of `store`. The model's train/eval mode is restored."""
    was_training = model.training
    model.eval()
    loss_sum = 0.0
    try:
        for indices in plan(store.lengths.tolist(), world_size=1, token_budget=token_budget)[0]:
            with precision.autocast():
                out = model(collate([store[i] for i in indices]).to(precision.device))
            loss_sum += float(out.loss_sum)
    finally:
        model.train(was_training)
    return Evaluation(loss_sum, float(store.num_tokens.sum()), int(store.num_bytes.sum()))
