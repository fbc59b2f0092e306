"""Whatever ends training: the last whole step is saved first, and the error stays what it was."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from tiny import rows_of, untimed

import pertoken.runs.computation as computation
import pertoken.runs.loop as loop
import pertoken.tracking.trackers.wandb as trackers_wandb
from pertoken import train
from pertoken.checkpoints.saver import Saver
from pertoken.errors import CheckpointError, PertokenError
from pertoken.runs.spikes import Spikes
from pertoken.tracking.listener import Heard, Listener
from pertoken.training import evaluate
from pertoken.training.optimizers.adamw import AdamW

KEYS = {
    "train__max_steps": 6,
    "train__batch_size": 4,
    "train__eval_interval": 2,
    "checkpoint__save_interval": 100,
    "checkpoint__keep_best": False,
}
SAVED = "step 3 is saved; continue with resume=True"


def saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "checkpoints/step-00000006").glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """The undisturbed run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(world.recipe(run, **KEYS))
    return run


def notes(caught: pytest.ExceptionInfo[BaseException]) -> list[str]:
    return getattr(caught.value, "__notes__", [])


def failing(monkeypatch: pytest.MonkeyPatch, where: object, name: str, problem: BaseException, call: int) -> None:
    """The `call`-th call of `where.name` raises, and no other."""
    real, calls = getattr(where, name), 0

    def fails(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise problem
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, fails)


