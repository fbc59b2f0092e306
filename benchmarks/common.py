"""What the benchmarks share: processes measured from outside, the machine they ran on, results as Markdown and JSON.

Nothing here imports torch, so that the process which measures stays small and idle while another one computes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
OURS = "pertoken"
STEP = re.compile(r"^step\s+(\d+)(?:\s+loss\b|\s*$)")  # the line that a contender prints after each step
# The [model] keys of the families that finetune.py, pretrain.py and families.py measure. Llama 3's scaling is that of
# Llama-3.2-1B, Granite's multipliers are those of Granite-3.1-2B; windows are shorter than GSM8K's samples, so that
# they count. The balance loss of mixtures is off: transformers leaves it out unless it is asked for.
_MIXTURE = {"use_moe": "true", "num_experts": 8, "num_experts_per_tok": 2, "aux_loss_coef": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3"},
    "qwen2": {"family": "qwen2"},
    "llama": {"family": "llama"},
    "llama3": {
        "family": "llama",
        "rope_theta": 500000.0,
        "rope_scaling.factor": 32.0,
        "rope_scaling.low_freq_factor": 1.0,
        "rope_scaling.high_freq_factor": 4.0,
        "rope_scaling.original_max_position_embeddings": 8192,
    },
    "yarn": {
        "family": "qwen2",
        "rope_scaling.rope_type": "yarn",
        "rope_scaling.factor": 4.0,
        "rope_scaling.original_max_position_embeddings": 256,
    },
    "mistral": {"family": "mistral", "sliding_window": 128},
    "phi3": {"family": "phi3", "sliding_window": 128, "partial_rotary_factor": 0.75},
    "smollm3": {"family": "smollm3", "no_rope_layers": [1, 1, 1, 0] * 2},
    "olmo2": {"family": "olmo2"},
    "olmo3": {"family": "olmo3", "rope_theta": 500000.0, "sliding_window": 128},
    "granite": {
        "family": "granite",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_scaling": 8.0,
    },
    "gemma": {"family": "gemma"},
    "gemma2": {
        "family": "gemma2",
        "sliding_window": 128,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {"family": "gemma3", "sliding_window": 128},
    "qwen3_moe": {"family": "qwen3", **_MIXTURE, "moe_intermediate_size": 416},
    "qwen2_moe": {"family": "qwen2", **_MIXTURE, "moe_intermediate_size": 416, "shared_expert_intermediate_size": 416},
    "olmoe": {"family": "olmoe", **_MIXTURE, "intermediate_size": 416},
    "mixtral": {"family": "llama", **_MIXTURE, "intermediate_size": 416},
}
_POLL_S = 0.02
_PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "datasets", "accelerate", "trl", "cut-cross-entropy")


class Failed(Exception):
    """A contender did not run to its end; the message says why."""


class Missing(Exception):
    """Something that a benchmark needs is not here; the message says what to give."""


@dataclass
class Finished:
    """A process as seen from outside. Times are seconds since it was started."""

    wall_s: float
    peak_bytes: int  # of resident memory, of this process without its children
    lines: list[tuple[float, str]] = field(default_factory=list)  # when each line of its output arrived

    @property
    def output(self) -> str:
        return "".join(line for _, line in self.lines)

    def steps(self, pattern: re.Pattern[str] = STEP) -> dict[int, float]:
        """step -> when it was over, from the lines that `pattern` matches."""
        return {int(match[1]): at for at, line in self.lines if (match := pattern.search(line))}


def run(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    stop_after: int | None = None,
    step_line: re.Pattern[str] = STEP,
    limit_s: float = 3600,
) -> Finished:
    """Run a process alone and wait for it, reading the clock as its lines arrive and its peak memory from /proc.

    `stop_after` ends it once that step is over: a contender may then plan a long run of which few steps are measured.
    Raises Failed with the end of its output.
    """
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
        **(env or {}),
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    finished = Finished(0.0, 0)
    done = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            finished.lines.append((time.perf_counter() - start, line))
            match = step_line.search(line)
            if stop_after is not None and match and int(match[1]) >= stop_after:
                done.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    late = False
    try:
        while process.poll() is None and not done.is_set() and not late:
            finished.peak_bytes = max(finished.peak_bytes, peak_bytes(process.pid))
            late = time.perf_counter() - start > limit_s
            time.sleep(_POLL_S)
        finished.wall_s = time.perf_counter() - start
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the helpers it may have started
        process.wait()
    reader.join(timeout=10)
    if process.stdout is not None and not reader.is_alive():  # a helper that left the group may hold it open
        process.stdout.close()
    if late:
        raise Failed(f"stopped after {limit_s:.0f} s: {_tail(finished.output)}")
    if process.returncode and not done.is_set():
        raise Failed(f"exit code {process.returncode}: {_tail(finished.output)}")
    return finished


def peak_bytes(pid: int | str = "self") -> int:
    """The largest resident memory a process has had, 0 where the system does not say."""
    return _status_bytes(pid, "VmHWM")


def resident_bytes(pid: int | str = "self") -> int:
    return _status_bytes(pid, "VmRSS")


def _status_bytes(pid: int | str, name: str) -> int:
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def _tail(text: str, characters: int = 600) -> str:
    return " | ".join(text.strip()[-characters:].splitlines())


def python(*arguments: object) -> list[object]:
    return [sys.executable, *arguments]


def alternate(
    contenders: dict[str, Callable[[int], Finished | dict[str, Any]]], rounds: int, *, once: Collection[str] = ()
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Run every contender once a round, never two at a time, each round beginning with another one.

    Returns (results by contender, why some have none or fewer). One that failed is not tried again, and those of
    `once` run in the first round alone.
    """
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    reasons: dict[str, str] = {}
    names = list(contenders)
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            if name in reasons or (round_ and name in once):
                continue
            say(f"round {round_ + 1} of {rounds}: {name}")
            try:
                results[name].append(contenders[name](round_))
            except (Failed, Missing) as problem:
                say(f"  {problem}")
                reasons[name] = str(problem)
    return results, reasons


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and greatest."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def machine() -> dict[str, Any]:
    """Processor, threads, commit and versions: what a figure cannot be read without."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    threads = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.get_num_threads(), torch.cuda.is_available())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return {
        "commit": commit(),
        "device": "cpu",
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": int(threads[0]),
        "python": platform.python_version(),
        "versions": versions,
    }


def processor() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def commit() -> str:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return result.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")


def claim(
    text: str,
    measured: float | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    aim: float | None = None,
    why_not: str = "",
) -> dict[str, Any]:
    """A line of the table of what was promised. `measured=None` is neither passed nor failed, but not measured."""
    assert (at_least is None) != (at_most is None), text
    bound = at_least if at_least is not None else at_most
    assert bound is not None
    verdict = "not measured"
    if measured is not None:
        holds = measured >= bound if at_least is not None else measured <= bound
        verdict = "passed" if holds else "not passed"
    return {
        "claim": text,
        "measured": None if measured is None else float(f"{measured:.4g}"),
        "bound": f"{'at least' if at_least is not None else 'at most'} {bound:g}",
        "aim": aim,
        "verdict": verdict,
        "note": why_not if measured is None else "",
    }


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def parser_of(doc: str, *, name: str) -> argparse.ArgumentParser:
    """A parser with what every script has: --out, --work."""
    parser = argparse.ArgumentParser(
        prog=f"benchmarks/{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the tables")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "benchmarks" / "scratch" / name, help="folder for data, runs and caches"
    )
    return parser


def existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise Missing(f"{path}: not here; give {what}")
    return path


def write(
    out: Path,
    name: str,
    *,
    title: str,
    rows: Sequence[dict[str, Any]],
    claims: Sequence[dict[str, Any]] = (),
    notes: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
) -> None:
    """NAME.json and NAME.md in `out`; the table is printed too."""
    result = {
        "name": name,
        "title": title,
        "machine": machine(),
        "settings": settings or {},
        "rows": list(rows),
        "claims": list(claims),
        "notes": list(notes),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = to_markdown(result)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def to_markdown(result: dict[str, Any]) -> str:
    """One benchmark's section: rows, claims, notes, machine."""
    parts = [f"## {result['title']}"]
    if result["settings"]:
        parts.append(", ".join(f"{key} {value}" for key, value in result["settings"].items()))
    parts += [table(result["rows"])] if result["rows"] else []
    parts += [table(result["claims"])] if result["claims"] else []
    parts += ["\n".join(f"- {note}" for note in result["notes"])] if result["notes"] else []
    parts.append(describe(result["machine"]))
    return "\n\n".join(parts) + "\n"


def describe(where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['processor']}, {where['cpus']} processors, {where['threads']} threads, device {where['device']}; "
        f"commit {where['commit']}; Python {where['python']}, {versions}"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):  # a spread
        return f"{value['median']:g} ({value['min']:g} to {value['max']:g})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")


def main_of(work: Callable[[], None]) -> None:
    """Run a script's main; what is missing is said in a line, with exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `run` ends the process it waits for
    try:
        work()
    except Missing as problem:
        say(f"skipped: {problem}")
        sys.exit(2)
    except Failed as problem:
        say(f"failed: {problem}")
        sys.exit(1)
