"""What the rest of pertoken knows of a model: the decoder and the fallback through transformers both satisfy it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from torch import Tensor, nn

from pertoken.data.batch.pack import MicroBatch
from pertoken.model.execution import Execution
from pertoken.model.lora import Adapter
from pertoken.objective.logit_map import LogitMap
from pertoken.objective.terms import LossOutput, Objective

__all__ = ["BalanceLoss", "LanguageModel", "ModelFacts", "TorchModule"]


@dataclass(frozen=True)
class BalanceLoss:
    """Of a mixture of experts."""

    kind: Literal["sequence", "micro_batch", "none"]
    coefficient: float


@dataclass(frozen=True)
class ModelFacts:
    """What is asked of a model's configuration by those who need not know its family."""

    family: str  # as it is shown
    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    balance_loss: BalanceLoss | None = None  # of its experts; None: it has none
    experts_per_token: int = 0

    @property
    def has_experts(self) -> bool:
        return self.balance_loss is not None


class TorchModule(Protocol):
    """What is used of `torch.nn.Module` where the model is trained, bare or wrapped by DDP or FSDP2."""

    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...
    def float(self) -> Self: ...
    def double(self) -> Self: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...


class LanguageModel(TorchModule, Protocol):
    """A causal language model on flat micro-batches, loss included."""

    adapter: Adapter | None  # what alone is trained, and saved; None: all of the model

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the embedding where tied."""
        ...

    @property
    def logit_map(self) -> LogitMap:
        """From the head's product to logits."""
        ...

    @property
    def num_parameters(self) -> int: ...

    @property
    def num_active_parameters(self) -> int:
        """Those that one token's way leads through: fewer only where there are experts."""
        ...

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's blocks, for what treats them one by one."""
        ...

    @property
    def wide_modules(self) -> Callable[[nn.Module], list[nn.Module]] | None:
        """Tells what of a block autocast leaves as wide as its parameters; None where that is not known."""
        ...

    @property
    def can_checkpoint_activations(self) -> bool: ...

    def setting(self, key: str) -> object:
        """What the configuration has for the recipe's key `model.KEY`, None if nothing."""
        ...

    def set_balance_loss(self, balance_loss: BalanceLoss) -> None:
        """A part of the objective, which loaded weights do not say. Only of a model that has experts."""
        ...

    def forward(self, micro_batch: MicroBatch, execution: Execution = ..., *, objective: Objective = ...) -> LossOutput:
        """Sum of the negative log-likelihoods in nats over the supervised tokens, and their number; `objective` adds
        its terms.

        An empty micro-batch gives zeros, and every parameter a zero gradient.
        """
        ...

    def padding(self, micro_batch: MicroBatch, execution: Execution = ...) -> tuple[Tensor, Tensor]:
        """`padding_metric`: what padding adds to a forward and backward pass, and all operations."""
        ...

    def hidden_states(self, micro_batch: MicroBatch) -> Tensor:
        """[N, D], after the final norm, by the plain modules. Each sample sees itself alone."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        ...

    def new_cache(self, max_length: int) -> Any:
        """An empty cache for `decode`, for one sequence of at most `max_length` tokens; it holds `length` of them."""
        ...

    def decode(self, input_ids: Tensor, cache: Any) -> Tensor:
        """Logits [V] after the last of `input_ids` [T], which continue what the cache holds and are added to it."""
        ...
