"""The last net: an error that nobody foresaw is one line, a report without data, and exit code 70."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import pertoken

import pertoken.inference.model_and_data as model_and_data_module
import pertoken.runs.computation as computation
from pertoken.cli.bug_report import report_of, write_report

SECRET = "a line of the data"


def fail(*args: object, **kwargs: object) -> None:
    local_secret = SECRET  # noqa: F841  what a report with local variables would show
    try:
        {}[SECRET]
    except KeyError as error:
        raise RuntimeError(f"cannot use {SECRET!r}\nin two lines") from error


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The directory for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def broken(world, tmp_path, monkeypatch) -> tuple[str, ...]:
    """The command of a run whose third step fails."""
    real, calls = computation.share_of, []

    def third_fails(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return fail() if len(calls) == 3 else real(*args, **kwargs)

    monkeypatch.setattr(computation, "share_of", third_fails)
    recipe = world.write_recipe(tmp_path / "run", train__max_steps=4, checkpoint__save_interval=100)
    return "train", str(recipe), "train.batch_size=4"


def test_a_run_that_fails_unforeseen_saves_reports_into_its_folder_and_ends_with_70(broken, tmp_path, temporary):
    code, _, err = pertoken(*broken)
    assert code == 70
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: RuntimeError, which was not foreseen: cannot use '{SECRET}' in two lines; ")
    assert "step 2 is saved; continue with --resume; " in err
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
    (report,) = (tmp_path / "run").glob("error-*.txt")
    assert str(report) in err
    assert report.stat().st_mode & 0o077 == 0
    assert list(temporary.iterdir()) == []
    text = report.read_text()
    assert SECRET not in text.replace('SECRET = "', "")
    assert "local_secret =" in text or "in fail" in text  # code, not values
    assert "builtins.KeyError" in text
    assert text.rstrip().endswith("builtins.RuntimeError")
    assert re.search(r"^command +pertoken train \.\.\. train\.batch_size=\.\.\.$", text, re.MULTILINE)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", text, re.MULTILINE)
    code, _, err = pertoken(*broken, "--resume")
    assert code == 0, err


def test_the_traceback_is_shown_where_it_is_asked_for(broken, tmp_path, temporary, monkeypatch):
    monkeypatch.setenv("PERTOKEN_TRACEBACK", "1")
    code, _, err = pertoken(*broken)
    assert code == 70
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("error: RuntimeError, which was not foreseen")
    assert not [*(tmp_path / "run").glob("error-*"), *temporary.iterdir()]


@pytest.fixture
def failing_eval(world, tmp_path, monkeypatch) -> tuple[str, ...]:
    """A command without an `out_dir` that fails."""
    monkeypatch.setattr(model_and_data_module, "model_and_data", fail)
    return "eval", str(tmp_path), str(world.folder / "chats.jsonl")


def test_another_command_reports_into_the_directory_for_temporary_files(failing_eval, temporary):
    code, _, err = pertoken(*failing_eval)
    assert code == 70
    (report,) = temporary.iterdir()
    assert str(report) in err
    assert "pertoken eval ... ..." in report.read_text()


def test_the_traceback_follows_where_no_report_can_be_written(failing_eval, temporary):
    temporary.rmdir()
    code, _, err = pertoken(*failing_eval)
    assert code == 70
    first, second, *_ = err.splitlines()
    assert "no report could be written (No such file or directory)" in first
    assert second == "Traceback (most recent call last):"


def test_a_folder_that_takes_no_report_is_passed_over(tmp_path, temporary):
    assert write_report(RuntimeError("x"), [], tmp_path / "absent").parent == temporary
    assert write_report(RuntimeError("x"), [], None).parent == temporary


def test_a_report_names_options_and_keys_and_no_value():
    arguments = ["train", "secret.toml", "out_dir=/home/secret", "--resume", "--json=secret", "--", "secret"]
    text = report_of(RuntimeError("secret"), arguments)
    assert "pertoken train ... out_dir=... --resume --json ... ...\n" in text
    assert "secret" not in text


@pytest.mark.parametrize("value", ["secret=x", "-secret", "--secret word", "a.secret=x", "datasecret.x=y"])
def test_a_report_takes_no_prompt_for_a_key(value):
    assert "secret" not in report_of(RuntimeError("x"), ["generate", "m", "--prompt", value])
