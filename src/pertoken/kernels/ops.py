"""The kernels of decoder.c on tensors.

`Kernels` is for one dtype of activations, bfloat16 or float32; weights of norms, the residual stream and statistics are
float32 always. Tensors must be on the CPU and contiguous, unless a stride is named. Nothing here has a gradient.

Shape suffixes: N rows (tokens), D hidden size, F width of the MLP, V vocabulary, C columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pertoken.kernels.build import load_library
from pertoken.kernels.memory import empty

__all__ = ["MAX_HEAD_DIM", "Kernels", "Seats"]

MAX_HEAD_DIM = 1024  # a buffer of decoder.c
_BLOCK = 65536  # decoder.c's


@dataclass(frozen=True)
class Seats:
    """Where the rows of a micro-batch sit in attention's padded layout; made by model/native_attention.py."""

    table: Tensor  # [N, 5] int32, struct seat of decoder.c
    positions: Tensor  # [N] int32, each row's position in its document
    num_rows: int  # of the padded layout, for one head

    @property
    def num_tokens(self) -> int:
        return self.table.shape[0]


class Kernels:
    """Raises CompilerError where they cannot be compiled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._library = load_library(dtype)

    def norm_forward(self, h_ND: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMS norm: (out [N, D] in the dtype of activations, 1 / rms [N])."""
        n, d = h_ND.shape
        out, rstd = empty(n, d, dtype=self.dtype), h_ND.new_empty(n)
        self._call("norm_forward", h_ND, weight, out, rstd, n, d, _F(eps))
        return out, rstd

    def norm_transposed(self, h_ND: Tensor, weight: Tensor, rstd_N: Tensor) -> Tensor:
        """What `norm_forward` gave, as [D, N]."""
        n, d = h_ND.shape
        out = empty(d, n, dtype=self.dtype)
        self._call("norm_transposed", h_ND, weight, rstd_N, out, n, d)
        return out

    def norm_backward(
        self, d_out_ND: Tensor, h_ND: Tensor, weight: Tensor, rstd_N: Tensor, d_residual_ND: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(d_residual, where given, plus the gradient through the norm [N, D], the gradient of its weight [D])."""
        n, d = h_ND.shape
        d_h, d_weight = empty(n, d, dtype=h_ND.dtype), torch.empty_like(weight)
        partial = torch.empty(torch.get_num_threads(), d, dtype=torch.float64)
        self._call("norm_backward", d_out_ND, h_ND, weight, rstd_N, d_residual_ND, d_h, d_weight, partial, n, d)
        return d_h, d_weight

    def lower_both_ways(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [N, D] in the dtype of activations: as it is, and transposed [D, N]."""
        n, d = x_ND.shape
        straight, turned = empty(n, d, dtype=self.dtype), empty(d, n, dtype=self.dtype)
        self._call("lower_both_ways", x_ND, straight, turned, n, d)
        return straight, turned

    def widen_transposed(self, x_RC: Tensor, out_CR: Tensor, *, add: bool = False) -> Tensor:
        """`out` (+)= x transposed, in float32. Rows of both may lie apart."""
        r, c = x_RC.shape
        assert out_CR.shape == (c, r), (out_CR.shape, x_RC.shape)
        assert x_RC.stride(1) == out_CR.stride(1) == 1, (x_RC.stride(), out_CR.stride())
        self._call("widen_transposed", _Rows(x_RC), _Rows(out_CR), r, c, x_RC.stride(0), out_CR.stride(0), _I(add))
        return out_CR

    def add_residual(self, h_ND: Tensor, delta_ND: Tensor) -> Tensor:
        out = empty(*h_ND.shape, dtype=h_ND.dtype)
        self._call("add_residual", h_ND, delta_ND, out, h_ND.numel())
        return out

    def swiglu_forward(self, gate_up_NF: Tensor) -> Tensor:
        """[N, 2F], the gates first -> silu(gate) * up [N, F]."""
        n, f = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
        out = empty(n, f, dtype=self.dtype)
        self._call("swiglu_forward", gate_up_NF, out, n, f)
        return out

    def swiglu_backward(self, gate_up_NF: Tensor, d_out_NF: Tensor) -> Tensor:
        """In place: `gate_up` becomes its gradient. Returns what `swiglu_forward` gave."""
        n, f = d_out_NF.shape
        again = empty(n, f, dtype=self.dtype)
        self._call("swiglu_backward", gate_up_NF, d_out_NF, again, n, f)
        return again

    def seat_heads(
        self,
        x: Tensor,
        seats: Seats,
        heads: int,
        share: int,
        head_dim: int,
        *,
        norm: Tensor | None = None,
        angles: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Rows x [N, heads * head_dim], which may lie apart, to their seats [heads * seats.num_rows, head_dim].

        Heads are normalised with `norm` [head_dim] where given, and turned by their position's row of `angles`
        [positions, head_dim] (cosines, then sines), where given.
        """
        out = empty(heads * seats.num_rows, head_dim, dtype=self.dtype)
        self._call(
            "seat_heads",
            *(_Rows(x), x.stride(0), out, seats.table, seats.positions, norm, angles),
            *(seats.num_tokens, heads, share, head_dim, _F(eps)),
        )
        return out

    def unseat_heads(
        self,
        d_out: Tensor,
        to: Tensor,
        seats: Seats,
        heads: int,
        share: int,
        head_dim: int,
        *,
        x: Tensor | None = None,
        norm: Tensor | None = None,
        angles: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor | None:
        """The gradient of `seat_heads` for its input, into the rows of `to`; returns that of `norm`.

        `x` is that input, needed with `norm`. Without `angles`, rows are brought back and nothing else.
        """
        d_norm = torch.empty_like(norm) if norm is not None else None
        partial = torch.empty(torch.get_num_threads(), head_dim, dtype=torch.float64) if norm is not None else None
        self._call(
            "unseat_heads",
            *(d_out, None if x is None else _Rows(x), 0 if x is None else x.stride(0), _Rows(to), to.stride(0)),
            *(seats.table, seats.positions, norm, angles, d_norm, partial),
            *(seats.num_tokens, heads, share, head_dim, _F(eps)),
        )
        return d_norm

    def softmax_forward(self, scores_BRC: Tensor, log_z_BR: Tensor, limits_SR: Tensor, scale: float) -> None:
        """In place: scores [S * copies, R, C] times `scale` to probabilities, over the first `limits` [S, R] int32
        columns of each row, zero after them; `log_z` [S * copies, R] gets the logarithm of the normaliser. C must be a
        multiple of 16."""
        b, r, c = scores_BRC.shape
        s = limits_SR.shape[0]
        assert c % 16 == 0, c
        self._call("softmax_forward", scores_BRC, log_z_BR, limits_SR, s, b // s, r, c, _F(scale))

    def softmax_backward(
        self, scores_BRC: Tensor, d_p_BRC: Tensor, log_z_BR: Tensor, limits_SR: Tensor, scale: float
    ) -> None:
        """In place: scores to probabilities once more, and their gradient `d_p` to that of the scores."""
        b, r, c = scores_BRC.shape
        s = limits_SR.shape[0]
        assert c % 16 == 0, c
        self._call("softmax_backward", scores_BRC, d_p_BRC, log_z_BR, limits_SR, s, b // s, r, c, _F(scale))

    def cross_entropy(self, logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None, *, gradient: bool) -> Tensor:
        """Negative log-likelihoods [N] in nats. With `gradient`, `logits` become weight * (softmax - one hot).

        Labels must be known to be inside of the vocabulary.
        """
        n, v = logits_NV.shape
        nll = torch.empty(n)
        self._call(
            "cross_entropy",
            *(_Rows(logits_NV), labels_N, weights_N, nll, n, v, logits_NV.stride(0), _I(gradient)),
        )
        return nll

    def sum_of_squares(self, x: Tensor) -> Tensor:
        """Of float32 numbers [n], 0-d float64; the same to the bit for any number of threads."""
        n = x.numel()
        partial = torch.empty(-(-n // _BLOCK), dtype=torch.float64)
        self._call("sum_of_squares", x.contiguous(), partial, n)
        return partial.sum()

    def add_rows(self, x_ND: Tensor, index_N: Tensor, out_VD: Tensor) -> Tensor:
        """`out_VD.index_add_(0, index_N, x_ND)` in float32, the rows of one index added up in float64 first."""
        order = index_N.argsort(stable=True)
        targets, counts = torch.unique_consecutive(index_N[order], return_counts=True)
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        self._call("add_rows", x_ND, order, starts, targets, out_VD, len(targets), x_ND.shape[1])
        return out_VD

    def _call(self, name: str, *arguments: Any) -> None:
        function: Callable[..., None] = getattr(self._library, name)
        function(*map(_as_c, arguments), ctypes.c_int(torch.get_num_threads()))


@dataclass(frozen=True)
class _Rows:
    """A tensor whose rows may lie apart; the kernel is told how far."""

    tensor: Tensor


_F, _I = ctypes.c_float, ctypes.c_int


def _as_c(value: Any) -> Any:
    match value:
        case None:
            return ctypes.c_void_p(None)
        case Tensor():
            assert value.is_contiguous(), (value.shape, value.stride())
            assert value.device.type == "cpu", value.device
            return ctypes.c_void_p(value.data_ptr())
        case _Rows(tensor):
            assert tensor.shape[-1] <= 1 or tensor.stride(-1) == 1, tensor.stride()
            return ctypes.c_void_p(tensor.data_ptr())
        case int():
            return ctypes.c_int64(value)
        case _:
            return value
