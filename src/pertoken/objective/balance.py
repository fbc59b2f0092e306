"""The balance loss of a mixture of experts (DeepSeek-V2, section 2.2.2), as a term of the objective.

The layers compute its sums (`ExpertLoad` of `model.moe`), since only they see the router's probabilities. For document
s of T_s tokens a layer has aux_s = sum_i f_i P_i; T_s * aux_s is a sum over tokens, so the term is

    coefficient * (sum over layers and documents of T_s * aux_s) / (the step's input tokens)

and as independent of the split as the cross entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from pertoken.objective.terms import LossOutput, Term
from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["balanced_lengths", "with_balance_loss"]


class _Load(Protocol):
    """`ExpertLoad` of `model.moe`: how one layer spread its tokens."""

    @property
    def aux_sum(self) -> Tensor: ...  # 0-d, the sum over documents of T_s * aux_s; carries the gradient

    @property
    def num_choices(self) -> Tensor: ...  # [E] int64, how many tokens chose each expert


def balanced_lengths(config: ResolvedModelConfig, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths of what the load is balanced over: each document of a micro-batch.

    With `aux_loss="micro_batch"` it is all of a micro-batch, so that the loss depends on the split.
    """
    return (sum(lengths),) if config.aux_loss == "micro_batch" else lengths


def with_balance_loss(
    out: LossOutput, loads: Sequence[_Load], config: ResolvedModelConfig, num_tokens: int
) -> LossOutput:
    """`out` with the balance loss of all layers over `num_tokens` input tokens, and with two more metrics:

    `aux_loss`, the sum over documents and layers of T_s * aux_s (without the coefficient), and the number of tokens;
    `expert_load`, how many tokens chose each expert [L, E], and how many choices each layer made.

    With `aux_loss="micro_batch"` f_i is not divided by k: MiniMind's convention, and that of transformers'
    `load_balancing_loss_func`. With `aux_loss="none"` the coefficient is 0.
    """
    chosen = config.num_experts_per_tok
    aux_sum = torch.stack([load.aux_sum for load in loads]).sum()
    if config.aux_loss == "micro_batch":
        aux_sum = chosen * aux_sum
    tokens = torch.full((), num_tokens, dtype=torch.int64, device=aux_sum.device)
    load_LE = torch.stack([load.num_choices for load in loads])
    # 0 and not left out: a router with one choice would lack a gradient, even the zeros that wrappers wait for.
    coefficient = 0.0 if config.aux_loss == "none" else config.aux_loss_coef
    return replace(
        out,
        metrics=out.metrics | {"aux_loss": (aux_sum.detach(), tokens), "expert_load": (load_LE, chosen * tokens)},
        more_terms=out.more_terms | {"aux_loss": Term(aux_sum, "inputs", coefficient)},
    )
