"""pertoken: pretrain and fine-tune decoder-only language models.

Every supervised token counts exactly once, and equally, however the work is split.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "LossOutput",
    "Recipe",
    "__version__",
    "linear_cross_entropy",
    "load_model",
    "load_tokenizer",
    "train",
]

if TYPE_CHECKING:
    from pertoken.config import Recipe
    from pertoken.data.tokenizer import load_tokenizer
    from pertoken.loss import LossOutput, linear_cross_entropy
    from pertoken.training.checkpoint import load_model
    from pertoken.training.run import train

_HOME = {
    "LossOutput": "pertoken.loss",
    "Recipe": "pertoken.config",
    "linear_cross_entropy": "pertoken.loss",
    "load_model": "pertoken.training.checkpoint",
    "load_tokenizer": "pertoken.data.tokenizer",
    "train": "pertoken.training.run",
}


def __getattr__(name: str) -> Any:
    """Public names load what they need on first use, so that `import pertoken` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'pertoken' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
