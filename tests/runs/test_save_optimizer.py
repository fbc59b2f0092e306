"""Checkpoints without optimizer: models that open everywhere, and no run to be resumed from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import pertoken, rows_of, untimed

import pertoken.runs.computation as computation
from pertoken import load_model, train
from pertoken.checkpoints.read import problem_with
from pertoken.runs.replay import replay
from pertoken.tracking.listener import Listener

pytestmark = pytest.mark.numeric

KEYS = {
    "train__max_steps": 6,
    "train__batch_size": 4,
    "checkpoint__save_interval": 2,
    "checkpoint__keep_last": 2,
    "checkpoint__keep_best": False,
    "checkpoint__save_optimizer": False,
}


class Told(Listener):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def optimizers(run: Path) -> dict[str, bool]:
    """Of each checkpoint, whether it has one."""
    folders = sorted((run / "checkpoints").glob("*"))
    return {path.name: bool(list(path.glob("optimizer*"))) for path in folders if path.is_dir()}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """The run with its optimizer."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(world.recipe(run, **KEYS | {"checkpoint__save_optimizer": True}))
    return run


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "step-00000006" / "model.safetensors").read_bytes()


def test_such_checkpoints_are_whole_models_and_the_start_says_what_they_are_not(world, whole, tmp_path):
    run, told = tmp_path / "run", Told()
    result = train(world.recipe(run, **KEYS), listener=told)
    assert optimizers(run) == {"step-00000004": False, "step-00000006": False}, "pruned as others are"
    assert [problem_with(folder) for folder in (run / "checkpoints").iterdir()] == [None, None]
    assert weights(run) == weights(whole)
    assert sum(m.startswith("checkpoint.save_optimizer=false: a run that is killed cannot") for m in told.messages) == 1
    assert torch.equal(next(load_model(run).parameters()), next(load_model(result.checkpoint).parameters()))
    assert train(world.recipe(tmp_path / "next", **KEYS | {"init_from": str(run), "train__max_steps": 1})).step == 1
    again = replay(run, 5)
    assert (again.checkpoint, again.repeated, again.problem) == (None, 4, None), "computed again from the start"


def test_no_run_is_resumed_from_them_and_one_line_says_what_to_do(world, tmp_path):
    run = tmp_path / "run"
    recipe = world.write_recipe(tmp_path / "recipe", **KEYS)
    assert pertoken("train", recipe, f"out_dir={run}")[0] == 0
    code, _, err = pertoken("train", recipe, f"out_dir={run}", "--resume")
    newest = run / "checkpoints" / "step-00000006"
    assert code != 0
    assert " ".join(err.split()) == (
        f"error: {newest}: saved with checkpoint.save_optimizer=false, so no run can be resumed from it; "
        f"start a new one from its weights, with init_from={newest}"
    )


def test_a_run_that_ends_before_its_end_is_saved_with_it_and_continues_to_the_same_bits(world, whole, tmp_path):
    run = tmp_path / "run"
    train(world.recipe(run, **KEYS, train__max_minutes=1e-9))
    assert optimizers(run) == {"step-00000001": True}
    train(world.recipe(run, **KEYS), resume=True)
    assert optimizers(run) == {"step-00000004": False, "step-00000006": False}
    assert weights(run) == weights(whole)
    assert untimed(rows_of(run)) == untimed(rows_of(whole))


def test_after_an_error_the_checkpoint_of_the_last_step_gets_its_optimizer(world, whole, tmp_path, monkeypatch):
    run, real, calls = tmp_path / "run", computation.share_of, 0

    def fails(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("in step 5")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(computation, "share_of", fails)
        with pytest.raises(RuntimeError, match="in step 5") as caught:
            train(world.recipe(run, **KEYS))
    assert caught.value.__notes__ == ["step 4 is saved; continue with resume=True"]
    assert optimizers(run) == {"step-00000002": False, "step-00000004": True}, "in the place of that without"
    train(world.recipe(run, **KEYS), resume=True)
    assert weights(run) == weights(whole)
