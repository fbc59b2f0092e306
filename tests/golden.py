"""What runs of every kind compute on this machine: recorded once, compared ever after.

    make golden            compare with the record of this machine; the first time, make it
    make golden RECORD=1   make it anew, after a change that was meant

A refactoring must leave every bit as it was. The last bits depend on the processor, on torch and on the number of
threads, so the record stays out of git, and one made elsewhere is refused. The recipes are written here and the files
read here, so that nothing of the code under test can hide a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tomli_w
import torch
from faults.kills import KINDS
from safetensors.torch import load_file
from tiny import MODEL, World

REPOSITORY = Path(__file__).parents[1]
RECORD = REPOSITORY / ".golden.json"
OLD_RUN = Path(__file__).parent / "fixtures" / "old_run"
FIGURES = (
    *("step", "epoch", "loss", "loss_sum", "num_tokens", "aux_loss", "grad_norm", "lr", "samples", "tokens"),
    *("positions", "skipped", "loss_scale", "expert_load", "eval_loss", "eval_bits_per_byte"),
)
ENGINES = {"kernels on": {"train__compile": "on"}, "kernels off": {"train__compile": "off"}}
LLAMA = {"model__family": "llama", "model__tie_word_embeddings": False}
MORE: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Mixtral": LLAMA | {"model__use_moe": True, "model__num_experts": 4, "model__num_experts_per_tok": 2},
    "balance loss of MiniMind": {"model__use_moe": True, "model__aux_loss": "micro_batch"},
    "activation checkpointing": {"train__activation_checkpointing": True},
    "pretraining": {"stage": "pretrain", "data__path": "text.txt", "data__eval_path": "chats.jsonl"},
}
RANKS: dict[str, tuple[int, dict[str, Any]]] = {
    "two ranks, DDP": (2, {"train__micro_batch_tokens": 400}),
    "three ranks, FSDP2, experts": (3, {"train__parallel": "fsdp", "model__use_moe": True}),
}


@dataclass(frozen=True)
class Kind:
    """A run to make: what its recipe changes, and on how many processes."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1


def kinds() -> list[Kind]:
    found = []
    for name, changes in (KINDS | MORE).items():
        chosen = (
            "train__compile" in changes or changes.get("train__dtype") == "float16"
        )  # which the kernels leave alone
        engines = {"as it is": {}} if chosen else ENGINES
        found += [Kind(f"{name}, {engine}", changes | how) for engine, how in engines.items()]
    return found + [Kind(name, changes, ranks) for name, (ranks, changes) in RANKS.items()]


def machine() -> dict[str, str]:
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags"))
    ]
    processor = hashlib.sha256("\n".join(sorted(set(models))).encode()).hexdigest()[:16]
    return {
        "processor": processor,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def recipe_of(folder: Path, kind: Kind, out: Path) -> Path:
    values: dict[str, Any] = {
        "stage": "sft",
        "out_dir": str(out),
        "model": dict(MODEL),
        "data": {
            "path": "chats.jsonl",
            "eval_path": "held-out.jsonl",
            "tokenizer": "tokenizer",
            "max_seq_len": 700,
        },
        "train": {
            "batch_size": 8,
            "max_steps": 8,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "dtype": "float32",
            "device": "cpu",
            "eval_interval": 5,
        },
        "checkpoint": {"save_interval": 4},
    }
    for key, value in kind.changes.items():
        *sections, leaf = key.split("__")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    values["train"]["max_steps"] = 8
    if values["stage"] == "pretrain":
        values["data"]["eval_path"] = "held-out.txt"
    for key in ("path", "eval_path", "tokenizer"):
        values["data"][key] = str(folder / values["data"][key])
    values["data"]["store"] = str(folder / f"store-{out.name}")
    path = out.with_suffix(".toml")
    path.write_text(tomli_w.dumps(values))
    return path


def run(args: list[str], ranks: int = 1) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "pertoken", *args], capture_output=True, text=True, env=environment
    )
    if ended.returncode:
        raise SystemExit(
            f"{' '.join(args)}: ended with {ended.returncode}\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}"
        )


