"""A replayed step is the recorded one, bit for bit, and what was changed since is found."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import World, pertoken, rows_of

from pertoken import train
from pertoken.errors import CheckFailed, CheckpointError, PertokenError, RecipeError
from pertoken.runs import spikes
from pertoken.runs.replay import replay
from pertoken.tracking.listener import Listener
from pertoken.training.precision import Precision

pytestmark = pytest.mark.numeric

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"train__dtype": "bfloat16"},
    "float16": {"train__dtype": "float16"},
    "muon": {"train__optimizer": "muon"},
    "experts": {"model__use_moe": True, "model__num_experts_per_tok": 2},
    "spikes": {"train__on_spike": "skip", "train__spike_factor": 1.05},
}
# From the start; right after a checkpoint; an epoch's short last step; across an epoch's end; at the end.
STEPS = {"float32": (1, 4, 6, 7, 9, 10), "float16": (3, 9)}


@pytest.fixture(scope="module", autouse=True)
def _early_skips():
    """float16 skips its first two steps; and three norms are enough for a fourth to be a spike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "_ENOUGH", 3)
        patch.setattr(
            Precision,
            "new_scaler",
            lambda self: torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=self.dtype == "float16"),
        )
        yield


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 10 steps in several micro-batches, saved after 5 and 10; 7 steps make an epoch."""
    folder = tmp_path_factory.mktemp("replayed")
    for way, changes in WAYS.items():
        settings = {"train__max_steps": 10, "train__micro_batch_tokens": 1500, "train__schedule": "linear"}
        kept = {"checkpoint__save_interval": 5, "checkpoint__keep_last": 10, "data__eval_path": []}
        train(world.recipe(folder / way, model__num_hidden_layers=1, **(settings | kept | changes)))
    return folder


def files_of(run: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).digest()) for p in run.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_replayed_step_is_the_recorded_one_bit_for_bit_and_nothing_is_written(runs, way):
    before = files_of(runs / way)
    for step in STEPS.get(way, (9,)):
        again = replay(runs / way, step)
        assert [c.verdict for c in again.compared] == ["equal"] * 4, (step, again.compared)
        assert [c.name for c in again.compared] == ["positions", "num_tokens", "loss_sum", "grad_norm"]
        assert again.repeated == (step - 1) % 5
        assert len(again.samples) == rows_of(runs / way)[step - 1]["samples"]
        assert math.isclose(
            sum(s.loss_sum for s in again.samples), again.compared[2].recorded, rel_tol=2e-2 if "16" in way else 1e-5
        )
        assert [s.loss for s in again.samples] == sorted((s.loss for s in again.samples), reverse=True)
    assert files_of(runs / way) == before


def test_among_the_steps_repeated_above_some_were_skipped(runs):
    for way, key, steps in (("float16", "loss_scale", (1, 2)), ("spikes", "spike", (6, 7))):
        rows = rows_of(runs / way)
        assert all(rows[step - 1]["skipped"] and key in rows[step - 1] for step in steps)


def test_a_run_that_was_prolonged_is_repeated_with_the_learning_rates_it_had(world, tmp_path):
    """From the checkpoint of the shorter run, whose recipe knows another schedule."""
    run = tmp_path / "run"
    settings = {"checkpoint__save_interval": 2, "checkpoint__keep_last": 9, "data__eval_path": []}
    train(world.recipe(run, train__max_steps=4, **settings))
    train(world.recipe(run, train__max_steps=8, **settings), resume=True)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    again = replay(run, 8)
    assert again.checkpoint.name == "step-00000004"
    assert [c.verdict for c in again.compared] == ["equal"] * 4


def test_another_split_is_equal_within_rounding(runs, tmp_path):
    run = copy_of(runs / "float32", tmp_path)
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("micro_batch_tokens = 1500", "micro_batch_tokens = 300"))
    shutil.rmtree(run / "checkpoints")
    verdicts = {c.name: c.verdict for c in replay(run, 6).compared}
    assert verdicts.pop("positions") == verdicts.pop("num_tokens") == "equal"
    assert set(verdicts.values()) <= {"within rounding", "equal"}  # which of them is the processor's choice
    rows = rows_of(run)
    rows[5]["loss_sum"] *= 1 + 1e-4  # what the processor might have chosen
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {c.name: c.verdict for c in replay(run, 6).compared}["loss_sum"] == "within rounding"


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy", symlinks=True))


def change_a_weight(run: Path) -> None:
    """In the checkpoint of step 5, with its manifest made to fit."""
    folder = run / "checkpoints" / "step-00000005"
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_rows(**changes: Any) -> Any:
    """Of step 7."""

    def change(run: Path) -> None:
        rows = rows_of(run)
        rows[6] |= changes
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return change


def lose(*names: str) -> Any:
    def change(run: Path) -> None:
        for name in names:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut_a_row(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[2] = lines[2][:40] + "\n"
    (run / "metrics.jsonl").write_text("".join(lines))


CHANGES = {
    "a changed weight": (change_a_weight, 7, CheckFailed, "step 7: not what metrics.jsonl says, beyond rounding"),
    "an edited loss": (change_rows(loss_sum=1.0), 7, CheckFailed, r"loss_sum [\d.]+, recorded 1.0"),
    "an edited norm": (change_rows(grad_norm=None), 7, CheckFailed, r"grad_norm [\d.]+, recorded None"),
    "edited positions": (change_rows(positions=[0, 16]), 7, CheckFailed, r"positions \[96, 101\], recorded \[0, 16\]"),
    "a text for a number": (change_rows(num_tokens="many"), 7, CheckFailed, "num_tokens .* recorded many"),
    "neither rows nor a checkpoint": (lose("metrics.jsonl", "checkpoints"), 7, CheckpointError, "cannot be read"),
    "no run": (lose("."), 7, CheckpointError, "no such run"),
    "nothing to start from": (lose("checkpoints", "recipe.toml"), 7, CheckpointError, "no valid checkpoint before"),
    "step 0": (lambda run: None, 0, RecipeError, "step=0: the run has steps 1 to 10"),
    "a step beyond": (lambda run: None, 12, RecipeError, "step=12: the run has steps 1 to 10"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_found_and_named(runs, tmp_path, name):
    change, step, error, message = CHANGES[name]
    run = copy_of(runs / "float32", tmp_path)
    change(run)
    with pytest.raises(error, match=message):
        replay(run, step).raise_if_different()


class Told(Listener):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[int] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def stepped(self, row, summary) -> None:
        self.steps.append(row.step)


def test_a_damaged_checkpoint_is_passed_over_and_a_row_on_the_way_that_does_not_fit_is_told(runs, tmp_path):
    run = copy_of(runs / "float32", tmp_path)
    change_rows(loss_sum=1.0)(run)
    (run / "checkpoints" / "step-00000005" / "model.safetensors").write_bytes(b"")
    told = Told()
    again = replay(run, 9, listener=told)
    assert again.checkpoint is None
    assert not again.different
    assert "step-00000005: not used, model.safetensors has the wrong size" in told.messages[0]
    assert told.messages[1] == "step 9 from the start: 8 steps before it to repeat"
    assert told.messages[2] == "step 7, on the way: loss_sum not as recorded"
    assert told.steps == list(range(1, 9))


LOSSES = {
    "another step's row": (change_rows(step=70), 7, "7"),
    "no learning rate": (change_rows(lr=None), 7, "7"),
    "a cut row": (cut_a_row, 4, "3"),
    "no file": (lose("metrics.jsonl"), 7, "1-10"),
    "a step of billions": (change_rows(step=3_000_000_000), 7, "7"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_are_missing_are_said_and_taken_from_the_checkpoint(runs, tmp_path, name):
    change, step, missing = LOSSES[name]
    run = copy_of(runs / "float32", tmp_path)
    change(run)
    told = Told()
    again = replay(run, step, listener=told)
    assert [c.verdict for c in again.compared] == ["equal"] * 4
    assert f"rows of steps {missing} taken from step-00000010" in told.messages[0]


def test_the_learning_rate_and_the_skips_on_the_way_are_those_of_the_run_whatever_the_file_says(runs, tmp_path):
    run = copy_of(runs / "float32", tmp_path)
    change_rows(lr=0.5, skipped=True)(run)
    assert [c.verdict for c in replay(run, 9).compared] == ["equal"] * 4


def test_without_a_copy_in_the_checkpoint_steps_are_replayed_as_far_as_there_are_rows(runs, tmp_path):
    """Checkpoints of earlier versions have none."""
    run = copy_of(runs / "float32", tmp_path)
    for folder in run.glob("checkpoints/step-*"):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"].pop("metrics.ledger")
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "metrics.ledger").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[6] = lines[6][:40] + "\n"
    (run / "metrics.jsonl").write_text("".join(lines))
    told = Told()
    assert [c.verdict for c in replay(run, 6, listener=told).compared] == ["equal"] * 4
    assert "rows of steps 7 are missing" in told.messages[0]
    assert replay(run, 7).compared == ()
    with pytest.raises(CheckpointError, match="no row of step 7, on the way to step 9"):
        replay(run, 9)


@pytest.mark.parametrize("from_the_start", [False, True])
def test_changed_data_is_refused(world, tmp_path, from_the_start):
    chats = tmp_path / "chats.jsonl"
    shutil.copy(world.folder / "chats.jsonl", chats)
    run = tmp_path / "run"
    train(world.recipe(run, data__path=str(chats), data__eval_path=[], train__max_steps=3, train__batch_size=40))
    chats.write_text(chats.read_text().replace("cat", "dog"))
    with pytest.raises(
        PertokenError, match=r"training data is not what .*chats.jsonl changed; restore it: these samples"
    ):
        replay(run, 2 if from_the_start else 4)


def test_the_command_shows_the_step_its_samples_and_their_tokens(runs, tmp_path):
    run, out = runs / "float32", tmp_path / "replay.json"
    code, printed, err = pertoken("replay", run, "--step", 7, "--worst", 2, "--json", out)
    assert code == 0, err
    row = rows_of(run)[6]
    assert f"loss_sum    {row['loss_sum']!s:<24}{row['loss_sum']!s:<24}equal" in printed
    result = json.loads(out.read_text())
    assert len(result["samples"]) == row["samples"] == 5
    for i, sample in enumerate(result["samples"]):
        assert sample["where"] in printed
        assert ("losses" in sample) == (i < 2)
    worst = result["samples"][0]
    mean = sum(t["loss"] for t in worst["losses"] if t["supervised"]) / worst["num_tokens"]
    assert mean == pytest.approx(worst["loss"], rel=1e-5)
    assert "".join(t["label"] for t in worst["losses"]).count("<|im_end|>") == 2


def test_the_command_ends_with_1_for_another_step_and_with_2_for_a_mistake(runs, tmp_path):
    run = copy_of(runs / "float32", tmp_path)
    change_rows(loss_sum=1.0)(run)
    for options, code, message in (
        (("--step", 7), 1, "step 7: not what metrics.jsonl says, beyond rounding (0.001 in float32): loss_sum"),
        (("--step", 99), 2, "--step 99: the run has steps 1 to 10; name one, or the next one"),
        (("--step", 7, "--worst", -1), 2, "--worst -1: must be at least 0"),
        (("--step", 7, "--device", "cuda:77"), 2, 'train.device="cuda:77": this machine has no such CUDA device'),
    ):
        got, _, err = pertoken("replay", run, *options)
        assert (got, message in err) == (code, True), err
        assert "Traceback" not in err


def test_the_step_after_the_last_row_has_nothing_to_compare(runs):
    again = replay(runs / "float32", 11)
    assert again.compared == ()
    assert len(again.samples) == 16
    again.raise_if_different()
