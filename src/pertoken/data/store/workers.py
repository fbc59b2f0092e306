"""Processes that make parts: `hand_out` is the parent's side, `main` a worker's.

A worker is a fresh Python that runs this module. Not a fork, since the parent has threads; not `multiprocessing`, whose
workers import the program that was started, which may be anybody's script. It loads no torch.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

from pertoken.data.samples import SampleBuilder
from pertoken.data.store.made_part import make_part
from pertoken.data.store.parts import Part
from pertoken.errors import PertokenError
from pertoken.text import one_line

__all__ = ["hand_out"]


def hand_out(
    parts: Mapping[int, Part],
    builder: SampleBuilder,
    folder: Path,
    *,
    workers: int,
    on_bytes: Callable[[int, int], None],
) -> None:
    """Have `workers` processes make the parts. `on_bytes` is told (index, bytes done).

    The error of the first part that has one is raised, as if they were made one after another. Raises
    ChildProcessError where a worker dies or has no memory left.
    """
    # What workers write goes there: of one that ran out of memory, a trace that is of no use to anybody.
    with tempfile.TemporaryFile() as said:
        _hand_out(parts, builder, folder, workers, on_bytes, said)


def _hand_out(
    parts: Mapping[int, Part],
    builder: SampleBuilder,
    folder: Path,
    workers: int,
    on_bytes: Callable[[int, int], None],
    said: IO[bytes],
) -> None:
    started: dict[Any, subprocess.Popen[bytes]] = {}
    try:
        for _ in range(workers):
            connection, process = _start(said)
            started[connection] = process
        waiting, errors, given = deque(parts.items()), dict[int, BaseException](), 0

        def give(connection: Any) -> None:
            nonlocal given
            if waiting and not errors:
                connection.send(waiting.popleft())
                given += 1

        for connection in started:
            connection.send((builder, folder))
            give(connection)
        for connection in started:
            give(connection)  # a second one, at hand when the first is done
        while given:
            ready: list[Any] = wait(list(started))
            for connection in ready:
                index, news = connection.recv()
                if isinstance(news, int):
                    on_bytes(index, news)
                    continue
                given -= 1
                if news is not None:
                    errors[index] = news if isinstance(news, BaseException) else RuntimeError(f"in a worker: {news}")
                give(connection)
        if errors:
            raise errors[min(errors)]
    except (EOFError, ConnectionError):
        raise ChildProcessError(f"a worker process {_how_it_ended(list(started.values()), said)}") from None
    finally:
        for connection, process in started.items():
            process.kill()
            process.wait()
            connection.close()


def _how_it_ended(processes: list[subprocess.Popen[bytes]], said: IO[bytes]) -> str:
    """In words, once one of them has closed its connection."""
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)  # the connection closes a moment earlier
    code = next((process.returncode for process in processes if process.returncode), None)
    said.seek(0)
    text = said.read().decode("utf-8", "replace")
    if code in (-signal.SIGKILL, -signal.SIGABRT) or "memory allocation" in text or "MemoryError" in text:
        return f"was killed (code {code}), most often for lack of memory"
    last = text.strip().splitlines()[-1:]
    return f"ended with code {code}" + "".join(f" ({one_line(line)[:200]})" for line in last)


def _start(said: IO[bytes]) -> tuple[Any, subprocess.Popen[bytes]]:
    ours, theirs = Pipe()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TOKENIZERS_PARALLELISM": "false",  # the workers are the threads
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pertoken.data.store.workers", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=said,
        process_group=0,  # an interrupt from the terminal is the parent's business
    )
    theirs.close()
    return ours, process


def main(connection: Any) -> None:
    """Make the parts that the parent sends, until it goes."""
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    builder, folder = jobs.get()
    while True:
        index, part = jobs.get()
        try:
            make_part(folder, index, part, builder, lambda *news: connection.send(news))
            connection.send((index, None))
        except (BrokenPipeError, ConnectionError):
            return
        except (PertokenError, OSError) as error:
            connection.send((index, error))
        except MemoryError:
            connection.send((index, ChildProcessError("a worker process is out of memory")))
        except Exception:
            connection.send((index, traceback.format_exc()))


def _receive(connection: Any, jobs: queue.SimpleQueue[Any]) -> None:
    """In a thread of its own, so that a worker notices at any time that its parent is gone, however it went."""
    try:
        while True:
            jobs.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
