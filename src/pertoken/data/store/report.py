"""What became of the rows of a store's files, as it is kept in store.json and said at every start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pertoken.data.batch.sample import as_count
from pertoken.data.findings import Findings
from pertoken.data.formats_found import FormatsFound
from pertoken.data.outcome import Outcome, UnusedKeys
from pertoken.text import one_line

__all__ = ["StoreReport", "to_json"]


@dataclass(frozen=True)
class StoreReport:
    """What became of the rows of a store's files."""

    rows: int  # rows read, bad ones included
    samples: int
    tokens: int  # inputs, over all samples
    num_tokens: int | float  # supervised tokens: the sum of their weights
    skipped: int  # bad rows passed over, listed in skipped_file
    overlong: int  # conversations dropped for being longer than data.max_seq_len
    truncated: int  # conversations cut to data.max_seq_len
    unsupervised: int  # conversations dropped for having no supervised token (left)
    too_short: int  # documents of one token, which predict nothing
    unused_keys: tuple[str, ...]  # lines on the keys of rows that nothing was made of
    formats: tuple[str, ...]  # a line on the formats of the rows, none where the files have no keys
    findings: tuple[str, ...]  # lines on what is worth a word (data/findings.py)
    bos: str | None  # that documents begin with
    skipped_file: str | None
    hit: bool  # the store was there already

    @classmethod
    def of(cls, values: dict[str, Any], files: Sequence[str], *, skipped_file: str | None, hit: bool) -> StoreReport:
        """From what `to_json` made. Raises KeyError, TypeError or ValueError for anything else."""
        lists = ("unused", "findings", "formats", "bos")
        counts: dict[str, Any] = {name: as_count(value) for name, value in values.items() if name not in lists}
        unused = UnusedKeys.from_json(values["unused"]).notes(files)
        findings = Findings.from_json(values.get("findings", {})).notes(files)
        found = FormatsFound.from_json(values.get("formats", {"rows": {}, "columns": {}})).notes()
        lines = {"unused_keys": tuple(unused), "findings": tuple(findings), "formats": tuple(found)}
        return cls(**counts | lines, bos=values.get("bos"), skipped_file=skipped_file, hit=hit)

    def notes(self) -> list[str]:
        """The formats of the rows, then a line for each way in which rows, or keys, were lost, cut or added to."""
        bos = [] if self.bos is None else [one_line(f"documents begin with {self.bos}, as the tokenizer adds it")]
        lost = [
            note.format(count=count)
            for count, note in (
                (self.skipped, f"{{count}} bad rows skipped, listed in {self.skipped_file}"),
                (self.overlong, "{count} conversations longer than data.max_seq_len dropped"),
                (self.truncated, "{count} conversations cut to data.max_seq_len"),
                (self.unsupervised, "{count} conversations without a supervised token dropped"),
                (self.too_short, "{count} documents of a single token dropped"),
            )
            if count
        ]
        return [*self.formats, *lost, *bos, *self.findings, *self.unused_keys]


def to_json(outcome: Outcome, totals: dict[str, int | float], bos: str | None) -> dict[str, Any]:
    """What store.json keeps: of all rows their outcome, of all samples the totals."""
    return {
        **asdict(outcome.counts),
        **{name: as_count(total) for name, total in totals.items()},
        "bos": bos,
        "unused": outcome.unused.to_json(),
        "findings": outcome.findings.to_json(),
        "formats": outcome.formats.to_json(),
    }
