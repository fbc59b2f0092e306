"""All parts of the data made into files of samples, by this process or by several, those of an interrupted build found
again.

How many processes make the parts changes nothing in them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pertoken.data.samples import SampleBuilder
from pertoken.data.store.made_part import MadePart, find_part, make_part
from pertoken.data.store.parts import Part, part_bytes
from pertoken.data.store.workers import hand_out
from pertoken.errors import PertokenError

__all__ = ["make_parts", "work_folder"]

_LITTLE_BYTES = 16 << 20  # less is not worth the second or two that starting processes takes


def make_parts(
    parts: Sequence[Part],
    builder: SampleBuilder,
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
    made = {i: found for i, part in enumerate(parts) if (found := find_part(folder, i, part))}
    missing = {i: part for i, part in enumerate(parts) if i not in made}
    done = {i: part_bytes(parts[i]) for i in made}

    def on_bytes(index: int, count: int) -> None:
        done[index] = count
        on_progress(sum(done.values()))

    if made:
        on_progress(sum(done.values()))
    workers = min(workers or _processors(), len(missing))
    if workers > 1 and sum(map(part_bytes, missing.values())) >= _LITTLE_BYTES and os.name == "posix":
        hand_out(missing, builder, folder, workers=workers, on_bytes=on_bytes)
    else:
        for i, part in missing.items():
            make_part(folder, i, part, builder, on_bytes)
    for i, part in missing.items():
        found = find_part(folder, i, part, check=False)
        assert found is not None, (folder, i)
        made[i] = found
    return [made[i] for i in range(len(parts))]


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
