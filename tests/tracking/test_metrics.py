"""Rows, and where else they go."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from tiny import pertoken, row_of, rows_of

from pertoken.model import plain
from pertoken.tracking.metrics_file import MetricsFile

KEYS = """step epoch loss loss_sum num_tokens aux_loss grad_norm lr samples tokens micro_batches padding_share step_s
tokens_per_s"""


def test_a_row_per_step_with_every_key(world, tmp_path):
    recipe = world.write_recipe(tmp_path / "run", train__max_steps=9, train__eval_interval=4)
    assert pertoken("train", recipe)[0] == 0
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 10))
    for row in rows:
        assert set(KEYS.split()) <= row.keys()
        assert row["loss"] == pytest.approx(row["loss_sum"] / row["num_tokens"])
        assert row["positions"][1] - row["positions"][0] == row["samples"]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_s"])
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 9]


def test_torn_and_later_rows_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    file = MetricsFile(path, last_step=2)
    file.write(row_of(3, loss=float("inf")))
    file.close()
    lines = path.read_text().splitlines(keepends=True)
    assert lines[:2] == ['{"step": 1}\n', '{"step": 2}\n']
    assert [json.loads(line)["loss"] for line in lines[2:]] == [None]


def test_tensorboard_has_what_the_rows_have_also_after_a_resume(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    recipe = world.write_recipe(run, log__trackers=["tensorboard"], train__max_steps=3)
    assert pertoken("train", recipe)[0] == 0
    code, _, err = pertoken("train", recipe, "--resume", "train.max_steps=5")
    assert code == 0, err
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for key in ("loss", "grad_norm", "lr", "tokens_per_s"):
        logged = events.Scalars(key)
        assert [e.step for e in logged] == [1, 2, 3, 4, 5]
        assert [e.value for e in logged] == pytest.approx([row[key] for row in rows_of(run)], rel=1e-6)
    assert [e.step for e in events.Scalars("eval_loss")] == [3, 5]


def wandb_records(path: Path) -> list[bytes]:
    """The records of an offline file: LevelDB's log format (blocks of 32 KiB; crc, length, type) behind 7 bytes."""
    content, position, records = path.read_bytes(), 7, [b""]
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        records[-1] += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(b"")
    return records[:-1]


def wandb_history(folder: Path) -> list[tuple[str, dict[str, float]]]:
    """(run id, row) of every row in the offline files, in order of their names."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
                found.append((path.stem.removeprefix("run-"), row))
    return found


def test_wandb_offline_has_what_the_rows_have_and_a_resume_continues_its_run(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    run = tmp_path / "run"
    recipe = world.write_recipe(run, log__trackers=["wandb"], train__max_steps=3)
    code, _, err = pertoken("train", recipe)
    assert code == 0, err
    code, _, err = pertoken("train", recipe, "--resume", "train.max_steps=5")
    assert code == 0, err
    history = wandb_history(run)
    assert len({run_id for run_id, _ in history}) == 1, "the resumed run has the id of the first"
    assert [row["_step"] for _, row in history] == [1, 2, 3, 4, 5]
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for _, row in history] == pytest.approx([row[key] for row in rows_of(run)])
    state = json.loads((run / "checkpoints" / "step-00000005" / "trainer_state.json").read_text())
    assert state["tracker_run_ids"] == {"wandb": history[0][0]}


def test_a_tracker_that_is_not_installed_says_what_to_install(world, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    recipe = world.write_recipe(tmp_path / "run", log__trackers=["wandb"], train__max_steps=3)
    code, _, err = pertoken("train", recipe)
    assert code == 2
    assert "pip install wandb" in err


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_wandb_without_a_key_is_one_line_before_anything_is_touched_and_never_a_question(
    world, tmp_path, monkeypatch, how
):
    import wandb

    recipe = world.write_recipe(tmp_path / "run", train__max_steps=1)
    assert pertoken("train", recipe)[0] == 0
    before = rows_of(tmp_path / "run")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()

    def asked(*args, **kwargs):
        raise AssertionError("it asks")

    monkeypatch.setattr(wandb, "init", asked)
    code, _, err = pertoken("train", recipe, how, "log.trackers=wandb", "train.max_steps=2")
    assert code == 2
    assert err.strip() == (
        'error: log.trackers: "wandb" has no API key; run `wandb login`, set WANDB_MODE=offline, or take it out of the '
        "list"
    )
    assert rows_of(tmp_path / "run") == before
    wandb.teardown()


def test_wandb_that_cannot_start_is_one_line(world, tmp_path, monkeypatch):
    import wandb

    def fails(*args, **kwargs):
        raise wandb.errors.CommError("no network\x1b[2J")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", fails)
    wandb.teardown()
    recipe = world.write_recipe(tmp_path / "run", log__trackers=["wandb"], train__max_steps=1)
    code, _, err = pertoken("train", recipe)
    assert code == 2
    assert '"wandb" cannot start (no network\\x1b[2J); set WANDB_MODE=offline' in err
    wandb.teardown()


def test_the_summary_counts_padding_at_the_precision_of_the_step(world, tmp_path, monkeypatch):
    """Attention's form depends on it."""
    seen, real = [], plain.which_attention
    monkeypatch.setattr(plain, "which_attention", lambda *args: seen.append(args[1]) or real(*args))
    recipe = world.write_recipe(tmp_path / "run", train__max_steps=1, train__dtype="bfloat16", train__engine="plain")
    assert pertoken("train", recipe)[0] == 0
    assert set(seen) == {torch.bfloat16}


def test_padding_share_is_of_the_whole_step_however_it_is_split(world, tmp_path):
    """With a micro-batch for each sample nothing is padded; with all in one some is, and the console says how much."""
    shares = {}
    for budget in (1, 8192):
        run = tmp_path / f"run{budget}"
        recipe = world.write_recipe(run, train__max_steps=3, train__micro_batch_tokens=budget, train__engine="plain")
        code, out, err = pertoken("train", recipe)
        assert code == 0, err
        shares[budget] = [row["padding_share"] for row in rows_of(run)]
        assert f"{shares[budget][0]:.1%} of the work on padding" in " ".join(out.split())
    assert shares[1] == [0.0] * 3
    assert all(0 < share < 0.2 for share in shares[8192])
