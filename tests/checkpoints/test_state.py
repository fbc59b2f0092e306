"""The trainer's state has types and a version: earlier ones are read, newer ones refused, damaged ones named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pertoken.checkpoints import state as module
from pertoken.checkpoints.state import STATE_VERSION, TrainerState, read_state
from pertoken.errors import CheckpointError
from pertoken.recipe.schema import Recipe

OLD = Path(__file__).parents[1] / "fixtures" / "old_run" / "checkpoints" / "step-00000004" / "trainer_state.json"
WHERE = Path("trainer_state.json")
MOVED = {"train.compile": {"train.engine": "auto"}}  # what the fixture's values are today


def old() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(OLD.read_text())
    return values


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_every_key_of_an_earlier_version_is_kept_moved_or_named():
    before = old()
    assert "format_version" not in before, "a state of version 1"
    state, remarks = read_state(OLD.read_text(), WHERE)
    after = json.loads(state.to_json())
    assert after.pop("format_version") == STATE_VERSION
    for key in before.keys() - {"recipe"}:
        assert after[key] == before[key], key
    now = Recipe.parse(state.recipe).flat()
    for key, value in flat(before["recipe"]).items():
        if key in MOVED:
            assert key not in now
            assert flat(state.recipe).items() >= MOVED[key].items()
        elif key in module.GONE_KEYS:
            assert any(key in remark for remark in remarks)
        elif value not in ([], {}):
            assert key in now or key.startswith("model."), key
            assert flat(state.recipe)[key] == value, key


def test_a_state_is_read_as_it_was_written():
    state, remarks = read_state(OLD.read_text(), WHERE)
    assert read_state(state.to_json(), WHERE) == (state, remarks)
    assert json.loads(state.to_json())["format_version"] == STATE_VERSION


def test_a_recipe_key_that_moved_is_migrated_and_one_that_is_gone_is_named_in_a_line(monkeypatch):
    monkeypatch.setattr(module, "GONE_KEYS", {"log.color": "nothing is colored any more"})
    values = old()
    values["recipe"]["train"] |= {"compile": "off"}
    values["recipe"]["log"]["color"] = "red"
    state, remarks = read_state(json.dumps(values), WHERE)
    assert state.recipe["train"]["engine"] == "plain"
    assert "compile" not in state.recipe["train"]
    assert "color" not in state.recipe["log"]
    assert remarks == ("trainer_state.json: log.color='red' of an earlier version: nothing is colored any more",)
    state, remarks = read_state(json.dumps(values | {"format_version": STATE_VERSION}), WHERE)
    assert (state.recipe["log"]["color"], remarks) == ("red", ()), "a state of this version has this version's keys"
    values["recipe"]["train"]["compile"] = "maybe"
    with pytest.raises(CheckpointError, match=r"^trainer_state\.json: recipe: train\.compile='maybe': must be "):
        read_state(json.dumps(values), WHERE)


def test_a_newer_version_is_refused_with_one_line():
    with pytest.raises(CheckpointError) as caught:
        read_state(json.dumps(old() | {"format_version": STATE_VERSION + 1, "new": 1}), WHERE)
    assert str(caught.value) == (
        f"trainer_state.json: format_version={STATE_VERSION + 1}: written by a newer version of pertoken, this one "
        f"reads up to {STATE_VERSION}; nothing was changed. Update pertoken"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": "4"}, "step='4': Input should be a valid integer"),
        ({"step": -1}, "step=-1: Input should be greater than or equal to 0"),
        ({"recipe": []}, "recipe=[]: "),
        ({"scaler": None}, "scaler=None: "),
        ({"grad_norms": [1.0, "a\nb"]}, r"grad_norms.1='a\nb': Input should be a valid number"),
        ({"probe": {"sample_id": 1}}, "probe.num_tokens: missing"),
        ({"micro_batch_tokens": True}, "micro_batch_tokens=True: "),
        ({"surplus": 1}, "surplus: no such field"),
        ({"format_version": "2"}, "format_version='2': must be a whole number from 1"),
        ({"format_version": 0}, "format_version=0: must be a whole number from 1"),
    ],
    ids=str,
)
def test_a_field_that_is_not_what_it_must_be_is_named_in_one_line(change, said):
    with pytest.raises(CheckpointError) as caught:
        read_state(json.dumps(old() | change), WHERE)
    assert str(caught.value).startswith(f"trainer_state.json: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["step", "recipe", "data", "scaler", "micro_batch_tokens"])
def test_a_field_that_no_resume_can_do_without_is_named(key):
    values = {k: v for k, v in old().items() if k != key}
    with pytest.raises(CheckpointError, match=f"^trainer_state.json: {key}: missing; restore the file$"):
        read_state(json.dumps(values), WHERE)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '"x"', "NaN"], ids=lambda t: t[:3])
def test_what_is_no_object_is_no_state(text):
    with pytest.raises(CheckpointError, match="not a trainer state of pertoken's"):
        read_state(text, WHERE)


def test_a_loss_that_is_not_finite_is_kept():
    values = old() | {"best_eval_loss": float("inf")}
    state, _ = read_state(json.dumps(values), WHERE)
    assert state.best_eval_loss == float("inf")
    assert read_state(state.to_json(), WHERE)[0] == state


def test_what_has_a_default_may_be_missing():
    state, _ = read_state(
        json.dumps({"step": 1, "recipe": {}, "data": {}, "scaler": {}, "micro_batch_tokens": 1}), WHERE
    )
    assert state == TrainerState(step=1, recipe={}, data={}, scaler={}, micro_batch_tokens=1)
