"""Megatron-Core: the objective as its schedules take it.

    L = (1 / N) * sum over the step's tokens of loss_mask * nll

With `calculate_per_token_loss=True` Megatron computes just that: every micro-batch hands over a sum and a count, the
gradients of the sums are added over micro-batches and ranks, and `finalize_model_grads` divides once by everyone's
count. With the default, False, it divides each micro-batch by its own count first, which is a mean of means, so
`forward_step` refuses to run. docs/megatron.md shows both functions in use, and says what they do not cover.

megatron-core itself is not imported. Shapes: B rows of T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pertoken.errors import DataError, RecipeError

__all__ = ["forward_step", "loss_func", "require_per_token_loss"]

LossReturn = tuple[Tensor, Tensor, dict[str, Tensor]]


def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> LossReturn:
    """Megatron's three-element loss: (loss_sum, num_tokens, report).

    `output_tensor`, any shape, are the negative log-likelihoods in nats of every position, as `GPTModel` returns them
    when it is given labels; `loss_mask`, of as many elements, says which of them count: bool, or zeros and ones.

    `loss_sum` is 0-d, at least float32, and carries the gradient; what a false mask covers has no part in it, even
    where it is not finite. `num_tokens` is 0-d int32. The report is `{"lm loss": [loss_sum, num_tokens]}`, one float
    tensor that shares no memory with the two, since Megatron may scale those in place.

    Raises DataError for a fractional weight, which an integer count cannot hold, and for sizes that differ.
    """
    if loss_mask.numel() != output_tensor.numel():
        raise DataError(
            f"loss_mask={list(loss_mask.shape)}: the model returned losses {list(output_tensor.shape)}; "
            "cut the mask as the batch was cut (context parallelism slices all of it)"
        )
    nll = output_tensor.reshape(-1)
    nll = nll.to(torch.promote_types(nll.dtype, torch.float32))
    counted = _as_bool(loss_mask.reshape(-1)).to(nll.device)
    loss_sum = torch.where(counted, nll, 0.0).sum()
    num_tokens = counted.sum(dtype=torch.int32)  # Megatron adds it to an int32 total, which takes no float
    report = torch.cat([loss_sum.detach().view(1), num_tokens.view(1)])  # copies
    return loss_sum, num_tokens, {"lm loss": report}


def forward_step(data_iterator: Iterator[Mapping[str, Any]], model: nn.Module) -> tuple[Tensor, partial[LossReturn]]:
    """One micro-batch through `model`: (output_tensor, `loss_func` with its mask), for `get_forward_backward_func()`.

    A batch maps `input_ids`, `labels` and `loss_mask` to tensors [B, T], or [T] for a single row. `labels[t]` is the
    token after `input_ids[t]`: neither this nor `GPTModel` shifts. `loss_mask` is bool, or zeros and ones. Optional are
    `position_ids` [T] or [B, T] (else 0..T-1) and `attention_mask`, Megatron's own: bool [B or 1, 1, T, T], true where
    attention is *forbidden* (else causal). Everything moves to the model's device.

    An iterator with nothing left, and a batch without tokens, contribute zero loss, zero tokens, and a zero gradient to
    every parameter, so ranks may hold different numbers of micro-batches.

    Raises RecipeError as `require_per_token_loss` does, also where the flag came too late for the data-parallel wrapper
    around `model`; DataError for a batch that breaks this contract, such as a label of -100 under a true mask.
    """
    config = _attribute(model, "config")
    require_per_token_loss(config)
    _require_sums_over_ranks(model)
    if data_iterator is None:
        raise DataError(
            "data_iterator=None: this rank was given no data; build the iterator on every rank "
            "(in a Megatron-LM script, train_valid_test_datasets_provider.is_distributed = True)"
        )
    batch = next(data_iterator, None)
    rows = None if batch is None else _rows(batch, config, _attribute(model, "vocab_size"))
    if rows is None or rows.input_ids.numel() == 0:
        rows = _nothing(config)
    rows = rows.to(next(model.parameters()).device)
    # Multi-token prediction has further losses, computed inside of the model.
    inside = {"loss_mask": rows.loss_mask} if getattr(config, "mtp_num_layers", None) else {}
    output_tensor = model(rows.input_ids, rows.position_ids, rows.attention_mask, labels=rows.labels, **inside)
    return output_tensor, partial(loss_func, rows.loss_mask)


def require_per_token_loss(config: Any) -> None:
    """Raises RecipeError unless `config`, a `TransformerConfig`, has `calculate_per_token_loss=True`."""
    value = getattr(config, "calculate_per_token_loss", None)
    if value is not True:
        raise RecipeError(
            f"calculate_per_token_loss={value}: Megatron would average the means of micro-batches, so that a token "
            "counts less the more of them its micro-batch has; set it to True in the TransformerConfig "
            "(--calculate-per-token-loss) before the model is built"
        )


def _require_sums_over_ranks(model: nn.Module) -> None:
    """Megatron's DDP reads the flag once, when it is built, and would later average sums over ranks."""
    buffers = getattr(model, "buffers", None)  # DDP hides nn.Module's method behind a list
    for buffer in buffers if isinstance(buffers, list) else []:
        averages = getattr(getattr(model, "ddp_config", None), "average_in_collective", False)
        if averages or getattr(buffer, "gradient_scaling_factor", 1.0) != 1.0:
            raise RecipeError(
                "calculate_per_token_loss=True: was set after DistributedDataParallel had been built, which divides "
                "gradients by the number of ranks; set it in the TransformerConfig before the model is wrapped"
            )


