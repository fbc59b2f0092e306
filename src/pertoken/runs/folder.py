"""`out_dir` before the first step: an earlier run there, and whether this recipe and this data may continue it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pertoken.checkpoints.read import Checkpoint, has_optimizer, newest_checkpoint, remove_unfinished
from pertoken.errors import CheckpointError, RecipeError
from pertoken.files import FolderLock, write_whole
from pertoken.recipe.schema import Recipe
from pertoken.runs.files import EVENTS, METRICS, RECIPE, holds_a_run, keep_others_aside, remove_run
from pertoken.text import names
from pertoken.tracking.listener import Listener
from pertoken.tracking.run_files import claim, refuse_newer_run

__all__ = ["changed_data", "earlier_run", "keep_others_out", "make_room", "refuse_changes"]

# What may differ from the checkpoint on a resume. Paths of data and tokenizer may, since their contents are compared,
# and so may that of an adapter's base.
_MAY_CHANGE = {
    *("out_dir", "data.path", "data.eval_path", "data.tokenizer", "data.store", "data.workers"),
    *("train.epochs", "train.max_steps", "train.max_minutes", "train.eval_interval", "train.early_stopping"),
    *("train.micro_batch_tokens", "train.device", "train.engine", "train.activation_checkpointing", "train.parallel"),
    *("train.cuda_graphs", "train.loss_impl", "train.on_spike", "train.spike_factor"),
}
_SECTIONS_MAY_CHANGE = ("log.", "checkpoint.")


def keep_others_out(lock: FolderLock, out_dir: Path) -> None:
    """Lock `out_dir` where it exists. Raises CheckpointError where another process trains into it."""
    if not out_dir.is_dir():
        return
    try:
        holder = lock.take(out_dir)
    except OSError as error:
        raise _unwritable(out_dir, error) from None
    if holder is not None:
        raise CheckpointError(
            f"out_dir={out_dir}: {holder} trains into it; wait for its end, or choose another out_dir"
        )


def earlier_run(out_dir: Path, *, resume: bool, overwrite: bool, listener: Listener) -> Path | None:
    """The checkpoint to continue from, if any. Refuses an `out_dir` in use without a word on what becomes of it."""
    if resume or overwrite:
        refuse_newer_run(out_dir)
    if resume:
        checkpoint, damaged = newest_checkpoint(out_dir)
        for line in damaged:
            listener.message(line)
        if checkpoint is None and damaged:
            raise CheckpointError(f"{out_dir}: no checkpoint is valid, so there is nothing to resume; see above")
        if checkpoint is not None and not has_optimizer(checkpoint.folder):
            raise CheckpointError(
                f"{checkpoint.folder}: saved with checkpoint.save_optimizer=false, so no run can be resumed from it; "
                f"start a new one from its weights, with init_from={checkpoint.folder}"
            )
        return checkpoint.folder if checkpoint is not None else None
    if not overwrite and holds_a_run(out_dir):
        raise CheckpointError(f"{out_dir}: holds a run already; resume=True continues it, overwrite=True replaces it")
    return None


def make_room(out_dir: Path, recipe: Recipe, lock: FolderLock, *, resume: bool, overwrite: bool) -> list[str]:
    """The folder, locked, without an earlier run if that is to be overwritten, and with the recipe in it.

    Of an earlier run only what it wrote is removed. Returns what the user should know.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out_dir, error) from None
    keep_others_out(lock, out_dir)
    if not resume and not overwrite and holds_a_run(out_dir):  # of a process that was faster
        raise CheckpointError(f"{out_dir}: holds a run already; resume=True continues it, overwrite=True replaces it")
    said = []
    try:
        if overwrite and (left := remove_run(out_dir)):
            said.append(f"overwrite=True: left in {out_dir}, since the earlier run did not write it: {names(left)}")
        remove_unfinished(out_dir)
        continues = any((out_dir / "checkpoints").glob("step-*"))
        said += keep_others_aside(out_dir, continues=continues)
        claim(out_dir, [out_dir / name for name in (RECIPE, METRICS, EVENTS)], anew=overwrite)
        write_whole(out_dir / RECIPE, recipe.to_toml())
    except OSError as error:
        raise _unwritable(out_dir, error) from None
    return said


def _unwritable(out_dir: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"out_dir={out_dir}: cannot be written ({error.strerror}); choose another")


def refuse_changes(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raises RecipeError, naming each key that cannot change on a resume."""
    before, now = _by_source(checkpoint.recipe.flat()), _by_source(recipe.flat())
    if before["data.sources"] != now["data.sources"]:  # then their places say nothing
        before, now = (
            {key: value for key, value in keys.items() if not key.startswith("data.sources.")} for keys in (before, now)
        )
    may_change = _MAY_CHANGE | ({"init_from"} if recipe.adapter.kind != "none" else set())
    changed = [
        f"{key}={now.get(key)!r}: was {before.get(key)!r} when {checkpoint.folder.name} was saved, and cannot change "
        "with resume=True; put it back, or start a new run from it with init_from"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in may_change and not key.startswith(_SECTIONS_MAY_CHANGE)
    ]
    if changed:
        raise RecipeError("\n".join(changed))


def _by_source(flat: dict[str, Any]) -> dict[str, Any]:
    """The sources as their names, and every key of each but its paths as a key of its own: data.sources.0.repeat."""
    sources = flat["data.sources"]
    keys = {
        f"data.sources.{i}.{key}": value
        for i, source in enumerate(sources)
        for key, value in source.items()
        if key not in ("name", "path")
    }
    return {**flat, **keys, "data.sources": [source["name"] for source in sources]}


def changed_data(checkpoint: Checkpoint, now: dict[str, tuple[str | None, ...]], files: dict[str, Any]) -> str | None:
    """What of the data is no longer what the checkpoint was trained on, file by file; None if nothing.

    `now` are the fingerprints that the training and the evaluation data may have there, `files` the checksums of their
    files by name.
    """
    lines = []
    for part, accepted in now.items():
        if checkpoint.state.data.get(part) in accepted:
            continue
        kind = "training" if part == "train" else "evaluation"
        before, after = checkpoint.state.data_files.get(part) or {}, files[part] or {}
        contents = set(before.values())
        which = [f"{name} changed" for name in after if name in before and before[name] != after[name]]
        which += [f"{name} is new" for name in after if name not in before and after[name] not in contents]
        which += [f"{name} is gone" for name in before if name not in after and before[name] not in after.values()]
        if not before:  # saved by a version that kept no checksums
            which = ["a file, its tokenizer, its template or a setting of [data] changed"]
        elif not which and list(before.values()) != list(after.values()):
            which = ["its files come in another order"]
        which = which or ["its tokenizer, its template or a setting of [data] changed"]
        lines.append(f"the {kind} data is not what {checkpoint.folder.name} was trained with: {', '.join(which)}")
    return "; ".join(lines) or None
