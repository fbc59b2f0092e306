"""Runs the command line in forks of a process that has imported everything: a start in tenths of a second.

    python server.py TOKENIZER

On stdin comes a job a line; on stdout go {"pid": ...} at its start and {"code": ...} at its end.

A job is {"args": [...], "environment": {...}, "out": FILE, "err": FILE, "max_file_bytes": int or null, "closed": [...],
"nohup": bool}; where "out" is a terminal, it becomes the fork's own, whose end is a SIGHUP. The fork is the process
that ends, by itself or by a signal, as `python -m pertoken` would; it stays a zombie until the next line, so that a
signal sent too late meets nobody else.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


def serve(tokenizer: str) -> None:
    from pathlib import Path

    import pyarrow

    import pertoken.cli.commands
    import pertoken.console
    import pertoken.runs.setup
    from pertoken.data.tokens.tokenizer import load_tokenizer

    end_with_the_parent()
    load_tokenizer(Path(tokenizer))  # this and the next line import what is imported late
    pyarrow.array([[1]]).flatten().to_numpy(zero_copy_only=True)
    gc.freeze()  # a collection in a fork would copy all of it
    say(ready=True)
    while line := sys.stdin.buffer.raw.readline():  # unbuffered: a fork must not have read another's lines
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(job)
            end_as_python_would(pertoken.cli.commands.main)
        say(pid=pid)
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        say(code=end.si_status if end.si_code == os.CLD_EXITED else -end.si_status)
        sys.stdin.buffer.raw.readline()
        os.waitpid(pid, 0)
    os._exit(0)  # an orderly end of all that was imported takes seconds


def end_with_the_parent() -> None:
    """However it ends: nothing that a test started goes on after it."""
    set_parent_death_signal = 1  # of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def say(**values: Any) -> None:
    os.write(1, (json.dumps(values) + "\n").encode())


def end_as_python_would(main: Callable[[], None]) -> NoReturn:
    """Run `main` and end this fork with its exit code, without taking the interpreter apart, which takes a second."""
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120  # Python's own for it
    os._exit(code or 0)


def become(job: dict[str, Any]) -> None:
    """Make this fork the process that was asked for."""
    end_with_the_parent()
    os.setsid()
    for number, path in ((1, job["out"]), (2, job["err"])):
        reads = os.O_RDWR if path.startswith("/dev/pts/") else os.O_WRONLY  # a terminal is owned by who may read it
        file = os.open(path, reads | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for number in job["closed"]:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    # As after an exec, whatever started the server.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if job["nohup"] else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(job["environment"])
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    if encoding:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.reconfigure(encoding=encoding, errors=errors or "strict")
    if job["max_file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_file_bytes"],) * 2)
    sys.argv = ["pertoken", *job["args"]]


if __name__ == "__main__":
    serve(sys.argv[1])
