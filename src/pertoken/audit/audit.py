"""A recipe's data looked through: what is read, what would be lost or trained wrongly, and where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pertoken.audit.plan import Estimate, Plan, estimate, plan
from pertoken.audit.rows import find_answers, find_duplicates, find_in_both
from pertoken.data.batch.sample import Sample, as_count
from pertoken.data.files.kinds import kind_of
from pertoken.data.findings import KINDS, Findings
from pertoken.data.formats_found import FormatsFound
from pertoken.data.store.dataset import Dataset
from pertoken.data.store.store import Part, Store
from pertoken.data.tokens.tokenizer import special_ids
from pertoken.data.view import supervised_pieces
from pertoken.errors import DataError
from pertoken.prove.checks import trained_otherwise
from pertoken.recipe.schema import Recipe
from pertoken.runs.data import RunData, load_data
from pertoken.runs.needs import architecture
from pertoken.tracking.listener import Heard, Listener
from pertoken.training.parallel import World

__all__ = ["Audit", "Example", "FileAudit", "PartAudit", "Problem", "audit", "write_samples"]

_PLACES = 20  # of a problem that are named
_BINS = 16  # of the histogram, at least half of them used
_LOST = ("skipped", "overlong", "truncated", "unsupervised", "too_short")
_EXAMPLES = 5
_CHECKED, _CHECKED_LONGEST = 32, 3  # samples that are worked out a second time
_EXAMPLE_TOKENS = 2000
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileAudit:
    """What one file gives."""

    file: str
    kind: str  # what its content is
    source: str | None  # its name among [[data.sources]]
    repeat: int  # how often each of its samples comes in an epoch
    rows: int | None  # None for held-out rows of the training files, which are counted there
    samples: int
    tokens: int  # inputs
    num_tokens: int | float  # supervised, or the sum of their weights
    skipped: int
    overlong: int
    truncated: int
    unsupervised: int
    too_short: int


@dataclass(frozen=True)
class PartAudit:
    """The training data or the evaluation data."""

    part: str  # "train" or "eval"
    held_out: bool  # from the training files
    files: tuple[FileAudit, ...]
    formats: dict[str, int]  # rows of each
    rows: int | None
    samples: int
    tokens: int
    num_tokens: int | float
    lengths: dict[str, list[int]]  # edges and counts of a histogram of the samples' inputs


@dataclass(frozen=True)
class Problem:
    """One way in which data are other than they should be, or than their author may think."""

    kind: str  # of data/findings.py; "bad_row", "not_as_rendered", "unused_key"
    harms: bool  # a sample is lost, or something else is trained than the row says
    what: str
    count: int
    places: tuple[str, ...]  # file:line of the first 20


@dataclass(frozen=True)
class Example:
    """A sample as text."""

    source: str
    why: str
    pieces: tuple[tuple[str, bool], ...]  # (text, supervised)


@dataclass(frozen=True)
class Audit:
    """All that was found. `ok`: nothing would be lost or trained wrongly."""

    recipe: str
    stage: str
    tokenizer: str
    max_seq_len: int
    parts: tuple[PartAudit, ...]
    plan: Plan
    estimate: Estimate | None  # None where no configuration says how large the model is
    problems: tuple[Problem, ...]  # what harms first
    remarks: tuple[str, ...]  # messages on the way: files passed over, splits left out
    examples: tuple[Example, ...]
    data: RunData = field(repr=False, compare=False)

    @property
    def ok(self) -> bool:
        return not any(problem.harms for problem in self.problems)

    @property
    def harmed(self) -> int:
        """How many findings there are of the problems that harm."""
        return sum(problem.count for problem in self.problems if problem.harms)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as docs/audit.md describes them."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "data"}
        plain = json.loads(json.dumps({**values, "ok": self.ok, "format_version": FORMAT_VERSION}, default=asdict))
        assert isinstance(plain, dict)
        return plain


class _Remarks(Heard):
    """Passes everything on, and keeps the messages. None is said twice, although bad rows need a second reading."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener)
        self.kept: list[str] = []

    def message(self, text: str) -> None:
        if text not in self.kept:
            self.kept.append(text)
            super().message(text)


