"""Samples of several sources as one dataset, each sample as often in an epoch as its source says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, SupportsIndex

import numpy as np

from pertoken.data.batch.sample import Sample, as_count
from pertoken.data.store.store import Part
from pertoken.errors import DataError
from pertoken.text import counted

__all__ = ["Mixture", "keep_apart", "refuse_shared_files"]


class Mixture:
    """The parts one after another, each of them `repeat` times. Nothing is copied but the counts."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part.store) * part.repeat for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: SupportsIndex) -> Sample:
        part, own = self.locate(i)
        return part.store[own]

    def locate(self, i: SupportsIndex) -> tuple[Part, int]:
        """The part that sample i is of, and its place in the part's store."""
        i = i.__index__()
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        part = self.parts[number]
        return part, (i - int(self._starts[number])) % len(part.store)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[len] int32, T of each sample."""
        return np.concatenate([np.tile(part.store.lengths, part.repeat) for part in self.parts])

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """[len] supervised tokens of each sample, int64; where some are weighted, float64 sums of their weights."""
        return np.concatenate([np.tile(part.store.num_tokens, part.repeat) for part in self.parts])

    @cached_property
    def num_bytes(self) -> np.ndarray:
        """[len] UTF-8 bytes of each sample's supervised text, as `num_tokens`."""
        return np.concatenate([np.tile(part.store.num_bytes, part.repeat) for part in self.parts])

    def count(self) -> int | float:
        """Supervised tokens of all samples of an epoch."""
        return as_count(self.num_tokens.sum())

    @cached_property
    def fingerprint(self) -> str:
        """A hash over the parts in order: their samples, by their stores and by what was chosen of these, and how often
        each comes."""
        said = [[part.name, part.store.fingerprint, part.store.choice, part.repeat] for part in self.parts]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @property
    def fingerprints(self) -> tuple[str, ...]:
        return (self.fingerprint,)

    @property
    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each file, by its name as it was given."""
        return {name: checksum for part in self.parts for name, checksum in part.store.checksums.items()}

    @property
    def num_harmed(self) -> int:
        return sum(part.store.num_harmed for part in self.parts)

    def where(self, i: SupportsIndex) -> str:
        """`file:line` of sample i."""
        part, own = self.locate(i)
        return part.store.where(own)

    def notes(self) -> list[str]:
        """A line that says how much comes from each source, then each source's own lines."""
        total = self.count()
        shares = []
        for part in self.parts:
            times = f"{part.repeat} x " if part.repeat > 1 else ""
            share = part.store.count() * part.repeat / total if total else 0.0
            shares.append(
                f"{part.name} {times}{counted(len(part.store), 'sample')} ({share:.1%} of the supervised tokens)"
            )
        own = [f"{part.name}: {note}" for part in self.parts for note in part.store.notes()]
        return [f"sources: {', '.join(shares)}", *own]

    def check_vocab(self, vocab_size: int) -> None:
        """Raise DataError, naming the first samples, where a token id is not below `vocab_size`."""
        for part in self.parts:
            part.store.check_vocab(vocab_size)


def refuse_shared_files(parts: Sequence[Part]) -> None:
    """Raise DataError where two sources have a file in common, or two files that are the same byte for byte."""
    seen: dict[str, tuple[str, str]] = {}
    for part in parts:
        for file, content in part.store.checksums.items():
            other, before = seen.setdefault(content, (file, part.name))
            if before != part.name:
                same = "" if Path(file).resolve() == Path(other).resolve() else f" the same content as {other},"
                raise DataError(
                    f"{file}:{same} in two of [[data.sources]], {before} and {part.name}; name it in one, with "
                    "repeat = 2 to train on it twice an epoch"
                )


def keep_apart(train: Sequence[Part], held_out: Sequence[Part], eval_split: Literal["rows", "tail"]) -> list[Part]:
    """`train` without the rows that another source holds out: none is trained through a copy of it.

    Of documents whose ends are held out, none may be in two sources: DataError. So is a source with no row left.
    """
    kept = []
    for part in train:
        others = [other for other in held_out if other.name != part.name]
        store = part.store.without([other.store.row_digests for other in others], "other sources hold them out")
        if store is not part.store and eval_split == "tail":
            raise DataError(
                f'data.eval_split="tail": {part.name} has a document that another of [[data.sources]] has too, whose '
                "end is held out; leave it out of one of the two"
            )
        if not len(store):
            raise DataError(
                f"data.sources: other sources hold out every row of {part.name} for evaluation; leave it out, or give "
                "data.eval_path instead"
            )
        kept.append(replace(part, store=store))
    return kept
