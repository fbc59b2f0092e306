"""The evaluation loss, in several splits, against the plain one over the same samples."""

from __future__ import annotations

import math
from typing import cast

from pertoken.data.store.dataset import Dataset
from pertoken.model.protocol import TorchModule
from pertoken.prove.case import EXACT, FLOAT64, Case
from pertoken.prove.report import Result, Verdict
from pertoken.prove.samples import InMemory
from pertoken.training.evaluate import evaluate
from pertoken.training.parallel import World

__all__ = ["evaluated", "evaluation"]


def evaluation(name: str, case: Case) -> Result:
    """In one micro-batch, in several, and one sample in each."""
    return evaluated(name, case.model, case.chosen.samples, case.reference.loss, World())


def evaluated(name: str, model: TorchModule, samples: InMemory, loss: float, world: World) -> Result:
    """`loss`, in nats per supervised token, is what the plain code has for `samples`. All ranks call it."""
    total, longest = int(samples.lengths.sum()), int(samples.lengths.max())
    worst = 0.0
    for token_budget in (total, max(total // 3, longest), 1):
        found = evaluate(model, cast(Dataset, samples), FLOAT64, token_budget=token_budget, world=world)
        nats = loss * float(samples.num_tokens.sum())
        expected = (loss, math.exp(min(loss, 700.0)), nats / math.log(2) / float(samples.num_bytes.sum()))
        for figure, right in zip((found.loss, found.perplexity, found.bits_per_byte), expected, strict=True):
            error = abs(figure / right - 1) if figure != right else 0.0
            worst = max(worst, error if math.isfinite(error) else math.inf)
    verdict: Verdict = "passed" if worst <= EXACT else "failed"
    what = "loss, perplexity, bits per byte"
    return Result(name, "float64", verdict, EXACT, worst, what, loss_difference=worst, note=f"{what} in three splits")
