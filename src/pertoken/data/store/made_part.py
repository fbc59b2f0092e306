"""One part of the data made into files of samples, which an interrupted build finds again.

The work folder holds, for every part that is finished,

    part-000000.arrow     its samples
    part-000000.skipped   the bad rows that were skipped, one line each
    part-000000.json      what became of its rows, and checksums of the other two; written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pertoken.data.files.problems import Problems
from pertoken.data.findings import Findings
from pertoken.data.formats_found import FormatsFound
from pertoken.data.outcome import Counts, Outcome, UnusedKeys
from pertoken.data.samples import SampleBuilder
from pertoken.data.store.columns import write
from pertoken.data.store.parts import Part

__all__ = ["MadePart", "find_part", "make_part"]

_SUFFIXES = (".arrow", ".skipped")


@dataclass(frozen=True)
class MadePart:
    """A finished part."""

    samples: Path
    skipped: Path
    outcome: Outcome
    totals: dict[str, int | float]


def make_part(
    folder: Path, index: int, part: Part, builder: SampleBuilder, on_bytes: Callable[[int, int], None]
) -> None:
    """Write the files of one part. `on_bytes` is told (index, bytes done)."""
    outcome = Outcome()
    ours = [folder / f"{_name(index)}{suffix}.{os.getpid()}" for suffix in _SUFFIXES]
    with ours[1].open("w", encoding="utf-8") as skipped:
        rows = builder.samples(
            part, outcome, skip=lambda row: skipped.write(f"{row}\n"), on_bytes=lambda count: on_bytes(index, count)
        )
        totals = write(ours[0], rows)
    meta = {
        "part": [list(asdict(span).values()) for span in part],
        "checksums": [_checksum(path) for path in ours],
        "totals": totals,
        "by_file": [[file, asdict(counts)] for file, counts in outcome.by_file.items()],
        "unused": outcome.unused.to_json(),
        "findings": outcome.findings.to_json(),
        "formats": outcome.formats.to_json(),
        "problems": outcome.problems.to_json(),
        "skippable": outcome.skippable,
        "skipped": outcome.skipped.to_json(),
    }
    for path in ours:
        path.replace(path.with_suffix(""))
    aside = folder / f"{_name(index)}.json.{os.getpid()}"
    aside.write_text(json.dumps(meta), encoding="utf-8")
    aside.replace(aside.with_suffix(""))


def find_part(folder: Path, index: int, part: Part, *, check: bool = True) -> MadePart | None:
    """A part that was finished; None where it was not, is damaged, or was cut from the files otherwise."""
    samples, skipped = (folder / f"{_name(index)}{suffix}" for suffix in _SUFFIXES)
    try:
        meta = json.loads((folder / f"{_name(index)}.json").read_text(encoding="utf-8"))
        if meta["part"] != json.loads(json.dumps([list(asdict(span).values()) for span in part])):
            return None
        if check and meta["checksums"] != [_checksum(path) for path in (samples, skipped)]:
            return None
        problems = Problems.from_json(meta["problems"])
        unused = UnusedKeys.from_json(meta["unused"])
        findings = Findings.from_json(meta["findings"])
        formats = FormatsFound.from_json(meta["formats"])
        by_file = {int(file): Counts(**counts) for file, counts in meta["by_file"]}
        left = bool(meta["skippable"]), Problems.from_json(meta["skipped"])
        outcome = Outcome(by_file, problems, unused, findings, formats, *left)
        return MadePart(samples, skipped, outcome, meta["totals"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _name(index: int) -> str:
    return f"part-{index:06d}"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
