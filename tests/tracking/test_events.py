"""What happened to a run is kept, whatever happens to the file, and costs no training."""

from __future__ import annotations

import errno
import json
import os
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import pertoken, rows_of

from pertoken import train
from pertoken.errors import Interrupted, SpikeError
from pertoken.runs import computation, spikes
from pertoken.tracking import lines_file
from pertoken.tracking.events import Event, EventsFile, is_event
from pertoken.tracking.listener import Listener
from pertoken.tracking.reporter import Reporter
from pertoken.training.precision import Precision

KEYS = {"train__max_steps": 4, "train__batch_size": 4, "data__eval_path": []}
DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def events_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def kinds_of(run: Path) -> list[str]:
    return [event["kind"] for event in events_of(run)]


class Told(Listener):
    def __init__(self, at: dict[int, Any] | None = None) -> None:
        self.events: list[Event] = []
        self.messages: list[str] = []
        self.steps: list[int] = []
        self._at = at or {}

    def message(self, text: str) -> None:
        self.messages.append(text)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def stepped(self, row, summary) -> None:
        self.steps.append(row.step)
        self._at.get(row.step, lambda: None)()


class Breaks(Told):
    """Raises at a step."""

    def stepped(self, row, summary) -> None:
        super().stepped(row, summary)
        if row.step == 2:
            raise ValueError("theirs")


def test_a_run_and_its_resume_are_one_history_with_times_and_steps(world, tmp_path):
    run = tmp_path / "run"
    train(world.recipe(run, **KEYS, checkpoint__save_interval=2))
    train(world.recipe(run, **KEYS | {"train__max_steps": 6}), resume=True)
    events = events_of(run)
    assert [e["kind"] for e in events] == ["start", "saved", "saved", "end", "resume", "start", "saved", "end"]
    for event in events:
        assert list(event) == ["time", "step", "kind", "text", "fields"]
        assert datetime.fromisoformat(event["time"]).utcoffset().total_seconds() == 0
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)
    assert (events[4]["step"], events[4]["fields"]) == (4, {"checkpoint": "step-00000004"})
    assert (events[0]["step"], events[0]["fields"]["total_steps"], events[-1]["step"]) == (0, 4, 6)
    assert events[-1]["fields"] == {"error": None, "why": "done"}


