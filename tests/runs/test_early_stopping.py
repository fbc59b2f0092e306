"""A run that no longer improves ends as a finished one, wherever it was resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import pertoken, rows_of, untimed

from pertoken import train
from pertoken.errors import RecipeError
from pertoken.tracking.listener import Listener
from pertoken.training import evaluate as evaluation
from pertoken.training.evaluate import Evaluation, evaluate

pytestmark = pytest.mark.numeric

LOSSES = {2: 3.0, 4: 2.0, 6: 2.0, 8: 2.5, 10: 1.0, 12: 1.0}  # after step 8: twice in a row nothing better than 2.0
KEYS = {
    "train__max_steps": 12,
    "train__batch_size": 4,
    "train__eval_interval": 2,
    "train__early_stopping": 2,
    "checkpoint__save_interval": 1,
    "checkpoint__keep_last": 20,
}


class Told(Listener):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def losses(monkeypatch):
    """Evaluations have the losses of `LOSSES`, by how many went before."""

    def given(start: int = 0) -> None:
        values = iter(list(LOSSES.values())[start:])

        def fake(*arguments: object, **keys: object) -> Evaluation:
            result = evaluate(*arguments, **keys)
            return Evaluation(next(values) * result.num_tokens, *list(vars(result).values())[1:])

        monkeypatch.setattr(evaluation, "evaluate", fake)

    return given


def end_of(run: Path) -> dict[str, object]:
    return json.loads((run / "events.jsonl").read_text().splitlines()[-1])


def test_it_ends_after_as_many_evaluations_in_a_row_without_a_better_loss(world, tmp_path, losses):
    run, told = tmp_path / "run", Told()
    losses()
    result = train(world.recipe(run, **KEYS), listener=told)
    assert (result.step, result.checkpoint.name, result.best_eval_loss) == (8, "step-00000008", 2.0)
    assert told.messages == [
        "train.early_stopping=2: ended after step 8 of 12, saved; 2 evaluations in a row without a better loss than "
        f"2.0000; that one is {run / 'checkpoints' / 'best'}"
    ]
    assert (run / "checkpoints" / "best").resolve().name == "step-00000004"
    assert end_of(run)["fields"] == {"error": None, "why": "early"}
    whole = tmp_path / "whole"
    losses()
    train(world.recipe(whole, **KEYS | {"train__early_stopping": None}))
    rates = [row["lr"] for row in rows_of(whole)]
    assert [row["lr"] for row in rows_of(run)] == rates[:8], "the schedule is that of the whole run"


@pytest.mark.parametrize("step", [5, 6, 7])
def test_a_resumed_run_ends_after_the_same_evaluation(world, tmp_path, losses, step):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    losses()
    train(world.recipe(whole, **KEYS))
    shutil.copytree(whole, resumed, symlinks=True)
    for later in range(step + 1, 9):
        shutil.rmtree(resumed / "checkpoints" / f"step-{later:08d}")
    losses(step // 2)
    assert train(world.recipe(resumed, **KEYS), resume=True).step == 8
    assert untimed(rows_of(resumed)) == untimed(rows_of(whole))
    last = "checkpoints/step-00000008/model.safetensors"
    assert (resumed / last).read_bytes() == (whole / last).read_bytes()


def test_a_run_that_ended_early_stays_ended_until_it_is_given_more_patience(world, tmp_path, losses):
    run, told = tmp_path / "run", Told()
    losses()
    train(world.recipe(run, **KEYS))
    again = train(world.recipe(run, **KEYS), resume=True, listener=told)
    assert (again.step, again.checkpoint.name) == (8, "step-00000008")
    assert told.messages[-1].startswith("train.early_stopping=2: ended after step 8 of 12")
    losses(4)
    assert (
        train(world.recipe(run, **KEYS | {"train__early_stopping": 3, "train__max_steps": 10}), resume=True).step == 10
    )


def test_where_it_could_never_happen_the_start_says_so(world, tmp_path):
    told = Told()
    keys = {"train__max_steps": None, "train__epochs": 1, "train__batch_size": 64, "train__early_stopping": 1}
    train(world.recipe(tmp_path / "run", **keys), listener=told)
    assert told.messages == [
        "train.early_stopping=1: cannot end this run early, which evaluates 1 time (after each epoch, and at the "
        "end); set train.eval_interval"
    ]


def test_without_evaluation_data_it_is_refused(world, tmp_path):
    said = r"^train\.early_stopping=2: there is no evaluation data; set data\.eval_path or data\.eval_fraction"
    with pytest.raises(RecipeError, match=said):
        world.recipe(tmp_path / "run", **KEYS, data__eval_path=[])


def test_the_summary_shows_a_fraction_of_epochs(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "recipe", train__max_steps=None, train__epochs=0.5, train__batch_size=40)
    code, out, err = pertoken("train", recipe, f"out_dir={tmp_path / 'run'}")
    assert code == 0, err
    assert "2 over 0.5 epochs" in out + err
