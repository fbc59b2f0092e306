"""What became of rows: how many, what is wrong with them, and which of their keys nothing was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Literal

from pertoken.data.files.problems import Problems
from pertoken.data.findings import Findings
from pertoken.data.formats_found import FormatsFound
from pertoken.text import counted, one_line

__all__ = ["Counts", "Outcome", "UnusedKeys"]

Of = Literal["row", "message"]
Loss = Literal["skipped", "overlong", "truncated", "unsupervised", "too_short"]  # fields of Counts, kinds of findings

_OF: dict[Of, str] = {
    "row": "keys of rows that data.format does not use",
    "message": "keys of messages that the chat template does not name",
}
_MOST_KEYS = 100  # that are counted: a file whose keys are data has millions
_KEY_CHARS = 80
_SHOWN = 8


@dataclass
class Counts:
    """What became of rows."""

    rows: int = 0  # rows read, bad ones included
    skipped: int = 0  # bad rows passed over
    overlong: int = 0  # conversations dropped for having more than max_seq_len inputs
    truncated: int = 0  # conversations cut to max_seq_len inputs
    unsupervised: int = 0  # conversations dropped for having no supervised token (left)
    too_short: int = 0  # documents of one token, which predict nothing

    def lost(self) -> str:
        """In words, after a comma, how many of what was lost or cut; "" for none."""
        found = {name.replace("_", " "): count for name, count in asdict(self).items() if count and name != "rows"}
        return "".join(f", {count:,} {name}" for name, count in found.items())

    def add(self, others: Counts) -> None:
        for name, count in asdict(others).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class _Use:
    """A key that nothing was made of."""

    rows: int  # that have it
    file: int  # of the first of them: index into the files
    line: int


class UnusedKeys:
    """The keys that nothing was made of: of rows those that their format does not read, of messages those that the chat
    template does not name.

    Of more than 100 keys the first in alphabetical order are kept. A key among the first of all rows is among the first
    of any of them, so the counts are exact, and do not depend on how the rows are split into parts.
    """

    def __init__(self) -> None:
        self._found: dict[Of, dict[str, _Use]] = {of: {} for of in _OF}
        self._more: set[str] = set()  # of which there are others
        self._together: dict[tuple[str, ...], list[_Use]] = {}  # most rows have the keys of the row before

    def add(self, of: Of, names: tuple[str, ...], file: int, line: int) -> None:
        """Count the keys of one row. `file` is an index into the files."""
        uses = self._together.get((of, *names))
        if uses is None:
            found = self._found[of]
            short = {name if len(name) <= _KEY_CHARS else name[:_KEY_CHARS] + "..." for name in names}
            uses = [found.setdefault(name, _Use(0, file, line)) for name in short]
            self._together[of, *names] = uses
        for use in uses:
            use.rows += 1
        if len(self._together) > _MOST_KEYS or len(self._found[of]) > 2 * _MOST_KEYS:
            self._keep_first()

    def extend(self, later: UnusedKeys) -> None:
        """Add the keys of the rows that follow."""
        for of, uses in later._found.items():
            for name, use in uses.items():
                before = self._found[of].setdefault(name, _Use(0, use.file, use.line))
                before.rows += use.rows
        self._more |= later._more
        self._keep_first()

    def _keep_first(self) -> None:
        self._together.clear()
        for of, uses in self._found.items():
            if len(uses) > _MOST_KEYS:
                self._more.add(of)
            self._found[of] = {name: uses[name] for name in sorted(uses)[:_MOST_KEYS]}

    def to_json(self) -> dict[str, Any]:
        self._keep_first()
        keys = [[of, name, *astuple(use)] for of, uses in self._found.items() for name, use in uses.items()]
        return {"keys": keys, "more": sorted(self._more)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> UnusedKeys:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not make."""
        unused = cls()
        for of, name, rows, file, line in values["keys"]:
            unused._found[of][name] = _Use(int(rows), int(file), int(line))
        unused._more = set(values["more"])
        return unused

    def found(self) -> list[tuple[Of, str, int, tuple[int, int]]]:
        """(of what, key, rows, place of the first) of each key, the most frequent first."""
        self._keep_first()
        keys = [
            (of, name, use.rows, (use.file, use.line)) for of, uses in self._found.items() for name, use in uses.items()
        ]
        return sorted(keys, key=lambda key: (-key[2], key[1]))

    def notes(self, files: Sequence[str]) -> list[str]:
        """At most one line on keys of rows and one on keys of messages, the most frequent keys first."""
        self._keep_first()
        notes = []
        for of, what in _OF.items():
            uses = sorted(self._found[of].items(), key=lambda item: (-item[1].rows, item[0]))
            shown = [
                f"{name} ({counted(use.rows, 'row')}, the first {files[use.file]}:{use.line})"
                for name, use in uses[:_SHOWN]
            ]
            if of in self._more or len(uses) > _SHOWN:
                shown.append("and others")
            if uses:
                notes.append(one_line(f"{what}: {', '.join(shown)}"))
        return notes


@dataclass
class Outcome:
    """What there is to say of some rows, beside their samples. `problems` are those that must be raised."""

    by_file: dict[int, Counts] = field(default_factory=dict)  # by the index of the file
    problems: Problems = field(default_factory=Problems)
    unused: UnusedKeys = field(default_factory=UnusedKeys)
    findings: Findings = field(default_factory=Findings)
    formats: FormatsFound = field(default_factory=FormatsFound)
    skippable: bool = False  # data.on_bad_row="skip" would pass over some of the problems
    skipped: Problems = field(default_factory=Problems)  # of the rows that it has passed over

    def of(self, file: int) -> Counts:
        """The counts of one file, by its index."""
        return self.by_file.setdefault(file, Counts())

    @property
    def counts(self) -> Counts:
        """Of all files together."""
        total = Counts()
        for counts in self.by_file.values():
            total.add(counts)
        return total

    def lost(self, kind: Loss, file: int, line: int) -> None:
        """Count a row, or a conversation's sample, of which nothing or not everything is learned."""
        counts = self.of(file)
        setattr(counts, kind, getattr(counts, kind) + 1)
        self.findings.add(kind, file, line)

    def extend(self, other: Outcome) -> None:
        """Add what there is to say of the rows that follow."""
        for file, counts in other.by_file.items():
            self.of(file).add(counts)
        self.skipped.extend(other.skipped)
        self.problems.extend(other.problems)
        self.unused.extend(other.unused)
        self.findings.extend(other.findings)
        self.formats.extend(other.formats)
        self.skippable |= other.skippable

    def raise_problems(self) -> None:
        """DataError naming the first causes why rows cannot be used, if any, or a column that no row has."""
        self.formats.require_columns()
        others = self.skippable and self.problems.count < self.counts.rows
        self.problems.raise_if_any('data.on_bad_row="skip" trains on the other rows' if others else "")
