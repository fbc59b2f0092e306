"""The classes of several processes. Three are started once, and compute the step in every way together.

    python -m pertoken.prove.ranks FOLDER RANK

`FOLDER` holds the model, the samples, the reference gradient and `job.json`; rank 0 leaves `results.json` there.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from pertoken.checkpoints.read import load_model
from pertoken.data.batch.pack import Sample, collate
from pertoken.data.batch.share import Share, denominators_of, share_of
from pertoken.folders.open import save_folder
from pertoken.model.protocol import LanguageModel
from pertoken.objective.choose import objective_of
from pertoken.objective.terms import Objective
from pertoken.prove.case import EXACT, Case, balance_loss_of, gradient_of_step, set_balance_loss
from pertoken.prove.evaluation import evaluated
from pertoken.prove.plain_update import why_not_proved
from pertoken.prove.rank_updates import update_of_ranks, write_plan
from pertoken.prove.report import Comparison, Gradient, Result, compare
from pertoken.prove.samples import InMemory
from pertoken.recipe.train import TrainConfig
from pertoken.training.parallel import World, end_process, leave, parallelize
from pertoken.training.precision import Precision

__all__ = ["RANK_CLASSES", "run_ranks"]

_MOST = 3
_Kind = Literal["gradient", "update", "evaluation"]
RANK_CLASSES: dict[str, tuple[_Kind, Literal["ddp", "fsdp"], int]] = {
    "DDP, 2 ranks": ("gradient", "ddp", 2),
    "DDP, 3 ranks": ("gradient", "ddp", 3),
    "FSDP2, 2 ranks": ("gradient", "fsdp", 2),
    "FSDP2, 3 ranks": ("gradient", "fsdp", 3),
    "update, DDP, 2 ranks": ("update", "ddp", 2),
    "update, FSDP2, 3 ranks": ("update", "fsdp", 3),
    "evaluation, 3 ranks": ("evaluation", "ddp", 3),
}
COMMAND = (sys.executable, "-m", "pertoken.prove.ranks")
_TIMEOUT_S = 600


def run_ranks(names: Sequence[str], case: Case) -> list[Result]:
    """The results of the named classes. A process that dies fails them all, with its last words."""
    why = why_not_proved(case.train)
    updates = [name for name in names if RANK_CLASSES[name][0] == "update"] if why is not None else []
    others = [name for name in names if name not in updates]
    skipped = [Result(name, "float64", "skipped", note=why or "") for name in updates]
    return skipped + (_run_ranks(others, case) if others else [])


def _run_ranks(names: Sequence[str], case: Case) -> list[Result]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_job(folder, names, case)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*COMMAND, name, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
            for rank in range(_MOST)
        ]
        try:
            said = [process.communicate(timeout=_TIMEOUT_S)[1] for process in processes]
        except subprocess.TimeoutExpired:
            said = [f"no answer within {_TIMEOUT_S} s"]
        finally:
            for process in processes:
                process.kill()
        written = folder / "results.json"
        results = [Result(**values) for values in json.loads(written.read_text())] if written.exists() else []
    done = {result.name for result in results}
    lines = (f"rank {rank}: {text.strip().splitlines()[-1]}" for rank, text in enumerate(said) if text.strip())
    last_words = "; ".join(lines) or "the processes ended without a word"
    return results + [Result(n, "float64", "failed", EXACT, note=last_words) for n in names if n not in done]


def _write_job(folder: Path, names: Sequence[str], case: Case) -> None:
    save_folder(case.model, folder / "model", eos_token_id=None)
    save_file({name: g.contiguous() for name, g in case.reference.gradients.items()}, folder / "reference.safetensors")
    samples = case.chosen.samples
    arrays: dict[str, Any] = {}
    for i in range(len(samples)):
        arrays |= {f"tokens{i}": samples[i].tokens, f"mask{i}": samples[i].loss_mask}
    np.savez(folder / "samples.npz", **arrays)
    job = {
        "classes": list(names),
        "balance_loss": balance_loss_of(case.model),
        "train": case.train.model_dump(mode="json", exclude_none=True),
        "loss": case.reference.loss,
        "samples": len(samples),
    }
    (folder / "job.json").write_text(json.dumps(job))
    if any(RANK_CLASSES[name][0] == "update" for name in names):
        write_plan(folder, case)


def rank_main(folder: Path, rank: int) -> None:
    """What each of the processes does."""
    job = json.loads((folder / "job.json").read_text())
    with np.load(folder / "samples.npz") as arrays:
        samples = InMemory([Sample(arrays[f"tokens{i}"], arrays[f"mask{i}"]) for i in range(job["samples"])])
    reference = Gradient(job["loss"], load_file(folder / "reference.safetensors") if rank == 0 else {})
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=_MOST,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(2, _MOST + 1)}
    results: list[Result] = []
    for name in job["classes"]:
        kind, how, size = RANK_CLASSES[name]
        if rank < size:
            world = World(rank, size, rank, groups[size])
            model = load_model(folder / "model", dtype=torch.float64)
            set_balance_loss(model, job["balance_loss"])
            if kind == "gradient":
                objective = objective_of(TrainConfig.model_validate(job["train"]))
                result = _gradient(name, how, world, model, samples, reference, objective)
            elif kind == "update":
                result = update_of_ranks(name, how, world, model, samples, folder)
            else:
                result = evaluated(name, model, samples, reference.loss, world)
            results += [result] if result is not None and rank == 0 else []
            del model
            gc.collect()  # DDP and its model hold each other
        if rank == 0:
            (folder / "results.json").write_text(json.dumps([asdict(result) for result in results]))
    leave(World(rank, _MOST, rank))
    end_process(0)


def _gradient(
    name: str,
    how: Literal["ddp", "fsdp"],
    world: World,
    model: LanguageModel,
    samples: InMemory,
    reference: Gradient,
    objective: Objective,
) -> Result | None:
    """Dealt by the plan, and dealt as unevenly as can be; the worse of the two. None but on rank 0."""
    device = torch.device("cpu")
    wrapped = parallelize(model, how, world, device=device, layers=model.layers)
    shares = [
        share_of(
            samples,
            np.arange(len(samples)),
            token_budget=int(samples.lengths.max()),
            rank=world.rank,
            world_size=world.size,
        ),
        _unevenly(samples, world),
    ]
    found: list[Comparison] = []
    for share in shares:
        got = gradient_of_step(
            model,
            share,
            precision=Precision("float64", device),
            world=world,
            wrapped=wrapped,
            objective=objective,
        )
        if world.is_main:
            found.append(compare(got, reference))
        del got  # a whole gradient
    if not world.is_main:
        return None
    worse = max(found, key=lambda c: c.gradient_error)
    return Result.judge(name, "float64", EXACT, worse, "a rank without a supervised token; empty micro-batches")


def _unevenly(samples: InMemory, world: World) -> Share:
    """The last rank gets the sample that nobody supervises, the one before it (of three) one more, rank 0 the others.

    Two micro-batches each, of which all but rank 0's second are empty.
    """
    last = len(samples) - 1
    mine = {world.size - 1: [last], world.size - 2: [0]}.get(world.rank, [])
    if world.rank == 0:
        mine = list(range(0 if world.size == 2 else 1, last))
        parts = [mine[:1], mine[1:]]
    else:
        parts = [mine, []]
    return Share(
        micro_batches=tuple(collate([samples[i] for i in part]) for part in parts),
        sample_ids=tuple(np.array(part, dtype=np.int64) for part in parts),
        denominators=denominators_of(samples, np.arange(len(samples))),
    )


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), int(sys.argv[2]))
