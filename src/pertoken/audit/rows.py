"""What stored samples show by themselves: answers without an end, empty ones, rows that are there twice."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from pertoken.data.batch.sample import Sample
from pertoken.data.findings import Findings
from pertoken.data.store.store import Store

__all__ = ["find_answers", "find_duplicates", "find_in_both"]


def find_answers(store: Store, ends: Collection[int], max_seq_len: int, findings: Findings) -> None:
    """Add the answers whose last supervised token is none of `ends`, and those that consist of it alone.

    An answer that is cut at the end of a sample of `max_seq_len` inputs is counted as such elsewhere.
    """
    end_ids = np.array(sorted(ends))
    for i in range(len(store)):
        sample = store[i]
        first, last = _answers(sample)
        is_end = np.isin(sample.tokens[last], end_ids)
        if len(sample) == max_seq_len:
            is_end |= last == len(sample)
        empty = is_end & (first == last) & np.isin(sample.tokens[last], end_ids)
        for kind, count in (("end_not_supervised", int((~is_end).sum())), ("empty_answer", int(empty.sum()))):
            if count:
                findings.add(kind, int(store.file_ids[i]), int(store.lines[i]), count)


def _answers(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """(first, last) supervised token of each run of them, as indices into the sample's tokens."""
    supervised = np.concatenate([[False], sample.loss_mask != 0, [False]]).astype(np.int8)
    edges = np.diff(supervised)
    return np.flatnonzero(edges == 1) + 1, np.flatnonzero(edges == -1)


def find_duplicates(store: Store, before: Sequence[Store], findings: Findings) -> None:
    """Add every row that is the same, byte for byte, as one above it or as one of the stores `before` it."""
    first = _first_samples(store)
    digests = store.row_digests[first]
    _, kept = np.unique(digests, return_index=True)
    again = np.ones(len(first), dtype=np.bool_)
    again[kept] = False
    if before:
        again |= np.isin(digests, np.concatenate([other.row_digests for other in before]))
    _add(store, first[again], "duplicate", findings)


def find_in_both(train: Sequence[Store], evaluation: Store, findings: Findings) -> None:
    """Add every row of the evaluation data that is, byte for byte, a row of the training data."""
    first = _first_samples(evaluation)
    both = np.isin(evaluation.row_digests[first], np.concatenate([store.row_digests for store in train]))
    _add(evaluation, first[both], "in_both", findings)


def _first_samples(store: Store) -> np.ndarray:
    """Of each row, the index of its first sample: the samples of a row lie side by side."""
    files, lines = store.file_ids, store.lines
    return np.flatnonzero(np.diff(files, prepend=-1).astype(bool) | np.diff(lines, prepend=-1).astype(bool))


def _add(store: Store, samples: np.ndarray, kind: str, findings: Findings) -> None:
    for i in samples.tolist():
        findings.add(kind, int(store.file_ids[i]), int(store.lines[i]))
