"""What every fault test does: start runs, side by side, and see that nothing of them was lost."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from faults.failing_disk import Fault
from tiny import World, rows_of, untimed

from pertoken.tracking.events import is_event

T = TypeVar("T")
SERVER = Path(__file__).with_name("server.py")
PATIENCE_S = 120.0
SIDE_BY_SIDE = 2


class Process(Protocol):
    """A run under way: subprocess.Popen, or a fork of a server."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


class Fork:
    """A fork of a server's. Its `returncode` is as subprocess has it: negative for a signal."""

    def __init__(self, server: Server, pid: int) -> None:
        self._server, self.pid = server, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        return self._code if self._code is not None else self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._code if self._code is not None else self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("pertoken", timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        if self._code is None:
            os.kill(self.pid, sig)

    def _look(self, timeout: float | None) -> int | None:
        told = self._server.hear(timeout)
        if told is not None:
            self._code = told["code"]
            self._server.say({})  # it may forget the process now
        return self._code


@dataclass(frozen=True)
class Streams:
    """What a run finds when it starts: where its standard output goes (None: a file that is read at its end), which
    descriptors are closed, and whether SIGHUP is ignored."""

    out: Path | None = None
    closed: tuple[int, ...] = ()
    nohup: bool = False


class Server:
    """One process of server.py; runs one job at a time."""

    def __init__(self, tokenizer: Path, preload: Path | None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"LD_PRELOAD": str(preload)} if preload else {})
        command = [sys.executable, str(SERVER), str(tokenizer)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def say(self, message: dict[str, Any]) -> None:
        self._in.write((json.dumps(message) + "\n").encode())

    def hear(self, timeout: float | None) -> dict[str, Any] | None:
        """The next message, None if there is none in time."""
        if not select.select([self._out], [], [], timeout)[0]:
            return None
        line = self._out.readline()
        assert line, f"the server has ended: {self._process.poll()}"
        message: dict[str, Any] = json.loads(line)
        return message

    def start(self, args: Iterable[object], said: Path, streams: Streams, **job: Any) -> Fork:
        out = streams.out or said.with_suffix(".out")
        job |= {"args": [str(a) for a in args], "out": str(out), "err": str(said.with_suffix(".err"))}
        self.say(job | {"closed": list(streams.closed), "nohup": streams.nohup})
        told = self.hear(PATIENCE_S)
        assert told is not None, "the server does not answer"
        return Fork(self, told["pid"])

    def close(self) -> None:
        self._in.close()
        self._process.wait(timeout=PATIENCE_S)
        self._out.close()


@dataclass(frozen=True)
class Ended:
    """A run that has ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass
class Desk:
    """One server, and a folder, for one trial at a time."""

    server: Server
    world: World
    folder: Path
    count: int = 0
    running: Running | None = None

    def start(
        self,
        *args: object,
        fault: Fault | None = None,
        below: Path | None = None,
        max_file_bytes: int | None = None,
        environment: Mapping[str, str] | None = None,
        streams: Streams | None = None,
    ) -> Running:
        """`pertoken ARGS`, on a disk that fails below a folder."""
        self.count += 1
        said = self.folder / f"said-{self.count}"
        environment = {**(environment or {}), **(fault.environment(below or self.folder) if fault is not None else {})}
        job = {"environment": environment, "max_file_bytes": max_file_bytes}
        process = self.server.start(args, said, streams or Streams(), **job)
        self.running = Running(process, said)
        return self.running

    def clear(self) -> None:
        """End what a test that failed has left running."""
        if self.running is not None and self.running.process.poll() is None:
            self.running.process.send_signal(signal.SIGKILL)
            self.running.process.wait(PATIENCE_S)

    def run(self, *args: object, **kwargs: Any) -> Ended:
        return self.start(*args, **kwargs).ended()

    def new(self) -> Path:
        """A path that is not there yet."""
        self.count += 1
        return self.folder / f"run-{self.count}"


@dataclass
class Running:
    process: Process
    said: Path

    def ended(self, timeout: float = PATIENCE_S) -> Ended:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(PATIENCE_S)
            raise
        files = [self.said.with_suffix(s) for s in (".out", ".err")]
        texts = [f.read_text(encoding="utf-8", errors="replace") if f.exists() else "" for f in files]
        return Ended(code, *texts)


@dataclass
class Workshop:
    """The desks, and the undisturbed runs that all others are compared with."""

    world: World
    folder: Path
    shim: Path | None
    desks: queue.Queue[Desk] = field(default_factory=queue.Queue)
    servers: list[Server] = field(default_factory=list)
    references: dict[str, Path] = field(default_factory=dict)
    durations_s: dict[Path, float] = field(default_factory=dict)

    def open(self) -> None:
        for number in range(SIDE_BY_SIDE):
            self.servers.append(Server(self.world.folder / "tokenizer", self.shim))
            folder = self.folder / f"desk-{number}"
            folder.mkdir(parents=True)
            self.desks.put(Desk(self.servers[-1], self.world, folder))
        for server in self.servers:
            told = server.hear(PATIENCE_S)
            assert told == {"ready": True}, told

    def close(self) -> None:
        for server in self.servers:
            server.close()

    @contextmanager
    def desk(self) -> Iterator[Desk]:
        desk = self.desks.get()
        try:
            yield desk
        finally:
            desk.clear()
            self.desks.put(desk)

    def each(self, trial: Callable[[Desk, Any], T], items: Iterable[Any]) -> list[T]:
        """`trial(desk, item)` for every item, as many side by side as there are desks."""

        def at_a_desk(item: Any) -> T:
            with self.desk() as desk:
                return trial(desk, item)

        with ThreadPoolExecutor(len(self.servers)) as pool:
            return list(pool.map(at_a_desk, items))

    def recipe(self, name: str, **changes: Any) -> Path:
        path = self.folder / f"{name}.toml"
        if not path.exists():
            self.world.write_recipe(path.with_suffix(""), **changes)
        return path

    def reference(self, desk: Desk, recipe: Path) -> Path:
        """The undisturbed run of a recipe, made once. To be asked for before trials go side by side."""
        if recipe.stem not in self.references:
            run = self.folder / f"{recipe.stem}-reference"
            log = run.with_suffix(".calls")
            start = time.monotonic()
            ended = desk.run("train", recipe, f"out_dir={run}", fault=Fault(log=log), below=run)
            assert ended.code == 0, ended.said
            self.durations_s[run] = time.monotonic() - start
            self.references[recipe.stem] = run
        return self.references[recipe.stem]


def steps_saved(run: Path) -> dict[int, Path]:
    """Step -> folder of every finished checkpoint, whole or damaged, oldest first."""
    found = sorted(run.glob("checkpoints/step-*"))
    return {int(folder.name[5:]): folder for folder in found if folder.name[5:].isdigit()}


def problem_of(folder: Path) -> str | None:
    """Why a checkpoint is not what its manifest says, by a reading of the manifest that shares no code with
    pertoken's. None if it is whole."""
    try:
        listed = json.loads((folder / "manifest.json").read_bytes())["files"]
    except (OSError, ValueError) as error:
        return f"manifest.json: {error}"
    there = {path.name for path in folder.iterdir()} - {"manifest.json"}
    if there != set(listed):
        return f"holds {sorted(there)}, its manifest lists {sorted(listed)}"
    for needed in ("config.json", "trainer_state.json", "model.safetensors", "tokenizer.json"):
        if needed not in listed:
            return f"{needed} is not in its manifest"
    if not any(name.startswith("optimizer") for name in listed):
        return "no optimizer"
    for name, expected in listed.items():
        content = (folder / name).read_bytes()
        if (folder / name).is_symlink() or len(content) != expected["bytes"]:
            return f"{name} is a link, or of another size"
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            return f"{name} has another content"
    return None


def whole_steps(run: Path) -> list[int]:
    return [step for step, folder in steps_saved(run).items() if problem_of(folder) is None]


def tensors_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def difference(run: Path, reference: Path) -> str | None:
    """What tells `run` from the undisturbed one: weights, optimizer and rows; None if nothing does."""
    last = max(steps_saved(reference))
    folder = run / "checkpoints" / f"step-{last:08d}"
    problem = problem_of(folder) if folder.is_dir() else f"step {last} is not saved"
    if problem is not None:
        return problem
    ours, theirs = tensors_of(folder), tensors_of(reference / "checkpoints" / folder.name)
    if ours.keys() != theirs.keys():
        return f"files {sorted(ours)}, not {sorted(theirs)}"
    for name, content in theirs.items():
        if ours[name] != content:
            return f"{name} of step {last} differs"
    rows, expected = untimed(rows_of(run)), untimed(rows_of(reference))
    if [row["step"] for row in rows] != list(range(1, last + 1)):
        return f"rows of steps {[row['step'] for row in rows]}"
    for row, other in zip(rows, expected, strict=True):
        if row != other:
            return f"row {row['step']} differs: {row} and {other}"
    return None


def torn_event(run: Path) -> str | None:
    """What is wrong with the lines of events.jsonl, which a run that has ended leaves whole."""
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    torn = [line for line in lines if not is_event(line) or not line.endswith(b"\n")]
    if torn:
        return f"events.jsonl has lines that are no events: {torn}"
    return None if json.loads(lines[-1])["kind"] == "end" else f"events.jsonl does not know the end: {lines[-1]!r}"


def forget_after(run: Path, step: int) -> None:
    """As a crash right then leaves it: no later checkpoint."""
    for later, folder in steps_saved(run).items():
        if later > step:
            shutil.rmtree(folder)
    best = run / "checkpoints" / "best"
    if best.is_symlink() and not best.exists():
        best.unlink()


def wait_until(happens: Callable[[], bool], process: Process, *, patience_s: float = PATIENCE_S) -> bool:
    """Whether it happened before the process ended."""
    deadline = time.monotonic() + patience_s
    while not happens():
        if process.poll() is not None:
            return happens()
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.0005)
    return True


def rows_so_far(run: Path) -> int:
    path = run / "metrics.jsonl"
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