class _Rows(NamedTuple):
    """A checked micro-batch, [B, T]."""

    input_ids: Tensor  # int64
    labels: Tensor  # int64, 0 where masked
    loss_mask: Tensor  # bool
    position_ids: Tensor  # int64
    attention_mask: Tensor | None  # bool [B or 1, 1, T, T]

    def to(self, device: torch.device) -> _Rows:
        return _Rows(*(None if t is None else t.to(device, non_blocking=True) for t in self))  # type: ignore[arg-type]


def _rows(batch: Mapping[str, Any], config: Any, vocab_size: int | None) -> _Rows:
    """Checks where the batch lies, before anything moves: on the host a check costs no wait for the device."""
    if not isinstance(batch, Mapping):
        raise DataError(f"data_iterator: yields {type(batch).__name__}; a batch is a dict of tensors")
    packed = [key for key in ("cu_seqlens", "packed_seq_params") if batch.get(key) is not None]
    if packed:
        raise DataError(
            f"{packed[0]}: packed rows are not supported, and attention would cross documents; give one document a row"
        )
    missing = [key for key in ("input_ids", "labels", "loss_mask") if not isinstance(batch.get(key), Tensor)]
    if missing:
        raise DataError(f"{missing[0]}: is not a tensor of the batch, which has {', '.join(map(str, batch))}; add it")
    input_ids, labels, loss_mask = (batch[key] for key in ("input_ids", "labels", "loss_mask"))
    if input_ids.ndim not in (1, 2) or not (input_ids.shape == labels.shape == loss_mask.shape):
        shapes = ", ".join(f"{key} {list(batch[key].shape)}" for key in ("input_ids", "labels", "loss_mask"))
        raise DataError(f"{shapes}: must have one shape, [B, T] or [T]")
    if input_ids.ndim == 1:
        input_ids, labels, loss_mask = input_ids[None], labels[None], loss_mask[None]
    loss_mask = _as_bool(loss_mask)
    _require_tokens("input_ids", input_ids, None, vocab_size)
    _require_tokens("labels", labels, loss_mask, vocab_size)
    return _Rows(
        input_ids.long(),
        torch.where(loss_mask, labels, 0).long(),  # Megatron takes -100 for a token and gives it a finite loss
        loss_mask,
        _position_ids(batch.get("position_ids"), input_ids, config),
        _attention_mask(batch.get("attention_mask"), input_ids),
    )


def _position_ids(given: Tensor | None, input_ids: Tensor, config: Any) -> Tensor:
    if given is None:
        if (getattr(config, "context_parallel_size", None) or 1) > 1:
            raise DataError(
                "position_ids: are missing, and 0..T-1 are wrong for the slices of context parallelism; add them"
            )
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if given.shape not in (input_ids.shape, input_ids.shape[1:]):
        raise DataError(
            f"position_ids={list(given.shape)}: must be [T] or [B, T], input_ids are {list(input_ids.shape)}"
        )
    return given.long().expand_as(input_ids)


def _attention_mask(given: Tensor | None, input_ids: Tensor) -> Tensor | None:
    rows, length = input_ids.shape
    if given is None:
        return None
    if given.dtype != torch.bool or given.shape not in ((1, 1, length, length), (rows, 1, length, length)):
        raise DataError(
            f"attention_mask={list(given.shape)} {given.dtype}: must be Megatron's, bool [B or 1, 1, T, T] and true "
            "where attention is forbidden; padding on the right needs none, leave it out"
        )
    return given


def _require_tokens(name: str, ids: Tensor, used: Tensor | None, vocab_size: int | None) -> None:
    """Megatron takes an id outside of the vocabulary without an error: always as a label, as an input where tensor
    parallelism splits the embedding. `used` [B, T] says which ids matter; None: all."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise DataError(f"{name}={ids.dtype}: token ids must be integers")
    wrong = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
    if used is not None:
        wrong = wrong & used
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        problem = "" if used is None else " under a true loss_mask"
        remedy = "" if used is None else ", or mask it"
        raise DataError(
            f"{name}[{row}, {column}]={int(ids[row, column])}{problem}: is not a token of the vocabulary of "
            f"{vocab_size}; give the token{remedy}"
        )


def _as_bool(loss_mask: Tensor) -> Tensor:
    if loss_mask.dtype == torch.bool:
        return loss_mask
    counted = loss_mask != 0
    odd = counted & (loss_mask != 1)
    if bool(odd.any()):
        raise DataError(
            f"loss_mask={float(loss_mask[odd][0]):g}: Megatron divides by an integer count, so a token counts once "
            "or not at all; use 0 and 1"
        )
    return counted


def _nothing(config: Any) -> _Rows:
    """One masked row, since a gradient of zero needs a graph. Of two tokens per tensor-parallel rank, which is as short
    as the splits of sequence and context parallelism allow."""
    if (getattr(config, "pipeline_model_parallel_size", None) or 1) > 1 and not getattr(
        config, "variable_seq_lengths", False
    ):
        raise DataError(
            "data_iterator: has nothing left, but pipeline stages exchange tensors of one fixed shape; let it yield a "
            "batch of that shape whose loss_mask is all false"
        )
    length = 2 * (getattr(config, "tensor_model_parallel_size", None) or 1)
    zeros = torch.zeros(1, length, dtype=torch.int64)
    return _Rows(zeros, zeros, zeros.bool(), torch.arange(length)[None], None)


def _attribute(model: nn.Module, name: str) -> Any:
    """Of the outermost module that has it, from wrapper to wrapped, as Megatron looks for its config; None if none."""
    module: Any = model
    while module is not None:
        value = getattr(module, name, None)
        if value is not None:
            return value
        module = getattr(module, "module", None)
    return None
