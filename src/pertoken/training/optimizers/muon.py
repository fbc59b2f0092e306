"""Muon for the blocks' matrices, AdamW for all other parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.model.moe import MixtureOfExperts
from pertoken.model.protocol import LanguageModel
from pertoken.recipe.train import TrainConfig
from pertoken.training.norms import matrix_norms
from pertoken.training.optimizers.adamw import AdamW
from pertoken.training.optimizers.optimizer import Optimizer, OptimizerKind, decay_groups
from pertoken.training.parallel import shard_like, whole

__all__ = ["MUON", "MuonAdamW", "build_muon", "orthogonalized"]

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al., "Muon", 2024
_NEWTON_SCHULZ_STEPS = 5
_MUON_MOMENTUM = 0.95
_NUMBERS_AT_A_TIME = 2**22  # how many of Muon's are stacked: enough to fill a processor, little beside a model


def build_muon(
    model: LanguageModel, *, weight_decay: float, betas: tuple[float, float], lr_ratio: float, dtype: torch.dtype
) -> MuonAdamW:
    """Muon for the matrices of `model.layers`, AdamW for all else: embeddings, head, norms, routers.

    `lr_ratio` is Muon's learning rate over AdamW's, and `dtype` what Muon computes its updates in.
    """
    matrices = _matrices_of_blocks(model)
    mine = set(matrices)
    others = decay_groups((p for p in model.parameters() if p not in mine), weight_decay)
    return MuonAdamW(matrices, others, weight_decay=weight_decay, betas=betas, lr_ratio=lr_ratio, dtype=dtype)


def _matrices_of_blocks(model: LanguageModel) -> list[nn.Parameter]:
    """Those that map hidden states to hidden states: no embeddings, and no routers (a row of one is an expert)."""
    excluded = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    excluded |= {r.weight for m in model.modules() if isinstance(m, MixtureOfExperts) for r in m.routers}
    parameters = (p for layer in model.layers for p in layer.parameters())
    return [p for p in parameters if p.requires_grad and p.ndim == 2 and p not in excluded]


class MuonAdamW(Optimizer):
    """Muon for `matrices` and AdamW for `others`, as one optimizer with one state: one norm, one decision to skip.

    For a matrix W [A, B] with gradient G, momentum mu = 0.95 and learning rate eta (Jordan et al., "Muon", 2024; decay
    and scale from Liu et al., "Muon is Scalable for LLM Training", 2025, section 2.2, so that one learning rate and one
    weight decay suit both optimizers):

        M <- mu M + (1 - mu) G
        W <- (1 - eta * weight_decay) W - 0.2 sqrt(max(A, B)) * eta * orthogonalized(mu M + (1 - mu) G)

    This is `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, its reference in the tests. That one works matrix
    by matrix, in bfloat16 whatever the model computes in; there, a gradient summed in another order becomes another
    update, and a split of the step would show. A sharded matrix is put together for its update.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[dict[str, Any]],
        *,
        weight_decay: float,
        betas: tuple[float, float],
        lr_ratio: float,
        dtype: torch.dtype,
    ) -> None:
        self._adamw = AdamW(others or [{"params": []}], betas=betas)  # where all else is frozen
        self._matrices, self._dtype = set(matrices), dtype
        ours = {"params": matrices, "lr": 0.0, "lr_ratio": lr_ratio, "weight_decay": weight_decay}
        super().__init__([*self._adamw.param_groups, ours], {})  # AdamW's own groups, so that it sees what is set
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self._adamw.step()
        ours = self.param_groups[-1]
        lr, weight_decay = ours["lr"], ours["weight_decay"]
        for matrices in _of_one_shape([p for p in ours["params"] if p.grad is not None]):
            updates = orthogonalized(torch.stack([self._momentum(p) for p in matrices]).to(self._dtype))
            scale = 0.2 * math.sqrt(max(matrices[0].shape))
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - lr * weight_decay)
                matrix.add_(shard_like(update.to(matrix.dtype), matrix), alpha=-lr * scale)

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The momentum of a matrix of Muon's; else AdamW's state."""
        if parameter in self._matrices:
            return {"momentum_buffer": torch.zeros_like(parameter)}
        return self._adamw.new_state(parameter)

    def _momentum(self, matrix: nn.Parameter) -> Tensor:
        """Advanced by the gradient, then looked ahead (Nesterov): [A, B], whole."""
        assert matrix.grad is not None
        if not self.state[matrix]:
            self.state[matrix] = self.new_state(matrix)
        momentum = self.state[matrix]["momentum_buffer"].lerp_(matrix.grad, 1 - _MUON_MOMENTUM)
        return whole(matrix.grad.lerp(momentum, _MUON_MOMENTUM))


def _of_one_shape(matrices: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Batches to be stacked: a small model's matrices, or an expert's, are too small to be worth a call each."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for shape, alike in by_shape.items():
        size = max(1, _NUMBERS_AT_A_TIME // shape.numel())
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def orthogonalized(x: Tensor) -> Tensor:
    """About U V^T for each matrix U S V^T of [K, A, B], by five steps of a Newton-Schulz iteration.

    Singular values of at least about 1/500 of the matrix's Frobenius norm come out between 0.7 and 1.2, smaller ones
    smaller: p(p(...p(S / |S|))) for p(s) = a s + b s^3 + c s^5 (Jordan et al., "Muon", 2024).
    """
    a, b, c = _NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x  # the smaller Gram matrix; a view would triple the time of small ones
    x = x / matrix_norms(x).clamp(min=1e-7).to(x.dtype)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _build(model: LanguageModel, train: TrainConfig) -> MuonAdamW:
    assert train.learning_rate is not None, "the recipe fills it in"
    return build_muon(
        model,
        weight_decay=train.weight_decay,
        betas=train.betas,
        lr_ratio=(train.muon_learning_rate or train.learning_rate) / train.learning_rate,
        dtype={"float64": torch.float64, "float32": torch.float32}.get(train.dtype, torch.bfloat16),
    )


MUON = OptimizerKind("muon", build=_build, state_numbers=1)
