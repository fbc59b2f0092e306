"""Tokenized samples on disk: made once, memory-mapped ever after.

A store is a folder of the cache (`folder.py`), named by a hash over everything that decides its contents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, SupportsIndex

import numpy as np

from pertoken.data.batch.sample import Sample, as_count
from pertoken.data.files.problems import Problems
from pertoken.data.files.records import BadRow
from pertoken.data.store.columns import Columns
from pertoken.data.store.report import StoreReport
from pertoken.errors import DataError
from pertoken.text import counted, one_line

__all__ = ["Part", "Store"]

_FILES_SHOWN = 20


class Store:
    """A sequence of samples. `store[i]` costs the same for every i and copies nothing."""

    def __init__(
        self,
        columns: Columns,
        *,
        name: str,
        fingerprints: tuple[str, ...],
        files: tuple[str, ...],
        contents: tuple[str, ...],
        report: StoreReport,
        ids: np.ndarray | None = None,
        choice: tuple[str, ...] = (),
    ) -> None:
        self.name = name  # of the folder in the cache
        self.fingerprints = fingerprints  # hashes over contents of files, tokenizer and settings; see `StoreKey`
        self.files = files
        self._contents = contents  # the SHA-256 of each file
        self.report = report  # of the whole build, in both halves of a split
        self._columns = columns
        self._ids = ids  # [len] int64, rows of `columns`; None: all of them
        self.choice = choice  # what was chosen of the samples, step by step

    def __len__(self) -> int:
        return len(self._columns) if self._ids is None else len(self._ids)

    def __getitem__(self, i: SupportsIndex) -> Sample:
        return self._columns.sample(self._row(i))

    @property
    def fingerprint(self) -> str:
        """The hash that says which samples these are."""
        return self.fingerprints[0]

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("", self),)

    def locate(self, i: SupportsIndex) -> tuple[Part, int]:
        """This store as the only part, and i."""
        return self.parts[0], i.__index__()

    @property
    def num_harmed(self) -> int:
        """How often a sample of the whole build is lost, or trained otherwise than its row says."""
        return self.report.num_harmed

    @property
    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each file, by its name as it was given."""
        return dict(zip(self.files, self._contents, strict=True))

    @cached_property
    def lengths(self) -> np.ndarray:
        """[len] int32, T of each sample."""
        return self._column("length")

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """[len] supervised tokens of each sample, int64; where they are weighted, float64 sums of their weights."""
        return _as_counts(self._column("num_tokens"))

    @cached_property
    def num_bytes(self) -> np.ndarray:
        """[len] UTF-8 bytes of each sample's supervised text, int64, or float64 as `num_tokens`; special tokens have
        none."""
        return _as_counts(self._column("num_bytes"))

    def count(self) -> int | float:
        """Supervised tokens of all samples: an int where their number is whole."""
        return as_count(self.num_tokens.sum())

    @cached_property
    def lines(self) -> np.ndarray:
        """[len] int64, the line of its file that each sample comes from, from 1."""
        return self._column("line")

    @cached_property
    def file_ids(self) -> np.ndarray:
        """[len] int32, the index into `files` of the file that each sample comes from."""
        return self._column("file")

    @cached_property
    def row_digests(self) -> np.ndarray:
        """[len] uint64, of the row that each sample comes from; the same for rows that are the same byte for byte."""
        return self._column("row_digest")

    def sums_by_file(self, values: np.ndarray) -> list[int | float]:
        """Of each file the sum of `values` [len] over its samples."""
        return [as_count(total) for total in np.bincount(self.file_ids, values, minlength=len(self.files)).tolist()]

    def notes(self) -> list[str]:
        """What became of the rows, a line each; of several files what each gave."""
        samples = self.sums_by_file(np.ones(len(self)))
        files = [
            one_line(f"{file}: {counted(counts.rows, 'row')}, {counted(int(count), 'sample')}{counts.lost()}")
            for file, counts, count in zip(self.files, self.report.by_file, samples, strict=True)
        ]
        if len(files) > _FILES_SHOWN:
            files[_FILES_SHOWN:] = [f"and {len(files) - _FILES_SHOWN:,} more files"]
        chosen = [f"chosen: {how}" for how in self.choice if "rows" in how]
        return [*self.report.notes(), *chosen, *(files if len(self.files) > 1 else [])]

    def where(self, i: SupportsIndex) -> str:
        """`file:line` of sample i."""
        row = self._row(i)
        return f"{self.files[self._columns.value('file', row)]}:{self._columns.value('line', row)}"

    def subset(self, *, max_rows: int | None = None, fraction: float | None = None) -> Store:
        """The samples of `max_rows` of the distinct rows, or of that fraction of them (to the nearest, at least one).

        Rows are chosen by their content: the same in every run, and a larger subset contains the smaller ones.
        Duplicates of a chosen row come with it.
        """
        rows = np.unique(self.row_digests)
        if fraction is not None:
            max_rows = max(1, round(fraction * len(rows)))
        assert max_rows is not None
        if max_rows >= len(rows):
            return self
        return self._select(self.row_digests <= rows[max_rows - 1], f"{max_rows:,} of {len(rows):,} distinct rows")

    def without(self, digests: Sequence[np.ndarray], why: str) -> Store:
        """The samples of all rows but those of `digests`; this store if it has none. `why`, for the summary."""
        outside = np.isin(self.row_digests, np.concatenate(digests)) if digests else np.zeros(len(self), dtype=np.bool_)
        if not outside.any():
            return self
        left_out = np.unique(self.row_digests[outside])
        which = hashlib.sha256(left_out.tobytes()).hexdigest()
        return self._select(~outside, f"all rows but {len(left_out):,}, left out of training: {why}", which)

    def split(self, eval_fraction: float, eval_split: Literal["rows", "tail"]) -> tuple[Store, Store]:
        """(train, eval), together every sample once; the same in every run.

        "rows" holds out the given fraction of the distinct rows, at least one, chosen by their content: all samples of
        a row and of its duplicates are on one side. "tail" holds out what was built as the end of each document.
        Raises DataError where either side would be empty.
        """
        assert 0 < eval_fraction < 1, eval_fraction
        if eval_split == "tail":
            held_out, distinct = self._column("is_tail").astype(np.bool_), None
        else:
            digests = self.row_digests
            rows = np.unique(digests)
            distinct = len(rows)
            held_out = digests <= rows[min(max(1, round(eval_fraction * distinct)), distinct) - 1]
        if held_out.all() or not held_out.any():
            seen = "one side would be empty" if distinct is None else f"cannot split {distinct} distinct row(s)"
            raise DataError(
                f"data.eval_fraction={eval_fraction}: {seen}; change it, give data.eval_path instead, "
                'or set data.eval_split="tail" for raw text'
            )
        what = f"eval_fraction={eval_fraction}"
        return self._select(~held_out, f"trained, {what}"), self._select(held_out, f"held out, {what}")

    def check_vocab(self, vocab_size: int) -> None:
        """Raise DataError, naming the first 20 samples, where a token id is not below `vocab_size`."""
        largest = self._column("max_token_id")
        outside = np.flatnonzero(largest >= vocab_size)
        problems = Problems()
        for i in outside[:20].tolist():  # to look up where all of them are may take minutes
            row = self._row(i)
            file, line = self.files[self._columns.value("file", row)], self._columns.value("line", row)
            what = f"token id {largest[i]} is outside the model's vocabulary of {vocab_size}"
            problems.add(
                BadRow(file, line, "tokens", f"{what}; use the model's own tokenizer or raise model.vocab_size")
            )
        problems.count = len(outside)
        problems.raise_if_any()

    def _row(self, i: SupportsIndex) -> int:
        i = i.__index__()
        if not 0 <= i < len(self):
            raise IndexError(i)
        return i if self._ids is None else int(self._ids[i])

    def _column(self, name: str) -> np.ndarray:
        column = self._columns.column(name)
        return column if self._ids is None else column[self._ids]

    def _select(self, chosen: np.ndarray, *how: str) -> Store:
        ids = np.flatnonzero(chosen) if self._ids is None else self._ids[chosen]
        return Store(
            self._columns,
            name=self.name,
            fingerprints=self.fingerprints,
            files=self.files,
            contents=self._contents,
            report=self.report,
            ids=ids,
            choice=(*self.choice, *how),
        )


@dataclass(frozen=True)
class Part:
    """The samples of one source."""

    name: str  # "" where there is only one source, and it has none
    store: Store
    repeat: int = 1  # how often each sample comes in an epoch


def _as_counts(sums: np.ndarray) -> np.ndarray:
    whole = sums.astype(np.int64)
    return whole if np.array_equal(whole, sums) else sums
