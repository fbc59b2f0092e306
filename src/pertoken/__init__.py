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
    from pertoken.checkpoints.read import load_model
    from pertoken.data.tokens.tokenizer import load_tokenizer
    from pertoken.objective.cross_entropy import linear_cross_entropy
    from pertoken.objective.terms import LossOutput
    from pertoken.recipe.schema import Recipe
    from pertoken.runs.setup import train

_HOME = {
    "LossOutput": "pertoken.objective.terms",
    "Recipe": "pertoken.recipe.schema",
    "linear_cross_entropy": "pertoken.objective.cross_entropy",
    "load_model": "pertoken.checkpoints.read",
    "load_tokenizer": "pertoken.data.tokens.tokenizer",
    "train": "pertoken.runs.setup",
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
