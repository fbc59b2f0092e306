"""Parts of the data made into files of samples, which an interrupted build finds again.

A work folder beside the store holds, for every part that is finished,

    part-000000.arrow     its samples
    part-000000.skipped   the bad rows that were skipped, one line each
    part-000000.json      what became of its rows, and checksums of the other two; written last

How many processes make the parts changes nothing in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pertoken.data.files.records import BadRow, Problems
from pertoken.data.samples import Counts, Outcome, SampleBuilder
from pertoken.data.store.columns import write
from pertoken.data.store.parts import Part, part_bytes
from pertoken.errors import PertokenError

__all__ = ["MadePart", "make_part", "make_parts", "work_folder"]

_SUFFIXES = (".arrow", ".skipped")
_LITTLE_BYTES = 16 << 20  # less is not worth the second or two that starting processes takes


@dataclass(frozen=True)
class MadePart:
    """A finished part."""

    samples: Path
    skipped: Path
    outcome: Outcome
    totals: dict[str, int]


def make_parts(
    parts: Sequence[Part],
    making: SampleBuilder,
    folder: Path,
    *,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[MadePart]:
    """All parts, in order, those that `folder` holds already taken from there.

    `workers` processes at most, by default one a processor, share the others; where there is little left to do, this
    process does it, whose encoder has threads of its own. `on_progress` is told the bytes done.
    Raises DataError where a file cannot be read, ChildProcessError where a process was killed or had no
    memory left.
    """
    made = {i: found for i, part in enumerate(parts) if (found := _find(folder, i, part))}
    missing = {i: part for i, part in enumerate(parts) if i not in made}
    done = {i: part_bytes(parts[i]) for i in made}

    def on_bytes(index: int, count: int) -> None:
        done[index] = count
        on_progress(sum(done.values()))

    if made:
        on_progress(sum(done.values()))
    workers = min(workers or _processors(), len(missing))
    if workers > 1 and sum(map(part_bytes, missing.values())) >= _LITTLE_BYTES and os.name == "posix":
        from pertoken.data.store.workers import share_out

        share_out(missing, making, folder, workers=workers, on_bytes=on_bytes)
    else:
        for i, part in missing.items():
            make_part(folder, i, part, making, on_bytes)
    for i, part in missing.items():
        found = _find(folder, i, part, check=False)
        assert found is not None, (folder, i)
        made[i] = found
    return [made[i] for i in range(len(parts))]


def make_part(
    folder: Path, index: int, part: Part, making: SampleBuilder, on_bytes: Callable[[int, int], None]
) -> None:
    """Write the files of one part. `on_bytes` is told (index, bytes done)."""
    outcome = Outcome()
    ours = [folder / f"{_name(index)}{suffix}.{os.getpid()}" for suffix in _SUFFIXES]
    with ours[1].open("w", encoding="utf-8") as skipped:
        rows = making.samples(
            part, outcome, skip=lambda row: skipped.write(f"{row}\n"), on_bytes=lambda count: on_bytes(index, count)
        )
        totals = write(ours[0], rows)
    meta = {
        "part": [list(asdict(span).values()) for span in part],
        "checksums": [_checksum(path) for path in ours],
        "totals": totals,
        "counts": asdict(outcome.counts),
        "problems": {"count": outcome.problems.count, "first": [asdict(row) for row in outcome.problems.first]},
        "skippable": outcome.skippable,
    }
    for path in ours:
        path.replace(path.with_suffix(""))
    aside = folder / f"{_name(index)}.json.{os.getpid()}"
    aside.write_text(json.dumps(meta), encoding="utf-8")
    aside.replace(aside.with_suffix(""))


def _find(folder: Path, index: int, part: Part, *, check: bool = True) -> MadePart | None:
    """A part that was finished; None where it was not, is damaged, or was cut from the files otherwise."""
    samples, skipped = (folder / f"{_name(index)}{suffix}" for suffix in _SUFFIXES)
    try:
        meta = json.loads((folder / f"{_name(index)}.json").read_text(encoding="utf-8"))
        if meta["part"] != json.loads(json.dumps([list(asdict(span).values()) for span in part])):
            return None
        if check and meta["checksums"] != [_checksum(path) for path in (samples, skipped)]:
            return None
        problems = Problems()
        problems.count = int(meta["problems"]["count"])
        problems.first = [BadRow(**row) for row in meta["problems"]["first"]]
        outcome = Outcome(Counts(**meta["counts"]), problems, bool(meta["skippable"]))
        return MadePart(samples, skipped, outcome, meta["totals"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _name(index: int) -> str:
    return f"part-{index:06d}"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _processors() -> int:
    """Those that this process may use, where the system can tell."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def work_folder(cache: Path, name: str) -> Iterator[Path]:
    """The folder of the build `name`, with what an interrupted one left in it, for one process at a time.

    Another process that builds the same meanwhile gets an empty folder of its own. Finished parts outlive any
    exception but a user's error: the data must change then, and with them all that was made of it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f".building-{name}"
    lock = _lock(folder)
    if lock is None:
        folder = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
    for left in folder.glob("part-*.*.*"):  # half-made, by a process that is no more
        left.unlink(missing_ok=True)
    keep = False
    try:
        yield folder
    except PertokenError:
        raise
    except BaseException:
        keep = lock is not None and any(folder.glob("part-*.json"))
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A file descriptor that keeps other processes out until it is closed or this process ends; None if one has it."""
    if os.name != "posix":
        return None
    import fcntl

    folder.mkdir(exist_ok=True)
    path = folder / "lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:  # removed since, by the one who had it
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat()):  # and not removed by the one who had it before
            return lock
    except OSError:
        pass
    os.close(lock)
    return None
