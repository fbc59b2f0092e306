"""Mixture of experts: a top-k softmax router, experts without a capacity limit, and how evenly they are used.

Shape suffixes: N flat tokens, S documents, D hidden size, E experts, k experts per token, P = N k pairs of a token and
an expert that it chose, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pertoken.model.mlp import MLP
from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["Documents", "ExpertLoad", "MixtureOfExperts"]


@dataclass(frozen=True)
class Documents:
    """What the balance loss averages over: computed once for a micro-batch, used by every layer."""

    of_token: Tensor  # [N] int64, the document that each token is in
    lengths: Tensor  # [S] int64

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Documents:
        """Consecutive documents of the given lengths."""
        lengths_S = torch.tensor(lengths, dtype=torch.int64)
        of_token_N = torch.arange(len(lengths)).repeat_interleave(lengths_S)
        return cls(of_token_N.to(device, non_blocking=True), lengths_S.to(device, non_blocking=True))


class ExpertLoad(NamedTuple):
    """How one layer spread its tokens. A tuple, so that what wraps a layer finds the tensors in its output."""

    aux_sum: Tensor  # 0-d, the sum over documents of T_s * aux_s; carries the gradient
    num_choices: Tensor  # [E] int64, how many tokens chose each expert


class MixtureOfExperts(nn.Module):
    """y = the sum over the k experts of highest router probability of weight_i * expert_i(x). No token is dropped.

    The probabilities are a softmax over all experts; the weights are those of the chosen ones, divided by their sum
    where `norm_topk_prob`. (With k = 1 that makes the weight 1 whatever the router says, so that the balance loss alone
    trains the router.) The router computes in at least float32, under autocast too (Fedus et al., "Switch
    Transformers", section 2.4); the experts like any linear layer.

    The balance loss of document s of T_s tokens (DeepSeek-V2, section 2.2.2) is aux_s = sum_i f_i P_i, with

        f_i = E / (k T_s) * (how many of its tokens chose i),   P_i = the mean over its tokens of i's probability,

    so 1 where the load is even.

    Where there is a shared expert, sigmoid(its gate(x)) * shared_expert(x) is added to y (Qwen2-MoE). It has no part in
    the balance loss.
    """

    def __init__(self, config: ResolvedModelConfig) -> None:
        super().__init__()
        self.num_chosen = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        width = config.shared_expert_intermediate_size
        self.shared_expert = None if width is None else MLP(config.hidden_size, width)
        self.shared_expert_gate = None if width is None else nn.Linear(config.hidden_size, 1, bias=False)

    @property
    def routers(self) -> list[nn.Linear]:
        """What weights experts, in at least float32."""
        return [self.gate] if self.shared_expert_gate is None else [self.gate, self.shared_expert_gate]

    def forward(
        self, x_ND: Tensor, dtype: torch.dtype, documents: Documents | None
    ) -> tuple[Tensor, ExpertLoad | None]:
        """y [N, D] in the dtype of `x_ND`, the residual stream's; `dtype` is what the experts are given.

        Without `documents` there is no `ExpertLoad`.
        """
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = self.gate(x_ND)
        logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        probs_NE = logits_NE.softmax(-1)
        top_Nk, chosen_Nk = logits_NE.topk(self.num_chosen)
        # A softmax over the chosen ones alone is their renormalized probability.
        weights_Nk = top_Nk.softmax(-1) if self.norm_topk_prob else probs_NE.gather(1, chosen_Nk)
        counts_SE = self._count(chosen_Nk, documents)
        num_choices_E = counts_SE.sum(0)
        out_ND = self._mix(x_ND.to(dtype), chosen_Nk, weights_Nk, num_choices_E.tolist()).to(x_ND.dtype)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            with torch.autocast(x_ND.device.type, enabled=False):
                weight_N1 = self.shared_expert_gate(x_ND).sigmoid()
            out_ND = out_ND + weight_N1 * self.shared_expert(x_ND.to(dtype)).to(x_ND.dtype)
        if documents is None:
            return out_ND, None
        scale = self.gate.out_features / self.num_chosen
        f_SE = scale * counts_SE.to(probs_NE.dtype) / documents.lengths[:, None]
        # T_s P_i is a sum over tokens, so T_s aux_s is one too: no sum over documents has to be formed.
        aux_sum = (f_SE.index_select(0, documents.of_token) * probs_NE).sum()
        return out_ND, ExpertLoad(aux_sum, num_choices_E)

    def _count(self, chosen_Nk: Tensor, documents: Documents | None) -> Tensor:
        """[S, E] int64, how many tokens of each document chose each expert; one document if there is nothing to tell.

        Integers, so the order of summation does not matter.
        """
        num_experts = self.gate.out_features
        rows, cells_Nk = 1, chosen_Nk
        if documents is not None:
            rows, cells_Nk = len(documents.lengths), chosen_Nk + num_experts * documents.of_token[:, None]
        counts = torch.zeros(rows * num_experts, dtype=torch.int64, device=chosen_Nk.device)
        return counts.scatter_add_(0, cells_Nk.flatten(), torch.ones_like(cells_Nk).flatten()).view(rows, num_experts)

    def _mix(self, x_ND: Tensor, chosen_Nk: Tensor, weights_Nk: Tensor, num_choices: list[int]) -> Tensor:
        """Pairs laid out by expert, each expert over its own rows, and the outputs back at their tokens."""
        num_rows = [_num_rows(n, x_ND) for n in num_choices]
        expert_P = chosen_Nk.flatten()
        pairs_P = torch.arange(len(expert_P), device=expert_P.device)
        order_P = expert_P.argsort(stable=True)
        padding_E = torch.tensor(num_rows) - torch.tensor(num_choices)
        padding_before_E = (padding_E.cumsum(0) - padding_E).to(expert_P.device, non_blocking=True)
        row_P = torch.empty_like(order_P)
        row_P[order_P] = pairs_P + padding_before_E[expert_P[order_P]]
        token_of_row = order_P.new_zeros(sum(num_rows))  # a padding row computes token 0 once more, and nobody reads it
        token_of_row[row_P] = pairs_P // self.num_chosen

        parts = _Dispatch.apply(x_ND, token_of_row, row_P, self.num_chosen).split(num_rows)  # type: ignore[no-untyped-call]
        # An expert without tokens still gets a gradient, of zeros, from its empty part; where none is wanted, skip it.
        all_of_them = torch.is_grad_enabled() or not len(pairs_P)
        outputs = [expert(x) for expert, x in zip(self.experts, parts, strict=True) if all_of_them or len(x)]
        out_PD: Tensor = _Combine.apply(torch.cat(outputs), row_P)  # type: ignore[no-untyped-call]
        if self.num_chosen == 1 and self.norm_topk_prob:
            return out_PD  # the weight is 1, and a constant
        out_NkD = out_PD.view(*chosen_Nk.shape, x_ND.shape[1]).to(weights_Nk.dtype)
        with torch.autocast(x_ND.device.type, enabled=False):  # which would round the weights, and the sum
            return torch.bmm(weights_Nk[:, None], out_NkD).squeeze(1)


def _num_rows(num_choices: int, x: Tensor) -> int:
    """Rows to compute for so many tokens: as many, but in low precision on a CPU one of eight sizes to a doubling, and
    from 512 on a multiple of 64.

    There every new shape of a matrix product has code generated for it first, which for an expert's few rows can take
    longer than the product, and an expert meets a new number of tokens in every micro-batch.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return num_choices
    multiple = min(64, max(1, 1 << max(0, num_choices.bit_length() - 4)))
    return -(-num_choices // multiple) * multiple


class _Dispatch(torch.autograd.Function):
    """`x[token_of_row]`; `row` [P] says at which row each of the N k pairs is, and its gradient is gathered from there.
    Autograd would add row by row, which is slower and on CUDA in no fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row: Tensor, num_chosen: int) -> Tensor:
        ctx.save_for_backward(row)
        ctx.shape = (x.shape[0], num_chosen, x.shape[1])
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (row,) = ctx.saved_tensors
        grad = grads[0].index_select(0, row).view(ctx.shape)
        return grad.squeeze(1) if ctx.shape[1] == 1 else grad.sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """`x[row]` for distinct rows; those that nobody asks for have a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (row,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.num_rows, grads[0].shape[1]).index_copy_(0, row, grads[0]), None
