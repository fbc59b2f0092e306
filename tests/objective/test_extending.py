"""docs/extending.md, "A loss": its code runs as it stands, and computes what it says."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F

SECTION = (Path(__file__).parents[2] / "docs" / "extending.md").read_text().split("## A loss\n")[1].split("\n## ")[0]


def test_the_example_of_a_loss_is_the_focal_loss():
    scope: dict[str, object] = {"__name__": "focal"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL):
            exec(block, scope)
    hidden, weight, labels, mask = (scope[name] for name in ("hidden", "weight", "labels", "loss_mask"))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    nll = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="none")[mask]
    ((1 - (-nll).exp()) ** 2 * nll / 100).sum().backward()
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert (ours.grad.double() - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()


def test_the_section_is_short():
    assert SECTION.count("\n") < 60
