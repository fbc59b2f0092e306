"""A recorded step, computed again: what a spike or a non-finite loss is looked at with.

The run is rebuilt at the newest valid checkpoint before the step, the steps between are repeated as the ledger
(`metrics.jsonl`) says they were made, and the step itself is computed without its update, so that the model keeps the
weights that the step met. Nothing is written into the run's folder.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pertoken.checkpoints.read import Checkpoint, newest_checkpoint
from pertoken.data.batch.pack import collate
from pertoken.data.batch.sample import as_count
from pertoken.errors import CheckFailed, CheckpointError, RecipeError
from pertoken.files import user_path
from pertoken.kernels.memory import forget_blocks
from pertoken.recipe.schema import LogConfig, Recipe
from pertoken.runs.assemble import rebuild
from pertoken.runs.computation import Computation, samples_of, update
from pertoken.tracking.ledger import Ledger, lines_of, parsed, ranges
from pertoken.tracking.listener import Listener
from pertoken.tracking.reporter import Reporter
from pertoken.tracking.rows import StepRow
from pertoken.tracking.run_files import refuse_newer_run
from pertoken.training.step import NonFiniteStep

__all__ = ["Compared", "Replay", "SampleLoss", "for_json", "replay"]

_EXACT = ("positions", "num_tokens")
_ROUNDED = ("loss_sum", "grad_norm")
# Relative. The same split of the same steps on the same kind of machine gives the same bits; another number of ranks or
# other micro-batches add up in another order, and every step from the checkpoint on builds on the difference.
_ROUNDING = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}


@dataclass(frozen=True)
class Compared:
    """One figure of the step's row, recorded and computed again. A non-finite one is None, as in the ledger."""

    name: str
    recorded: Any
    replayed: Any
    verdict: Literal["equal", "within rounding", "different"]  # equal: bit for bit


@dataclass(frozen=True)
class SampleLoss:
    """A sample of the step, under the weights that the step met."""

    sample_id: int
    where: str  # file:line
    tokens: int  # inputs
    num_tokens: float  # supervised
    loss_sum: float  # nats

    @property
    def loss(self) -> float:
        """The mean over supervised tokens."""
        return self.loss_sum / self.num_tokens if self.num_tokens else 0.0


@dataclass(frozen=True)
class Replay:
    """A step computed again. `computation` holds the weights that the step met, and the data."""

    step: int
    checkpoint: Path | None  # where it was rebuilt from; None: from the run's start
    repeated: int  # steps between that and this one
    compared: tuple[Compared, ...]  # empty where the ledger has no row of the step
    problem: str | None  # why the step's loss or gradient is not finite
    samples: tuple[SampleLoss, ...]  # worst first, non-finite ones before all
    rounding: float  # relative, what counts as rounding in the run's dtype
    computation: Computation
    tokenizer: Any

    @property
    def different(self) -> tuple[Compared, ...]:
        return tuple(c for c in self.compared if c.verdict == "different")

    def raise_if_different(self) -> None:
        """Raises CheckFailed, with the differences, unless the step is what the ledger says or is not in it."""
        if self.different:
            shown = ", ".join(f"{c.name} {c.replayed}, recorded {c.recorded}" for c in self.different)
            raise CheckFailed(
                f"step {self.step}: not what metrics.jsonl says, beyond rounding ({self.rounding:g} in "
                f"{self.computation.recipe.train.dtype}): {shown}"
            )

    def to_dict(self) -> dict[str, Any]:
        """For JSON, by way of `for_json`."""
        samples = [{**asdict(s), "loss": s.loss} for s in self.samples]
        return {
            "step": self.step,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "repeated": self.repeated,
            "compared": [asdict(c) for c in self.compared],
            "problem": self.problem,
            "rounding": self.rounding,
            "samples": samples,
        }


