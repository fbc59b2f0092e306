"""Fine-tuning a 30M model on GSM8K as chat: pertoken, TRL's SFTTrainer and MiniMind's script, side by side.

    python benchmarks/finetune.py [--family F] [--minimind CHECKOUT] [--rounds 2] [--steps 200] [--set key=value ...]

Two measures. Steady state: rounds of one process per contender, one after the other; each plans the whole run, does
`--round-steps` steps and is stopped, and the first `--warm-up` of them do not count. Whole run: `--steps` steps of
pertoken and of TRL bf16 from a cold compilation cache, start-up and saving counted, tokenizing not; both models are
then evaluated by `pertoken eval` on the same held-out rows. Peak memory is the resident set of the process.

TRL trains on the very tokens that pertoken supervises, in the same order, from the same weights, with the same
optimizer and learning rates. MiniMind's script has its own: its samples/s is comparable, its loss is not, so it has
none here.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    DATA,
    FAMILIES,
    OURS,
    ROOT,
    STEP,
    Finished,
    alternate,
    claim,
    existing,
    main_of,
    parser_of,
    python,
    ratio,
    run,
    say,
    spread,
    write,
)

SEED, MAX_SEQ_LEN = 42, 340
HERE = Path(__file__).resolve().parent
MINIMIND_STEP = re.compile(r"\]\((\d+)/\d+\), loss:")
TRL = {
    "TRL fp32": [],
    "TRL bf16": ["--bf16"],
    "TRL fp32, torch_compile": ["--torch-compile"],
    "TRL bf16, torch_compile": ["--bf16", "--torch-compile"],
}


@dataclass(frozen=True)
class Task:
    """What is trained, and where its files are."""

    recipe: Path
    overrides: tuple[str, ...]  # recipe keys
    work: Path
    steps: int  # planned, which decides the learning rates

    def prepare(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Make start, rows and inputs.json; tokens are ready for everyone afterwards."""
        self.work.mkdir(parents=True, exist_ok=True)
        say("preparing the model and the samples")
        command = [HERE / "inputs.py", self.recipe, *self.overrides, "--work", self.work, "--steps", self.steps]
        run(python(*command, "--seeds", *seeds))
        return json.loads((self.work / "inputs.json").read_text())

    def ours(self, *, seed: int, out: Path, stop_after: int | None = None, caches: Path | None = None) -> Finished:
        keys = [*self.overrides, f"init_from={self.work / 'start'}", f"train.seed={seed}", f"out_dir={out}"]
        keys += [f"train.max_steps={self.steps}", "train.optimizer=adamw", "log.log_interval=1"]
        command = python("-m", "pertoken", "train", self.recipe, *keys, "--overwrite")
        return run(command, env=self.caches(caches), stop_after=stop_after)

    def trl(
        self,
        flags: Sequence[str],
        *,
        seed: int,
        out: Path | None = None,
        stop_after: int | None = None,
        caches: Path | None = None,
    ) -> Finished:
        command = python(HERE / "trl_sft.py", "--work", self.work, "--seed", seed, "--steps", self.steps, *flags)
        command += ["--out", out] if out else []
        return run(command, env=self.caches(caches), stop_after=stop_after)

    def caches(self, folder: Path | None) -> dict[str, str]:
        """Where compiled code is kept: `folder`, or one that all rounds share. Tokens are kept elsewhere."""
        folder = folder or self.work / "caches"
        return {
            "XDG_CACHE_HOME": str(folder),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "HF_HOME": str(self.work / "hf"),
        }

    def new_caches(self, name: str) -> Path:
        folder = self.work / f"caches-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def steady_steps(finished: Finished, warm_up: int, pattern: re.Pattern[str] = STEP) -> list[float]:
    """Seconds from each step's end to the next one's, after the warm-up."""
    ends = finished.steps(pattern)
    return [ends[step] - ends[step - 1] for step in sorted(ends) if step > warm_up and step - 1 in ends]


def row_of(
    name: str,
    runs: Sequence[Finished],
    steps: Sequence[float],
    batch_size: int,
    pattern: re.Pattern[str] = STEP,
) -> dict[str, Any]:
    """A contender's line of the table."""
    return {
        "contender": name,
        "samples/s": round(batch_size / statistics.median(steps), 3),
        "step s": spread(steps),
        "steps": len(steps),
        "first step over after s": spread([min(f.steps(pattern).values()) for f in runs], 1),
        "peak GB": round(max(f.peak_bytes for f in runs) / 1e9, 2),
    }