def found_in(out: Path) -> dict[str, Any]:
    """Every figure of every row, floats as text of all their bits, and hashes of the last checkpoint's tensors."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    newest = max(p for p in (out / "checkpoints").iterdir() if p.name.startswith("step-"))
    hashes = {}
    for path in sorted(newest.glob("*.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(
                tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else repr(tensor).encode()
            )
        hashes[path.name] = digest.hexdigest()
    return {
        "rows": [{key: _bits(row[key]) for key in FIGURES if key in row} for row in rows],
        "checkpoint": newest.name,
        "tensors": hashes,
    }


def _bits(value: Any) -> Any:
    if isinstance(value, list):
        return [_bits(v) for v in value]
    return value.hex() if isinstance(value, float) else value


def made(folder: Path, number: int, kind: Kind) -> dict[str, Any]:
    out = folder / f"run-{number}"
    run(["train", str(recipe_of(folder, kind, out))], kind.ranks)
    return found_in(out)


def resumed(folder: Path) -> dict[str, Any]:
    """The checkpoint of an earlier version, taken to its end."""
    out = folder / "old-run"
    shutil.copytree(OLD_RUN, out, symlinks=True)
    overrides = [f"out_dir={out}", f"data.path={out / 'chats.jsonl'}", f"data.tokenizer={out / 'tokenizer'}"]
    run(["train", str(out / "recipe.toml"), *overrides, f"data.store={folder / 'old-store'}", "--resume"])
    return found_in(out)


def everything(only: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        World.make(folder)
        for part in ("chats", "held-out"):
            rows = [json.loads(line)["messages"] for line in (folder / f"{part}.jsonl").read_text().splitlines()]
            (folder / f"{part}.txt").write_text("\n".join(m["content"] for row in rows for m in row))
        shutil.move(folder / "chats.txt", folder / "text.txt")
        todo = [(i, kind) for i, kind in enumerate(kinds()) if only in kind.name]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = dict(zip([k.name for _, k in todo], pool.map(lambda t: made(folder, *t), todo), strict=True))
        if OLD_RUN.is_dir() and only in "resume of an earlier version":
            found["resume of an earlier version"] = resumed(folder)
    return found


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(k for k in now if k not in before)]
        return [line for k in keys for line in differences(before.get(k), now.get(k), f"{where} {k}")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True), start=1)
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    return [] if before == now else [f"{where.strip()}: {before} is now {now}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="make the record anew")
    parser.add_argument("--only", default="", help="the kinds whose name has this in it")
    parser.add_argument("--file", type=Path, default=RECORD, help="where the record is")
    options = parser.parse_args()
    start = time.monotonic()
    now = everything(options.only)
    if options.record or not options.file.exists():
        options.file.write_text(json.dumps({"machine": machine(), "kinds": now}, indent=1))
        print(f"recorded {len(now)} kinds of run in {time.monotonic() - start:.0f} s: {options.file}")
        return
    record = json.loads(options.file.read_text())
    if record["machine"] != machine():
        sys.exit(f"{options.file}: made on another machine ({record['machine']}), this is {machine()}; record it anew")
    before = {name: found for name, found in record["kinds"].items() if options.only in name}
    changed = 0
    for name in [*before, *(n for n in now if n not in before)]:
        lines = differences(before.get(name, {}), now.get(name, {}))
        changed += bool(lines)
        print(f"{'same     ' if not lines else 'DIFFERENT'}  {name}")
        for line in lines[:4]:
            print(f"             {line}")
    same = f"{len(before) - changed} of {len(before)} kinds of run"
    print(f"{same} are the same to the bit ({time.monotonic() - start:.0f} s)")
    sys.exit(1 if changed else 0)


if __name__ == "__main__":
    main()