PROBLEMS = [
    OSError(errno.EIO, "Input/output error"),
    RuntimeError("shapes"),
    MemoryError(),
    KeyError("a bug"),
    SystemExit(4),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_what_fails_before_an_update_is_raised_after_the_step_before_was_saved(
    world, whole, tmp_path, monkeypatch, problem, background
):
    problem = type(problem)(*problem.args)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        failing(patch, computation, "share_of", problem, call=4)  # the share of step 4: what reads the store
        with pytest.raises(type(problem)) as caught:
            train(world.recipe(run, **KEYS, checkpoint__async_save=background))
    assert caught.value is problem
    assert notes(caught) == [SAVED]
    assert saved(run) == [3]
    train(world.recipe(run, **KEYS), resume=True)
    assert contents(run) == contents(whole)
    assert untimed(rows_of(run)) == untimed(rows_of(whole))


def test_an_error_lets_the_save_under_way_be_the_one_that_counts(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    failing(monkeypatch, computation, "share_of", RuntimeError("x"), call=4)
    with pytest.raises(RuntimeError) as caught:
        train(world.recipe(run, **{**KEYS, "checkpoint__save_interval": 3}))
    assert notes(caught) == [SAVED]
    assert saved(run) == [3]


@pytest.mark.parametrize("times", [0, 1], ids=["at its start", "half done"])
def test_weights_that_an_update_may_have_changed_are_not_saved_as_if_it_had_not(world, tmp_path, monkeypatch, times):
    run = tmp_path / "run"

    def breaks(self: torch.optim.Optimizer) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            if times:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1.0)
            raise RuntimeError("in the update")
        real(self)

    real, steps = AdamW.step, 0
    monkeypatch.setattr(AdamW, "step", breaks)
    with pytest.raises(RuntimeError, match="in the update") as caught:
        train(world.recipe(run, **KEYS | {"checkpoint__save_interval": 2}))
    assert notes(caught) == [
        "step 4 was in the middle of its update, so nothing was saved; the last checkpoint is of step 2"
    ]
    assert saved(run) == [2]


def test_a_step_whose_evaluation_fails_is_saved_with_its_row(world, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        failing(patch, evaluate, "evaluate", RuntimeError("in the evaluation"), call=2)
        with pytest.raises(RuntimeError, match="in the evaluation") as caught:
            train(world.recipe(run, **KEYS))
    assert notes(caught) == ["step 4 is saved; continue with resume=True"]
    assert saved(run) == [4]
    train(world.recipe(run, **KEYS), resume=True)
    assert contents(run) == contents(whole)


def test_a_step_whose_spike_cannot_be_described_is_saved_with_its_row(world, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Spikes, "ratio", lambda spikes, norm: 11.0 if len(spikes.norms) == 3 else None)
        failing(patch, loop, "spike_message", OSError(errno.EIO, "Input/output error"), call=1)
        with pytest.raises(OSError, match="Input/output") as caught:
            train(world.recipe(run, **KEYS))
    assert notes(caught) == ["step 4 is saved; continue with resume=True"]
    assert saved(run) == [4]
    train(world.recipe(run, **KEYS), resume=True)
    assert contents(run) == contents(whole)


def test_an_error_before_the_first_step_is_over_saves_nothing_and_says_so(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    failing(monkeypatch, computation, "share_of", RuntimeError("x"), call=1)
    with pytest.raises(RuntimeError) as caught:
        train(world.recipe(run, **KEYS))
    assert notes(caught) == ["no step was made, so there is nothing to save"]
    assert saved(run) == []


def test_an_error_that_cannot_be_answered_with_a_save_stays_the_error(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    failing(monkeypatch, computation, "share_of", RuntimeError("first"), call=4)
    failing(monkeypatch, Saver, "start", CheckpointError("no space\nat all"), call=1)
    with pytest.raises(RuntimeError, match="first") as caught:
        train(world.recipe(run, **KEYS))
    assert notes(caught) == ["step 3 could not be saved (CheckpointError: no space at all); nothing is saved yet"]


def test_a_step_is_not_made_again_once_memory_ran_out_in_its_update(world, tmp_path, monkeypatch):
    run, steps = tmp_path / "run", 0

    def breaks(self: torch.optim.Optimizer) -> None:
        nonlocal steps
        steps += 1
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(AdamW, "step", breaks)
    with pytest.raises(PertokenError, match="out of memory while the weights were updated"):
        train(world.recipe(run, **KEYS))
    assert steps == 1


class Breaks(Listener):
    """Raises when it hears of something."""

    def __init__(self, what: str, problem: BaseException, at: int = 1) -> None:
        self.heard, self._what, self._problem, self._at = [], what, problem, at

    def __getattribute__(self, name: str) -> object:
        if name not in ("stepped", "saved", "evaluating", "gradients", "message"):
            return super().__getattribute__(name)

        def hear(*args: object) -> None:
            self.heard.append(name)
            if name == self._what and self.heard.count(name) == self._at:
                raise self._problem

        return hear


@pytest.mark.parametrize(
    ("what", "at", "step"), [("stepped", 3, 3), ("evaluating", 2, 4), ("gradients", 1, 1), ("saved", 1, 3)]
)
@pytest.mark.parametrize("problem", [ValueError("theirs"), SystemExit(3)], ids=["ValueError", "SystemExit"])
def test_what_a_listener_raises_ends_training_after_its_step_saved(world, tmp_path, what, at, step, problem):
    run, problem = tmp_path / "run", type(problem)(*problem.args)
    keys = KEYS | {"checkpoint__save_interval": 2, "checkpoint__async_save": True, "log__grad_stats": True}
    listener = Breaks(what, problem, at)
    with pytest.raises(type(problem)) as caught:
        train(world.recipe(run, **keys), listener=listener)
    assert caught.value is problem
    assert notes(caught) == [f"step {saved(run)[-1]} is saved; continue with resume=True"]
    assert saved(run)[-1] == len(rows_of(run))
    if what != "saved":  # told in the background, a step or so later
        assert saved(run)[-1] == step
    assert listener.heard[-1] == what


def test_what_a_listener_raises_at_the_very_end_is_raised_once_all_is_saved(world, whole, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="theirs"):
        train(world.recipe(run, **KEYS), listener=Breaks("saved", ValueError("theirs")))
    assert contents(run) == contents(whole)


def test_a_listener_that_has_failed_hears_no_more():
    listener = Breaks("message", ValueError("theirs"))
    heard = Heard(listener)
    heard.message("a")
    heard.message("b")
    assert listener.heard == ["message"]
    assert isinstance(heard.problem, ValueError)


@pytest.mark.parametrize("where", ["log", "close"])
def test_no_tracker_ends_training(world, whole, tmp_path, monkeypatch, where):
    class Tracker:
        run_id = None
        made = ()

        def __init__(self, *args: object) -> None: ...

        def log(self, row: object) -> None:
            if where == "log":
                raise RuntimeError("the network")

        def close(self) -> None:
            if where == "close":
                raise RuntimeError("the network")

    monkeypatch.setattr(trackers_wandb, "_WandB", Tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    messages = []

    class Told(Listener):
        def message(self, text: str) -> None:
            messages.append(text)

    run = tmp_path / "run"
    train(world.recipe(run, **KEYS, log__trackers=["wandb"]), listener=Told())
    assert contents(run) == contents(whole)
    assert [text for text in messages if "wandb" in text and "the network" in text] == messages
    assert len(messages) == 1


def test_the_state_that_is_saved_after_an_error_is_that_of_a_run_that_stops_there(world, tmp_path, monkeypatch):
    stopped, failed = tmp_path / "stopped", tmp_path / "failed"
    train(world.recipe(stopped, **KEYS | {"train__max_minutes": 1e-9}))
    failing(monkeypatch, computation, "share_of", RuntimeError("x"), call=2)
    with pytest.raises(RuntimeError):
        train(world.recipe(failed, **KEYS))

    def state(run: Path) -> dict[str, object]:
        content = json.loads((run / "checkpoints/step-00000001/trainer_state.json").read_text())
        for key in ("out_dir", "train.max_minutes"):
            *sections, leaf = key.split(".")
            inner = content["recipe"]
            for section in sections:
                inner = inner[section]
            inner.pop(leaf, None)
        return content

    assert state(failed) == state(stopped)