def test_each_message_is_an_event_and_a_listener_gets_both(world, tmp_path, monkeypatch):
    """Memory that runs out in step 2, an evaluation that is the best, a spike in step 4."""
    real, calls = computation.train_step, 0

    def train_step(state, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return real(state, *args, **kwargs)

    monkeypatch.setattr(computation, "train_step", train_step)
    monkeypatch.setattr(spikes.Spikes, "ratio", lambda self, norm: 11.0 if len(self.norms) == 3 else None)
    run, told = tmp_path / "run", Told()
    keys = KEYS | {"data__eval_path": str(world.folder / "held-out.jsonl"), "train__on_spike": "skip"}
    train(world.recipe(run, **keys, train__eval_interval=3), listener=told)
    events = events_of(run)
    assert [e["kind"] for e in events] == [e.kind for e in told.events]
    assert [e["text"] for e in events] == [e.text for e in told.events]
    found = {e["kind"]: e for e in events}
    assert found["memory_halved"]["fields"]["micro_batch_tokens"] < 8192
    assert found["best"]["step"] >= 3
    assert found["spike"]["fields"]["ratio"] == 11.0
    assert found["update_skipped"]["fields"] == {"why": "spike"}
    assert [e["step"] for e in events if e["kind"] in ("memory_halved", "spike")] == [2, 4]
    said = ("memory_halved", "spike", "message")
    assert told.messages == [e["text"] for e in events if e["kind"] in said]


def test_a_scale_that_overflows_and_the_update_that_it_cost_are_events(world, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    monkeypatch.setattr(Precision, "new_scaler", lambda self: scaler)
    run = tmp_path / "run"
    train(world.recipe(run, **KEYS, train__dtype="float16", train__compile="off"))
    skipped = sum(row["skipped"] for row in rows_of(run))
    assert kinds_of(run).count("loss_scale_overflow") == kinds_of(run).count("update_skipped") == skipped > 0


def test_signals_and_why_a_run_ended_are_events(world, tmp_path):
    run = tmp_path / "run"
    told = Told({2: lambda: os.kill(os.getpid(), signal.SIGUSR1), 3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Interrupted):
        train(world.recipe(run, **KEYS), listener=told)
    signals = [e for e in events_of(run) if e["kind"] == "signal"]
    assert [(e["step"], e["fields"]["signal"]) for e in signals] == [(2, "SIGUSR1"), (3, "SIGTERM")]
    last = events_of(run)[-1]
    assert (last["kind"], last["step"], last["fields"]) == ("end", 3, {"error": "Interrupted"})
    assert "stopped by SIGTERM after step 3" in last["text"]


def test_a_spike_that_stops_the_run_is_an_event(world, tmp_path, monkeypatch):
    monkeypatch.setattr(spikes.Spikes, "ratio", lambda self, norm: 11.0 if len(self.norms) == 3 else None)
    run = tmp_path / "run"
    with pytest.raises(SpikeError):
        train(world.recipe(run, **KEYS, train__on_spike="stop"))
    assert [e["fields"] for e in events_of(run) if e["kind"] == "spike"] == [{"stops": True}]
    assert kinds_of(run)[-1] == "end"


@pytest.mark.parametrize("torn", [b'{"time": "2026', b"\xff\x00", b"{" * 70_000], ids=["torn", "garbage", "long"])
def test_a_torn_last_line_is_dropped_by_the_resume_and_the_others_stay(world, tmp_path, torn):
    run = tmp_path / "run"
    train(world.recipe(run, **KEYS))
    before = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(before + torn)
    train(world.recipe(run, **KEYS | {"train__max_steps": 5}), resume=True)
    assert (run / "events.jsonl").read_bytes().startswith(before)
    assert kinds_of(run) == ["start", "saved", "end", "resume", "start", "saved", "end"]
    assert all(is_event(line) for line in (run / "events.jsonl").read_bytes().splitlines())


class Full:
    """A file on a full disk: takes half a line, then nothing."""

    def __init__(self, real: Any) -> None:
        self.real, self.left = real, 8

    def write(self, content: bytes) -> int:
        if not self.left:
            raise DISK_FULL
        written: int = self.real.write(content[: self.left])
        self.left -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_events_that_the_disk_refuses_are_said_once_and_written_when_it_takes_them(tmp_path):
    told, path = Told(), tmp_path / "events.jsonl"
    reporter = Reporter([told], keeps_events=True)
    reporter.message("before there is a folder")
    reporter.keep_events(path)
    lines = reporter._events._file
    disk, lines._file = lines._file, Full(lines._file)
    reporter.message("a")
    reporter.message("b")
    reporter.sync()
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["before there is a folder"]
    assert [text for text in told.messages if "No space" in text] == [
        "events.jsonl: [Errno 28] No space left on device; its events are kept until they can be written"
    ]
    lines._file = disk
    reporter.message("c")
    reporter.close()
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert [text for text in texts if "No space" not in text] == ["before there is a folder", "a", "b", "c"]
    assert len(texts) == 5


@pytest.mark.parametrize("when", ["open", "write", "fsync"])
def test_a_disk_that_refuses_events_costs_no_training(world, tmp_path, monkeypatch, when):
    whole, run, told = tmp_path / "whole", tmp_path / "run", Told()
    train(world.recipe(whole, **KEYS))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if when == "open":
        monkeypatch.setattr("pertoken.tracking.events.LinesFile", refuse)
    elif when == "write":
        real = lines_file.LinesFile._write_waiting
        monkeypatch.setattr(
            lines_file.LinesFile,
            "_write_waiting",
            lambda self: refuse() if str(self._file.name).endswith("events.jsonl") else real(self),
        )
    else:
        monkeypatch.setattr(EventsFile, "sync", lambda self: OSError(errno.EIO, "x"))
    train(world.recipe(run, **KEYS), listener=told)
    name = "step-00000004/model.safetensors"
    assert (run / "checkpoints" / name).read_bytes() == (whole / "checkpoints" / name).read_bytes()
    said = [text for text in told.messages if "events" in text]
    assert len(said) == (0 if when == "fsync" else 1)
    assert len(rows_of(run)) == 4


def test_a_folder_of_that_name_is_left_alone_and_said(world, tmp_path):
    run, told = tmp_path / "run", Told()
    (run / "events.jsonl").mkdir(parents=True)
    train(world.recipe(run, **KEYS), listener=told)
    assert [text for text in told.messages if "events are not kept" in text]
    assert (run / "events.jsonl").is_dir()


@pytest.mark.parametrize("how", ["fresh", "resume", "overwrite"])
def test_events_of_the_users_own_are_kept_under_another_name(world, tmp_path, how):
    run, told = tmp_path / "run", Told()
    run.mkdir()
    if how != "fresh":
        train(world.recipe(run, **KEYS))
        (run / ".pertoken.json").unlink()  # as an earlier version, which wrote no events, leaves it
    (run / "events.jsonl").write_text('{"concert": "tonight"}')
    flags = {} if how == "fresh" else {how: True}
    train(world.recipe(run, **KEYS | {"train__max_steps": 5}), listener=told, **flags)
    assert (run / "events.jsonl.kept-1").read_text() == '{"concert": "tonight"}'
    assert any("not written by pertoken; it is events.jsonl.kept-1 now" in text for text in told.messages)
    assert kinds_of(run)[-1] == "end"


def test_an_overwritten_run_has_a_history_of_its_own(world, tmp_path):
    run = tmp_path / "run"
    train(world.recipe(run, **KEYS))
    train(world.recipe(run, **KEYS | {"train__max_steps": 2}), overwrite=True)
    assert kinds_of(run) == ["start", "saved", "end"]


def test_a_run_that_is_refused_writes_no_event(world, tmp_path):
    run = tmp_path / "run"
    recipe = world.write_recipe(run, **KEYS)
    assert pertoken("train", recipe)[0] == 0
    before = (run / "events.jsonl").read_bytes()
    assert pertoken("train", recipe)[0] == 2
    assert pertoken("train", recipe, "--resume", "train.seed=7")[0] == 2
    assert (run / "events.jsonl").read_bytes() == before


def test_of_two_listeners_the_failure_of_one_is_kept_from_the_other_and_ends_the_run_after_its_step(world, tmp_path):
    for order in (0, 1):
        run, good, bad = tmp_path / f"run{order}", Told(), Breaks()
        both = [good, bad] if order else [bad, good]
        with pytest.raises(ValueError, match="theirs") as caught:
            train(world.recipe(run, **KEYS), listener=both)
        assert caught.value.__notes__ == ["step 2 is saved; continue with resume=True"]
        assert (good.steps, bad.steps) == ([1, 2], [1, 2])
        assert [e.kind for e in good.events] == ["start", "saved", "end"] == kinds_of(run)
        assert [e.kind for e in bad.events] == ["start"], "it is told no more"


def test_a_listener_that_fails_before_the_first_step_ends_the_run_at_once_and_the_others_hear_of_it(tmp_path):
    class Mute(Told):
        def message(self, text: str) -> None:
            raise ValueError("theirs")

    good = Told()
    reporter = Reporter([Mute(), good])
    with pytest.raises(ValueError, match="theirs"):
        reporter.message("a")
    assert good.messages == ["a"]


def test_a_figure_that_is_not_finite_is_null():
    event = Event(1, "spike", "x", {"grad_norm": float("inf"), "ratio": 2.0})
    assert json.loads(event.to_line())["fields"] == {"grad_norm": None, "ratio": 2.0}
