"""`train.engine = "plain"`: the model's own modules, and PyTorch's operations alone."""

from __future__ import annotations

import torch

from pertoken.engines.choice import Choice
from pertoken.model.execution import Execution

__all__ = ["choose", "plain"]


def choose(model: object, dtype: str, device: torch.device) -> Choice:
    """Never refused: every model has modules."""
    return plain('as train.engine="plain" says')


def plain(note: str, remark: str | None = None) -> Choice:
    """The choice of this engine, for the reason in `note`."""
    # "auto" would look for kernels for the loss by itself.
    return Choice(Execution(loss_impl="chunked"), note, remark=remark)
