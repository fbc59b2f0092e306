"""The plain way: one sample at a time, all logits, no fused loss, no plan, no step.

Nothing of `data.batch.pack`, `data.batch.share`, `objective` or `training.step` is used here, so that a mistake there
cannot hide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pertoken.data.batch.pack import MicroBatch, Sample
from pertoken.model.protocol import LanguageModel
from pertoken.prove.report import Gradient

__all__ = ["reference_gradient"]


def reference_gradient(
    model: LanguageModel,
    samples: Sequence[Sample],
    *,
    aux_loss_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    scale: float = 1.0,
) -> Gradient:
    """Of (1/N) sum of mask * (nll + `z_loss_coef` log(Z)^2), plus `aux_loss_coef` times the balance loss, in the
    precision of the weights. The loss is the mean of nll alone.

    N counts the supervised tokens of all samples. The balance loss is each document's own, weighted by its tokens.
    Its backward passes are those of `scale` times the objective, for float16; the gradient is the objective's own.
    """
    num_tokens = sum(float(sample.loss_mask.sum(dtype="float64")) for sample in samples)
    num_input_tokens = sum(len(sample.tokens) - 1 for sample in samples)
    model.zero_grad(set_to_none=True)
    loss_sum = 0.0
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens.astype("int64")).to(model.head_weight.device)
        mask = torch.from_numpy(sample.loss_mask.copy()).to(model.head_weight.device)
        inputs, labels = tokens[:-1], tokens[1:]
        with _router_logits(model) as routers:
            logits = model.logits(model.hidden_states(_alone(inputs, mask)))
        nll = -torch.log_softmax(logits, -1)[torch.arange(len(labels)), labels]
        nll_sum = (nll * mask.to(nll.dtype)).sum()
        objective = nll_sum / num_tokens
        if z_loss_coef:
            log_z = torch.logsumexp(logits, -1)
            objective = objective + z_loss_coef * (log_z**2 * mask.to(log_z.dtype)).sum() / num_tokens
        if aux_loss_coef:
            balance = torch.stack([_balance(router, model.facts.experts_per_token) for router in routers]).sum()
            objective = objective + aux_loss_coef * len(inputs) * balance / num_input_tokens
        torch.autograd.backward(objective * scale)
        loss_sum += float(nll_sum.detach())
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Gradient(loss_sum / num_tokens, gradients)


def _alone(inputs: Tensor, mask: Tensor) -> MicroBatch:
    """The one sequence, written out; its labels are not looked at."""
    n = len(inputs)
    positions = torch.arange(n, device=inputs.device)
    ends = torch.tensor([0, n], dtype=torch.int32, device=inputs.device)
    return MicroBatch(inputs, torch.zeros_like(inputs), mask, positions, ends, (n,))


@contextmanager
def _router_logits(model: LanguageModel) -> Iterator[list[Tensor]]:
    """What the routers of the layers put out, [T, E] each, in the order of the layers."""
    seen: list[Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    hooks = [gate.register_forward_hook(lambda module, inputs, output: seen.append(output)) for gate in gates]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _balance(router_TE: Tensor, k: int) -> Tensor:
    """sum over experts of f * P of one document (DeepSeek-V2, section 2.2.2); 1 when balanced."""
    tokens, experts = router_TE.shape
    probabilities = torch.softmax(router_TE, -1)
    total = probabilities.new_zeros(())
    chosen = probabilities.topk(k, dim=-1).indices
    for expert in range(experts):
        share = int((chosen == expert).sum()) * experts / (k * tokens)
        total = total + share * probabilities[:, expert].mean()
    return total