def replay(run_dir: Path, step: int, *, device: str = "auto", listener: Listener | None = None) -> Replay:
    """Compute step `step` (from 1) of a run again, on this one process, and compare it with the ledger.

    The step after the last recorded one may be asked for too: there is nothing to compare, but its samples are shown.
    `device="auto"` is the run's own where this machine has it. Raises RecipeError for a step that the run does not
    have, CheckpointError for a folder that is no run or data that has changed, and CheckFailed where a step before
    this one cannot be repeated.
    """
    reporter = Reporter([listener] if listener is not None else ())
    run_dir = user_path(run_dir, "run")
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: no such run; name the out_dir of one")
    refuse_newer_run(run_dir)
    known, _ = newest_checkpoint(run_dir)
    rows, last, missing = _read_rows(run_dir / "metrics.jsonl", known)
    if not 1 <= step <= last + 1:
        raise RecipeError(f"step={step}: the run has steps 1 to {last}; name one, or the next one")
    if missing is not None:
        reporter.message(missing)
    checkpoint, damaged = newest_checkpoint(run_dir, at_most=step - 1, with_optimizer=True)
    for line in damaged:
        reporter.message(line)
    start = 0 if checkpoint is None else checkpoint.step
    if gaps := [s for s in range(start + 1, step) if s not in rows]:
        raise CheckpointError(
            f"{run_dir / 'metrics.jsonl'}: no row of step {ranges(gaps)}, on the way to step {step}; restore the file"
        )
    run = rebuild(_recipe(run_dir, checkpoint, device), checkpoint, known, reporter)
    computation = run.computation
    try:
        repeated = step - 1 - run.start_step
        reporter.message(
            f"step {step} from {'the start' if checkpoint is None else checkpoint.folder.name}: "
            f"{repeated} step{'' if repeated == 1 else 's'} before it to repeat"
        )
        for before in range(run.start_step + 1, step):
            reporter.stepped(_repeat(computation, rows[before], before), run.summary)
        row, problem = _compute(computation, step)
    finally:
        forget_blocks()
    rounding = _ROUNDING[computation.recipe.train.dtype]
    recorded = rows.get(step)
    return Replay(
        step=step,
        checkpoint=None if checkpoint is None else checkpoint.folder,
        repeated=repeated,
        compared=() if recorded is None else _compare(recorded, row, rounding),
        problem=problem,
        samples=_sample_losses(computation, step),
        rounding=rounding,
        computation=computation,
        tokenizer=run.tokenizer,
    )


@dataclass(frozen=True)
class _Recorded:
    """What the ledger says of a step. Its figures are JSON of whatever type: somebody may have edited them."""

    lr: float | None
    skipped: bool
    figures: dict[str, Any]


def _repeat(computation: Computation, recorded: _Recorded, step: int) -> StepRow:
    """A step on the way, as it was made: with its learning rate, and without its update if that was skipped."""
    this = samples_of(computation, step)
    try:
        row = update(computation, this, skips=lambda _: recorded.skipped, lr=recorded.lr)
    except NonFiniteStep as problem:
        raise CheckFailed(
            f"step {step}: {problem}, which the run was not; the checkpoint, the data or the code is another one"
        ) from None
    rounding = _ROUNDING[computation.recipe.train.dtype]
    different = [c.name for c in _compare(recorded, row.to_json(), rounding) if c.verdict == "different"]
    if different:
        computation.reporter.message(f"step {step}, on the way: {', '.join(different)} not as recorded")
    return row


def _compute(computation: Computation, step: int) -> tuple[dict[str, Any], str | None]:
    """The figures of the step as JSON, and why they are not finite. The weights stay as they are."""
    this = samples_of(computation, step)
    try:
        return update(computation, this, skips=lambda _: True).to_json(), None
    except NonFiniteStep as problem:
        num_tokens = as_count(computation.store.num_tokens[this.sample_ids].sum())
        return {"positions": [this.position_start, this.position_end], "num_tokens": num_tokens}, str(problem)


