"""Evaluation: one sum over every supervised token, divided once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pertoken.data.batch.pack import collate, pack_micro_batches
from pertoken.data.batch.sample import as_count
from pertoken.data.store.dataset import Dataset
from pertoken.errors import PertokenError
from pertoken.kernels.memory import forget_blocks
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.protocol import TorchModule
from pertoken.training.memory import out_of_memory
from pertoken.training.parallel import World
from pertoken.training.precision import Precision

__all__ = ["Evaluation", "evaluate", "evaluate_sources"]


@dataclass(frozen=True)
class Evaluation:
    """Sums over a whole data set."""

    loss_sum: float  # nats
    num_tokens: float  # supervised tokens: the sum of their weights
    num_bytes: float  # UTF-8 bytes of the supervised text, weighted as its tokens; special tokens have none

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
def evaluate(
    model: TorchModule,
    store: Dataset,
    precision: Precision,
    *,
    token_budget: int,
    world: World | None = None,
    execution: Execution = PLAIN,
) -> Evaluation:
    """Token-weighted loss over every sample of `store`, shared among the ranks of `world` (alone if not given).

    The model's train/eval mode is restored. Where memory ends, micro-batches are halved, unless other ranks wait.
    Raises PertokenError where one sample is too many.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    loss_sum: float | None = None
    try:
        while loss_sum is None:
            micro_batches = pack_micro_batches(
                store.lengths.tolist(), world_size=world.size, token_budget=token_budget
            )[world.rank]
            loss_sum = _loss_sum(model, store, precision, execution, micro_batches)
            if loss_sum is None and (world.size > 1 or len(micro_batches) >= len(store)):
                raise PertokenError(
                    f"evaluation: out of memory with {token_budget} tokens in a micro-batch; "
                    "lower train.micro_batch_tokens or data.max_seq_len"
                )
            token_budget = max(1, token_budget // 2)
    finally:
        model.train(was_training)
    loss_sum = float(world.sum(torch.tensor([loss_sum], dtype=torch.float64)))
    return Evaluation(loss_sum, float(store.num_tokens.sum()), as_count(store.num_bytes.sum()))


def evaluate_sources(
    model: TorchModule,
    data: Dataset,
    precision: Precision,
    *,
    token_budget: int,
    world: World,
    execution: Execution = PLAIN,
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """(of all samples, of each source by its name), as `evaluate`; no source where `data` is one store."""
    found = {
        part.name: evaluate(model, part.store, precision, token_budget=token_budget, world=world, execution=execution)
        for part in data.parts
    }
    sums = [math.fsum(getattr(one, name) for one in found.values()) for name in ("loss_sum", "num_tokens", "num_bytes")]
    return Evaluation(*sums), {name: one for name, one in found.items() if name}


def _loss_sum(
    model: TorchModule,
    store: Dataset,
    precision: Precision,
    execution: Execution,
    micro_batches: Sequence[Sequence[int]],
) -> float | None:
    """In nats; None where memory ends."""
    loss_sum = 0.0
    try:
        with execution.keeping_casts() as this:
            for indices in micro_batches:
                with precision.autocast():
                    out = model(collate([store[i] for i in indices]).to(precision.device), this)
                loss_sum += float(out.loss_sum)
    except Exception as error:
        if not out_of_memory(error):
            raise
        forget_blocks()
        return None
    return loss_sum
