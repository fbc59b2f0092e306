"""What huggingface_hub before 1.31 lacks, as transformers 4 needs it: the list of a commit's files, bytes as they come.

The list is kept where newer clients keep it and in their format, so that each finds what the other has left.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pertoken.files import write_whole
from pertoken.hub.names import HubName

__all__ = ["counts_bytes", "keeps_listings", "kept_listing", "kept_snapshot", "without_bars"]

_FORMAT = 1


def keeps_listings() -> bool:
    """Whether the client itself keeps the list of a commit's files as `snapshot_download` meets it."""
    import huggingface_hub

    return hasattr(huggingface_hub, "get_cached_repo_tree")


def counts_bytes() -> bool:
    """Whether the client tells a bar of ours what it downloads."""
    from huggingface_hub import hf_hub_download

    return "tqdm_class" in inspect.signature(hf_hub_download).parameters


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of the client's own, which it shows where it takes none of ours."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if counts_bytes() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def kept_snapshot(name: HubName, commit: str) -> Path | None:
    """The folder of a commit in the cache, without asking the hub as the older client does; None where it is not."""
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(name.repo, repo_type=name.kind, revision=commit, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        return None
    return Path(found)


def kept_listing(name: HubName, snapshot: Path, *, ask: bool) -> dict[str, int] | None:
    """The size in bytes of each file of the commit whose folder in the cache is `snapshot`, kept once it is known.

    None where it is not kept and the hub does not say, or is not to be asked.
    """
    file = snapshot.parents[1] / "trees" / f"{snapshot.name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or one that cannot be read
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["format_version"] == _FORMAT:
            return {path: int(entry["size"]) for path, entry in kept["files"].items()}
    found = _ask(name, snapshot.name) if ask else None
    if found is None:
        return None
    with suppress(OSError):  # it can be asked for again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"format_version": _FORMAT, "files": found}, indent=1))
    return {path: int(entry["size"]) for path, entry in found.items()}


def _ask(name: HubName, commit: str) -> dict[str, dict[str, Any]] | None:
    """By path, an entry as newer clients write it."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        listed = list(HfApi().list_repo_tree(name.repo, repo_type=name.kind, revision=commit, recursive=True))
    except Exception:  # the caller says so
        return None
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted((e for e in listed if isinstance(e, RepoFile)), key=lambda entry: entry.path):
        found[entry.path] = {"size": entry.size, "blob_id": entry.blob_id}
        if entry.lfs is not None:
            found[entry.path] |= {"lfs_sha256": entry.lfs.sha256, "lfs_size": entry.lfs.size}
    return found
