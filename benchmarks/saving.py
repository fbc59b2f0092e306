"""What saving costs a run: the 30M model of recipes/gsm8k-30m.toml, with a checkpoint every few steps and with none.

    python benchmarks/saving.py [--rounds 3] [--steps 62] [--interval 10] [--set key=value ...]

Rounds of one process per contender, one after the other. A contender's time is from the end of step 2 to the end of the
last step but one, before the last save, which no run escapes. What a save costs is the difference, divided by the
number of saves; that is then set against `--at` steps without one. A save every 50 steps would cost too little to be
seen in a run of minutes, so they come more often here; in the background where the recipe says so (the default), and
once with `checkpoint.async_save=false` beside.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

from common import DATA, ROOT, Finished, alternate, claim, existing, main_of, parser_of, python, run, spread, write

NEVER, BACKGROUND, AT_ONCE = "no checkpoint", "in the background", "at once"


def main() -> None:
    parser = parser_of(__doc__, name="saving")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "gsm8k-30m.toml")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with sft/gsm8k and tokenizer/minimind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=62)
    parser.add_argument("--interval", type=int, default=10, help="steps between saves")
    parser.add_argument("--at", type=int, default=50, help="the interval that the claim is about")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="recipe keys")
    arguments = parser.parse_args()

    data = existing(arguments.data, "--data, a folder with sft/gsm8k and tokenizer/minimind").resolve()
    work, steps = arguments.work.resolve(), arguments.steps
    keys = [
        f"data.path={data / 'sft/gsm8k/train.jsonl'}",
        "data.eval_path=[]",
        f"data.tokenizer={data / 'tokenizer/minimind'}",
        f"data.store={work / 'store'}",
        f"train.max_steps={steps}",
        "train.warmup_steps=0",
        "log.log_interval=1",
        *arguments.set,
    ]
    run(python("-m", "pertoken", "prepare", arguments.recipe, *keys))

    def contender(interval: int, background: bool) -> Any:
        save = [f"checkpoint.save_interval={interval}", f"checkpoint.async_save={str(background).lower()}"]

        def of_round(_: int) -> Finished:
            shutil.rmtree(work / "run", ignore_errors=True)
            command = ["train", arguments.recipe, *keys, *save, f"out_dir={work / 'run'}"]
            return run(python("-m", "pertoken", *command))

        return of_round

    contenders = {
        NEVER: contender(10 * steps, True),
        BACKGROUND: contender(arguments.interval, True),
        AT_ONCE: contender(arguments.interval, False),
    }
    results, reasons = alternate(contenders, arguments.rounds)
    saves = sum(3 <= step <= steps - 1 for step in range(arguments.interval, steps, arguments.interval))
    seconds = {name: [f.steps()[steps - 1] - f.steps()[2] for f in runs] for name, runs in results.items()}
    step_s = statistics.median(seconds[NEVER]) / (steps - 3) if seconds.get(NEVER) else None
    rows, shares = [], {}
    for name, of_rounds in seconds.items():
        row = {"checkpoints": name, "s": spread(of_rounds)}
        row["peak GB"] = round(max(f.peak_bytes for f in results[name]) / 1e9, 2)
        if name != NEVER and step_s is not None:
            cost = statistics.median([b - a for a, b in zip(seconds[NEVER], of_rounds, strict=True)]) / saves
            shares[name] = cost / (arguments.at * step_s)
            row |= {"s a save": round(cost, 3), f"share at {arguments.at} steps": f"{shares[name]:.2%}"}
        rows.append(row)
    text = f"share of a run's time that saving every {arguments.at} steps takes, in the background"
    write(
        arguments.out,
        "saving",
        title="Saving: 30M on GSM8K as chat",
        settings={"rounds": arguments.rounds, "steps": steps, "saves": saves, "every": arguments.interval},
        rows=rows,
        claims=[claim(text, shares.get(BACKGROUND), at_most=0.02, why_not=str(reasons))],
    )


if __name__ == "__main__":
    main_of(main)
