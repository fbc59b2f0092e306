"""The linear head of a transformers model: found, and shown to be all that lies between hidden states and logits.

`linear_cross_entropy` computes `hidden @ weight.T`, a scale and a soft cap, and nothing else. What a family does beyond
it would change the loss without a word, so such a model is refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertoken.errors import ModelError
from pertoken.objective.logit_map import PLAIN_LOGITS, LogitMap

__all__ = ["base_model", "check_logits", "linear_head", "logit_map_of", "smallest_vocabulary"]

_MAPPED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# What families call the operations on their logits; only used to say why a model was refused.
_KNOWN_CAUSES = (
    *(*_MAPPED, "lm_head_multiplier", "output_multiplier"),
    *("dim_model_base", "scale_depth"),
)


def base_model(model: Any) -> Any:
    """Token ids to hidden states, of a transformers causal language model; the model itself where it has no such part.

    Gemma 3's text model of version 4 names a part that it does not have.
    """
    base = getattr(model, "base_model", model)
    return getattr(model, "model", model) if base is model else base


def linear_head(model: Any) -> tuple[nn.Module, nn.Linear]:
    """The base model (token ids to hidden states) and the head of a transformers causal language model.

    Raises ModelError where there is no base model beside a head, or the head is not one matrix.
    """
    base, head = base_model(model), model.get_output_embeddings()
    name = type(model).__name__
    if base is model or not isinstance(base, nn.Module):
        raise ModelError(f"{name}: has no base model beside its head; choose a causal language model that has")
    if not isinstance(head, nn.Linear):
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise ModelError(f"{name}: its head is a {kind}, not torch.nn.Linear; leave the head as it is")
    if head.bias is not None:
        raise ModelError(f"{name}: its head has a bias, which pertoken's loss lacks; choose a model without")
    return base, head


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Raise ModelError unless the model's logits are its hidden states times its head's weight, with the scale and the
    soft cap of `logit_map_of`, on a few random tokens.

    Soft caps bend large logits only, and an untrained model has small ones. So the head's input is multiplied, by a
    power of two (exact in floating point), until the largest logit is about 100.
    """
    base, head = linear_head(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(smallest_vocabulary(model), (1, 8), generator=generator).to(head.weight.device)
    was_training = model.training
    model.eval()
    boost = 1.0

    def boosted(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * boost, *args[1:])

    hook = head.register_forward_pre_hook(boosted)
    try:
        expected = F.linear(base(input_ids=ids, use_cache=False)[0], head.weight)
        largest = float(expected.abs().max())
        if 0 < largest < math.inf:
            boost = 2.0 ** round(math.log2(100 / largest))
        found = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    expected = logit_map_of(model)(expected.double() * boost)
    error = float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error <= max(1e-4, 4 * torch.finfo(head.weight.dtype).eps):
        config = model.config.get_text_config()
        causes = [f"{key}={value}" for key in _KNOWN_CAUSES if (value := getattr(config, key, None)) not in (None, 1.0)]
        raise ModelError(
            f"{type(model).__name__}: {', '.join([*causes, ''])}its logits are not hidden states times the head's "
            f"weight, scaled and capped at most (off by {error:.1%} of the largest), which is all that pertoken's loss "
            "computes; choose another model"
        )


def logit_map_of(model: Any) -> LogitMap:
    """What the configuration of a transformers model says of its logits, in any family's words. `check_logits` tells
    whether the model does it."""
    config = model.config.get_text_config()
    cap, scale, divisor = (getattr(config, key, None) for key in _MAPPED)
    if not any((cap, scale, divisor)):
        return PLAIN_LOGITS
    return LogitMap(float(scale or 1.0) / float(divisor or 1.0), None if not cap else float(cap))


def smallest_vocabulary(model: Any) -> int:
    """The number of tokens that embedding and head both have."""
    return int(min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0]))
