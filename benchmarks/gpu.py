"""On one GPU, in bfloat16: pertoken, transformers in a padded loop, TRL with and without Liger; full models and LoRA.

    python benchmarks/gpu.py [--only 26M "135M LoRA"] [--seconds 240] [--warm-up 10] [--steps 20] [--out DIR]

A process for each workload, in which all contenders take their turn; the next one imports its libraries meanwhile.
Before that, all workloads compile at once what torch.compile needs, so that it lies in the cache. A contender that
cannot run (TRL not installed, say) is named with its reason. Each result is appended to gpu.jsonl as it comes, and
after `--seconds` no further workload begins. `share` is that of a bfloat16 product of 8192 x 8192, measured in the same
process; useful operations alone count. gpu_worker.py says what is measured, and how.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from common import OURS, ROOT, claim, main_of, parser_of, ratio, say, write

WORKER = Path(__file__).with_name("gpu_worker.py")
WORKLOADS = ("26M", "135M LoRA", "135M", "0.6B LoRA", "0.6B", "30M")
PEER_STEP_MS = 45.0  # a peer's published step of the 26M model at 16 x 340, on a GPU of its own
COMPILED = {False: "pertoken, compiled", True: "pertoken, bf16 base, compiled"}


def start(arguments: argparse.Namespace, workload: str, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, WORKER, workload, "--device", arguments.device, *more]
    caches = arguments.work / "inductor"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(arguments.work / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(caches),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(arguments.out / "gpu-stderr.txt").open("a"),
        text=True,
    )


def compile_all(arguments: argparse.Namespace, limit_s: float) -> None:
    """Two steps of each compiled contender, all workloads at once, unmeasured."""
    began = time.perf_counter()
    processes = [
        start(arguments, name, "--contenders", COMPILED["LoRA" in name], "--warm-up", 1, "--steps", 2)
        for name in arguments.only
    ]
    for process in processes:
        try:
            process.communicate(timeout=max(1.0, limit_s - (time.perf_counter() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    say(f"compiled in {time.perf_counter() - began:.0f} s")


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each contender of each workload, until time ends."""
    found: list[dict[str, Any]] = []
    ends = arguments.began + arguments.seconds
    more = ["--warm-up", arguments.warm_up, "--steps", arguments.steps, "--wait"]
    more += ["--profile", arguments.out / "gpu-profile.txt"] if arguments.profile else []
    following: subprocess.Popen[str] | None = None
    for i, name in enumerate(arguments.only):
        process = following or start(arguments, name, *more)
        following = start(arguments, arguments.only[i + 1], *more) if i + 1 < len(arguments.only) else None
        if time.perf_counter() > ends:
            found.append({"workload": name, "contender": "all", "failed": "not begun: --seconds are over"})
            end(process)
            continue
        say(f"{name}, {ends - time.perf_counter():.0f} s left")
        stopper = threading.Timer(max(5.0, ends + 30 - time.perf_counter()), process.kill)
        stopper.start()
        found += results_of(process, arguments)
        stopper.cancel()
        if process.wait():
            found.append({"workload": name, "contender": "all", "failed": f"exit code {process.returncode}"})
    return found


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def results_of(process: subprocess.Popen[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What a worker says, each line kept at once."""
    found: list[dict[str, Any]] = []
    rate: dict[str, Any] = {}
    assert process.stdin is not None
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready"):
            process.stdin.write("go\n")
            process.stdin.flush()
            continue
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if "matrix_tflops" in values:
            rate = values
            continue
        values |= rate
        if "tflops" in values:
            values["share"] = values["tflops"] / rate["matrix_tflops"]
        with (arguments.out / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
        what = values.get("failed") or f"{values['step_ms']:.1f} ms"
        say(f"  {values['contender']}: {what}")
        found.append(values)
    return found


def row_of(values: dict[str, Any]) -> dict[str, Any]:
    row = {"workload": values["workload"], "contender": values["contender"]}
    if "failed" in values:
        return row | {"note": values["failed"][:160]}
    return row | {
        "step ms": round(values["step_ms"], 2),
        "samples/s": round(values["samples_per_s"], 1),
        "tokens/s": round(values["tokens_per_s"]),
        "share": f"{values['share']:.1%}",
        "peak GB": round(values.get("peak_gb", float("nan")), 2),
        "first loss": None if values["first_loss"] is None else round(values["first_loss"], 4),
        "last loss": None if values["last_loss"] is None else round(values["last_loss"], 4),
    }


def claims_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest of ours against the fastest of TRL's; no bound was promised beyond that of LoRA."""
    claims = []
    for name in dict.fromkeys(values["workload"] for values in found):
        fine = [v for v in found if v["workload"] == name and "step_ms" in v]
        ours = min((v["step_ms"] for v in fine if v["contender"].startswith(OURS)), default=None)
        theirs = min((v["step_ms"] for v in fine if v["contender"].startswith("TRL")), default=None)
        claims.append(claim(f"{name}: times against the fastest TRL", ratio(theirs, ours), at_least=1.0))
        if name == "26M":
            claims.append(claim("26M: step in ms", ours, at_most=PEER_STEP_MS))
    return claims


def main() -> None:
    parser = parser_of(__doc__ or "", name="gpu")
    parser.add_argument("--only", nargs="+", default=list(WORKLOADS), metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=900, help="after these no further workload begins")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--profile", action="store_true", help="write gpu-profile.txt: what the GPU computes in our steps"
    )
    parser.add_argument(
        "--compile", choices=("first", "only", "no"), default="first", help="fill torch.compile's cache"
    )
    arguments = parser.parse_args()
    arguments.began = time.perf_counter()
    arguments.out, arguments.work = arguments.out.resolve(), arguments.work.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.compile != "no":
        compile_all(arguments, limit_s=arguments.seconds / 3)
    if arguments.compile == "only":
        return
    found = measured(arguments)
    gpu = next((values for values in found if "gpu" in values), {})
    write(
        arguments.out,
        "gpu",
        title="One GPU, bfloat16",
        settings={"GPU": gpu.get("gpu"), "bf16 TFLOP/s": round(gpu.get("matrix_tflops", 0.0), 1)}
        | {"steps": arguments.steps, "warm-up": arguments.warm_up},
        rows=[row_of(values) for values in found],
        claims=claims_of(found),
        notes=[f"took {time.perf_counter() - arguments.began:.0f} s"],
    )


if __name__ == "__main__":
    main_of(main)