class MiniMind:
    """MiniMind's own script in a copy of a checkout, with the same first weights and the same rows."""

    def __init__(self, checkout: Path, task: Task, batch_size: int, max_seq_len: int) -> None:
        existing(checkout / "trainer" / "train_full_sft.py", "--minimind, a checkout of MiniMind")
        self.copy, self.task = task.work / "minimind", task
        shutil.rmtree(self.copy, ignore_errors=True)
        for part in ("model", "trainer", "dataset"):
            shutil.copytree(checkout / part, self.copy / part)
        run(python("-m", "pertoken", "export", task.work / "start", "--format", "minimind", "--out", self.copy / "out"))
        (weights,) = (self.copy / "out").glob("*.pth")
        self.hidden_size = int(weights.stem.rpartition("_")[2])
        self.settings = ["--batch_size", batch_size, "--max_seq_len", max_seq_len, "--hidden_size", self.hidden_size]

    def write_rows(self, path: Path, prompt_key: str, completion_key: str) -> None:
        keys = ("reasoning_content", "tools", "tool_calls")
        with path.open(encoding="utf-8") as source, (self.copy / "rows.jsonl").open("w", encoding="utf-8") as file:
            for line in source:
                row = json.loads(line)
                turns = (("user", row[prompt_key]), ("assistant", row[completion_key]))
                turns = [{"role": role, "content": text, **dict.fromkeys(keys)} for role, text in turns]
                file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")

    def train(self, stop_after: int) -> Finished:
        command = ["train_full_sft.py", "--device", "cpu", "--data_path", self.copy / "rows.jsonl", *self.settings]
        command += ["--from_weight", "pertoken", "--log_interval", 1, "--num_workers", 0, "--epochs", 1]
        return run(
            python(*command),
            cwd=self.copy / "trainer",
            env=self.task.caches(None),
            stop_after=stop_after,
            step_line=MINIMIND_STEP,
        )


def evaluate(task: Task, model: Path, data: Path, keys: Sequence[str]) -> float:
    out = task.work / "eval.json"
    run(python("-m", "pertoken", "eval", model, data, *keys, "--json", out), env=task.caches(None))
    return float(json.loads(out.read_text())["loss"])


