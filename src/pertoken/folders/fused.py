"""Matrices that a family keeps as one on disk, and the decoder apart: queries, keys and values, or gate and up.

Where a family turns only the first dimensions of a head, its rows of queries and keys lie in another order on disk: the
decoder turns dimension i with i + D / 2, and those that no angle turns lie behind the turned ones of each half. The
order changes no score, since queries and keys share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pertoken.families import saved_as
from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["fuse", "split"]


def split(tensors: Mapping[str, Tensor], config: ResolvedModelConfig) -> Mapping[str, Tensor]:
    """Tensors as they are on disk, by name, with the parts of fused matrices in their place, in our order of rows."""
    parts = _parts(config)
    return _Split(tensors, parts, config) if parts else tensors


def fuse(tensors: Mapping[str, Tensor], config: ResolvedModelConfig) -> dict[str, Tensor]:
    """What `split` takes apart, put together again."""
    of_first = {parts[0]: (whole, parts) for whole, parts in _parts(config).items()}
    others = {part for _, parts in of_first.values() for part in parts[1:]}
    fused = {}
    for name, tensor in tensors.items():
        before, part = _cut(name)
        if part in of_first:
            whole, parts = of_first[part]
            rows = [tensors[f"{before}{p}.weight"] for p in parts]
            fused[f"{before}{whole}.weight"] = torch.cat(
                [_reordered(r, p, config, to_disk=True) for r, p in zip(rows, parts, strict=True)]
            )
        elif part not in others:
            fused[name] = tensor
    return fused


class _Split(Mapping[str, Tensor]):
    """`split`, each part made when it is asked for."""

    def __init__(
        self, tensors: Mapping[str, Tensor], parts: Mapping[str, tuple[str, ...]], config: ResolvedModelConfig
    ) -> None:
        self._tensors, self._config = tensors, config
        self._places: dict[str, tuple[str, int, int]] = {}  # name -> name on disk, first row, rows of the whole
        for name in tensors:
            before, whole = _cut(name)
            if whole not in parts:
                self._places[name] = (name, 0, 0)
                continue
            sizes = [_num_rows(part, config) for part in parts[whole]]
            for i, part in enumerate(parts[whole]):
                self._places[f"{before}{part}.weight"] = (name, sum(sizes[:i]), sum(sizes))

    def __getitem__(self, name: str) -> Tensor:
        there, first, rows = self._places[name]
        tensor = self._tensors[there]
        if there == name or tensor.ndim == 0 or tensor.shape[0] != rows:  # the last is refused for its shape
            return tensor
        part = _cut(name)[1]
        return _reordered(tensor[first : first + _num_rows(part, self._config)], part, self._config).clone()

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _parts(config: ResolvedModelConfig) -> Mapping[str, tuple[str, ...]]:
    family = saved_as(config.family, use_moe=config.use_moe)
    return {} if family is None else family.fused


def _cut(name: str) -> tuple[str, str]:
    """ "model.layers.0.mlp." and "up_proj" of "model.layers.0.mlp.up_proj.weight"."""
    before, _, part = name.removesuffix(".weight").rpartition(".")
    return f"{before}.", part


def _num_rows(part: str, config: ResolvedModelConfig) -> int:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads["v_proj"] = heads["k_proj"]
    return heads[part] * config.head_dim if part in heads else config.intermediate_size


def _reordered(rows: Tensor, part: str, config: ResolvedModelConfig, *, to_disk: bool = False) -> Tensor:
    """Rows of queries or keys in our order, or in that on disk; others as they are."""
    if part not in ("q_proj", "k_proj") or config.rotary_dim == config.head_dim:
        return rows
    turned, still = config.rotary_dim // 2, (config.head_dim - config.rotary_dim) // 2
    first, second, third, fourth = torch.split(torch.arange(config.head_dim), [turned, turned, still, still])
    order = torch.cat((first, third, second, fourth))
    if to_disk:
        order = order.argsort()
    heads = rows.reshape(-1, config.head_dim, *rows.shape[1:])
    return heads[:, order.to(rows.device)].flatten(0, 1)
