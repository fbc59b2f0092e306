"""What became of the rows of a store's files, as it is kept in store.json and said at every start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pertoken.data.batch.sample import as_count
from pertoken.data.files.problems import Problems
from pertoken.data.findings import KINDS, Findings
from pertoken.data.formats_found import FormatsFound
from pertoken.data.outcome import Counts, Outcome, UnusedKeys
from pertoken.text import one_line

__all__ = ["StoreReport", "to_json"]


@dataclass(frozen=True)
class StoreReport:
    """What became of the rows of a store's files."""

    files: tuple[str, ...]
    by_file: tuple[Counts, ...]  # what became of the rows of each
    samples: int
    tokens: int  # inputs, over all samples
    num_tokens: int | float  # supervised tokens: the sum of their weights
    unused: UnusedKeys  # keys of rows and messages that nothing was made of
    formats: FormatsFound
    findings: Findings  # what is worth a word
    skipped_rows: Problems  # why rows were passed over
    bos: str | None  # that documents begin with
    skipped_file: str | None  # that lists the rows that were passed over
    hit: bool  # the store was there already

    @classmethod
    def of(cls, values: dict[str, Any], files: Sequence[str], *, skipped_file: str | None, hit: bool) -> StoreReport:
        """From what `to_json` made. Raises KeyError, TypeError or ValueError for anything else."""
        by_file = dict(values["by_file"])
        return cls(
            files=tuple(files),
            by_file=tuple(Counts(**by_file[i]) if i in by_file else Counts() for i in range(len(files))),
            samples=int(values["samples"]),
            tokens=int(values["tokens"]),
            num_tokens=as_count(values["num_tokens"]),
            unused=UnusedKeys.from_json(values["unused"]),
            formats=FormatsFound.from_json(values["formats"]),
            findings=Findings.from_json(values["findings"]),
            skipped_rows=Problems.from_json(values["skipped_rows"]),
            bos=values["bos"],
            skipped_file=skipped_file,
            hit=hit,
        )

    @property
    def rows(self) -> int:
        """Rows read, bad ones included."""
        return sum(counts.rows for counts in self.by_file)

    @property
    def skipped(self) -> int:
        """Bad rows passed over."""
        return sum(counts.skipped for counts in self.by_file)

    @property
    def num_harmed(self) -> int:
        """Findings of kinds that lose a sample, or train something else than the row says."""
        return sum(self.findings.count(kind) for kind in self.findings.kinds() if KINDS[kind].harms)

    def notes(self) -> list[str]:
        """The formats of the rows, then a line for each way in which rows, or keys, were lost, cut or added to."""
        bos = [] if self.bos is None else [one_line(f"documents begin with {self.bos}, as the tokenizer adds it")]
        found = self.findings.notes(self.files, listed_in=self.skipped_file)
        return [*self.formats.notes(), *bos, *found, *self.unused.notes(self.files)]


def to_json(outcome: Outcome, totals: dict[str, int | float], bos: str | None) -> dict[str, Any]:
    """What store.json keeps: of all rows their outcome, of all samples the totals."""
    return {
        "by_file": [[file, asdict(counts)] for file, counts in sorted(outcome.by_file.items())],
        **{name: as_count(total) for name, total in totals.items()},
        "bos": bos,
        "unused": outcome.unused.to_json(),
        "findings": outcome.findings.to_json(),
        "formats": outcome.formats.to_json(),
        "skipped_rows": outcome.skipped.to_json(),
    }
