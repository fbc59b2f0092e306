"""What cannot be shown is dropped or said by the exit code, and no descriptor of a closed stream is given away."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys

import pytest
from rich.console import Console
from tiny import pertoken

from pertoken.cli.commands import main
from pertoken.cli.output import Output, own_streams
from pertoken.console import ConsoleListener
from pertoken.errors import OutputLost


class Full(io.StringIO):
    """A stream with an error for as long as it has one."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        if self.error is not None:
            raise self.error


ERRORS = [OSError(n, os.strerror(n)) for n in (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EAGAIN)]
ERRORS += [ValueError("I/O operation on closed file")]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_what_cannot_be_shown_is_dropped_and_that_is_said_once(error):
    err, stream = io.StringIO(), Full(error)
    out = Output(stream, needed=True, told=Output(err, needed=False))
    out.drop_failures()
    for _ in range(3):
        print("dropped", file=out, flush=True)
    assert err.getvalue() == f"standard output: {error}; what cannot be shown is dropped, the work continues\n"
    stream.error = None  # the disk has room again
    print("shown", file=out, flush=True)
    assert stream.getvalue() == "shown\n"
    out.let_go()


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_needed_output_that_is_lost_ends_the_command_once(error):
    out = Output(Full(error), needed=True)
    with pytest.raises(OutputLost) as caught:
        print("result", file=out)
    assert caught.value.exit_code == (141 if error.errno == errno.EPIPE else 2) if isinstance(error, OSError) else 2
    with pytest.raises(OutputLost):
        out.flush()
    out.let_go()  # at the end, whatever ended it, nothing is raised


def test_a_stream_that_was_closed_from_the_start_is_no_terminal_and_takes_nothing():
    err = io.StringIO()
    out = Output(None, needed=False, told=Output(err, needed=False))
    Console(file=out).print("x")  # type: ignore[arg-type]
    assert not out.isatty()
    assert out.encoding == "utf-8"
    assert "Bad file descriptor" in err.getvalue()
    with pytest.raises(io.UnsupportedOperation):
        out.fileno()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "cp1252"])
def test_letters_that_an_encoding_lacks_are_escaped(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    out = Output(stream, needed=True)
    print("⟦🙂⟧", file=out, flush=True)
    assert raw.getvalue() == b"\\u27e6\\U0001f642\\u27e7\n"


def test_the_streams_are_given_back(monkeypatch):
    before = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", before[0])
    monkeypatch.setattr(sys, "stderr", before[1])

    def command() -> None:
        with own_streams():
            print("a")
            print("b", file=sys.stderr)
            raise KeyError

    with pytest.raises(KeyError):
        command()
    assert (sys.stdout, sys.stderr) == before
    assert (before[0].getvalue(), before[1].getvalue()) == ("a\n", "b\n")


CLOSED = """
import os, sys
for number in {closed}:
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None
from pertoken.cli.output import own_streams
with own_streams():
    report = os.open({path!r}, os.O_WRONLY | os.O_CREAT)
    os.system("echo printed by a library; echo an error >&2")
os.write(report, b"%d" % report)
"""


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)])
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, closed):
    path = tmp_path / "file"
    code = CLOSED.format(closed=closed, path=str(path))
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert int(path.read_text()) > 2


def test_a_display_that_fails_is_said_once_and_messages_still_come_through(capsys):
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("no such font")

    listener = ConsoleListener(Console(file=Broken()), log_interval=1)
    listener.message("a message")
    listener.message("another")
    listener.close()
    first, *rest = capsys.readouterr().err.splitlines()
    said = "the display failed (RuntimeError: no such font); from here on there are messages only, the work continues"
    assert first == said
    assert rest == ["a message", "another"]


def test_a_lost_result_passes_through_the_display():
    listener = ConsoleListener(Console(file=Output(Full(ERRORS[0]), needed=True)), log_interval=1)  # type: ignore[arg-type]
    with pytest.raises(OutputLost):
        listener.message("a message")


@pytest.mark.parametrize("command", ["export", "tokenizer train"])
def test_a_command_whose_result_is_a_file_succeeds_where_its_output_is_lost(world, tmp_path, monkeypatch, command):
    assert pertoken("train", world.write_recipe(tmp_path / "run", train__max_steps=1))[0] == 0
    out = tmp_path / "out"
    source = [tmp_path / "run"] if command == "export" else [world.folder / "chats.jsonl", "--kind", "char"]
    monkeypatch.setattr(sys, "stdout", Full(ERRORS[0]))
    monkeypatch.setattr(sys, "argv", ["pertoken", *command.split(), *map(str, source), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert (out / "tokenizer.json").is_file()
