"""One trial of a failing disk: a run on it, what it left, and the resume when the disk is well again."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from faults.failing_disk import Fault, calls_in
from faults.harness import Desk, Ended, Workshop, difference, forget_after, problem_of, steps_saved, torn_event

STEPS, INTERVAL, FAILING = 8, 2, 4
SETTINGS = {
    "train__max_steps": STEPS,
    "train__batch_size": 2,
    "checkpoint__save_interval": INTERVAL,
    "checkpoint__keep_last": 10,
    "checkpoint__keep_best": False,
}
ERRNOS = ("ENOSPC", "EIO", "EACCES")


@dataclass(frozen=True)
class Case:
    """A fault, and whether the last checkpoint is written in spite of it (None: either, and the exit code says which).
    `kept` are the steps that must be whole after it."""

    fault: Fault
    ends_well: bool | None
    kept: tuple[int, ...] = (2,)
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((str(self.fault), *self.overrides))


def recipe_of(workshop: Workshop) -> Path:
    return workshop.recipe("disk", **SETTINGS)


def recipe_with_a_tokenizer_of_transformers(workshop: Workshop) -> Path:
    """The same with a tokenizer that did not come from `train_tokenizer`."""
    folder = workshop.folder / "tokenizer-of-transformers"
    if not folder.exists():
        shutil.copytree(workshop.world.folder / "tokenizer", folder)
        (folder / "special_tokens_map.json").write_text("{}")
    return workshop.recipe("disk-transformers", **SETTINGS, data__tokenizer=str(folder))


def sites(reference: Path, step: int) -> list[tuple[str, int]]:
    """(call, n) of every call that the save of a step made below `checkpoints`; n counts the calls of that kind in the
    whole run."""
    found, seen, inside = [], Counter[str](), False
    for call, path in calls_in(reference.with_suffix(".calls")):
        if "/checkpoints" not in path:
            continue
        seen[call] += 1
        if ".writing-step-" in path:
            inside = f".writing-step-{step:08d}" in path
        if inside:
            found.append((call, seen[call]))
    return found


def every_call_once(reference: Path) -> list[Case]:
    """Each call of a save in the middle fails once, with each errno."""
    return [
        Case(Fault(call, errno, nth, match="checkpoints"), ends_well=True)
        for call, nth in sites(reference, FAILING)
        for errno in ERRNOS
    ]


def for_ever(reference: Path) -> list[Case]:
    """From a save in the middle on, every call of a kind fails."""
    first: dict[str, int] = {}
    for call, nth in sites(reference, FAILING):
        first.setdefault(call, nth)
    kinds = [call for call in ("mkdir", "open", "write", "sync", "rename") if call in first]
    return [
        Case(Fault(call, errno, first[call], times=0, match="checkpoints"), ends_well=False)
        for call in kinds
        for errno in ("ENOSPC", "EIO", "EROFS", "EDQUOT")
    ]


def last_save(reference: Path) -> list[Case]:
    """Each kind of call fails once, late in the last save."""
    last = dict(sites(reference, STEPS))
    return [
        Case(Fault(call, "EIO", nth, match="checkpoints"), ends_well=None, kept=(2, 4, 6)) for call, nth in last.items()
    ]


def rows(reference: Path) -> list[Case]:
    """Rows of metrics.jsonl that cannot be written, for a while."""
    return [
        Case(Fault("write", errno, nth, times=times, match="metrics.jsonl"), ends_well=True)
        for errno in ERRNOS
        for nth, times in ((3, 1), (5, 2))
    ]


def events(reference: Path) -> list[Case]:
    """events.jsonl, which cannot be written for a while, or never opened, is no reason to stop."""
    cases = [Fault("write", errno, 2, times=times, match="events.jsonl") for errno in ERRNOS for times in (1, 0)]
    cases += [Fault("open", errno, times=0, match="events.jsonl") for errno in ("EACCES", "EROFS")]
    return [Case(fault, ends_well=True) for fault in cases]


def full(reference: Path) -> list[Case]:
    """A disk with room for some checkpoints, or for a part of the first."""
    size = sum(path.stat().st_size for path in steps_saved(reference)[2].iterdir())
    shares = (0.0, 0.001, 0.3, 0.99, 1.2, 1.5, 1.9, 2.3, 2.7, 3.1, 3.5, 3.9)
    kept = [tuple(INTERVAL * (n + 1) for n in range(int(share - 0.1) if share > 1.1 else 0)) for share in shares]
    return [
        Case(Fault(bytes=int(share * size), times=0), ends_well=False, kept=steps)
        for share, steps in zip(shares, kept, strict=True)
    ] + [Case(Fault(free=1000), ends_well=False, kept=())]


def tokenizer_of_transformers(reference: Path) -> list[Case]:
    """What the Rust of `tokenizers` writes, in a save in the middle and in the last."""
    return [
        Case(Fault(call, errno, nth, match="tokenizer.json"), ends_well=nth < STEPS // INTERVAL, kept=kept)
        for call in ("open", "write")
        for errno in ERRNOS
        for nth, kept in ((2, (2,)), (4, (2, 4, 6)))
    ]


def old_ones_stay(reference: Path) -> list[Case]:
    """Old checkpoints cannot be removed, which is no reason to stop."""
    return [
        Case(
            Fault("remove", errno, times=0, match="checkpoints"), ends_well=True, overrides=("checkpoint.keep_last=1",)
        )
        for errno in ("EACCES", "EROFS")
    ]


def trial(desk: Desk, case: Case, recipe: Path, reference: Path) -> str | None:
    """What was lost; None if nothing was."""
    run = desk.new()
    ended = desk.run("train", recipe, f"out_dir={run}", *case.overrides, fault=case.fault, below=run)
    problem = _after(run, ended, case, reference)
    if problem is None:
        if ended.code == 0:  # as if the machine had failed right after the disk had
            forget_after(run, FAILING)
        problem = resumed(desk, recipe, run, reference)
    return problem and f"{case}: {problem}"


def resumed(desk: Desk, recipe: Path, run: Path, reference: Path) -> str | None:
    """What the resumed run lost."""
    again = desk.run("train", recipe, f"out_dir={run}", "--resume")
    if again.code != 0:
        return f"the resume ended with {again.code}: {again.err[-2000:]}"
    lost = difference(run, reference) or torn_event(run)
    return lost and f"after the resume {lost}"


def _after(run: Path, ended: Ended, case: Case, reference: Path) -> str | None:
    """What is wrong with what the run left, and with what it said."""
    saved = steps_saved(run)
    problems = {step: problem for step, folder in saved.items() if (problem := problem_of(folder)) is not None}
    if problems:
        return f"checkpoints are neither whole nor absent: {problems}"
    if missing := set(case.kept) - saved.keys():
        return f"steps {sorted(missing)} were saved before, and are lost"
    well = STEPS in saved
    if case.ends_well is not None and well != case.ends_well:
        return f"the last checkpoint is {'there' if well else 'not there'}; {ended.code}: {ended.err[-2000:]}"
    # Where its folder could be renamed but not synced, it is there, and yet no power cut may come.
    possible = {2} if not well else {0, 2} if case.fault.call == "sync" and case.ends_well is None else {0}
    if ended.code not in possible:
        return f"exit code {ended.code}: {ended.err[-2000:]}"
    return unclear(ended, set(saved)) or (difference(run, reference) if well else None)


def unclear(ended: Ended, saved: set[int]) -> str | None:
    """What a run should have said, or not."""
    if "Traceback" in ended.said:
        return f"a traceback: {ended.err[-2000:]}"
    if ended.code == 0:
        silent = set(range(INTERVAL, STEPS + 1, INTERVAL)) - saved and "could not be saved" not in ended.said
        return f"only {sorted(saved)} saved, and nothing said" if silent else None
    if len(ended.errors) != 1 or not re.search("could not be (saved|written)|cannot be written", ended.errors[0]):
        return f"no clear message: {ended.err!r}"
    return None