def audit(recipe: Recipe, listener: Listener | None = None, *, name: str = "") -> Audit:
    """Look through a recipe's data, tokenized as for training and kept for it. No weights are read.

    `name`: of the recipe, for the result. Bad rows are passed over, whatever `data.on_bad_row` says, and become
    problems. Raises what `train` raises for the recipe and the tokenizer, and DataError where no row can be used.
    """
    remarks = _Remarks(listener or Listener())
    data = _load(recipe, remarks)
    config = architecture(recipe, data.init_from, len(data.tokenizer))
    steps = plan(recipe, data.train, config)
    held_out = data.eval is not None and not recipe.data.eval_path
    parts = [_part("train", data.train, held_out=False)]
    if data.eval is not None:
        parts.append(_part("eval", data.eval, held_out=held_out))
    problems = [*_not_as_rendered(recipe, data), *_problems(recipe, data, held_out=held_out)]
    return Audit(
        recipe=name,
        stage=recipe.stage,
        tokenizer=recipe.data.tokenizer or recipe.init_from or "",
        max_seq_len=recipe.data.max_seq_len,
        parts=tuple(parts),
        plan=steps,
        estimate=estimate(recipe, data, config, steps),
        problems=tuple(problems),
        remarks=tuple(remarks.kept),
        examples=tuple(_examples(data, problems)),
        data=data,
    )


def _load(recipe: Recipe, listener: Listener) -> RunData:
    """The data as `train` loads them, and where bad rows forbid that without those: they are counted all the same."""
    try:
        return load_data(recipe, listener, World(), with_weights=False)
    except DataError as error:
        overlong = "drop" if recipe.data.overlong == "error" else recipe.data.overlong
        tolerant = recipe.data.model_copy(update={"on_bad_row": "skip", "overlong": overlong})
        if tolerant == recipe.data:
            raise
        try:
            return load_data(recipe.model_copy(update={"data": tolerant}), listener, World(), with_weights=False)
        except DataError:
            raise error from None


def _part(name: str, data: Dataset, *, held_out: bool) -> PartAudit:
    files, formats = [file for part in data.parts for file in _files(part, held_out=held_out)], FormatsFound()
    for part in data.parts if not held_out else ():
        formats.extend(part.store.report.formats)
    lengths = np.concatenate([part.store.lengths for part in data.parts])
    width = max(1, 2 ** int(np.ceil(np.log2(lengths.max() / _BINS))))
    edges = np.arange(0, lengths.max() + width, width)
    histogram = np.histogram(lengths, edges + 1)[0]  # a sample of as many inputs as an edge says is below it
    return PartAudit(
        part=name,
        held_out=held_out,
        files=tuple(files),
        formats=formats.rows,
        rows=None if held_out else sum(part.store.report.rows for part in data.parts),
        samples=len(lengths),
        tokens=int(lengths.sum()),
        num_tokens=as_count(sum(part.store.count() for part in data.parts)),
        lengths={"edges": edges.tolist(), "counts": histogram.tolist()},
    )


def _files(part: Part, *, held_out: bool) -> Iterator[FileAudit]:
    store = part.store
    sums = [store.sums_by_file(values) for values in (np.ones(len(store)), store.lengths, store.num_tokens)]
    for file, count, samples, tokens, num_tokens in zip(store.files, store.report.by_file, *sums, strict=True):
        lost = dict.fromkeys(_LOST, 0) if held_out else {key: getattr(count, key) for key in _LOST}
        rows = None if held_out else count.rows
        counts = (rows, int(samples), int(tokens), num_tokens)
        yield FileAudit(file, str(kind_of(Path(file))), part.name or None, part.repeat, *counts, **lost)


def _problems(recipe: Recipe, data: RunData, *, held_out: bool) -> list[Problem]:
    """Of training and evaluation data together, what harms first, then in the order of KINDS."""
    ends = special_ids(data.tokenizer) | {data.eos_token_id}
    found: dict[str, Problem] = {}
    train = [part.store for part in data.train.parts]
    evaluation = [] if data.eval is None else [part.store for part in data.eval.parts]
    for store in (*train, *evaluation):
        findings = Findings()
        if store in train or not held_out:  # the report is of both
            findings.extend(store.report.findings)
        if recipe.stage == "sft":
            find_answers(store, ends, recipe.data.max_seq_len, findings)
        same_part = train if store in train else evaluation
        find_duplicates(store, same_part[: same_part.index(store)], findings)
        if store in evaluation and not held_out:
            find_in_both(train, store, findings)
        for kind in findings.kinds():
            places = [f"{store.files[file]}:{line}" for file, line in findings.places(kind)]
            _merge(found, kind, KINDS[kind].harms, KINDS[kind].what, findings.count(kind), places)
    for kind, problem in list(found.items()):
        what = KINDS[kind].said(problem.count)
        found[kind] = Problem(kind, problem.harms, what, problem.count, problem.places)
    found.pop("skipped", None)  # its causes say more
    order = {kind: i for i, kind in enumerate(KINDS)}
    known = sorted(found.values(), key=lambda problem: (not problem.harms, order[problem.kind]))
    reports = [store.report for store in (train if held_out else [*train, *evaluation])]
    bad = [
        Problem(
            "bad_row",
            True,
            f"{_rows(cause.count)}, {cause.first.field}: {cause.first.problem}",
            cause.count,
            tuple(cause.places),
        )
        for report in reports
        for cause in report.skipped_rows.causes()
    ]
    unused = [
        Problem(
            "unused_key",
            False,
            f"{_rows(rows)} with a key of {of}s that is not used: {key}",
            rows,
            (f"{report.files[file]}:{line}",),
        )
        for report in reports
        for of, key, rows, (file, line) in report.unused.found()
    ]
    return [*bad, *known, *unused]


