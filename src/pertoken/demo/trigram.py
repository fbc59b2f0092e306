"""The baseline that a language model has to beat: counted trigrams."""

from __future__ import annotations

import numpy as np

from pertoken.data.store.dataset import Dataset

__all__ = ["trigram_nats"]


def trigram_nats(train: Dataset, test: Dataset, vocab_size: int, add: float) -> float:
    """Sum of -log p over all labels of `test` under an add-k trigram model counted on `train`, in nats.

    p(w | u, v) = (c(u, v, w) + k) / (c(u, v) + k V) (Lidstone); before a sample's start there is one more symbol, V.
    """
    base = np.int64(vocab_size + 1)

    def keys(store: Dataset) -> np.ndarray:
        parts = []
        for i in range(len(store)):
            tokens = store[i].tokens.astype(np.int64)
            before = np.concatenate([[vocab_size], tokens[:-2]])
            parts.append((before * base + tokens[:-1]) * base + tokens[1:])
        return np.concatenate(parts)

    def count(table: tuple[np.ndarray, np.ndarray], asked: np.ndarray) -> np.ndarray:
        values, counts = table
        place = np.minimum(np.searchsorted(values, asked), len(values) - 1)
        return np.where(values[place] == asked, counts[place], 0)

    seen, asked = keys(train), keys(test)
    trigrams = np.unique(seen, return_counts=True)
    contexts = np.unique(seen // base, return_counts=True)
    p = (count(trigrams, asked) + add) / (count(contexts, asked // base) + add * vocab_size)
    return float(-np.log(p).sum())
