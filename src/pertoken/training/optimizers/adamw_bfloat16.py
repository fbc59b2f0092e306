"""AdamW whose two moments are kept in bfloat16, half the memory, rounded so that no small change is lost on average."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pertoken.training.optimizers.adamw import AdamW
from pertoken.training.parallel import first_number, local

__all__ = ["AdamWBfloat16", "random_bits", "round_up_or_down"]

_BLOCK = 2**20  # numbers of a parameter that are updated together: what is there in float32 besides


class AdamWBfloat16(AdamW):
    """AdamW, computed in float32 from moments in bfloat16, which are rounded stochastically: m becomes one of its two
    neighbours, the nearer one the more likely, so that its mean over roundings is m itself. (Rounding to the nearest
    would lose every change of less than 1/512, so that with beta2 = 0.999 the squares would never shrink.)

    What is drawn depends on the seed, the update's number, the parameter's place among all and the number's place in
    it: the same on every rank, for every split of the step, for every way to shard, and after a resume.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], seed: int) -> None:
        super().__init__(groups, betas=betas)
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        place, counts = 0, self._counts()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, place, counts[parameter])
                place += 1

    def _counts(self) -> dict[Tensor, int]:
        """How many updates each parameter has had: one wait for the device."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self.new_state(parameter)
        if not parameters:
            return {}
        found = torch.stack([self.state[p]["step"] for p in parameters]).tolist()
        return dict(zip(parameters, map(int, found), strict=True))

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], place: int, count: int) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        weights, gradient, mean, square = (local(tensor).detach().reshape(-1) for tensor in tensors)
        assert weights.data_ptr() == local(parameter).data_ptr(), "a copy would be updated in its place"
        generator = torch.Generator(weights.device)
        for block, here, drawn in _blocks(first_number(parameter), weights.numel()):
            wide = [mean[here].float(), square[here].float()]
            adamw(
                [weights[here]],
                [gradient[here]],
                *([wide[0]], [wide[1]], []),
                [state["step"].clone()],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            bits = random_bits(_BLOCK, (self._seed, count, place, block), generator)[:, drawn]
            for moment, exact, random in zip((mean, square), wide, bits, strict=True):
                moment[here] = round_up_or_down(exact, random)
        state["step"] += 1

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A step count, and two moments of the parameter's shape, in bfloat16."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=torch.bfloat16),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.bfloat16),
        }


def _blocks(first: int, count: int) -> Iterator[tuple[int, slice, slice]]:
    """Blocks of a whole parameter in which its numbers `first` to `first + count` lie: (which block, where in these
    numbers, where in the block)."""
    for block in range(first // _BLOCK, -(-(first + count) // _BLOCK)):
        start = max(first, block * _BLOCK)
        end = min(first + count, (block + 1) * _BLOCK)
        yield block, slice(start - first, end - first), slice(start - block * _BLOCK, end - block * _BLOCK)


def random_bits(count: int, key: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """[2, count] of 16 random bits each, as int16, on the generator's device; by `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator.manual_seed(int.from_bytes(digest, "little", signed=True))
    words = torch.empty(-(-count // 2), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16).view(2, -1)[:, :count]


def round_up_or_down(x: Tensor, random: Tensor) -> Tensor:
    """float32 [N] -> bfloat16 [N], with the 16 random bits of each number (int16 [N]).

    bfloat16 is the upper half of float32. A number between 0 and 1 is added to the lower half, and its carry rounds up
    with the probability that the lower half stands for.
    """
    bits = x.view(torch.int32) + (random.int() & 0xFFFF)
    return (bits & -0x10000).view(torch.float32).bfloat16()
