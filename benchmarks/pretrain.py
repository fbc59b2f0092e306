"""Pretraining on the CPU: tokens a second, and the share of the processor's own matrix rate that they are worth.

    python benchmarks/pretrain.py [--family F] [--rounds 2] [--steps 10] [--set key=value ...]

The 30M model of recipes/gsm8k-30m.toml (26.7M without its embedding) on samples of 512 tokens, 16 a step, in
bfloat16, by `pertoken train`. The text is made up: uniform over 6,000 characters, which is a vocabulary like
MiniMind's, and nothing needs to be downloaded.

Useful operations: 6 * (parameters without the embedding) a token, 6 * vocabulary * hidden size a supervised token,
and causal attention, half the square. The matrix rate is measured in the same call, between the rounds: bfloat16
`F.linear` at the shapes of this model, and the best of them over all rounds is what the share is of.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import FAMILIES, OURS, Failed, alternate, claim, main_of, parser_of, python, run, spread, write
from finetune import steady_steps

CHARACTERS, LENGTH, BATCH = 6000, 512, 16


def write_text(path: Path, steps: int) -> None:
    rng = random.Random(0)
    alphabet = [chr(0x4E00 + i) for i in range(CHARACTERS)]
    document = "".join(alphabet)  # every character comes once, whatever is drawn
    document += "".join(rng.choices(alphabet, k=(steps + 1) * BATCH * LENGTH))
    path.write_text(document, encoding="utf-8")


def matrix_rates(rows: int, repeats: int) -> dict[str, float]:
    """Operations a second of `F.linear` in bfloat16 by shape: forward, the median of `repeats`."""
    import torch
    import torch.nn.functional as F

    def seconds(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    rates = {}
    for wide, deep in ((512, 512), (1024, 512), (1664, 512), (3328, 512), (512, 1664), (6400, 512)):
        x, w = torch.randn(rows, deep).bfloat16(), torch.randn(wide, deep).bfloat16()
        rates[f"{rows}x{deep}x{wide}"] = 2 * rows * deep * wide / seconds(lambda x=x, w=w: F.linear(x, w))
    return rates


def useful_operations(model: dict[str, Any], parameters: int, vocab_size: int) -> float:
    """Of one step, forward and backward; every token is supervised."""
    hidden, tokens = model["hidden_size"], BATCH * LENGTH
    body = parameters - vocab_size * hidden
    # q k^T and p v over half the square: 2 * 2 * T^2 / 2 * hidden forward, and twice that backward
    attention = 6 * model["num_hidden_layers"] * hidden * LENGTH**2 * BATCH
    return 6.0 * body * tokens + 6.0 * vocab_size * hidden * tokens + attention


def main() -> None:
    parser = parser_of(__doc__, name="pretrain")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of a round")
    parser.add_argument("--warm-up", type=int, default=4, help="first steps of a round that do not count")
    parser.add_argument("--planned-steps", type=int, default=1000, help="what pertoken is told; rounds stop earlier")
    parser.add_argument("--repeats", type=int, default=20, help="of each matrix product")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3", help="of the model, whose sizes stay")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="recipe keys for pertoken")
    parser.add_argument("--matrix-rates", type=int, metavar="ROWS", help="print the matrix rates as JSON and stop")
    arguments = parser.parse_args()
    if arguments.matrix_rates:
        print(json.dumps(matrix_rates(arguments.matrix_rates, arguments.repeats)))
        return

    if any(key.startswith(("model.", "data.", "train.batch_size")) for key in arguments.set):
        parser.error("--set: model, data and batch are fixed here, since the useful operations are counted for them")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    text, tokenizer = work / "text.txt", work / "tokenizer"
    write_text(text, arguments.steps)
    run(python("-m", "pertoken", "tokenizer", "train", text, "--kind", "char", "--out", tokenizer))
    model = {
        **FAMILIES[arguments.family],
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1664,
        "vocab_size": 6400,
        "max_position_embeddings": LENGTH,
    }
    train = {
        "max_steps": arguments.planned_steps,
        "batch_size": BATCH,
        "optimizer": "adamw",
        "warmup_steps": 100,
        "dtype": "bfloat16",
        "device": "cpu",
    }
    recipe = work / "recipe.toml"
    sections = (("model", model), ("train", train))
    recipe.write_text(
        'stage = "pretrain"\nout_dir = "run"\n'
        + f"[data]\npath = {json.dumps(str(text))}\ntokenizer = {json.dumps(str(tokenizer))}\n"
        + f"max_seq_len = {LENGTH}\nstore = {json.dumps(str(work / 'store'))}\n[log]\nlog_interval = 1\n"
        + "".join(f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in s.items()) for name, s in sections)
    )
    command = python("-m", "pertoken", "train", recipe, f"out_dir={work / 'run'}", *arguments.set, "--overwrite")
    caches = {"XDG_CACHE_HOME": str(work / "caches"), "TORCHINDUCTOR_CACHE_DIR": str(work / "caches" / "inductor")}
    script = Path(__file__).resolve()

    def rates(_: int) -> dict[str, float]:
        measure = [script, "--repeats", arguments.repeats, "--matrix-rates"]
        return {
            shape: rate
            for rows in (4096, BATCH * LENGTH)
            for shape, rate in json.loads(run(python(*measure, rows)).output).items()
        }

    results, reasons = alternate(
        {"matrix": rates, OURS: lambda r: run(command, env=caches, stop_after=arguments.steps)}, arguments.rounds
    )
    if reasons:
        raise Failed("; ".join(reasons.values()))
    # Counted here and not asked of pertoken: matrices of a layer, its two norms, what the family adds, the last norm
    head = model["hidden_size"] // model["num_attention_heads"]
    wide, kv = model["hidden_size"], model["num_key_value_heads"] * head
    layer = 2 * wide * wide + 2 * wide * kv + 3 * wide * model["intermediate_size"] + 2 * wide
    layer += {"qwen3": 2 * head, "qwen2": wide + 2 * kv}.get(model["family"], 0)  # norms of heads; biases of q, k, v
    parameters = model["vocab_size"] * wide + model["num_hidden_layers"] * layer + wide
    operations = useful_operations(model, parameters, model["vocab_size"])

    best = {shape: [round_[shape] for round_ in results["matrix"]] for shape in results["matrix"][0]}
    rate = max(r for found in best.values() for r in found)
    steps = [s for finished in results[OURS] for s in steady_steps(finished, arguments.warm_up)]
    share = operations / statistics.median(steps) / rate
    write(
        arguments.out,
        "pretrain",
        title="Pretraining: 26.7M (and its embedding) at 512 tokens, bfloat16",
        settings={
            "family": arguments.family,
            "parameters": f"{parameters:,}",
            "tokens a step": BATCH * LENGTH,
            "useful GFLOP a step": round(operations / 1e9),
            "overrides": " ".join(arguments.set) or "none",
        },
        rows=[
            {
                "what": f"pertoken, {len(steps)} steps",
                "step s": spread(steps),
                "tokens/s": round(BATCH * LENGTH / statistics.median(steps)),
                "GFLOP/s": spread([operations / s / 1e9 for s in steps], 0),
                "share of the best": round(share, 3),
                "peak GB": round(max(f.peak_bytes for f in results[OURS]) / 1e9, 2),
            },
            *(
                {
                    "what": f"F.linear {shape}",
                    "GFLOP/s": spread([r / 1e9 for r in found], 0),
                    "share of the best": round(max(found) / rate, 3),
                }
                for shape, found in best.items()
            ),
        ],
        claims=[
            claim("pretraining, share of the matrix rate (best shape)", share, at_least=0.70, aim=0.80),
        ],
    )


if __name__ == "__main__":
    main_of(main)