def _compare(recorded: _Recorded, replayed: dict[str, Any], rounding: float) -> tuple[Compared, ...]:
    compared = []
    for name in (*_EXACT, *_ROUNDED):
        a, b = recorded.figures.get(name), replayed.get(name)
        verdict: Literal["equal", "within rounding", "different"] = "equal" if a == b else "different"
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        if verdict == "different" and name in _ROUNDED and numbers and math.isclose(a, b, rel_tol=rounding):  # type: ignore[arg-type]
            verdict = "within rounding"
        compared.append(Compared(name, a, b, verdict))
    return tuple(compared)


def for_json(value: Any) -> Any:
    """`value` with None for every number in it that is not finite, as in the ledger."""
    if isinstance(value, dict):
        return {key: for_json(v) for key, v in value.items()}
    if isinstance(value, list):
        return [for_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def _sample_losses(computation: Computation, step: int) -> tuple[SampleLoss, ...]:
    """Each sample alone, in the precision of training."""
    store, precision = computation.store, computation.state.precision
    losses = []
    for i in samples_of(computation, step).sample_ids.tolist():
        with precision.autocast():
            out = computation.model(collate([store[i]]).to(precision.device), computation.state.execution)
        losses.append(SampleLoss(i, store.where(i), int(store.lengths[i]), float(out.num_tokens), float(out.loss_sum)))
    return tuple(sorted(losses, key=lambda s: (math.isfinite(s.loss), -s.loss if math.isfinite(s.loss) else 0.0)))


def _recipe(run_dir: Path, checkpoint: Checkpoint | None, device: str) -> Recipe:
    """As at the checkpoint, or as the run was started; on this machine, and telling no tracker."""
    if checkpoint is not None:
        recipe = checkpoint.recipe
    elif (run_dir / "recipe.toml").is_file():
        recipe = Recipe.load(run_dir / "recipe.toml")
    else:
        raise CheckpointError(
            f"{run_dir}: no valid checkpoint before the step, and no recipe.toml to start from; restore one of them"
        )
    if device == "auto":
        device = recipe.train.device
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not here.get(device.partition(":")[0], True):
            device = "cpu"
    train = recipe.train.model_copy(update={"device": device})
    return recipe.model_copy(update={"out_dir": str(run_dir), "train": train, "log": LogConfig()})


def _read_rows(path: Path, known: Checkpoint | None) -> tuple[dict[int, _Recorded], int, str | None]:
    """The rows by step, the last step, and what to say of rows that are not as the run wrote them.

    A torn last line is left out, as on a resume. Rows that the file lacks come from the checkpoint `known`; for those
    that the file has, its learning rate and whether the update was skipped do, since the steps after them depend on
    these. Raises CheckpointError where there is neither a file nor a checkpoint that knows the rows.
    """
    ledger = Ledger() if known is None else Ledger.load(known.folder, known.step)
    try:
        if not path.is_file() and not len(ledger):
            raise CheckpointError(f"{path}: cannot be read (no such file); name the out_dir of a run")
        lines = [row for line in lines_of(path) if (row := parsed(line)) is not None] if path.is_file() else []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); name the out_dir of a run") from None
    lines = [row for row in lines if isinstance(row.get("lr"), float | int)]
    most = 2 * max(len(lines), len(ledger))  # a step far beyond the rows that are there: somebody has edited it
    rows: dict[int, dict[str, Any]] = {}
    for row in lines:
        if row["step"] <= most:
            rows.setdefault(row["step"], row)
    last = max(len(ledger), *rows, 0)
    rebuilt = [step for step in range(1, len(ledger) + 1) if ledger.has(step) and step not in rows]
    for step in range(1, len(ledger) + 1):
        if ledger.has(step):
            own = ledger.row(step)
            rows[step] = rows.get(step, own) | {key: own.get(key) for key in ("lr", "skipped")}
    said = [f"rows of steps {ranges(rebuilt)} taken from {known.folder.name}"] if rebuilt and known is not None else []
    if gaps := [step for step in range(1, last + 1) if step not in rows]:
        said.append(f"rows of steps {ranges(gaps)} are missing")
    recorded = {step: _Recorded(row["lr"], bool(row.get("skipped")), row) for step, row in rows.items()}
    return recorded, last, f"{path}: {'; '.join(said)}" if said else None
