"""The head's loss by kernels of others, both optional extras for CUDA: Liger Kernel (Hsu et al., 2024) and
cut-cross-entropy (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024).

Here they are only called so that `linear_cross_entropy`'s contract holds, as far as they can keep it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from pertoken.errors import RecipeError

__all__ = ["FusedHead", "fused_loss_sum", "require_head"]

FusedHead = Literal["liger", "cce"]
_PACKAGES: dict[str, str] = {"liger": "liger-kernel", "cce": "cut-cross-entropy"}


def require_head(impl: FusedHead, device_type: str, dtype: torch.dtype) -> None:
    """RecipeError where `impl` is not installed, or cannot compute in `dtype` on such a device."""
    _kernel(impl)
    key = f'train.loss_impl="{impl}"'
    if impl == "liger" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RecipeError(f'{key}: its kernel runs on CUDA alone; use "auto"')
    if dtype == torch.float64:
        raise RecipeError(f'{key}: computes no more than float32, and dtype is float64; use "auto"')
    if impl == "cce" and device_type != "cpu" and dtype == torch.float32:
        raise RecipeError(f'{key}: its kernel takes half precision alone, and dtype is float32; use "auto"')


def fused_loss_sum(
    impl: FusedHead,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    dtype: torch.dtype,
    *,
    cap: float | None = None,
) -> Tensor:
    """Sum of negative log-likelihoods in nats, float32, over all N >= 1 rows, times `weights` [N] where given.

    `hidden` [N, D], `weight` [V, D], `labels` [N]; the products run in `dtype`; `cap` is `LogitMap`'s. What differs
    from our own loop: neither refuses a label outside of the vocabulary, both round the weight's gradient to `dtype`,
    Liger's float16 gradient loses probabilities below 6e-8, and cut-cross-entropy even adds both gradients up in
    `dtype` where it has no option against it (25.1.1 has none). On a CPU cut-cross-entropy runs its `torch.compile`
    form, logits and all, for tests.

    Raises RecipeError as `require_head` does, and for Liger with weights, whose gradient it forms before it sees them.
    """
    require_head(impl, hidden.device.type, dtype)
    kernel = _kernel(impl)
    with torch.autocast(hidden.device.type, enabled=False):
        x_ND, w_VD = hidden.to(dtype), weight.to(dtype)
        if impl == "liger":
            if weights is not None:
                raise RecipeError('train.loss_impl="liger": has no float loss weights; use "auto" or "cce"')
            if torch.is_grad_enabled() and weight.requires_grad and not x_ND.requires_grad:
                x_ND = x_ND.detach().requires_grad_()  # it asks the hidden states alone whether gradients are wanted
            # bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, ...
            loss_sum: Tensor = kernel(x_ND, w_VD, labels, None, None, -100, 0.0, 0.0, "sum", cap, False, torch.float32)[
                0
            ]
            return loss_sum
        options: dict[str, Any] = {"impl": "torch_compile" if hidden.device.type == "cpu" else "cce"}
        if hidden.device.type != "cpu":
            known = inspect.signature(kernel).parameters
            options |= {name: True for name in ("accum_e_fp32", "accum_c_fp32") if name in known}
        options |= {} if cap is None else {"softcap": cap}
        # Its default leaves gradients out that it thinks too small to matter.
        nll_N: Tensor = kernel(x_ND, w_VD, labels, reduction="none", filter_eps=None, **options).float()
        return nll_N.sum() if weights is None else (nll_N * weights.float()).sum()


@cache
def _kernel(impl: FusedHead) -> Callable[..., Any]:
    try:
        if impl == "liger":
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

            apply: Callable[..., Any] = LigerFusedLinearCrossEntropyFunction.apply
            return apply
        from cut_cross_entropy import linear_cross_entropy

        function: Callable[..., Any] = linear_cross_entropy
        return function
    except ImportError as error:
        raise RecipeError(
            f'train.loss_impl="{impl}": {_PACKAGES[impl]} cannot be imported ({error}); '
            f'pip install "pertoken[{impl}]", or use "auto"'
        ) from None
