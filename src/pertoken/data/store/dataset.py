"""What training, evaluation and the proof read: samples with their counts, from one store or from several."""

from __future__ import annotations

from typing import Protocol, SupportsIndex

import numpy as np

from pertoken.data.batch.sample import Sample
from pertoken.data.store.store import Part

__all__ = ["Dataset"]


class Dataset(Protocol):
    """A sequence of samples, each as often as an epoch has it. `Store` and `Mixture` are datasets."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: SupportsIndex, /) -> Sample: ...

    @property
    def lengths(self) -> np.ndarray: ...  # [len] T of each sample

    @property
    def num_tokens(self) -> np.ndarray: ...  # [len] supervised tokens of each, or sums of their weights

    @property
    def num_bytes(self) -> np.ndarray: ...  # [len] UTF-8 bytes of each sample's supervised text, weighted as its tokens

    @property
    def fingerprint(self) -> str: ...  # says which samples these are

    @property
    def fingerprints(self) -> tuple[str, ...]: ...  # that, and what earlier versions said of the same samples

    @property
    def checksums(self) -> dict[str, str]: ...  # the SHA-256 of each file by its name

    @property
    def num_harmed(self) -> int: ...  # how often a sample is lost, or trained otherwise than its row says

    @property
    def parts(self) -> tuple[Part, ...]: ...

    def locate(self, i: SupportsIndex, /) -> tuple[Part, int]: ...  # the part that sample i is of, and its place in it

    def count(self) -> int | float: ...  # supervised tokens of all samples

    def where(self, i: SupportsIndex, /) -> str: ...  # file:line of sample i

    def notes(self) -> list[str]: ...  # what became of the rows, a line each

    def check_vocab(self, vocab_size: int) -> None: ...  # raises DataError where a token id is not below it