def first_rows(source: Path, count: int, target: Path) -> Path:
    """The first `count` lines, 0 for all."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[: count or None]), encoding="utf-8")
    return target


class Figures:
    """Samples a second, peak memory, and of the whole runs wall time and held-out loss, by contender."""

    def __init__(self, results: dict[str, list[Finished]], warm_up: int, batch_size: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.speed: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.wall: dict[str, float] = {}
        self.loss: dict[str, float] = {}
        for name, runs in results.items():
            pattern = MINIMIND_STEP if name == "MiniMind" else STEP
            steps = [s for finished in runs for s in steady_steps(finished, warm_up, pattern)]
            if steps:
                self.rows.append(row_of(name, runs, steps, batch_size, pattern))
                self.speed[name] = batch_size / statistics.median(steps)
                self.peak[name] = max(f.peak_bytes for f in runs)
        theirs = [name for name in self.speed if name.startswith("TRL bf16")]
        self.rival = max(theirs, key=lambda name: self.speed[name], default="TRL bf16")

    def add_whole_run(self, name: str, finished: Finished, loss: float, steps: int) -> None:
        self.wall[name], self.loss[name] = finished.wall_s, loss
        self.peak[name] = max(self.peak.get(name, 0), finished.peak_bytes)
        for row in self.rows:
            if row["contender"] == name:
                row |= {f"{steps} steps s": round(finished.wall_s, 1), "held-out loss": round(loss, 4)}
                row["peak GB"] = round(self.peak[name] / 1e9, 2)

    def claims(self, steps: int, without_minimind: str) -> list[dict[str, Any]]:
        both = f"against {self.rival}"
        loss, speed, wall, peak = self.loss, self.speed, self.wall, self.peak
        steady = ratio(speed.get(OURS), speed.get(self.rival))
        whole = ratio(wall.get(self.rival), wall.get(OURS))
        apart = abs(loss[OURS] - loss[self.rival]) if len(loss) == 2 else None
        minimind = ratio(speed.get(OURS), speed.get("MiniMind"))
        memory = ratio(peak.get(OURS), peak.get(self.rival))
        return [
            claim(f"fine-tuning, steady state, times {both}", steady, at_least=2.4, aim=3.0),
            claim(
                f"fine-tuning, {steps} steps, start-up and compiling counted, times {both}",
                whole,
                at_least=2.1,
                aim=2.7,
            ),
            claim(f"held-out loss after {steps} steps, apart from {self.rival}", apart, at_most=0.01),
            claim(
                "fine-tuning, steady state, times against MiniMind's script",
                minimind,
                at_least=4.0,
                aim=5.0,
                why_not=without_minimind,
            ),
            claim(f"peak memory of fine-tuning {both}", memory, at_most=0.5, aim=0.35),
        ]


def whole_runs(task: Task, figures: Figures, data: Path, eval_rows: int) -> None:
    """All steps of pertoken and of its rival from cold caches, then one evaluator over both models."""
    held_out = first_rows(data / "sft/gsm8k/test.jsonl", eval_rows, task.work / "held-out.jsonl")
    how = ["stage=sft", "data.format=prompt_completion", "data.prompt_key=question", "data.completion_key=answer"]
    how += [f"data.max_seq_len={MAX_SEQ_LEN}", "data.overlong=truncate"]
    for name in (OURS, figures.rival):
        say(f"whole run of {task.steps} steps: {name}")
        out, caches = task.work / f"whole-{'ours' if name == OURS else 'trl'}", task.new_caches("whole")
        shutil.rmtree(out, ignore_errors=True)
        if name == OURS:
            finished = task.ours(seed=SEED, out=out, caches=caches)
        else:
            finished = task.trl(TRL[name], seed=SEED, out=out, caches=caches)
        figures.add_whole_run(name, finished, evaluate(task, out, held_out, how), task.steps)


def arguments_of() -> argparse.Namespace:
    parser = parser_of(__doc__, name="finetune")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "gsm8k-30m.toml")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with sft/gsm8k and tokenizer/minimind")
    parser.add_argument("--minimind", type=Path, help="a checkout of MiniMind")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--round-steps", type=int, default=8)
    parser.add_argument("--compiled-round-steps", type=int, default=6, help="of TRL with torch_compile: it is slow")
    parser.add_argument("--warm-up", type=int, default=3, help="first steps of a round that do not count")
    parser.add_argument("--steps", type=int, default=200, help="of the whole run, and planned in every round")
    parser.add_argument("--no-whole", action="store_true", help="leave out the whole runs")
    parser.add_argument("--eval-rows", type=int, default=500, help="held-out rows for the evaluation; 0: all 1,319")
    parser.add_argument("--family", choices=FAMILIES, help="of the model, in place of the recipe's")
    parser.add_argument("--only", nargs="+", choices=[OURS, *TRL, "MiniMind"], help="these contenders alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="recipe keys for pertoken")
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    data = existing(arguments.data, "--data, a folder with sft/gsm8k and tokenizer/minimind").resolve()
    work = arguments.work.resolve()
    keys = (
        f"data.path={data / 'sft/gsm8k/train.jsonl'}",
        "data.eval_path=[]",  # nobody evaluates on the way
        f"data.tokenizer={data / 'tokenizer/minimind'}",
        f"data.max_seq_len={MAX_SEQ_LEN}",
        f"data.store={work / 'store'}",
        *(f"model.{key}={value}" for key, value in FAMILIES.get(arguments.family, {}).items()),
        *arguments.set,
    )
    task = Task(arguments.recipe, keys, work, arguments.steps)
    inputs = task.prepare([SEED + r for r in range(arguments.rounds)])
    batch_size = inputs["batch_size"]

    contenders = {OURS: lambda r: task.ours(seed=SEED + r, out=work / "run", stop_after=arguments.round_steps)}
    for name, flags in TRL.items():
        count = arguments.compiled_round_steps if "--torch-compile" in flags else arguments.round_steps
        contenders[name] = lambda r, f=flags, n=count: task.trl(f, seed=SEED + r, stop_after=n)
    reasons = {}
    if arguments.minimind:
        minimind = MiniMind(arguments.minimind.resolve(), task, batch_size, MAX_SEQ_LEN)
        minimind.write_rows(data / "sft/gsm8k/train.jsonl", "question", "answer")
        contenders["MiniMind"] = lambda _: minimind.train(arguments.round_steps)
    else:
        reasons["MiniMind"] = "no --minimind given"
    if arguments.only:
        contenders = {name: contenders[name] for name in arguments.only if name in contenders}
    once = [name for name in contenders if "torch_compile" in name]
    results, failed = alternate(contenders, arguments.rounds, once=once)
    reasons |= failed
    figures = Figures(results, arguments.warm_up, batch_size)
    if not arguments.no_whole:
        whole_runs(task, figures, data, arguments.eval_rows)
    write(
        arguments.out,
        "finetune",
        title="Fine-tuning: 30M on GSM8K as chat",
        settings={
            "parameters": f"{inputs['parameters']:,}",
            "batch": batch_size,
            "mean length": round(inputs["mean_length"], 1),
            "supervised": f"{inputs['supervised_share']:.0%}",
            "rounds": arguments.rounds,
            "family": arguments.family or "the recipe's",
            "overrides": " ".join(arguments.set) or "none",
        },
        rows=figures.rows,
        claims=figures.claims(arguments.steps, reasons.get("MiniMind", "")),
        notes=[
            f"steps {arguments.warm_up + 1} to {arguments.round_steps} of {arguments.rounds} rounds; samples/s at the "
            "median step; in brackets the least and the greatest, for steps differ in length",
            *(
                f"{name}: compiles again for new lengths, which is in its steps; one round, up to step "
                f"{arguments.compiled_round_steps}"
                for name in once
            ),
            *(f"{name}: {reason}" for name, reason in reasons.items()),
        ],
    )


if __name__ == "__main__":
    main_of(main)
