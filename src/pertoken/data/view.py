"""A sample as a person reads it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from pertoken.data.batch.sample import Sample

__all__ = ["supervised_pieces"]


def supervised_pieces(sample: Sample, tokenizer: Any) -> list[tuple[str, bool]]:
    """The sample's text as consecutive `(text, supervised)` pieces: supervised text is what the model learns to say."""
    supervised = np.concatenate([[False], sample.loss_mask != 0])
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(supervised)]
    return [
        (tokenizer.decode(sample.tokens[a:b].tolist(), skip_special_tokens=False), bool(supervised[a]))
        for a, b in pairwise(edges)
    ]
