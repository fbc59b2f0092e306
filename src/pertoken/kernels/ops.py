"""The kernels of decoder.c on tensors.

`Kernels` is for one dtype of activations, bfloat16 or float32; weights of norms, the residual stream and statistics are
float32 always. Tensors must be plain ones on the CPU, contiguous unless rows may lie apart. Each call checks the types,
shapes and layouts of what it is given, and what the kernels take for an address: a wrong one raises TypeError,
ValueError or IndexError, and never reads or writes beyond a tensor's end. Nothing here has a gradient.

Shape suffixes: N rows (tokens), D hidden size, F width of the MLP, V vocabulary, C columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pertoken.kernels.arguments import C_FLOAT, C_INT, as_c, expect, expect_indices
from pertoken.kernels.build import load_library
from pertoken.kernels.memory import empty

__all__ = ["MAX_HEAD_DIM", "Kernels", "PaddedLayout"]

MAX_HEAD_DIM = 1024  # a buffer of decoder.c
_BLOCK = 65536  # decoder.c's


@dataclass(frozen=True)
class PaddedLayout:
    """Where the rows of a micro-batch sit in attention's padded layout; made by engines/cpu/attention.py."""

    table: Tensor  # [N, 5] int32, struct seat of decoder.c
    positions: Tensor  # [N] int32, each row's position in its document
    num_rows: int  # of the padded layout, for one head

    def __post_init__(self) -> None:
        """ValueError for a seat outside of the layout, which would be written to."""
        expect("table", self.table, torch.int32, -1, 5)
        expect("positions", self.positions, torch.int32, self.num_tokens)
        if not self.num_tokens:
            return
        first, width, block, row, _ = self.table.to(torch.int64).unbind(1)
        inside = (first >= 0) & (first + width <= self.num_rows) & (row >= 0) & (row < width)
        if not bool((inside & (block > 0)).all()) or bool((width % block.clamp(min=1)).any()):
            raise ValueError(f"a seat lies outside of the layout's {self.num_rows} rows")
        if int(self.positions.min()) < 0:
            raise ValueError("a position is negative")

    @property
    def num_tokens(self) -> int:
        return self.table.shape[0]

    @cached_property
    def num_positions(self) -> int:
        """One more than the last."""
        return int(self.positions.max()) + 1 if self.num_tokens else 0


