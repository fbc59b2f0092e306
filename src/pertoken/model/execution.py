"""How a forward pass is computed: a frozen value that is handed to the model with each micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from pertoken.data.batch.pack import MicroBatch
from pertoken.model.moe import Documents, ExpertLoad
from pertoken.model.plain import PLAIN_ENGINE
from pertoken.objective.cross_entropy import LossImpl, TiedGradient

if TYPE_CHECKING:
    from pertoken.model.decoder import CausalLM

__all__ = ["PLAIN", "Casts", "Engine", "Execution", "ForwardPass"]


class Casts:
    """Matrices in low precision, kept from one forward pass to the next, by the ids of the parameters they are made of.

    An opaque object on purpose. FSDP2 copies the dataclasses and dicts among a module's arguments, and takes a tensor
    in them that wants a gradient for an input, so the parameters themselves must not be in here either.
    """

    def __init__(self) -> None:
        self._matrices: dict[tuple[int, ...], Tensor] = {}

    def get(self, key: tuple[int, ...]) -> Tensor | None:
        return self._matrices.get(key)

    def put(self, key: tuple[int, ...], matrix: Tensor) -> None:
        self._matrices[key] = matrix

    def clear(self) -> None:
        self._matrices.clear()


class ForwardPass(Protocol):
    """The decoder over one micro-batch, as one engine computes it."""

    loss_impl: LossImpl  # what "auto" means for these hidden states
    tied: TiedGradient | None  # takes the head's gradient of a tied embedding, where the engine can

    def padding(self) -> tuple[Tensor, Tensor]:
        """`padding_metric`: what padding adds to a forward and backward pass, and all operations."""
        ...

    def run(
        self, documents: Documents | None, output_rows: Tensor | None, *, recompute: bool
    ) -> tuple[Tensor, list[ExpertLoad]]:
        """Hidden states [N, D] after the final norm, and with `documents` what every layer gave to its experts.

        `output_rows`: the rows that are needed after the last block, None for all. With `recompute` each block's
        activations are computed again in the backward pass.
        """
        ...


class Engine(Protocol):
    """What computes the decoder's blocks from its modules' weights. Not a dataclass, as FSDP2 copies those."""

    @property
    def name(self) -> str:
        """As in `train.engine`."""
        ...

    def supports(self, model: object) -> str | None:
        """Why `model` cannot run here, in words; None if it can. Asked at every pass: a user may change a module."""
        ...

    def begin(self, model: CausalLM, micro_batch: MicroBatch, casts: Casts | None) -> ForwardPass:
        """A pass of `model`, through its plain modules where `supports` says no."""
        ...


@dataclass(frozen=True)
class Execution:
    """How to run a model. No choice here may change what is computed, rounding aside."""

    engine: Engine = PLAIN_ENGINE
    loss_impl: LossImpl = "auto"  # `linear_cross_entropy`'s; "auto": what suits the engine
    activation_checkpointing: bool = False  # compute each block's activations again in the backward pass
    casts: Casts | None = None  # see `keeping_casts`

    @contextmanager
    def keeping_casts(self) -> Iterator[Execution]:
        """Inside, an engine may cast weights once and not in every forward pass: they must not change."""
        casts = Casts()
        try:
            yield replace(self, casts=casts)
        finally:
            casts.clear()


PLAIN = Execution()
