"""A sample token by token: what is given, what is to be predicted, whether it counts, and how wrong the model is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pertoken.data.batch.pack import Sample, collate
from pertoken.model.protocol import LanguageModel
from pertoken.objective.wide import device_of_sums, in_float64

__all__ = ["TokenLoss", "token_losses"]


@dataclass(frozen=True)
class TokenLoss:
    """One position of a sample."""

    position: int
    token: str  # the input, decoded
    label: str  # what comes next, decoded
    label_id: int
    supervised: bool
    weight: float  # in the loss; 0 where it is not supervised
    loss: float  # -log p(label), in nats, supervised or not


@torch.inference_mode()
def token_losses(model: LanguageModel, sample: Sample, tokenizer: Any) -> list[TokenLoss]:
    """The loss of every position of `sample`, in the precision of the model's weights."""
    was_training = model.training
    model.eval()
    try:
        micro_batch = collate([sample]).to(next(model.parameters()).device)
        logits = model.logits(model.hidden_states(micro_batch))
    finally:
        model.train(was_training)
    nll = F.cross_entropy(
        in_float64(logits), micro_batch.labels.to(device_of_sums(logits.device)), reduction="none"
    ).tolist()
    texts = [tokenizer.decode([int(i)], skip_special_tokens=False) for i in sample.tokens]
    return [
        TokenLoss(t, texts[t], texts[t + 1], int(sample.labels[t]), weight != 0, weight, nll[t])
        for t, weight in enumerate(sample.loss_mask.astype(float).tolist())
    ]