def _not_as_rendered(recipe: Recipe, data: RunData) -> Iterator[Problem]:
    """Some samples, and the longest ones, against a second reading of their rows, as the proof makes it."""
    for samples in filter(None, (data.train, data.eval)):
        spread = np.linspace(0, len(samples) - 1, num=min(len(samples), _CHECKED), dtype=np.int64)
        longest = np.argsort(samples.lengths, kind="stable")[-_CHECKED_LONGEST:]
        ids = list(dict.fromkeys(int(i) for i in (*spread, *longest)))
        for i, how in trained_otherwise(samples, ids, recipe, data.tokenizer).items():
            what = f"1 sample is not what its row and the chat template say: {how}"
            yield Problem("not_as_rendered", True, what, 1, (samples.where(i),))


def _rows(count: int) -> str:
    return f"{count:,} row{'s' if count > 1 else ''}"


def _merge(found: dict[str, Problem], kind: str, harms: bool, what: str, count: int, places: list[str]) -> None:
    before = found.get(kind)
    if before is not None:
        count, places = before.count + count, [*before.places, *places]
    found[kind] = Problem(kind, harms, what, count, tuple(places[:_PLACES]))


def _examples(data: RunData, problems: list[Problem]) -> Iterator[Example]:
    """The first sample of the training and of the evaluation data, and one for each kind of problem with samples."""
    both, shown = [part for part in (data.train, data.eval) if part is not None], set[str]()
    wanted: list[tuple[str, tuple[Store, int] | None]] = [("the first sample", (data.train.parts[0].store, 0))]
    if data.eval is not None:
        wanted.append(("the first sample of the evaluation data", (data.eval.parts[0].store, 0)))
    for problem in problems:
        found_in = (_sample_of(part, place) for place in problem.places[:1] for part in both)
        wanted.append((problem.what, next(filter(None, found_in), None)))
    for why, found in wanted:
        if found is None or len(shown) == _EXAMPLES or (source := found[0].where(found[1])) in shown:
            continue
        shown.add(source)
        sample = found[0][found[1]]
        cut = Sample(sample.tokens[: _EXAMPLE_TOKENS + 1], sample.loss_mask[:_EXAMPLE_TOKENS])
        yield Example(source, why, tuple(supervised_pieces(cut, data.tokenizer)))


def _sample_of(data: Dataset, place: str) -> tuple[Store, int] | None:
    """The first sample of a row, by its `file:line`; None where it has none."""
    file, _, line = place.rpartition(":")
    for part in data.parts:
        if file in (store := part.store).files:
            found = np.flatnonzero((store.file_ids == store.files.index(file)) & (store.lines == int(line)))
            if len(found):
                return store, int(found[0])
    return None


def write_samples(audit: Audit, path: Path) -> None:
    """Write every training sample as a line of JSON (docs/audit.md). Raises OSError."""
    with path.open("w", encoding="utf-8") as file:
        for part in audit.data.train.parts:
            for i in range(len(part.store)):
                sample = part.store[i]
                mask = sample.loss_mask
                row = {
                    "source": part.store.where(i),
                    "epoch_repeat": part.repeat,
                    "input_ids": sample.tokens.tolist(),
                    "loss_mask": mask.tolist() if mask.dtype.kind == "f" else mask.astype(int).tolist(),
                    "pieces": supervised_pieces(sample, audit.data.tokenizer),
                }
                file.write(json.dumps(row) + "\n")
