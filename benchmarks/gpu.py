"""Supervised fine-tuning on one GPU: tokens/s and memory, of pertoken and of transformers' own model in a plain loop.

    python benchmarks/gpu.py RECIPE [key=value ...] --steps 60

Both train the recipe's model from the same random weights on the same samples in the same order, in bfloat16 autocast
with fused AdamW. The plain loop is what a Trainer does: a batch is padded on the right to its longest sample, an
attention mask hides the padding, all logits are computed in float32, the loss is a mean over the batch's supervised
tokens. Tokens are real input tokens; padding counts for nobody. Times are medians of the steps after the first ten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = 10
CONTENDERS = ("pertoken", "pertoken, compiled", "transformers, padded")


def ours(recipe: Path, overrides: list[str], steps: int, engine: str) -> dict[str, Any]:
    import torch

    from pertoken import Recipe, train

    with tempfile.TemporaryDirectory() as folder:
        settings = [*overrides, f"out_dir={folder}/run", f"train.max_steps={steps}", f"train.engine={engine}"]
        settings += ["train.device=cuda", "train.dtype=bfloat16", "checkpoint.async_save=false"]
        torch.cuda.reset_peak_memory_stats()
        train(Recipe.load(recipe, settings))
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    times = [row["step_s"] for row in rows[WARM_UP:]]
    tokens = [row["tokens"] for row in rows[WARM_UP:]]
    return _figures(times, tokens, rows[-1]["loss"], rows[0]["loss"])


def theirs(recipe: Path, overrides: list[str], steps: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from pertoken import Recipe
    from pertoken.data.batch.order import step_at
    from pertoken.folders.open import save_folder
    from pertoken.model.decoder import CausalLM
    from pertoken.runs.data import prepare
    from pertoken.training.schedule import lr_at

    recipe_ = Recipe.load(recipe, [*overrides, f"train.max_steps={steps}"])
    store, _ = prepare(recipe_)
    vocab_size = int(max(store[i].tokens.max() for i in range(len(store)))) + 1
    start = CausalLM(recipe_.model.resolve(max(vocab_size, 6400)), seed=recipe_.train.seed)
    with tempfile.TemporaryDirectory() as folder:
        save_folder(start, folder, eos_token_id=None)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").cuda()
    train_ = recipe_.train
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": train_.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train_.learning_rate, betas=train_.betas, fused=True)
    torch.cuda.reset_peak_memory_stats()
    times, tokens, losses = [], [], []
    for step in range(1, steps + 1):
        ids = step_at(step, num_samples=len(store), batch_size=train_.batch_size, seed=train_.seed).sample_ids
        samples = [store[int(i)] for i in ids]
        torch.cuda.synchronize()
        began = time.perf_counter()
        width = max(len(s.tokens) - 1 for s in samples)
        inputs = torch.zeros(len(samples), width, dtype=torch.int64)
        labels = torch.full((len(samples), width), -100, dtype=torch.int64)
        mask = torch.zeros(len(samples), width, dtype=torch.int64)
        for i, sample in enumerate(samples):
            n = len(sample.tokens) - 1
            ids_ = torch.from_numpy(sample.tokens.astype("int64"))
            inputs[i, :n], mask[i, :n] = ids_[:-1], 1
            labels[i, :n] = torch.where(torch.from_numpy(sample.loss_mask.copy()) != 0, ids_[1:], -100)
        inputs, labels, mask = inputs.cuda(), labels.cuda(), mask.cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train_.grad_clip)
        lr = lr_at(
            step,
            peak=train_.learning_rate or 0.0,
            warmup_steps=train_.warmup_steps,
            total_steps=steps,
            schedule=train_.schedule,
            min_lr_ratio=train_.min_lr_ratio,
            decay_ratio=train_.decay_ratio,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.perf_counter() - began)
        tokens.append(int(mask.sum()))
    return _figures(times[WARM_UP:], tokens[WARM_UP:], losses[-1], losses[0])


def _figures(times: list[float], tokens: list[int], last: float, first: float) -> dict[str, Any]:
    import torch

    rates = [n / s for n, s in zip(tokens, times, strict=True)]
    return {
        "tokens_per_s": statistics.median(rates),
        "least": min(rates),
        "greatest": max(rates),
        "step_ms": 1e3 * statistics.median(times),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "first_loss": first,
        "last_loss": last,
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contender", choices=CONTENDERS, help="run one, in this process, and print its figures")
    options = parser.parse_args()
    if options.contender:
        if options.contender == CONTENDERS[2]:
            found = theirs(options.recipe, options.overrides, options.steps)
        else:
            engine = "compile" if "compiled" in options.contender else "plain"
            found = ours(options.recipe, options.overrides, options.steps, engine)
        print(json.dumps(found))
        return
    for number in range(options.rounds):
        for name in CONTENDERS[number % 3 :] + CONTENDERS[: number % 3]:
            command = [sys.executable, __file__, str(options.recipe), *options.overrides]
            ended = subprocess.run(
                [*command, "--steps", str(options.steps), "--contender", name], capture_output=True, text=True
            )
            if ended.returncode:
                print(f"{name:<22} failed: {ended.stderr[-1500:]}")
                continue
            f = json.loads(ended.stdout.splitlines()[-1])
            print(
                f"{name:<22} {f['tokens_per_s']:>9,.0f} tokens/s [{f['least']:,.0f}-{f['greatest']:,.0f}]  "
                f"{f['step_ms']:7.1f} ms a step  {f['peak_gb']:6.2f} GB  "
                f"loss {f['first_loss']:.4f} -> {f['last_loss']:.4f}  {f['gpu']}, torch {f['torch']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
