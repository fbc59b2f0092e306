"""A store found or built: the way from files to a `Store`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pertoken.data.files.find import find_files
from pertoken.data.files.hashes import recall, remember, see
from pertoken.data.files.records import TextReading, is_text
from pertoken.data.outcome import Outcome
from pertoken.data.samples import SampleBuilder
from pertoken.data.store.folder import SKIPPED, Check, Damaged, open_folder, put_in_place, write_folder
from pertoken.data.store.key import READ_OTHERWISE_BEFORE, StoreKey
from pertoken.data.store.made_part import MadePart
from pertoken.data.store.parts import part_bytes, scan
from pertoken.data.store.prepare import make_parts, work_folder
from pertoken.data.store.report import StoreReport, to_json
from pertoken.data.tokens.encode import Encoder
from pertoken.errors import DataError
from pertoken.files import cache_folder
from pertoken.recipe.data import DataConfig
from pertoken.text import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from pertoken.data.store.store import Store

__all__ = ["build_store", "open_store"]


def build_store(
    paths: Sequence[str],
    *,
    stage: Literal["sft", "pretrain"],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    paths_key: str = "data.path",
    verify_data: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> Store:
    """The samples of `paths`, opened from the cache where the same files and settings were built before.

    `paths_key` is the recipe's key that names the paths: of a dataset's splits, data.eval_path means the others.
    The files are read only where no run has read them before, as they are now. A store is checked in part when it is
    opened, and made again, with a message, where it is damaged; with `verify_data` the files are read in any case, and
    the store is checked in full. `on_progress` is told (bytes done, bytes in all) during a build. The cache is
    `data.store`, else $XDG_CACHE_HOME/pertoken, else ~/.cache/pertoken.
    Raises DataError for bad rows (as `data.on_bad_row` and `data.overlong` say), where no sample results, and for files
    that change meanwhile.
    """
    files, cache = find_files(paths, on_message, key=paths_key), _cache(data.store)
    if data.text_reading != TextReading() and not any(is_text(file) for file in files):
        on_message(f"data.document, data.newlines: not used, since no file of {paths_key} is plain text")
    builder = SampleBuilder.of(files, data, stage=stage, tokenizer=tokenizer, encoder=Encoder(tokenizer))
    key = StoreKey.of(files, data, stage=stage, tokenizer=tokenizer, encoder=builder.encoder)
    check: Check = "full" if verify_data else "sample"
    try:
        known = recall(cache, files) if not verify_data else None
        if known is not None and (store := _open_or_tell(cache, key, known, check, on_message)) is not None:
            return store
        seen = see(files)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    contents, parts = scan(files)
    remember(cache, files, seen, contents)
    if (store := _open_or_tell(cache, key, contents, check, on_message)) is not None:  # others built it meanwhile, too
        return store
    if (earlier := key.earlier_name(contents)) is not None and (cache / earlier).is_dir():
        on_message(f"{cache / earlier}: a token store of an earlier version; making a new one, so it can be removed")
    name, progress = key.name(contents), _Progress(sum(map(part_bytes, parts)), on_progress)
    try:
        with work_folder(cache, name) as work:
            made = make_parts(parts, builder, work, workers=data.workers, on_progress=progress.at)
            _write(work / "store", made, paths, key, contents, builder.typed.bos if stage == "pretrain" else None)
            put_in_place(work / "store", cache / name)
    except ChildProcessError as error:
        raise DataError(
            f"data.workers: {error}; run it again with fewer or with more memory (what is done is kept)"
        ) from None
    except MemoryError:
        raise DataError(
            "data.path: out of memory while it was prepared; free memory, or split its longest rows, and run it again "
            "(what is done is kept)"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"data.store={cache}: cannot be written ({reason}); choose another folder") from None
    progress.end()
    store = _open(cache / name, "none", hit=False)
    assert store is not None, name
    return store


def open_store(name: str, fingerprint: str, data: DataConfig, check: Check = "none") -> Store | None:
    """The store of that name in this machine's cache; None where it is not, or is damaged.

    For a process that is told by another one what that has built or checked: on the same machine, nothing need be read
    but its store.json.
    """
    try:
        store = _open(_cache(data.store) / name, check, hit=True)
    except Damaged:
        return None
    return store if store is not None and store.fingerprint == fingerprint else None


class _Progress:
    """Tells a rising number of bytes, and all of them only when the store is there."""

    def __init__(self, total: int, tell: Callable[[int, int], None] | None) -> None:
        self._total = total
        self._tell = tell
        self._done = -1

    def at(self, done: int) -> None:
        done = min(done, self._total - 1)
        if self._tell is not None and self._done < done:
            self._done = done
            self._tell(done, self._total)

    def end(self) -> None:
        if self._tell is not None:
            self._tell(self._total, self._total)


def _write(
    folder: Path,
    made: Sequence[MadePart],
    paths: Sequence[str],
    key: StoreKey,
    contents: list[str],
    bos: str | None,
) -> None:
    """A store's folder from its parts. Raises DataError for bad rows and for no sample at all."""
    outcome = Outcome()
    for part in made:
        outcome.extend(part.outcome)
    outcome.raise_problems()
    counts = outcome.counts
    totals = {name: sum(part.totals[name] for part in made) for name in ("samples", "tokens", "num_tokens")}
    if not totals["samples"]:
        found = ", ".join(f"{name} {count}" for name, count in asdict(counts).items() if count)
        raise DataError(
            f"{', '.join(paths)}: no sample results ({found}); see data.max_seq_len, data.overlong and data.on_bad_row"
        )
    meta = key.meta(contents, changed=any(map(outcome.findings.count, READ_OTHERWISE_BEFORE)))
    skipped = [part.skipped for part in made] if counts.skipped else []
    write_folder(folder, [part.samples for part in made], skipped, {**meta, "report": to_json(outcome, totals, bos)})


def _open_or_tell(
    cache: Path, key: StoreKey, contents: list[str], check: Check, on_message: Callable[[str], None]
) -> Store | None:
    """The store of these contents. Where it is damaged it is removed, and `on_message` told."""
    folder = cache / key.name(contents)
    try:
        return _open(folder, check, hit=True)
    except Damaged as damage:
        on_message(f"{folder}: a damaged token store ({damage}); making it again from the data")
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _open(folder: Path, check: Check, *, hit: bool) -> Store | None:
    """The store in a folder; None where there is none. Raises Damaged."""
    found = open_folder(folder, check)
    if found is None:
        return None
    columns, meta = found
    skipped = folder / SKIPPED
    try:
        skipped_file = str(skipped) if skipped.exists() else None
        report = StoreReport.of(meta["report"], meta["files"], skipped_file=skipped_file, hit=hit)
        return Store(
            columns,
            name=folder.name,
            fingerprints=tuple(meta["fingerprints"]),
            files=tuple(meta["files"]),
            contents=tuple(meta["contents"]),
            report=report,
        )
    except (IndexError, KeyError, TypeError, ValueError):
        raise Damaged("store.json is not what pertoken writes") from None


def _cache(store: str | None) -> Path:
    try:
        if store:
            return Path(store).expanduser()
        return cache_folder()
    except RuntimeError as error:  # no such user, or none that has a home
        raise DataError(f"data.store={store or ''}: {reason(error)}; name a folder") from None
