"""What `linear_cross_entropy` is given, checked once for all of its implementations."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_head", "checked_labels"]

_INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64}
_INTEGERS |= {torch.uint8, torch.uint16, torch.uint32, torch.uint64}


def check_head(hidden: Tensor, weight: Tensor) -> None:
    """TypeError or ValueError unless `hidden` [N, D] can be multiplied with `weight` [V, D]."""
    for name, x, shape in (("hidden", hidden, "[N, D]"), ("weight", weight, "[V, D]")):
        if not x.is_floating_point():
            raise TypeError(f"{name} is {_dtype(x)}: must be floating-point")
        if x.layout != torch.strided:
            raise TypeError(f"{name} is {str(x.layout).removeprefix('torch.')}: must be dense")
        if x.ndim != 2:
            raise ValueError(f"{name} has shape {list(x.shape)}: must be {shape}")
        if x.is_meta:
            raise ValueError(f'{name} is on "meta", where there are no values')
    if not weight.shape[0]:
        raise ValueError(f"weight has shape {list(weight.shape)}: the vocabulary is empty")
    if hidden.device != weight.device:
        raise ValueError(f"weight is on {weight.device}, hidden on {hidden.device}: must be on the same device")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {list(hidden.shape)}, weight {list(weight.shape)}: D differs")
    # Autocast casts what is float32 or narrower, and leaves float64 alone.
    wide = torch.float64 in (hidden.dtype, weight.dtype)
    if hidden.dtype != weight.dtype and (wide or not torch.is_autocast_enabled(hidden.device.type)):
        raise TypeError(f"hidden is {_dtype(hidden)}, weight {_dtype(weight)}: must be of one dtype")


def checked_labels(
    labels: Tensor, loss_mask: Tensor, *, rows: int, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`labels` in int64 and `loss_mask` as bool or float weights, each [`rows`], on `device`.

    Raises TypeError for a dtype that cannot be meant, ValueError for a shape or device, and IndexError for a supervised
    label outside of [0, `vocab_size`). On CUDA that last one is a device assert, since the host does not wait.
    """
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels are {_dtype(labels)}: must be integers, the ids of tokens")
    if loss_mask.dtype != torch.bool and loss_mask.dtype not in _INTEGERS and not loss_mask.is_floating_point():
        raise TypeError(f"loss_mask is {_dtype(loss_mask)}: must be bool, or weights")
    if torch.is_grad_enabled() and loss_mask.requires_grad:
        raise ValueError("loss_mask requires a gradient, and gets none: detach it")
    for name, x in (("labels", labels), ("loss_mask", loss_mask)):
        if x.layout != torch.strided:
            raise TypeError(f"{name} is {str(x.layout).removeprefix('torch.')}: must be dense")
        if x.shape != (rows,):
            raise ValueError(f"{name} has shape {list(x.shape)}: must be [{rows}], one for each row of hidden")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, hidden on {device}: must be on the same device")
    labels = labels.to(torch.int64)
    if loss_mask.dtype in _INTEGERS:
        loss_mask = loss_mask.to(torch.float32)
    _check_range(labels, loss_mask, vocab_size)
    return labels, loss_mask


def _check_range(labels: Tensor, loss_mask: Tensor, vocab_size: int) -> None:
    outside = ((labels < 0) | (labels >= vocab_size)) & (loss_mask != 0)
    if outside.is_cuda:
        torch._assert_async(~outside.any())
    elif outside.any():
        supervised = labels[loss_mask != 0]
        low, high = int(supervised.min()), int(supervised.max())
        raise IndexError(f"labels from {low} to {high} are supervised: the vocabulary has {vocab_size}")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
