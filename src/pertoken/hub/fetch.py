"""What a name of the hub means on this machine: downloaded once, and then read from huggingface_hub's cache.

The cache, the login, the mirror (HF_ENDPOINT) and the offline mode (HF_HUB_OFFLINE) are huggingface_hub's own.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import LogRecord, getLogger
from pathlib import Path
from threading import Thread
from typing import Any

from pertoken.errors import DataError, ModelError, PertokenError
from pertoken.files import free_bytes
from pertoken.hub.choose import Part, choose, separate_folders
from pertoken.hub.names import HubName, data_name, model_name
from pertoken.hub.older_client import counts_bytes, keeps_listings, kept_listing, kept_snapshot, without_bars
from pertoken.hub.problems import explained
from pertoken.text import escaped_logs, names

__all__ = ["Fetched", "fetch", "name_of", "on_disk"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_AT_ONCE = 8  # files
_TELL_S = 0.2

OnMessage = Callable[[str], None]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fetched:
    """Where the files are: a path as `data.path` or `init_from` take it, and the commit that they are of."""

    path: str
    commit: str


def name_of(text: str, part: Part, label: str) -> HubName | None:
    """What `text` means on the hub, None where it is a path. Raises ModelError or DataError where it is neither."""
    try:
        return data_name(text) if part == "data" else model_name(text)
    except ValueError as error:
        raise (DataError if part == "data" else ModelError)(f"{label}={text}: {error}") from None


def on_disk(
    text: str,
    part: Part,
    *,
    label: str,
    on_message: OnMessage = lambda text: None,
    on_progress: OnProgress = lambda done, total: None,
) -> str:
    """`text` itself where it is a path, else the path of what the hub has by that name, as `fetch` gives it."""
    name = name_of(text, part, label)
    if name is None:
        return text
    return fetch(name, part, label=label, on_message=on_message, on_progress=on_progress).path


def fetch(
    name: HubName,
    part: Part,
    *,
    label: str,
    commit: str | None = None,
    on_message: OnMessage = lambda text: None,
    on_progress: OnProgress = lambda done, total: None,
) -> Fetched:
    """Download what is not in the cache yet. `commit` is the one to take, instead of what the name means today.

    Messages begin with `label`, the recipe's key or the argument. `on_message` is told what is about to be downloaded,
    and where the cache stands in for a hub that does not answer; nothing where all is there. `on_progress` is told
    (bytes done, bytes in all). Raises ModelError or DataError, in one line with the remedy.
    """
    what, kind = f"{label}={name.text}", DataError if part == "data" else ModelError
    try:
        with _quiet():
            return _fetch(name, part, what, commit, on_message, on_progress)
    except PertokenError:
        raise
    except ValueError as refusal:
        raise kind(f"{what}: {refusal}") from None


def _fetch(
    name: HubName, part: Part, what: str, commit: str | None, on_message: OnMessage, on_progress: OnProgress
) -> Fetched:
    snapshot, problem = _snapshot(name, commit)
    commit = snapshot.name
    at = f"commit {commit[:12]}"
    if problem is not None:
        on_message(f"{what}: {problem}; the {at}, which is in the cache, is used")
    sizes = _listing(name, snapshot, ask=problem is None and not _offline())
    if sizes is None:
        on_message(f"{what}: the hub cannot be asked which files the {at} has; those in the cache are used")
        sizes = {str(f.relative_to(snapshot)): f.stat().st_size for f in snapshot.rglob("*") if f.is_file()}
    chosen = choose(sizes, part, name.inside)
    missing = {file: sizes[file] for file in chosen if not (snapshot / file).is_file()}
    if missing:
        if problem is not None or _offline():
            why = problem or "HF_HUB_OFFLINE is set; unset it"
            raise ValueError(f"{why} (not in the cache, of its {at}: {names(missing)})")
        _check_room(sum(missing.values()), snapshot)
        on_message(
            f"{what}: {len(missing)} file{'s' if len(missing) > 1 else ''}, {_size(sum(missing.values()))}, to "
            f"download from the hub ({at}): {names(missing)}"
        )
        _download(name, commit, missing, on_progress)
    if part == "data" and (folders := separate_folders(chosen, name.inside)):
        one = "/".join(filter(None, (name.source, name.inside, folders[0])))
        on_message(f"{what}: all of its folders are read, {names(folders)}; to read one alone name it: {one}")
    if glob.has_magic(name.inside):
        return Fetched(f"{glob.escape(str(snapshot))}/{name.inside}", commit)
    return Fetched(str(snapshot / name.inside), commit)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _snapshot(name: HubName, commit: str | None) -> tuple[Path, str | None]:
    """The folder in the cache, named by its commit, and in words why the hub could not say which commit that is.

    The folder need not be there yet. Raises ValueError where neither hub nor cache knows the name.
    """
    from huggingface_hub import HfApi, snapshot_download

    revision = commit or name.revision or "main"
    problem: str | None = None
    if _COMMIT.fullmatch(revision) and not keeps_listings() and (kept := kept_snapshot(name, revision)) is not None:
        return kept, None
    if not _offline() and not _COMMIT.fullmatch(revision):
        try:
            HfApi().repo_info(name.repo, repo_type=name.kind, revision=revision)
        except Exception as error:  # httpx's errors have no base of their own
            problem = explained(error, name)
    try:
        folder = snapshot_download(
            name.repo,
            repo_type=name.kind,
            revision=revision,
            allow_patterns=[],  # no file: it asks for the commit and the list of its files, and remembers both
            local_files_only=_offline() or problem is not None,
            tqdm_class=_counter([0]),
        )
    except Exception as error:
        raise ValueError(problem or explained(error, name)) from None
    return Path(folder), problem


def _listing(name: HubName, snapshot: Path, *, ask: bool) -> dict[str, int] | None:
    """The size in bytes of each file of a commit, None where no list of them is in the cache. An older client may have
    to `ask` for it."""
    if not keeps_listings():
        return kept_listing(name, snapshot, ask=ask)
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {f.path: f.size for f in get_cached_repo_tree(name.repo, repo_type=name.kind, revision=snapshot.name)}
    except CachedRepoTreeNotFoundError:
        return None


def _check_room(needed: int, snapshot: Path) -> None:
    free = free_bytes(snapshot)
    if needed > free:
        raise ValueError(
            f"{_size(needed)} to download, and {_size(free)} free in {snapshot.parents[2]}; free some, or set HF_HOME "
            "to a larger disk"
        )


def _download(name: HubName, commit: str, sizes: dict[str, int], on_progress: OnProgress) -> None:
    """Files from the hub into the cache, several at once, in threads that no end of the process waits for: what is
    interrupted is continued by the next download."""
    from huggingface_hub import hf_hub_download

    waiting, problems = sorted(sizes), list[Exception]()
    counted, total = [0], sum(sizes.values())
    as_they_come = counts_bytes()  # else file by file
    bar: dict[str, Any] = {"tqdm_class": _counter(counted)} if as_they_come else {}

    def work() -> None:
        while waiting and not problems:
            try:
                file = waiting.pop()
                hf_hub_download(name.repo, file, repo_type=name.kind, revision=commit, **bar)
                counted[0] += 0 if as_they_come else sizes[file]
            except IndexError:  # another thread has taken the last one
                return
            except Exception as error:
                problems.append(error)

    threads = [Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(waiting)))]
    try:
        for thread in threads:
            thread.start()
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(_TELL_S)
            on_progress(min(counted[0], total - 1), total)
    finally:
        waiting.clear()
    if problems:
        raise ValueError(explained(problems[0], name))
    on_progress(total, total)


def _counter(counted: list[int]) -> Any:
    """A progress bar's class that shows nothing, and adds up bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Counter(tqdm):
        def __init__(self, *args: Any, initial: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self.update(initial)

        def update(self, n: float | None = 1) -> None:
            counted[0] += int(n or 0)

        def update_transfer(self, n: float | None = 1) -> None:
            """What comes over the network, which may be less than what it becomes on disk."""

        def set_transfer_postfix_str(self, s: str = "", refresh: bool = True) -> None: ...

    return Counter


@contextmanager
def _quiet() -> Iterator[None]:
    """huggingface_hub's own messages are one escaped line each, without the one that no file was asked for."""

    def is_news(record: LogRecord) -> bool:
        return not record.getMessage().startswith("No files matched")

    logger = getLogger("huggingface_hub._snapshot_download")
    logger.addFilter(is_news)
    try:
        with escaped_logs("huggingface_hub"), without_bars():
            yield
    finally:
        logger.removeFilter(is_news)


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} bytes"
