"""A run of an earlier version continues, bit for bit; one of a newer version is refused, and nothing is touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import pertoken, rows_of, untimed

from pertoken import Recipe, train
from pertoken.checkpoints.read import Checkpoint
from pertoken.checkpoints.state import STATE_VERSION
from pertoken.errors import CheckpointError, PertokenError
from pertoken.inference.chat import ChatSession
from pertoken.runs.replay import replay
from pertoken.tracking.listener import Listener
from pertoken.tracking.rows import ROWS_VERSION

pytestmark = pytest.mark.numeric

OLD = Path(__file__).parents[1] / "fixtures" / "old_run"
SAVED = "step-00000004"


class Told(Listener):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def copied(folder: Path, name: str) -> tuple[Path, Recipe]:
    """The old run, and its own recipe with the paths of the copy."""
    run = Path(shutil.copytree(OLD, folder / name, symlinks=True))
    overrides = [f"out_dir={run}", f"data.path={run / 'chats.jsonl'}", f"data.tokenizer={run / 'tokenizer'}"]
    return run, Recipe.load(run / "recipe.toml", [*overrides, f"data.store={folder / 'store'}"])


def change_state(run: Path, change: Any) -> None:
    """Rewrite the trainer state, and make the manifest fit."""
    folder = run / "checkpoints" / SAVED
    change(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def in_todays_format(folder: Path) -> None:
    state = Checkpoint(folder).state.to_json()
    (folder / "trainer_state.json").write_text(state)


def tensors(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def files_of(run: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


def test_a_run_of_an_earlier_version_continues_as_one_that_was_saved_today(tmp_path):
    (old, old_recipe), (new, new_recipe) = copied(tmp_path, "old"), copied(tmp_path, "new")
    change_state(new, in_todays_format)
    versions = [json.loads((run / "checkpoints" / SAVED / "trainer_state.json").read_text()) for run in (old, new)]
    assert ["format_version" in state for state in versions] == [False, True]
    before = untimed(rows_of(old))
    for recipe in (old_recipe, new_recipe):
        assert train(recipe, resume=True).step == 8
    assert tensors(old, 8) == tensors(new, 8)
    assert untimed(rows_of(old)) == untimed(rows_of(new))
    assert untimed(rows_of(old))[:4] == before[:4]
    assert [row["step"] for row in rows_of(old)] == list(range(1, 9))
    states = [json.loads((run / "checkpoints/step-00000008/trainer_state.json").read_text()) for run in (old, new)]
    for state, run in zip(states, (old, new), strict=True):
        assert state.pop("format_version") == STATE_VERSION
        state.pop("recipe"), state.pop("data_files")
        assert json.loads((run / ".pertoken.json").read_text()) == {
            "format_version": ROWS_VERSION,
            "written": ["events.jsonl", "metrics.jsonl", "recipe.toml"],
        }
    assert states[0] == states[1]


def test_a_step_of_a_run_of_an_earlier_version_is_replayed(tmp_path):
    run, recipe = copied(tmp_path, "run")
    checkpoint = recipe.checkpoint.model_copy(update={"save_interval": 6})
    train(recipe.model_copy(update={"checkpoint": checkpoint}), resume=True)
    again = replay(run, 8)
    assert again.repeated == 1
    assert [c.verdict for c in again.compared] == ["equal"] * 4


def test_keys_that_are_no_more_are_said_on_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("pertoken.checkpoints.state.GONE_KEYS", {"log.color": "nothing is colored any more"})
    run, recipe = copied(tmp_path, "run")

    def add(folder: Path) -> None:
        state = json.loads((folder / "trainer_state.json").read_text())
        state["recipe"]["log"]["color"] = "red"
        (folder / "trainer_state.json").write_text(json.dumps(state))

    change_state(run, add)
    told = Told()
    train(recipe, resume=True, listener=told)
    assert any("log.color='red' of an earlier version: nothing is colored any more" in text for text in told.messages)


def test_a_key_that_nobody_knows_is_named_with_its_file(tmp_path):
    run, recipe = copied(tmp_path, "run")

    def add(folder: Path) -> None:
        state = json.loads((folder / "trainer_state.json").read_text())
        state["recipe"]["train"]["speed"] = "fast"
        (folder / "trainer_state.json").write_text(json.dumps(state))

    change_state(run, add)
    with pytest.raises(CheckpointError, match=r"trainer_state.json: recipe: train.speed: unknown key"):
        train(recipe, resume=True)


def newer_state(folder: Path) -> None:
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps(state | {"format_version": STATE_VERSION + 1}))


def newer_ledger(folder: Path) -> None:
    import torch

    tensors = load_file(folder / "metrics.ledger")
    save_file(tensors | {"format_version": torch.tensor(ROWS_VERSION + 1)}, folder / "metrics.ledger")


def newer_rows(run: Path) -> None:
    content = json.loads((run / ".pertoken.json").read_text())
    (run / ".pertoken.json").write_text(json.dumps(content | {"format_version": ROWS_VERSION + 1}))


NEWER = {
    "a checkpoint": (lambda run: change_state(run, newer_state), "trainer_state.json", STATE_VERSION),
    "the ledger": (lambda run: change_state(run, newer_ledger), "metrics.ledger", ROWS_VERSION),
    "rows and events": (newer_rows, ".pertoken.json", ROWS_VERSION),
}


@pytest.mark.parametrize("what", NEWER)
@pytest.mark.parametrize("how", ["resume", "replay"])
def test_what_a_newer_version_wrote_is_refused_with_one_line_and_nothing_is_touched(tmp_path, what, how):
    change, name, known = NEWER[what]
    run, recipe = copied(tmp_path, "run")
    change(run)
    before = files_of(run)
    with pytest.raises(PertokenError) as caught:
        train(recipe, resume=True) if how == "resume" else replay(run, 3)
    where = run / name if name.startswith(".") else run / "checkpoints" / SAVED / name
    assert str(caught.value) == (
        f"{where}: format_version={known + 1}: written by a newer version of pertoken, this one reads up to {known}; "
        "nothing was changed. Update pertoken"
    )
    assert files_of(run) == before


def test_a_newer_run_is_not_overwritten(tmp_path):
    run, recipe = copied(tmp_path, "run")
    newer_rows(run)
    before = files_of(run)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    code, _, err = pertoken("train", path, "--overwrite")
    assert (code, err.count("\n")) == (2, 1)
    assert "written by a newer version of pertoken" in err
    assert files_of(run) == before


def test_a_model_of_an_earlier_version_is_talked_to(tmp_path):
    run, _ = copied(tmp_path, "run")
    assert ChatSession.load(str(run)).encode("red")
