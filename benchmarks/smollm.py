"""Full fine-tuning of SmolLM2-135M on GSM8K: pertoken against TRL's SFTTrainer in bfloat16.

    python benchmarks/smollm.py --model FOLDER [--rounds 2] [--set key=value ...]

Batch 8, cut at 512 tokens. The model is a Hugging Face folder with weights written out in float32. Measured as the
steady state of finetune.py is: one process per contender and round, stopped after a few steps.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import DATA, OURS, Finished, Missing, alternate, claim, existing, main_of, parser_of, ratio, write
from finetune import Task, row_of, steady_steps

__all__ = ["RECIPE", "Figures", "arguments_of", "measure"]

RECIPE = """\
stage = "sft"
out_dir = "run"
[data]
path = "unset"
format = "prompt_completion"
prompt_key = "question"
completion_key = "answer"
max_seq_len = 512
overlong = "truncate"
[train]
batch_size = 8
learning_rate = 1e-4
warmup_steps = 20
dtype = "bfloat16"
device = "cpu"
"""
THEIRS = "TRL bf16"


@dataclass(frozen=True)
class Figures:
    """By contender: lines of the table, steps a second, peak memory in bytes."""

    inputs: dict[str, Any]
    rows: list[dict[str, Any]]
    speed: dict[str, float]
    peak: dict[str, int]
    reasons: dict[str, str]  # why some have none

    def settings(self, arguments: argparse.Namespace) -> dict[str, Any]:
        return {
            "model": arguments.model.name,
            "parameters": f"{self.inputs['parameters']:,}",
            "batch": self.inputs["batch_size"],
            "mean length": round(self.inputs["mean_length"], 1),
            "supervised": f"{self.inputs['supervised_share']:.0%}",
            "overrides": " ".join(arguments.set) or "none",
        }


def arguments_of(doc: str | None, name: str) -> argparse.Namespace:
    parser = parser_of(doc or "", name=name)
    parser.add_argument("--model", type=Path, help="a folder of SmolLM2-135M (or any other) with safetensors")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with sft/gsm8k")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--round-steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2, help="first steps of a round that do not count")
    parser.add_argument("--steps", type=int, default=200, help="planned, which decides the learning rates")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="recipe keys for pertoken")
    return parser.parse_args()


def measure(
    arguments: argparse.Namespace, recipe: str, contenders: dict[str, tuple[Sequence[str], Sequence[str]]]
) -> Figures:
    """Both sides' steady state. `contenders` are of pertoken, by a name that begins with its own, recipe keys; of
    TRL flags: (keys, flags)."""
    if arguments.model is None:
        raise Missing("no --model given, a folder with SmolLM2-135M")
    model = existing(arguments.model, "--model, a folder with SmolLM2-135M")
    data = existing(arguments.data, "--data, a folder with sft/gsm8k")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipe.toml").write_text(recipe)
    keys = (f"data.path={data / 'sft/gsm8k/train.jsonl'}", f"data.store={work / 'store'}", *arguments.set)
    seeds = [42 + r for r in range(arguments.rounds)]
    inputs = Task(work / "recipe.toml", (*keys, f"init_from={model.resolve()}"), work, arguments.steps).prepare(seeds)

    def contender(name: str, own_keys: Sequence[str], flags: Sequence[str]) -> Callable[[int], Finished]:
        task = Task(
            work / "recipe.toml", (*keys, *own_keys), work, arguments.steps
        )  # from the folder that all start from
        stop = arguments.round_steps
        if name.startswith(OURS):
            return lambda r: task.ours(seed=seeds[r], out=work / "run", stop_after=stop)
        return lambda r: task.trl(flags, seed=seeds[r], stop_after=stop)

    results, reasons = alternate(
        {name: contender(name, *settings) for name, settings in contenders.items()}, arguments.rounds
    )
    found = Figures(inputs, [], {}, {}, reasons)
    for name, runs in results.items():
        if steps := [s for finished in runs for s in steady_steps(finished, arguments.warm_up)]:
            found.rows.append(row_of(name, runs, steps, inputs["batch_size"]))
            found.speed[name] = 1 / statistics.median(steps)
            found.peak[name] = max(f.peak_bytes for f in runs)
    return found


def main() -> None:
    arguments = arguments_of(__doc__, "smollm")
    found = measure(arguments, RECIPE, {OURS: ([], []), THEIRS: ([], ["--bf16"])})
    speed, peak = found.speed, found.peak
    write(
        arguments.out,
        "smollm",
        title="Full fine-tuning: SmolLM2-135M on GSM8K",
        settings=found.settings(arguments),
        rows=found.rows,
        claims=[
            claim(
                "SmolLM2-135M, times against TRL bf16", ratio(speed.get(OURS), speed.get(THEIRS)), at_least=2.5, aim=4
            ),
            claim(
                "SmolLM2-135M, peak memory against TRL bf16",
                ratio(peak.get(OURS), peak.get(THEIRS)),
                at_most=0.4,
                aim=0.3,
            ),
        ],
        notes=[f"{name}: {reason}" for name, reason in found.reasons.items()],
    )


if __name__ == "__main__":
    main_of(main)