class Kernels:
    """Raises CompilerError where they cannot be compiled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._library = load_library(dtype)

    def norm_forward(self, h_ND: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMS norm: (out [N, D] in the dtype of activations, 1 / rms [N])."""
        expect("h", h_ND, torch.float32, -1, -1)
        expect("weight", weight, torch.float32, h_ND.shape[1])
        n, d = h_ND.shape
        out, rstd = empty(n, d, dtype=self.dtype), h_ND.new_empty(n)
        self._call("norm_forward", h_ND, weight, out, rstd, n, d, C_FLOAT(eps))
        return out, rstd

    def norm_transposed(self, h_ND: Tensor, weight: Tensor, rstd_N: Tensor) -> Tensor:
        """What `norm_forward` gave, as [D, N]."""
        expect("h", h_ND, torch.float32, -1, -1)
        expect("weight", weight, torch.float32, h_ND.shape[1])
        expect("rstd", rstd_N, torch.float32, h_ND.shape[0])
        n, d = h_ND.shape
        out = empty(d, n, dtype=self.dtype)
        self._call("norm_transposed", h_ND, weight, rstd_N, out, n, d)
        return out

    def norm_backward(
        self, d_out_ND: Tensor, h_ND: Tensor, weight: Tensor, rstd_N: Tensor, d_residual_ND: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(d_residual, where given, plus the gradient through the norm [N, D], the gradient of its weight [D])."""
        expect("h", h_ND, torch.float32, -1, -1)
        expect("d_out", d_out_ND, self.dtype, *h_ND.shape)
        expect("weight", weight, torch.float32, h_ND.shape[1])
        expect("rstd", rstd_N, torch.float32, h_ND.shape[0])
        if d_residual_ND is not None:
            expect("d_residual", d_residual_ND, torch.float32, *h_ND.shape)
        n, d = h_ND.shape
        d_h, d_weight = empty(n, d, dtype=h_ND.dtype), torch.empty_like(weight)
        partial = torch.empty(torch.get_num_threads(), d, dtype=torch.float64)
        self._call(
            "norm_backward",
            d_out_ND,
            h_ND,
            weight,
            rstd_N,
            d_residual_ND,
            d_h,
            d_weight,
            partial,
            n,
            d,
            threads=len(partial),
        )
        return d_h, d_weight

    def cast_and_transpose(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [N, D] in the dtype of activations: as it is, and transposed [D, N]."""
        expect("x", x_ND, torch.float32, -1, -1)
        n, d = x_ND.shape
        straight, turned = empty(n, d, dtype=self.dtype), empty(d, n, dtype=self.dtype)
        self._call("cast_and_transpose", x_ND, straight, turned, n, d)
        return straight, turned

    def widen_transposed(self, x_RC: Tensor, out_CR: Tensor, *, add: bool = False) -> Tensor:
        """`out` (+)= x transposed, in float32. Rows of both may lie apart."""
        expect("x", x_RC, self.dtype, -1, -1, apart=True)
        r, c = x_RC.shape
        expect("out", out_CR, torch.float32, c, r, apart=True)
        self._call("widen_transposed", x_RC, out_CR, r, c, x_RC.stride(0), out_CR.stride(0), C_INT(add))
        return out_CR

    def add_residual(self, h_ND: Tensor, delta_ND: Tensor) -> Tensor:
        expect("h", h_ND, torch.float32, -1, -1)
        expect("delta", delta_ND, self.dtype, *h_ND.shape)
        out = empty(*h_ND.shape, dtype=h_ND.dtype)
        self._call("add_residual", h_ND, delta_ND, out, h_ND.numel())
        return out

    def glu_forward(self, gate_up_NF: Tensor, *, gelu: bool = False) -> Tensor:
        """[N, 2F], the gates first -> silu(gate) * up [N, F]; with `gelu` (its tanh form) in place of silu."""
        expect("gate_up", gate_up_NF, self.dtype, -1, -1)
        n, f = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
        if gate_up_NF.shape[1] != 2 * f:
            raise ValueError(f"gate_up has {gate_up_NF.shape[1]} columns: must be an even number")
        out = empty(n, f, dtype=self.dtype)
        self._call("geglu_forward" if gelu else "swiglu_forward", gate_up_NF, out, n, f)
        return out

    def glu_backward(self, gate_up_NF: Tensor, d_out_NF: Tensor, *, gelu: bool = False) -> Tensor:
        """In place: `gate_up` becomes its gradient. Returns what `glu_forward` gave."""
        expect("d_out", d_out_NF, self.dtype, -1, -1)
        expect("gate_up", gate_up_NF, self.dtype, d_out_NF.shape[0], 2 * d_out_NF.shape[1])
        n, f = d_out_NF.shape
        again = empty(n, f, dtype=self.dtype)
        self._call("geglu_backward" if gelu else "swiglu_backward", gate_up_NF, d_out_NF, again, n, f)
        return again

    def pad_heads(
        self,
        x: Tensor,
        seats: PaddedLayout,
        heads: int,
        group: int,
        head_dim: int,
        *,
        norm: Tensor | None = None,
        angles: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Rows x [N, heads * head_dim], which may lie apart, to their seats [heads * seats.num_rows, head_dim].

        Heads are normalized with `norm` [head_dim] where given, and turned by their position's row of `angles`
        [positions, head_dim] (cosines, then sines), where given.
        """
        self._expect_heads(x, seats, heads, group, head_dim, norm, angles)
        out = empty(heads * seats.num_rows, head_dim, dtype=self.dtype)
        self._call(
            "pad_heads",
            *(x, x.stride(0), out, seats.table, seats.positions, norm, angles),
            *(seats.num_tokens, heads, group, head_dim, C_FLOAT(eps)),
        )
        return out

    def unpad_heads(
        self,
        d_out: Tensor,
        to: Tensor,
        seats: PaddedLayout,
        heads: int,
        group: int,
        head_dim: int,
        *,
        x: Tensor | None = None,
        norm: Tensor | None = None,
        angles: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor | None:
        """The gradient of `pad_heads` for its input, into the rows of `to`; returns that of `norm`.

        `x` is that input, needed with `norm`. Without `angles`, rows are brought back and nothing else.
        """
        self._expect_heads(to, seats, heads, group, head_dim, norm, angles)
        expect("d_out", d_out, self.dtype, heads * seats.num_rows, head_dim)
        if norm is not None:
            if x is None:
                raise ValueError("x is missing: the gradient of a norm needs its input")
            self._expect_heads(x, seats, heads, group, head_dim, norm, angles)
        d_norm = torch.empty_like(norm) if norm is not None else None
        partial = torch.empty(torch.get_num_threads(), head_dim, dtype=torch.float64) if norm is not None else None
        self._call(
            "unpad_heads",
            *(d_out, x, 0 if x is None else x.stride(0), to, to.stride(0)),
            *(seats.table, seats.positions, norm, angles, d_norm, partial),
            *(seats.num_tokens, heads, group, head_dim, C_FLOAT(eps)),
            threads=None if partial is None else len(partial),
        )
        return d_norm

    def _expect_heads(
        self,
        x: Tensor,
        seats: PaddedLayout,
        heads: int,
        group: int,
        head_dim: int,
        norm: Tensor | None,
        angles: Tensor | None,
    ) -> None:
        """Rows of heads, of which `x` may have more than are seated, and columns beside them."""
        expect("rows", x, self.dtype, -1, -1, apart=True)
        if x.shape[0] < seats.num_tokens or x.shape[1] < heads * head_dim:
            raise ValueError(f"rows have shape {list(x.shape)}: {seats.num_tokens} of {heads} x {head_dim} are seated")
        if min(heads, group, head_dim) < 1 or heads % group:
            raise ValueError(f"{heads} heads of {head_dim}, {group} to a group: must be whole groups")
        if angles is not None:
            if head_dim > MAX_HEAD_DIM or head_dim % 2:
                raise ValueError(f"head_dim={head_dim}: must be even and at most {MAX_HEAD_DIM} where heads are turned")
            expect("angles", angles, torch.float32, -1, head_dim)
            if angles.shape[0] < seats.num_positions:
                raise IndexError(f"angles of {angles.shape[0]} positions: the seats have {seats.num_positions}")
        if norm is not None:
            expect("norm", norm, torch.float32, head_dim)
            if angles is None:
                raise ValueError("norm without angles is not computed")

    def softmax_forward(
        self,
        scores_BRC: Tensor,
        log_z_BR: Tensor,
        limits_SR: Tensor,
        scale: float,
        starts_SR: Tensor | None = None,
    ) -> None:
        """In place: scores [S * copies, R, C] times `scale` to probabilities, over the columns of each row before
        `limits` [S, R] int32, and with `starts` [S, R] int32 from these on; zero elsewhere.

        `log_z` [S * copies, R] gets the logarithm of the normalizer. C must be a multiple of 16.
        """
        documents, copies, r, c = self._expect_scores(scores_BRC, log_z_BR, limits_SR, starts_SR)
        self._call(
            "softmax_forward", scores_BRC, log_z_BR, limits_SR, starts_SR, documents, copies, r, c, C_FLOAT(scale)
        )

    def softmax_backward(
        self,
        scores_BRC: Tensor,
        d_p_BRC: Tensor,
        log_z_BR: Tensor,
        limits_SR: Tensor,
        scale: float,
        starts_SR: Tensor | None = None,
    ) -> None:
        """In place: scores to probabilities once more, and their gradient `d_p` to that of the scores."""
        documents, copies, r, c = self._expect_scores(scores_BRC, log_z_BR, limits_SR, starts_SR)
        expect("d_p", d_p_BRC, self.dtype, *scores_BRC.shape)
        self._call(
            "softmax_backward",
            *(scores_BRC, d_p_BRC, log_z_BR, limits_SR, starts_SR, documents, copies, r, c, C_FLOAT(scale)),
        )

    def _expect_scores(
        self, scores_BRC: Tensor, log_z_BR: Tensor, limits_SR: Tensor, starts_SR: Tensor | None
    ) -> tuple[int, int, int, int]:
        """(S, copies, R, C). The kernels themselves keep limits and starts within C."""
        expect("scores", scores_BRC, self.dtype, -1, -1, -1)
        b, r, c = scores_BRC.shape
        expect("log_z", log_z_BR, torch.float32, b, r)
        expect("limits", limits_SR, torch.int32, -1, r)
        documents = limits_SR.shape[0]
        if starts_SR is not None:
            expect("starts", starts_SR, torch.int32, documents, r)
        if c % 16:
            raise ValueError(f"scores have {c} columns: must be a multiple of 16")
        if b % documents if documents else b:
            raise ValueError(f"scores of {b} heads: must be a multiple of the {documents} documents")
        return documents, b // max(documents, 1), r, c

    def cross_entropy(
        self,
        logits_NV: Tensor,
        labels_N: Tensor,
        weights_N: Tensor | None,
        statistics_N2: Tensor | None = None,
        *,
        gradient: bool,
    ) -> Tensor:
        """Negative log-likelihoods [N] in nats. With `gradient`, `logits` become weight * (softmax - one hot).

        `statistics`, float32 [N, 2], get each row's largest logit and log Z less that logit.
        Raises IndexError for a label outside of the vocabulary.
        """
        expect("logits", logits_NV, self.dtype, -1, -1, apart=True)
        n, v = logits_NV.shape
        expect("labels", labels_N, torch.int64, n)
        if weights_N is not None:
            expect("weights", weights_N, torch.float32, n)
        if statistics_N2 is not None:
            expect("statistics", statistics_N2, torch.float32, n, 2)
        expect_indices("labels", labels_N, v)
        nll = torch.empty(n)
        self._call(
            "cross_entropy",
            *(logits_NV, labels_N, weights_N, nll, statistics_N2, n, v, logits_NV.stride(0), C_INT(gradient)),
        )
        return nll

    def cross_entropy_gradient(
        self, logits_NV: Tensor, labels_N: Tensor, statistics_N2: Tensor, on_softmax_N: Tensor, at_label_N: Tensor
    ) -> None:
        """In place: `logits` become on_softmax * softmax - at_label * one hot. `statistics` are `cross_entropy`'s.

        Raises IndexError for a label outside of the vocabulary.
        """
        expect("logits", logits_NV, self.dtype, -1, -1, apart=True)
        n, v = logits_NV.shape
        expect("labels", labels_N, torch.int64, n)
        expect("statistics", statistics_N2, torch.float32, n, 2)
        for name, factor_N in (("on_softmax", on_softmax_N), ("at_label", at_label_N)):
            expect(name, factor_N, torch.float32, n)
        expect_indices("labels", labels_N, v)
        self._call(
            "cross_entropy_gradient",
            *(logits_NV, labels_N, statistics_N2, on_softmax_N, at_label_N, n, v, logits_NV.stride(0)),
        )

    def soft_cap(self, logits_NV: Tensor, cap: float) -> None:
        """In place: `logits` become cap * tanh(logits / cap)."""
        expect("logits", logits_NV, self.dtype, -1, -1, apart=True)
        self._call("soft_cap", logits_NV, *logits_NV.shape, logits_NV.stride(0), C_FLOAT(cap))

    def soft_cap_gradient(self, gradient_NV: Tensor, uncapped_NV: Tensor, cap: float) -> None:
        """In place: the gradient of `soft_cap`'s result becomes that of what it was given, `uncapped`."""
        expect("gradient", gradient_NV, self.dtype, -1, -1, apart=True)
        expect("uncapped", uncapped_NV, self.dtype, *gradient_NV.shape, apart=True)
        strides = gradient_NV.stride(0), uncapped_NV.stride(0)
        self._call("soft_cap_gradient", gradient_NV, uncapped_NV, *gradient_NV.shape, *strides, C_FLOAT(cap))

    def sum_of_squares(self, x: Tensor) -> Tensor:
        """Of float32 numbers [n], 0-d float64; the same to the bit for any number of threads."""
        expect("x", x, torch.float32, x.numel(), apart=True)
        n = x.numel()
        partial = torch.empty(-(-n // _BLOCK), dtype=torch.float64)
        self._call("sum_of_squares", x.contiguous(), partial, n)
        return partial.sum()

    def add_rows(self, x_ND: Tensor, index_N: Tensor, out_VD: Tensor) -> Tensor:
        """`out_VD.index_add_(0, index_N, x_ND)` in float32, the rows of one index added up in float64 first."""
        expect("x", x_ND, torch.float32, -1, -1)
        expect("index", index_N, torch.int64, x_ND.shape[0])
        expect("out", out_VD, torch.float32, -1, x_ND.shape[1])
        expect_indices("index", index_N, out_VD.shape[0])
        order = index_N.argsort(stable=True)
        targets, counts = torch.unique_consecutive(index_N[order], return_counts=True)
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        self._call("add_rows", x_ND, order, starts, targets, out_VD, len(targets), x_ND.shape[1])
        return out_VD

    def _call(self, name: str, *arguments: Any, threads: int | None = None) -> None:
        """`threads` where there is scratch for so many: torch's number of them may change at any time."""
        function: Callable[..., None] = getattr(self._library, name)
        function(*map(as_c, arguments), ctypes.c_int(threads or torch.get_num_threads()))
