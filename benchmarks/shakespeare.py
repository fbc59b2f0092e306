"""Time to a validation loss on Tiny Shakespeare, characters: pertoken against nanoGPT's own CPU command.

    python benchmarks/shakespeare.py [--nanogpt CHECKOUT] [--recipe RECIPE] [--rounds 2] [--long RECIPE]

Both start from the text file and cold: processes, imports, characters to tokens, compilation where there is any.
pertoken is `pertoken tokenizer train --kind char` and then `pertoken train RECIPE`; its time is when the first
evaluation at or below the target is over. nanoGPT is its prepare.py and the command of its README for a CPU, whole;
of the checkpoint it leaves, the loss is measured here, since its own figure is an estimate on 20 random batches.

The loss is nats a character over the whole last 10% of the text for both, in windows of the model's own length that
do not overlap, every character predicted once. `--long` runs one more recipe alone and reports its best loss and how
long it took.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    DATA,
    OURS,
    ROOT,
    Finished,
    Missing,
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

NANOGPT = "nanoGPT"
EVALUATION = re.compile(r"^step\s+(\d+)\b.*\beval (\d+\.\d+)")
# The README's command, but for where it writes.
NANOGPT_OPTIONS = """--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12
    --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0""".split()
NANOGPT_ITERATIONS = 2000


def ours(recipe: Path, text: Path, work: Path, keys: Sequence[str]) -> dict[str, Any]:
    """(wall of both processes, when the loss was first at or below each value seen, the best loss)."""
    shutil.rmtree(work, ignore_errors=True)
    caches = {"XDG_CACHE_HOME": str(work / "caches"), "TORCHINDUCTOR_CACHE_DIR": str(work / "caches" / "inductor")}
    tokenizer = work / "tokenizer"
    first = run(python("-m", "pertoken", "tokenizer", "train", text, "--kind", "char", "--out", tokenizer), env=caches)
    where = [f"data.path={text}", f"data.tokenizer={tokenizer}", f"out_dir={work / 'run'}"]
    second = run(python("-m", "pertoken", "train", recipe, *where, *keys), env=caches)
    evaluations = [
        (first.wall_s + at, float(match[2])) for at, line in second.lines if (match := EVALUATION.search(line))
    ]
    return {
        "wall_s": first.wall_s + second.wall_s,
        "evaluations": evaluations,
        "best": min(loss for _, loss in evaluations),
        "peak_bytes": second.peak_bytes,
    }


def nanogpt(checkout: Path, text: Path, work: Path, options: Sequence[str]) -> dict[str, Any]:
    existing(checkout / "train.py", "--nanogpt, a checkout of nanoGPT")
    shutil.rmtree(work, ignore_errors=True)
    ignore = shutil.ignore_patterns(".git", "out*", "assets", "*.ipynb", "*.bin", "*.pkl", "openwebtext")
    shutil.copytree(checkout, work, ignore=ignore)
    data = work / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")  # where prepare.py would download it to
    processes: list[Finished] = [
        run(python(data / "prepare.py"), cwd=work),
        run(python("train.py", "config/train_shakespeare_char.py", *NANOGPT_OPTIONS, *options), cwd=work),
    ]
    measured = run(python(Path(__file__).resolve(), "--evaluate-nanogpt", work), cwd=work).output.splitlines()
    return {
        "wall_s": sum(p.wall_s for p in processes),
        "best": json.loads(measured[-1])["loss"],
        "peak_bytes": processes[1].peak_bytes,
    }


def evaluate_nanogpt(work: Path) -> float:
    """Nats a character of the checkpoint over all of val.bin, in windows that do not overlap."""
    import numpy as np
    import torch

    sys.path.insert(0, str(work))
    from model import GPT, GPTConfig

    saved = torch.load(work / "out-shakespeare-char" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    length = saved["model_args"]["block_size"]
    tokens = torch.from_numpy(np.fromfile(work / "data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64))
    loss_sum = count = 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 64 * length):
            part = tokens[start : start + 64 * length + 1]
            whole = (len(part) - 1) // length * length  # a last, shorter window comes by itself
            for x, y in ((part[:whole], part[1 : whole + 1]), (part[whole:-1], part[whole + 1 :])):
                if len(x):
                    rows = (-1, length) if len(x) % length == 0 else (1, -1)
                    loss = model(x.view(rows), y.view(rows))[1]
                    loss_sum, count = loss_sum + float(loss) * len(x), count + len(x)
    assert count == len(tokens) - 1, (count, len(tokens))
    return loss_sum / count


def reached(result: dict[str, Any], target: float) -> float | None:
    return next((at for at, loss in result["evaluations"] if loss <= target), None)


def main() -> None:
    parser = parser_of(__doc__, name="shakespeare")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "shakespeare-char.toml")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with raw_en/tinyshakespeare/input.txt")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--nanogpt-iterations", type=int, default=NANOGPT_ITERATIONS, help="fewer only to try this out")
    parser.add_argument("--target", type=float, default=1.88, help="nats a character, what nanoGPT publishes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--long", type=Path, metavar="RECIPE", help="also run this one, for its best loss")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="recipe keys for pertoken")
    parser.add_argument("--evaluate-nanogpt", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.evaluate_nanogpt:
        print(json.dumps({"loss": evaluate_nanogpt(arguments.evaluate_nanogpt)}))
        return

    text = existing(arguments.data / "raw_en/tinyshakespeare/input.txt", "--data").resolve()
    work = arguments.work.resolve()
    contenders = {OURS: lambda _: ours(arguments.recipe, text, work / "ours", arguments.set)}
    reasons = {}
    if arguments.nanogpt:
        checkout, count = arguments.nanogpt.resolve(), arguments.nanogpt_iterations
        fewer = [f"--max_iters={count}", f"--lr_decay_iters={count}", f"--eval_interval={count}"]
        options = fewer if count != NANOGPT_ITERATIONS else []
        contenders[NANOGPT] = lambda _: nanogpt(checkout, text, work / "nanogpt", options)
        if options:
            reasons[NANOGPT] = f"shortened to {count} iterations"
    else:
        reasons[NANOGPT] = "no --nanogpt given"
    results, failed = alternate(contenders, arguments.rounds)
    reasons |= failed
    if OURS in failed:
        raise Missing(failed[OURS])

    times = [reached(result, arguments.target) for result in results[OURS]]
    own = None if None in times else spread(times)
    rows: list[dict[str, Any]] = [
        {
            "contender": f"{OURS}, {arguments.recipe.name}",
            f"to {arguments.target:g} s": own or "not reached",
            "whole s": spread([r["wall_s"] for r in results[OURS]], 1),
            "validation": spread([r["best"] for r in results[OURS]], 4),
            "peak GB": round(max(r["peak_bytes"] for r in results[OURS]) / 1e9, 2),
        }
    ]
    theirs = None  # the time of its whole command
    if found := results.get(NANOGPT):
        theirs = spread([r["wall_s"] for r in found], 1)
        rows.append(
            {
                "contender": f"{NANOGPT}, its CPU command",
                "whole s": theirs,
                "validation": spread([r["best"] for r in found], 4),
                "peak GB": round(max(r["peak_bytes"] for r in found) / 1e9, 2),
            }
        )
    best, took = None, 0.0
    if arguments.long:
        say(f"long run: {arguments.long}")
        result = ours(arguments.long, text, work / "long", [])
        best, took = result["best"], result["wall_s"]
        rows.append(
            {
                "contender": f"{OURS}, {arguments.long.name}",
                "whole s": round(took, 1),
                "validation": round(best, 4),
                "peak GB": round(result["peak_bytes"] / 1e9, 2),
            }
        )
    in_time = best if best is not None and took <= 1260 else None  # 20 minutes, and start-up
    write(
        arguments.out,
        "shakespeare",
        title="Time to a loss: Tiny Shakespeare, characters",
        settings={
            "target": arguments.target,
            "rounds": arguments.rounds,
            "overrides": " ".join(arguments.set) or "none",
        },
        rows=rows,
        claims=[
            claim(
                f"Tiny Shakespeare to {arguments.target:g}, times faster than nanoGPT's command, both with start-up",
                None if reasons else ratio(theirs["median"] if theirs else None, own["median"] if own else None),
                at_least=4.0,
                aim=8.0,
                why_not=reasons.get(NANOGPT, "the target was not reached"),
            ),
            claim(
                "Tiny Shakespeare, best validation loss in 20 minutes",
                in_time,
                at_most=1.52,
                aim=1.46,
                why_not=f"took {took:.0f} s" if best is not None else "no --long RECIPE given",
            ),
        ],
        notes=[f"{name}: {reason}" for name, reason in reasons.items()],
    )


if __name__ == "__main__":
    main_of(main)
