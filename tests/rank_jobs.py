"""What each rank of the multi-process tests does: `torchrun ... rank_jobs.py FOLDER`, a list of trainings in one world.

FOLDER/jobs.json lists {"recipe": dict, "resume": bool}. Besides what training writes, each rank notes the samples it
computed, by step, in `RUN/seen-RANK.jsonl`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

import pertoken.runs.computation as computation
from pertoken import Recipe, train
from pertoken.data.batch.share import Share
from pertoken.training.parallel import end_process


def _note_samples(out_dir: Path) -> None:
    seen = (out_dir.parent / f"{out_dir.name}-seen-{os.environ['RANK']}.jsonl").open("a")
    share_of = computation.share_of

    def noted(*args: Any, **kwargs: Any) -> Share:
        share: Share = share_of(*args, **kwargs)
        seen.write(json.dumps([int(i) for ids in share.sample_ids for i in ids]) + "\n")
        seen.flush()
        return share

    computation.share_of = noted


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    original = computation.share_of
    for job in json.loads((folder / "jobs.json").read_text()):
        recipe = Recipe.parse(job["recipe"])
        computation.share_of = original
        _note_samples(Path(recipe.out_dir))
        train(recipe, resume=job["resume"])
    dist.barrier()
    end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
